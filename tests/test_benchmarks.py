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


def test_every_script_is_in_the_tables():
    assert {"supervised", *quality.SCRIPTS} == set(SCRIPTS) == set(speed.FLOORS)
