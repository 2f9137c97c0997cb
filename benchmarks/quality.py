"""Every script on shapes and CamVid over several seeds: commands, runs, and the README's tables.

    python benchmarks/quality.py shapes                   # print the commands (a dry run)
    python benchmarks/quality.py shapes --workers 1       # run them, one at a time; resumable
    python benchmarks/quality.py shapes --rows cps --workers 1 --log-pseudo-accuracy
    python benchmarks/quality.py shapes --table           # results/shapes.jsonl -> README.md

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCRIPTS = [
    name
    for name in "cps mean_teacher cutmix_mt classmix cct gct ael cmb dcc".split()
    if (ROOT / f"{name}.py").exists()
]
# data set: (labeled split, name of the split in the table, steps)
SPLITS = {
    "shapes": ("20", "20 of 1,024 labels", 1_000),
    "camvid": ("1/8", "1/8 (46 of 367 labels)", 500),
}


def experiments(dataset: str, seeds: int, only: list[str]) -> list[dict]:
    """Rows of the table (or those named), framed by labels-only and all-labels, times seeds."""
    split, _, steps = SPLITS[dataset]
    rows = [("labels only", "supervised", split), *((name, name, split) for name in SCRIPTS)]
    rows.append(("all labels", "supervised", "full"))
    found = []
    for row, script, which in rows:
        for seed in range(seeds if not only or row in only else 0):
            flags = ["--dataset", dataset, "--split", which, "--seed", str(seed)]
            flags += ["--steps", str(steps)]
            flags += ["--split-seed", str(seed)] if which != "full" else []
            found.append({"row": row, "script": script, "seed": seed, "flags": flags})
    return found


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
        "split": args["split_identity"], "device": environment["device"],
        "threads": environment["threads"], "torch": environment["torch"],
        "commit": environment["commit"], "dirty": environment["dirty"],
    }  # fmt: skip


def read(dataset: str) -> list[dict]:
    """The results so far, in the order of the table."""
    path = RESULTS / f"{dataset}.jsonl"
    rows = [json.loads(s) for s in path.read_text().splitlines()] if path.exists() else []
    return sorted(rows, key=place)


def place(row: dict) -> tuple[int, int]:
    """Of a result in the table."""
    return ["labels only", *SCRIPTS, "all labels"].index(row["row"]), row["seed"]


def add(dataset: str, new: list[dict]) -> None:
    """Write results, in the place of earlier ones of the same row and seed."""
    done = {(row["row"], row["seed"]) for row in new}
    rows = [row for row in read(dataset) if (row["row"], row["seed"]) not in done] + new
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{dataset}.jsonl"
    rows.sort(key=place)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(dataset: str) -> str:
    """Markdown: mean and standard deviation of the last mIoU, gain over labels-only, curve."""
    rows = read(dataset)
    names = list(dict.fromkeys(row["row"] for row in rows))
    last = {n: {r["seed"]: 100 * r["last"] for r in rows if r["row"] == n} for n in names}
    steps = [step for step, _ in rows[0]["curve"]]
    shown = steps[1::2] if len(steps) > 5 else steps
    head = f"| {dataset}, {SPLITS[dataset][1]} | mIoU (last) | over labels-only | each seed |"
    lines = [head + "".join(f" step {s} |" for s in shown)]
    lines.append("|---|---|---|---|" + "---|" * len(shown))
    for name in names:
        values = list(last[name].values())
        gains = [value - last["labels only"][seed] for seed, value in last[name].items()]
        gain = f"{statistics.mean(gains):+.1f}" if name != "labels only" else ""
        each = ", ".join(f"{value:.1f}" for value in values)
        curves = [dict(map(tuple, r["curve"])) for r in rows if r["row"] == name]
        curve = [f"{100 * statistics.mean(c[s] for c in curves):.1f}" for s in shown]
        mean = f"{statistics.mean(values):.1f}"
        if len(values) > 1:
            mean += f" ± {statistics.stdev(values):.1f}"
        lines.append(f"| {name} | {mean} | {gain} | {each} | {' | '.join(curve)} |")
    origin = rows[0]
    seeds = len(last[names[0]])
    commits = ", ".join(dict.fromkeys(row["commit"][:8] for row in rows))
    lines.append("")
    lines.append(
        f"{seeds} seed{'s' * (seeds > 1)} (± standard deviation), {origin['steps']} steps, "
        f"{origin['device']}, torch {origin['torch']}, "
        f"commit{'s' * (',' in commits)} {commits}; commands and curves in "
        f"[benchmarks/results/{dataset}.jsonl](benchmarks/results/{dataset}.jsonl)."
    )
    return "\n".join(lines)


def write_table(dataset: str) -> None:
    path = ROOT / "README.md"
    begin, end = f"<!-- {dataset} table -->", f"<!-- end of {dataset} table -->"
    before, rest = path.read_text().split(begin)
    after = rest.split(end)[1]
    path.write_text(f"{before}{begin}\n{table(dataset)}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=list(SPLITS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="runs at a time; 0 prints only")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="per run")
    parser.add_argument("--rows", nargs="+", default=[], help="of the table; all without")
    parser.add_argument("--table", action="store_true", help="write the table into README.md")
    flags, extra = parser.parse_known_args()  # the rest goes to the scripts
    todo = experiments(flags.dataset, flags.seeds, flags.rows)
    if flags.table:
        write_table(flags.dataset)
    elif not flags.workers:
        print("\n".join(shlex.join(["python", *command(e, extra)[1:]]) for e in todo))
    else:
        with ThreadPoolExecutor(flags.workers) as pool:
            add(flags.dataset, list(pool.map(lambda e: run(e, extra, flags.threads), todo)))
        print(table(flags.dataset))


if __name__ == "__main__":
    main()
