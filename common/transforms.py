"""Views on (image, label) samples, built on torchvision.transforms.v2.

A view draws from torch's default generator only, which `Samples` seeds for each sample; images stay
uint8 until `normalize` runs on the training device.
"""

import math
from functools import lru_cache

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from common.datasets import IGNORE

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
MEAN_COLOR = tuple(round(255 * value) for value in MEAN)  # uint8 that normalizes to 0


@lru_cache
def statistics(device: torch.device, mean=MEAN, std=STD) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as (1, 3, 1, 1); copied to a device once, since every copy makes a GPU wait."""
    return tuple(torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))


def normalize(image: torch.Tensor, mean=MEAN, std=STD) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> float32, ImageNet statistics or others, channels last."""
    mean, std = statistics(image.device, mean, std)
    image = image.to(memory_format=torch.channels_last)
    return (image.float() / 255 - mean) / std


def denormalize(image: torch.Tensor) -> torch.Tensor:
    """The inverse of `normalize`, rounded to uint8."""
    mean, std = statistics(image.device)
    return ((image.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def pad_margins(height: int, width: int, size: int) -> list[int]:
    """(left, top, right, bottom) that pad to `size`, split evenly, the odd pixel after."""
    rows, columns = max(0, size - height), max(0, size - width)
    return [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2]


class WeakView(v2.Transform):
    """Horizontal flip (p = 0.5), one of `scales`, a random crop; short sides are padded.

    The common protocol scales an image and then crops it. Here the window is cut first, with
    `crop_size / scale` source pixels a side, and only the window is resized: the same view at a
    fraction of the work. Bilinear without antialiasing for images, nearest for labels; padding is
    the mean color (0 after `normalize`) and label 255.
    """

    def __init__(self, crop_size: int, scales: tuple[float, ...]):
        super().__init__()
        self.crop_size, self.scales = crop_size, scales

    def make_params(self, flat_inputs) -> dict:
        height, width = v2.query_size(flat_inputs)
        scale = self.scales[int(torch.randint(len(self.scales), ()))]
        window = max(1, round(self.crop_size / scale))  # DIFFERS (supervised.md 3): cut first
        size, corner, resized = [], [], []
        for length in (height, width):
            part = min(window, length)
            size.append(part)
            corner.append(int(torch.randint(length - part + 1, ())))
            resized.append(self.crop_size if part == window else max(1, int(part * scale)))
        flip = bool(torch.rand(()) < 0.5)
        return {"corner": corner, "size": size, "resized": resized, "flip": flip}

    def transform(self, inpt, params: dict):
        out = F.crop(inpt, *params["corner"], *params["size"])
        if params["flip"]:  # before the resize: nearest sampling is not symmetric
            out = F.horizontal_flip(out)
        if params["resized"] != params["size"]:
            out = F.resize(out, params["resized"], antialias=False)
        margins = pad_margins(*params["resized"], self.crop_size)
        # DIFFERS (supervised.md 4): the mean color in whole gray levels
        fill = IGNORE if isinstance(inpt, tv_tensors.Mask) else list(MEAN_COLOR)
        return F.pad(out, margins, fill=fill) if any(margins) else out


class LocatedView(WeakView):
    """A weak view that also tells where it lies: view(image, label) -> (image, label, place).

    place: (11,) int64, in pixels: height, width of the image; top, left corner and height, width of
        the window cut from it; height, width of the window after scaling; margins above and left of
        it; and 1 if it is flipped, within the window
    """

    def forward(self, image, label):
        params = self.make_params([image, label])
        left, top, *_ = pad_margins(*params["resized"], self.crop_size)
        window = (*params["corner"], *params["size"], *params["resized"])
        place = torch.tensor([*image.shape[-2:], *window, top, left, params["flip"]])
        return self.transform(image, params), self.transform(label, params), place


def boxes_in_view(boxes: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """Boxes of an image in the pixels of its view; those that vanish are left out.

    A pixel of the view lies in a box if the place in the image that it shows, at its center, does.

    boxes: (n, 5) int64, class, top, left, bottom, right, half-open; view: (11,) of `LocatedView`
    """
    corner, part, resized, margin = view[2:10].view(4, 2)  # down, across
    edges = boxes[:, 1:].view(-1, 2, 2)  # (n, first or behind the last, down or across)
    # Pixel k shows corner + (k + 1/2) part / resized. In whole numbers: ceil(a / b) = -(-a // b).
    edges = -((part - 2 * resized * (edges - corner)) // (2 * part))
    edges = edges.clamp(min=0).minimum(resized)
    if view[10]:
        edges[..., 1] = resized[1] - edges[..., 1].flip(1)
    edges = edges + margin
    boxes = torch.cat([boxes[:, :1], edges.flatten(1)], 1)
    return boxes[(edges[:, 0] < edges[:, 1]).all(1)]


def rgb_to_hsv(image: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1] -> hue (in turns), saturation and value, likewise."""
    red, green, blue = image.unbind(1)
    value, low = image.amax(1), image.amin(1)
    span = value - low
    sixth = torch.where(
        value == red, (green - blue) / span,
        torch.where(value == green, (blue - red) / span + 2, (red - green) / span + 4),
    )  # fmt: skip
    hue = torch.where(span > 0, sixth / 6 % 1, 0)
    return torch.stack([hue, torch.where(value > 0, span / value, 0), value], 1)


def hsv_to_rgb(image: torch.Tensor) -> torch.Tensor:
    """The inverse of `rgb_to_hsv`."""
    hue, saturation, value = image[:, :, None].unbind(1)  # (B, 1, H, W) each
    offset = 5 - 2 * torch.arange(3, device=image.device).view(1, 3, 1, 1)
    sixth = (offset + 6 * hue).remainder_(6)
    share = torch.minimum(sixth, 4 - sixth).clamp_(0, 1)
    return torch.addcmul(value, value * saturation, share, value=-1)


def color_jitter(
    image: torch.Tensor,
    brightness: torch.Tensor,
    contrast: torch.Tensor,
    saturation: torch.Tensor,
    hue: torch.Tensor,
    order: list[int],
) -> torch.Tensor:
    """Change the colors of a batch in [0, 1], each image by factors of its own, on its device.

    Not torchvision's ColorJitter: as in kornia 0.3, which ClassMix and its descendants use,
    brightness is added and contrast scales from black.

    Args:
        brightness, contrast, saturation: (B,), 1 changes nothing
        hue: (B,), turns to add
        order: permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue
    """

    def change_hsv(image, channel, change):
        hsv = list(rgb_to_hsv(image).unbind(1))
        hsv[channel] = change(hsv[channel])
        return hsv_to_rgb(torch.stack(hsv, 1))

    def per_image(factor, dims):
        return factor.to(image, non_blocking=True).view(-1, *[1] * dims)

    changes = [
        lambda x: (x + per_image(brightness, 3) - 1).clamp(0, 1),
        lambda x: (x * per_image(contrast, 3)).clamp(0, 1),
        lambda x: change_hsv(x, 1, lambda s: (s * per_image(saturation, 2)).clamp(0, 1)),
        lambda x: change_hsv(x, 0, lambda h: (h + per_image(hue, 2)) % 1),
    ]
    for number in order:
        image = changes[number](image)
    return image


def gaussian_blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur (B, 3, H, W) with kernels of a tenth of each side, made odd by taking one away."""
    lengths = (math.ceil(0.1 * side) for side in (image.shape[3], image.shape[2]))
    return F.gaussian_blur(image, [length - 1 + length % 2 for length in lengths], [sigma, sigma])
