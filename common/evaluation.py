"""Confusion matrix, IoU, and prediction of whole images, by windows, and over several scales."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from common.datasets import IGNORE, UNKNOWN, SegmentationData, Validation
from common.transforms import MEAN, STD, denormalize, normalize, pad_margins


def confusion_matrix(
    label: torch.Tensor, prediction: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """Pixel counts, int64 (C, C): rows truth, columns prediction; label 255 is dropped.

    Args:
        label, prediction: integer tensors of one shape, on one device
    """
    valid = label != IGNORE
    index = num_classes * label[valid].long() + prediction[valid].long()
    return torch.bincount(index, minlength=num_classes**2).view(num_classes, num_classes)


def iou_per_class(confusion: torch.Tensor) -> torch.Tensor:
    """Intersection over union, float64 (C,); NaN for a class in neither truth nor prediction."""
    confusion = confusion.double()
    intersection = confusion.diagonal()
    return intersection / (confusion.sum(0) + confusion.sum(1) - intersection)


def mean_iou(confusion: torch.Tensor) -> float:
    """Mean of `iou_per_class` over the classes that occur, in [0, 1]."""
    return float(iou_per_class(confusion).nanmean())


def pixel_accuracy(prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Share of right pixels among those whose class is known, a 0-d tensor; 0 if there are none."""
    known = label < UNKNOWN
    return ((prediction == label) & known).sum() / known.sum().clamp(min=1)


def window_starts(length: int, crop_size: int, stride: int) -> list[int]:
    """0, stride, 2 stride, ...; the last window is shifted to end at the border."""
    if not 1 <= stride <= crop_size:
        raise ValueError(f"stride {stride} leaves gaps between windows of {crop_size} pixels")
    last = max(0, length - crop_size)
    return [min(i * stride, last) for i in range(math.ceil(last / stride) + 1)]


def padded_logits(model: Callable, image: torch.Tensor, size: int) -> torch.Tensor:
    """Logits of (B, 3, H, W); sides shorter than `size` are padded with 0 and cropped back.

    Half precision comes back as fp32.
    """
    height, width = image.shape[2:]
    left, top, right, bottom = pad_margins(height, width, size)
    logits = model(F.pad(image, (left, right, top, bottom)))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits[:, :, top : top + height, left : left + width]


def sliding_window_logits(
    model: Callable, image: torch.Tensor, num_classes: int, crop_size: int, stride: int
) -> torch.Tensor:
    """Logits (B, C, H, W) from square windows, averaged where they overlap.

    Args:
        model: maps (B, 3, crop_size, crop_size) to logits of that size
        image: (B, 3, H, W), normalized; may be smaller than the window
        stride: pixels between windows; the last ones are shifted to end at the border
    """
    height, width = image.shape[2:]
    dtype = torch.promote_types(image.dtype, torch.float32)
    total = image.new_zeros(len(image), num_classes, height, width, dtype=dtype)
    count = image.new_zeros(1, 1, height, width, dtype=dtype)
    for top in window_starts(height, crop_size, stride):
        for left in window_starts(width, crop_size, stride):
            window = (..., slice(top, top + crop_size), slice(left, left + crop_size))
            total[window] += padded_logits(model, image[window], crop_size)
            count[window] += 1
    return total / count  # DIFFERS (supervised.md 7): the release sums


def sliding_window_labels(
    model: Callable,
    image: torch.Tensor,
    num_classes: int,
    crop_size: int,
    stride: int,
    normalized: Callable,
) -> torch.Tensor:
    """`sliding_window_logits(...).argmax(1)` of one image, in memory for one row of windows.

    Args:
        image: uint8 (3, H, W)
        normalized: uint8 (1, 3, h, w) -> what the model takes
    Returns: uint8 (H, W)
    """
    height, width = image.shape[1:]
    label = torch.empty(height, width, dtype=torch.uint8)
    tops = window_starts(height, crop_size, stride)
    total = torch.zeros(1, num_classes, crop_size, width)  # of the rows from `top` on
    count = torch.zeros(1, 1, crop_size, width)
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        for left in window_starts(width, crop_size, stride):
            window = image[None, :, top : top + crop_size, left : left + crop_size]
            logits = padded_logits(model, normalized(window), crop_size).cpu()
            rows, columns = slice(0, window.shape[2]), slice(left, left + crop_size)
            total[:, :, rows, columns] += logits
            count[:, :, rows, columns] += 1
        done = following - top  # no later window reaches these rows
        label[top:following] = (total / count)[0, :, :done].argmax(0)
        total = F.pad(total[:, :, done:], (0, 0, 0, min(done, crop_size)))
        count = F.pad(count[:, :, done:], (0, 0, 0, min(done, crop_size)))
    return label


@dataclass(frozen=True)
class Protocol:
    """How an image is predicted; printed with every score.

    Attributes:
        pad_to: sides shorter than this many pixels are padded (whole images)
        window: side of the sliding window in pixels, None for whole images
        scales: factors; with several, or with `flip`, probabilities are averaged
    """

    pad_to: int
    window: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    @property
    def stride(self) -> int:
        return math.ceil(self.window * 2 / 3)

    def __str__(self) -> str:
        how = f"window {self.window}, stride {self.stride}" if self.window else "whole image"
        scales = ", ".join(f"{scale:g}" for scale in self.scales)
        return f"{how}, scales {scales}, {'flip' if self.flip else 'no flip'}"


def predict(
    model: Callable, image: torch.Tensor, num_classes: int, protocol: Protocol
) -> torch.Tensor:
    """Scores (B, C, H, W) of a normalized image: logits, or mean probabilities of several views."""

    def logits_of(view: torch.Tensor) -> torch.Tensor:
        if protocol.window:
            return sliding_window_logits(model, view, num_classes, protocol.window, protocol.stride)
        return padded_logits(model, view, protocol.pad_to)

    if protocol.scales == (1.0,) and not protocol.flip:
        return logits_of(image)
    prob = 0.0
    for scale in protocol.scales:
        size = [max(1, round(length * scale)) for length in image.shape[2:]]
        scaled = F.interpolate(image, size, mode="bilinear", align_corners=False)
        for flip in (False, True) if protocol.flip else (False,):
            logits = logits_of(scaled.flip(3) if flip else scaled)
            logits = logits.flip(3) if flip else logits
            logits = F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)
            prob = prob + logits.softmax(1)
    return prob / (len(protocol.scales) * (2 if protocol.flip else 1))


@torch.no_grad()
def confusion_of(
    model: Callable,
    dataset: Dataset,
    num_classes: int,
    protocol: Protocol,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> torch.Tensor:
    """The confusion matrix of a data set, int64 (C, C) on the CPU, the same on every process.

    Process `rank` takes images rank, rank + world_size, ... so that each counts once whatever the
    number of processes; one all-reduce adds the counts. The caller puts the model in eval mode.
    """
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    shard = range(rank, len(dataset), world_size)
    generator = torch.Generator()  # of its own: a loader draws a base seed even without shuffling
    loader = DataLoader(dataset, sampler=shard, num_workers=num_workers, generator=generator)
    for image, label in loader:
        image = normalize(image.to(device), mean, std)
        scores = predict(model, image, num_classes, protocol)
        confusion += confusion_matrix(label.to(device), scores.argmax(1), num_classes)
    if world_size > 1:
        dist.all_reduce(confusion)
    return confusion.cpu()


def validate(
    network: nn.Module,
    data: SegmentationData,
    protocol: Protocol,
    device: torch.device,
    num_workers: int = 0,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> dict[str, float]:
    """Scores on the data set's validation images, the same on every process, as they are logged:
    `val/miou`, and `val/iou/<class>` of the classes that occur.

    All processes predict with rank 0's buffers (BatchNorm statistics), which they keep.
    """
    place = (0, 1)
    if dist.is_initialized():
        place = (dist.get_rank(), dist.get_world_size())
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)
    mode, images = network.training, Validation(data, data.val_ids)
    model = network.eval().forward  # past a compiled call: whole images vary in size
    confusion = confusion_of(
        model, images, len(data.classes), protocol, device, *place, num_workers, mean, std
    )
    network.train(mode)
    iou = zip(data.classes, iou_per_class(confusion).tolist(), strict=True)
    scores = {f"val/iou/{name}": value for name, value in iou if not math.isnan(value)}
    return {"val/miou": mean_iou(confusion)} | scores


def colorize(label: torch.Tensor, palette) -> torch.Tensor:
    """Class ids (..., H, W) -> uint8 (..., 3, H, W) in the palette's colors; 255 is white."""
    colors = torch.full((256, 3), 255, dtype=torch.uint8)
    colors[: len(palette)] = torch.tensor(palette, dtype=torch.uint8)
    return colors[label.cpu().long()].movedim(-1, -3)


def side_by_side(images: list, maps: list, palette, count: int = 4) -> torch.Tensor:
    """One uint8 picture (3, count H, columns W): an image of the batch per line.

    Args:
        images: normalized images (B, 3, H, W)
        maps: labels (B, H, W) int64, confidences (B, H, W) float in [0, 1], shown gray, or logits
            (B, C, H, W), shown as their argmax; smaller ones are enlarged
    """
    panels = [denormalize(image[:count].detach().cpu()) for image in images]
    for tensor in (each[:count].detach().cpu() for each in maps):
        if tensor.ndim == 3 and tensor.is_floating_point():
            panel = (tensor * 255).byte()[:, None].expand(-1, 3, -1, -1)
        else:
            panel = colorize(tensor.argmax(1) if tensor.ndim == 4 else tensor, palette)
        panels.append(F.interpolate(panel, panels[0].shape[2:]))
    lines = torch.cat(panels, dim=3)  # (B, 3, H, columns W)
    return torch.cat(list(lines), dim=1)
