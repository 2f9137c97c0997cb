"""classmix.py: masks, mixing, loss and colors against the authors' numbers, whole steps, runs."""

import math

import numpy as np
import pytest
import torch
from conftest import (
    TinyNet,
    active,
    assert_unlabeled_labels_are_not_read,
    golden_files,
    load_golden,
    read_log,
    record_steps,
)
from torch import nn

import classmix
from classmix import (
    PAPER,
    Args,
    choose_classes,
    class_mask,
    confidence_weight,
    cross_entropy,
    ema_decay,
    half_of_classes,
    main,
    paste,
    poly_lr,
    strong_view,
    unsupervised_loss,
)
from common.datasets import IGNORE, UNKNOWN
from common.transforms import color_jitter, gaussian_blur

GOLDENS = golden_files("classmix_seed*.npz")
by_stem = {"ids": lambda path: f"{path.parent.name}-{path.stem}"}


def resize(logits, size):
    return nn.functional.interpolate(logits, size, mode="bilinear", align_corners=True)


def labels(golden, key: str) -> torch.Tensor:
    """With 255 for what they ignore (250 on Cityscapes)."""
    label = golden.tensor(key)
    return label.masked_fill(label == int(golden["meta_ignore"]), IGNORE)


def sets(rows) -> list[torch.Tensor]:
    """Lists of class ids, padded with -1, as tensors."""
    return [torch.as_tensor(row[row >= 0]) for row in rows]


def test_loss_by_hand():
    # Two pixels of two classes with logits (0, 0): cross-entropy log 2 each; one is confident.
    logits = torch.zeros(1, 2, 1, 2, requires_grad=True)
    label, confidence = torch.tensor([[[0, 1]]]), torch.tensor([[[0.968, 0.5]]])
    loss = unsupervised_loss(logits, label, confidence)
    assert loss.item() == pytest.approx(0.5 * math.log(2))  # inclusive, share 1/2 of both pixels
    weight = confidence_weight(confidence[:, None], 0.968, per_pixel=True)
    each = unsupervised_loss(logits, label, confidence, weight=weight)
    assert each.item() == pytest.approx(0.5 * math.log(2))  # one pixel counts, of two
    each.backward()
    assert logits.grad[0, :, 0].tolist() == [[-0.25, 0], [0.25, 0]]
    nothing = unsupervised_loss(logits, label, torch.zeros(1, 1, 2))
    logits.grad = None
    nothing.backward()
    assert nothing.item() == 0 and not logits.grad.any()
    assert unsupervised_loss(logits.double(), label, confidence.double()).dtype == torch.float64
    assert unsupervised_loss(logits.bfloat16(), label, confidence).dtype == torch.float32


def test_masks_by_hand():
    label = torch.tensor([[[0, 1, 1], [2, 2, 0]], [[3, 3, 3], [3, 3, 3]]])
    mask = class_mask(label, [torch.tensor([0, 2]), torch.tensor([], dtype=torch.long)])
    assert mask[:, 0].tolist() == [[[1, 0, 0], [1, 1, 1]], [[0, 0, 0], [0, 0, 0]]]
    # Three classes give one, a single one none; the lowest draw wins.
    draw = torch.tensor([[0.9, 0.2, 0.5, 0.0], [0.1, 0.2, 0.3, 0.4]])
    assert half_of_classes(label, draw).tolist() == [[IGNORE, 1, IGNORE, IGNORE], [IGNORE] * 4]


def test_choice_is_half_of_the_classes_and_uniform():
    golden = load_golden(GOLDENS[0])
    rule = dict(zip(golden["cls_count_rule_n"], golden["cls_count_rule_k"], strict=True))
    generator = torch.Generator().manual_seed(0)
    for present, expected in rule.items():
        label = torch.arange(40).remainder(int(present)).view(1, 5, 8)
        (chosen,) = choose_classes(label, generator)
        assert len(chosen) == expected == len(chosen.unique())
        assert set(chosen.tolist()) <= set(range(int(present)))
    label = torch.tensor([0, 3, 4, 9, 20]).repeat(4).view(1, 4, 5).expand(3000, 4, 5)
    chosen = torch.cat(choose_classes(label, generator))
    counts = torch.bincount(chosen, minlength=21)[[0, 3, 4, 9, 20]]
    assert counts.sum() == 6000 and (counts - 1200).abs().max() < 120


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_class_masks_are_the_authors(path):
    golden = load_golden(path)
    label = golden.tensor("cls_pred")[None]
    for row, expected in zip(golden["cls_sets"], golden.tensor("cls_masks"), strict=True):
        assert torch.equal(class_mask(label, sets(row[None]))[0, 0], expected.float())


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_one_step_on_given_logits_is_the_authors(path):
    golden = load_golden(path)
    image_u = golden.tensor("in_images_u")
    size = image_u.shape[2:]
    prob = resize(golden.tensor("in_teacher_logits_low"), size).softmax(1)
    confidence, pseudo_label = prob.max(1)
    assert torch.equal(pseudo_label, golden.tensor("out_argmax_u"))
    mask = class_mask(pseudo_label, sets(golden["out_chosen_classes"]))
    assert torch.equal(mask[:, 0], golden.tensor("out_mix_mask").float())
    after = [(i + 1) % len(image_u) for i in range(len(image_u))]
    mixed = [paste(x[after], x, mask) for x in (image_u, pseudo_label, confidence)]
    assert torch.equal(mixed[0], golden.tensor("out_mixed_images"))
    assert torch.equal(mixed[1], golden.tensor("out_pseudo_label"))
    torch.testing.assert_close(mixed[2], golden.tensor("out_max_probs"), rtol=1e-5, atol=1e-7)
    tau = float(golden["meta_tau"])
    share = confidence_weight(mixed[2][:, None], tau)
    assert share.item() == pytest.approx(float(golden["out_unlabeled_weight"]), rel=1e-6)
    pixels = confidence_weight(mixed[2][:, None], tau, per_pixel=True)
    cases = {"threshold_uniform": None, "threshold": pixels, "noweight": 1.0}
    for name, weight in cases.items():
        low = golden.tensor("in_student_mix_logits_low").requires_grad_()
        loss = unsupervised_loss(resize(low, size), *mixed[1:], tau, weight)
        expected = float(golden[f"out_loss_unsup_CE_{name}"])
        assert loss.item() == pytest.approx(expected, rel=1e-5), name
        loss.backward()
        if name != "noweight":
            expected = golden.tensor(f"out_grad_unsup_CE_{name}_logits_low")
            torch.testing.assert_close(low.grad, expected, rtol=1e-4, atol=1e-8)
    low = golden.tensor("in_logits_l_low").requires_grad_()
    loss_sup = cross_entropy(resize(low, size), labels(golden, "in_labels_l"))
    assert loss_sup.item() == pytest.approx(float(golden["out_loss_sup"]), rel=1e-5)
    loss_sup.backward()
    expected = golden.tensor("out_grad_sup_logits_low")
    torch.testing.assert_close(low.grad, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_schedules_are_the_authors(path):
    golden = load_golden(path)
    decays = [ema_decay(int(step), 0.99) for step in golden["ema_iterations"]]
    assert decays == pytest.approx(golden["ema_alpha"].tolist(), rel=1e-12)
    rates = golden["lr_poly_base_and_head"].reshape(len(golden["lr_poly_iterations"]), -1)
    for step, (base, head) in zip(golden["lr_poly_iterations"], rates, strict=True):
        assert poly_lr(rates[0, 0], int(step), 40_000) == pytest.approx(float(base), rel=1e-9)
        assert head == pytest.approx(10 * base, rel=1e-9)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_colors_and_blur_are_the_authors(path):
    """Theirs are on a scale of 255 less the mean; ours on [0, 1]."""
    golden = load_golden(path)
    mean = golden.tensor("jit_mean").view(1, 3, 1, 1)
    factors = [
        golden.tensor(f"jit_{k}") for k in ("brightness", "contrast", "saturation", "hue")
    ]  # fmt: skip
    image = (golden.tensor("jit_in") + mean) / 255
    out = 255 * color_jitter(image, *factors, golden["jit_order"].tolist()) - mean
    torch.testing.assert_close(out, golden.tensor("jit_out"), rtol=1e-5, atol=1e-4)
    out = gaussian_blur(golden.tensor("blur_in"), float(golden["blur_sigma"]))
    torch.testing.assert_close(out, golden.tensor("blur_out"), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_main_takes_the_authors_steps(path, quick, monkeypatch):
    """`main` itself, two steps: pseudo-labels, losses, both networks and their statistics."""
    golden = load_golden(path)
    student = TinyNet(golden.part("full_student_init/"))
    teacher = TinyNet(golden.part("full_teacher_init/")).requires_grad_(False)
    streams, chosen, pseudo_labels = {"labeled": [], "unlabeled": []}, [], []
    for t in range(2):
        at = f"full_step{t}_"
        label = labels(golden, at + "labels_l")
        streams["labeled"].append((golden.tensor(at + "images_l"), label))
        streams["unlabeled"].append(
            (golden.tensor(at + "images_u"), torch.full_like(label, UNKNOWN))
        )
        chosen.append(sets(golden[at + "chosen_classes"]))
    monkeypatch.setattr(classmix, "half_of_classes", lambda *_: chosen.pop(0))

    def remember(logits, pseudo_label, *rest, **weight):
        pseudo_labels.append(pseudo_label)
        return unsupervised_loss(logits, pseudo_label, *rest, **weight)

    monkeypatch.setattr(classmix, "unsupervised_loss", remember)
    monkeypatch.setattr(classmix, "poly_lr", lambda base_lr, *_: base_lr)  # theirs is constant
    lr, momentum, weight_decay = golden["full_sgd_lr_momentum_wd"].tolist()

    def sgd(networks, args, device):  # theirs decays every parameter
        groups = [{"params": list(networks[0].parameters()), "lr_mult": 1.0}]
        return torch.optim.SGD(groups, lr, momentum=momentum, weight_decay=weight_decay)

    monkeypatch.setattr(classmix, "make_optimizer", sgd)
    args = quick(
        Args, batch_size=len(label), log_every=1, lr=lr, ramp_up=0.0, eval_every=10**6,
    )  # fmt: skip
    states, rows = record_steps(classmix, args, monkeypatch, student, teacher, streams)
    for t in range(2):
        at = f"full_step{t}_"
        assert torch.equal(pseudo_labels[t], golden.tensor(at + "pseudo_label"))
        assert rows[t]["loss/sup"] == pytest.approx(float(golden[at + "loss_sup"]), rel=1e-5)
        assert rows[t]["loss/cons"] == pytest.approx(float(golden[at + "loss_unsup"]), rel=1e-4)
        share = float(golden[at + "unlabeled_weight"])
        assert rows[t]["pseudo/confident"] == pytest.approx(share, rel=1e-5)
        for name, state in zip(("student", "teacher"), states[t], strict=True):
            expected = golden.part(f"full_{name}_after{t}/")
            student.assert_like(state, expected, rtol=2e-4, atol=2e-5)


def test_strong_view_is_that_of_the_global_batch():
    """Two halves of a batch are what the whole is: coins, order, factors and blur."""
    image = torch.randn(4, 3, 24, 20)
    changed = []
    for seed in range(12):

        def draw(seed=seed):
            return torch.Generator().manual_seed(seed)

        whole = strong_view(image, 4, 0, draw())
        halves = [strong_view(image[i : i + 2], 4, i, draw()) for i in (0, 2)]
        torch.testing.assert_close(whole, torch.cat(halves))
        changed.append(not torch.equal(whole, image))
    assert 0.5 < np.mean(changed) <= 1  # 1 - 0.2 * 0.5 on average


@pytest.mark.parametrize("flags", [
    {}, {"strong": True}, {"confidence_per_pixel": True}, {"accumulate": 2},
], ids=str)  # fmt: skip
def test_it_trains(quick, flags):
    flags = {"confidence_threshold": 0.3, "log_pseudo_accuracy": True} | flags
    args = quick(Args, steps=40, log_every=1, lr=3e-3, **flags, **active(classmix))
    rows = read_log(main(args)["run_dir"])
    loss = [row["loss/sup"] for row in rows]
    assert sum(loss[-10:]) < 0.9 * sum(loss[:10])
    assert all(row["loss/cons"] > 0 for row in rows[10:])
    assert all(0 <= row["pseudo/confident"] <= 1 for row in rows)
    assert 0 < rows[-1]["pseudo/accuracy"] <= 1


def test_flags_have_their_effects(quick):
    def saved(name, **flags):
        flags = {"confidence_threshold": 0.2} | active(classmix) | flags
        result = main(quick(Args, exp_name=name, **flags))
        return torch.load(f"{result['run_dir']}/last.pt", weights_only=True)

    plain = saved("plain")
    for number, flags in enumerate((
        {"strong": True}, {"lambda_u": 3.0}, {"confidence_threshold": 0.9},
        {"confidence_per_pixel": True}, {"ramp_up": 0.9},
    )):  # fmt: skip
        other = saved(f"n{number}", **flags)["student"]
        assert any(not torch.equal(value, other[key]) for key, value in plain["student"].items())
    for number, flags in enumerate(({"ema_decay": 0.3}, {"ema_warmup": False})):
        other = saved(f"e{number}", **flags)["teacher"]
        assert any(not torch.equal(value, other[key]) for key, value in plain["teacher"].items())
    assert plain["evaluated"] == "student"
    assert saved("teacher", evaluate="teacher")["evaluated"] == "teacher"


def test_unlabeled_labels_are_never_read(quick, monkeypatch):
    def make(args_class, **flags):
        return quick(args_class, confidence_threshold=0.2, **flags)

    assert_unlabeled_labels_are_not_read(classmix, make, monkeypatch)


def test_classes_that_are_not_chosen_are_not_pasted():
    """A row of `half_of_classes` gives the mask of its ids alone, also where a label is ignored."""
    label = torch.randint(6, (3, 8, 9), generator=torch.Generator().manual_seed(0))
    rows = half_of_classes(label, torch.rand(3, 6))
    assert ((rows == IGNORE).sum(1) == 3).all()
    label[:, 0] = IGNORE
    mask = class_mask(label, rows)
    assert torch.equal(mask, class_mask(label, [row[row != IGNORE] for row in rows]))
    assert mask.any() and not mask[:, :, 0].any()


@pytest.mark.parametrize("flags", [
    {"confidence_threshold": -0.5}, {"ema_decay": 1.5}, {"ramp_up": 2.0}, {"lambda_u": -1.0},
], ids=str)  # fmt: skip
def test_bad_flags(quick, flags):
    with pytest.raises(classmix.UserError, match=next(iter(flags)).replace("_", "-")):
        main(quick(Args, **flags))


def test_paper_rows():
    assert {name: PAPER[name]["strong"] for name in ("voc", "cityscapes")} == {
        "voc": False, "cityscapes": True,
    }  # fmt: skip
    assert [row["ema_decay"] for row in PAPER.values()] == [0.99, 0.99, 0.9, 0.9, 0.99]
    args = Args()
    assert args.confidence_threshold == 0.968 and args.ema_warmup
    assert {row["lambda_u"] for row in PAPER.values()} == {1.0}
