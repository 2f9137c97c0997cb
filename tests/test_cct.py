"""cct.py: losses and perturbations against hand-worked numbers and the authors' code, a whole step,
gradient routes, runs."""

import math
import random
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    assert_unlabeled_labels_are_not_read,
    golden_files,
    load_golden,
    read_log,
    weights,
)
from scipy import ndimage
from test_cli import make_folder
from test_supervised import freeze_batchnorm
from torch import nn

import cct
import predict
from cct import (
    KINDS,
    MAX_CONTOURS,
    PAPER,
    Args,
    AuxDecoders,
    DecoderLosses,
    bootstrap_threshold,
    bootstrapped_cross_entropy,
    consistency_loss,
    contour_boxes,
    cross_entropy,
    decode,
    draw_perturbations,
    feature_drop,
    feature_drop_mask,
    foreground_mask,
    guided_cutout,
    main,
    ramp_up,
    regions,
    resolve,
    uniform,
    upsample,
    vat_perturbation,
)

GOLDENS = golden_files("cct_seed*.npz")
goldens = pytest.mark.parametrize(
    "golden", [load_golden(p) for p in GOLDENS], ids=[f"{p.parent.name}-{p.stem}" for p in GOLDENS]
)
close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)


def shapes_args(**flags) -> Args:
    return resolve(Args(dataset="shapes", device="cpu", **flags))


def only(kind: str, count: int = 1) -> dict:
    """--decoders of one kind."""
    return {"decoders": tuple(count * (each == kind) for each in KINDS)}


# Losses


def test_threshold_by_hand():
    assert bootstrap_threshold(0, 100, 4) == 0.25
    assert bootstrap_threshold(50, 100, 4) == pytest.approx(0.25 + 0.65 * (1 - math.exp(-2.5)))
    at_end = 0.25 + 0.65 * (1 - math.exp(-5))
    for step, length in ((100, 100), (500, 100), (0, 0)):
        assert bootstrap_threshold(step, length, 4) == pytest.approx(at_end)


def test_bootstrapped_cross_entropy_by_hand():
    """True-class probabilities 0.2, 0.4, 0.6, 0.8 and an ignored pixel."""
    prob = torch.tensor([0.2, 0.4, 0.6, 0.8, 0.1], dtype=torch.float64)
    logits = torch.stack([prob, 1 - prob]).log().view(1, 2, 1, 5).requires_grad_()
    label = torch.tensor([0, 0, 0, 0, 255]).view(1, 1, 5)
    nll = -prob.log()
    # 0.5 lets two through; at 0.2 the floor, the second lowest, lets one; 3 kept: three.
    for threshold, kept, expected in (
        (0.5, 1, nll[:2]), (0.2, 1, nll[:1]), (0.0, 3, nll[:3]), (0.0, 100, nll[:3]),
        (0.9, 1, nll[:4]),
    ):  # fmt: skip
        loss = bootstrapped_cross_entropy(logits, label, threshold, kept)
        assert loss.item() == pytest.approx(expected.mean().item()), (threshold, kept)
    loss = bootstrapped_cross_entropy(logits, label, 0.5)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 0, 0].tolist() == pytest.approx([-0.4, -0.3, 0, 0, 0])  # (p - 1) / 2
    loss = bootstrapped_cross_entropy(logits, torch.full_like(label, 255), 0.5)
    assert loss.item() == 0 and torch.autograd.grad(loss, logits)[0].abs().max() == 0
    half = bootstrapped_cross_entropy(logits.half(), label, 0.5)
    assert half.dtype == torch.float32


@goldens
def test_bootstrapped_cross_entropy_is_the_authors(golden):
    logits, label = golden.tensor("abce_logits").requires_grad_(), golden.tensor("abce_target")
    for row, (epoch, iteration) in enumerate(golden["abce_steps"].tolist()):
        for port, end in (("", 0.9), ("port_", 0.99)):
            threshold = bootstrap_threshold(epoch * 10 + iteration, 0.4 * 200, 5, end)
            assert threshold == pytest.approx(float(golden[f"abce_{port}threshold"][row]), abs=1e-9)
            loss = bootstrapped_cross_entropy(logits, label, threshold)
            assert loss.item() == pytest.approx(float(golden[f"abce_{port}value"][row]), abs=1e-6)
            if not port:
                (gradient,) = torch.autograd.grad(loss, logits)
                chosen = (gradient.abs().sum(1) > 0).sum().item()
                assert chosen == golden["abce_n_selected_derived"][row]
                for key, at in (("first", 0), ("last", len(golden["abce_steps"]) - 1)):
                    if row == at and f"abce_grad_{key}" in golden:
                        close(gradient, golden.tensor(f"abce_grad_{key}"))
    for kept in (1, 20, 1_000_000):
        loss = bootstrapped_cross_entropy(logits, label, 0.3, kept)
        expected = float(golden[f"abce_fixed0.3_minkept{kept}"])
        assert loss.item() == pytest.approx(expected, abs=1e-6)
    ignored = bootstrapped_cross_entropy(logits, torch.full_like(label, 255), 0.3)
    assert ignored.item() == float(golden["abce_all_ignored"]) == 0
    assert cross_entropy(logits, label).item() == pytest.approx(float(golden["ce_value"]), abs=1e-6)


def test_consistency_by_hand():
    logits = torch.tensor([math.log(3), 0.0], dtype=torch.float64).view(1, 2, 1, 1)  # 3/4, 1/4
    logits.requires_grad_()
    target = torch.full((1, 2, 1, 1), 0.5, dtype=torch.float64, requires_grad=True)
    loss = consistency_loss(logits, target)
    assert loss.item() == pytest.approx(1 / 16) and loss.dtype == torch.float64  # mean over classes
    loss.backward()
    assert target.grad is None
    # 2 (p - q) / 2 through the softmax's Jacobian p0 p1 (1, -1), for both entries.
    assert logits.grad.flatten().tolist() == pytest.approx([2 * 0.25 * 3 / 16, -2 * 0.25 * 3 / 16])
    kl = 0.5 * (math.log(0.5 / 0.75) + math.log(0.5 / 0.25)) / 2
    assert consistency_loss(logits, target, "kl").item() == pytest.approx(kl)
    assert consistency_loss(logits, torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), "kl").isfinite()


@goldens
def test_consistency_is_the_authors(golden):
    target = golden.tensor("cons_targets")
    for kind in ("mse", "kl", "js"):
        logits = golden.tensor("cons_logits").requires_grad_()
        loss = consistency_loss(logits, target, kind)
        assert loss.item() == pytest.approx(float(golden[f"cons_{kind}"]), abs=1e-6)
        loss.backward()
        if f"cons_{kind}_grad" in golden:  # the small copy has one
            close(logits.grad, golden.tensor(f"cons_{kind}_grad"), atol=1e-9, rtol=2e-5)
    if "aux_logits" in golden:
        losses = DecoderLosses.apply(golden.tensor("aux_logits"), target, "mse")
        assert losses.mean().item() == pytest.approx(float(golden["aux_mean_mse"]), abs=1e-6)


@goldens
def test_schedules_are_the_authors(golden):
    length = int(golden["ramp_length"])
    ours = [ramp_up(float(t), length) for t in golden["ramp_current"]]
    assert ours == pytest.approx(golden["ramp_sigmoid"].tolist(), abs=1e-9)
    assert ramp_up(0, 0) == float(golden["ramp_sigmoid_len0"]) == 1
    weight = [30 * ramp_up(epoch * 912 + i, 0.1 * 80 * 912) for epoch, i in golden["consw_steps"]]
    assert weight == pytest.approx(golden["consw_value"].tolist(), abs=1e-6)


@pytest.mark.parametrize("kind", ["mse", "kl", "js"])
def test_losses_at_full_size_and_their_gradient(kind):
    """The gradient made in the forward pass is that of the plain loop."""
    aux = torch.randn(3, 2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 4, 12, 20, dtype=torch.float64).softmax(1)
    factor = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    (ours,) = torch.autograd.grad((DecoderLosses.apply(aux, target, kind) * factor).sum(), aux)
    plain = torch.stack([
        consistency_loss(
            F.interpolate(each, (12, 20), mode="bilinear", align_corners=True), target, kind
        )
        for each in aux
    ])  # fmt: skip
    close(DecoderLosses.apply(aux, target, kind), plain)
    close(ours, torch.autograd.grad((plain * factor).sum(), aux)[0], atol=1e-12)


def test_memory_at_full_size_is_that_of_one_decoder():
    """The graph keeps the small gradients for the backward pass, nothing at full size."""
    aux = torch.randn(14, 2, 4, 8, 8, requires_grad=True)
    losses = DecoderLosses.apply(aux, torch.randn(2, 4, 32, 32).softmax(1), "mse")
    assert [t.shape for t in losses.grad_fn.saved_tensors] == [aux.shape]


# Perturbations


@goldens
def test_masks_are_the_authors(golden):
    foreground = golden.tensor("mask_fg_fullres")
    logits = F.one_hot(foreground, 3).movedim(3, 1).float()
    mask = foreground_mask(logits, (12, 12))
    assert torch.equal(mask.long(), golden.tensor("ctx_mask"))
    assert torch.equal(1 - mask.long(), golden.tensor("obj_mask"))
    assert not foreground_mask(logits.requires_grad_(), (12, 12)).requires_grad
    for gamma in (g for g in (0.7, 0.8, 0.9) if f"fdrop_out_gamma{g}" in golden):
        dropped = feature_drop(golden.tensor("fdrop_in"), gamma)
        close(dropped, golden.tensor(f"fdrop_out_gamma{gamma}"))
        assert dropped[2].abs().max() == 0
    assert feature_drop(torch.ones(1, 2, 3, 3), 1.0).max() == 0  # strictly below the share


@goldens
def test_guided_cutout_is_the_authors(golden, request):
    seed = int(re.search(r"cct_seed(\d+)", request.node.name)[1])
    foreground = golden.tensor("mask_fg_fullres").bool()
    boxes, points = contour_boxes(foreground)
    for image in range(len(foreground)):
        ours = sorted(
            (left, top, right, bottom, n)
            for (top, bottom, left, right), n in zip(
                boxes[image].tolist(), points[image].tolist(), strict=True
            ) if n
        )  # fmt: skip
        contours = golden["cutout_contours_derived"].tolist()
        assert ours == sorted(tuple(row[1:]) for row in contours if row[0] == image)
    for key, number in (("lo", 0.0), ("hi", 1 - 1e-6)):
        draw = torch.full((1, 2, MAX_CONTOURS, 2), number)
        for size, name in ((12, f"cutout_mask_{key}"), (96, f"cutout_mask_{key}_fullres")):
            if name not in golden:  # in the small copy
                continue
            mask = guided_cutout(foreground, (size, size), draw)
            assert torch.equal(mask[0].long(), golden.tensor(name))
    # Their offsets, drawn one after the other in the order of their contours.
    source, draw = random.Random(seed), torch.zeros(1, 2, MAX_CONTOURS, 2)
    for image, left, top, right, bottom, n in golden["cutout_contours_derived"].tolist():
        if n > 50:
            slot = boxes[image].tolist().index([top, bottom, left, right])
            for axis, extent in enumerate((right - left, bottom - top)):
                offset = source.randint(0, int(0.6 * extent))
                draw[0, image, slot, axis] = (offset + 0.5) / (int(0.6 * extent) + 1)
    ours = guided_cutout(foreground, (12, 12), draw)[0].long()
    assert torch.equal(ours, golden.tensor("cutout_mask_rand"))


def test_contours_by_hand(monkeypatch):
    image = torch.zeros(5, 40, 40, dtype=torch.bool)
    image[0, 5:30, 5:25] = True  # a rectangle has four points
    image[1, 5, 5:20] = True  # a line two, one at each end
    image[2, 20, 20] = True
    image[3, 2:38, 2:38] = True  # with a hole that holds another region
    image[3, 10:30, 10:30] = False
    image[3, 15:20, 15:20] = True
    y, x = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    image[4] = (y - 20).abs() + (x - 20).abs() <= 12  # diagonal runs are straight, too
    boxes, points = contour_boxes(image)
    assert points[:, 0].tolist() == [4, 2, 1, 4, 4] and points[:, 1:].sum() == 0
    assert boxes[:, 0].tolist() == [
        [5, 29, 5, 24], [5, 5, 5, 19], [20, 20, 20, 20], [2, 37, 2, 37], [8, 32, 8, 32],
    ]  # fmt: skip
    assert guided_cutout(image, (40, 40), torch.rand(2, 5, MAX_CONTOURS, 2)).min() == 1
    # A disc of radius 20 has more than 50 points: 0.4 of both sides of its box are erased.
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disc = ((y - 30) ** 2 + (x - 30) ** 2 <= 400)[None]
    masks = guided_cutout(disc, (64, 64), torch.rand(3, 1, MAX_CONTOURS, 2))
    assert (1 - masks).sum((1, 2, 3, 4)).tolist() == [16.0 * 16] * 3
    assert guided_cutout(disc, (64, 64), torch.rand(1, 1, MAX_CONTOURS, 2), 0.0).min() == 1
    for points, erased in ((50, 0), (51, 16 * 16)):
        found = (contour_boxes(disc)[0], torch.tensor([[points] + [0] * (MAX_CONTOURS - 1)]))
        monkeypatch.setattr(cct, "contour_boxes", lambda _, found=found: found)
        assert (
            1 - guided_cutout(disc, (64, 64), torch.rand(1, 1, MAX_CONTOURS, 2))
        ).sum() == erased


def spiral(side: int) -> torch.Tensor:
    """One line of width 1 that winds from the outside in; `side` even."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    for ring in range(1, side // 2, 2):
        end = side - 1 - ring
        mask[ring, ring - 2 if ring > 1 else ring : end + 1] = True
        mask[ring : end + 1, end] = mask[end, ring : end + 1] = True
        mask[ring + 2 : end + 1, ring] = True
    return mask


def test_regions_are_scipys():
    """Noise, blobs, a spiral and a comb, which take the most rounds, against another algorithm."""
    side = 98
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(6, side, side, generator=generator)
    comb = torch.zeros(side, side, dtype=torch.bool)
    comb[2:-2, 2:-2:2] = comb[-3, 2:-2] = True
    blobs = torch.randn(2, 1, 12, 12, generator=generator)
    blobs = F.interpolate(blobs, (side, side), mode="bilinear")[:, 0] > 0
    masks = torch.cat([
        noise[:2] < 0.5, noise[2:4] < 0.41, noise[4:] < 0.6, blobs, spiral(side)[None], comb[None],
        comb.T[None], comb.flip(0)[None], spiral(side).flip(0, 1)[None],
    ])  # fmt: skip
    masks[:, [0, -1]] = masks[:, :, [0, -1]] = False
    index = torch.arange(side * side).view(side, side)
    for mask, label in zip(masks, regions(masks), strict=True):
        for value, structure in ((True, [[1, 1, 1]] * 3), (False, None)):
            expected, count = ndimage.label((mask == value).numpy(), structure)
            first = ndimage.minimum(index.numpy(), expected, range(1, count + 1))
            inside = torch.from_numpy(expected) > 0
            expected = torch.tensor(first)[torch.from_numpy(expected)[inside].long() - 1]
            assert torch.equal(label[inside], expected.long())


@goldens
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_vat_is_the_authors(golden, dtype):
    name = f"vat_f{torch.finfo(dtype).bits}"
    features, weight = (golden.tensor(key).to(dtype) for key in ("vat_in", "vat_weight"))
    decoder = nn.Conv2d(6, 4, 1, bias=False).to(dtype)
    decoder.weight.data.copy_(weight)
    draw = golden.tensor(f"{name}_rand_draw").to(dtype)
    for xi in ("1e-06", "0.001", "0.1", "10"):
        r = vat_perturbation(features.requires_grad_(), decoder, float(xi), 2.0, draw)
        norm, expected = r.flatten(1).norm(dim=1), golden.tensor(f"{name}_xi{xi}_it1_norm")
        assert not r.requires_grad and features.grad is None and decoder.weight.grad is None
        if xi == "1e-06" and dtype == torch.float32:
            assert norm.max() < 1e-3  # rounding noise: the released step does nothing
            continue
        close(norm.double(), expected, atol=1e-5)
        if f"{name}_xi{xi}_it1_radv" in golden:
            close(r.double(), golden.tensor(f"{name}_xi{xi}_it1_radv"), atol=1e-5)


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
def test_vat_has_length_eps_and_beats_a_random_direction(amp):
    """In a script's own decoders, on features of a network's size, with and without autocast."""
    torch.manual_seed(0)
    args = shapes_args(**only("vat"))
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        features = F.conv2d(torch.randn(4, 64, 40, 40), torch.randn(256, 64, 1, 1) / 8).relu()
    assert features.dtype == (torch.bfloat16 if amp else torch.float32)
    decoders = AuxDecoders(256, 21, args)
    logits = torch.randn(4, 21, 160, 160)

    def divergence(draws, eps, what=None):
        decoders.args = replace(args, vat_eps=eps)
        if what is not None:  # that direction instead of VAT's
            cct_vat, cct.vat_perturbation = cct.vat_perturbation, lambda *_: what
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                moved, seen = decoders(features, logits, draws)
        finally:
            if what is not None:
                cct.vat_perturbation = cct_vat
        assert moved.dtype == torch.float32
        clean = decode(
            features.float(), decoders.conv.weight[:, :, 0, 0], decoders.conv.bias
        ).log_softmax(1)
        prob = clean.exp()
        per_image = (prob * (clean - moved[0].log_softmax(1))).sum((1, 2, 3))
        return per_image, seen["pseudo/vat_norm"].item()

    draws = draw_perturbations(args, 0, 0, features)
    found, norm = divergence(draws, 2.0)
    assert norm == pytest.approx(2.0, rel=1e-4)
    # The small step survives in what the loss sees.
    decoder = partial(decode, weight=decoders.conv.weight[:, :, 0, 0], bias=decoders.conv.bias)
    r = vat_perturbation(features.float(), decoder, 1.0, 2.0, draws["vat"][0])
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        moved, _ = decoders(features, logits, draws)
    close(moved[0], decoder(features.float() + r), atol=1e-5, rtol=1e-5)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        other = torch.randn(features.shape, generator=generator)
        other = 2 * other / other.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        by_chance, norm = divergence(draws, 2.0, other)
        assert norm == pytest.approx(2.0, rel=1e-4)
        assert (found > 2 * by_chance).all() and (by_chance > 0).all()
    assert divergence(draws, 0.5)[1] == pytest.approx(0.5, rel=1e-4)
    decoders.args = args = replace(args, vat_xi=1e-6)
    assert divergence(draws, 2.0)[1] < 0.2  # the released step, in full precision


def perturbed(kind: str, features: torch.Tensor, logits: torch.Tensor, draw=None, **flags):
    """What a decoder of one kind sees: its features, through a convolution that copies them."""
    args, channels = shapes_args(**only(kind), **flags), features.shape[1]
    decoders = AuxDecoders(channels, channels, args).to(features.dtype)
    with torch.no_grad():
        decoders.conv.weight.copy_(torch.eye(channels)[:, :, None, None])
        decoders.conv.bias.zero_()
    draws = draw_perturbations(args, 0, 0, features)
    if draw is not None:
        draws[kind] = draw
    seen, _ = decoders(features, logits, draws)
    return seen[0].detach()


@goldens
def test_decoders_see_the_authors_perturbations(golden):
    features, foreground = golden.tensor("mask_feat"), golden.tensor("mask_fg_fullres")
    logits = F.one_hot(foreground, 3).movedim(3, 1).double()
    for kind, key in (("context", "ctx_masked_feat"), ("object", "obj_masked_feat")):
        expected = features * golden.tensor(key[:3] + "_mask")
        close(perturbed(kind, features, logits), expected)
        close(expected, golden.tensor(key) if key in golden else expected)
    low = perturbed("cutout", features, logits, torch.zeros(1, 2, MAX_CONTOURS, 2))
    close(low, features * golden.tensor("cutout_mask_lo"))
    gamma = torch.full((1, 1, 1, 1, 1), 0.5, dtype=torch.float64)
    dropped = perturbed("feature_drop", golden.tensor("fdrop_in"), logits[[0, 0, 0]], gamma)
    close(dropped, golden.tensor("fdrop_out_gamma0.8"))
    noise = (golden.tensor("fnoise_noise") / 0.3 + 1) / 2
    noisy = perturbed(
        "feature_noise", golden.tensor("fnoise_in"), logits[[0] * 4], noise[None, None]
    )
    close(noisy, golden.tensor("fnoise_out"))
    dropped = perturbed("dropout", features, logits)
    factor = dropped.sum((2, 3)) / features.sum((2, 3))
    close(dropped, features * factor[:, :, None, None])  # whole channels
    kept = factor.round(decimals=6).tolist()
    assert {scale for row in kept for scale in row} == {0.0, float(golden["dropout_kept_scale"])}
    assert kept[0] != kept[1]  # of each image


def test_decoders_run_together_are_the_decoders_one_by_one():
    """Masks before each convolution, and a copy of the features for each decoder."""
    torch.manual_seed(0)
    args = shapes_args(decoders=(1, 2, 3, 1, 2, 2, 2))
    features, logits = torch.randn(2, 8, 12, 12).relu(), torch.randn(2, 5, 6, 6)
    logits = F.interpolate(logits, (48, 48), mode="bilinear")
    decoders = AuxDecoders(8, 5, args)
    draws = draw_perturbations(args, 3, 0, features)
    together, seen = decoders(features, logits, draws)
    convolutions = list(
        zip(decoders.conv.weight.split(5), decoders.conv.bias.split(5), strict=True)
    )
    is_object = (logits.argmax(1, keepdim=True) != 0)[:, :, ::4, ::4]
    vat, dropout, cutout, gamma, noise = (
        draws[k] for k in ("vat", "dropout", "cutout", "feature_drop", "feature_noise")
    )
    first = partial(F.conv2d, weight=convolutions[0][0], bias=convolutions[0][1])
    views = [features + vat_perturbation(features, first, 1.0, 2.0, vat[0])]
    views += [features * (draw >= 0.5)[:, :, None, None] * 2 for draw in dropout]
    foreground = logits.argmax(1) != 0
    views += [features * guided_cutout(foreground, (12, 12), draw[None])[0] for draw in cutout]
    views += [features * is_object] + [features * ~is_object] * 2
    views += [feature_drop(features, 0.7 + 0.2 * g.item()) for g in gamma]
    views += [features * (0.7 + 0.6 * draw) for draw in noise]
    one_by_one = [F.conv2d(view, *conv) for view, conv in zip(views, convolutions, strict=True)]
    close(together, torch.stack(one_by_one), atol=1e-5, rtol=1e-5)
    assert seen["pseudo/foreground"].item() == pytest.approx(foreground.float().mean().item())


def test_draws_are_the_same_on_any_number_of_processes():
    args = shapes_args(decoders=(1, 2, 1, 0, 0, 2, 1))
    features = torch.zeros(8, 16, 12, 12)
    whole = draw_perturbations(args, 5, 0, features)
    for first in (0, 2, 6):
        part = draw_perturbations(args, 5, first, features[:2])
        for kind, draw in whole.items():
            one_for_all = kind in ("feature_drop", "feature_noise")
            expected = draw if one_for_all else draw[:, first : first + 2]
            assert torch.equal(part[kind], expected), kind
    other = draw_perturbations(args, 6, 0, features)
    assert all(not torch.equal(other[kind], whole[kind]) for kind in whole)


def test_hashed_numbers_are_uniform():
    draw = uniform(2**63 - 12345, 0, 1000, (1000,), "cpu").double()
    assert draw.min() >= 0 and draw.max() < 1
    assert torch.equal(uniform(5, 7, 2, (3,), "cpu"), uniform(5, 0, 9, (3,), "cpu")[7:])
    far = uniform(5, 3 * 10**6, 2, (1000,), "cpu")  # places beyond 32 bits wrap around
    assert far.min() >= 0 and far.max() < 1 and 0.4 < far.mean() < 0.6
    assert draw.mean().item() == pytest.approx(0.5, abs=2e-3)
    assert draw.var().item() == pytest.approx(1 / 12, abs=1e-3)
    counts = torch.histc(draw, 100, 0, 1)
    assert ((counts - 1e4) ** 2 / 1e4).sum() < 170  # chi squared with 99 degrees of freedom
    for a, b in ((draw[:, 1:], draw[:, :-1]), (draw[1:], draw[:-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 5e-3
    other = uniform(2**63 - 12346, 0, 1000, (1000,), "cpu").double()
    assert abs(torch.corrcoef(torch.stack([draw.flatten(), other.flatten()]))[0, 1]) < 5e-3


# Gradient routes and whole steps


def moved_parts(args, monkeypatch) -> set[str]:
    """Parts of the networks that one SGD step of `main` changes."""
    right, before = cct.make_optimizer, {}

    def make_optimizer(networks, *rest):
        for name, module in zip(("network", "aux_decoders"), networks, strict=True):
            for key, value in module.named_parameters():
                before[f"/{name}/{key}"] = value.detach().clone()
        return right(networks, *rest)

    monkeypatch.setattr(cct, "make_optimizer", make_optimizer)
    monkeypatch.setattr(cct, "validate", lambda *_: {"val/miou": 0.5})
    flags = {"optimizer": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "ramp_up": 0.0}
    after = weights(main(replace(args, steps=1, **flags))["run_dir"])
    moved = [key for key, value in before.items() if not torch.equal(value, after[key])]
    return {re.match(r"/network/\w+|/aux_decoders", key)[0] for key in moved}


@pytest.mark.parametrize("kind", KINDS)
def test_which_part_learns_from_the_consistency_loss(kind, quick, monkeypatch):
    monkeypatch.setattr(cct, "supervised_loss", lambda logits, *_: 0 * logits.sum())
    moved = moved_parts(quick(Args, **only(kind, 2)), monkeypatch)
    assert moved == {"/network/backbone", "/network/head", "/aux_decoders"}


def test_which_part_learns_from_the_supervised_loss(quick, monkeypatch):
    moved = moved_parts(quick(Args, lambda_u=0.0), monkeypatch)
    assert moved == {"/network/backbone", "/network/head", "/network/classifier"}


@pytest.mark.parametrize("kind", ["cutout", "context", "object", "feature_drop"])
def test_a_masked_position_sends_the_encoder_no_gradient(kind):
    """The decoders are pointwise: what is masked is not asked for."""
    torch.manual_seed(0)
    features, logits = torch.randn(2, 8, 24, 24).relu(), torch.randn(2, 5, 4, 4)
    logits = F.interpolate(logits, (96, 96), mode="bilinear")
    features.requires_grad_()
    args = shapes_args(**only(kind))
    draws = draw_perturbations(args, 0, 0, features)
    mask = {
        "cutout": lambda: guided_cutout(logits.argmax(1) != 0, (24, 24), draws["cutout"])[0],
        "context": lambda: foreground_mask(logits, (24, 24)),
        "object": lambda: 1 - foreground_mask(logits, (24, 24)),
        "feature_drop": lambda: feature_drop_mask(features, 0.7 + 0.2 * draws["feature_drop"][0]),
    }[kind]()
    aux_logits, _ = AuxDecoders(8, 5, args)(features, logits, draws)
    DecoderLosses.apply(aux_logits, logits.softmax(1), "mse").sum().backward()
    sent = (features.grad != 0).any(1, keepdim=True)
    assert torch.equal(sent, mask.bool()) and 0 < sent.sum() < sent.numel()


def test_the_main_decoder_is_the_network():
    torch.manual_seed(0)
    network, image = cct.DeepLabV3Plus(8, "resnet14").eval(), torch.randn(2, 3, 64, 64)
    logits = network.classifier(network.head(*network.encode(image)))
    assert torch.equal(upsample(logits, image.shape[2:]), network(image))


class RecordedError(Exception):
    """Ends a run after the golden step."""


class GoldenDecoder(nn.Module):
    """The release's decoder: a 1x1 convolution, then three pixel shuffles with ReLU."""

    in_channels = 512

    def __init__(self, golden, name):
        super().__init__()
        self.name = name
        state = golden.part(f"step_before.{name}.")
        self.weights = nn.ParameterDict(
            {k.replace(".", "_"): nn.Parameter(v) for k, v in state.items()}
        )

    def tail(self, logits):
        for up in ("up1", "up2", "up3"):
            logits = F.conv2d(logits, self.weights[f"{up}_weight"], self.weights[f"{up}_bias"])
            logits = F.pixel_shuffle(logits.relu(), 2)
        return logits

    def forward(self, features):
        return self.tail(F.conv2d(features, self.weights["proj_weight"]))


class GoldenNet(nn.Module):
    def __init__(self, golden):
        super().__init__()
        conv, bn = nn.Conv2d(3, 512, 1, bias=False), nn.BatchNorm2d(512)
        self.head = nn.Sequential(nn.AvgPool2d(8), conv, bn, nn.ReLU())
        self.double()
        conv.load_state_dict(golden.part("step_before.encoder.conv."))
        bn.load_state_dict(golden.part("step_before.encoder.bn."))
        self.classifier = GoldenDecoder(golden, "main")

    def encode(self, image):
        return (image,)

    def forward(self, image):
        return upsample(self.classifier(self.head(*self.encode(image))), image.shape[2:])


class GoldenDecoders(AuxDecoders):
    """The script's decoders, their convolutions without bias and with the release's tails."""

    def __init__(self, golden, args):
        super().__init__(512, 4, args)
        self.double()
        self.tails = nn.ModuleList(GoldenDecoder(golden, f"aux{k}") for k in range(3))
        with torch.no_grad():
            self.conv.bias.zero_().requires_grad_(False)
            proj = [tail.weights.pop("proj_weight") for tail in self.tails]
            self.conv.weight.copy_(torch.cat(proj))

    def forward(self, *inputs):
        logits, seen = super().forward(*inputs)
        tails = zip(self.tails, logits, strict=True)
        return torch.stack([tail.tail(each) for tail, each in tails]), seen


@goldens
def test_main_takes_the_authors_step(golden, quick, monkeypatch):
    """`main` itself, on their encoder, decoders, images and draws: losses and every gradient."""
    net, made, before, rows, weak = GoldenNet(golden), {}, {}, [], []

    def batches(stream):
        end = {"labeled": "l", "unlabeled": "ul"}[stream]
        yield golden.tensor(f"step_x_{end}"), golden.tensor(f"step_target_{end}")
        raise RecordedError

    def aux_decoders(channels, classes, args):
        made["aux"] = GoldenDecoders(golden, args)
        for part in (net, made["aux"]):
            state = part.state_dict().items()
            before.update({(part, name): value.clone() for name, value in state})
        return made["aux"]

    right = cct.consistency_loss

    def with_weak_labels(logits, target, kind):
        """Their optional third term, 0.4 w / 30 CE, which the script leaves out."""
        weak.append(cross_entropy(logits, golden.tensor("step_target_ul")))
        return right(logits, target, kind) + 0.4 / 30 * weak[-1]

    gamma = (float(golden["step_gamma"]) - 0.7) / 0.2
    monkeypatch.setattr(cct, "make_network", lambda *_: net)
    monkeypatch.setattr(cct, "AuxDecoders", aux_decoders)
    monkeypatch.setattr(cct, "make_batches", lambda args, data, ids, stream, *_: batches(stream))
    monkeypatch.setattr(
        cct, "uniform", lambda seed, first, n, shape, _: torch.full((n, *shape), gamma).double()
    )
    monkeypatch.setattr(cct, "consistency_loss", with_weak_labels)
    monkeypatch.setattr(cct.Run, "log", lambda self, step, row, pictures: rows.append(row))
    weight = float(golden["step_weight_u"])
    position = int(golden["step_epoch"]) * 10 + int(golden["step_iter"])
    assert 30 * ramp_up(position, 20) == pytest.approx(weight, abs=1e-9)
    args = quick(
        Args, steps=2, optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, log_every=1,
        batch_size=2, lambda_u=weight, ramp_up=0.0, decoders=(0, 0, 0, 1, 1, 1, 0),
    )  # fmt: skip
    with pytest.raises(RecordedError):
        main(args)
    (row,) = rows
    weak = torch.stack(weak).mean().item()
    assert row["loss/sup"] == pytest.approx(float(golden["step_loss_sup"]), rel=1e-5)
    assert 0.4 * weight / 30 * weak == pytest.approx(float(golden["step_loss_weakly"]), rel=1e-5)
    unsupervised = weight * (row["loss/cons"] - 0.4 / 30 * weak)
    assert unsupervised == pytest.approx(float(golden["step_loss_unsup"]), rel=1e-5)
    total = row["loss/sup"] + weight * row["loss/cons"]
    assert total == pytest.approx(float(golden["step_total"]), rel=1e-5)

    def gradient(part, name):  # of one SGD step of rate 1
        return before[part, name] - part.state_dict()[name]

    expected = golden.part("step_grad.")
    found = {f"encoder.conv.{k}": gradient(net, f"head.1.{k}") for k in ("weight",)}
    found |= {f"encoder.bn.{k}": gradient(net, f"head.2.{k}") for k in ("weight", "bias")}
    ups = [f"up{i}.{k}" for i in (1, 2, 3) for k in ("weight", "bias")]
    for name in ["proj.weight", *ups]:
        found[f"main.{name}"] = gradient(net, f"classifier.weights.{name.replace('.', '_')}")
    for k, proj in enumerate(gradient(made["aux"], "conv.weight").split(4)):
        found[f"aux{k}.proj.weight"] = proj
        for name in ups:
            flat = f"tails.{k}.weights.{name.replace('.', '_')}"
            found[f"aux{k}.{name}"] = gradient(made["aux"], flat)
    assert len(expected) > 20 and expected.keys() <= found.keys()  # some are left out of the copy
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    for name, value in golden.part("step_after.encoder.bn.").items():
        close(net.state_dict()[f"head.2.{name}"].double(), value.double(), atol=1e-5, rtol=1e-5)


# Runs


@pytest.mark.parametrize("flags", [
    {}, {"supervised_loss": "abce"} | only("vat"),
], ids=str)  # fmt: skip
def test_it_trains(quick, flags):
    args = quick(Args, steps=40, log_every=1, lr=3e-3, log_pseudo_accuracy=True, **flags)
    result = main(args)
    rows = read_log(result["run_dir"])
    assert result["steps"] == 40 and 0 <= result["miou"] <= result["best_miou"] <= 1
    loss = [row["loss/sup"] for row in rows]
    assert sum(loss[-10:]) < 0.9 * sum(loss[:10])
    kinds = {key.removeprefix("loss/cons_") for key in rows[0] if key.startswith("loss/cons_")}
    assert kinds == {k for k, n in zip(KINDS, args.decoders, strict=True) if n}
    for row in rows:
        each = [row[f"loss/cons_{k}"] for k in KINDS if k in kinds]
        assert row["loss/cons"] == pytest.approx(sum(each) / len(each))
        assert row.get("pseudo/vat_norm", 2) == pytest.approx(2, rel=1e-3)
        assert 0 <= row["pseudo/foreground"] <= 1 and 0 < row["pseudo/confidence"] <= 1
        assert 0 <= row["pseudo/accuracy"] <= 1 and 0 <= row.get("pseudo/erased", 0) <= 1


def test_a_checkpoint_predicts(quick):
    folder = Path(main(quick(Args, steps=1))["run_dir"])
    for name in ("last.pt", "best.pt"):
        network, meta = predict.load(folder / name, torch.device("cpu"))
        assert network(torch.zeros(1, 3, 64, 64)).shape == (1, len(meta["classes"]), 64, 64)


def test_unlabeled_labels_are_never_read(quick, monkeypatch):
    assert_unlabeled_labels_are_not_read(cct, quick, monkeypatch)


def test_accumulate_takes_the_mean_gradient(quick, monkeypatch):
    freeze_batchnorm(monkeypatch, cct)
    flags = {"steps": 1, "optimizer": "sgd", "lr": 1.0, "momentum": 0.0, "ramp_up": 0.0}
    one, two = (
        weights(main(quick(Args, accumulate=n, exp_name=f"n{n}", **flags))["run_dir"])
        for n in (1, 2)
    )
    for key in one:
        if key.startswith(("/network", "/aux_decoders")):
            torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)


def test_bf16_keeps_every_gradient(quick):
    """The passes without gradient must not leave autocast's weights without gradient."""
    result = main(quick(Args, amp="bf16", steps=2, lr=1e-2, ramp_up=0.0, eval_every=1, log_every=1))
    checkpoint = torch.load(f"{result['run_dir']}/last.pt", weights_only=True)
    for number, moments in checkpoint["optimizer"]["state"].items():
        assert moments["exp_avg"].abs().max() > 0, f"parameter {number} got no gradient"
    assert read_log(result["run_dir"])[-1]["pseudo/vat_norm"] == pytest.approx(2, rel=1e-3)


CHANGES = [
    {"supervised_loss": "abce"}, {"decoders": (2, 2, 2, 2, 2, 2, 1)}, {"vat_xi": 1e-6},
    {"vat_eps": 8.0}, {"dropout": 0.2}, {"cutout": 0.9}, {"feature_drop": (0.2, 0.3)},
    {"feature_noise": 0.1}, {"consistency": "kl"}, {"consistency": "js"}, {"lambda_u": 3.0},
    {"ramp_up": 0.9}, {"head_lr_mult": 2.0},
]  # fmt: skip


def test_every_flag_has_an_effect(quick, monkeypatch):
    """Each changes the weights of the first step; abce's flags do where abce is in use."""
    monkeypatch.setattr(cct, "validate", lambda *_: {"val/miou": 0.5})
    args = quick(Args, steps=1, ramp_up=0.0, optimizer="sgd")

    def end(number, **flags):
        run = weights(main(replace(args, exp_name=f"run{number}", **flags))["run_dir"])
        return torch.cat([v.flatten() for k, v in sorted(run.items()) if k.startswith("/network")])

    plain = end(0)
    for number, flags in enumerate(CHANGES, 1):
        assert not torch.equal(plain, end(number, **flags)), flags
    abce = {"supervised_loss": "abce", "abce_anneal": 0.0}
    base = end("a", **abce)
    assert not torch.equal(base, end("b", **abce, abce_end=0.1))
    assert not torch.equal(base, end("c", **abce | {"abce_anneal": 1.0}))


@pytest.mark.parametrize("flags", [
    {"abce_end": 1.1}, {"abce_end": float("nan")}, {"abce_anneal": 1.5}, {"ramp_up": -0.1},
    {"decoders": (1, -1, 1, 1, 1, 1, 1)}, {"vat_xi": -1.0}, {"vat_eps": -1.0}, {"dropout": 1.0},
    {"cutout": 1.1}, {"feature_drop": (0.9, 1.7)}, {"feature_drop": (0.5, float("nan"))},
    {"feature_noise": -0.3}, {"lambda_u": float("inf")},
], ids=str)  # fmt: skip
def test_bad_flags(quick, flags):
    with pytest.raises(cct.UserError, match=next(iter(flags)).replace("_", "-")):
        main(quick(Args, **flags))


def test_paper_rows():
    for dataset in ("voc", "cityscapes"):
        args = resolve(Args(dataset=dataset))
        assert (args.lambda_u, args.ramp_up, args.lr) == (30.0, 0.1, 0.0025)
        assert args.decoders == (2,) * 7
    assert resolve(Args(dataset="cityscapes")).supervised_loss == "ohem"
    for dataset in ("camvid", "shapes"):
        row = PAPER[dataset]
        assert (row["lr"], row["steps"], row["ramp_up"]) == (1e-3, 1_000, 0.4)


def test_own_data_has_the_weight_per_pixel_of_voc(tmp_path):
    """The loss is a mean over the classes, 21 on VOC. What the user says is not rescaled."""
    flags = {"dataset": "folder", "data_root": str(make_folder(tmp_path))}  # of two classes
    assert resolve(Args(**flags)).lambda_u == pytest.approx(30 * 2 / 21)
    assert resolve(Args(**flags, lambda_u=7.0)).lambda_u == 7
