"""The shapes scenes: pure, in range, with the stated class shares and ignored borders."""

import hashlib
import random

import numpy as np
import pytest
import torch

from common import synthetic
from common.synthetic import CLASSES, PALETTE, scene


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """The labels of 200 scenes, uint8 (200, 64, 64)."""
    return np.stack([scene(0, index)[1] for index in range(200)])


def assert_same(one, two):
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])


def test_scene_depends_on_its_arguments_only():
    first = [tuple(a.copy() for a in scene(3, index, 48)) for index in range(6)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for index in reversed(range(6)):
        again = scene(3, index, 48)
        assert_same(first[index], again)
        again[0][:], again[1][:] = 0, 0  # a caller may write into what it was given
        assert_same(first[index], scene(3, index, 48))
    assert random.getstate() == states[0]
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])
    assert torch.get_rng_state().equal(states[2])


def test_scenes_differ():
    scenes = [scene(seed, index, 32) for seed in range(4) for index in (*range(80), 90_127)]
    assert len({image.tobytes() for image, _ in scenes}) == len(scenes)
    assert len({label.tobytes() for _, label in scenes}) == len(scenes)


@pytest.mark.parametrize("size", [32, 33, 48, 64, 96])
def test_types_and_ranges(size):
    for index in range(20):
        image, label = scene(1, index, size)
        assert image.shape == (3, size, size) and label.shape == (size, size)
        assert image.dtype == label.dtype == np.uint8
        assert set(np.unique(label)) <= {*range(8), 255}
        assert image.std() > 10  # neither black nor blank


def test_size_is_resolution_only():
    for index in range(20):
        (small_image, small), (image, large) = scene(2, index, 32), scene(2, index, 96)
        large = large[1::3, 1::3]  # these pixels have the centers of the small scene's
        valid = (small != 255) & (large != 255)
        assert (small == large)[valid].mean() > 0.99
        difference = small_image[:, valid].astype(int) - image[:, 1::3, 1::3][:, valid]
        assert np.abs(difference).mean() < 12  # noise, and edges of the unlabeled patches


def test_class_shares(labels):
    valid = labels != 255
    share = np.bincount(labels[valid], minlength=8) / valid.sum()
    assert (share > 0).all() and len(share) == len(CLASSES) == 8
    assert 0.45 < share[0] < 0.60
    assert (np.diff(share) < 0).all()  # a long tail, in the order of the class ids
    assert 0.010 < share[CLASSES.index("wire")] < 0.030
    assert 0.005 < share[CLASSES.index("ring")] < 0.015
    present = (labels == CLASSES.index("ring")).any((1, 2)).mean()
    assert 0.08 < present < 0.25


def test_wire_is_thin(labels):
    def thick(name):
        """The share of pixels of a class that are in the middle of a 5x5 block of it."""
        of_class = labels == CLASSES.index(name)
        block = np.lib.stride_tricks.sliding_window_view(of_class, (5, 5), (1, 2)).all((3, 4))
        return block.sum() / of_class.sum()

    assert thick("wire") < 0.02 and thick("ball") > 0.4


def test_label_against_pixel_loops(monkeypatch):
    """Nearer objects hide others, clutter is background, 255 only beside a nearer object."""
    drawn, paint = [], synthetic.paint

    def record(image, kind, *rest):
        window, inside = paint(image, kind, *rest)
        drawn.append((kind, window, inside))
        return window, inside

    monkeypatch.setattr(synthetic, "paint", record)
    for index in range(10):
        drawn.clear()
        _, label = scene(0, index, 32)
        seen = [[(-1, 0)] * 32 for _ in range(32)]  # (order, class)
        for order, (kind, (rows, columns), inside) in enumerate(drawn):
            names = [name for name, look in synthetic.OBJECTS.items() if look is kind]
            for y, x in np.argwhere(inside) if names else ():
                pixel = (order, CLASSES.index(names[0]))
                seen[rows.start + y][columns.start + x] = pixel
        for y in range(32):
            for x in range(32):
                around = ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
                nearer = any(
                    seen[b][a][0] > seen[y][x][0] for b, a in around if 0 <= b < 32 and 0 <= a < 32
                )
                assert label[y, x] == (255 if nearer else seen[y][x][1])


def test_border_separates_classes(labels):
    for one, two in ((labels[:, 1:], labels[:, :-1]), (labels[..., 1:], labels[..., :-1])):
        assert ((one == two) | (one == 255) | (two == 255)).all()
    assert 0.05 < (labels == 255).mean() < 0.10


def test_windows_hold_whole_objects(monkeypatch):
    """A canvas with room on all sides: nothing is painted at the border of its window."""
    rng = np.random.default_rng(0)
    for kind in (*synthetic.CLUTTER.values(), *synthetic.OBJECTS.values()):
        for _ in range(30):
            image = np.zeros((3, 64, 64), np.float32)
            wide = kind._replace(radius=(0.3, 0.0))
            color = np.ones((3, 1, 1), np.float32)
            window, inside = synthetic.paint(image, wide, color, color, [0.5, 0.5, *rng.random(10)])
            view = image[:, *window]
            assert inside.any() and view.shape[1] < 64 and view.max() > 0.5
            assert not view[:, [0, -1]].any() and not view[:, :, [0, -1]].any()


def test_palette():
    assert len(set(PALETTE)) == len(CLASSES) == len(set(CLASSES)) == 8
    assert CLASSES[0] == "background" and np.array(PALETTE).shape == (8, 3)


def test_label_canary():
    """Fails when scenes change: then every number measured on them has to be measured anew."""
    digest = hashlib.sha256(scene(0, 7)[1].tobytes()).hexdigest()
    assert digest[:16] == "c3f9d913294b85b1"
