"""Procedurally drawn scenes for semantic segmentation: nothing to download, nothing stored.

Shape, color and texture each help to tell the classes apart, and none suffices: boxes and balls
share flat reds, melons and tents share stripes, tiles and boxes share a shape. Class areas fall
about geometrically from the background's half to one percent for the ring, which is in one scene
of six; the wire is thin. Every object has its own pose, hue, shading and texture phase, so a few
labeled scenes show little of the variety, and unlabeled ones show the rest.

A scene is a pure function of its arguments. To give the same bits on every machine it is computed
with + - * / sqrt only, which IEEE 754 rounds in one way; sin and exp differ between math libraries.
"""

from collections.abc import Callable
from math import sqrt
from typing import NamedTuple

import numpy as np

IGNORE = 255


# Shapes: level(u, v, k) < 0 is inside, and its size is about the distance to the edge. The unit is
# the object's radius, u points right and v down before the object is turned; k in [0, 1) varies it.
def disk(u, v, k):
    return np.sqrt(u * u + v * v) - 1


def square(u, v, k):
    return np.maximum(np.abs(u), np.abs(v)) - 0.85


def triangle(u, v, k):
    return np.maximum(v, 0.866 * np.abs(u) - 0.5 * v) - 0.55


def arc(u, v, k):
    return np.maximum(np.abs(v + (k - 0.5) * (u * u - 0.4)) - 0.07, np.abs(u) - 1)


def ring(u, v, k):
    return np.abs(np.sqrt(u * u + v * v) - 0.72) - 0.28


def lump(u, v, k):
    return u * u + v * v + 0.3 * u * v + 0.6 * (k - 0.5) * u * (u * u - 3 * v * v) - 0.5


# Textures: the share of the second color at u and v, now in periods.
def flat(u, v):
    return np.float32(0)


def stripes(u, v):
    return np.clip(3 * np.abs(2 * (u - np.floor(u)) - 1) - 1, 0, 1)


def checks(u, v):
    u, v = stripes(0.7 * u, None), stripes(0.7 * v, None)
    return u + v - 2 * u * v


class Kind(NamedTuple):
    """How one class looks. A pair is a uniform distribution: its least value and its width."""

    shape: Callable
    texture: Callable
    hue: tuple[float, float]  # in turns: 0 red, 1/3 green, 2/3 blue
    radius: tuple[float, float]  # as a share of the image side
    tilt: float  # slope of the object's u axis, at most
    chance: float  # relative frequency


OBJECTS = {
    "ball": Kind(disk, flat, (-0.08, 0.18), (0.15, 0.15), 0.4, 0.25),
    "box": Kind(square, flat, (0.02, 0.18), (0.15, 0.15), 0.4, 0.19),
    "melon": Kind(disk, stripes, (0.25, 0.22), (0.14, 0.15), 0.4, 0.16),
    "tile": Kind(square, checks, (0.38, 0.22), (0.14, 0.14), 0.4, 0.13),
    "tent": Kind(triangle, stripes, (-0.10, 0.22), (0.16, 0.14), 0.4, 0.12),
    "wire": Kind(arc, flat, (0.52, 0.20), (0.34, 0.20), 9.0, 0.11),
    "ring": Kind(ring, flat, (0.68, 0.20), (0.15, 0.10), 0.4, 0.025),
}
CLUTTER = [  # objects' colors and textures that belong to no class
    Kind(lump, texture, (0.0, 1.0), (0.15, 0.30), 9.0, chance)
    for texture, chance in ((flat, 0.88), (stripes, 0.06), (checks, 0.06))
]
CLASSES = ("background", *OBJECTS)
PALETTE = (  # Okabe and Ito's colors, which color-blind readers tell apart
    (0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115),
    (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip


def draw_kinds(rng, kinds, count: int) -> np.ndarray:
    """Indices (count,) into `kinds`, each drawn by its chance."""
    chance = np.cumsum([kind.chance for kind in kinds])
    return np.searchsorted(chance, rng.random(count) * chance[-1], side="right")


def rgb(hue, saturation, value):
    """HSV arrays (K,), the hue in turns, the rest in [0, 1] -> float32 RGB (K, 3, 1, 1)."""
    pure = np.clip(np.abs((hue[:, None] + [0, 2 / 3, 1 / 3]) % 1 * 6 - 3) - 1, 0, 1)
    color = value[:, None] * (1 - saturation[:, None] * (1 - pure))
    return color.astype(np.float32)[:, :, None, None]


def paint(image, kind: Kind, colors, pose):
    """Draws one object into `image` (3, size, size) and returns its window and its bool mask."""
    y, x, radius, stretch, tilt, k, blur, shade_u, shade_v, pitch, phase_u, phase_v = pose
    size = image.shape[1]
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size  # pixel centers
    radius = kind.radius[0] + kind.radius[1] * radius
    window = tuple(  # all shapes, blurred or not, end within 1.3 radii
        slice(max(0, int((center - 1.3 * radius) * size)), int((center + 1.3 * radius) * size) + 1)
        for center in (y, x)
    )
    v, u = (axis[window[0], None] - y) / radius, (axis[window[1]] - x) / radius
    slope = kind.tilt * (2 * tilt - 1)
    cos = 1 / sqrt(1 + slope * slope)
    u, v = cos * u + cos * slope * v, (cos * v - cos * slope * u) * (1 + 0.35 * stretch)

    level = kind.shape(u, v, k)
    sharpness = 2.2 + 10 * blur * blur if kind.shape is lump else radius * size
    alpha = np.clip(0.5 - level * sharpness, 0, 1)
    pitch = radius / (0.08 + 0.06 * pitch)
    share = kind.texture(u * pitch + phase_u, v * pitch + phase_v)
    shade = 1 + 0.5 * (shade_u - 0.5) * u + 0.5 * (shade_v - 0.5) * v
    view = image[:, *window]
    view += alpha * ((colors[0] + (colors[1] - colors[0]) * share) * shade - view)
    return window, level < 0


def scene(seed: int, index: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Scene `index` of the data set `seed`: the same at every `size`, up to noise.

    Returns: RGB image uint8 (3, size, size); label uint8 (size, size), class ids, and 255 on the
        one pixel of a region that borders on an object in front of it.
    """
    rng = np.random.default_rng([seed, index])
    clutter = draw_kinds(rng, CLUTTER, 4)
    objects = draw_kinds(rng, OBJECTS.values(), 5 + int(4 * rng.random()))
    kinds = [CLUTTER[i] for i in clutter] + [[*OBJECTS.values()][i] for i in objects]
    hue, saturation, value, shift, *pose = rng.random((16, len(kinds)))
    hue = np.array([kind.hue[0] for kind in kinds]) + hue * [kind.hue[1] for kind in kinds]
    saturation, value = 0.55 + 0.4 * saturation, 0.4 + 0.6 * value
    saturation[: len(clutter)] *= 0.55
    first = rgb(hue, saturation, value)
    second = rgb(hue + 0.1 * (shift - 0.5), saturation, value + np.where(value > 0.7, -0.4, 0.4))

    ground = rgb(rng.random(1), 0.4 * rng.random(1), 0.3 + 0.5 * rng.random(1))
    image = np.broadcast_to(ground[0], (3, size, size)).copy()
    seen = np.zeros((size, size), np.uint8)  # the object seen at a pixel; a greater one is nearer
    for i, row in enumerate(np.transpose(pose).tolist()):
        window, inside = paint(image, kinds[i], (first[i], second[i]), row)
        if i >= len(clutter):
            seen[window][inside] = i

    # Light: its color, its strength, and how the strength changes from side to side.
    light = rng.random(7).astype(np.float32)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    gain = 0.8 + 0.4 * light[0] + 0.6 * (light[1] - 0.5) * axis[:, None]
    gain = gain + 0.6 * (light[2] - 0.5) * axis
    image *= gain * (0.85 + 0.3 * light[3:6, None, None])
    noise = rng.random((3, size, size), np.float32) - 0.5
    image += (0.02 + 0.1 * light[6]) * noise

    nearest = seen.copy()  # among a pixel and its four neighbors
    for here, there in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        np.maximum(nearest[here], seen[there], out=nearest[here])
        np.maximum(nearest[there], seen[here], out=nearest[there])
    label = np.array([0] * len(clutter) + [i + 1 for i in objects], np.uint8)[seen]
    label[nearest > seen] = IGNORE
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), label
