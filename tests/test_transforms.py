"""Views: geometry pixel by pixel, padding, the authors' augmentation; normalization."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, load_golden
from torchvision import tv_tensors

from common.datasets import IGNORE
from common.transforms import (
    MEAN,
    MEAN_COLOR,
    STD,
    LocatedView,
    WeakView,
    denormalize,
    normalize,
    pad_margins,
)

SCALES = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)


def sample(image, label):
    return tv_tensors.Image(image), tv_tensors.Mask(label)


def coordinates(height: int, width: int):
    """Red and green of a pixel are its row and column, and so is, modulo 250, its label."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([row, column, row * 0 + 7]).byte()
    return sample(image, ((width * row + column) % 250).byte())


def view_of(view, image, label, seed: int):
    torch.manual_seed(seed)
    return view(image, label)


# ---- normalization -------------------------------------------------------------------------------


def test_normalize():
    image = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    out = normalize(image)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    torch.testing.assert_close(out.double(), (image.double() / 255 - mean) / std, rtol=0, atol=1e-6)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    assert MEAN == (0.485, 0.456, 0.406) and STD == (0.229, 0.224, 0.225)


def test_denormalize_inverts():
    image = torch.arange(256, dtype=torch.uint8).expand(2, 3, 4, 256)
    assert torch.equal(denormalize(normalize(image)), image)
    assert denormalize(torch.full((1, 3, 1, 1), 9.0)).unique().tolist() == [255]
    assert denormalize(torch.full((1, 3, 1, 1), -9.0)).unique().tolist() == [0]


def test_mean_color_is_the_nearest_to_zero():
    image = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    nearest = normalize(image).abs()[0, :, 0].argmin(1)  # (3,)
    assert tuple(nearest.tolist()) == MEAN_COLOR


# ---- geometry ------------------------------------------------------------------------------------


def test_crops_at_scale_1_pixel_by_pixel():
    image, label = coordinates(20, 30)
    view, flips, corners = WeakView(12, (1.0,)), 0, Counter()
    for seed in range(600):
        out, out_label = view_of(view, image, label, seed)
        rows, columns = out[0].long(), out[1].long()
        assert (rows == rows[:, :1]).all() and (columns == columns[:1]).all()
        rows, columns = rows[:, 0], columns[0]
        flipped = bool(columns[0] > columns[-1])
        columns = columns.flip(0) if flipped else columns
        assert (rows.diff() == 1).all() and (columns.diff() == 1).all() and (out[2] == 7).all()
        where = (30 * out[0].long() + out[1].long()) % 250
        assert torch.equal(out_label.long(), where)
        flips += flipped
        corners[int(rows[0]), int(columns[0])] += 1
    assert 240 < flips < 360
    assert {row for row, _ in corners} == set(range(9))  # both ends, and all in between
    assert {column for _, column in corners} == set(range(19))


def test_each_scale_occurs_as_often():
    (image, label), counts = coordinates(210, 250), Counter()
    for seed in range(600):
        out, _ = view_of(WeakView(100, SCALES), image, label, seed)
        per_pixel = (int(out[1].max()) - int(out[1].min())) / 99  # green rises by 1 / scale
        counts[min(SCALES, key=lambda scale: abs(1 / scale - per_pixel))] += 1
    assert set(counts) == set(SCALES)
    assert all(65 < count < 135 for count in counts.values()), counts


@pytest.mark.parametrize("scale", SCALES)
def test_image_and_label_stay_aligned(scale):
    """Blocks of one color and label each: where the color is pure, the label is its own."""
    ids = torch.arange(48).view(6, 8)
    blocks = ids.repeat_interleave(16, 0).repeat_interleave(16, 1)  # (96, 128)
    image, label = sample((5 * blocks).byte().expand(3, -1, -1), blocks.byte())
    view, mean = WeakView(40, (scale,)), torch.tensor(MEAN_COLOR).view(3, 1, 1)
    seen = set()
    for seed in range(40):
        out, out_label = view_of(view, image, label, seed)
        padded = (out == mean).all(0)
        assert torch.equal(padded, out_label == IGNORE)
        # Bilinear sampling mixes two blocks over one source pixel; beyond it, colors are pure.
        gray = out[0].float()
        near = [gray.roll(shift, dim) for dim in (0, 1) for shift in (-2, -1, 1, 2)]
        pure = torch.stack([one == gray for one in near]).all(0) & ~padded
        pure[:2] = pure[-2:] = pure[:, :2] = pure[:, -2:] = False
        assert torch.equal((5 * out_label.long())[pure], out[0].long()[pure])
        assert pure.float().mean() > 0.1 * scale
        seen |= set(out_label.unique().tolist())
    assert len(seen) > 40


def test_label_values_are_never_mixed():
    label = torch.zeros(50, 50, dtype=torch.uint8)
    label[:, ::3], label[::7] = 200, IGNORE
    image, label = sample(torch.zeros(3, 50, 50, dtype=torch.uint8), label)
    for seed in range(60):
        _, out = view_of(WeakView(33, SCALES), image, label, seed)
        assert set(out.unique().tolist()) <= {0, 200, IGNORE}


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 90), (5, 200), (31, 32), (32, 33), (64, 16), (77, 80)]
)
def test_every_view_is_a_crop(size):
    label = torch.zeros(size, dtype=torch.uint8)
    image, label = sample(torch.full((3, *size), 9, dtype=torch.uint8), label)
    mean = torch.tensor(MEAN_COLOR).view(3, 1, 1)
    for scales in ((0.1,), SCALES, (3.3,)):
        for seed in range(12):
            out, out_label = view_of(WeakView(32, scales), image, label, seed)
            assert out.shape == (3, 32, 32) and out_label.shape == (32, 32)
            assert out.dtype == out_label.dtype == torch.uint8
            inside = out_label == 0
            assert ((out == 9).all(0) == inside).all() and inside.any()
            assert ((out == mean).all(0) == ~inside).all()
            assert (out_label[~inside] == IGNORE).all()


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.0, 1.5])
def test_short_sides_are_padded_evenly(scale):
    """The whole image is there; its size is rounded down; the odd pixel goes after."""
    for height, width in ((11, 40), (12, 15), (13, 17), (40, 14)):
        image, label = coordinates(height, width)
        out, out_label = view_of(WeakView(40, (scale,)), image, label, 0)
        rows, columns = ((out_label != IGNORE).any(dim).nonzero().flatten() for dim in (1, 0))
        for found, length in ((rows, height), (columns, width)):
            scaled = min(40, int(length * scale))
            before, after = int(found[0]), 39 - int(found[-1])
            assert (before, after) == ((40 - scaled) // 2, (41 - scaled) // 2)
            assert len(found) == scaled


def test_view_is_a_function_of_the_seed():
    image, label = coordinates(60, 70)
    view = WeakView(24, SCALES)
    first = [view_of(view, image, label, seed) for seed in range(20)]
    again = [view_of(WeakView(24, SCALES), image, label, seed) for seed in range(20)]
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert len({out.numpy().tobytes() for out, _ in first}) == 20
    assert (image == coordinates(60, 70)[0]).all() and (label == coordinates(60, 70)[1]).all()


def test_unlabeled_views_show_the_same_pixels():
    image, label = coordinates(60, 70)
    empty = tv_tensors.Mask(torch.full_like(label, IGNORE))
    for seed in range(10):
        with_label = view_of(WeakView(40, SCALES), image, label, seed)[0]
        assert torch.equal(with_label, view_of(WeakView(40, SCALES), image, empty, seed)[0])


@pytest.mark.parametrize("size", [(20, 30), (64, 40), (9, 40)])
def test_a_located_view_is_the_weak_view_and_tells_where_it_lies(size):
    """Every pixel of the label, found again in the image from the eleven numbers alone."""
    image, label = coordinates(*size)
    scales, flips, padded = (0.5, 0.75, 1.0, 1.5, 2.0), 0, 0
    for seed in range(100):
        expected = view_of(WeakView(24, scales), image, label, seed)
        *out, place = view_of(LocatedView(24, scales), image, label, seed)
        assert all(map(torch.equal, out, expected)) and place.dtype == torch.int64
        height, width, top, left, part_h, part_w, resized_h, resized_w, above, before, flip = (
            place.tolist()
        )
        assert (height, width) == size and place.shape == (11,)
        rows = top + torch.arange(resized_h) * part_h // resized_h  # nearest: the pixel's corner
        columns = torch.arange(resized_w) * part_w // resized_w
        columns = left + (part_w - 1 - columns if flip else columns)
        found = torch.full_like(out[1], IGNORE)
        found[above : above + resized_h, before : before + resized_w] = label[rows][:, columns]
        assert torch.equal(out[1], found)
        flips, padded = flips + flip, padded + (above + before > 0)
    assert 30 < flips < 70 and padded > 10


# ---- the CPS release's augmentation --------------------------------------------------------------

GOLDENS = sorted((SHARED / "goldens").glob("cps_seed*.npz"))
needs_goldens = pytest.mark.skipif(not GOLDENS, reason="the collection is not here")
GRAY_LEVEL = 1 / 255 / min(STD)  # after normalization: their resize rounds in fixed point


def augmentations():
    for path in GOLDENS:
        golden = load_golden(path)
        for number in range(4):
            case = golden.part(f"aug.{number}.")
            image, label = sample(
                case["in.img_rgb"].permute(2, 0, 1).byte(), case["in.label"].byte()
            )
            yield case, image, label, float(case["in.scale"]), bool(case["in.flip"])


@needs_goldens
def test_their_pixels_when_the_whole_image_is_scaled():
    """Flip, scaling, rounding, normalization and padding: labels exact, images to a gray level.

    The view's own steps run on the whole image here, and their crop is cut from the result.
    """
    for case, image, label, scale, flip in augmentations():
        size, scaled = list(label.shape), case["out.scaled_hw"].tolist()
        assert scaled == [int(length * scale) for length in size]
        view = WeakView(1, (scale,))
        params = {"corner": [0, 0], "size": size, "resized": scaled, "flip": flip}
        image, label = view.transform(image, params), view.transform(label, params)
        top, left = case["in.crop_pos_yx"].tolist()
        window = (..., slice(top, top + 48), slice(left, left + 48))
        image, label = normalize(image[None])[0][window], label[window]
        before, above, after, below = pad_margins(*label.shape, 48)
        margins = (before, after, above, below)
        assert torch.equal(F.pad(label.long(), margins, value=IGNORE), case["out.label"])
        torch.testing.assert_close(
            F.pad(image, margins).double(), case["out.img"], rtol=0, atol=1.01 * GRAY_LEVEL
        )


@needs_goldens
def test_their_view_where_the_window_is_cut_first():
    """Exact where the whole image fits into the crop; else the window nearest to theirs.

    Theirs begins at a pixel of the scaled image, ours at one of the source, so a window differs by
    up to half a source pixel, and by the rounding of its side. The images' neighbors differ by 10
    gray levels on average; ours must be much nearer than that, and than a window two pixels off.
    """
    cut = 0
    for case, image, label, scale, flip in augmentations():
        side = round(48 / scale)
        size = [min(side, length) for length in label.shape]
        corner = [
            min(round(start / scale), length - part)
            for start, length, part in zip(
                case["in.crop_pos_yx"].tolist(), label.shape, size, strict=True
            )
        ]
        resized = [48 if part == side else int(part * scale) for part in size]
        fits = case["out.scaled_hw"].max() <= 48
        differences = {}
        for shift in (-2, 0, 2):
            moved = [
                min(max(0, start + shift), length - part)
                for start, length, part in zip(corner, label.shape, size, strict=True)
            ]
            if flip:
                moved[1] = label.shape[1] - size[1] - moved[1]
            params = {"corner": moved, "size": size, "resized": resized, "flip": flip}
            view = WeakView(48, (scale,))
            difference = normalize(view.transform(image, params)[None])[0] - case["out.img"]
            differences[shift] = float(difference.abs().mean()) / GRAY_LEVEL
            if shift == 0 and fits:
                assert float(difference.abs().max()) < 1.6 * GRAY_LEVEL  # padding is uint8 here
                assert torch.equal(view.transform(label, params).long(), case["out.label"])
            elif shift == 0:
                same = view.transform(label, params).long() == case["out.label"]
                assert same.double().mean() > 0.75
        assert differences[0] < 7
        if not fits:
            cut += 1
            assert differences[0] < 0.7 * min(differences[-2], differences[2]), differences
    assert cut >= 3


@needs_goldens
def test_their_padding():
    for path in GOLDENS:
        golden = load_golden(path)
        for number in range(4):
            height, width = golden[f"aug.pad{number}.in.hw"].tolist()
            top, bottom, left, right = golden[f"aug.pad{number}.out.margin_tblr"].tolist()
            assert pad_margins(height, width, 48) == [left, top, right, bottom]


def test_pad_margins():
    assert pad_margins(5, 6, 8) == [1, 1, 1, 2]  # left, top, right, bottom
    assert pad_margins(9, 8, 8) == [0, 0, 0, 0]
    for height, width in np.random.default_rng(0).integers(1, 20, (50, 2)).tolist():
        left, top, right, bottom = pad_margins(height, width, 12)
        assert left + width + right == max(12, width) and right - left in (0, 1)
        assert top + height + bottom == max(12, height) and bottom - top in (0, 1)
