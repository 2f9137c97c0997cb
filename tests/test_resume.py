"""A run that is killed at any moment and started again ends with the same bits."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SCRIPTS, assert_same, read_log, weights
from test_cli import QUICK
from test_datasets import label, make_folder, save
from torch import nn

import cps
import supervised

CONTEXT = multiprocessing.get_context("forkserver")  # imports the scripts once, then forks
CONTEXT.set_forkserver_preload([*SCRIPTS, "torch.utils.tensorboard"])


class WithDropout(supervised.DeepLabV3Plus):
    def __init__(self, *args):
        super().__init__(*args)
        self.head.fuse.append(nn.Dropout(0.3))


def run(name: str, args, dropout: bool = False, command_line: bool = False) -> None:
    """In a process of its own, and a group, so that `end` finds its loader processes."""
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    from common.datasets import Shapes

    Shapes.val_ids, Shapes.train_ids = Shapes.val_ids[:3], Shapes.train_ids[:40]
    script = SCRIPTS[name]
    if dropout:
        script.DeepLabV3Plus = WithDropout
    if command_line:  # mistakes become a line (in a file) and an exit code
        os.dup2(os.open(Path(args.output_dir).parent / "stderr.txt", os.O_CREAT | os.O_WRONLY), 2)
        script.tyro = SimpleNamespace(cli=lambda _: args)
        script.command_line()
    else:
        script.main(args)


def start(*args) -> multiprocessing.Process:
    process = CONTEXT.Process(target=run, args=args)
    process.start()
    return process


def complete(*args) -> None:
    process = start(*args)
    process.join(120)
    assert process.exitcode == 0


def end(process: multiprocessing.Process) -> None:
    """Remove the loader processes of a killed run, which live on for a while (or, if it was killed
    while they started, for good).
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_dir(args) -> Path:
    (folder,) = Path(args.output_dir).glob(f"*__{args.exp_name}__*")
    return folder


def logged_rows(args) -> int:
    log = [
        path.read_text() for path in Path(args.output_dir).glob(f"*__{args.exp_name}__*/log.jsonl")
    ]
    return log[0].count("\n") if log else 0


@pytest.mark.parametrize(("name", "workers"), [
    ("supervised", 2), ("cps", 0), ("cps", 2), ("self_training", 2),
])  # fmt: skip
def test_killed_at_random_moments(name, workers, quick):
    """KILLS SIGKILLs (4), dropout in the network; the log has every row once, too."""
    args = quick(
        SCRIPTS[name].Args, steps=30, save_every=1, num_workers=workers, log_every=1, eval_every=25
    )
    complete(name, replace(args, exp_name="whole", save_every=1000), True)
    draw = random.Random(f"{name}{workers}")
    steps, killed = [0], []
    for _ in range(int(os.environ.get("KILLS", 4))):
        process = start(name, args, True)
        # At any moment of the start, or of the steps and checkpoints that follow the first new row.
        wait_for_row = draw.random() < 0.8
        while wait_for_row and process.is_alive() and logged_rows(args) <= steps[-1]:
            time.sleep(0.01)
        process.join(draw.uniform(0.0, 0.4))
        process.kill()
        process.join()
        killed.append(process)
        steps.append(logged_rows(args))
    complete(name, args, True)
    for process in killed:
        end(process)
    assert len(set(steps)) > 2 and steps[-2] < args.steps, f"kills too early or late: {steps}"
    whole, killed = run_dir(replace(args, exp_name="whole")), run_dir(args)
    assert_same(weights(whole), weights(killed))
    assert_same(weights(whole, "best.pt"), weights(killed, "best.pt"))
    rows = [read_log(folder) for folder in (whole, killed)]
    for row in rows[0] + rows[1]:
        row.pop("time/images_per_s")
    assert json.dumps(rows[0]) == json.dumps(rows[1])


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_dropout_and_accumulation_resume(name, quick, monkeypatch):
    script = SCRIPTS[name]
    monkeypatch.setattr(script, "DeepLabV3Plus", WithDropout, raising=False)
    args = quick(script.Args, accumulate=2, steps=4, save_every=2)
    whole = script.main(replace(args, exp_name="whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(script, patch, 3)
        script.main(args)
    resumed = script.main(args)
    assert resumed["miou"] == whole["miou"]
    assert_same(weights(whole["run_dir"]), weights(resumed["run_dir"]))


def stop_in(script, monkeypatch, step: int) -> None:
    """Ctrl-C during the given step."""
    poly_lr, calls = script.poly_lr, itertools.count(1)  # one a step, from the first on

    def interrupted(base_lr, now, total_steps):
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return poly_lr(base_lr, now, total_steps)

    monkeypatch.setattr(script, "poly_lr", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_at_any_time_prints_no_traceback(number, tmp_path):
    """As a terminal or a scheduler sends the signals: to the loader processes, too."""
    command = [
        sys.executable, "supervised.py", *QUICK, "--steps", "400", "--num-workers", "2",
        "--save-every", "1", "--output-dir", str(tmp_path),
    ]  # fmt: skip
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    while run.poll() is None and not list(tmp_path.glob("*/last.pt")):
        time.sleep(0.01)
    time.sleep(random.Random(int(number)).random())
    os.killpg(run.pid, number)
    error = run.communicate(timeout=60)[1].decode()
    assert run.returncode == -number and "Traceback" not in error, error
    assert torch.load(next(tmp_path.glob("*/last.pt")), weights_only=True)["step"] >= 1


def test_finished_run_does_nothing_again(quick, capsys):
    args = quick(supervised.Args)
    first = supervised.main(args)
    log, last = (run_dir(args) / "log.jsonl").read_text(), weights(run_dir(args))
    assert supervised.main(args) == first
    assert "from step 6" in capsys.readouterr().out
    assert (run_dir(args) / "log.jsonl").read_text() == log
    assert_same(weights(run_dir(args)), last)


def test_other_arguments_are_refused_and_neutral_ones_are_not(quick):
    args = quick(supervised.Args)
    supervised.main(args)
    with pytest.raises(supervised.UserError, match=r"lr 0.001 -> 0.5.*--exp-name"):
        supervised.main(replace(args, lr=0.5))
    supervised.main(replace(args, num_workers=1, log_every=1, data_root="elsewhere"))


def test_other_data_is_refused(quick, tmp_path):
    root = make_folder(tmp_path / "mine")
    flags = {"dataset": "folder", "data_root": str(root), "split": None, "weights": "none"}
    args = quick(supervised.Args, steps=2, **flags)
    folder = Path(supervised.main(args)["run_dir"])
    assert supervised.main(args)["steps"] == 2  # as it is, it goes on

    def refused() -> str:
        with pytest.raises(supervised.UserError, match="holds a run that differs in") as error:
            supervised.main(args)
        return str(error.value)

    save(root / "masks" / "a.png", label(1, 0, 255))  # a corrected mask
    assert "masks " in refused()
    (folder / "last.pt").unlink()  # the best network alone is worth as much
    assert "masks " in refused()
    save(root / "masks" / "a.png", label(0, 1, 255))
    (root / "classes.txt").write_text("bright light\ndark\n")
    assert "classes ['dark', 'bright light'] -> ['bright light', 'dark']" in refused()


def test_a_second_run_is_kept_out(quick):
    args = quick(supervised.Args, steps=2000, num_workers=1, log_every=1)
    process = start("supervised", args)
    while process.is_alive() and not logged_rows(args):
        time.sleep(0.01)
    with pytest.raises(supervised.UserError, match="log.jsonl: another run writes here"):
        supervised.main(args)
    process.kill()
    process.join()
    # Free at once, though the killed run's loader process may live on for a while.
    assert supervised.main(replace(args, steps=2))["steps"] == 2
    end(process)


def test_a_fault_in_the_last_evaluation_loses_no_training(quick, monkeypatch):
    args = quick(supervised.Args, dataset="shapes")
    whole = supervised.main(replace(args, exp_name="whole"))

    def fault(*_):
        raise supervised.UserError("v.png: cannot be read")

    with monkeypatch.context() as patch, pytest.raises(supervised.UserError):
        patch.setattr(supervised, "validate", fault)
        supervised.main(args)
    with monkeypatch.context() as patch:
        patch.setattr(supervised, "supervised_loss", lambda *_: 1 / 0)  # nothing is trained again
        resumed = supervised.main(args)
    assert resumed["miou"] == whole["miou"] and resumed["best_miou"] == whole["best_miou"]
    rows = [read_log(run["run_dir"]) for run in (whole, resumed)]
    for row in rows[0] + rows[1]:
        row.pop("time/images_per_s")
    assert rows[0] == rows[1]
    for name in ("last.pt", "best.pt"):
        assert_same(weights(whole["run_dir"], name), weights(resumed["run_dir"], name))


def test_damaged_checkpoint_is_named(quick):
    args = quick(supervised.Args, save_every=2)
    supervised.main(args)
    last = run_dir(args) / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(supervised.UserError, match="(?s)last.pt: .*delete it"):
        supervised.main(args)


def test_directory_without_checkpoint_starts_anew(quick):
    args = quick(supervised.Args)
    folder = Path(supervised.main(args)["run_dir"])
    (folder / "last.pt").unlink()
    supervised.main(args)
    assert [row["step"] for row in read_log(folder)] == [2, 4, 6]


def broken_loss(monkeypatch, call: int, factor: float) -> None:
    right, calls = supervised.supervised_loss, []

    def broken(*inputs):
        calls.append(None)
        return right(*inputs) * (factor if len(calls) == call else 1)

    monkeypatch.setattr(supervised, "supervised_loss", broken)


def test_nan_stops_with_step_and_term_and_keeps_the_checkpoint(quick, monkeypatch):
    args = quick(supervised.Args, save_every=2)
    with monkeypatch.context() as patch:
        broken_loss(patch, 4, float("nan"))
        with pytest.raises(FloatingPointError, match="loss/sup is nan at step 4"):
            supervised.main(args)
    assert torch.load(run_dir(args) / "last.pt", weights_only=True)["step"] == 2
    # The same command continues from there.
    assert supervised.main(args)["steps"] == args.steps


def test_nan_between_logged_steps_is_found_before_a_save(quick, monkeypatch):
    args = quick(supervised.Args, save_every=4, log_every=100)
    broken_loss(monkeypatch, 3, float("inf"))
    with pytest.raises(FloatingPointError, match="loss/sup is inf at step 3"):
        supervised.main(args)
    assert not (run_dir(args) / "last.pt").exists()


def test_run_directory_and_checkpoints(quick):
    args = quick(cps.Args)
    folder = Path(cps.main(args)["run_dir"])
    assert folder.name == "shapes__n8-d0__cps__resnet14__s0"
    names = {path.name for path in folder.iterdir()}
    assert {"args.json", "env.json", "cps.py", "log.jsonl", "last.pt", "best.pt"} <= names
    assert any(name.startswith("events.") for name in names)
    saved = json.loads((folder / "args.json").read_text())
    assert saved["lr"] == cps.PAPER["shapes"]["lr"] and "8 labeled" in saved["split_identity"]
    environment = json.loads((folder / "env.json").read_text())
    assert environment["torch"] == torch.__version__
    best = torch.load(folder / "best.pt", weights_only=True)
    assert best["evaluated"] == "network_1" and best["network_1"].keys()
    last_row = read_log(folder)[-1]
    assert last_row["step"] == args.steps and "val/miou" in last_row
    assert f"val/iou/{best['meta']['classes'][0]}" in last_row
