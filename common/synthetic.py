"""Procedurally drawn scenes for semantic segmentation: nothing to download, nothing stored.

Shape, color and texture each help to tell classes apart, and none suffices: balls and boxes share
flat reds, melons and tents stripes, tiles and boxes a shape. Areas fall about geometrically, from
half for the background to 1 % for the ring; the wire is thin. A few scenes show little of the many
poses, hues and lights. Pixels need only + - * / sqrt, which every IEEE 754 machine rounds alike.
"""

from math import sqrt
from typing import NamedTuple

import numpy as np

SHAPES = {  # the distance to the edge, negative inside, about; in radii of the object, as u and v
    "disk": lambda u, v, k: np.sqrt(u * u + v * v) - 1,
    "square": lambda u, v, k: np.maximum(np.abs(u), np.abs(v)) - 0.85,
    "triangle": lambda u, v, k: np.maximum(v, 0.866 * np.abs(u) - 0.5 * v) - 0.55,
    "arc": lambda u, v, k: np.maximum(np.abs(v + (k - 0.5) * u * u) - 0.07, np.abs(u) - 1),
    "ring": lambda u, v, k: np.abs(np.sqrt(u * u + v * v) - 0.72) - 0.28,
    "lump": lambda u, v, k: u * u + v * v + (0.7 * k - 0.35) * u * (u * u - 3 * v * v) - 0.5,
}
TEXTURES = {  # the share of the second color; u and v in periods, about
    "flat": lambda u, v: np.float32(0),
    "stripes": lambda u, v: np.clip(3 * np.abs(2 * (u - np.floor(u)) - 1) - 1, 0, 1),
    "checks": lambda u, v: np.abs(stripes(0.7 * u, v) - stripes(0.7 * v, u)),
}
stripes = TEXTURES["stripes"]


class Kind(NamedTuple):
    """How a class looks. A pair is a uniform distribution: its least value and its width."""

    shape: str
    texture: str
    hue: tuple[float, float]  # in turns: 0 red, 1/3 green, 2/3 blue
    radius: tuple[float, float]  # as a share of the image side
    slope: float  # of the object's u axis, at most
    chance: float  # relative frequency


OBJECTS = {
    "ball": Kind("disk", "flat", (-0.08, 0.18), (0.15, 0.15), 0.4, 0.25),
    "box": Kind("square", "flat", (0.02, 0.18), (0.15, 0.15), 0.4, 0.19),
    "melon": Kind("disk", "stripes", (0.25, 0.22), (0.14, 0.15), 0.4, 0.16),
    "tile": Kind("square", "checks", (0.38, 0.22), (0.14, 0.14), 0.4, 0.13),
    "tent": Kind("triangle", "stripes", (-0.10, 0.22), (0.16, 0.14), 0.4, 0.12),
    "wire": Kind("arc", "flat", (0.52, 0.20), (0.34, 0.20), 9.0, 0.11),
    "ring": Kind("ring", "flat", (0.68, 0.20), (0.15, 0.10), 0.4, 0.023),
}
CLUTTER = {  # background in the objects' hues and textures, paler and with soft edges
    name: Kind("lump", name, (0.0, 1.0), (0.15, 0.30), 9.0, chance)
    for name, chance in {"flat": 0.88, "stripes": 0.06, "checks": 0.06}.items()
}
CLASSES = ("background", *OBJECTS)
PALETTE = (  # Okabe and Ito's colors, which color-blind readers tell apart
    (0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115),
    (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip


def pick(rng: np.random.Generator, kinds: dict[str, Kind], count: int) -> list[str]:
    """The names of `count` independent draws by chance."""
    chance = np.cumsum([kind.chance for kind in kinds.values()])
    draws = rng.random(count) * chance[-1]
    return [list(kinds)[i] for i in np.searchsorted(chance, draws, side="right")]


def rgb(hue, saturation, value) -> np.ndarray:
    """Three arrays (K,), the hue in turns, the rest in [0, 1] -> float32 RGB (K, 3, 1, 1)."""
    gray = np.clip(2 - np.abs((hue + [[0], [2 / 3], [1 / 3]]) % 1 * 6 - 3), 0, 1)
    return (value * (1 - saturation * gray)).T.astype(np.float32)[..., None, None]


def paint(image, kind: Kind, color, second_color, pose):
    """Draws an object into `image`, float32 (3, size, size); returns its window and bool mask."""
    y, x, reach, stretch, turn, k, blur, shade_u, shade_v, period, phase_u, phase_v = pose
    size, radius = image.shape[1], kind.radius[0] + kind.radius[1] * reach
    end = 1.3 * radius  # every shape, its soft edge included, is narrower
    window = tuple(slice(max(0, int((c - end) * size)), int((c + end) * size) + 1) for c in (y, x))
    center = (np.arange(size, dtype=np.float32) + 0.5) / size
    v, u = (center[window[0], None] - y) / radius, (center[window[1]] - x) / radius
    slope = kind.slope * (2 * turn - 1)
    cos = 1 / sqrt(1 + slope * slope)
    u, v = cos * (u + slope * v), cos * (v - slope * u) * (1 + 0.35 * stretch)
    level = SHAPES[kind.shape](u, v, k)
    # Lumps have soft edges; those of objects are as wide as a pixel, against jaggies.
    sharpness = 2.2 + 10 * blur * blur if kind.shape == "lump" else radius * size
    alpha = np.clip(0.5 - level * sharpness, 0, 1)
    pitch = radius / (0.08 + 0.06 * period)
    share = TEXTURES[kind.texture](u * pitch + phase_u, v * pitch + phase_v)
    shade = 1 + 0.5 * (shade_u - 0.5) * u + 0.5 * (shade_v - 0.5) * v
    view = image[:, *window]
    view += alpha * ((color + (second_color - color) * share) * shade - view)
    return window, level < 0


def scene(seed: int, index: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Scene `index` of data set `seed`: RGB uint8 (3, size, size) and label uint8 (size, size).

    The label holds class ids, and 255 where a region borders on an object in front of it, one pixel
    wide. A seed and index give the same scene at every size, with other noise.
    """
    rng = np.random.default_rng([seed, index])
    clutter, objects = pick(rng, CLUTTER, 4), pick(rng, OBJECTS, 5 + int(4 * rng.random()))
    kinds = [CLUTTER[name] for name in clutter] + [OBJECTS[name] for name in objects]
    hue, saturation, value, shift, *pose = rng.random((16, len(kinds)))
    least, width = np.transpose([kind.hue for kind in kinds])
    hue, saturation, value = least + width * hue, 0.55 + 0.4 * saturation, 0.4 + 0.6 * value
    saturation[: len(clutter)] *= 0.55
    color = rgb(hue, saturation, value)
    second = rgb(hue + 0.1 * (shift - 0.5), saturation, value + np.where(value > 0.7, -0.4, 0.4))
    ground = rgb(rng.random(1), 0.4 * rng.random(1), 0.3 + 0.5 * rng.random(1))

    image = np.broadcast_to(ground[0], (3, size, size)).copy()
    seen = np.zeros((size, size), np.uint8)  # the object seen: 0 is none, a greater one is nearer
    for i, row in enumerate(np.transpose(pose).tolist()):
        window, inside = paint(image, kinds[i], color[i], second[i], row)
        if i >= len(clutter):
            seen[window][inside] = i

    light = rng.random(7).astype(np.float32)  # strength, how it falls off, color, noise
    side = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    fall = (light[1] - 0.5) * side[:, None] + (light[2] - 0.5) * side
    image *= (0.8 + 0.4 * light[0] + 0.6 * fall) * (0.85 + 0.3 * light[3:6, None, None])
    image += (0.02 + 0.1 * light[6]) * (rng.random(image.shape, np.float32) - 0.5)
    label = np.array([0] * len(clutter) + [CLASSES.index(name) for name in objects], np.uint8)[seen]
    wide = np.pad(seen, 1, "edge")
    for neighbor in (wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]):
        label[neighbor > seen] = 255
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), label
