"""Procedurally drawn scenes for semantic segmentation: no files, no download.

A scene is a pure function of (seed, index). Shape, color and texture each tell some of the classes
apart, and none tells all: a ball and a box differ in shape alone, a ball and a melon share theirs.
Each object has its own pose, stretch, hue, shading and texture phase, so a few labeled scenes show
little of the variety and unlabeled ones show the rest. What is seen besides (lumpy patches in the
objects' colors and textures) is background. Pixels next to an object in front of them are ignored.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

IGNORE = 255
PATCHES = 4  # background patches per scene
OBJECTS = (5, 8)  # objects per scene, at least and at most


# Shapes: level(u, v, k) is negative inside, about the distance to the edge in radii outside; u and
# v are object coordinates in radii, k in [0, 1) varies the shape. Only + - * / sqrt, which IEEE 754
# rounds the same on every machine, as sin and exp are not.
def disk(u, v, k):
    return np.sqrt(u * u + v * v) - 1


def square(u, v, k):
    return np.maximum(np.abs(u), np.abs(v)) - 0.85


def triangle(u, v, k):
    return np.maximum(v, 0.866 * np.abs(u) - 0.5 * v) - 0.55


def arc(u, v, k):
    return np.maximum(np.abs(v + (k - 0.5) * (u * u - 0.4)) - 0.06, np.abs(u) - 1)


def ring(u, v, k):
    return np.abs(np.sqrt(u * u + v * v) - 0.72) - 0.28


def lump(u, v, k):
    return u * u + v * v + 0.5 * u * v + (k - 0.5) * u * (u * u - 3 * v * v) - 0.6


class Kind(NamedTuple):
    """How the objects of one class look and how often they occur."""

    shape: Callable
    hue: tuple[float, float]  # from, width, in turns; 0 is red
    texture: str  # "flat", "stripes" or "checks"
    radius: tuple[float, float]  # from, width, as a share of the image side
    tilt: float
    chance: float  # that an object is of this class


KINDS = {
    "ball": Kind(disk, (-0.08, 0.18), "flat", (0.15, 0.15), 0.4, 0.25),
    "box": Kind(square, (0.02, 0.18), "flat", (0.15, 0.15), 0.4, 0.19),
    "melon": Kind(disk, (0.25, 0.22), "stripes", (0.14, 0.15), 0.4, 0.16),
    "tile": Kind(square, (0.38, 0.22), "checks", (0.14, 0.14), 0.4, 0.13),
    "tent": Kind(triangle, (-0.1, 0.22), "stripes", (0.16, 0.14), 0.4, 0.12),
    "wire": Kind(arc, (0.52, 0.2), "flat", (0.34, 0.20), 9, 0.12),  # the thin class
    "ring": Kind(ring, (0.68, 0.2), "flat", (0.15, 0.10), 0.4, 0.03),  # the rare class
}
CLASSES = ("background", *KINDS)
PALETTE = (  # Okabe and Ito's colors, which color-blind readers can tell apart
    (0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115),
    (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
LOOKS = tuple(KINDS.values())
CHANCE = np.cumsum([kind.chance for kind in LOOKS])


def rgb(hue, saturation, value):
    """HSV in [0, 1] (K, 1), hue in turns -> float64 RGB in [0, 1] (K, 3)."""
    pure = np.clip(np.abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1, 0, 1)
    return value * (1 - saturation + saturation * pure)


def wave(t):
    """A wave of period 1 between 0 and 1, nearly square."""
    return np.clip(3 * np.abs(2 * (t - np.floor(t)) - 1) - 1, 0, 1)


def scene(seed: int, index: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """The scene `index` of the data set `seed`: uint8 image (3, size, size), label (size, size)."""
    rng = np.random.default_rng([seed, index])
    count = PATCHES + int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))
    kinds = np.searchsorted(CHANCE, rng.random(count) * CHANCE[-1], side="right")
    draw = rng.random((count, 18))
    hue_from, hue_width = np.array([LOOKS[kind].hue for kind in kinds]).T
    hue = (hue_from + hue_width * draw[:, 0])[:, None]
    saturation, value = 0.45 + 0.5 * draw[:, 1:2], 0.4 + 0.6 * draw[:, 2:3]
    accent_value = np.where(value > 0.7, value * 0.5, value + 0.4)
    saturation[:PATCHES] *= 0.7
    colors = rgb(hue, saturation, value).tolist()
    accents = rgb(hue + 0.1 * draw[:, 4:5] - 0.05, saturation, accent_value).tolist()
    ground = rgb(rng.random((1, 1)), 0.4 * rng.random((1, 1)), 0.3 + 0.5 * rng.random((1, 1)))
    image = np.empty((3, size, size), np.float32)
    image[:] = ground.reshape(3, 1, 1)
    top = np.zeros((size, size), np.int64)  # which object is seen, 0 for none
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    for k in range(count):
        look, patch, d = LOOKS[kinds[k]], k < PATCHES, draw[k].tolist()
        shape = lump if patch else look.shape
        radius = 0.15 + 0.3 * d[5] if patch else look.radius[0] + look.radius[1] * d[5]
        y, x, stretch = d[6], d[7], 1 + 0.35 * d[8]
        reach = radius * 1.4
        rows = slice(max(0, int((y - reach) * size)), int((y + reach) * size) + 2)
        columns = slice(max(0, int((x - reach) * size)), int((x + reach) * size) + 2)
        down, right = ((axis[rows] - y) / radius)[:, None], ((axis[columns] - x) / radius)[None]
        a, b = 1, look.tilt * (2 * d[9] - 1)
        norm = (a * a + b * b) ** 0.5
        a, b = a / norm, b / norm
        u, v = a * right + b * down, (a * down - b * right) * stretch
        level = shape(u, v, d[11])
        sharp = radius * size * (0.04 + 0.2 * d[12] if patch else 1)
        alpha = np.clip(0.5 - level * sharp, 0, 1)
        shade = 1 + (0.5 * d[13] - 0.25) * u + (0.5 * d[14] - 0.25) * v
        pitch = radius / (0.08 + 0.06 * d[15])
        if look.texture == "flat" or (patch and d[17] > 0.2):
            t = 0 * u
        elif look.texture == "stripes":
            t = wave(u * pitch + d[16])
        else:
            t = wave(u * pitch * 0.7 + d[16])
            s = wave(v * pitch * 0.7 + d[17])
            t = t + s - 2 * t * s
        view = image[:, rows, columns]
        for c in range(3):
            paint = (colors[k][c] + (accents[k][c] - colors[k][c]) * t) * shade
            view[c] += alpha * (paint - view[c])
        if not patch:
            top[rows, columns][level < 0] = k
    light = rng.random(8).astype(np.float32)
    gain = 0.8 + 0.4 * light[0] + 0.6 * (light[1] - 0.5) * (axis[:, None] - 0.5) + 0.6 * (light[2] - 0.5) * (axis - 0.5)
    image *= gain * (0.85 + 0.3 * light[3:6, None, None])
    image += (0.02 + 0.1 * light[6]) * (rng.random((3, size, size), np.float32) - 0.5)
    label = np.concatenate([[0] * PATCHES, kinds[PATCHES:] + 1]).astype(np.uint8)[top]
    front = top.copy()
    front[1:] = np.maximum(front[1:], top[:-1])
    front[:-1] = np.maximum(front[:-1], top[1:])
    front[:, 1:] = np.maximum(front[:, 1:], top[:, :-1])
    front[:, :-1] = np.maximum(front[:, :-1], top[:, 1:])
    label[front > top] = IGNORE
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), label
