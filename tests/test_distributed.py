"""Several processes do what one does: batches, masks, partners, gradients, validation."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SCRIPTS, active, read_log, weights

import supervised
from common.datasets import StreamSampler

# Adam's first step is +-lr wherever the gradient is rounding alone; its moments are compared, too.
# PseudoSeg's norm is one number for each process: it is logged, but not used here. Views of the
# Pi-model that share more or less of their windows make means over valid pixels differ.
ONE_STEP = {
    "gct": {"detector_lr": 1e-6}, "pi_model": {"shift": 0}, "pseudoseg": {"logit_norm": False},
    "unimatch_v2": {"threshold": 0.0},
}  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")  # imports the scripts once, then forks
CONTEXT.set_forkserver_preload([*SCRIPTS, "torch.utils.tensorboard"])


def process(rank, world_size, port, name, args, frozen):
    """One of `world_size` processes, with torchrun's variables."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    sys.stderr = error_file(args, rank).open("w")  # that of the fork server is another test's
    torch.set_num_threads(1)
    from test_supervised import freeze_batchnorm

    from common.datasets import Shapes

    Shapes.val_ids = Shapes.val_ids[:7]  # two does not divide it
    if frozen:
        freeze_batchnorm(pytest.MonkeyPatch(), SCRIPTS[name])
        if name == "pseudoseg":  # squares at the border are smaller: means over unequal numbers
            SCRIPTS[name].cutout_mask = lambda h, w, center, _: torch.ones(len(center), 1, h, w)
    SCRIPTS[name].tyro = SimpleNamespace(cli=lambda _: args)
    SCRIPTS[name].command_line()


def run(world_size: int, name: str, args, frozen: bool = False) -> Path:
    codes = exit_codes(world_size, name, args, frozen)
    assert codes == [0] * world_size
    (folder,) = Path(args.output_dir).glob(f"*__{args.exp_name}-{world_size}__*")
    return folder


def start_processes(world_size: int, name: str, args, frozen: bool = False) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = replace(args, exp_name=f"{args.exp_name}-{world_size}")
    processes = [
        CONTEXT.Process(target=process, args=(rank, world_size, port, name, args, frozen))
        for rank in range(world_size)
    ]
    for one in processes:
        one.start()
    return processes


def error_file(args, rank: int) -> Path:
    return Path(args.output_dir).parent / f"stderr_{rank}.txt"


def exit_codes(world_size: int, name: str, args, frozen: bool = False) -> list[int]:
    """They end, and what they wrote to stderr is this process's."""
    processes = start_processes(world_size, name, args, frozen)
    for rank, one in enumerate(processes):
        one.join(180)
        print(error_file(args, rank).read_text(), file=sys.stderr)
    return [one.exitcode for one in processes]


def test_mistakes_end_both_processes(quick, capsys):
    """What rank 0 alone finds (a refused resume, checked data) ends all, said once."""
    args = quick(supervised.Args, steps=2)
    run(2, "supervised", args)
    capsys.readouterr()
    assert exit_codes(2, "supervised", replace(args, lr=0.5)) == [2, 2]
    assert capsys.readouterr().err.count("holds a run that differs in lr") == 1
    assert exit_codes(2, "supervised", replace(args, check_data=True)) == [0, 0]


@pytest.mark.parametrize("batch_size", [8, 16])
def test_global_batches_are_the_same_on_1_2_4_and_8_processes(batch_size):
    def batches(world_size):
        samplers = [
            iter(StreamSampler(21, batch_size, 3, rank, world_size, 5, "unlabeled"))
            for rank in range(world_size)
        ]
        share = batch_size // world_size
        return [[next(s) for s in samplers for _ in range(share)] for _ in range(6)]

    one = batches(1)
    assert all(batches(world_size) == one for world_size in (2, 4, 8))


@pytest.mark.parametrize(("name", "flags"), [
    *((name, ONE_STEP.get(name, {})) for name in SCRIPTS),
    ("cps", {"cutmix": False}), ("cps", {"accumulate": 2}),
], ids=str)  # fmt: skip
def test_gradients_and_validation_are_those_of_one_process(name, flags, quick):
    """One SGD step of rate 1 where BatchNorm cannot differ, then validation on 7 images."""
    args = quick(
        SCRIPTS[name].Args, steps=1, optimizer="sgd", lr=1.0, momentum=0.0, log_every=1,
        batch_size=8 if "accumulate" in flags else 4, **active(SCRIPTS[name]), **flags,
    )  # fmt: skip
    one, two = (run(n, name, args, frozen=True) for n in (1, 2))
    before, after = weights(one), weights(two)
    for key, value in before.items():
        if not key.startswith("/optimizer"):
            torch.testing.assert_close(value, after[key], rtol=0, atol=1e-5)
    (row_1,), (row_2,) = read_log(one), read_log(two)
    for key in row_1:
        if key not in ("time/images_per_s", "pseudo/norm"):
            assert row_1[key] == pytest.approx(row_2[key], abs=1e-5, nan_ok=True), key


def test_validation_matrix_on_equal_weights(quick, monkeypatch):
    """Two processes, one of them with an image more, count every pixel once."""
    from common import evaluation

    args = quick(supervised.Args, steps=1, lr=1e-12)
    folders = [run(n, "supervised", args, frozen=True) for n in (1, 2)]
    rows = [read_log(folder)[-1] for folder in folders]
    keys = [key for key in rows[0] if key.startswith("val/")]
    assert len(keys) > 5
    assert json.dumps([rows[0][k] for k in keys]) == json.dumps([rows[1][k] for k in keys])
    assert evaluation.mean_iou(torch.eye(3)) == 1


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_inactive_terms_do_not_stop_two_processes(name, quick):
    """CPS's loss has weight 0 until the last step; then the run is resumed from the middle."""
    inactive = {"cps_start": 0.9, "cps_full": 1.0} if name == "cps" else {}
    folder = run(2, name, quick(SCRIPTS[name].Args, steps=4, num_workers=1, **inactive))
    assert [row["step"] for row in read_log(folder)] == [2, 4]


def test_torchrun_as_in_the_readme_and_sigterm(tmp_path):
    """The command line itself; what was saved before SIGTERM is whole."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "cps.py",
        "--dataset", "shapes", "--device", "cpu", "--batch-size", "4", "--crop-size", "32",
        "--steps", "2000", "--log-every", "1", "--num-workers", "0", "--split", "8",
        "--save-every", "2", "--output-dir", str(tmp_path),
    ]  # fmt: skip
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/last.pt")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    (checkpoint,) = tmp_path.glob("*/last.pt")
    saved = torch.load(checkpoint, weights_only=True)["step"]
    assert 2 <= saved <= read_log(checkpoint.parent)[-1]["step"] < 2000
