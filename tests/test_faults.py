"""What may happen to a run of days: every fault ends in one clear line, and nothing is lost."""

import errno
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same, read_log, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_cli import QUICK, call, make_folder
from test_distributed import CONTEXT, start_processes
from test_resume import complete, end, logged_rows, run, run_dir, start

import cps
import predict
import supervised

SETTINGS = settings(
    deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def full_disk(args, limit: int) -> None:
    """A run on a disk that takes files of `limit` bytes after its first checkpoint."""
    save = supervised.Run.save

    def save_until_full(self, name, *rest, **flags):
        save(self, name, *rest, **flags)
        if name == "last.pt":
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    supervised.Run.save = save_until_full
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  pytest's is a file that may be larger
    run("supervised", args, False, True)


@pytest.mark.parametrize("limit", [50_000, 1_000_000])  # more than the log holds
def test_full_disk_while_a_checkpoint_is_written(limit, quick):
    args = quick(supervised.Args, save_every=2)
    process = CONTEXT.Process(target=full_disk, args=(args, limit))
    process.start()
    process.join(60)
    error = Path(args.output_dir).with_name("stderr.txt").read_text()
    assert process.exitcode, error
    assert torch.load(run_dir(args) / "last.pt", weights_only=True)["step"] == 2
    complete("supervised", replace(args, exp_name="whole"))
    complete("supervised", args)
    runs = [run_dir(replace(args, exp_name=name)) for name in ("whole", "supervised")]
    assert_same(*map(weights, runs))


def test_full_disk_while_the_log_is_written(monkeypatch, capsys, tmp_path):
    def full(self, step, row, pictures):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(supervised.Run, "log", full)
    code, _, err = call(supervised, monkeypatch, capsys, *QUICK, "--output-dir", tmp_path)
    assert code == 2 and "No space left on device" in err and "Traceback" not in err
    monkeypatch.setattr(supervised.Run, "log", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a fault of the code keeps its traceback
        call(supervised, monkeypatch, capsys, *QUICK, "--output-dir", tmp_path)


def test_image_that_is_damaged_in_the_middle_of_training(monkeypatch, capsys, tmp_path):
    """It is named; once it is mended the same command goes on as if nothing had happened."""
    folder = make_folder(tmp_path)
    flags = [
        "--dataset", "folder", "--data-root", folder, "--backbone", "resnet14", "--weights", "none",
        "--device", "cpu", "--batch-size", 4, "--crop-size", 32, "--steps", 6, "--num-workers", 0,
        "--save-every", 1, "--output-dir", tmp_path / "runs",
    ]  # fmt: skip
    assert call(supervised, monkeypatch, capsys, *flags, "--exp-name", "whole")[0] == 0
    victim = folder / "images" / "img3.png"
    good, log = victim.read_bytes(), supervised.Run.log

    def damage(self, step, row, pictures):
        log(self, step, row, pictures)
        victim.write_bytes(good[:100])

    with monkeypatch.context() as patch:
        patch.setattr(supervised.Run, "log", damage)
        code, _, err = call(supervised, monkeypatch, capsys, *flags, "--log-every", 2)
    assert code == 2 and "img3.png: cannot be read as an image" in err.splitlines()[-1]
    assert "Traceback" not in err
    victim.write_bytes(good)
    assert call(supervised, monkeypatch, capsys, *flags)[0] == 0
    runs = [next(tmp_path.glob(f"runs/*__{name}__*")) for name in ("whole", "supervised")]
    assert_same(*map(weights, runs))


def test_killed_loader_process(quick):
    args = quick(supervised.Args, steps=40, num_workers=1, log_every=1, save_every=1)
    process = start("supervised", args, False, True)
    while process.is_alive() and logged_rows(args) < 3:
        time.sleep(0.01)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    process.join(60)
    end(process)
    error = Path(args.output_dir).with_name("stderr.txt").read_text()
    assert process.exitcode == 2 and "DataLoader worker" in error, error
    complete("supervised", replace(args, exp_name="whole"))
    complete("supervised", args)
    runs = [run_dir(replace(args, exp_name=name)) for name in ("whole", "supervised")]
    assert_same(*map(weights, runs))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_at_any_moment_of_two_processes(number, quick):
    """As a terminal or a scheduler sends them: to both. All ranks say so in their exit code."""
    args = quick(cps.Args, steps=12, log_every=1, save_every=1)
    codes = []
    draw = random.Random(int(number))
    for _ in range(3):
        processes = start_processes(2, "cps", args)
        folder = Path(args.output_dir)
        rows = len(read_log(next(folder.glob("*cps-2*")))) if codes else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and all(p.is_alive() for p in processes):
            logs = list(folder.glob("*cps-2*/log.jsonl"))
            if logs and logs[0].read_text().count("\n") > rows:
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        for process in processes:
            os.kill(process.pid, number)
        for process in processes:
            process.join(60)
        codes.append([process.exitcode for process in processes])
        if codes[-1] == [0, 0]:
            break
    assert codes[0] != [0, 0]
    for one in (args, replace(args, exp_name="whole")):
        for process in (processes := start_processes(2, "cps", one)):
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0]
    runs = [next(folder.glob(f"*__{name}-2__*")) for name in ("whole", "cps")]
    assert_same(*map(weights, runs))


def test_a_killed_process_under_torchrun_is_started_again(tmp_path):
    """`--max-restarts`: the run resumes by itself and ends as the undisturbed one."""

    def command(name):
        return [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
            "--max-restarts=2", "--monitor-interval=0.1", "--standalone", "cps.py", *QUICK,
            "--steps", "6", "--save-every", "1", "--output-dir", str(tmp_path),
            "--exp-name", name,
        ]  # fmt: skip

    whole = subprocess.run(command("whole"), cwd=ROOT, capture_output=True, timeout=120)
    assert whole.returncode == 0, whole.stderr.decode()
    run = subprocess.Popen(
        command("killed"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("*__killed__*/last.pt")):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        victims = [
            int(child) for child in children
            if b"cps.py" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]  # fmt: skip
        os.kill(victims[-1], signal.SIGKILL)
        error = run.communicate(timeout=120)[1].decode()
    finally:
        run.terminate()  # and its processes with it
    assert run.returncode == 0, error
    runs = [next(tmp_path.glob(f"*__{name}__*")) for name in ("whole", "killed")]
    assert_same(*map(weights, runs))
    assert [row["step"] for row in read_log(runs[1])] == list(range(1, 7))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile",)


def test_hostile_pickles_are_refused(quick, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = quick(supervised.Args, steps=2)
    folder = Path(supervised.main(args)["run_dir"])
    payloads = {"pickle.pt": pickle.dumps(Hostile())}
    torch.save({"meta": {"args": Hostile()}}, tmp_path / "zip.pt")
    payloads["zip.pt"] = (tmp_path / "zip.pt").read_bytes()
    for payload in payloads.values():
        (folder / "last.pt").write_bytes(payload)
        with pytest.raises(supervised.UserError, match="(?s)last.pt: .*delete it"):
            supervised.main(args)
        code, _, err = call(
            predict, monkeypatch, capsys, folder / "last.pt", "a.png", entry="command_line"
        )
        assert code == 2 and "not a checkpoint of these scripts" in err
        flags = [*QUICK, "--output-dir", tmp_path / "w", "--weights", folder / "last.pt"]
        code, _, err = call(supervised, monkeypatch, capsys, *flags)
        assert code == 2 and "--weights" in err
    assert not (tmp_path / "hostile").exists()


# ---- random mistakes -----------------------------------------------------------------------------

WORDS = st.sampled_from([
    "", "0", "-1", "1", "2", "3", "7", "20", "1/8", "1/0", "0/0", "cps:1/8", "u2pl:", "nan", "inf",
    "1e400", "-0.5", "0.5", "1e-3", "none", "None", "imagenet", "auto", "cuda", "mps", "cpu",
    "full", "shapes", "voc", "folder", "resnet14", "resnet50", "True", "..", "/dev/null", "\x00",
    "é", "a b", "--", "--lr", "9" * 30,
])  # fmt: skip
# Not those that fetch files, end the program or choose the folder that this test looks at.
NAMES = sorted(
    f"--{field.name.replace('_', '-')}"
    for field in fields(cps.Args)
    if field.name not in ("download", "output_dir", "check_data")
)


@settings(SETTINGS, max_examples=300)
@given(st.lists(st.tuples(st.sampled_from([*NAMES, "--nonsense", ""]), WORDS), max_size=3))
def test_random_command_lines(monkeypatch, capsys, tmp_path, mistakes):
    """One error and exit code 2, or a run that would begin; never a traceback."""
    begun = []

    def begin(*args, **kwargs):
        begun.append(args)
        raise SystemExit(0)

    with monkeypatch.context() as patch:
        patch.setattr(cps, "make_batches", begin)
        flags = [word for pair in mistakes for word in pair if word]
        line = [*QUICK, "--output-dir", tmp_path / "runs", "--data-root", tmp_path / "none"]
        code, out, err = call(cps, patch, capsys, *line, *flags)
    assert code in (0, 2), (code, err)
    assert "Traceback" not in err
    if code == 2:
        assert err.count("error:") == 1 or "For full helptext" in err, err
    else:
        assert begun or "usage" in out.lower() or "Cross Pseudo" in out
    assert not list(tmp_path.glob("runs/*/*.pt"))


DAMAGE = {
    "delete": lambda path, draw: path.unlink(),
    "empty": lambda path, draw: path.write_bytes(b""),
    "truncate": lambda path, draw: path.write_bytes(path.read_bytes()[: draw.randrange(1, 60)]),
    "garbage": lambda path, draw: path.write_bytes(draw.randbytes(100)),
    "flip": lambda path, draw: path.write_bytes(
        bytes(b ^ (draw.random() < 0.02) * 255 for b in path.read_bytes())
    ),
    "other size": lambda path, draw: Image.fromarray(np.zeros((5, 9), np.uint8)).save(
        path.with_suffix(".png")
    ),
    "line": lambda path, draw: path.write_bytes(path.read_bytes() + b"img4\nnonsense\n\n"),
    "folder": lambda path, draw: (path.unlink(), path.mkdir()),
}


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("whole"))


@settings(SETTINGS, max_examples=150)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(sorted(DAMAGE)), twice=st.booleans())
def test_damaged_data_trees(monkeypatch, capsys, tmp_path, whole_folder, seed, kind, twice):
    """`--check-data` finds the damage or the data are still in order; never a traceback."""
    folder, draw = tmp_path / "mine", random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole_folder, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in draw.sample(files, 1 + twice):
        DAMAGE[kind](path, draw)
    flags = [
        "--dataset", "folder", "--data-root", folder, "--backbone", "resnet14", "--weights", "none",
        "--device", "cpu", "--batch-size", 2, "--crop-size", 32, "--steps", 1, "--num-workers", 0,
        "--output-dir", tmp_path / "runs", "--check-data",
    ]  # fmt: skip
    code, out, err = call(cps, monkeypatch, capsys, *flags)
    assert code in (0, 2), (code, err)
    assert "Traceback" not in err
    if code == 2:
        assert err.count("error:") == 1, err
    else:
        assert "are in order" in out
    assert not list(tmp_path.glob("runs/*/*.pt"))


def test_few_open_files_are_raised_or_an_error(monkeypatch):
    import resource

    from common import UserError, allow_open_files

    limits, kind = [], resource.RLIMIT_NOFILE
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.append((which, pair)))
    endless = resource.RLIM_INFINITY
    for now, expected in (
        ((256, endless), [(kind, (4096, endless))]), ((64, 1024), [(kind, (1024, 1024))]),
        ((8192, 8192), []), ((endless, endless), []), ((1024, 1024), []),
    ):  # fmt: skip
        monkeypatch.setattr(resource, "getrlimit", lambda _, now=now: now)
        allow_open_files()
        assert limits == expected, now
        limits.clear()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    with pytest.raises(UserError, match="40 open files are too few.*--num-workers 0"):
        allow_open_files()
    assert not limits
