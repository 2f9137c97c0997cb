"""Directional context-aware consistency, DCC or CAC (Lai et al., CVPR 2021, 2106.14133).

    L = CE(f(x_l), y_l)
        + lambda r(t) sum_d mean_i log(1 + sum_j exp((<a_i, z_j> - <a_i, p_i>) / tau)),
    a, p: one place of an unlabeled image in two overlapping crops, the surer one p a constant;
    z_j: places of this and earlier images with another pseudo-label than a_i; d: both directions;
    r: a ramp up to 1

    python dcc.py --dataset shapes                               # no data, no GPU: minutes
    python dcc.py --split 1/8                                    # one GPU, Pascal VOC
    torchrun --nproc_per_node=8 dcc.py --split 1/8               # the same run on eight

Network, weak view and evaluation are those of the CPS paper (2106.01226v3), batch, crop, steps and
rates those of the release; docs/dcc.md lists what differs.
"""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import tyro
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from common import UserError, claim, explain, written_whole
from common.datasets import (
    IGNORE,
    MicroBatches,
    Samples,
    StreamSampler,
    open_data,
    step_generator,
    stream_seed,
)
from common.evaluation import Protocol, pixel_accuracy, side_by_side, validate
from common.files import load_weights, read_weights
from common.transforms import (
    MEAN,
    MEAN_COLOR,
    STD,
    WeakView,
    hsv_to_rgb,
    normalize,
    rgb_to_hsv,
    statistics,
)

# Kinds of numbers, with their least and greatest value.
Whole, Count = Annotated[int, 0, math.inf], Annotated[int, 1, math.inf]
Amount, Share = Annotated[float, 0, math.inf], Annotated[float, 0, 1]


@dataclass(frozen=True, kw_only=True)
class Args:
    """DCC. What is None takes its value from the data set's row of PAPER."""

    # === common flags (copied) ===
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run directory
    seed: Whole = 0  # weights, data order, views and masks follow from it
    output_dir: str = "runs"  # folder of the run directories
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # mixed precision; auto: on CUDA
    compile: bool = False  # torch.compile the networks
    deterministic: bool = False  # deterministic algorithms on GPUs, where torch has them
    num_workers: Whole = 2 if torch.accelerator.is_available() else 0  # loaders per stream; 0: none

    dataset: Literal["voc", "cityscapes", "camvid", "shapes", "folder"] = "voc"
    data_root: str = "data"  # folder of the data sets (of your own data, for folder)
    split: str | None = None  # 1/8 (cps:1/8), u2pl:1/8, pseudoseg:1/8, classic:92, 20, full, a file
    split_seed: Whole | None = None  # draw a ratio or a number of labeled images by this seed
    unlabeled: Literal["rest", "all"] = "rest"  # all: labeled images too, without their labels
    download: bool = False  # fetch the data set if it is not there
    check_data: bool = False  # decode and check every image and label, then stop

    backbone: Literal["resnet50", "resnet101", "resnet14"] | None = None  # resnet14: for CPUs
    weights: str | None = None  # the encoder's start: imagenet, none, or a torchvision state dict
    batch_size: Count | None = None  # labeled images per step, over all processes
    accumulate: Count = 1  # micro-batches per step, for small cards; BatchNorm sees one at a time
    crop_size: Annotated[int, 32, math.inf] | None = None  # side of the training crops, pixels
    steps: Count | None = None  # optimizer steps; ramps and warm-ups are fractions of it
    optimizer: Literal["sgd", "adamw"] | None = None  # poly schedule, power 0.9
    lr: Amount | None = None  # learning rate at step 0, for any number of processes
    head_lr_mult: Amount | None = None  # of all but the encoder, as a multiple of the encoder's
    momentum: Annotated[float, 0, 0.999] | None = None  # SGD's momentum, AdamW's beta_1
    weight_decay: Amount | None = None  # of weights; BatchNorm and biases have none
    supervised_loss: Literal["ce", "ohem"] | None = None  # ohem: hard pixels (0.7, 50,000 an image)

    log_every: Count = 50  # steps between rows of the log
    eval_every: Count | None = None  # steps between evaluations; None: a tenth of the run
    save_every: Count = 500  # steps between checkpoints

    # === flags of the method ===
    pair_scale: Annotated[tuple[float, float], 0.01, 8] | None = None  # least and greatest scale
    min_overlap: Share = 0.1  # of the two crops, intersection over union; 1: one crop, seen twice
    temperature: Annotated[float, 0.001, math.inf] = 0.1  # of the contrastive loss
    confidence_threshold: Share = 0.75  # above it a place is the other crop's positive
    directional: bool = True  # the less sure crop learns from the surer; else each from the other
    bank_steps: Count | None = None  # steps whose places are the negatives, this one included
    negatives: Count | None = None  # places of each crop that become negatives
    epsilon: Amount = 0.0  # added to the loss's ratio and inside its logarithm; 1e-8: as released
    lambda_u: Amount | None = None  # weight of the contrastive loss, the sum of its two directions
    dcc_start: Share | None = None  # share of the steps before the contrastive loss sets in
    ramp_up: Share | None = None  # share of the steps over which its weight then rises from 0.7 %
    log_pseudo_accuracy: bool = False  # where unlabeled images have labels, for the log alone


# === paper ===
# Sources: CAC 4fdec7a; camvid and shapes are ours. An entry that depends on other flags is a
# function of them.
# DIFFERS (dcc.md 7): scales of the pair are factors of the image's size.
# DIFFERS (dcc.md 8): the supervised loss of the other scripts on Cityscapes, and their weak view.
# DIFFERS (dcc.md 9): camvid and shapes ramp the contrast in, since their networks start from
# scratch.
# DIFFERS (dcc.md 11): weight decay acts on weights alone.
# DIFFERS (dcc.md 12): labeled lists of the CPS protocol.
PAPER = {
    "voc": dict(
        split="1/8", backbone="resnet50", weights="imagenet", batch_size=8, crop_size=320,
        steps=92_560,
        optimizer="sgd", lr=0.001, momentum=0.9, weight_decay=1e-4, supervised_loss="ce",
        head_lr_mult=10.0, pair_scale=(0.64, 1.6),
        bank_steps=lambda args: 3 if args.backbone == "resnet101" else 2,
        negatives=lambda args: (args.crop_size // 8) ** 2,  # all
        lambda_u=0.1, dcc_start=0.0625, ramp_up=0.0,
    ),
    "cityscapes": dict(
        split="1/8", backbone="resnet50", weights="imagenet", batch_size=8, crop_size=720,
        steps=92_560,
        optimizer="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4, supervised_loss="ohem",
        head_lr_mult=10.0, pair_scale=(0.8, 2.0),
        bank_steps=1,
        negatives=lambda args: (args.crop_size // 8) ** 2,
        lambda_u=0.1, dcc_start=0.0625, ramp_up=0.0,
    ),
    "camvid": dict(
        split="1/8", backbone="resnet14", weights="none", batch_size=8, crop_size=160, steps=1_000,
        optimizer="adamw", lr=1e-3, momentum=0.9, weight_decay=1e-4, supervised_loss="ce",
        head_lr_mult=1.0, pair_scale=(0.8, 2.0),
        bank_steps=2,
        negatives=lambda args: (args.crop_size // 8) ** 2,
        lambda_u=0.1, dcc_start=0.0, ramp_up=0.4,
    ),
}  # fmt: skip
PAPER["shapes"] = PAPER["camvid"] | dict(
    split="20", batch_size=16, crop_size=48, pair_scale=(0.75, 1.25)
)
PAPER["folder"] = PAPER["voc"] | dict(split=lambda args: f"{args.data_root}/labeled.txt")


# === method ===
# A place is an entry of the maps at stride 8, of which a crop has S x S, S = H / 8.
EMBEDDING = 128  # channels of the projector
CHUNK = 2048  # negatives that are compared at a time
RELEASED_ROWS = 8000  # negatives that the released code looks at for its row maximum


def directional_contrastive_loss(
    anchor: torch.Tensor,
    positive: torch.Tensor,
    label: torch.Tensor,
    confidence_anchor: torch.Tensor,
    confidence_positive: torch.Tensor,
    negatives: torch.Tensor,
    negative_labels: torch.Tensor,
    temperature: float = 0.1,
    threshold: float = 0.75,
    epsilon: float = 0.0,
) -> torch.Tensor:
    """One direction of the loss: mean of `contrast` over the active anchors; 0 if there are none.

    Training takes both directions in one pass over the negatives, by `both_directions`.

    Args:
        anchor, positive: (n, D) unit vectors of the same places in two crops; gradient to `anchor`
        label: (n,) the anchors' own pseudo-labels; negatives have another one
        confidence_anchor, confidence_positive: (n,) greatest probabilities
        negatives, negative_labels: (N, D) unit vectors and (N,) pseudo-labels
    """
    active = active_anchors(confidence_anchor, confidence_positive, threshold)
    loss = contrast(anchor, positive, label, negatives, negative_labels, temperature, epsilon)
    return (loss * active).sum() / active.sum().clamp(min=1)


def active_anchors(
    confidence_anchor: torch.Tensor,
    confidence_positive: torch.Tensor,
    threshold: float,
    directional: bool = True,
) -> torch.Tensor:
    """Whose positive is sure, and surer than themselves: bool; ties are in no direction."""
    sure = confidence_positive > threshold
    return sure & (confidence_anchor < confidence_positive) if directional else sure


def contrast(
    anchor: torch.Tensor,
    positive: torch.Tensor,
    label: torch.Tensor,
    negatives: torch.Tensor,
    negative_labels: torch.Tensor,
    temperature: float,
    epsilon: float = 0.0,
) -> torch.Tensor:
    """-log(e^s / (e^s + sum_j e^s_j)) of each anchor, (n,); s: similarity to its positive.

    Arguments as in `directional_contrastive_loss`.
    """
    anchor, positive = full_precision(anchor), full_precision(positive.detach())
    negatives = full_precision(negatives.detach())
    s = (anchor * positive).sum(1) / temperature
    others = NegativeLogSumExp.apply(anchor, label, negatives, negative_labels, temperature)
    # DIFFERS (dcc.md 2): an exact log-sum-exp; the release's 1e-8 weakens the hardest anchors.
    if epsilon == 0:
        return F.softplus(others - s)
    # As released, exponentials are relative to the greatest similarity among the positive and the
    # first 8,000 negatives, whatever their labels.
    # DIFFERS (dcc.md 2): these are others than the release's, whose bank has another order.
    with torch.no_grad():
        top = s
        for part in negatives[:RELEASED_ROWS].split(CHUNK) if len(negatives) else ():
            top = torch.maximum(top, (anchor @ part.T).amax(1) / temperature)
    s, others = (s - top).exp(), (others - top).exp()
    return -(s / (s + others + epsilon) + epsilon).log()


def both_directions(embedding, label, confidence, negatives, negative_labels, args):
    """Sums of `contrast` over the active anchors of each direction, (2,); which these are, (2, n).

    embedding (2, n, D), label and confidence (2, n): the same places in both crops
    """
    rule = (args.confidence_threshold, args.directional)
    active = active_anchors(confidence, confidence.flip(0), *rule)
    bank = (negatives, negative_labels, args.temperature, args.epsilon)
    if args.directional:  # a place is active in one direction at most: one pass serves both
        in_first = active[0, :, None]
        anchor = torch.where(in_first, embedding[0], embedding[1])
        positive = torch.where(in_first, embedding[1], embedding[0])
        loss = contrast(anchor, positive, torch.where(active[0], label[0], label[1]), *bank)
    else:
        anchor, positive = embedding.flatten(0, 1), embedding.flip(0).flatten(0, 1)
        loss = contrast(anchor, positive, label.flatten(), *bank).view_as(active)
    return (loss * active).sum(1), active


class NegativeLogSumExp(torch.autograd.Function):
    """log sum_j [u_j != y_i] exp(<a_i, z_j> / temperature), (n,); -inf without negatives.

    The n x N similarities exist only CHUNK columns at a time: backward makes them again. Gradient
    to the anchors alone.
    """

    @staticmethod
    def forward(ctx, anchor, label, negatives, negative_labels, temperature):
        total = anchor.new_full((len(anchor),), -math.inf)
        for _, logits in similarities(anchor, label, negatives, negative_labels, temperature):
            total = torch.logaddexp(total, logits.logsumexp(1))
        ctx.save_for_backward(anchor, label, negatives, negative_labels, total)
        ctx.temperature = temperature
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *inputs, total = ctx.saved_tensors
        total = total.masked_fill(total == -math.inf, 0)[:, None]  # all their terms are 0
        pull = torch.zeros_like(inputs[0])  # sum_j softmax_ij z_j
        for part, logits in similarities(*inputs, ctx.temperature):
            pull.addmm_(logits.sub_(total).exp_(), part)
        return pull * (grad / ctx.temperature)[:, None], None, None, None, None


def similarities(anchor, label, negatives, negative_labels, temperature):
    """Chunks of negatives, each with <a_i, z_j> / temperature; -inf where the labels are equal."""
    chunks = zip(negatives.split(CHUNK), negative_labels.split(CHUNK), strict=True)
    for part, labels in chunks:
        product = (anchor / temperature) @ part.T
        yield part, product.masked_fill_(label[:, None] == labels, -math.inf)


class ContrastiveNetwork(nn.Module):
    """DeepLabV3+ with the projector of its features."""

    # DIFFERS (dcc.md 6): without dropout.
    def __init__(self, network: nn.Module, projector: nn.Module):
        super().__init__()
        self.network, self.projector = network, projector

    def embed(self, crop: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unit vectors (B, S, S, D); pseudo-labels and confidences (B, S, S) without gradient."""
        features = F.avg_pool2d(self.network.head(*self.network.encode(crop)), 2)  # stride 8
        # Detached, not under no_grad, where autocast would keep the weight without its gradient.
        logits = full_precision(self.network.classifier(features.detach())).detach()
        confidence, pseudo_label = logits.softmax(1).max(1)
        embedding = F.normalize(full_precision(self.projector(features)), dim=1)
        return embedding.permute(0, 2, 3, 1), pseudo_label, confidence

    def forward(self, image_l: torch.Tensor, crop_1: torch.Tensor, crop_2: torch.Tensor):
        """Logits (B, C, H, W) of labeled images, and what `embed` says of both crops, (2, B, ...).

        Each passes alone, so that BatchNorm has statistics of its own for it.
        """
        logits_l = self.network(image_l)
        crops = zip(self.embed(crop_1), self.embed(crop_2), strict=True)
        return logits_l, *(torch.stack(both) for both in crops)


def make_projector(args, in_channels: int) -> nn.Sequential:
    """Two 1x1 convolutions to the space of the contrast."""
    torch.manual_seed(stream_seed(args.seed, "weights/projector"))
    hidden = nn.Conv2d(in_channels, in_channels, 1)
    return nn.Sequential(hidden, nn.ReLU(), nn.Conv2d(in_channels, EMBEDDING, 1))


class NegativeBank:
    """The newest `capacity` places, oldest first: (N, D) embeddings and (N,) pseudo-labels."""

    def __init__(self, capacity: int, device: torch.device):
        self.capacity = capacity
        self.embeddings = torch.empty(0, EMBEDDING, device=device)
        self.labels = torch.empty(0, dtype=torch.long, device=device)

    def add(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        excess = max(0, len(self.labels) + len(labels) - self.capacity)
        self.embeddings = torch.cat([self.embeddings[excess:], embeddings.detach()])
        self.labels = torch.cat([self.labels[excess:], labels])

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"embeddings": self.embeddings, "labels": self.labels}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        device = self.labels.device
        self.embeddings, self.labels = state["embeddings"].to(device), state["labels"].to(device)


def draw_places(
    batch_size: int, places: int, count: int, generator: torch.Generator
) -> torch.Tensor:
    """`count` different places of each crop, (2, B, count) int64; in order if these are all."""
    if count == places:
        return torch.arange(places).expand(2, batch_size, places)
    return torch.rand(2, batch_size, places, generator=generator).argsort(2)[:, :, :count]


def take(maps: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Maps (2, B, S, S, ...) at `places` (2, n), numbers of the flattened maps: (2, n, ...)."""
    return maps.flatten(0, 3).index_select(0, places.flatten()).unflatten(0, places.shape)


def gather_crops(value: torch.Tensor, world_size: int) -> torch.Tensor:
    """(2, n, ...) of every process -> (2 n world_size, ...), in the order of the global batch."""
    parts = [value]
    if world_size > 1:
        parts = [torch.empty_like(value) for _ in range(world_size)]
        dist.all_gather(parts, value.contiguous())
    return torch.cat(parts, dim=1).flatten(0, 1)


def over_processes(value: torch.Tensor, world_size: int) -> torch.Tensor:
    """Mean of a tensor over the processes."""
    if world_size > 1:
        dist.all_reduce(value)
        value = value / world_size
    return value


# === schedules (copied) ===
def ramp_up(step: int, ramp_up_steps: float) -> float:
    """exp(-5 (1 - t)^2) with t = step / ramp_up_steps; 1 from `ramp_up_steps` on."""
    if step >= ramp_up_steps:
        return 1.0
    return math.exp(-5 * (1 - step / ramp_up_steps) ** 2)


# === crops ===
def overlapping_crops(
    height: int,
    width: int,
    crop_size: int,
    generator: torch.Generator,
    min_overlap: float = 0.1,
    tries: int = 50,
) -> tuple[tuple, tuple, tuple, tuple]:
    """Two windows of `crop_size` a side, a multiple of 8 pixels apart, that overlap enough.

    The second is drawn until the windows' intersection over union is at least `min_overlap`; after
    `tries` it is the first.

    Returns:
        corner_1, corner_2: (top, left) in the image; 0 along a side shorter than the window
        rectangle_1, rectangle_2: (top, left, bottom, right) of what they share, in pixels of each
            window: multiples of 8, without padding (which is below and to the right of the image)
    """
    ranges = [max(0, length - crop_size) + 1 for length in (height, width)]
    first = [int(torch.randint(n, (), generator=generator)) for n in ranges]
    for _ in range(tries):
        draw = [int(torch.randint(n, (), generator=generator)) for n in ranges]
        second = [a + (b - a) // 8 * 8 for a, b in zip(first, draw, strict=True)]
        second = [b if b >= 0 else b + 8 for b in second]
        shift = [abs(b - a) for a, b in zip(first, second, strict=True)]
        shared = math.prod(max(0, crop_size - d) for d in shift)
        if shared >= min_overlap * (2 * crop_size**2 - shared):
            break
    else:
        second = first
    rectangles = []
    for own, other in ((first, second), (second, first)):
        shift = [b - a for a, b in zip(own, other, strict=True)]
        begin = [max(0, d) for d in shift]
        ends = zip(shift, (height, width), strict=True)
        end = [min(crop_size, crop_size + d, length) // 8 * 8 for d, length in ends]
        rectangles.append((*begin, *end))
    return tuple(first), tuple(second), *rectangles


class PairView:
    """A scale from the range `scale`, two overlapping crops, each flipped with p = 0.5.

    Draws from torch's default generator, as `WeakView` does. As there the window around both crops
    is cut first and then resized, once. Padding is below and to the right.
    """

    def __init__(self, crop_size: int, scale: tuple[float, float], min_overlap: float):
        self.crop_size, self.scale, self.min_overlap = crop_size, scale, min_overlap

    def __call__(self, image, label) -> tuple[torch.Tensor, ...]:
        """(2, 3, H, W), (2, H, W), rectangles (2, 4) in the crops before the flip, flips (2,)."""
        crop, (least, greatest) = self.crop_size, self.scale
        scale = least + (greatest - least) * float(torch.rand(()))
        scaled = [max(1, round(length * scale)) for length in image.shape[1:]]
        draw = (torch.default_generator, self.min_overlap)
        *corners, rectangle_1, rectangle_2 = overlapping_crops(*scaled, crop, *draw)
        flip = torch.rand(2) < 0.5
        # The window around both crops, in pixels of the scaled image and of the image.
        begin, resized, corner, size = [], [], [], []
        for a, b, new, old in zip(*corners, scaled, image.shape[1:], strict=True):
            begin.append(min(a, b))
            resized.append(min(max(a, b) + crop, new) - begin[-1])
            size.append(min(max(1, round(resized[-1] / scale)), old))
            corner.append(min(round(begin[-1] / scale), old - size[-1]))
        margins = [0, 0, *(max(0, crop - length) for length in reversed(resized))]
        views = []
        for tensor, fill in ((image, list(MEAN_COLOR)), (label, IGNORE)):
            window = TF.crop(tensor, *corner, *size)
            window = TF.resize(window, resized, antialias=False)  # DIFFERS (dcc.md 13): bilinear
            window = TF.pad(window, margins, fill=fill)
            crops = [TF.crop(window, y - begin[0], x - begin[1], crop, crop) for y, x in corners]
            crops = [TF.horizontal_flip(c) if f else c for c, f in zip(crops, flip, strict=True)]
            views.append(torch.stack([each.as_subclass(torch.Tensor) for each in crops]))
        return *views, torch.tensor([rectangle_1, rectangle_2]), flip


def make_pairs(args, data, ids, stream, place, labels):
    """As `make_batches`, of the crops of `PairView`.

    Yields [crop_1, crop_2], labels (2, B, S, S) at the middle of places, and `overlap_places`.
    """
    start, rank, world_size, device = place
    # DIFFERS (dcc.md 5): new crops at every step, no replay of cached batches.
    sampler = StreamSampler(len(ids), args.batch_size, args.seed, rank, world_size, start, stream)
    loader = DataLoader(
        Samples(data, ids, PairView(args.crop_size, args.pair_scale, args.min_overlap), labels),
        batch_sampler=MicroBatches(sampler, args.accumulate),
        num_workers=args.num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # of its own: a loader draws a seed from it
    )
    for image, label, rectangle, flip in loader:
        overlap = overlap_places(rectangle, flip, args.crop_size // 8)  # CPU: a GPU would wait
        batch = (image, label[:, :, 4::8, 4::8].transpose(0, 1), overlap)
        image, label, overlap = (part.to(device, non_blocking=True) for part in batch)
        yield [normalize(crop) for crop in image.unbind(1)], label.long(), overlap


def overlap_places(rectangle: torch.Tensor, flip: torch.Tensor, side: int) -> torch.Tensor:
    """Places of the overlap, numbers of the flattened maps (2, B, side, side): (2, n) int64.

    Column i of both is the same part of an image. Image by image and row by row; a flipped crop is
    read from right to left.

    Args:
        rectangle: (B, 2, 4) (top, left, bottom, right) in pixels of each crop before its flip
        flip: (B, 2) bool
    """
    top, left, bottom, right = (rectangle // 8).transpose(0, 1)[..., None].unbind(2)  # (2, B, 1)
    at = torch.arange(side)
    rows, columns = (at >= top) & (at < bottom), (at >= left) & (at < right)  # (2, B, side)
    shared = rows[..., :, None] & columns[..., None, :]  # as many places of either crop
    crop, image, row, column = shared.nonzero().T.unflatten(1, (2, -1))  # (2, n) each
    column = torch.where(flip[image, crop], side - 1 - column, column)
    return ((crop * len(flip) + image) * side + row) * side + column


# === colors ===
def change_colors(
    image: torch.Tensor, batch_size: int, first: int, generator: torch.Generator
) -> torch.Tensor:
    """Blur 50 % of the images, jitter 80 % and make 20 % gray: coins for a global batch.

    Args:
        image: (n, 3, H, W) normalized, images `first` to `first + n` of the global batch
    """
    # DIFFERS (dcc.md 10): one order of the changes for the whole batch.
    order = torch.randperm(4, generator=generator).tolist()
    draw = torch.rand(batch_size, 7, generator=generator)[first : first + len(image)]
    change = torch.tensor([0.4, 0.4, 0.4, 0.1]) * (2 * draw[:, 3:] - 1) * (draw[:, :1] < 0.8)
    factors = (change + torch.tensor([1.0, 1.0, 1.0, 0.0])).to(image, non_blocking=True)
    chosen = (draw[:, 1:3] < torch.tensor([0.5, 0.2])).to(image.device, non_blocking=True)
    is_blurred, is_gray = chosen.unbind(1)
    mean, std = statistics(image.device)
    blurred = TF.gaussian_blur(image, [5, 5], [1.1, 1.1])  # the deviation of a kernel of 5
    image = torch.where(is_blurred[:, None, None, None], blurred, image).mul_(std).add_(mean)
    image = jitter(image.clamp_(0, 1), factors, order)
    image = torch.where(is_gray[:, None, None, None], gray(image), image)
    return ((image - mean) / std).contiguous(memory_format=torch.channels_last)


def jitter(image: torch.Tensor, factors: torch.Tensor, order: list[int]) -> torch.Tensor:
    """torchvision's ColorJitter on a batch (B, 3, H, W) in [0, 1], each image by its own factors.

    Args:
        factors: (B, 4) of brightness, contrast, saturation (1 changes nothing) and turns of hue
        order: permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue
    """
    brightness, contrast, saturation, hue = factors[:, :, None, None, None].unbind(1)

    def blend(image, other, factor):
        return torch.lerp(other, image, factor).clamp_(0, 1)

    def turn(image):
        angle, *others = rgb_to_hsv(image).unbind(1)
        return hsv_to_rgb(torch.stack([(angle + hue[:, 0]) % 1, *others], 1))

    changes = [
        lambda x: (x * brightness).clamp_(0, 1),
        lambda x: blend(x, gray(x).mean((2, 3), keepdim=True), contrast),
        lambda x: blend(x, gray(x), saturation),
        turn,
    ]
    for number in order:
        image = changes[number](image)
    return image


def gray(image: torch.Tensor) -> torch.Tensor:
    """Luminance, (B, 3, H, W) -> (B, 1, H, W)."""
    red, green, blue = image.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]


# === losses (copied) ===
def full_precision(logits: torch.Tensor) -> torch.Tensor:
    """Half precision as fp32; fp32 and fp64 as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def cross_entropy(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean over the valid pixels of the local batch; 0 if there are none.

    logits: (B, C, H, W); label: (B, H, W) int64 class ids, 255 ignored
    """
    loss = F.cross_entropy(full_precision(logits), label, ignore_index=IGNORE, reduction="none")
    # DIFFERS (supervised.md 6): 0 without valid pixels, not NaN.
    return loss.sum() / (label != IGNORE).sum().clamp(min=1)


def ohem_cross_entropy(
    logits: torch.Tensor, label: torch.Tensor, threshold: float = 0.7, min_kept: int = 50_000
) -> torch.Tensor:
    """Mean cross-entropy over the hard valid pixels of the local batch; 0 if there are none.

    Hard: the true class has at most probability `threshold`, or is among the `min_kept` lowest.
    Fewer valid pixels than `min_kept`, or `min_kept` 0: plain cross-entropy.
    """
    loss = F.cross_entropy(full_precision(logits), label, ignore_index=IGNORE, reduction="none")
    valid = label != IGNORE  # (B, H, W), as the loss
    if 0 < min_kept <= label.numel():
        with torch.no_grad():  # neither the threshold nor the choice carries gradient
            prob = torch.where(valid, (-loss).exp(), 1.0)
            kth_lowest = prob.flatten().kthvalue(min_kept).values
            hard = valid & (prob <= kth_lowest.clamp(min=threshold))
            valid = torch.where(valid.sum() >= min_kept, hard, valid)
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def supervised_loss(logits: torch.Tensor, label: torch.Tensor, kind: str) -> torch.Tensor:
    """`ce`, or the mean of each image's `ohem` (0.7, 50,000 pixels), on any number of processes."""
    if kind == "ohem":  # as in the CPS release, of one labeled image per process
        return sum(map(ohem_cross_entropy, logits.split(1), label.split(1))) / len(label)
    return cross_entropy(logits, label)


def main(args: Args) -> dict:
    """Train and evaluate; returns miou, best_miou, steps and run_dir."""
    # === setup (copied) ===
    args = resolve(args)
    rank, world_size, device = find_device(args)
    data, split = open_data(args)
    run = Run(args, data, split, rank)
    if world_size > 1:  # torchrun's store outlives its restarts, the addresses in it do not
        store, *_ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    checkpoint = run.open()
    start = checkpoint["step"]
    place = (start, rank, world_size, device)
    autocast, scaler = make_autocast(args, device)
    protocol = Protocol(pad_to=args.crop_size, window=args.crop_size if data.sliding else None)

    # === networks ===
    batches_l = make_batches(args, data, split.labeled, "labeled", place)
    side = args.crop_size // 8  # places along a side of a crop
    if args.crop_size % 8 or args.negatives > side**2:
        places = f"--negatives {args.negatives}: use at most its {side**2} places"
        raise UserError(f"--crop-size {args.crop_size}: use a multiple of 8; {places}")
    labels = "known" if args.log_pseudo_accuracy else "none"
    batches_u = make_pairs(args, data, split.unlabeled, "unlabeled", place, labels)
    network = make_network(args, len(data.classes), "1")
    projector = make_projector(args, network.classifier.in_channels)
    ddp = prepare(ContrastiveNetwork(network, projector), args, world_size, device)
    ddps = [ddp]
    optimizer = make_optimizer([network, projector], args, device)
    bank = NegativeBank(args.bank_steps * 2 * args.batch_size * args.negatives, device)
    saved = {"network": network, "projector": projector, "bank": bank}
    evaluated = "network"  # DIFFERS (dcc.md 13): the last one, not the best of all evaluations

    # === resume (copied) ===
    saved |= {"optimizer": optimizer, "scaler": scaler}
    for name, thing in saved.items() if start else ():
        if state := checkpoint.pop(name):  # the scaler's is empty unless fp16
            thing.load_state_dict(state)
    history, clock = [], time.perf_counter()
    silent = True if rank else None  # None: silent unless stderr is a terminal
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, disable=silent):
        # === batch (copied) ===
        torch.manual_seed(stream_seed(args.seed, f"step/rank {rank}", step))  # as if never stopped
        lr = poly_lr(args.lr, step, args.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        for micro in range(args.accumulate):
            for wrapper in ddps:  # gradients are averaged once, in the last micro-batch
                wrapper.require_backward_grad_sync = micro == args.accumulate - 1
            image_l, label_l = next(batches_l)

            # === loss ===
            crops, label_u, overlap = next(batches_u)
            n = len(image_l)
            first = (rank * args.accumulate + micro) * n  # this micro-batch in the global one
            generator = step_generator(args.seed, "colors", step)
            crops = [change_colors(crop, args.batch_size, first, generator) for crop in crops]
            generator = step_generator(args.seed, "negatives", step)
            chosen = draw_places(args.batch_size, side**2, args.negatives, generator)
            chosen = chosen[:, first : first + n] + side**2 * torch.arange(2 * n).view(2, n, 1)
            chosen = chosen.flatten(1).to(device, non_blocking=True)
            with autocast:
                logits_l, *maps = ddp(image_l, *crops)
            embedding, pseudo_label, confidence = maps  # of both crops
            loss_sup = supervised_loss(logits_l, label_l, args.supervised_loss)
            # Negatives are places of whole crops, padding included.
            # DIFFERS (dcc.md 4): they enter the bank before the loss sets in, too.
            negatives = [take(each, chosen) for each in (embedding.detach(), pseudo_label)]
            bank.add(*(gather_crops(each, world_size) for each in negatives))
            # Anchors and their positives are places of the overlap.
            pairs = [take(each, overlap) for each in maps]
            sums, active = both_directions(*pairs, bank.embeddings, bank.labels, args)
            same = pairs[1][:1] == pairs[1][1:]  # pseudo-labels
            counts = torch.cat([active, same, torch.ones_like(same)]).sum(1).to(sums)  # (4,)
            # DIFFERS (dcc.md 1): mean over the active places, as released; the paper's is of all.
            # DIFFERS (dcc.md 3): of all processes, not of each.
            num_active, (num_same, num_places) = over_processes(counts, world_size).split(2)
            loss_contrastive = (sums / num_active.clamp(min=1 / world_size)).sum()
            weight, start_step = 0.0, args.dcc_start * args.steps
            if step >= start_step:
                weight = args.lambda_u * ramp_up(step - start_step, args.ramp_up * args.steps)
            loss = loss_sup + weight * loss_contrastive

            logs = {"loss/sup": loss_sup, "loss/contrastive": loss_contrastive}
            logs["pseudo/confidence"] = confidence.mean((1, 2, 3)).mean()
            num_places = num_places.clamp(min=1 / world_size)
            logs["pseudo/active"] = num_active.sum() / (2 * num_places)
            logs["pseudo/agreement"] = num_same / num_places
            if args.log_pseudo_accuracy:
                logs["pseudo/accuracy"] = pixel_accuracy(pseudo_label, label_u)
            shown = [each[crop] for crop in (0, 1) for each in (pseudo_label, confidence)]
            pictures = {"labeled": ([image_l], [label_l, logits_l]), "unlabeled": (crops, shown)}

            # === backward (copied) ===
            scaler.scale(loss / args.accumulate).backward()
            history.append({name: value.detach() for name, value in logs.items()})

        # === step (copied) ===
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # === report (copied) ===
        done, last = step + 1, step + 1 == args.steps
        eval_now = last or done % args.eval_every == 0
        save_now = last or done % args.save_every == 0
        if not (eval_now or save_now or done % args.log_every == 0):
            continue
        row = average(history, done, args.accumulate, world_size)  # makes a GPU wait
        images = args.batch_size * len(history) / args.accumulate  # labeled ones
        row |= {"lr": lr, "time/images_per_s": images / (time.perf_counter() - clock)}
        if last:  # a fault in the last evaluation loses no training
            run.save("last.pt", done, saved, evaluated, unscored=row)
        if eval_now:
            with autocast:
                row |= validate(saved[evaluated], data, protocol, device, args.num_workers)
        run.report(done, row, pictures if eval_now else {}, saved, evaluated, save_now)
        history, clock = [], time.perf_counter()

    # === finish (copied) ===
    if checkpoint["unscored"]:  # the run was stopped in its last evaluation: this is it
        with autocast:
            scores = validate(saved[evaluated], data, protocol, device, args.num_workers)
        run.report(args.steps, checkpoint["unscored"] | scores, {}, saved, evaluated, True)
    run.close(f"mIoU {100 * run.miou:.2f} (last), {100 * run.best_miou:.2f} (best), {protocol}")
    scores = {"miou": run.miou, "best_miou": run.best_miou}
    return scores | {"steps": args.steps, "run_dir": str(run.folder)}


# === model (copied) ===
class SlimBottleneck(Bottleneck):
    """torchvision's bottleneck with outputs of 64 to 512 channels instead of 256 to 2048."""

    expansion = 1


# name: (block, blocks per stage, stages 2 to 4: dilated instead of strided, width of the 3x3,
#        head width, ASPP rates)
BACKBONES = {
    "resnet50": (Bottleneck, [3, 4, 6, 3], [False, False, True], 64, 256, (6, 12, 18)),
    "resnet101": (Bottleneck, [3, 4, 23, 3], [False, False, True], 64, 256, (6, 12, 18)),
    "resnet14": (SlimBottleneck, [1, 1, 1, 1], [False, True, True], 32, 64, (2, 4, 6)),
}


def conv(inputs: int, outputs: int, size: int, dilation: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width, without bias."""
    return nn.Conv2d(inputs, outputs, size, 1, dilation * (size // 2), dilation, bias=False)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling; the image-level branch is added, not concatenated."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int, rates: tuple[int, ...]):
        super().__init__()
        self.branches = nn.ModuleList([conv(in_channels, hidden, 1)])
        self.branches += [conv(in_channels, hidden, 3, rate) for rate in rates]
        self.branches_bn = nn.BatchNorm2d(hidden * len(self.branches))
        self.project = conv(hidden * len(self.branches), out_channels, 1)
        self.pool = conv(in_channels, hidden, 1)
        self.pool_bn = nn.BatchNorm2d(hidden)
        self.pool_project = conv(hidden, out_channels, 1)
        self.out_bn = nn.BatchNorm2d(out_channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        branches = torch.cat([branch(features) for branch in self.branches], dim=1)
        out = self.project(F.leaky_relu(self.branches_bn(branches), 0.01))
        pooled = self.pool(features.mean((2, 3), keepdim=True))  # (B, hidden, 1, 1)
        out = out + self.pool_project(F.leaky_relu(self.pool_bn(pooled), 0.01))
        return F.leaky_relu(self.out_bn(out), 0.01)


class Head(nn.Module):
    """DeepLabV3+ decoder: stage 1 and stage 4 features -> (B, width, H/4, W/4)."""

    def __init__(self, low: int, high: int, width: int, rates: tuple[int, ...]):
        super().__init__()
        self.aspp, reduced = ASPP(high, width, width, rates), 48 * width // 256
        self.reduce = nn.Sequential(conv(low, reduced, 1), nn.BatchNorm2d(reduced), nn.ReLU())
        self.fuse = nn.Sequential(
            conv(width + reduced, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
            conv(width, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip

    def forward(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        high = F.interpolate(self.aspp(high), low.shape[2:], mode="bilinear", align_corners=True)
        return self.fuse(torch.cat([high, self.reduce(low)], dim=1))


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ as in the CPS release, on torchvision's ResNet, output stride 16 (resnet14: 8).

    (B, 3, H, W) normalized images -> (B, C, H, W) logits
    """

    # DIFFERS (supervised.md 1): a 7x7 stem, not three 3x3, so that torchvision's weights load.
    def __init__(self, num_classes: int, backbone: str = "resnet50"):
        super().__init__()
        block, depths, unstrided, inner, width, rates = BACKBONES[backbone]
        self.backbone = ResNet(
            block, depths, replace_stride_with_dilation=unstrided, width_per_group=inner
        )
        self.backbone.fc = nn.Identity()  # an unused layer would stall DDP
        for unit, dilation in zip(self.backbone.layer4, (2, 4, 8), strict=False):
            unit.conv2.dilation = unit.conv2.padding = (dilation, dilation)
        self.head = Head(64 * block.expansion, 512 * block.expansion, width, rates)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        for module in [*self.head.modules(), self.classifier]:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def encode(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage 1 (stride 4) and stage 4 features."""
        net = self.backbone
        low = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(image)))))
        return low, net.layer4(net.layer3(net.layer2(low)))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = full_precision(self.classifier(self.head(*self.encode(image))))  # or argmax ties
        return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=True)


def make_network(args, num_classes: int, name: str) -> DeepLabV3Plus:
    """A network that starts from (seed, name), then from torchvision's encoder or from a file."""
    torch.manual_seed(stream_seed(args.seed, f"weights/{name}"))
    network = DeepLabV3Plus(num_classes, args.backbone)
    if args.weights == "none" or (dist.is_initialized() and dist.get_rank() > 0):
        return network  # DDP gives every process rank 0's
    try:
        if args.weights == "imagenet":
            weights = torchvision.models.get_model_weights(args.backbone).IMAGENET1K_V1
            load_weights(network, weights.get_state_dict(check_hash=True))
        else:
            load_weights(network, read_weights(args.weights))
    except Exception as error:  # torch raises many kinds for a bad file
        mend = f"use none, a file, or put imagenet's into {torch.hub.get_dir()}/checkpoints"
        raise UserError(f"--weights {args.weights}, {args.backbone}: {error}; {mend}") from None
    return network


# === loader (copied) ===
def make_batches(args, data, ids, stream, place, partner=None, labels="all"):
    """Endless micro-batches of weak views: (B, 3, H, W) normalized and (B, H, W) int64.

    `place`: (first step, rank, world_size, device). See `MicroBatches` and `Samples` for the rest.
    """
    start, rank, world_size, device = place
    sampler = StreamSampler(len(ids), args.batch_size, args.seed, rank, world_size, start, stream)
    loader = DataLoader(
        Samples(data, ids, WeakView(args.crop_size, data.scales), labels),
        batch_sampler=MicroBatches(sampler, args.accumulate, partner),
        num_workers=args.num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # of its own: a loader draws a seed from it
    )
    on_device = ([part.to(device, non_blocking=True) for part in batch] for batch in loader)
    return ((normalize(image), label.long()) for image, label in on_device)


# === training (copied) ===
def prepare(network: nn.Module, args, world_size: int, device: torch.device) -> nn.Module:
    """Move a module to its device; returns what to call for training, itself or its DDP wrapper."""
    if world_size > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.to(device, memory_format=torch.channels_last)
    if args.compile:
        network.compile()
    if world_size == 1:
        return network
    # Buffers stay local: a broadcast between two forwards would change what backward needs.
    warnings.filterwarnings("ignore", ".*broadcast_buffers.*")  # deprecated; 2.11 has no other
    return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)


def make_optimizer(networks, args, device: torch.device) -> torch.optim.Optimizer:
    """One optimizer for all networks: without clipping the same as one for each."""
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in (item for network in networks for item in network.named_parameters()):
        lr_mult = 1.0 if name.startswith("backbone.") else args.head_lr_mult
        weight_decay = args.weight_decay if parameter.ndim > 1 else 0.0  # not BN and biases
        groups.setdefault((lr_mult, weight_decay), []).append(parameter)
    groups = [{"params": p, "lr_mult": m, "weight_decay": w} for (m, w), p in groups.items()]
    fused = device.type in ("cpu", "cuda")
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.lr, momentum=args.momentum, fused=fused)
    return torch.optim.AdamW(groups, args.lr, betas=(args.momentum, 0.999), fused=fused)


def make_autocast(args, device: torch.device):
    """(autocast context, gradient scaler); each does nothing where it is not wanted."""
    amp = args.amp
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    return torch.autocast(device.type, dtype, enabled=amp in ("bf16", "fp16")), scaler


def poly_lr(base_lr: float, step: int, total_steps: int, power: float = 0.9) -> float:
    """base_lr (1 - step / total_steps)^power."""
    return base_lr * (1 - step / total_steps) ** power


def average(history: list[dict], done: int, accumulate: int, world_size: int) -> dict[str, float]:
    """Means of what the micro-batches up to step `done` logged; all must be finite."""
    values = torch.stack([torch.stack(list(logs.values())) for logs in history]).float()
    if world_size > 1:
        dist.all_reduce(values)
    values, names = values.cpu() / world_size, list(history[0])
    for micro, term in (~values.isfinite()).nonzero().tolist():
        step = done - (len(history) - 1 - micro) // accumulate
        raise FloatingPointError(f"{names[term]} is {values[micro, term]} at step {step}")
    return dict(zip(names, values.mean(0).tolist(), strict=True))


# === run (copied) ===
def resolve(args):
    """Fill what is None from the data set's row of PAPER; hold every number to its kind's range."""
    row = {"head_lr_mult": 1.0, "eval_every": lambda args: max(1, args.steps // 10)}
    row |= PAPER[args.dataset]
    for field in fields(args):  # in order: an entry may look at those before it
        name, value = field.name, getattr(args, field.name)
        if value is None and name in row:
            value = row[name](args) if callable(row[name]) else row[name]
        if isinstance(value, str):
            value = os.path.expanduser(value)
        args = replace(args, **{name: value})
        kinds = (field.type, *get_args(field.type))  # of Count | None, Count has the range
        ranges = [kind.__metadata__ for kind in kinds if hasattr(kind, "__metadata__")]
        for least, most in ranges if value is not None else ():
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(least <= number <= most and number < math.inf for number in numbers):
                flag = f"--{name.replace('_', '-')} {value}"
                raise UserError(f"{flag}: must lie in [{least}, {most}]")
    return args


def find_device(args) -> tuple[int, int, torch.device]:
    """(rank, world_size, device) from torchrun's variables; one process when there are none."""
    found = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name in os.environ]
    if len(found) == 2 or found in (["RANK"], ["WORLD_SIZE"]):  # left over, or a scheduler's
        raise UserError(f"{', '.join(found)} set, but not by torchrun: use it, or unset them")
    default = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 0}
    rank, world_size, local_rank, here = (int(os.environ.get(k, v)) for k, v in default.items())
    count = {"cuda": torch.cuda.device_count(), "mps": torch.mps.device_count(), "cpu": world_size}
    kind = next(k for k in count if count[k]) if args.device == "auto" else args.device
    if max(here, 1) > count[kind]:  # found by all processes of a machine, so that rank 0 says it
        raise UserError(f"--device {kind}: {count[kind]} here; use fewer processes, or cpu")
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when deterministic
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not args.deterministic
    # SyncBN joins the processes' micro-batches on GPUs; elsewhere each has its own statistics.
    share, rest = divmod(args.batch_size, world_size * args.accumulate)
    if rest or share * (world_size if kind == "cuda" else 1) < 2:
        each = f"{world_size} processes x --accumulate {args.accumulate}"
        mend = f"use a multiple of {each}, and 2 images or more for a BatchNorm"
        raise UserError(f"--batch-size {args.batch_size}: {mend}")
    return rank, world_size, device


# Flags that may change between the parts of one run: none changes its weights but by rounding.
NEUTRAL = (
    "output_dir device compile deterministic num_workers data_root split download check_data "
    "log_every eval_every save_every log_pseudo_accuracy"
).split()  # the images that `split` names are compared themselves


class Run:
    """The run directory: arguments, checkpoints, log, TensorBoard. Rank 0 alone writes."""

    def __init__(self, args, data, split, rank: int):
        names = [args.dataset, split.slug, args.exp_name, args.backbone, f"s{args.seed}"]
        self.folder, self.rank = Path(args.output_dir) / "__".join(names), rank
        self.last = self.folder / "last.pt"
        self.args = asdict(args) | {"script": Path(__file__).stem, "split_identity": split.identity}
        self.args |= data.fingerprint(split)
        self.meta = {"args": self.args, "classes": data.classes, "palette": data.palette}
        self.meta |= {"mean": MEAN, "std": STD}
        if self.last.exists() or (self.folder / "best.pt").exists():
            try:
                before = json.loads((self.folder / "args.json").read_text())
            except (OSError, ValueError) as error:
                mend = f"delete {self.folder} to start anew"
                raise UserError(f"{self.folder}/args.json: damaged ({error}); {mend}") from None
            now = json.loads(json.dumps(self.args))  # tuples as lists
            changed = [k for k in now if k not in NEUTRAL and before.get(k) != now[k]]
            if changed:
                pairs = ", ".join(f"{k} {before.get(k)} -> {now[k]}" for k in changed)
                mend = "give other flags or data another --exp-name, or delete it"
                raise UserError(f"{self.folder} holds a run that differs in {pairs}; {mend}")

    def open(self) -> dict:
        """Begin the files or continue them; returns the last checkpoint, on every process."""
        last = [{"step": 0, "miou": -1.0, "best_miou": -1.0, "log_bytes": 0, "unscored": None}]
        if self.rank == 0:
            if self.last.exists():
                try:
                    last = [torch.load(self.last, map_location="cpu", weights_only=True)]
                except Exception as error:  # torch raises many kinds for a damaged file
                    raise UserError(f"{self.last}: {error}; delete it to start anew") from None
            self.begin(last[0]["step"], last[0]["log_bytes"])
        if dist.is_initialized():
            dist.broadcast_object_list(last)
        self.miou, self.best_miou = last[0]["miou"], last[0]["best_miou"]
        return last[0]

    def begin(self, step: int, log_bytes: int) -> None:
        """Open the files; rows of the log from after the checkpoint are cut."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = (self.folder / "log.jsonl").open("a")
        claim(self.rows)  # keeps a second run out
        self.rows.truncate(log_bytes)
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)
        if step == 0:
            shutil.copy(__file__, self.folder)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        failed, commit = subprocess.getstatusoutput(shlex.join(git))
        env = {"command": sys.argv, "torch": torch.__version__, "threads": torch.get_num_threads()}
        env |= {"gpu": gpu, "commit": None if failed else commit}
        for name, content in (("env.json", env), ("args.json", self.args)):
            with written_whole(self.folder / name) as file:
                file.write(json.dumps(content, indent=1).encode())
        how = f"from step {step}; stop it at any time, the same command continues"
        what = (self.folder, self.args["split_identity"], json.dumps(self.args), how)
        print(*what, sep="\n", flush=True)

    def report(self, step: int, row: dict, pictures: dict, saved, evaluated, save_now) -> None:
        """Log a row, keep the network with the best mIoU so far, and save where it is time."""
        self.log(step, row, pictures)
        self.miou = row.get("val/miou", self.miou)
        is_best, self.best_miou = self.miou > self.best_miou, max(self.miou, self.best_miou)
        if is_best:
            self.save("best.pt", step, {evaluated: saved[evaluated]}, evaluated)
        if save_now:
            self.save("last.pt", step, saved, evaluated)

    def log(self, step: int, row: dict[str, float], pictures: dict[str, tuple[list, list]]) -> None:
        """One JSON object, the same keys in TensorBoard, and a line; pictures: (images, maps)."""
        if self.rank == 0:
            self.rows.write(json.dumps({"step": step} | row) + "\n")
            self.rows.flush()
            for key, value in row.items():
                self.writer.add_scalar(key, value, step)
            for name, (images, maps) in pictures.items():
                self.writer.add_image(name, side_by_side(images, maps, self.meta["palette"]), step)
            shown = [f"{k} {v:.4g}" for k, v in row.items() if not k.startswith("val/iou/")]
            tqdm.write("  ".join([f"step {step}", *shown]), file=sys.stderr)

    def save(self, name: str, step: int, saved: dict, evaluated: str, unscored=None) -> None:
        """Write a checkpoint: the networks to continue from, or the one with the best mIoU."""
        if self.rank == 0:
            state = {"meta": self.meta, "log_bytes": self.rows.tell(), "step": step}
            state |= {"miou": self.miou, "best_miou": self.best_miou, "evaluated": evaluated}
            state |= {"unscored": unscored} | {k: thing.state_dict() for k, thing in saved.items()}
            with written_whole(self.folder / name) as file:
                torch.save(state, file)

    def close(self, result: str) -> None:
        if self.rank == 0:
            self.rows.close()
            self.writer.close()
            predict = f"python predict.py {self.folder}/last.pt IMAGE --out predictions"
            print(f"{self.folder}: {result}; {predict}")
        if dist.is_initialized():
            dist.destroy_process_group()


def command_line() -> None:
    """`main` with the command line's flags; a mistake in the input is one line, exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names that a terminal cannot show
    try:
        main(tyro.cli(Args))
    except Exception as error:
        if not (text := explain(error)):
            raise
        sys.unraisablehook = lambda _: None  # of loaders that never began
        # Before the processes meet, all find the same mistake; afterwards it is this one's own.
        alone = "LOCAL_WORLD_SIZE" not in os.environ  # whatever RANK another program left
        if alone or os.environ.get("RANK", "0") == "0" or dist.is_initialized():
            print(f"error: {text}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: last.pt is whole
    command_line()
