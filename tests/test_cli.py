"""The command lines: help, and one clear message with exit code 2 for every mistake."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from PIL import Image

import cps
import predict
import supervised

QUICK = (
    "--dataset shapes --device cpu --num-workers 0 --batch-size 4 --crop-size 32 --steps 2 "
    "--log-every 1 --split 8"
).split()


def call(script, monkeypatch, capsys, *flags, entry="command_line") -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line, in this process."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
    code = 0
    try:
        getattr(script, entry)()
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_help_shows_every_flag_in_at_most_120_lines(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = call(SCRIPTS[name], monkeypatch, capsys, "--help")
    assert code == 0 and len(out.splitlines()) <= 120
    for field in fields(SCRIPTS[name].Args):
        assert f"--{field.name.replace('_', '-')} " in re.sub(r"[,\n]", " ", out), field.name


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_a_run_from_the_command_line(name, monkeypatch, capsys, tmp_path):
    flags = [*QUICK, "--output-dir", tmp_path]
    code, out, err = call(SCRIPTS[name], monkeypatch, capsys, *flags)
    assert code == 0 and "mIoU" in out and "(last)" in out and "whole image" in out
    command = re.search(r"python predict.py (\S+) IMAGE", out)
    assert (tmp_path / command[1].removeprefix(f"{tmp_path}/")).is_file()
    code, out, err = call(SCRIPTS[name], monkeypatch, capsys, *flags)
    assert code == 0 and "from step 2" in out


MISTAKES = {
    "--split 3/8": "--split 3/8",
    "--split 0": "--split 0: shapes has 1024 training images; use 1 to 1024",
    "--split 5000": "--split 5000: shapes has 1024 training images",
    "--split cps:1/8": "no such published list for shapes",
    "--split-seed -1": "--split-seed -1: must lie in [0, inf]",
    "--batch-size 0": "--batch-size 0: must lie in [1, inf]",
    "--batch-size -4": "--batch-size -4: must lie in [1, inf]",
    "--batch-size 1": "2 images or more for a BatchNorm",
    "--batch-size 6 --accumulate 4": "use a multiple of 1 processes x --accumulate 4",
    "--batch-size 4 --accumulate 4": "2 images or more for a BatchNorm",
    "--accumulate 0": "--accumulate 0: must lie in [1, inf]",
    "--crop-size 8": "--crop-size 8: must lie in [32, inf]",
    "--steps 0": "--steps 0: must lie in [1, inf]",
    "--lr nan": "--lr nan: must lie in [0, inf]",
    "--lr -1": "--lr -1.0: must lie in [0, inf]",
    "--weight-decay inf": "--weight-decay inf: must lie in [0, inf]",
    "--momentum 1": "--momentum 1.0: must lie in [0, 0.999]",
    "--num-workers -1": "--num-workers -1: must lie in [0, inf]",
    "--log-every 0": "--log-every 0: must lie in [1, inf]",
    "--eval-every 0": "--eval-every 0: must lie in [1, inf]",
    "--seed -1": "--seed -1: must lie in [0, inf]",
    "--weights imagenet": "--weights imagenet, resnet14: Unknown model resnet14; use none",
    "--weights nowhere.pth": "--weights nowhere.pth, resnet14: no such file",
    "--weights README.md": "--weights README.md, resnet14: ",
    "--dataset voc": "--dataset shapes",
    "--dataset cityscapes": "cityscapes-dataset.com",
    "--dataset camvid": "Add --download",
    "--dataset folder --split full": "--data-root",
    "--dataset imagenet": "imagenet",
    "--device cuda": "--device cuda: 0 here; use fewer processes, or cpu",
    "--lr fast": "fast",
    "--no-such-flag": "no-such-flag",
}  # fmt: skip


@pytest.mark.parametrize("flags", list(MISTAKES))
@pytest.mark.parametrize("name", list(SCRIPTS))
def test_mistakes(name, flags, monkeypatch, capsys, tmp_path):
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    line = [*QUICK, "--data-root", tmp_path / "data", "--output-dir", tmp_path / "runs"]
    code, out, err = call(SCRIPTS[name], monkeypatch, capsys, *line, *flags.split())
    assert code == 2
    text = re.sub(r"\s+", " ", err.replace("│", " "))
    message = MISTAKES[flags].replace("resnet14", SCRIPTS[name].PAPER["shapes"]["backbone"])
    if (name, flags) == ("unimatch_v2", "--weights imagenet"):  # no name there, so a file
        message = "--weights imagenet, vit_tiny: no such file; use --weights none or FILE"
    assert message in text and "Traceback" not in text, text
    assert not list(tmp_path.glob("runs/*/last.pt"))


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_no_unlabeled_images(name, monkeypatch, capsys, tmp_path):
    flags = [*QUICK, "--output-dir", tmp_path, "--split", 1024]
    code, _, err = call(SCRIPTS[name], monkeypatch, capsys, *flags)
    assert code == (0 if name == "supervised" else 2), err
    assert ("there are no unlabeled images" in err) == (code == 2)
    assert code == 0 or not list(tmp_path.glob("*/last.pt"))


def test_output_directory_that_cannot_be_written(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    flags = [*QUICK, "--output-dir", tmp_path / "file"]
    code, _, err = call(supervised, monkeypatch, capsys, *flags)
    assert code == 2 and str(tmp_path / "file") in err and err.count("\n") == 1


def test_checkpoint_of_another_script(monkeypatch, capsys, tmp_path):
    flags = [*QUICK, "--output-dir", tmp_path, "--exp-name", "mine"]
    assert call(supervised, monkeypatch, capsys, *flags)[0] == 0
    code, _, err = call(cps, monkeypatch, capsys, *flags)
    assert code == 2 and "script supervised -> cps" in err


def test_imagenet_weights_without_a_network(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    line = [*QUICK, "--output-dir", tmp_path / "runs", "--backbone", "resnet50"]
    code, _, err = call(supervised, monkeypatch, capsys, *line, "--weights", "imagenet")
    assert code == 2 and "--weights imagenet, resnet50" in err and "none" in err
    assert str(tmp_path / "hub" / "checkpoints") in err


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_found_in_training_is_named(workers, monkeypatch, capsys, tmp_path):
    folder = make_folder(tmp_path)
    (folder / "images" / "img3.png").write_bytes(b"not an image")
    flags = [
        "--dataset", "folder", "--data-root", folder, "--backbone", "resnet14", "--weights", "none",
        "--device", "cpu", "--batch-size", 4, "--crop-size", 32, "--steps", 4,
        "--output-dir", tmp_path / "runs", "--num-workers", workers,
    ]  # fmt: skip
    code, _, err = call(supervised, monkeypatch, capsys, *flags)
    assert code == 2 and "img3.png: cannot be read as an image" in err and "Traceback" not in err
    assert err.count("\n") == 1
    code, _, err = call(supervised, monkeypatch, capsys, *flags, "--check-data")
    assert code == 2 and "1 of 10 samples are bad" in err and "img3.png" in err


def make_folder(tmp_path, size=(40, 48)):
    """The user's own data: ten images, four of them labeled, two for validation."""
    folder = tmp_path / "mine"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(10):
        image = draw.integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "images" / f"img{number}.png")
        if number < 6:
            mask = (image[..., 0] > 128).astype(np.uint8)
            Image.fromarray(mask).save(folder / "masks" / f"img{number}.png")
    (folder / "labeled.txt").write_text("img0\nimg1\nimg2.png\nimg3\n")
    (folder / "val.txt").write_text("img4\nimg5\n")
    (folder / "classes.txt").write_text("dark\nlight\n")
    return folder


def test_own_data_from_training_to_prediction(monkeypatch, capsys, tmp_path):
    """Ten images, six masks: train CPS, predict a folder, evaluate."""
    folder = make_folder(tmp_path)
    flags = [
        "--dataset", "folder", "--data-root", folder, "--backbone", "resnet14", "--weights", "none",
        "--device", "cpu", "--batch-size", 4, "--crop-size", 32, "--steps", 2, "--num-workers", 0,
        "--output-dir", tmp_path / "runs",
    ]  # fmt: skip
    code, out, err = call(cps, monkeypatch, capsys, *flags)
    assert code == 0 and "4 labeled + 4 unlabeled images" in out, err
    (checkpoint,) = tmp_path.glob("runs/*/last.pt")
    out_dir = tmp_path / "out"
    flags = [*flags, "--log-pseudo-accuracy", "--exp-name", "b"]  # where no mask is, none is asked
    assert call(cps, monkeypatch, capsys, *flags)[0] == 0
    flags = [checkpoint, folder / "images", "--out", out_dir, "--device", "cpu", "--evaluate"]
    code, out, err = call(predict, monkeypatch, capsys, *flags, entry="command_line")
    assert code == 0 and "mIoU" in out and "dark" in out and "whole image" in out, err
    assert len(list(out_dir.iterdir())) == 30
    mask = Image.open(out_dir / "img0.png")
    assert mask.mode == "L" and mask.size == (48, 40) and np.asarray(mask).max() <= 1
    assert Image.open(out_dir / "img0_overlay.png").mode == "RGB"
    code, other, _ = call(predict, monkeypatch, capsys, *flags, "--network", "network_2")
    assert code == 0 and "last.pt (network_2)" in other and "last.pt (network_1)" in out
    code, _, err = call(predict, monkeypatch, capsys, *flags, "--network", "teacher")
    assert code == 2 and "--network teacher" in err and "holds network_1, network_2" in err
    flags += ["--scales", 0.5, 1, "--flip"]
    code, out, _ = call(predict, monkeypatch, capsys, *flags)
    assert code == 0 and "scales 0.5, 1, flip" in out


@pytest.mark.parametrize(("flags", "message"), [
    (["missing.pt", "a.png"], "missing.pt: no such checkpoint"),
    (["file.pt", "a.png"], "file.pt: not a checkpoint of these scripts"),
    ([], "required"),
], ids=str)  # fmt: skip
def test_predict_mistakes(flags, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.pt").write_bytes(b"nothing")
    code, _, err = call(predict, monkeypatch, capsys, *flags)
    assert code == 2 and message in err


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = {
        "data_root": "~/mine",
        "output_dir": "~/runs",
        "weights": "~/x.pth",
        "split": "~/few.txt",
    }
    args = supervised.resolve(supervised.Args(dataset="folder", **flags))
    for name, value in flags.items():
        assert getattr(args, name) == value.replace("~", str(tmp_path))
    assert supervised.resolve(supervised.Args(dataset="folder", data_root="~/a")).split == (
        f"{tmp_path}/a/labeled.txt"
    )


def test_variables_left_over_from_another_program(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "8")
    code, _, err = call(supervised, monkeypatch, capsys, *QUICK, "--output-dir", tmp_path)
    assert code == 2 and "WORLD_SIZE set, but not by torchrun" in err and err.count("\n") == 1


def test_a_run_inside_a_thread(quick):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(supervised.main, quick(supervised.Args, steps=1)).result()["steps"] == 1


def test_importing_a_script_has_no_side_effect(tmp_path):
    import subprocess

    from conftest import ROOT

    program = (
        f"import signal, torch; state = torch.get_rng_state(); import {', '.join(SCRIPTS)}; "
        "assert torch.equal(state, torch.get_rng_state()); "
        "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL; "
        "assert not torch.distributed.is_initialized()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0 and not done.stdout and not list(tmp_path.iterdir()), done.stderr


def test_ohem_on_a_small_crop_is_said(monkeypatch, capsys, tmp_path):
    line = [*QUICK, "--output-dir", tmp_path, "--supervised-loss", "ohem"]
    code, _, err = call(supervised, monkeypatch, capsys, *line)
    assert code == 0 and "note: ohem keeps 50,000 pixels an image" in err
