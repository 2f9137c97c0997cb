"""Scores, windows, several scales, sharded validation, pictures."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden_files, load_golden

from common import evaluation
from common.datasets import IGNORE
from common.evaluation import (
    Protocol,
    colorize,
    confusion_matrix,
    confusion_of,
    iou_per_class,
    mean_iou,
    padded_logits,
    predict,
    side_by_side,
    sliding_window_logits,
    window_starts,
)
from common.transforms import normalize

GOLDENS = golden_files("cps_seed*.npz")


def pointwise(image: torch.Tensor) -> torch.Tensor:
    """Logits of 4 classes from each pixel alone."""
    weight = torch.linspace(-2, 2, 12, dtype=image.dtype).view(4, 3, 1, 1)
    return F.conv2d(image, weight)


def local(image: torch.Tensor) -> torch.Tensor:
    """Logits of 4 classes from neighborhoods, left and right weighted differently."""
    weight = torch.linspace(-1, 2, 108, dtype=image.dtype).sin().view(4, 3, 3, 3)
    return F.conv2d(image, weight, padding=1)


def symmetric(image: torch.Tensor) -> torch.Tensor:
    return local(image) + local(image.flip(3)).flip(3)


def noise(*shape, seed=0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- scores --------------------------------------------------------------------------------------


def test_scores_by_hand():
    label = torch.tensor([[0, 0, 1], [1, IGNORE, 1]])
    prediction = torch.tensor([[0, 1, 1], [1, 0, 3]])
    confusion = confusion_matrix(label, prediction, 4)
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 2, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert confusion.dtype == torch.int64
    iou = iou_per_class(confusion)
    assert iou.dtype == torch.float64
    assert iou[:2].tolist() == [1 / 2, 2 / 4]
    assert math.isnan(iou[2]) and iou[3] == 0  # in neither; only predicted
    assert mean_iou(confusion) == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert isinstance(mean_iou(confusion), float)
    assert mean_iou(torch.eye(3, dtype=torch.int64)) == 1
    assert math.isnan(mean_iou(torch.zeros(3, 3, dtype=torch.int64)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("num_classes", [2, 19, 255])
def test_confusion_matrix_against_a_loop(dtype, num_classes):
    draw = torch.Generator().manual_seed(num_classes)
    label = torch.randint(0, num_classes, (2, 9, 11), generator=draw)
    prediction = torch.randint(0, num_classes, (2, 9, 11), generator=draw)
    label[torch.rand(label.shape, generator=draw) < 0.2] = IGNORE
    expected = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for truth, guess in zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True):
        if truth != IGNORE:
            expected[truth, guess] += 1
    found = confusion_matrix(label.to(dtype), prediction.to(dtype), num_classes)
    assert torch.equal(found, expected)
    ignored = torch.full_like(label, IGNORE)
    assert not confusion_matrix(ignored, prediction, num_classes).any()


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_scores_of_the_release(path):
    golden, total = load_golden(path).part("miou."), 0
    for i in range(3):
        confusion = confusion_matrix(golden[f"in.label{i}"], golden[f"in.pred{i}"], 21)
        assert torch.equal(confusion, golden[f"out.hist{i}"])
        total = total + confusion
    torch.testing.assert_close(
        iou_per_class(total), golden["out.iou"], rtol=0, atol=1e-12, equal_nan=True
    )
    assert mean_iou(total) == pytest.approx(float(golden["out.mean_iou"]), abs=1e-12)


# ---- windows -------------------------------------------------------------------------------------


def test_window_starts():
    assert window_starts(1024, 800, 534) == [0, 224]
    assert window_starts(2048, 800, 534) == [0, 534, 1068, 1248]
    assert window_starts(800, 800, 534) == window_starts(3, 800, 534) == [0]
    assert window_starts(66, 32, 17) == [0, 17, 34]  # the last one fits without a shift
    for length in range(1, 60):
        for crop_size, stride in ((1, 1), (7, 5), (8, 8), (20, 1)):
            starts = window_starts(length, crop_size, stride)
            covered = {p for start in starts for p in range(start, start + crop_size)}
            assert covered >= set(range(length))
            assert starts == sorted(set(starts)) and starts[0] == 0
            assert starts[-1] + crop_size == max(length, crop_size)
            assert all(start == i * stride for i, start in enumerate(starts[:-1]))
            assert starts[-1] <= (len(starts) - 1) * stride
    for stride in (0, -1, 9):
        with pytest.raises(ValueError, match=f"stride {stride} .* windows of 8 pixels"):
            window_starts(20, 8, stride)


@pytest.mark.parametrize("size", [(32, 32), (20, 31), (33, 75), (75, 20), (64, 47)])
def test_windows_agree_with_the_whole_image(size):
    """A network that looks at single pixels cannot tell windows apart, padding included."""
    image = noise(2, 3, *size)
    out = sliding_window_logits(pointwise, image, 4, 32, 21)
    torch.testing.assert_close(out, pointwise(image), rtol=0, atol=1e-12)


def test_windows_are_square_and_overlaps_are_averaged():
    seen, image = [], noise(1, 3, 40, 50)
    positions = torch.arange(2000, dtype=torch.float64).view(40, 50)
    image[:, 0] = positions

    def numbered(window):
        """The first window gives 1 everywhere, the second 2, and so on."""
        seen.append(window)
        return torch.full((1, 2, *window.shape[2:]), float(len(seen)), dtype=torch.float64)

    out = sliding_window_logits(numbered, image, 2, 24, 16)
    corners = [(top, left) for top in (0, 16) for left in (0, 16, 26)]
    assert [window.shape for window in seen] == [(1, 3, 24, 24)] * 6
    total, count = torch.zeros(40, 50).double(), torch.zeros(40, 50).double()
    for number, (top, left) in enumerate(corners):
        torch.testing.assert_close(
            seen[number], image[:, :, top : top + 24, left : left + 24], rtol=0, atol=0
        )
        total[top : top + 24, left : left + 24] += number + 1
        count[top : top + 24, left : left + 24] += 1
    assert count.min() == 1 and count.max() == 4
    torch.testing.assert_close(out[0, 0], total / count, rtol=0, atol=1e-12)
    assert torch.equal(out[0, 0], out[0, 1])


def test_average_of_constants_is_constant():
    def constant(window):
        return torch.tensor([0.25, -3.0]).view(1, 2, 1, 1).expand(-1, -1, *window.shape[2:])

    out = sliding_window_logits(constant, torch.zeros(1, 3, 45, 77), 2, 32, 11)
    assert out.dtype == torch.float32
    assert (out[:, 0] == 0.25).all() and (out[:, 1] == -3).all()


def test_small_images_are_padded_with_the_mean_color():
    seen = []

    def model(window):
        seen.append(window)
        return local(window)

    image = 5 + noise(2, 3, 9, 14)
    for out in (sliding_window_logits(model, image, 4, 16, 8), padded_logits(model, image, 16)):
        padded = F.pad(image, (1, 1, 3, 4))  # left, right, top, bottom: the odd row goes below
        torch.testing.assert_close(seen.pop(), padded, rtol=0, atol=0)
        torch.testing.assert_close(out, local(padded)[:, :, 3:12, 1:15], rtol=0, atol=1e-12)
    whole = padded_logits(local, noise(1, 3, 20, 10), 16)
    assert whole.shape == (1, 4, 20, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_never_in_half_precision(dtype):
    image = torch.zeros(1, 3, 20, 20, dtype=torch.float64 if dtype == torch.float64 else None)

    def model(window):
        return torch.full((1, 2, *window.shape[2:]), 1.5, dtype=dtype)

    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert sliding_window_logits(model, image, 2, 16, 8).dtype == expected
    assert padded_logits(model, image, 16).dtype == expected


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_windows_of_the_release(path):
    """The release adds overlapping logits and we average them: the same up to the count, and the
    same predictions.

    `wide` is lower than the window but wider: there the release pads the raw image with black, and
    we pad with the mean color, so its case is repeated on an image that is black there already.
    """
    golden = load_golden(path)
    w1, b1, w2, b2 = (torch.from_numpy(golden[f"eval.in.{name}"]) for name in "w1 b1 w2 b2".split())

    def network(window):
        logits = F.conv2d(F.conv2d(window, w1, b1, stride=2, padding=1).relu(), w2, b2)
        return F.interpolate(logits, window.shape[2:], mode="bilinear", align_corners=True)

    protocol = Protocol(pad_to=32, window=32)
    assert protocol.stride == int(golden["eval.derived.stride"]) == 22
    for name in ("small", "equal", "wide", "big", "tall"):
        image = torch.from_numpy(golden[f"eval.{name}.in.img_rgb"]).permute(2, 0, 1)[None]
        height, width = image.shape[2:]
        count = torch.zeros(height, width)
        for top in window_starts(height, 32, 22):
            for left in window_starts(width, 32, 22):
                count[top : top + 32, left : left + 32] += 1
        added = torch.from_numpy(golden[f"eval.{name}.out.score_sum"]).permute(2, 0, 1)
        ours = predict(network, normalize(image), 7, protocol)[0]
        if name == "wide":
            inner = slice(2, 28)  # the border's rows see the padding
            torch.testing.assert_close((ours * count)[:, inner], added[:, inner], rtol=0, atol=2e-5)
            black = normalize(F.pad(image, (0, 0, 1, 2)))
            ours = sliding_window_logits(network, black, 7, 32, 22)[0, :, 1:30]
        torch.testing.assert_close(ours * count, added, rtol=0, atol=2e-5)
        assert torch.equal(ours.argmax(0), golden.tensor(f"eval.{name}.out.pred"))


# ---- protocols -----------------------------------------------------------------------------------


def test_protocols_name_themselves():
    assert str(Protocol(pad_to=512)) == "whole image, scales 1, no flip"
    assert str(Protocol(512, 800)) == "window 800, stride 534, scales 1, no flip"
    several = Protocol(512, scales=(0.5, 1.0, 1.75), flip=True)
    assert str(several) == "whole image, scales 0.5, 1, 1.75, flip"
    assert Protocol(512, 512).stride == 342


def test_plain_prediction_is_logits():
    image = noise(2, 3, 20, 30)
    whole = predict(local, image, 4, Protocol(pad_to=8))
    torch.testing.assert_close(whole, local(image), rtol=0, atol=1e-12)
    windows = predict(local, image, 4, Protocol(pad_to=8, window=16))
    expected = sliding_window_logits(local, image, 4, 16, 11)
    torch.testing.assert_close(windows, expected, rtol=0, atol=0)
    assert not torch.allclose(windows, whole)


@pytest.mark.parametrize("window", [None, 16])
def test_flip(window):
    image = noise(1, 3, 18, 25)
    plain, flip = Protocol(32, window), Protocol(32, window, flip=True)
    scores = predict(local, image, 4, flip)
    mirrored = predict(local, image.flip(3), 4, flip)
    torch.testing.assert_close(mirrored.flip(3), scores, rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.sum(1), torch.ones(1, 18, 25).double())
    lopsided = predict(local, image.flip(3), 4, plain).flip(3)
    assert not torch.allclose(lopsided, predict(local, image, 4, plain))
    both = (predict(local, image, 4, plain).softmax(1) + lopsided.softmax(1)) / 2
    torch.testing.assert_close(scores, both, rtol=0, atol=1e-12)


def test_flip_changes_nothing_for_a_symmetric_network():
    image = noise(1, 3, 18, 26)  # an even margin: 3 pixels on each side
    for window in (None, 26):
        plain = predict(symmetric, image, 4, Protocol(32, window)).softmax(1)
        flip = predict(symmetric, image, 4, Protocol(32, window, flip=True))
        torch.testing.assert_close(flip, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("window", [None, 16])
def test_scales_are_averaged(flip, window):
    image, parts = noise(2, 3, 21, 30), []
    for height, width in ((10, 15), (21, 30), (32, 45)):  # 10.5 and 31.5 rounded to even
        view = F.interpolate(image, (height, width), mode="bilinear", align_corners=False)
        for mirror in (False, True) if flip else (False,):
            logits = predict(local, view.flip(3) if mirror else view, 4, Protocol(16, window))
            logits = logits.flip(3) if mirror else logits
            logits = F.interpolate(logits, (21, 30), mode="bilinear", align_corners=False)
            parts.append(logits.softmax(1))
    protocol = Protocol(16, window, (0.5, 1.0, 1.5), flip)
    scores = predict(local, image, 4, protocol)
    torch.testing.assert_close(scores, sum(parts) / len(parts), rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.sum(1), torch.ones(2, 21, 30).double())
    tiny = predict(local, noise(1, 3, 1, 3), 4, Protocol(4, scales=(0.25,)))
    assert tiny.shape == (1, 4, 1, 3)


# ---- validation ----------------------------------------------------------------------------------


class Images(torch.utils.data.Dataset):
    """Images of different sizes whose first channel decides; counts how often each is loaded."""

    def __init__(self, count: int):
        draw = torch.Generator().manual_seed(0)
        self.samples, self.loaded = [], []
        for i in range(count):
            size = (6 + i % 3, 9 - i % 2)
            image = torch.randint(0, 256, (3, *size), generator=draw).byte()
            label = torch.randint(0, 4, size, generator=draw).byte()
            label[0, : i % 4] = IGNORE
            self.samples.append((image, label))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.loaded.append(index)
        return self.samples[index]


def scores(world_size: int, monkeypatch, count: int = 7, **flags) -> tuple[list, list]:
    """The matrix that each of `world_size` processes counted, and the images they loaded."""
    counted, loaded = [], []
    monkeypatch.setattr(evaluation.dist, "all_reduce", counted.append)
    for rank in range(world_size):
        images = Images(count)
        place = ("cpu", rank, world_size)
        out = confusion_of(pointwise, images, 4, Protocol(pad_to=8), *place, **flags)
        assert out.dtype == torch.int64 and out.shape == (4, 4) and out.device.type == "cpu"
        if world_size == 1:
            counted.append(out)
        assert torch.equal(out, counted[rank])
        loaded += images.loaded
    return counted, loaded


def test_validate_counts_every_pixel(monkeypatch):
    (found,), loaded = scores(1, monkeypatch)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for image, label in Images(7).samples:
        guess = pointwise(normalize(image[None])).argmax(1)[0]
        expected += confusion_matrix(label, guess, 4)
    assert torch.equal(found, expected) and loaded == list(range(7))
    assert len(found.sum(0).nonzero()) > 1


@pytest.mark.parametrize("world_size", [2, 3, 7, 9])
def test_shards_add_up_to_the_whole(world_size, monkeypatch):
    (whole,), _ = scores(1, monkeypatch)
    shards, loaded = scores(world_size, monkeypatch)
    assert len(shards) == world_size  # one sum over the processes, also where one has no image
    assert torch.equal(sum(shards), whole)
    assert sorted(loaded) == list(range(7))


def test_validate_leaves_no_trace(monkeypatch):
    (whole,), _ = scores(1, monkeypatch)
    state = torch.get_rng_state()
    (again,), _ = scores(1, monkeypatch, num_workers=1)
    assert torch.equal(whole, again) and torch.equal(state, torch.get_rng_state())
    network = torch.nn.Conv2d(3, 4, 1)
    grads = []

    def model(image):
        grads.append(network(image).requires_grad)
        return network(image)

    confusion_of(model, Images(2), 4, Protocol(pad_to=8), "cpu")
    assert grads == [False, False]


def test_validate_uses_the_protocol():
    seen = []

    def model(image):
        seen.append(tuple(image.shape))
        return pointwise(image)

    protocol = Protocol(pad_to=8, window=6, scales=(1.0, 2.0), flip=True)
    confusion_of(model, Images(1), 4, protocol, "cpu")  # 6x9, and 12x18
    assert window_starts(9, 6, 4) == [0, 3] and window_starts(12, 6, 4) == [0, 4, 6]
    assert window_starts(18, 6, 4) == [0, 4, 8, 12]
    assert seen == [(1, 3, 6, 6)] * (2 * (1 * 2 + 3 * 4))


# ---- pictures ------------------------------------------------------------------------------------

PALETTE = ((0, 0, 0), (10, 20, 30), (200, 100, 50))


def test_colorize():
    label = torch.tensor([[0, 1], [2, IGNORE]])
    expected = torch.tensor([[[0, 10], [200, 255]], [[0, 20], [100, 255]], [[0, 30], [50, 255]]])
    for kind in (torch.int64, torch.uint8):
        picture = colorize(label.to(kind), PALETTE)
        assert picture.dtype == torch.uint8 and torch.equal(picture.long(), expected)
    batch = colorize(label.expand(5, 2, 2), PALETTE)
    assert batch.shape == (5, 3, 2, 2) and torch.equal(batch[4].long(), expected)
    assert torch.equal(colorize(label, [list(color) for color in PALETTE]).long(), expected)


def test_side_by_side():
    raw = torch.randint(0, 256, (5, 3, 6, 7), dtype=torch.uint8)
    label = torch.randint(0, 3, (5, 6, 7))
    label[:, 0, 0] = IGNORE
    confidence = torch.rand(5, 6, 7)
    confidence[:, 0, 0], confidence[:, 0, 1] = 0, 1
    logits = torch.randn(5, 3, 6, 7, requires_grad=True)
    images = [normalize(raw), normalize(255 - raw)]
    picture = side_by_side(images, [label, confidence, logits], PALETTE, count=2)
    assert picture.shape == (3, 2 * 6, 5 * 7) and picture.dtype == torch.uint8
    for line in range(2):
        panels = picture[:, 6 * line : 6 * line + 6].split(7, dim=2)
        assert torch.equal(panels[0], raw[line]) and torch.equal(panels[1], 255 - raw[line])
        assert torch.equal(panels[2], colorize(label[line], PALETTE))
        gray = panels[3]
        assert torch.equal(gray[0], gray[1]) and torch.equal(gray[0], gray[2])
        assert gray[0, 0, :2].tolist() == [0, 255]
        assert (gray[0].float() - 255 * confidence[line]).abs().max() <= 1
        assert torch.equal(panels[4], colorize(logits[line].argmax(0), PALETTE))
    assert side_by_side([normalize(raw)], [], PALETTE, count=9).shape == (3, 5 * 6, 7)
    half = side_by_side([normalize(raw).half()], [confidence.half()], PALETTE, count=1)
    assert half.shape == (3, 6, 14)
    small = side_by_side([normalize(raw)], [label[:, :2, :1]], PALETTE, count=1)[:, :, 7:]
    whole = label[0, :2, :1].repeat_interleave(3, 0).repeat_interleave(7, 1)
    assert torch.equal(small, colorize(whole, PALETTE))


def test_scores_of_arrays_agree_with_numpy():
    """Intersection over union of every class from pixel sets."""
    draw = np.random.default_rng(0)
    label, prediction = draw.integers(0, 5, (2, 30, 30))
    label[:3], label[label == 4] = IGNORE, 3  # class 4 is only predicted
    expected = []
    for number in range(6):
        truth = (label == number) & (label != IGNORE)
        guess = (prediction == number) & (label != IGNORE)
        union = (truth | guess).sum()
        expected.append((truth & guess).sum() / union if union else np.nan)
    confusion = confusion_matrix(torch.from_numpy(label), torch.from_numpy(prediction), 6)
    np.testing.assert_allclose(iou_per_class(confusion), expected, rtol=1e-12)
    assert np.isnan(expected[5]) and expected[4] == 0
    assert mean_iou(confusion) == pytest.approx(np.nanmean(expected))
