"""cutmix_mt.py: losses, weights and masks against the authors' numbers, whole steps, runs."""

import math

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

import cutmix_mt
from common.datasets import IGNORE, UNKNOWN
from cutmix_mt import (
    PAPER,
    Args,
    box_masks,
    confidence_weight,
    consistency_loss,
    cross_entropy,
    main,
    paste,
    update_buffers,
)

GOLDENS = golden_files("cutmix_mt_seed*.npz")
WHOLE = [path for path in GOLDENS if "in_student_logits_sup" in load_golden(path)]
by_stem = {"ids": lambda path: f"{path.parent.name}-{path.stem}"}
KINDS = ["var", "bce", "kld"]


def test_losses_by_hand():
    # One pixel: student (1/2, 1/2), teacher (3/4, 1/4).
    student, teacher = torch.zeros(1, 2, 1, 1), torch.tensor([0.75, 0.25]).view(1, 2, 1, 1)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    for kind, expected in (
        ("var", 2 / 16), ("kld", math.log(2) - entropy), ("bce", 2 * math.log(2)),
    ):  # fmt: skip
        assert consistency_loss(student, teacher, kind).item() == pytest.approx(expected, rel=1e-5)
    assert consistency_loss(student, teacher, "var", 0.5).item() == pytest.approx(1 / 16)
    weight = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)  # the mean is over both pixels
    pair = consistency_loss(student.expand(1, 2, 1, 2), teacher.expand(1, 2, 1, 2), "var", weight)
    assert pair.item() == pytest.approx(1 / 16)


def test_gradient_reaches_the_student_alone():
    for kind in KINDS:
        student = torch.randn(2, 3, 4, 4, requires_grad=True)
        teacher = torch.randn(2, 3, 4, 4, requires_grad=True)
        consistency_loss(student, teacher.softmax(1), kind, torch.ones(2, 1, 4, 4)).backward()
        assert student.grad.abs().sum() > 0 and teacher.grad is None
        student.grad = None
        nothing = consistency_loss(student, teacher.softmax(1), kind, torch.zeros(2, 1, 4, 4))
        nothing.backward()
        assert nothing.item() == 0 and not student.grad.any()
    certain = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)  # 0 log 0 = 0
    for kind in KINDS:
        assert consistency_loss(torch.randn(1, 2, 1, 1), certain, kind).isfinite()
    assert not confidence_weight(student.softmax(1), 0.5).requires_grad


def test_confidence_by_hand():
    prob = torch.tensor([[0.97, 0.5], [0.03, 0.5]]).view(1, 2, 1, 2)
    assert confidence_weight(prob, 0.97).item() == 0.5  # inclusive
    assert confidence_weight(prob, 0.97, per_pixel=True).flatten().tolist() == [1, 0]
    assert confidence_weight(prob, 0.0).item() == 1 and confidence_weight(prob, 0.99).item() == 0


@pytest.mark.parametrize("path", WHOLE, **by_stem)
@pytest.mark.parametrize("mode", ["mix", "cut"])
def test_losses_and_gradients_are_the_authors(path, mode):
    golden = load_golden(path)
    mask = golden.tensor(f"in_{mode}_mask")
    valid, logits = golden.tensor("in_valid0"), golden.tensor("in_teacher_logits_u0")
    if mode == "mix":
        logits = paste(logits, golden.tensor("in_teacher_logits_u1"), mask)
        valid = valid * (1 - mask) + golden.tensor("in_valid1") * mask  # theirs is soft at borders
    else:
        valid = valid * mask
    prob = logits.softmax(1)
    rate = confidence_weight(prob, float(golden["meta_conf_thresh"]))
    assert rate.item() == pytest.approx(float(golden[f"out_{mode}_conf_rate"]), rel=1e-6)
    pixels = confidence_weight(prob, float(golden["meta_conf_thresh"]), per_pixel=True)
    torch.testing.assert_close(
        valid * rate, golden.tensor(f"out_{mode}_loss_mask_avg"), rtol=1e-5, atol=1e-7
    )
    for kind in KINDS:
        for tag, weight in (("nothresh", 1), ("thr97_avg", rate), ("thr97_pixel", pixels)):
            student = golden.tensor("in_student_logits_unsup").requires_grad_()
            loss = consistency_loss(student, prob, kind, valid * weight)
            expected = float(golden[f"loss_{mode}_{kind}_{tag}"])
            assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-9), (kind, tag)
            loss.backward()
            for key in (f"grad_{mode}_{kind}_{tag}", f"out_{mode}_grad_{kind}_{tag}"):
                if key in golden:
                    torch.testing.assert_close(
                        student.grad, golden.tensor(key), rtol=1e-4, atol=1e-8
                    )


@pytest.mark.parametrize("path", WHOLE, **by_stem)
def test_supervised_loss_is_the_authors(path):
    golden = load_golden(path)
    logits = golden.tensor("in_student_logits_sup").requires_grad_()
    loss = cross_entropy(logits, golden.tensor("in_sup_labels"))
    assert loss.item() == pytest.approx(float(golden["out_loss_sup"]), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(logits.grad, golden.tensor("out_grad_sup"), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
@pytest.mark.parametrize(("name", "flags"), [
    ("cutmix_default", {}), ("cutout_default", {"area": (0.0, 1.0)}),
    ("cps_3boxes", {"area": (0.25, 0.5), "n_boxes": 3}), ("zero_prop", {"area": (0.0, 0.0)}),
], ids=str)  # fmt: skip
def test_masks_are_the_authors(path, name, flags, monkeypatch):
    """The same numbers from numpy's old generator, in their order, give the same masks."""
    import numpy as np

    golden = load_golden(path)
    state, n = np.random.RandomState(int(golden["meta_seed"])), flags.get("n_boxes", 1)
    low, high = flags.get("area", (0.5, 0.5))
    share = state.uniform(low, high, size=(4, n))
    if high > low:
        share = (share - low) / (high - low)
    draws = [share, state.uniform(0, 1, size=(4, n)), state.uniform(0, 1, size=(4, n, 2))]
    monkeypatch.setattr(torch, "rand", lambda *shape, **kw: torch.from_numpy(draws.pop(0)))
    mask = box_masks(4, 33, 41, torch.Generator(), **flags)
    assert torch.equal(mask.double(), golden.tensor(f"box_{name}_masks").double())


def test_cutmix_boxes_cover_half_of_the_image():
    masks = box_masks(50, 321, 321, torch.Generator().manual_seed(0))
    share = masks.mean((1, 2, 3))
    assert share.min() > 0.498 and share.max() < 0.502
    assert masks[:, 0, 160, 160].all()  # every such box covers the center


def test_update_buffers_averages_statistics_and_no_counter():
    student, teacher = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    student.running_mean.fill_(1)
    student.num_batches_tracked.fill_(7)
    update_buffers(teacher, student, 0.75)
    assert teacher.running_mean.tolist() == [0.25] * 3
    assert teacher.num_batches_tracked == 0 and teacher.weight.tolist() == [1] * 3


class Fed(TinyNet):
    """A teacher that sees its own views: in the goldens the student's differ in color."""

    def forward(self, image):
        return super().forward(self.views.pop(0))


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_main_takes_the_authors_steps(path, quick, monkeypatch):
    """`main` itself, two steps with BatchNorm live: losses, both networks and their statistics."""
    golden = load_golden(path)
    student = TinyNet(golden.part("full_live_student_init/"))
    teacher = Fed(golden.part("full_live_teacher_init/")).requires_grad_(False)
    valid = [golden.tensor(f"full_valid{i}") for i in range(2)]
    teacher.views, masks, weights = [], [], []
    streams = {"labeled": [], "unlabeled": [], "pasted": []}
    for t in range(2):
        at = f"full_live_step{t}_"
        label = golden.tensor(at + "sup_labels")
        streams["labeled"].append((golden.tensor(at + "sup_images"), label))
        for stream, view in (("unlabeled", "u0"), ("pasted", "u1")):
            image = golden.tensor(f"{at}{view}_student")
            streams[stream].append((image, torch.full_like(label, UNKNOWN)))
            teacher.views.append(golden.tensor(f"{at}{view}_teacher"))
        mask = golden.tensor(at + "mask").double()
        masks.append(mask)
        weights.append(valid[0] * (1 - mask) + valid[1] * mask)  # soft at borders, unlike ours
    monkeypatch.setattr(cutmix_mt, "box_masks", lambda *_: masks.pop(0))
    monkeypatch.setattr(
        cutmix_mt, "consistency_loss",
        lambda logits, prob, kind, weight: consistency_loss(
            logits, prob, kind, weight.amax() * weights.pop(0)
        ),
    )  # fmt: skip
    monkeypatch.setattr(cutmix_mt, "poly_lr", lambda base_lr, *_: base_lr)  # theirs is constant
    lr, head_lr = golden["full_adam_lr_backbone_head"].tolist()

    def adam(networks, args, device):
        (net,) = networks
        body = [*net.conv.parameters(), *net.bn.parameters()]
        groups = [{"params": body, "lr_mult": 1.0}]
        groups.append({"params": list(net.cls.parameters()), "lr_mult": head_lr / lr})
        return torch.optim.Adam(groups, args.lr)

    monkeypatch.setattr(cutmix_mt, "make_optimizer", adam)
    args = quick(
        Args, batch_size=len(label), log_every=1, lr=lr, ramp_up=0.0, ema_decay=0.99,
        eval_every=10**6, confidence_threshold=float(golden["full_conf_thresh"]),
    )  # fmt: skip
    states, rows = record_steps(cutmix_mt, args, monkeypatch, student, teacher, streams)
    for t in range(2):
        at = f"full_live_step{t}_"
        assert rows[t]["loss/sup"] == pytest.approx(float(golden[at + "loss_sup"]), rel=1e-5)
        assert rows[t]["loss/cons"] == pytest.approx(float(golden[at + "loss_cons"]), rel=1e-4)
        rate = float(golden[at + "conf_rate"])
        assert rows[t]["pseudo/confident"] == pytest.approx(rate, rel=1e-4)
        for name, state in zip(("student", "teacher"), states[t], strict=True):
            expected = golden.part(f"full_live_{name}_after{t}/")
            student.assert_like(state, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("flags", [
    {}, {"mask_mode": "cutout"}, {"confidence_per_pixel": True}, {"consistency": "kld"},
    {"consistency": "bce"},
], ids=str)  # fmt: skip
def test_it_trains(quick, flags):
    flags = {"confidence_threshold": 0.3, "log_pseudo_accuracy": True} | flags
    args = quick(Args, steps=40, log_every=1, lr=3e-3, **flags, **active(cutmix_mt))
    rows = read_log(main(args)["run_dir"])
    loss = [row["loss/sup"] for row in rows]
    assert sum(loss[-10:]) < 0.9 * sum(loss[:10])
    assert all(row["loss/cons"] > 0 for row in rows[10:])
    assert all(0 <= row["pseudo/confident"] <= 1 for row in rows)
    assert 0 < rows[-1]["pseudo/accuracy"] <= 1


def test_padding_and_what_is_cut_out_have_no_weight(quick, monkeypatch):
    """The weight is 0 in the padding of either image, and outside the boxes of CutOut."""
    seen = []
    right = consistency_loss

    def remember(logits, prob, kind, weight):
        seen.append(weight)
        return right(logits, prob, kind, weight)

    monkeypatch.setattr(cutmix_mt, "consistency_loss", remember)
    flags = {"steps": 2, "confidence_threshold": 0.0}
    main(quick(Args, crop_size=128, **flags))  # scenes have 64 pixels: most is padding
    assert 0 < (seen[-1] > 0).float().mean() < 0.6
    main(quick(Args, mask_mode="cutout", box_area=(0.25, 0.25), exp_name="cut", **flags))
    assert (seen[-1] > 0).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_cutout_shows_the_boxes_alone(quick, monkeypatch):
    """The student sees the mean color elsewhere, the teacher the whole image."""
    seen = {"teacher": [], "student": []}

    class Seen(cutmix_mt.DeepLabV3Plus):
        def forward(self, image):
            seen["student" if torch.is_grad_enabled() else "teacher"].append(image)
            return super().forward(image)

    monkeypatch.setattr(cutmix_mt, "DeepLabV3Plus", Seen)
    flags = {"mask_mode": "cutout", "box_area": (0.25, 0.25), "steps": 1}
    main(quick(Args, **flags))
    whole, cut = seen["teacher"][0], seen["student"][1]
    shown = (cut != 0).any(1, keepdim=True)
    assert torch.equal(cut, whole * shown)
    assert shown.float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_pasted_images_are_another_stream(quick, monkeypatch):
    streams = []
    right = cutmix_mt.make_batches

    def remember(args, data, ids, stream, *rest):
        streams.append((stream, tuple(ids)))
        return right(args, data, ids, stream, *rest)

    monkeypatch.setattr(cutmix_mt, "make_batches", remember)
    main(quick(Args, steps=1))
    names, pools = zip(*streams, strict=True)
    assert names == ("labeled", "unlabeled", "pasted") and pools[1] == pools[2]


def test_flags_have_their_effects(quick):
    def student(name, **flags):
        flags = {"confidence_threshold": 0.2} | active(cutmix_mt) | flags
        result = main(quick(Args, exp_name=name, **flags))
        return torch.load(f"{result['run_dir']}/last.pt", weights_only=True)

    plain = student("plain")
    for number, flags in enumerate((
        {"n_boxes": 3}, {"box_area": (0.2, 0.3)}, {"consistency": "bce"}, {"lambda_u": 3.0},
        {"confidence_threshold": 0.9}, {"confidence_per_pixel": True}, {"ema_decay": 0.5},
        {"ema_warmup": True}, {"ramp_up": 0.9},
    )):  # fmt: skip
        other = student(f"n{number}", **flags)["student"]
        assert any(not torch.equal(value, other[key]) for key, value in plain["student"].items())
    assert plain["evaluated"] == "teacher"
    assert student("student", evaluate="student")["evaluated"] == "student"


def test_unlabeled_labels_are_never_read(quick, monkeypatch):
    def make(args_class, **flags):
        return quick(args_class, confidence_threshold=0.2, **flags)

    assert_unlabeled_labels_are_not_read(cutmix_mt, make, monkeypatch)


@pytest.mark.parametrize("flags", [
    {"box_area": (-0.1, 0.5)}, {"box_area": (0.5, 1.5)}, {"confidence_threshold": 1.5},
    {"ema_decay": 1.5}, {"ramp_up": -0.5}, {"lambda_u": -1.0}, {"n_boxes": 0},
], ids=str)  # fmt: skip
def test_bad_flags(quick, flags):
    with pytest.raises(cutmix_mt.UserError, match=next(iter(flags)).replace("_", "-")):
        main(quick(Args, **flags))


def test_paper_rows():
    for mode, area in (("cutmix", (0.5, 0.5)), ("cutout", (0.0, 1.0))):
        assert cutmix_mt.resolve(Args(mask_mode=mode)).box_area == area
    assert {row["lambda_u"] for row in PAPER.values()} == {1.0}
    assert [row["ema_decay"] for row in PAPER.values()] == [0.99, 0.99, 0.9, 0.9, 0.99]
    args = Args()
    assert (args.confidence_threshold, args.evaluate) == (0.97, "teacher")
    assert IGNORE == 255 and UNKNOWN == 254
