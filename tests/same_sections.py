"""Keeps the scripts' copied sections equal: a check, a repair, and a report.

    python tests/same_sections.py                             # check: exit code 1 if copies differ
    python tests/same_sections.py --from supervised.py --write    # copy its sections to the others
    python tests/same_sections.py --report                    # sizes, and changed lines per pair
    python tests/same_sections.py --readme                    # the same, into the README

A section runs from its banner ``# === name ===`` to the next banner, to a top-level ``def main`` or
to the end of the indented block it stands in. One whose banner ends in ``(copied)`` is the same
text, byte for byte, in every script that has it. Any other top-level name that two scripts define
must be the same text too, unless it is on the list of names that each method defines for itself.
"""

import argparse
import ast
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# script -> the one it is read after
SCRIPTS = {
    "supervised": None,
    "cps": "supervised",
    "mean_teacher": "supervised",
    "pi_model": "mean_teacher",
    "temporal_ensembling": "pi_model",
    "cutmix_mt": "mean_teacher",
    "classmix": "cutmix_mt",
    "ael": "classmix",
    "cct": "supervised",
    "gct": "cps",
    "cmb": "mean_teacher",
    "dcc": "supervised",
    "pseudoseg": "supervised",
    "self_training": "supervised",
    "self_correcting": "supervised",
    "unimatch_v2": "mean_teacher",
}
# Names that several papers use for different things (the interface fixes them).
OWN_TEXT = {
    "Args", "BACKBONES", "PAPER", "box_masks", "consistency_loss", "main", "make_batches",
    "make_network", "ohem_cross_entropy", "strong_view", "supervised_loss", "unsupervised_loss",
}  # fmt: skip
BANNER = re.compile(r"^( *)# === (.+?) ===$")


def existing() -> list[str]:
    return [name for name in SCRIPTS if (ROOT / f"{name}.py").exists()]


def sections(lines: list[str]) -> list[tuple[str, int, int]]:
    """(name, first line, line after the last) of every section, banners included."""
    found = []
    for start, line in enumerate(lines):
        banner = BANNER.match(line)
        if not banner:
            continue
        indent, end = len(banner[1]), start + 1
        while end < len(lines):
            text = lines[end]
            shallower = text.strip() and len(text) - len(text.lstrip()) < indent
            if BANNER.match(text) or text.startswith(("def main(", "if __name__")) or shallower:
                break
            if text.startswith("    for step in "):
                break  # the first section of the loop follows
            end += 1
        while not lines[end - 1].strip():  # blank lines between sections belong to neither
            end -= 1
        found.append((banner[2], start, end))
    return found


def copied(name: str) -> dict[str, str]:
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    return {
        section: "\n".join(lines[start:end])
        for section, start, end in sections(lines)
        if section.endswith("(copied)")
    }


def definitions(name: str) -> dict[str, str]:
    """Top-level functions, classes and constants with their text."""
    text = (ROOT / f"{name}.py").read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            key = node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            key = node.targets[0].id
        else:
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found[key] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def problems() -> list[str]:
    """What differs, each with a diff; empty if all is well."""
    found = []
    seen: dict[str, tuple[str, str]] = {}
    defined: dict[str, tuple[str, str]] = {}
    for name in existing():
        path = ROOT / f"{name}.py"
        names = [section for section, _, _ in sections(path.read_text().splitlines())]
        if doubled := {section for section in names if names.count(section) > 1}:
            found.append(f"{name}.py: banners occur twice: {sorted(doubled)}")
        for section, text in copied(name).items():
            where, first = seen.setdefault(section, (name, text))
            if text != first:
                diff = difflib.unified_diff(
                    first.splitlines(), text.splitlines(), f"{where}.py", f"{name}.py", lineterm=""
                )
                found.append(
                    f"section '{section}' differs:\n" + "\n".join(diff) + "\nrepair with: "
                    f"python tests/same_sections.py --from {where}.py --write"
                )
        for key, text in definitions(name).items():
            where, first = defined.setdefault(key, (name, text))
            if text != first and key not in OWN_TEXT:
                found.append(f"{key} has different text in {where}.py and {name}.py")
    lines = (ROOT / "supervised.py").read_text().splitlines()
    order = [section for section, _, _ in sections(lines)]
    for name in existing():
        lines = (ROOT / f"{name}.py").read_text().splitlines()
        names = [section for section, _, _ in sections(lines) if section in order]
        if names != [section for section in order if section in names]:
            found.append(f"{name}.py: sections are not in the order of supervised.py: {names}")
    return found


def write(source: str) -> None:
    """Copy the copied sections of one script into every other that has them."""
    texts = copied(source)
    for name in existing():
        path = ROOT / f"{name}.py"
        lines = path.read_text().splitlines()
        for section, start, end in reversed(sections(lines)):
            if section in texts:
                lines[start:end] = texts[section].splitlines()
        path.write_text("\n".join(lines) + "\n")


def changed_lines(before: str, after: str) -> tuple[int, int, float]:
    """(lines marked < or > by diff, hunks, shared share) of two scripts."""
    a, b = ((ROOT / f"{name}.py").read_text().splitlines() for name in (before, after))
    codes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    same = sum(i2 - i1 for tag, i1, i2, _, _ in codes if tag == "equal")
    hunks = sum(tag != "equal" for tag, *_ in codes)
    return len(a) + len(b) - 2 * same, hunks, 2 * same / (len(a) + len(b))


def report() -> None:
    print("script         lines  widest  changed  hunks  shared")
    for name in existing():
        lines = (ROOT / f"{name}.py").read_text().splitlines()
        row = f"{name:14} {len(lines):5}  {max(map(len, lines)):6}"
        if SCRIPTS[name] in existing():
            changed, hunks, shared = changed_lines(SCRIPTS[name], name)
            row += f"  {changed:7}  {hunks:5}  {shared:6.0%}  vs {SCRIPTS[name]}"
        print(row)


BEGIN, END = "<!-- reading order -->", "<!-- end of reading order -->"


def reading_order() -> str:
    """Markdown: what to read after what, and how much is new there."""
    lines = ["| read | lines | new or changed | |", "|---|---|---|---|"]
    for name in existing():
        count = len((ROOT / f"{name}.py").read_text().splitlines())
        before = SCRIPTS[name]
        changed = f"{changed_lines(before, name)[0]} lines" if before else ""
        command = f"`diff {before}.py {name}.py`" if before else ""
        lines.append(f"| `{name}.py` | {count:,} | {changed} | {command} |")
    return "\n".join(lines)


def readme() -> None:
    path = ROOT / "README.md"
    before, rest = path.read_text().split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{reading_order()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="source", default="supervised.py")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--readme", action="store_true")
    flags = parser.parse_args()
    if flags.write:
        write(flags.source.removesuffix(".py"))
    if flags.report:
        report()
    if flags.readme:
        readme()
    found = problems()
    print("\n\n".join(found) or "copied sections are the same in every script")
    sys.exit(bool(found))
