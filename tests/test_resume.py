"""A run that is killed at any moment and started again ends with the same bits."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPTS, assert_same, read_log, weights
from torch import nn

import ael
import cmb
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

    Shapes.val_ids = Shapes.val_ids[:3]
    script = SCRIPTS[name]
    if dropout:
        script.DeepLabV3Plus = WithDropout
    if command_line:  # mistakes become a line (in a file) and an exit code
        os.dup2(os.open(Path(args.output_dir).parent / "stderr.txt", os.O_CREAT | os.O_WRONLY), 2)
        sys.modules["tyro"] = SimpleNamespace(cli=lambda _: args)
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


@pytest.mark.parametrize(("name", "workers"), [("supervised", 2), ("cps", 0), ("cps", 2)])
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
    monkeypatch.setattr(script, "DeepLabV3Plus", WithDropout)
    args = quick(script.Args, accumulate=2, steps=4)
    whole = script.main(replace(args, exp_name="whole"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(script, patch, 2)
        script.main(args)
    resumed = script.main(args)
    assert resumed["miou"] == whole["miou"]
    assert_same(weights(whole["run_dir"]), weights(resumed["run_dir"]))


def stop_after(script, monkeypatch, steps: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal during the given step."""
    average = script.average

    def signalled(history, world_size):
        signalled.calls += 1
        if signalled.calls == steps // 2:  # the quick runs log every other step
            os.kill(os.getpid(), number)
        return average(history, world_size)

    signalled.calls = 0
    monkeypatch.setattr(script, "average", signalled)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_saves_and_exits(number, code, quick, monkeypatch):
    args = quick(supervised.Args)
    stop_after(supervised, monkeypatch, 2, number)
    with pytest.raises(SystemExit) as stopped:
        supervised.main(args)
    assert stopped.value.code == code
    step = torch.load(run_dir(args) / "last.pt", weights_only=True)["step"]
    assert step in (2, 3)  # the signal arrives while step 2 is logged


def test_finished_run_says_so(quick, capsys):
    args = quick(supervised.Args)
    first = supervised.main(args)
    before = {path: path.stat().st_mtime_ns for path in run_dir(args).iterdir()}
    assert supervised.main(args) == first
    assert "was finished before" in capsys.readouterr().out
    del before[run_dir(args) / "lock"]
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())


def test_other_arguments_are_refused_and_neutral_ones_are_not(quick):
    args = quick(supervised.Args)
    supervised.main(args)
    with pytest.raises(supervised.UserError, match=r"--lr 0.001 -> 0.5.*--exp-name"):
        supervised.main(replace(args, lr=0.5))
    supervised.main(replace(args, num_workers=1, log_every=1, data_root="elsewhere"))
    again = supervised.main(replace(args, lr=0.5, overwrite=True))
    assert again["steps"] == args.steps


def claim(args):
    """What `Run` takes, as `main` would give it."""
    args = supervised.resolve(args)
    data, split = supervised.open_data(args.dataset, args.data_root, args.split)
    return args, data, split, None, torch.device("cpu"), 0


def test_damaged_checkpoint_falls_back(quick, monkeypatch, capsys):
    args = quick(supervised.Args, save_every=2)
    whole = weights(supervised.main(replace(args, exp_name="whole"))["run_dir"])
    supervised.main(args)
    last = run_dir(args) / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    good = (run_dir(args) / "previous.pt").read_bytes()
    assert_same(whole, weights(supervised.main(args)["run_dir"]))
    assert "damaged" in capsys.readouterr().out
    assert torch.load(run_dir(args) / "last.pt", weights_only=True)["step"] == 6
    last.write_bytes(b"nothing")
    (run_dir(args) / "previous.pt").write_bytes(good)
    script = supervised.Run(*claim(args))
    assert script.load()["step"] == 4 and not last.exists()  # the good one cannot be replaced by it
    script.close()
    for name in ("last.pt", "previous.pt"):
        (run_dir(args) / name).write_bytes(b"nothing")
    with pytest.raises(supervised.UserError, match="--overwrite"):
        supervised.main(args)


def test_directory_without_checkpoint_starts_anew(quick):
    args = quick(supervised.Args)
    folder = Path(supervised.main(args)["run_dir"])
    for name in ("last.pt", "previous.pt"):
        (folder / name).unlink(missing_ok=True)
    supervised.main(args)
    assert [row["step"] for row in read_log(folder)] == [2, 4, 6]


def test_directory_in_use_is_refused(quick):
    args = quick(supervised.Args, steps=500, num_workers=2, log_every=1)
    process = start("supervised", args)
    while process.is_alive() and not logged_rows(args):
        time.sleep(0.01)
    with pytest.raises(supervised.UserError, match="in use"):
        supervised.main(args)
    process.kill()
    process.join()
    # Free at once, though the loader processes of the killed run may live on for seconds.
    supervised.main(replace(args, steps=2, overwrite=True))
    end(process)


def test_group_signal_with_loader_processes(quick):
    """scancel and Ctrl-C reach the loader processes too: the step is still finished and saved."""
    args = quick(supervised.Args, steps=500, num_workers=2, log_every=1)
    process = start("supervised", args)
    while process.is_alive() and not logged_rows(args):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143
    step = torch.load(run_dir(args) / "last.pt", weights_only=True)["step"]
    assert step == read_log(run_dir(args))[-1]["step"] < 500


def test_overwrite_is_for_the_first_start_only(quick, monkeypatch):
    args = quick(supervised.Args, overwrite=True)
    folder = Path(supervised.main(args)["run_dir"])
    (folder / "mine.txt").write_text("kept")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    supervised.main(args)
    assert (folder / "mine.txt").exists()
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    supervised.main(args)
    assert not (folder / "mine.txt").exists()


def test_overwrite_after_a_first_start_that_failed_early(quick, monkeypatch):
    args = quick(supervised.Args, overwrite=True)
    folder = Path(supervised.main(args)["run_dir"])
    (folder / "mine.txt").write_text("of the run before")
    with monkeypatch.context() as patch:
        patch.setattr(supervised, "make_network", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            supervised.main(args)
    assert (folder / "mine.txt").exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    supervised.main(args)
    assert not (folder / "mine.txt").exists()


@pytest.mark.parametrize(
    ("script", "wrong", "flag"),
    [(ael, {"paste_exclude": (99,)}, "--paste-exclude"), (cmb, {"batch_size": 2}, "--batch-size")],
    ids=["ael", "cmb"],
)
def test_overwrite_deletes_nothing_before_all_checks_are_passed(quick, script, wrong, flag):
    args = quick(script.Args, steps=2)
    folder = Path(script.main(args)["run_dir"])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(script.UserError, match=flag):
        script.main(replace(args, overwrite=True, **wrong))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_nan_stops_with_step_and_term_and_keeps_the_state(quick, monkeypatch):
    args = quick(supervised.Args, save_every=2)
    right = supervised.supervised_loss
    calls = []

    def broken(*inputs):
        calls.append(None)
        return right(*inputs) * (float("nan") if len(calls) == 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(supervised, "supervised_loss", broken)
        with pytest.raises(FloatingPointError, match=r"loss/sup is nan at step 4.*failed.pt"):
            supervised.main(args)
    failed = torch.load(run_dir(args) / "failed.pt", weights_only=True)
    assert failed["step"] == 3
    assert all(t.isfinite().all() for t in failed["network"].values())
    assert torch.load(run_dir(args) / "last.pt", weights_only=True)["step"] == 2
    # The same command continues from there.
    assert supervised.main(args)["steps"] == args.steps


def test_nan_between_logged_steps_is_found_before_a_save(quick, monkeypatch):
    args = quick(supervised.Args, save_every=4, log_every=100)
    right, calls = supervised.supervised_loss, []

    def broken(*inputs):
        calls.append(None)
        return right(*inputs) * (float("inf") if len(calls) == 3 else 1)

    monkeypatch.setattr(supervised, "supervised_loss", broken)
    steps = []
    first_bad = supervised.first_bad
    monkeypatch.setattr(
        supervised,
        "first_bad",
        lambda history, done: steps.append(done) or first_bad(history, done),
    )
    with pytest.raises(FloatingPointError, match="at step 3"):
        supervised.main(args)
    assert steps == [1, 2, 3]
    assert not (run_dir(args) / "last.pt").exists()


def test_an_edited_script_is_noticed(quick, capsys):
    args = quick(supervised.Args, save_every=2)
    folder = Path(supervised.main(args)["run_dir"])
    (folder / "supervised.py").write_text("another text")
    (folder / "last.pt").unlink()
    supervised.main(args)
    assert "was edited since this run began" in capsys.readouterr().out
    assert (folder / "supervised.py").read_text() == "another text"


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
    assert set(best) == {"meta", "network", "evaluated", "step", "miou"}
    last_row = read_log(folder)[-1]
    assert last_row["step"] == args.steps and "val/miou" in last_row
    assert f"val/iou/{best['meta']['classes'][0]}" in last_row
