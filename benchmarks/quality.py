"""Every script on shapes and CamVid over several seeds: commands, runs, and the tables.

    python benchmarks/quality.py shapes                   # print the commands (a dry run)
    python benchmarks/quality.py shapes --workers 1       # run them, one at a time; resumable
    python benchmarks/quality.py shapes --rows cps --workers 1 --log-pseudo-accuracy
    python benchmarks/quality.py ablation --workers 1     # AEL on shapes without its parts
    python benchmarks/quality.py weights --workers 1      # GCT on shapes with other weights
    python benchmarks/quality.py shapes --table           # results/shapes.jsonl -> README.md
    python benchmarks/quality.py camvid --table           # results/camvid.jsonl -> docs/results.md

On one GPU, five runs at a time, first the choice of a setting that can show a gain:

    python benchmarks/quality.py setting --workers 5 --threads 2 --device cuda --data-root data
    python benchmarks/quality.py camvid_long --workers 5 --threads 2 --device cuda --data-root data

A run that is complete is not repeated, a killed one continues. Seeds are paired: seed s of every
script draws the same labeled images (`--split-seed s`) and the same batches.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCRIPTS = [
    name
    for name in (
        "cps mean_teacher pi_model temporal_ensembling cutmix_mt classmix ael cct gct cmb dcc "
        "pseudoseg self_training self_correcting unimatch_v2"
    ).split()
    if (ROOT / f"{name}.py").exists()
]
# Rows that stand apart: script, steps as a multiple of the others', flags, why.
APART = {
    "labels only, longer": ("supervised", 2, [], "steps x 2"),
    "self_training": ("self_training", 2, [], "two trainings: steps x 2"),
    "ST": (
        "self_training", 2, ["--strong", "--tta", "--oversample"], "two trainings: steps x 2",
    ),
    "ST++": ("self_training", 3, ["--plus"], "three trainings: steps x 3"),
    "self_correcting": ("self_correcting", 1.5, [], "box-assisted, steps x 1.5"),
    "labels only, ViT": ("unimatch_v2", 1, ["--lambda-u", "0"], "a tiny ViT"),
    "fixmatch, ViT": (
        "unimatch_v2", 1, ["--views", "1", "--feature-dropout", "none"],
        "a tiny ViT, over its labels only",
    ),
    "unimatch_v2": ("unimatch_v2", 1, [], "a tiny ViT, over its labels only"),
}  # fmt: skip
BOUNDS = ("labels only", "all labels")
ON_ITS_PAGE = ("labels only, longer", "ST", "ST++")  # alone, not in the README
BASE = {"fixmatch, ViT": "labels only, ViT", "unimatch_v2": "labels only, ViT"}
# CamVid from few labels and from all, by which the setting of `camvid_long` is chosen: (labels,
# steps, flags), the cheapest first.
SETTINGS = {
    f"{labels} labels, {steps:,} steps": (labels, steps, ["--crop-size", "320"])
    for steps in (4_000, 8_000) for labels in (46, 23, 12, 367)
}  # fmt: skip
# table: (labeled split, name of the split in the table, steps)
SPLITS = {
    "shapes": ("20", "20 of 1,024 labels", 1_000),
    "camvid": ("1/8", "1/8 (46 of 367 labels)", 500),
    "setting": ("", "crop 320", 0),
    "camvid_long": ("", "", 0),  # as `choose_setting` finds
    "ablation": ("20", "AEL on 20 of 1,024 labels", 500),
    "weights": ("20", "GCT on 20 of 1,024 labels", 1_000),
}
FIRST_SEED = {"weights": 10}  # a choice is made on other seeds than those of the tables
RARE = {"shapes": ("ring", "wire", "tent"), "camvid": ("bicyclist", "pedestrian", "pole")}
RARE["ablation"] = RARE["weights"] = RARE["shapes"]
RARE["setting"] = RARE["camvid_long"] = RARE["camvid"]
# Pages that hold a table; the README has the others.
PAGES = {"ablation": "docs/ael.md", "weights": "docs/gct.md"}
PAGES |= dict.fromkeys(("camvid", "setting", "camvid_long"), "docs/results.md")
# AEL's parts: dynamic re-weighting, adaptive sampling, adaptive CutMix, adaptive Copy-Paste.
PARTS = {
    "DR": ["--gamma", "0"], "AES": ["--no-sampling"], "ACM": ["--no-adaptive-cutmix"],
    "ACP": ["--no-copy-paste"],
}  # fmt: skip
# The rows of the paper's table, each with the parts that are on.
ABLATION = {
    "none": (), "DR": ("DR",), "AES": ("AES",), "ACM": ("ACM",), "ACP": ("ACP",),
    "DR AES": ("DR", "AES"), "DR AES ACM": ("DR", "AES", "ACM"), "all": tuple(PARTS),
}  # fmt: skip
# Of GCT's two unsupervised losses, as multiples of VOC's weights per pixel: (dc, fc).
WEIGHTS = {
    "x 1": (1, 1), "x 0.3": (0.3, 0.3), "x 0.1": (0.1, 0.1), "x 0.03": (0.03, 0.03),
    "x 1, lambda_fc 0": (1, 0), "x 0.1, lambda_fc 0": (0.1, 0),
}  # fmt: skip


def experiments(dataset: str, seeds: int, only: list[str]) -> list[dict]:
    """Rows of the table (or those named), framed by labels-only and all-labels, times seeds."""
    split, _, steps, common = settle(dataset)
    if dataset == "ablation":
        rows = [(row, "ael", split, without(parts)) for row, parts in ABLATION.items()]
    elif dataset == "weights":
        rows = [("labels only", "supervised", split, [])]
        for row, (dc, fc) in WEIGHTS.items():
            flags = ["--lambda-dc", f"{38 * dc:g}", "--lambda-fc", f"{fc:g}"]
            name = f"gct-{dc:g}" if fc else f"gct-{dc:g}-fc-0"
            rows.append((row, "gct", split, [*flags, "--exp-name", name]))
    elif dataset == "setting":
        rows = []
        for row, (labels, steps, flags) in SETTINGS.items():
            flags = [*flags, "--steps", str(steps), "--exp-name", f"supervised-{steps}"]
            rows.append((row, "supervised", "full" if labels == 367 else str(labels), flags))
    else:
        rows = [("labels only", "supervised", split, [])]
        rows += [(name, name, split, []) for name in SCRIPTS if name not in APART]
        rows.append(("all labels", "supervised", "full", []))
        for row, (script, _, more, _) in APART.items():
            name = row.replace(",", "").replace(" ", "-")
            named = ["--exp-name", name] if name != script else []
            rows.append((row, script, split, [*more, *named]))
    data = "camvid" if PAGES.get(dataset) == "docs/results.md" else "shapes"
    if dataset in ("setting", "camvid_long"):  # beside the runs of other lengths
        common = [*common, "--output-dir", f"runs/{dataset}"]
    found = []
    for row, script, which, more in rows:
        for number in range(seeds if not only or row in only else 0):
            seed = FIRST_SEED.get(dataset, 0) + number
            flags = ["--dataset", data, "--split", which, "--seed", str(seed)]
            if dataset != "setting":
                flags += ["--steps", str(round((APART[row][1] if row in APART else 1) * steps))]
            flags += ["--split-seed", str(seed)] if which != "full" else []
            flags += common + more
            found.append({"row": row, "script": script, "seed": seed, "flags": flags})
    return found


def settle(dataset: str) -> tuple[str, str, int, list[str]]:
    """(labeled split, its name, steps, flags) of a table.

    Of `camvid_long` by the rows of `setting` alone, never by a method: the cheapest one in which
    all labels beat few by 5 points and by 3 standard errors.
    """
    if dataset != "camvid_long":
        return *SPLITS[dataset], []
    scores = {name: {} for name in SETTINGS}
    for row in read("setting"):
        scores[row["row"]][row["seed"]] = row["last"]
    for name, (labels, steps, flags) in SETTINGS.items():
        of_all = scores[f"367 labels, {steps:,} steps"]
        gains = [of_all[seed] - few for seed, few in scores[name].items() if seed in of_all]
        least = max(0.05, 3 * standard_error(gains)) if len(gains) > 1 else 1
        if labels < 367 and gains and statistics.mean(gains) >= least:
            return str(labels), f"{labels} of 367 labels, crop 320", steps, flags
    raise SystemExit(
        "camvid_long: first `quality.py setting`; in none so far all labels gain enough"
    )


def without(parts: tuple[str, ...]) -> list[str]:
    """Flags of AEL that leave these parts on, and a name for its run directory."""
    flags = [word for part, words in PARTS.items() if part not in parts for word in words]
    name = "-".join(["ael", *(parts or ["none"])]) if flags else "ael-all"
    return [*flags, "--exp-name", name]


def command(experiment: dict, extra: list[str]) -> list[str]:
    return [sys.executable, f"{experiment['script']}.py", *experiment["flags"], *extra]


def run(experiment: dict, extra: list[str], threads: int) -> dict:
    """Run (or continue) one experiment; its row of the results."""
    done = subprocess.run(
        command(experiment, extra), cwd=ROOT, text=True, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{shlex.join(command(experiment, extra))}\n{done.stderr[-2000:]}")
    return collect(experiment["row"], ROOT / done.stdout.splitlines()[0])


def collect(row: str, folder: Path) -> dict:
    """Scores, curve and origin of a finished run, from its directory."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    environment = json.loads((folder / "env.json").read_text())
    args = json.loads((folder / "args.json").read_text())
    scores = [entry for entry in log if "val/miou" in entry]
    last, prefix = scores[-1], "val/iou/"
    words = list(environment["command"])
    for flag in ("--data-root", "--output-dir"):  # of that machine alone
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    return {
        "row": row, "seed": args["seed"], "steps": last["step"],
        "last": last["val/miou"], "best": max(entry["val/miou"] for entry in scores),
        "iou": {k.removeprefix(prefix): v for k, v in last.items() if k.startswith(prefix)},
        "curve": [[entry["step"], entry["val/miou"]] for entry in scores],
        "command": shlex.join(["python", Path(words[0]).name, *words[1:]]),
        "split": args["split_identity"], "device": environment["gpu"] or "cpu",
        "threads": environment.get("threads"), "torch": environment["torch"],
        "commit": environment["commit"], "dirty": environment["commit"].endswith("-dirty"),
    }  # fmt: skip


def read(dataset: str) -> list[dict]:
    """The results so far, in the order of the table."""
    path = RESULTS / f"{dataset}.jsonl"
    rows = [json.loads(s) for s in path.read_text().splitlines()] if path.exists() else []
    return sorted(rows, key=place)


def place(row: dict) -> tuple[int, int]:
    """Of a result in the table."""
    others = [name for name in SCRIPTS if name not in APART]
    order = ["labels only", *others, "all labels", *APART, *ABLATION, *WEIGHTS, *SETTINGS]
    return order.index(row["row"]), row["seed"]


def add(dataset: str, new: list[dict]) -> None:
    """Write results, in the place of earlier ones of the same row and seed."""
    done = {(row["row"], row["seed"]) for row in new}
    rows = [row for row in read(dataset) if (row["row"], row["seed"]) not in done] + new
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{dataset}.jsonl"
    rows.sort(key=place)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(dataset: str) -> str:
    """Markdown: last mIoU, difference from the first row, IoU of the rarest classes."""
    rows = [row for row in read(dataset) if row["row"] not in ON_ITS_PAGE]
    rare = RARE[dataset]
    names = list(dict.fromkeys(row["row"] for row in rows))
    last = {n: {r["seed"]: 100 * r["last"] for r in rows if r["row"] == n} for n in names}
    first, title = names[0], f"{dataset}, {settle(dataset)[1]}"
    over = "all labels" if dataset == "setting" else first
    steps_of = step_times()
    head = ["mIoU", f"over {over}", ", ".join(rare), "each seed"]
    head[2:2] = ["time of a step"] if dataset == "shapes" else []
    lines = [f"| {title} | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name in names:
        of_all = f"367 {name.partition(' ')[2]}"  # with as many steps
        base = last[of_all if dataset == "setting" else BASE.get(name, first)]
        gains = [value - base[seed] for seed, value in last[name].items() if seed in base]
        of_rare = [
            100 * statistics.mean(row["iou"][c] for c in rare) for row in rows if row["row"] == name
        ]
        time = steps_of.get(APART[name][0] if name in APART else name)
        cells = [
            mean(last[name].values(), statistics.stdev),
            mean(gains, standard_error, "+") if base is not last[name] else "",
            *([f"{time:.1f}" if time else ""] if dataset == "shapes" else []),
            mean(of_rare, statistics.stdev),
            ", ".join(f"{value:.1f}" for value in last[name].values()),
        ]
        apart = f" ({APART[name][3]})" if name in APART else ""
        lines.append(f"| {name}{apart} | {' | '.join(cells)} |")
    origin, seeds, up = rows[0], len(last[first]), "../" if dataset in PAGES else ""
    commits = ", ".join(dict.fromkeys(row["commit"][:8] for row in rows))
    steps = "" if dataset == "setting" else f"{origin['steps']} steps, "
    spread = "s, paired (± standard deviation; differences: ± standard error)"
    lines += [
        "",
        f"{seeds} seed{spread if seeds > 1 else ''}, {steps}{origin['device']}, "
        f"torch {origin['torch']}, commit{'s' * (',' in commits)} {commits}; commands and curves "
        f"in [benchmarks/results/{dataset}.jsonl]({up}benchmarks/results/{dataset}.jsonl)."
        + " Time of a step: a multiple of the baseline's, on CamVid."
        * (dataset == "shapes"),
    ]
    return "\n".join(lines)


def step_times() -> dict[str, float]:
    """Of each script, as a multiple of the baseline's, from speed.py's latest rows."""
    path = RESULTS / "speed.jsonl"
    rows = [json.loads(s) for s in path.read_text().splitlines()] if path.exists() else []
    times = {row["script"]: row["step_s"] for row in rows if "script" in row}
    times |= {bound: times["supervised"] for bound in BOUNDS if times}
    return {name: time / times["supervised"] for name, time in times.items()}


def mean(values, spread, sign: str = "") -> str:
    values = list(values)
    text = f"{statistics.mean(values):{sign}.1f}"
    return f"{text} ± {spread(values):.1f}" if len(values) > 1 else text


def standard_error(values) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


def results(script: str) -> str:
    """Markdown: a script's rows of the tables, for its page."""
    own = [row for row, (of, *_) in APART.items() if of == script] or [script]
    own = ["labels only, longer", *own] if script == "self_training" else own
    shown = ["labels only", *own, "all labels"] if script != "supervised" else [*BOUNDS]
    titles = [
        f"{n} (steps x {APART[n][1]})" if n in APART and APART[n][1] > 1 else n for n in shown
    ]
    lines = [f"| data set | {' | '.join(titles)} | steps, seeds |", "|---" * (len(shown) + 2) + "|"]
    for dataset in (name for name in ("shapes", "camvid", "camvid_long") if read(name)):
        rows = [row for row in read(dataset) if row["row"] in shown]
        cells = []
        for name in shown:
            values = [100 * row["last"] for row in rows if row["row"] == name]
            cells.append(mean(values, statistics.stdev) if values else "")
        if {row["row"] for row in rows} - {*BOUNDS} or script == "supervised":
            length = f"{rows[0]['steps']:,}, {len({row['seed'] for row in rows})}"
            title = f"{dataset}, {settle(dataset)[1]}"
            lines.append(f"| {title} | {' | '.join(cells)} | {length} |")
    if len(lines) == 2:
        command = f"python benchmarks/quality.py shapes --rows {script} --workers 2"
        return f"Not measured yet: `{command}`."
    how = "(± standard deviation; without it, one seed)"
    lines += ["", f"mIoU in % of the last checkpoint {how}; the README has more."]
    return "\n".join(lines)


def write(path: Path, name: str, text: str) -> None:
    """Put a text between its two markers in a page."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = path.read_text().split(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def write_table(dataset: str) -> None:
    write(ROOT / PAGES.get(dataset, "README.md"), f"{dataset} table", table(dataset))
    for script in ("supervised", *SCRIPTS):
        write(ROOT / f"docs/{script}.md", "results", results(script))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=list(SPLITS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="runs at a time; 0 prints only")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="per run")
    parser.add_argument("--rows", nargs="+", default=[], help="of the table; all without")
    parser.add_argument("--table", action="store_true", help="write the table into its page")
    flags, extra = parser.parse_known_args()  # the rest goes to the scripts
    todo = experiments(flags.dataset, flags.seeds, flags.rows)
    if flags.table:
        write_table(flags.dataset)
    elif not flags.workers:
        print("\n".join(shlex.join(["python", *command(e, extra)[1:]]) for e in todo))
    else:
        failed = []
        with ThreadPoolExecutor(flags.workers) as pool:
            for done in as_completed([pool.submit(run, e, extra, flags.threads) for e in todo]):
                if done.exception():
                    failed.append(str(done.exception()))
                else:
                    add(flags.dataset, [done.result()])
        print("\n".join(failed) or table(flags.dataset))
        raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
