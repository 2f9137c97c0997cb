"""dcc.py: the contrastive loss against hand-worked numbers, the plain formula and the authors';
crops, places and bank; whole steps, runs.
"""

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    assert_same,
    assert_unlabeled_labels_are_not_read,
    golden_files,
    load_golden,
    read_log,
    weights,
)
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

import dcc
from common.datasets import step_generator
from common.transforms import denormalize, normalize
from dcc import (
    PAPER,
    Args,
    NegativeBank,
    PairView,
    active_anchors,
    both_directions,
    contrast,
    directional_contrastive_loss,
    draw_places,
    main,
    overlap_places,
    overlapping_crops,
    take,
)

GOLDENS = golden_files("dcc_seed*.npz")
by_stem = {"ids": lambda path: f"{path.parent.name}-{path.stem}"}
VALUES = {"rtol": 2e-5, "atol": 2e-6}  # of the goldens
GRADIENTS = {"rtol": 1e-3, "atol": 1e-5}


def unit(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def problem(n, count, dim, classes=5, dtype=torch.float64):
    """Arguments of `contrast`, all rows of it needed."""
    draw = torch.Generator().manual_seed(9)
    label = torch.randint(classes, (n,), generator=draw)
    negative_labels = torch.randint(classes, (count,), generator=draw)
    anchor, positive, negatives = (
        unit(rows, dim, seed=i, dtype=dtype) for i, rows in enumerate((n, n, count))
    )
    return anchor, positive, label, negatives, negative_labels


def plain(anchor, positive, label, negatives, negative_labels, temperature=0.1):
    """The formula as it stands, with all n x N similarities at once."""
    negative = label[:, None] != negative_labels
    own = (anchor * positive).sum(1) / temperature
    others = (anchor @ negatives.T / temperature).exp() * negative
    return -(own.exp() / (own.exp() + others.sum(1))).log()


# --- the loss


def test_loss_by_hand():
    # Two places, classes 0 and 1, in the plane; temperature 1. Negatives: (0, 1) of class 1 for the
    # first, and (1, 0) of class 0 for the second, which is not active: 0.7 is not above 0.75.
    anchor = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    positive = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    confidence = torch.tensor([0.5, 0.6]), torch.tensor([0.9, 0.7])
    bank = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 0])
    labels = torch.tensor([0, 1])
    loss = directional_contrastive_loss(anchor, positive, labels, *confidence, *bank, 1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.0 - 0.6)), rel=1e-6)
    loss.backward()
    share = 1 / (1 + math.exp(0.6))  # of the negative in the softmax; d loss / d a = q (z - p)
    assert anchor.grad[0].tolist() == pytest.approx([-0.6 * share, 0.2 * share], rel=1e-5)
    assert anchor.grad[1].abs().max() == 0


def test_only_active_anchors_learn():
    anchor, positive, label, negatives, negative_labels = problem(40, 30, 6)
    confidence = torch.rand(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    confidence[:, 0] = 0.9  # a tie
    confidence[:, 1] = torch.tensor([0.75, 0.75]) - torch.tensor([0.1, 0.0])  # not above 0.75
    leaves = [t.requires_grad_() for t in (anchor, positive, negatives)]
    loss = directional_contrastive_loss(
        anchor, positive, label, *confidence, negatives, negative_labels
    )
    of_anchor, *others = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert others == [None, None]
    active = (confidence[1] > 0.75) & (confidence[0] < confidence[1])
    assert 3 < active.sum() < 20 and not active[:2].any()
    assert torch.equal(of_anchor.abs().amax(1) > 0, active)
    with torch.no_grad():
        rows = plain(anchor, positive, label, negatives, negative_labels)
    assert loss.item() == pytest.approx(rows[active].mean().item(), rel=1e-12)
    both = active & active_anchors(confidence[1], confidence[0], 0.75)
    assert not both.any()  # a place is an anchor in one direction at most
    undirected = active_anchors(*confidence, 0.75, directional=False)
    assert torch.equal(undirected, confidence[1] > 0.75) and undirected[0]


@pytest.mark.parametrize("case", ["nothing sure", "one label", "no negatives", "no places"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
def test_nothing_to_learn_is_zero_with_zero_gradient(case, epsilon):
    anchor, positive, label, negatives, negative_labels = problem(7, 9, 4)
    low, high = torch.full((7,), 0.2).double(), torch.full((7,), 0.9).double()
    if case == "nothing sure":
        high = high - 0.5
    elif case == "one label":
        label, negative_labels = label * 0, negative_labels * 0
    elif case == "no negatives":
        negatives, negative_labels = negatives[:0], negative_labels[:0]
    else:
        anchor, positive, label, low, high = (t[:0] for t in (anchor, positive, label, low, high))
    anchor.requires_grad_()
    args = (anchor, positive, label, low, high, negatives, negative_labels)
    loss = directional_contrastive_loss(*args, epsilon=epsilon)
    loss.backward()
    assert torch.isfinite(anchor.grad).all() and loss.isfinite()
    if epsilon == 0 or case in ("nothing sure", "no places"):  # else it adds a little
        assert loss.item() == 0
        assert anchor.grad.numel() == 0 or anchor.grad.abs().max() == 0


@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
def test_gradients_are_right(epsilon, monkeypatch):
    monkeypatch.setattr(dcc, "CHUNK", 4)
    anchor, positive, label, negatives, negative_labels = problem(5, 11, 4, classes=3)
    negative_labels[:] = torch.where(negative_labels == 0, 1, negative_labels)
    label[0], label[1] = 0, 1
    anchor = (1.1 * anchor).requires_grad_()  # not of length 1 either
    assert torch.autograd.gradcheck(
        lambda a: contrast(a, positive, label, negatives, negative_labels, 0.3, epsilon), anchor
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_any_chunk_gives_the_plain_formula(dtype, tolerance, monkeypatch):
    args = problem(33, 301, 128, dtype=dtype)
    args[0].requires_grad_()
    expected = plain(*(t.detach().double() if t.is_floating_point() else t for t in args))
    exact = args[0].detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(
        plain(exact, args[1].double(), args[2], args[3].double(), args[4]).sum(), exact
    )
    for chunk in (1, 7, 300, 301, 4096):
        monkeypatch.setattr(dcc, "CHUNK", chunk)
        loss = contrast(*args, 0.1)
        assert loss.dtype == dtype
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
        (found,) = torch.autograd.grad(loss.sum(), args[0])
        torch.testing.assert_close(found.double(), gradient, rtol=1e-4, atol=10 * tolerance)


def test_extreme_temperatures_and_half_precision():
    args = problem(8, 20, 16, dtype=torch.float32)
    for temperature in (1e-3, 1e3):
        anchor = args[0].clone().requires_grad_()
        loss = contrast(anchor, *args[1:], temperature)
        loss.sum().backward()
        assert loss.isfinite().all() and anchor.grad.isfinite().all()
    half = [t.bfloat16() if t.is_floating_point() else t for t in args]
    loss = contrast(*half, 0.1)
    assert loss.dtype == torch.float32
    whole = [t.float() if t.is_floating_point() else t for t in half]
    assert torch.equal(loss, contrast(*whole, 0.1))


class LargestTensor(TorchDispatchMode):
    """The greatest number of elements that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return out


def test_no_matrix_of_all_negatives():
    anchor, positive, label, negatives, negative_labels = problem(50, 9000, 8, dtype=torch.float32)
    for epsilon in (0.0, 1e-8):
        with LargestTensor() as largest:
            loss = contrast(
                anchor.requires_grad_(), positive, label, negatives, negative_labels, 0.1, epsilon
            )
            loss.sum().backward()
        assert largest.numel <= max(50 * dcc.CHUNK, negatives.numel()) < 50 * 9000


def peak(function) -> int:
    """Greatest sum of bytes that `function` holds on the CPU, beyond those before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_memory_is_a_tenth_of_the_plain_formula():
    """ANCHORS=6400 is the size of the release's Pascal VOC run; 51,200 negatives as there."""
    n = int(os.environ.get("ANCHORS", 100))
    anchor, *rest = problem(n, 51_200, 128, dtype=torch.float32)
    losses, peaks = [], []
    for formula in (plain, contrast):
        leaf = anchor.clone().requires_grad_()

        def run(formula=formula, leaf=leaf):
            loss = formula(leaf, *rest, 0.1).sum()
            loss.backward()
            losses.append(loss.item())

        peaks.append(peak(run))
    print(f"{n} anchors: {peaks[0] / 2**20:.0f} MiB plain, {peaks[1] / 2**20:.0f} MiB in chunks")
    assert peaks[0] > n * 51_200 * 4 and peaks[1] < peaks[0] / 10
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_one_pass_serves_both_directions():
    vectors = torch.stack([unit(60, 6, seed=s) for s in (1, 2)]).requires_grad_()
    draw = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (2, 60), generator=draw)
    confidences = torch.rand(2, 60, generator=draw, dtype=torch.float64)
    bank = unit(80, 6, seed=4), torch.randint(3, (80,), generator=draw)
    for directional in (True, False):
        args = replace(Args(), confidence_threshold=0.6, directional=directional)
        sums, active = both_directions(vectors, labels, confidences, *bank, args)
        total, expected = (sums / active.sum(1)).sum(), 0
        for own, other in ((0, 1), (1, 0)):
            confident = confidences[own], confidences[other]
            assert torch.equal(active[own], active_anchors(*confident, 0.6, directional))
            pair = (vectors[own], vectors[other], labels[own])
            if directional:
                loss = directional_contrastive_loss(*pair, *confident, *bank, threshold=0.6)
            else:
                loss = contrast(*pair, *bank, 0.1)[confident[1] > 0.6].mean()
            expected = expected + loss
        assert total.item() == pytest.approx(expected.item(), rel=1e-12)
        (found,), (right,) = (torch.autograd.grad(each, vectors) for each in (total, expected))
        torch.testing.assert_close(found, right)


# --- the authors' numbers


def steps_of(golden) -> list[str]:
    return sorted({key.split("/")[0] for key in golden if key.startswith("step")})


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_losses_and_masks_are_the_authors(path, monkeypatch):
    golden = load_golden(path)
    for step in steps_of(golden):
        out = golden.part(f"{step}/out/")
        for own, other in ("12", "21"):
            args = (
                out[f"anchor{own}"], out[f"anchor{other}"], out[f"label{own}"], out[f"conf{own}"],
                out[f"conf{other}"], out["neg_feats"], out["neg_labels"],
            )  # fmt: skip
            active = active_anchors(args[3], args[4], float(golden["conf/pos_thresh"]))
            assert torch.equal(active.double(), out[f"mask{own}"])
            released = directional_contrastive_loss(*args, epsilon=1e-8)
            torch.testing.assert_close(released, out[f"loss{own}"], **VALUES)
            exact = directional_contrastive_loss(*args)
            assert exact.item() == pytest.approx(out[f"loss{own}"].item(), rel=2e-2)
            assert exact != released
            if f"chunk7/loss{own}" in out:
                with monkeypatch.context() as patch:
                    patch.setattr(dcc, "RELEASED_ROWS", 7)
                    patch.setattr(dcc, "CHUNK", 7)
                    released = directional_contrastive_loss(*args, epsilon=1e-8)
                torch.testing.assert_close(released, out[f"chunk7/loss{own}"], **VALUES)


class RecordedError(Exception):
    """Ends a run after the golden steps."""


class GoldenNet(nn.Module):
    """In the network's place: images say which of the step's recorded maps comes out."""

    def __init__(self):
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))
        self.classifier.in_channels = 8

    def set(self, inputs: dict, downsample: bool):
        self.inputs = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        self.downsample = downsample

    def encode(self, image):
        return (image,)

    def head(self, image):
        self.seen = int(image[0, 0, 0, 0])
        features = self.inputs[f"enc{self.seen}"]
        if not self.downsample:  # the script always pools
            features = features.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return features

    class classifier:  # noqa: N801
        in_channels = 8

    def forward(self, image):
        logits = self.inputs["logits_l"]
        return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=True)


@pytest.mark.parametrize("epsilon", [1e-8, 0.0])
@pytest.mark.parametrize("group", ["steps", "edge/unconfident", "edge/single_label",
                                   "edge/identical_views"])  # fmt: skip
@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_main_takes_the_authors_steps(path, group, epsilon, quick, monkeypatch):
    """`main` itself on their maps, rectangles, flips and draws: losses, bank and gradients."""
    golden = load_golden(path)
    names = steps_of(golden) if group == "steps" else [group]
    conf = {k.removeprefix("conf/"): golden[k].item() for k in golden if k.startswith("conf/")}
    if group != "steps":
        conf |= {"world": 1, "selected_num": 72, "step_save": 0, "downsample": 0}
    net, rows, gradients, now = GoldenNet(), [], [], {}
    net.classifier = lambda features: now[f"logits{net.seen}"]
    net.classifier.in_channels = 8

    def labeled(*_):
        for name in [*names, None]:
            if now:  # the step before is complete
                gradients.append({k: v.grad for k, v in net.inputs.items()})
            if name is None:
                raise RecordedError
            now.clear()
            now.update(golden.part(f"{name}/in/"))
            now["selected"] = torch.stack(
                [golden.tensor(f"{name}/out/selected_idx{v}") for v in "12"]
            )
            leaves = {k: now[k] for k in ("enc1", "enc2", "logits_l")}
            net.set(leaves, bool(conf["downsample"]))
            yield torch.zeros(2, 3, 24, 24), now["target_l"]

    def pairs(*_):
        while True:
            images = [torch.full((2, 3, 48, 48), float(view)) for view in (1, 2)]
            corners = [torch.cat([now[f"ul{v}_yx"], now[f"br{v}_yx"]], 1) for v in "12"]
            overlap = overlap_places(torch.stack(corners, 1), now["flip_v1_v2"].bool(), 6)
            yield images, torch.full((2, 2, 6, 6), 254), overlap

    def gathered(value, world_size):
        parts = [value.flatten(0, 1)]
        if conf["world"] == 2:
            parts.append(now["other_feat" if value.is_floating_point() else "other_lab"])
        return torch.cat(parts)

    def places(batch_size, places, count, generator):  # main adds each image's first place
        return now["selected"].view(2, 2, -1) - torch.tensor([0, 36])[:, None]

    bank = []

    class Bank(NegativeBank):
        def __init__(self, *args):
            super().__init__(*args)
            bank.append(self)

    monkeypatch.setattr(dcc, "make_network", lambda *_: net)
    monkeypatch.setattr(dcc, "make_projector", lambda *_: nn.Identity())
    monkeypatch.setattr(dcc, "NegativeBank", Bank)
    monkeypatch.setattr(dcc, "EMBEDDING", 8)
    monkeypatch.setattr(dcc, "make_batches", labeled)
    monkeypatch.setattr(dcc, "make_pairs", pairs)
    monkeypatch.setattr(dcc, "change_colors", lambda image, *_: image)
    monkeypatch.setattr(dcc, "draw_places", places)
    monkeypatch.setattr(dcc, "gather_crops", gathered)
    monkeypatch.setattr(dcc.Run, "log", lambda self, step, row, pictures: rows.append(row))
    each = conf["selected_num"] // 2
    args = quick(
        Args, batch_size=2, crop_size=48, steps=50, log_every=1, eval_every=10**6, epsilon=epsilon,
        negatives=each, bank_steps=(conf["step_save"] + 1) * conf["world"], optimizer="sgd",
        temperature=conf["temp"], confidence_threshold=conf["pos_thresh"], dcc_start=0.0,
        lambda_u=conf["weight_unsup"], ramp_up=0.0, supervised_loss="ce",
    )  # fmt: skip
    with pytest.raises(RecordedError):
        main(args)
    released = epsilon > 0
    for name, row, gradient in zip(names, rows, gradients, strict=True):
        out = golden.part(f"{name}/out/")
        losses = (out["loss1"] + out["loss2"]).item()
        if group == "edge/single_label" and not released:
            losses = 0.0  # theirs is what epsilon makes of no negative at all
        tolerance = {"rel": 2e-5 if released else 2e-2, "abs": 2e-6}
        assert row["loss/contrastive"] == pytest.approx(losses, **tolerance)
        if "loss_sup" in out:
            assert row["loss/sup"] == pytest.approx(out["loss_sup"].item(), rel=2e-5)
        for key in ("enc1", "enc2", "logits_l"):
            found, expected = gradient[key], out.get(f"grad_{key}")
            if expected is None:
                continue
            if released:
                torch.testing.assert_close(found, expected, **GRADIENTS)
            elif group == "edge/single_label":
                assert found.abs().max() == 0
            elif group == "steps":  # up to what epsilon takes from the hardest anchors
                assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98
            if group in ("edge/unconfident", "edge/identical_views"):
                assert found.abs().max() == 0
    if group == "steps":
        last = golden.part(f"{names[-1]}/out/")
        torch.testing.assert_close(bank[0].embeddings, last["neg_feats"], **VALUES)
        assert torch.equal(bank[0].labels, last["neg_labels"])


# --- crops and places


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
@pytest.mark.parametrize(("name", "crop"), [("voc", 320), ("city", 720)])
def test_rectangles_are_the_authors(path, name, crop, monkeypatch):
    """From their corners: of the second one they recorded where it lies from the first."""
    golden = load_golden(path)
    if f"pair_sampler/{name}" not in golden:
        pytest.skip("in the whole collection only")
    for row in golden[f"pair_sampler/{name}"]:
        h0, w0, longside, x1, y1, *corners, _, _, _ = map(int, row)
        first, second = corners[:4], corners[4:]
        longest = max(h0, w0)
        size = [int(side * longside / longest + 0.5) for side in (h0, w0)]
        draws = [y1, x1, y1 + first[0] - second[0], x1 + first[1] - second[1]]
        monkeypatch.setattr(torch, "randint", lambda n, *_, d=draws, **__: d.pop(0))
        corner_1, corner_2, rectangle_1, rectangle_2 = overlapping_crops(*size, crop, None)
        assert corner_1 == (y1, x1)
        assert list(rectangle_1) == first and list(rectangle_2) == second


@pytest.mark.parametrize(("size", "crop"), [
    ((375, 500), 320), ((1024, 2048), 720), ((300, 500), 320), ((333, 99), 96), ((50, 60), 96),
    ((65, 66), 64), ((64, 64), 64), ((5, 70), 64),
])  # fmt: skip
def test_overlapping_crops(size, crop):
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(300):
        *corners, rectangle_1, rectangle_2 = overlapping_crops(*size, crop, generator)
        seen.add((*corners[0], *corners[1]))
        for corner in corners:
            assert all(0 <= a <= max(0, n - crop) for a, n in zip(corner, size, strict=True))
        for corner, (top, left, bottom, right) in zip(
            corners, (rectangle_1, rectangle_2), strict=True
        ):
            assert not any(v % 8 for v in (top, left, bottom, right))
            assert 0 <= top <= bottom <= crop and 0 <= left <= right <= crop
            assert bottom + corner[0] <= size[0] and right + corner[1] <= size[1]  # no padding
        for axis in (0, 1):  # the same place of the image, and nothing of it is lost
            a, b = corners[0][axis], corners[1][axis]
            assert rectangle_1[axis] + a == rectangle_2[axis] + b == max(a, b)
            end = min(min(a, b) + crop, max(a, b) + size[axis] // 8 * 8)
            assert rectangle_1[2 + axis] + a == rectangle_2[2 + axis] + b == end
        sides = [crop - abs(a - b) for a, b in zip(*corners, strict=True)]
        shared = max(0, sides[0]) * max(0, sides[1])
        assert shared / (2 * crop**2 - shared) >= 0.1
    places = math.prod(max(0, n - crop) + 1 for n in size)
    assert len(seen) > min(places, 40) - 1


def test_overlap_statistics_are_the_authors():
    generator = torch.Generator().manual_seed(0)
    for size, crop, expected in (((450, 600), 320, 0.66), ((1434, 2867), 720, 0.45)):
        shares = []
        for _ in range(400):
            *_, (top, left, bottom, right), _ = overlapping_crops(*size, crop, generator)
            shares.append((bottom - top) * (right - left) / crop**2)
        assert sum(shares) / 400 == pytest.approx(expected, abs=0.08)


def test_crops_coincide_when_no_overlap_is_enough():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b, rectangle_1, rectangle_2 = overlapping_crops(500, 500, 64, generator, 1.0)
        assert a == b and rectangle_1 == rectangle_2 == (0, 0, 64, 64)
    assert len({overlapping_crops(500, 500, 64, generator, 1.0)[0] for _ in range(20)}) > 15


def coordinates(height, width):
    """An image whose pixels say where they are, and the label that says it too, coarsely."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([y, x, y * 0 + 7]).to(torch.uint8)
    return tv_tensors.Image(image), tv_tensors.Mask(((y // 16) * 10 + x // 16).to(torch.uint8))


@pytest.mark.parametrize(("size", "scale"), [
    ((120, 150), (1.0, 1.0)), ((120, 150), (0.5, 1.7)), ((60, 150), (1.0, 1.0)), ((33, 40), (1, 1)),
])  # fmt: skip
def test_both_crops_show_the_same_at_the_same_place(size, scale):
    view = PairView(64, scale, 0.1)
    for seed in range(12):
        torch.manual_seed(seed)
        image, label, rectangle, flip = view(*coordinates(*size))
        assert image.shape == (2, 3, 64, 64) and image.dtype == torch.uint8
        assert label.shape == (2, 64, 64) and flip.shape == (2,) and rectangle.shape == (2, 4)
        cut = []
        for v in range(2):
            shown = (image[v], label[v][None])
            if flip[v]:
                shown = [each.flip(2) for each in shown]
            top, left, bottom, right = rectangle[v].tolist()
            cut.append([each[:, top:bottom, left:right] for each in shown])
            assert (cut[v][1] != 255).all()  # no padding in the overlap
        assert torch.equal(cut[0][0], cut[1][0]) and torch.equal(cut[0][1], cut[1][1])
        # The same by way of the places of maps, as the loss takes them.
        maps = [image[v][None, 0, ::8, ::8] if not flip[v] else image[v][None, 0, ::8, 7::8]
                for v in range(2)]  # fmt: skip
        index = overlap_places(rectangle[None], flip[None], 8)
        values = take(torch.stack(maps), index)
        assert len(index[0]) == cut[0][0][0, ::8, ::8].numel()
        assert torch.equal(values[0], values[1])
        if scale == (1.0, 1.0):  # and they are the image's own pixels
            assert torch.equal(values[0], cut[0][0][0, ::8, ::8].flatten())
            assert (cut[0][0][1].diff(dim=1) == 1).all()


def test_scale_of_the_pair():
    wide = {}
    for scale in (0.5, 1.0, 2.0):
        torch.manual_seed(0)
        image, _, _, flip = PairView(32, (scale, scale), 0.1)(*coordinates(200, 200))
        row = image[0, 1, 16].flip(0) if flip[0] else image[0, 1, 16]
        wide[scale] = int(row[-1]) - int(row[0])
    assert wide[1.0] == 31 and abs(wide[0.5] - 62) <= 2 and abs(wide[2.0] - 15.5) <= 1


def test_places_are_those_of_loops():
    rectangle = torch.tensor([[[0, 8, 16, 32], [8, 0, 24, 24]], [[0, 0, 0, 8], [0, 0, 0, 8]],
                              [[8, 8, 32, 16], [0, 24, 24, 32]]])  # fmt: skip
    flip = torch.tensor([[True, False], [False, False], [False, True]])
    expected = [[], []]
    for image in range(3):
        for v in range(2):
            top, left, bottom, right = (rectangle[image, v] // 8).tolist()
            for row in range(top, bottom):
                for column in range(left, right):
                    shown = 3 - column if flip[image, v] else column
                    expected[v].append(((v * 3 + image) * 4 + row) * 4 + shown)
    assert overlap_places(rectangle, flip, 4).tolist() == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_pairs_of_a_run(workers, quick):
    """Both crops show the same at the places of the overlap, on any number of processes."""
    args = dcc.resolve(quick(Args, batch_size=8, accumulate=2, num_workers=workers))
    data, split = dcc.open_data(args)

    def pairs(rank, world_size, count, labels="known"):
        place = (3, rank, world_size, torch.device("cpu"))
        stream = dcc.make_pairs(args, data, split.unlabeled, "unlabeled", place, labels)
        return [next(stream) for _ in range(count)]

    batches = pairs(0, 1, 6)  # two micro-batches of four images a step
    for crops, label, overlap in batches:
        shown = torch.stack([F.avg_pool2d(crop, 8) for crop in crops]).permute(0, 1, 3, 4, 2)
        assert shown.shape == (2, 4, 4, 4, 3) and label.shape == (2, 4, 4, 4)
        one, two = take(shown, overlap)
        assert len(one) > 10
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
        assert label.dtype == torch.int64 and set(label.unique().tolist()) <= {*range(8), 254, 255}
        one, two = take(label, overlap)  # a place is flipped about its edge, its label is a pixel
        assert (one == two).float().mean() > 0.8
    assert all((label >= 254).all() for _, label, _ in pairs(0, 1, 2, "none"))
    for rank in range(2):
        parts = pairs(rank, 2, 6)
        for step in (0, 2, 4):  # of two micro-batches
            for crop in range(2):
                whole = torch.cat([images[crop] for images, *_ in batches[step : step + 2]])
                part = torch.cat([images[crop] for images, *_ in parts[step : step + 2]])
                assert torch.equal(part, whole[4 * rank : 4 * rank + 4])


def test_crops_that_share_nothing_have_no_places():
    generator = torch.Generator().manual_seed(0)
    pairs = (overlapping_crops(200, 64, 64, generator, 0.0) for _ in range(99))
    apart = (pair for pair in pairs if abs(pair[0][0] - pair[1][0]) > 64)
    *_, rectangle_1, rectangle_2 = next(apart)
    index = overlap_places(torch.tensor([[rectangle_1, rectangle_2]]), torch.ones(1, 2) > 0, 8)
    assert index.shape == (2, 0) and take(torch.ones(2, 1, 8, 8, 5), index).shape == (2, 0, 5)


def test_drawn_places():
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(draw_places(3, 16, 16, generator)[1, 2], torch.arange(16))
    drawn = draw_places(3, 16, 10, generator)
    assert drawn.shape == (2, 3, 10) and drawn.max() < 16
    assert all(len(set(row)) == 10 for row in drawn.flatten(0, 1).tolist())
    assert len({tuple(row) for row in drawn.flatten(0, 1).tolist()}) == 6


# --- colors


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]], ids=str)
def test_jitter_is_torchvisions(order):
    image = torch.rand(3, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([[1.3, 0.7, 1.2, 0.08], [0.6, 1.4, 0.6, -0.1], [1.0, 1.0, 1.0, 0.0]])
    found = dcc.jitter(image, factors, order)
    names = ["brightness", "contrast", "saturation", "hue"]
    for one, expected, row in zip(found, image, factors.tolist(), strict=True):
        for number in order:
            expected = getattr(TF, f"adjust_{names[number]}")(expected, row[number])
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2], image[2])


def test_colors_change_as_often_as_released_and_on_any_number_of_processes():
    scene = torch.randint(256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    image = normalize(scene.to(torch.uint8).expand(400, -1, -1, -1))
    whole = dcc.change_colors(image, 400, 0, step_generator(0, "colors", 5))
    part = dcc.change_colors(image[:50], 400, 150, step_generator(0, "colors", 5))
    torch.testing.assert_close(part, whole[150:200])
    assert not torch.equal(whole, dcc.change_colors(image, 400, 0, step_generator(0, "colors", 6)))
    shown = denormalize(whole).int()
    is_gray = (shown.amax(1) - shown.amin(1)).flatten(1).amax(1) <= 1
    same = (whole - image).flatten(1).abs().amax(1) < 1e-4
    assert is_gray.float().mean().item() == pytest.approx(0.2, abs=0.06)
    assert same.float().mean().item() == pytest.approx(0.5 * 0.2 * 0.8, abs=0.04)
    light = dcc.gray(shown.float())  # of noise: only blur makes neighbors alike
    light = light - light.mean((1, 2, 3), keepdim=True)
    alike = (light[..., 1:] * light[..., :-1]).mean((1, 2, 3)) / light.square().mean((1, 2, 3))
    assert (alike > 0.4).float().mean().item() == pytest.approx(0.5, abs=0.07)
    blurred = TF.gaussian_blur(image[:1], [5, 5])  # its own deviation for this kernel
    assert ((whole - blurred).flatten(1).abs().amax(1) < 1e-4).any()


# --- the bank


def test_bank_keeps_the_last_steps_oldest_first(monkeypatch):
    monkeypatch.setattr(dcc, "EMBEDDING", 2)
    cpu = torch.device("cpu")
    bank = NegativeBank(6, cpu)
    for step in range(4):
        rows = torch.full((3, 2), float(step), requires_grad=True)
        bank.add(rows, torch.full((3,), step))
        expected = [s for s in (step - 1, step) if s >= 0 for _ in range(3)]
        assert bank.labels.tolist() == expected
        assert bank.embeddings[:, 0].tolist() == [float(s) for s in expected]
        assert not bank.embeddings.requires_grad
    other = NegativeBank(6, cpu)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.embeddings, bank.embeddings)
    assert torch.equal(other.labels, bank.labels)
    one = NegativeBank(3, cpu)
    for step in range(3):
        one.add(torch.full((3, 2), float(step)), torch.full((3,), step))
    assert one.labels.tolist() == [2, 2, 2]
    saved = one.state_dict()["embeddings"]
    assert len(saved.untyped_storage()) == saved.numel() * 4  # saved as it is


def test_gathered_rows_are_in_the_order_of_the_global_batch(monkeypatch):
    own, other = torch.arange(8).view(2, 4), 100 + torch.arange(8).view(2, 4)

    def all_gather(parts, value):
        for part, rows in zip(parts, (own, other), strict=True):
            part.copy_(rows)

    monkeypatch.setattr(dcc.dist, "all_gather", all_gather)
    expected = [0, 1, 2, 3, 100, 101, 102, 103, 4, 5, 6, 7, 104, 105, 106, 107]
    assert dcc.gather_crops(own, 2).tolist() == expected
    assert dcc.gather_crops(own, 1).tolist() == list(range(8))


@pytest.mark.parametrize(("flags", "count"), [
    ({}, 2 * 2 * 4 * 16), ({"bank_steps": 1}, 2 * 4 * 16), ({"negatives": 3}, 2 * 2 * 4 * 3),
    ({"accumulate": 2}, 2 * 2 * 4 * 16), ({"steps": 1}, 2 * 4 * 16),
], ids=str)  # fmt: skip
def test_bank_of_a_run(quick, flags, count):
    result = main(quick(Args, **({"steps": 3} | flags)))
    bank = torch.load(f"{result['run_dir']}/last.pt", weights_only=True)["bank"]
    assert bank["embeddings"].shape == (count, dcc.EMBEDDING) and bank["labels"].shape == (count,)
    assert bank["embeddings"].norm(dim=1).sub(1).abs().max() < 1e-5
    assert bank["labels"].min() >= 0 and bank["labels"].max() < 8


# --- the network and runs


def test_network_gives_places_and_keeps_the_classifier_to_the_labels():
    network = dcc.DeepLabV3Plus(5, "resnet14")
    whole = dcc.ContrastiveNetwork(network, dcc.make_projector(Args(), 64))
    images = torch.randn(3, 2, 3, 64, 48)  # labeled, and two crops
    logits_l, embedding, pseudo_label, confidence = whole(*images)
    assert embedding.shape == (2, 2, 8, 6, 128)
    assert pseudo_label.shape == confidence.shape == (2, 2, 8, 6)
    torch.testing.assert_close(embedding.norm(dim=4), torch.ones(2, 2, 8, 6))
    assert not confidence.requires_grad and not pseudo_label.requires_grad
    (embedding * torch.randn_like(embedding)).sum().backward()
    assert network.classifier.weight.grad is None
    for name, parameter in whole.named_parameters():
        if "classifier" not in name:
            assert parameter.grad.abs().max() > 0, name
    for crop, image in enumerate(images[1:]):
        features = F.avg_pool2d(network.head(*network.encode(image)), 2)
        prob = network.classifier(features).softmax(1)
        torch.testing.assert_close(confidence[crop], prob.amax(1).detach())
        assert torch.equal(pseudo_label[crop], prob.argmax(1))
    assert torch.equal(logits_l, network(images[0]))


@pytest.mark.parametrize("flags", [{}, {"directional": False, "accumulate": 2}], ids=str)
def test_it_trains(quick, flags):
    flags |= {"confidence_threshold": 0.4, "dcc_start": 0.1, "ramp_up": 0.1}
    args = quick(Args, steps=40, log_every=1, lr=3e-3, log_pseudo_accuracy=True, **flags)
    result = main(args)
    rows = read_log(result["run_dir"])
    assert result["steps"] == 40 and 0 <= result["miou"] <= result["best_miou"] <= 1
    loss = [row["loss/sup"] for row in rows]
    assert sum(loss[-10:]) < 0.9 * sum(loss[:10])
    for key in ("pseudo/confidence", "pseudo/active", "pseudo/agreement", "pseudo/accuracy"):
        assert all(0 <= row[key] <= 1 for row in rows), key
    assert rows[-1]["pseudo/active"] > 0 and rows[-1]["pseudo/accuracy"] > 0
    assert rows[-1]["pseudo/agreement"] > 0.3
    assert all(math.isfinite(row["loss/contrastive"]) for row in rows)


BASE = {"confidence_threshold": 0.2, "dcc_start": 0.0, "ramp_up": 0.0, "lr": 3e-3, "steps": 3}


@pytest.mark.parametrize("flags", [
    {"head_lr_mult": 2.0}, {"pair_scale": (1.0, 1.0)}, {"min_overlap": 1.0}, {"temperature": 0.3},
    {"confidence_threshold": 0.4}, {"directional": False}, {"bank_steps": 1}, {"negatives": 9},
    {"epsilon": 0.1}, {"lambda_u": 0.2}, {"dcc_start": 0.5}, {"ramp_up": 1.0},
], ids=str)  # fmt: skip
def test_every_flag_has_an_effect(quick, flags, base_run):
    changed = weights(main(quick(Args, **(BASE | flags)))["run_dir"])
    keys = [key for key in base_run if key.startswith("/network") and key.endswith("weight")]
    assert any(not torch.equal(base_run[key], changed[key]) for key in keys)


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    args = Args(
        dataset="shapes", device="cpu", num_workers=0, batch_size=4, crop_size=32, split="8",
        log_every=2, eval_every=1000, save_every=1000, **BASE,
        output_dir=str(tmp_path_factory.mktemp("base")),
    )  # fmt: skip
    return weights(main(args)["run_dir"])


def test_the_same_flags_give_the_same_run(quick, base_run):
    again = weights(main(quick(Args, **BASE))["run_dir"])
    assert_same(base_run, again)


def test_weight_before_and_after_the_start(quick):
    """Nothing of the contrast acts before its start: the run is that of any weight."""
    flags = BASE | {"dcc_start": 0.5, "steps": 2}
    one, two = (
        weights(main(quick(Args, lambda_u=w, exp_name=f"w{w}", **flags))["run_dir"])
        for w in (0.1, 5.0)
    )
    assert any(not torch.equal(one[key], two[key]) for key in one)
    flags["dcc_start"] = 1.0
    one, two = (
        weights(main(quick(Args, lambda_u=w, exp_name=f"v{w}", **flags))["run_dir"])
        for w in (0.1, 5.0)
    )
    assert_same(one, two)


def test_unlabeled_labels_are_never_read(quick, monkeypatch):
    def make(of, **flags):  # with places that are sure enough to learn
        return quick(of, **(BASE | flags))

    assert_unlabeled_labels_are_not_read(dcc, make, monkeypatch)


def test_bf16_keeps_every_gradient(quick):
    """The pass over unlabeled images must not take the classifier's weight from the labeled."""
    result = main(quick(Args, amp="bf16", eval_every=1, **(BASE | {"steps": 2})))
    checkpoint = torch.load(f"{result['run_dir']}/last.pt", weights_only=True)
    state = checkpoint["optimizer"]["state"]
    for number, moments in state.items():
        assert moments["exp_avg"].abs().max() > 0, f"parameter {number} got no gradient"
    assert checkpoint["bank"]["embeddings"].dtype == torch.float32


@pytest.mark.parametrize("flags", [
    {"crop_size": 36}, {"pair_scale": (0.0, 1.0)}, {"pair_scale": (1.0, 9.0)},
    {"min_overlap": -0.1}, {"min_overlap": 1.5}, {"temperature": 0.0},
    {"temperature": float("nan")}, {"confidence_threshold": 1.5}, {"bank_steps": 0},
    {"negatives": 0}, {"negatives": 17}, {"epsilon": -1.0}, {"lambda_u": float("nan")},
    {"dcc_start": -0.1}, {"ramp_up": 1.5}, {"head_lr_mult": -1.0},
], ids=str)  # fmt: skip
def test_bad_flags(quick, flags):
    with pytest.raises(dcc.UserError, match=next(iter(flags)).replace("_", "-")):
        main(quick(Args, **flags))


def test_paper_rows():
    for dataset in PAPER:
        args = dcc.resolve(Args(dataset=dataset, split="1/8"))
        assert [name for name, value in vars(args).items() if value is None] == ["split_seed"]
    voc, city = (dcc.resolve(Args(dataset=name)) for name in ("voc", "cityscapes"))
    assert (voc.lr, voc.head_lr_mult, voc.crop_size, voc.steps) == (0.001, 10.0, 320, 92_560)
    assert (city.lr, city.head_lr_mult, city.crop_size, city.steps) == (0.01, 10.0, 720, 92_560)
    assert voc.dcc_start * voc.steps == city.dcc_start * city.steps == 5 * 1157

    def count(args):
        return args.bank_steps * 2 * args.batch_size * args.negatives

    deep = dcc.resolve(Args(backbone="resnet101"))
    assert [count(args) for args in (voc, deep, city)] == [51_200, 76_800, 129_600]
    for dataset in ("camvid", "shapes"):
        args = dcc.resolve(Args(dataset=dataset))
        assert (args.optimizer, args.lr, args.ramp_up) == ("adamw", 1e-3, 0.4)


def test_learning_rates_are_the_authors():
    golden = load_golden(GOLDENS[-1])
    if "poly/num_epochs" not in golden:
        pytest.skip("in the whole collection only")
    voc = dcc.resolve(Args())
    total = int(golden["poly/num_epochs"] * golden["poly/iters_per_epoch"])
    for step, (head, backbone) in enumerate(golden["poly/lr_used_head_backbone"]):
        lr = dcc.poly_lr(voc.lr, step, total)
        np.testing.assert_allclose([voc.head_lr_mult * lr, lr], [head, backbone], rtol=1e-9)
    args = dcc.resolve(Args(weights="none"))
    network, projector = dcc.DeepLabV3Plus(21, "resnet14"), dcc.make_projector(args, 64)
    optimizer = dcc.make_optimizer([network, projector], args, torch.device("cpu"))
    rates = {id(p): g["lr_mult"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in network.named_parameters():
        assert rates[id(parameter)] == (1.0 if name.startswith("backbone") else 10.0)
    assert all(rates[id(parameter)] == 10.0 for parameter in projector.parameters())
