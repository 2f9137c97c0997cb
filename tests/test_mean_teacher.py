"""mean_teacher.py: loss, teacher, ramp and noise against the authors' numbers, steps, runs."""

import math

import numpy as np
import pytest
import torch
from conftest import (
    TinyNet,
    active,
    assert_same,
    assert_unlabeled_labels_are_not_read,
    golden_files,
    load_golden,
    read_log,
    record_steps,
    weights,
)
from test_cli import make_folder
from torch import nn

import mean_teacher
from mean_teacher import (
    PAPER,
    Args,
    add_noise,
    consistency_loss,
    cross_entropy,
    draw_noise,
    ema_decay,
    main,
    make_teacher,
    ramp_up,
    update_teacher,
)

GOLDENS = golden_files("mean_teacher_seed*.npz")
WHOLE = [path for path in GOLDENS if "mt.in.labels" in load_golden(path)]
by_stem = {"ids": lambda path: f"{path.parent.name}-{path.stem}"}


def test_loss_by_hand():
    # Softmaxes (3/4, 1/4) and (1/2, 1/2): squared differences of 1/16 in both classes.
    student = torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1).requires_grad_()
    teacher = torch.zeros(1, 2, 1, 1, requires_grad=True)
    loss = consistency_loss(student, teacher)
    assert loss.item() == pytest.approx(1 / 16)
    loss.backward()
    # Half of d/dz of two squares 1/16, through the softmax's Jacobian p0 p1 (1, -1) = 3/16.
    assert student.grad.flatten().tolist() == pytest.approx([3 / 64 * 2, -3 / 64 * 2])
    assert teacher.grad is None
    assert consistency_loss(student.double(), teacher.double()).dtype == torch.float64
    assert consistency_loss(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("path", WHOLE, **by_stem)
def test_losses_and_gradients_are_the_authors(path):
    golden = load_golden(path)
    logits = {
        f"{who}_{part}": golden.tensor(f"mt.in.logits_{who}_{part}").requires_grad_()
        for who in ("student", "teacher") for part in ("sup", "unsup")
    }  # fmt: skip
    joint = {
        who: torch.cat([logits[f"{who}_sup"], logits[f"{who}_unsup"]])
        for who in ("student", "teacher")
    }
    loss_cons = consistency_loss(joint["student"], joint["teacher"])
    assert loss_cons.item() == pytest.approx(float(golden["mt.out.consistency_unweighted"]), 1e-10)
    loss_sup = cross_entropy(logits["student_sup"], golden.tensor("mt.in.labels"))
    assert loss_sup.item() == pytest.approx(float(golden["mt.out.sup_student"]), 1e-10)
    total = loss_sup + float(golden["mt.in.consistency_weight"]) * loss_cons
    assert total.item() == pytest.approx(float(golden["mt.out.total"]), 1e-10)
    total.backward()
    for name, value in logits.items():
        gradient = torch.zeros_like(value) if value.grad is None else value.grad
        expected = golden.tensor(f"mt.out.grad_{name}")
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_main_takes_the_authors_steps(path, quick, monkeypatch):
    """`main` itself, five steps on their network and images: losses, rates, both networks."""
    golden = load_golden(path)
    student = TinyNet(golden.part("mtsteps.in.student."))
    # Their teacher starts elsewhere and takes the student's parameters, not its buffers.
    teacher = TinyNet(golden.part("mtsteps.in.teacher.")).requires_grad_(False)
    update_teacher(teacher, student, 0.0)
    steps = range(5)
    streams = {"labeled": [], "unlabeled": []}
    for t in steps:
        image, label = (golden.tensor(f"mtsteps.step{t}.in.{k}") for k in ("img_sup", "labels"))
        streams["labeled"].append((image, label))
        image = golden.tensor(f"mtsteps.step{t}.in.img_unsup")
        streams["unlabeled"].append((image, torch.full_like(label, 254)))
    number = {
        k: float(golden[f"mtsteps.in.{k}"])
        for k in ("base_lr", "weight_decay", "momentum", "ema_decay", "consistency_weight")
    }
    args = quick(
        Args, steps=int(golden["mtsteps.in.total_iters"]), optimizer="sgd", lr=number["base_lr"],
        weight_decay=number["weight_decay"], momentum=number["momentum"],
        ema_decay=number["ema_decay"], lambda_u=number["consistency_weight"], ramp_up=0.0,
        batch_size=2, log_every=1, eval_every=10**6,
    )  # fmt: skip
    states, rows = record_steps(mean_teacher, args, monkeypatch, student, teacher, streams)
    for t in steps:
        at = f"mtsteps.step{t}.out."
        assert rows[t]["lr"] == pytest.approx(float(golden[at + "lr"]), rel=1e-12)
        assert rows[t]["loss/sup"] == pytest.approx(float(golden[at + "sup_student"]), rel=1e-6)
        weighted = number["consistency_weight"] * rows[t]["loss/cons"]
        expected = float(golden[at + "consistency_weighted"])
        assert weighted == pytest.approx(expected, rel=1e-6, abs=1e-12)
        for name, state in zip(("student", "teacher"), states[t], strict=True):
            student.assert_like(state, golden.part(f"{at}{name}."), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_teacher_is_the_authors(path):
    golden = load_golden(path)
    seen = golden.tensor("ema.in.student_weights")
    for max_decay in ("constant_0.99", "pixelssl_0.999", "pixelssl_0.99", "pixelssl_0.5"):
        teacher, student = nn.Linear(4, 5, bias=False), nn.Linear(4, 5, bias=False)
        teacher.double(), student.double()
        teacher.weight.data.copy_(golden.tensor("ema.in.teacher_start"))
        for step, weight in enumerate(seen):
            student.weight.data.copy_(weight)
            decay = 0.99 if "constant" in max_decay else ema_decay(step, float(max_decay[9:]))
            update_teacher(teacher, student, decay)
            expected = golden.tensor(f"ema.{max_decay}.out")[step]
            torch.testing.assert_close(teacher.weight.data, expected, rtol=0, atol=1e-12)
    decays = [ema_decay(step, 0.999) for step in range(len(seen))]
    assert decays == pytest.approx(golden["ema.pixelssl_0.999.decay_used"].tolist(), rel=1e-12)


def test_teacher_leaves_buffers_and_gradients_alone():
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    teacher = make_teacher(student, Args())
    assert teacher.training and not any(p.requires_grad for p in teacher.parameters())
    student(torch.randn(2, 3, 4, 4))
    before = teacher[1].running_mean.clone()
    address = teacher[0].weight.data_ptr()
    for parameter in student.parameters():
        parameter.data += 1
    update_teacher(teacher, student, 0.75)
    torch.testing.assert_close(teacher[0].weight, student[0].weight.detach() - 0.75)
    assert teacher[0].weight.data_ptr() == address and teacher[0].weight.grad is None
    assert torch.equal(teacher[1].running_mean, before)
    for decay, source in ((1.0, teacher), (0.0, student)):  # freezes, copies
        expected = source[0].weight.detach().clone()
        update_teacher(teacher, student, decay)
        assert torch.equal(teacher[0].weight, expected)


def test_ramp_up():
    golden = load_golden(GOLDENS[0])
    length = float(golden["ramp.in.length"])
    for step, expected in zip(golden["ramp.in.steps"], golden["ramp.out.sigmoid"], strict=True):
        assert ramp_up(int(step), length) == pytest.approx(float(expected), rel=1e-12)
    assert ramp_up(0, 0) == ramp_up(5, 5) == ramp_up(9, 5) == 1.0
    assert ramp_up(0, 10) == math.exp(-5)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_noise_is_the_authors(path):
    golden = load_golden(path)
    if "noise.in.x" not in golden:
        pytest.skip("the goldens of this seed hold no noise")
    image, noise = golden.tensor("noise.in.x"), golden.tensor("noise.in.noise")
    torch.testing.assert_close(
        add_noise(image, noise), golden.tensor("noise.out.x"), rtol=1e-6, atol=1e-9
    )


def test_noise_is_drawn_for_the_global_batch():
    generator = torch.Generator().manual_seed(0)
    noise = [draw_noise(4, 32, 0.15, generator) for _ in range(200)]
    assert noise[0].shape == (4, 3, 32, 32)
    deviations = torch.stack([one.std() for one in noise])  # uniform from 0 to 0.15
    assert deviations.max() < 0.155 and deviations.mean().item() == pytest.approx(0.075, abs=0.01)


def checkpoint(result):
    return torch.load(f"{result['run_dir']}/last.pt", weights_only=True)


def test_teacher_follows_by_its_formula_over_five_steps(quick, monkeypatch):
    """Recomputed from the student's weights at each step; both kinds of decay."""
    for warmup in (False, True):
        seen = []
        right = update_teacher

        def remember(teacher, student, decay, seen=seen, right=right):
            seen.append([p.detach().clone() for p in student.parameters()])
            right(teacher, student, decay)

        monkeypatch.setattr(mean_teacher, "update_teacher", remember)
        result = main(quick(Args, steps=5, ema_decay=0.6, ema_warmup=warmup, exp_name=f"w{warmup}"))
        teacher = seen[0]  # a copy of the student at first
        for step, student in enumerate(seen):
            decay = min(1 - 1 / (step + 1), 0.6) if warmup else 0.6
            teacher = [decay * a + (1 - decay) * b for a, b in zip(teacher, student, strict=True)]
        saved = checkpoint(result)["teacher"]
        names = [name for name, _ in mean_teacher.DeepLabV3Plus(8, "resnet14").named_parameters()]
        for name, value in zip(names, teacher, strict=True):
            torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-6)


def test_flags_have_their_effects(quick):
    plain = main(quick(Args, **active(mean_teacher)))
    for flags in (
        {"ema_decay": 0.5}, {"ema_warmup": True}, {"noise": 0.2}, {"lambda_u": 1.0},
        {"ramp_up": 0.9},
    ):  # fmt: skip
        other = main(quick(Args, exp_name=str(flags)[2:7], **(active(mean_teacher) | flags)))
        student, changed = checkpoint(plain)["student"], checkpoint(other)["student"]
        assert any(not torch.equal(student[key], changed[key]) for key in student), flags
    teacher = main(quick(Args, evaluate="teacher", exp_name="teacher", **active(mean_teacher)))
    assert_same(
        {k: v for k, v in weights(teacher["run_dir"]).items() if k != "/miou"},
        {k: v for k, v in weights(plain["run_dir"]).items() if k != "/miou"},
    )
    assert checkpoint(teacher)["evaluated"] == "teacher"


def test_it_trains(quick):
    args = quick(Args, steps=40, log_every=1, lr=3e-3, log_pseudo_accuracy=True, noise=0.1)
    rows = read_log(main(args)["run_dir"])
    loss = [row["loss/sup"] for row in rows]
    assert sum(loss[-10:]) < 0.9 * sum(loss[:10])
    assert rows[0]["loss/cons"] > 0  # the noise is not the same for both
    assert all(0 <= row["pseudo/agreement"] <= 1 for row in rows)
    assert 0 < rows[-1]["pseudo/accuracy"] <= 1


def test_teacher_equals_the_student_at_first(quick):
    rows = read_log(main(quick(Args, steps=2, log_every=1))["run_dir"])
    assert rows[0]["loss/cons"] < 1e-9 < rows[1]["loss/cons"] and rows[0]["pseudo/agreement"] == 1


def test_unlabeled_labels_are_never_read(quick, monkeypatch):
    assert_unlabeled_labels_are_not_read(mean_teacher, quick, monkeypatch)


@pytest.mark.parametrize("flags", [
    {"ema_decay": 1.5}, {"ema_decay": -0.1}, {"ramp_up": 1.5}, {"noise": -1.0}, {"lambda_u": -1.0},
    {"noise": float("nan")},
], ids=str)  # fmt: skip
def test_bad_flags(quick, flags):
    with pytest.raises(mean_teacher.UserError, match=next(iter(flags)).replace("_", "-")):
        main(quick(Args, **flags))


def test_paper_rows():
    assert [PAPER[name]["lambda_u"] for name in ("voc", "cityscapes")] == [100, 100]
    assert [PAPER[name]["ramp_up"] for name in ("voc", "cityscapes")] == [0, 0]
    assert [row["ema_decay"] for row in PAPER.values()] == [0.99, 0.99, 0.9, 0.9, 0.99]
    assert not Args().ema_warmup and Args().evaluate == "student"
    args = mean_teacher.resolve(Args(dataset="cityscapes"))
    assert args.supervised_loss == "ohem" and np.isclose(args.lr, 0.0025)


def test_own_data_has_the_weight_per_pixel_of_voc(tmp_path):
    """The loss is a mean over the classes, 21 on VOC. What the user says is not rescaled."""
    flags = {"dataset": "folder", "data_root": str(make_folder(tmp_path))}  # of two classes
    assert mean_teacher.resolve(Args(**flags)).lambda_u == pytest.approx(100 * 2 / 21)
    assert mean_teacher.resolve(Args(**flags, lambda_u=7.0)).lambda_u == 7
