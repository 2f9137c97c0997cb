"""The benchmarks: every script has a floor that runs, and a run becomes a row of a table."""

import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS

sys.path.append(str(ROOT / "benchmarks"))
import quality
import speed

import supervised


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_every_floor_trains(name, quick):
    script = SCRIPTS[name]
    args = script.resolve(quick(script.Args, log_every=1))
    seen = []

    class Floor(speed.Floor):
        def optimizer(self, *networks):
            seen.extend(parameter for net in networks for parameter in net.parameters())
            return super().optimizer(*networks)

    step = speed.FLOORS[name](Floor(script, args, 5, torch.device("cpu")))
    before = [parameter.clone() for parameter in seen]
    step()
    moved = sum(not torch.equal(a, b) for a, b in zip(before, seen, strict=True))
    assert moved > 0.9 * len(seen) > 0


def test_a_run_becomes_a_row(quick):
    result = supervised.main(quick(supervised.Args, eval_every=3))
    row = quality.collect("labels only", supervised.Path(result["run_dir"]))
    assert row["last"] == result["miou"] and row["best"] == result["best_miou"]
    assert row["steps"] == 6 and [step for step, _ in row["curve"]] == [3, 6]
    assert row["device"] == "cpu" and row["threads"] == torch.get_num_threads()


def test_weights_of_gct():
    """Both losses by one factor, or dynamic consistency alone; each row has a directory."""
    rows = {e["row"]: e["flags"] for e in quality.experiments("weights", 1, [])}
    given = {row: dict(zip(flags[::2], flags[1::2], strict=True)) for row, flags in rows.items()}
    expected = {
        "labels only": (None, None), "x 1": ("38", "1"), "x 0.3": ("11.4", "0.3"),
        "x 0.1": ("3.8", "0.1"), "x 0.03": ("1.14", "0.03"), "x 1, lambda_fc 0": ("38", "0"),
        "x 0.1, lambda_fc 0": ("3.8", "0"),
    }  # fmt: skip
    assert {
        row: (flags.get("--lambda-dc"), flags.get("--lambda-fc")) for row, flags in given.items()
    } == expected
    assert len({flags.get("--exp-name") for flags in given.values()}) == len(given)


def test_pseudo_labels_become_a_picture(monkeypatch):
    import pictures

    import classmix

    monkeypatch.setitem(classmix.PAPER["shapes"], "steps", 2)
    monkeypatch.setitem(classmix.PAPER["shapes"], "batch_size", 2)
    picture = pictures.pseudo_labels("classmix", 0, 2)
    assert picture.size == (2 * 4 * 64, 2 * 64)


def test_every_script_is_in_the_tables():
    assert {"supervised", *quality.SCRIPTS} == set(SCRIPTS) == set(speed.FLOORS)


def test_the_setting_is_the_cheapest_that_can_show_a_gain(monkeypatch, tmp_path):
    """By labels only and all labels: 5 points and three standard errors, seeds paired."""
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="first `quality.py setting`"):
        quality.settle("camvid_long")
    scores = {  # of two seeds
        "46 labels, 4,000 steps": (0.40, 0.42),  # 4 points
        "23 labels, 4,000 steps": (0.30, 0.44),  # 8 ± 6
        "12 labels, 8,000 steps": (0.40, 0.41),
        "23 labels, 8,000 steps": (0.50, 0.51),
        "367 labels, 4,000 steps": (0.44, 0.46),
        "367 labels, 8,000 steps": (0.56, 0.58),
    }
    rows = [
        {"row": row, "seed": seed, "last": score, "iou": dict.fromkeys(quality.RARE["camvid"], 0.1)}
        | {"steps": 1, "device": "cpu", "torch": "2", "commit": "0"}
        for row, pair in scores.items() for seed, score in enumerate(pair)
    ]  # fmt: skip
    quality.add("setting", rows)
    split, title, steps, flags = quality.settle("camvid_long")
    assert (split, title, steps) == ("23", "23 of 367 labels, crop 320", 8_000)
    first = quality.experiments("camvid_long", 1, ["cps"])[0]["flags"]
    words = "--dataset camvid --split 23 --seed 0 --steps 8000 --split-seed 0 --crop-size 320"
    assert first == [*words.split(), "--output-dir", "runs/camvid_long"]
    table = quality.table("setting").splitlines()
    assert "over all labels" in table[0] and len(table) == 2 + len(scores) + 2
    assert "| 23 labels, 8,000 steps | 50.5 ± 0.7 | -6.5 ± 0.5 |" in "\n".join(table)


def test_a_run_that_fails_loses_no_other(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(quality, "RESULTS", tmp_path)

    def run(experiment, extra, threads):
        if experiment["seed"] == 1:
            raise SystemExit("seed 1 failed")
        scores = {"last": 0.5, "iou": dict.fromkeys(quality.RARE["shapes"], 0.1), "steps": 1}
        return experiment | scores | {"device": "cpu", "torch": "2", "commit": "0"}

    monkeypatch.setattr(quality, "run", run)
    line = ["quality.py", "shapes", "--workers", "2", "--rows", "labels only"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ended:
        quality.main()
    assert ended.value.code and capsys.readouterr().out == "seed 1 failed\n"
    assert [row["seed"] for row in quality.read("shapes")] == [0, 2]


def test_what_a_papers_run_costs(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    assert "--paper" in speed.cost_table()
    about = {"backbone": "resnet50", "crop_size": 512, "batch_size": 8, "voc_steps": 36_000}
    about |= {"ratio": 1.05, "ratio_standard_error": 0.01, "peak_memory_gb": 13.1, "tflop": 10.0}
    about |= {"machine": "a card", "torch": "2", "commit": "0", "script": "cps"}
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    with (tmp_path / "benchmarks" / "results" / "speed_gpu.jsonl").open("w") as file:
        for step_s, amp, compiled in ((0.3, "bf16", False), (0.1, "bf16", True), (0.4, "off", 0)):
            flags = {"flags": {"amp": amp, "compile": compiled}, "step_s": step_s}
            file.write(speed.json.dumps(about | flags) + "\n")
    cells = "512, 8 | 300 ms | 100 ms | 400 ms | 1.050 ± 0.010 | 33 | 13.1 GB | 36,000 | 1.0"
    assert f"| `cps.py` | {cells} |" in speed.cost_table()
