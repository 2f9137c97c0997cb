"""cps.py: losses and masks against hand-worked numbers and the authors' code, whole steps, runs."""

import itertools

import numpy as np
import pytest
import torch
from conftest import (
    TinyNet,
    assert_unlabeled_labels_are_not_read,
    golden_files,
    load_golden,
    read_log,
)
from test_supervised import freeze_batchnorm

import cps
from common.datasets import step_generator
from cps import (
    PAPER,
    Args,
    box_masks,
    cpc_loss,
    cps_loss,
    cps_target,
    cross_entropy,
    linear_ramp,
    main,
    ohem_cross_entropy,
    paste,
)

GOLDENS = golden_files("cps_seed*.npz")
WHOLE = [path for path in GOLDENS if "cps_voc.in.labels" in load_golden(path)]
by_stem = {"ids": lambda path: f"{path.parent.name}-{path.stem}"}


def test_loss_by_hand():
    # One pixel, two classes; network 1 says class 0 by a gap of 2, network 2 class 1 by a gap of 1.
    logits_1 = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    logits_2 = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).requires_grad_()
    loss = cps_loss(logits_1, logits_2, logits_1.argmax(1), logits_2.argmax(1))
    assert loss.item() == pytest.approx(np.log1p(np.exp(2)) + np.log1p(np.exp(1)), rel=1e-6)
    loss.backward()
    # d CE / d logit of the target class is p - 1: each network is pulled to the other's class.
    p = 1 / (1 + np.exp(2))
    assert logits_1.grad[0, 1].item() == pytest.approx(p - 1, rel=1e-5)


def test_cpc_by_hand_and_its_gradient():
    logits_1 = torch.tensor([np.log(3.0), 0.0]).view(1, 2, 1, 1).requires_grad_()  # p = 3/4, 1/4
    logits_2 = torch.zeros(1, 2, 1, 1, dtype=torch.float64, requires_grad=True)  # 1/2, 1/2
    loss = cpc_loss(logits_1, logits_2)
    assert loss.item() == pytest.approx(2 * (1 / 16 + 1 / 16))
    assert loss.dtype == torch.float64
    loss.backward()
    # Only its own term moves network 1: 2 (p - q) through the softmax's Jacobian p0 p1 (1, -1).
    assert logits_1.grad[0, 0].item() == pytest.approx(2 * 2 * 0.25 * 3 / 16)


def test_no_gradient_through_targets():
    logits_1, logits_2 = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    for kind in ("label", "probability"):
        assert not cps_target(logits_1, kind).requires_grad
    loss = cpc_loss(logits_1, logits_1.detach(), logits_2.softmax(1), logits_2.softmax(1))
    assert torch.autograd.grad(loss, logits_2, allow_unused=True)[0] is None


@pytest.mark.parametrize("path", WHOLE, **by_stem)
@pytest.mark.parametrize("name", ["voc", "city"])
def test_losses_and_gradients_are_the_authors(path, name):
    golden = load_golden(path)
    logits = {
        side: {
            part: golden.tensor(f"cps_{name}.in.logits_{side}_{part}").requires_grad_()
            for part in ("sup", "unsup")
        }
        for side in "lr"
    }
    label = golden.tensor(f"cps_{name}.in.labels")
    joint = {side: torch.cat([parts["sup"], parts["unsup"]]) for side, parts in logits.items()}
    target = {side: cps_target(value, "label") for side, value in joint.items()}
    for side in "lr":
        assert torch.equal(target[side], golden.tensor(f"cps_{name}.out.pseudo_{side}"))
    loss_cps = cps_loss(joint["l"], joint["r"], target["l"], target["r"])
    assert loss_cps.item() == pytest.approx(
        float(golden[f"cps_{name}.out.cps_unweighted"]), abs=1e-10
    )
    total = loss_cps * float(golden[f"cps_{name}.in.cps_weight"])
    for side in "lr":
        if name == "voc":
            sup = cross_entropy(logits[side]["sup"], label)
        else:
            min_kept = int(golden["cps_city.in.ohem_min_kept"])
            sup = ohem_cross_entropy(logits[side]["sup"], label, 0.7, min_kept)
        assert sup.item() == pytest.approx(float(golden[f"cps_{name}.out.sup_{side}"]), abs=1e-10)
        total = total + sup
    assert total.item() == pytest.approx(float(golden[f"cps_{name}.out.total"]), abs=1e-10)
    total.backward()
    for side in "lr":
        for part in ("sup", "unsup"):
            expected = golden.tensor(f"cps_{name}.out.grad_{side}_{part}")
            torch.testing.assert_close(logits[side][part].grad, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
@pytest.mark.parametrize("case", ["small", "square"])
def test_masks_are_the_authors(path, case, monkeypatch):
    golden = load_golden(path)
    draws = [
        (golden.tensor(f"boxmask.{case}.in.draw_area") - 0.25) / 0.25,
        golden.tensor(f"boxmask.{case}.in.draw_aspect"),
        golden.tensor(f"boxmask.{case}.in.draw_pos"),
    ]
    monkeypatch.setattr(torch, "rand", lambda *shape, **kw: draws.pop(0).view(shape))
    height, width = golden[f"boxmask.{case}.in.shape"]
    mask = box_masks(6, int(height), int(width), torch.Generator())
    assert torch.equal(mask[:, 0], golden.tensor(f"boxmask.{case}.out.mask").float())


def test_mask_statistics():
    generator = torch.Generator().manual_seed(0)
    golden = load_golden(GOLDENS[0])
    for kind, flags in (("stats256", {}), ("onebox", {"n_boxes": 1})):
        share = box_masks(600, 256, 256, generator, **flags).mean((1, 2, 3)).double()
        expected = golden[f"boxmask.{kind}.ones_fraction"]  # mean, s.d., min, 5, 50, 95 %, max
        assert share.mean().item() == pytest.approx(expected[0], abs=0.01)
        assert share.std().item() == pytest.approx(expected[1], abs=0.01)
        assert share.median().item() == pytest.approx(expected[4], abs=0.02)


def test_paste_partitions_the_image():
    mask = box_masks(3, 20, 30, torch.Generator().manual_seed(1))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    zeros, ones = torch.zeros(3, 2, 20, 30), torch.ones(3, 2, 20, 30)
    assert torch.equal(paste(zeros, ones, mask), mask.expand(-1, 2, -1, -1))
    assert torch.equal(paste(zeros[:, 0].long(), ones[:, 0].long(), mask), mask[:, 0].long())


def test_ramp():
    assert [linear_ramp(step, 10, 0.2, 0.4) for step in (0, 2, 3, 4, 9)] == [0, 0, 0.5, 1, 1]
    assert linear_ramp(0, 10, 0.0, 0.0) == 1
    assert [linear_ramp(step, 10, 0.5, 0.5) for step in (4, 5)] == [0, 1]


class RecordedError(Exception):
    """Ends a run after the golden steps."""


@pytest.mark.parametrize("name", ["steps_voc", "steps_voc_cutmix", "steps_city_cutmix"])
@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_main_takes_the_authors_steps(path, name, quick, monkeypatch):
    """`main` itself, on their network, images and masks: losses, rates and weights of each step."""
    golden = load_golden(path)
    count = 2 if "city" in name else 3
    nets, states, rows = [], [], []

    def make_network(args, num_classes, which, *_):
        net = TinyNet(golden.part(f"{name}.in.net_{'lr'[len(nets)]}."))
        nets.append(net)
        return net

    def batches(stream, what):
        for t in range(count + 1):
            if t and stream == "labeled":  # the step before is complete
                states.append([{k: v.clone() for k, v in net.state_dict().items()} for net in nets])
            if t == count:
                raise RecordedError
            at = f"{name}.step{t}.in."
            if stream == "labeled":
                yield golden.tensor(at + "img_sup"), golden.tensor(at + "labels")
            else:
                image = torch.cat([golden.tensor(at + key) for key in what])
                yield image, torch.full((len(image), *image.shape[2:]), 255)

    cutmix = "cutmix" in name
    what = ["img_u0", "img_u1"] if cutmix else ["img_unsup"]
    monkeypatch.setattr(cps, "make_network", make_network)
    monkeypatch.setattr(
        cps, "make_batches", lambda args, data, ids, stream, *_: batches(stream, what)
    )
    masks = [
        golden.tensor(f"{name}.step{t}.in.mask").double() for t in range(count if cutmix else 0)
    ]
    monkeypatch.setattr(cps, "box_masks", lambda *_: masks.pop(0))
    monkeypatch.setattr(cps.Run, "log", lambda self, step, row, pictures: rows.append(row))
    kept = int(golden.get(f"{name}.in.ohem_min_kept", 0))
    monkeypatch.setattr(
        cps, "supervised_loss",
        lambda logits, label, kind: ohem_cross_entropy(logits, label, 0.7, kept)
        if kind == "ohem" else cross_entropy(logits, label),
    )  # fmt: skip
    number = {k: float(golden[f"{name}.in.{k}"]) for k in ("base_lr", "weight_decay", "momentum")}
    weight = float(golden[f"{name}.in.cps_weight"])
    args = quick(
        Args, steps=int(golden[f"{name}.in.total_iters"]), optimizer="sgd", lr=number["base_lr"],
        weight_decay=number["weight_decay"], momentum=number["momentum"], lambda_cps=weight,
        batch_size=2, cutmix=cutmix, cutmix_partner="same", log_every=1, cps_start=0.0,
        cps_full=0.0, supervised_loss="ohem" if "city" in name else "ce", eval_every=10**6,
    )  # fmt: skip
    with pytest.raises(RecordedError):
        main(args)
    for t in range(count):
        at = f"{name}.step{t}.out."
        assert rows[t]["lr"] == pytest.approx(float(golden[at + "lr"]), rel=1e-12)
        sup = float(golden[at + "sup_l"]) + float(golden[at + "sup_r"])
        assert rows[t]["loss/sup"] == pytest.approx(sup, rel=1e-6)  # logged in fp32
        assert rows[t]["loss/cps"] == pytest.approx(
            float(golden[at + "cps_weighted"]) / weight, rel=1e-6
        )
        for side, state in zip("lr", states[t], strict=True):
            for key, expected in golden.part(f"{at}net_{side}.").items():
                torch.testing.assert_close(state[key], expected, rtol=1e-9, atol=1e-9)


def test_pasted_images_are_another_stream(quick, monkeypatch):
    """Or a second crop of each image; without CutMix there are none."""
    streams, right = [], cps.make_batches

    def remember(args, data, ids, stream, place, partner=None, labels="all"):
        streams.append((stream, partner, len(ids)))
        return right(args, data, ids, stream, place, partner, labels)

    monkeypatch.setattr(cps, "make_batches", remember)
    for number, (flags, expected) in enumerate((
        ({}, [("unlabeled", None, 1016), ("pasted", None, 1016)]),
        ({"cutmix_partner": "same"}, [("unlabeled", "same", 1016)]),
        ({"cutmix": False, "cutmix_partner": "same"}, [("unlabeled", None, 1016)]),
    )):  # fmt: skip
        main(quick(Args, steps=1, exp_name=f"n{number}", **flags))
        assert streams == [("labeled", None, 8), *expected]
        streams.clear()


def test_two_images_or_two_crops_are_mixed(quick, monkeypatch):
    mixed, right = [], cps.paste

    def remember(a, b, mask):
        mixed.append((a, b, right(a, b, mask)))
        return mixed[-1][2]

    def batches(_, data, ids, stream, place, partner=None, labels="all"):
        value = {"labeled": 0.0, "unlabeled": 1.0, "pasted": 2.0}[stream]
        image = torch.full((4, 3, 32, 32), value)
        image = torch.cat([image, image + 0.5]) if partner else image
        return itertools.repeat((image, torch.zeros(len(image), 32, 32, dtype=torch.long)))

    monkeypatch.setattr(cps, "paste", remember)
    monkeypatch.setattr(cps, "make_batches", batches)
    for partner, value in (("other", 2.0), ("same", 1.5)):
        main(quick(Args, steps=1, exp_name=partner, cutmix_partner=partner))
        a, b, image = next(images for images in mixed if images[0].shape[1] == 3)
        assert a.unique() == 1 and b.unique() == value and len(a) == len(b) == 4
        assert set(image.unique().tolist()) == {1.0, value}
        mixed.clear()


def test_masks_are_those_of_their_step():
    masks = box_masks(8, 32, 32, step_generator(0, "boxes", 3))
    assert torch.equal(masks, box_masks(8, 32, 32, step_generator(0, "boxes", 3)))
    assert not torch.equal(masks, box_masks(8, 32, 32, step_generator(0, "boxes", 4)))


@pytest.mark.parametrize("flags", [
    {}, {"cutmix": False}, {"cutmix_partner": "same"}, {"cps_target": "probability"},
    {"cps_target": "probability", "cutmix": False},
], ids=str)  # fmt: skip
def test_it_trains(quick, flags):
    args = quick(Args, steps=40, log_every=1, lr=3e-3, log_pseudo_accuracy=True, **flags)
    result = main(args)
    rows = read_log(result["run_dir"])
    assert result["steps"] == 40 and 0 <= result["miou"] <= result["best_miou"] <= 1
    loss = [row["loss/sup"] for row in rows]
    assert sum(loss[-10:]) < 0.9 * sum(loss[:10])
    assert all(0 <= row["pseudo/agreement"] <= 1 for row in rows)
    assert 0 < rows[-1]["pseudo/accuracy"] <= 1


def test_unlabeled_labels_are_never_read(quick, monkeypatch):
    assert_unlabeled_labels_are_not_read(cps, quick, monkeypatch)


def test_accumulate_takes_the_mean_gradient(quick, monkeypatch):
    from conftest import weights

    freeze_batchnorm(monkeypatch, cps)
    flags = {
        "steps": 1,
        "optimizer": "sgd",
        "lr": 1.0,
        "momentum": 0.0,
        "cps_start": 0.0,
        "cps_full": 0.0,
    }
    one, two = (
        weights(main(quick(Args, accumulate=n, exp_name=f"n{n}", **flags))["run_dir"])
        for n in (1, 2)
    )
    for key in one:
        if key.startswith("/network"):
            torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)


def test_bf16_keeps_every_gradient(quick):
    """The label-making pass must not leave autocast's weights without gradient for the next."""
    result = main(
        quick(Args, amp="bf16", steps=2, lr=1e-2, cps_start=0.0, cps_full=0.0, eval_every=1)
    )
    checkpoint = torch.load(f"{result['run_dir']}/last.pt", weights_only=True)
    state = checkpoint["optimizer"]["state"]
    for number, moments in state.items():
        assert moments["exp_avg"].abs().max() > 0, f"parameter {number} got no gradient"


@pytest.mark.parametrize("flags", [
    {"box_area": (0.5, 1.1)}, {"box_area": (0.0, 0.5)}, {"cps_start": 1.5},
    {"lambda_cps": -1.0}, {"lambda_cps": float("nan")}, {"n_boxes": 0},
], ids=str)  # fmt: skip
def test_bad_flags(quick, flags):
    with pytest.raises(cps.UserError, match=next(iter(flags)).replace("_", "-")):
        main(quick(Args, **flags))


def test_paper_rows():
    values = {
        (dataset, cutmix): cps.resolve(Args(dataset=dataset, cutmix=cutmix)).lambda_cps
        for dataset in ("voc", "cityscapes") for cutmix in (False, True)
    }  # fmt: skip
    assert values == {
        ("voc", False): 1.5, ("voc", True): 1.0,
        ("cityscapes", False): 6.0, ("cityscapes", True): 5.0,
    }  # fmt: skip
    assert PAPER["voc"]["lr"] == PAPER["cityscapes"]["lr"] == 0.0025
