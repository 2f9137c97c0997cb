"""Directional context-aware consistency, DCC or CAC (Lai et al., CVPR 2021, 2106.14133).

    L = CE(f(x_l), y_l) + w sum_d mean_i log(1 + sum_j exp((<a_i, z_j> - <a_i, p_i>) / tau)),
    a, p: one place of an unlabeled image in two overlapping crops, the surer one p a constant;
    z_j: places of this and earlier images with another pseudo-label than a_i; d: both directions

    python dcc.py --dataset shapes                               # no data, no GPU: minutes
    python dcc.py --split 1/8                                    # one GPU, Pascal VOC
    torchrun --nproc_per_node=8 dcc.py --split 1/8               # the same run on eight

Network, weak view and evaluation are those of the CPS paper (2106.01226v3), batch, crop, steps and
rates those of the release; docs/dcc.md lists what differs.
"""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from common import UserError
from common.datasets import (
    IGNORE,
    UNKNOWN,
    MicroBatches,
    Samples,
    StreamSampler,
    Validation,
    open_data,
    outlive_signals,
    step_generator,
    stream_seed,
)
from common.evaluation import Protocol, iou_per_class, mean_iou, side_by_side, validate
from common.splits import fetch
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


# === args (copied) ===
@dataclass(frozen=True, kw_only=True)
class RunArgs:
    """Flags of every script."""

    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run directory"""
    seed: int = 0
    """weights, data order, views and masks follow from it"""
    output_dir: str = "runs"
    """folder of the run directories"""
    overwrite: bool = False
    """delete the run directory and start anew (the default resumes)"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu"""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """mixed precision; auto: bf16 where the GPU has it, else fp16; off on cpu and mps"""
    compile: bool = False
    """torch.compile the networks"""
    deterministic: bool = False
    """deterministic algorithms on GPUs, where torch has them"""
    num_workers: int | None = None
    """loader processes per stream and training process; None: 2, or 0 (in the loop) on a CPU"""
    log_every: int = 50
    """steps between rows of the log"""
    eval_every: int | None = None
    """steps between evaluations; None: a tenth of the run"""
    save_every: int = 500
    """steps between checkpoints"""

    dataset: Literal["voc", "cityscapes", "camvid", "shapes", "folder"] = "voc"
    """data set"""
    data_root: str = "data"
    """folder of the data sets (of your own data, for folder)"""
    split: str | None = None
    """labeled images: 1/8 (cps:1/8), u2pl:1/8, pseudoseg:1/8, classic:92, 20, full, a list file"""
    split_seed: int | None = None
    """draw a ratio or a number of images by this seed"""
    unlabeled: Literal["rest", "all"] = "rest"
    """unlabeled images: the rest, or all (the labeled ones too, without their labels)"""
    download: bool = False
    """fetch the data set if it is not there"""
    check_data: bool = False
    """decode and check every image and label, then stop"""

    backbone: Literal["resnet50", "resnet101", "resnet14"] | None = None
    """encoder; resnet14 is the small one for CPUs"""
    weights: str | None = None
    """encoder's start: imagenet (torchvision's), none, or a file with a torchvision state dict"""

    batch_size: int | None = None
    """labeled images per step over all processes (and as many unlabeled ones)"""
    accumulate: int = 1
    """micro-batches per step and process, for small cards; BatchNorm sees one at a time"""
    crop_size: int | None = None
    """side of the training crops, pixels"""
    steps: int | None = None
    """optimizer steps; ramps and warm-ups are fractions of it"""
    optimizer: Literal["sgd", "adamw"] | None = None
    """optimizer; poly schedule, power 0.9"""
    lr: float | None = None
    """learning rate at step 0; the number of processes never changes it"""
    head_lr_mult: float = 1.0
    """learning rate of everything but the encoder, as a multiple of the encoder's"""
    momentum: float | None = None
    """SGD's momentum, AdamW's beta_1"""
    weight_decay: float | None = None
    """of weights; BatchNorm and biases have none"""
    supervised_loss: Literal["ce", "ohem"] | None = None
    """cross-entropy, or its mean over the hard pixels (0.7, 50,000 per image)"""


# === method args ===
@dataclass(frozen=True, kw_only=True)
class Args(RunArgs):
    """DCC. What is None takes its value from the data set's row of PAPER."""

    head_lr_mult: float | None = None
    pair_scale: tuple[float, float] | None = None
    """least and greatest scale of an unlabeled image, before it is cropped twice"""
    min_overlap: float = 0.1
    """least overlap of the two crops, intersection over union; 1: one crop, seen twice"""
    temperature: float = 0.1
    """temperature of the contrastive loss"""
    confidence_threshold: float = 0.75
    """probability above which a place is the other crop's positive; 0: always"""
    directional: bool = True
    """the less sure crop learns from the surer one; without, each learns from the other"""
    bank_steps: int | None = None
    """steps whose places are the negatives, this one included"""
    negatives: int | None = None
    """places of each crop that become negatives; None: all, (crop size / 8)^2"""
    epsilon: float = 0.0
    """added to the loss's ratio and inside its logarithm; 1e-8: released code; 0: exact"""
    lambda_u: float | None = None
    """weight of the contrastive loss, the sum of its two directions"""
    dcc_start: float | None = None
    """share of the steps before the contrastive loss sets in"""
    ramp_up: float | None = None
    """share of the steps over which its weight then rises from 0.7 % to all of it; 0: at once"""
    log_pseudo_accuracy: bool = False
    """log pseudo/accuracy, where unlabeled images have labels: a diagnostic, never trained on"""

    def __post_init__(self):
        if self.crop_size is not None and self.crop_size % 8:
            raise UserError(f"--crop-size {self.crop_size}: must be a multiple of 8")
        if self.pair_scale and not 0 < self.pair_scale[0] <= self.pair_scale[1] <= 8:
            raise UserError(f"--pair-scale {self.pair_scale}: needs 0 < least <= greatest <= 8")
        if not 0 < self.min_overlap <= 1:
            raise UserError(f"--min-overlap {self.min_overlap}: must be above 0 and up to 1")
        if not self.temperature > 0:
            raise UserError(f"--temperature {self.temperature}: must be above 0")
        if not 0 <= self.confidence_threshold <= 1:
            raise UserError(f"--confidence-threshold {self.confidence_threshold}: is from 0 to 1")
        places = (self.crop_size or 0) ** 2 // 64
        if places and self.negatives is not None and self.negatives > places:
            raise UserError(
                f"--negatives {self.negatives}: a crop of {self.crop_size} pixels has {places} "
                f"places; use 1 to {places}"
            )
        for name in ("dcc_start", "ramp_up"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {value}: is a share of the steps, from 0 to 1")


# Sources: CAC 4fdec7a; camvid and shapes are ours. An entry that depends on other flags is a
# function of them.
# DIFFERS (dcc.md 7): scales of the pair are factors of the image's size.
# DIFFERS (dcc.md 8): the supervised loss of the other scripts on Cityscapes, and their weak view.
# DIFFERS (dcc.md 9): camvid and shapes ramp the contrast in, since their networks start from
# scratch.
# DIFFERS (dcc.md 11): weight decay acts on weights alone.
PAPER = {
    "voc": dict(
        split="1/8", backbone="resnet50", weights="imagenet", batch_size=8, crop_size=320,
        steps=92_560,
        optimizer="sgd", lr=0.001, head_lr_mult=10.0, momentum=0.9, weight_decay=1e-4,
        supervised_loss="ce", pair_scale=(0.64, 1.6),
        bank_steps=lambda args: 3 if args.backbone == "resnet101" else 2,
        negatives=lambda args: (args.crop_size // 8) ** 2,
        lambda_u=0.1, dcc_start=0.0625, ramp_up=0.0,
    ),
    "cityscapes": dict(
        split="1/8", backbone="resnet50", weights="imagenet", batch_size=8, crop_size=720,
        steps=92_560,
        optimizer="sgd", lr=0.01, head_lr_mult=10.0, momentum=0.9, weight_decay=1e-4,
        supervised_loss="ohem", pair_scale=(0.8, 2.0), bank_steps=1,
        negatives=lambda args: (args.crop_size // 8) ** 2,
        lambda_u=0.1, dcc_start=0.0625, ramp_up=0.0,
    ),
    "camvid": dict(
        split="1/8", backbone="resnet14", weights="none", batch_size=8, crop_size=160,
        steps=1_000,
        optimizer="adamw", lr=1e-3, head_lr_mult=1.0, momentum=0.9, weight_decay=1e-4,
        supervised_loss="ce", pair_scale=(0.8, 2.0), bank_steps=2,
        negatives=lambda args: (args.crop_size // 8) ** 2,
        lambda_u=0.1, dcc_start=0.0, ramp_up=0.4,
    ),
    "shapes": dict(
        split="20", backbone="resnet14", weights="none", batch_size=16, crop_size=48,
        steps=1_000,
        optimizer="adamw", lr=1e-3, head_lr_mult=1.0, momentum=0.9, weight_decay=1e-4,
        supervised_loss="ce", pair_scale=(0.75, 1.25), bank_steps=2,
        negatives=lambda args: (args.crop_size // 8) ** 2,
        lambda_u=0.1, dcc_start=0.0, ramp_up=0.4,
    ),
}  # fmt: skip
PAPER["folder"] = PAPER["voc"] | {"split": "labeled.txt"}


# === method ===
CHUNK = 2048  # negatives that are compared at a time
EMBEDDING = 128  # channels of the projector
RELEASED_ROWS = 8000  # negatives that the released code looks at for its row maximum


def similarity(anchor, label, negatives, negative_labels, temperature) -> torch.Tensor:
    """<a_i, z_j> / temperature, (n, N); -inf where both have the same pseudo-label."""
    product = (anchor / temperature) @ negatives.T
    return product.masked_fill_(label[:, None] == negative_labels, -math.inf)


class NegativeLogSumExp(torch.autograd.Function):
    """log sum_j [u_j != y_i] exp(<a_i, z_j> / temperature), (n,); -inf without negatives.

    The n x N similarities exist only `chunk` columns at a time: backward makes them again. Gradient
    to the anchors alone.
    """

    @staticmethod
    def forward(ctx, anchor, label, negatives, negative_labels, temperature, chunk):
        total = anchor.new_full((len(anchor),), -math.inf)
        chunks = zip(negatives.split(chunk), negative_labels.split(chunk), strict=True)
        for part, labels in chunks:
            logits = similarity(anchor, label, part, labels, temperature)
            total = torch.logaddexp(total, logits.logsumexp(1))
        ctx.save_for_backward(anchor, label, negatives, negative_labels, total)
        ctx.temperature, ctx.chunk = temperature, chunk
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        anchor, label, negatives, negative_labels, total = ctx.saved_tensors
        total = total.masked_fill(total == -math.inf, 0)[:, None]  # all their terms are 0
        pull = torch.zeros_like(anchor)  # sum_j softmax_ij z_j
        chunks = zip(negatives.split(ctx.chunk), negative_labels.split(ctx.chunk), strict=True)
        for part, labels in chunks:
            logits = similarity(anchor, label, part, labels, ctx.temperature)
            pull.addmm_(logits.sub_(total).exp_(), part)
        return pull * (grad / ctx.temperature)[:, None], None, None, None, None, None


def contrast(
    anchor: torch.Tensor,
    positive: torch.Tensor,
    label: torch.Tensor,
    negatives: torch.Tensor,
    negative_labels: torch.Tensor,
    temperature: float,
    epsilon: float = 0.0,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """-log(e^s / (e^s + sum_j e^s_j)) of each anchor, (n,); s: similarity to its positive.

    Arguments as in `directional_contrastive_loss`.
    """
    anchor, positive = full_precision(anchor), full_precision(positive.detach())
    negatives = full_precision(negatives.detach())
    s = (anchor * positive).sum(1) / temperature
    bank = (negatives, negative_labels, temperature, chunk)
    others = NegativeLogSumExp.apply(anchor, label, *bank)
    # DIFFERS (dcc.md 2): an exact log-sum-exp; the release's 1e-8 weakens the hardest anchors.
    if epsilon == 0:
        return F.softplus(others - s)
    with torch.no_grad():  # the release's scale of the exponentials: no mask, not all negatives
        top = s
        for part in negatives[:RELEASED_ROWS].split(chunk):
            if len(part):
                top = torch.maximum(top, (anchor @ part.T).amax(1) / temperature)
    s, others = (s - top).exp(), (others - top).exp()
    return -(s / (s + others + epsilon) + epsilon).log()


def active_anchors(
    confidence_anchor: torch.Tensor,
    confidence_positive: torch.Tensor,
    threshold: float,
    directional: bool = True,
) -> torch.Tensor:
    """Whose positive is sure, and surer than themselves: bool (n,); ties are in no direction."""
    sure = confidence_positive > threshold
    return sure & (confidence_anchor < confidence_positive) if directional else sure


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
    chunk: int = CHUNK,
) -> torch.Tensor:
    """One direction of the loss: mean of `contrast` over the active anchors; 0 if there are none.

    Training takes both directions in one pass, by `both_directions`.

    Args:
        anchor, positive: (n, D) unit vectors of the same places in two crops; gradient to `anchor`
        label: (n,) the anchors' own pseudo-labels; negatives have another one
        confidence_anchor, confidence_positive: (n,) greatest probabilities
        negatives, negative_labels: (N, D) unit vectors and (N,) pseudo-labels
        epsilon: added to ratio and logarithm; 1e-8 is the released code
        chunk: negatives compared at a time; the result does not depend on it
    """
    active = active_anchors(confidence_anchor, confidence_positive, threshold)
    bank = (negatives, negative_labels, temperature, epsilon, chunk)
    loss = contrast(anchor, positive, label, *bank)
    return (loss * active).sum() / active.sum().clamp(min=1)


def both_directions(view_1, view_2, negatives, negative_labels, args):
    """Sums of `contrast` over the active anchors, (2,), and the numbers of these, (2,).

    Args:
        view_1, view_2: (n, D) unit vectors, (n,) pseudo-labels and (n,) confidences of one crop at
            the places of the overlap, and of the other crop at the same places
    """
    (vector_1, label_1, confidence_1), (vector_2, label_2, confidence_2) = view_1, view_2
    rule = (args.confidence_threshold, args.directional)
    active_1 = active_anchors(confidence_1, confidence_2, *rule)
    active_2 = active_anchors(confidence_2, confidence_1, *rule)
    bank = (negatives, negative_labels, args.temperature, args.epsilon)
    if args.directional:  # a place is active in one direction at most: one pass serves both
        first = active_1[:, None]
        anchor = torch.where(first, vector_1, vector_2)
        positive = torch.where(first, vector_2, vector_1)
        loss_1 = loss_2 = contrast(anchor, positive, label_1.where(active_1, label_2), *bank)
    else:
        anchor, positive = torch.cat([vector_1, vector_2]), torch.cat([vector_2, vector_1])
        loss = contrast(anchor, positive, torch.cat([label_1, label_2]), *bank)
        loss_1, loss_2 = loss.chunk(2)
    sums = torch.stack([(loss_1 * active_1).sum(), (loss_2 * active_2).sum()])
    return sums, torch.stack([active_1.sum(), active_2.sum()])


def ramp_up(step: int, ramp_up_steps: float) -> float:
    """exp(-5 (1 - t)^2) with t = step / ramp_up_steps; 1 from `ramp_up_steps` on."""
    if step >= ramp_up_steps:
        return 1.0
    return math.exp(-5 * (1 - step / ramp_up_steps) ** 2)


def over_processes(value: torch.Tensor, world_size: int) -> torch.Tensor:
    """Mean of a tensor over the processes."""
    if world_size > 1:
        dist.all_reduce(value)
        value = value / world_size
    return value


def gather_views(value: torch.Tensor, world_size: int) -> torch.Tensor:
    """(2, n, ...) of every process -> (2 n world_size, ...), in the order of the global batch."""
    parts = [value]
    if world_size > 1:
        parts = [torch.empty_like(value) for _ in range(world_size)]
        dist.all_gather(parts, value.contiguous())
    return torch.cat(parts, dim=1).flatten(0, 1)


class NegativeBank:
    """The last `capacity` vectors with their pseudo-labels, oldest first; no graph.

    Attributes:
        vectors, labels: (N, D) fp32 and (N,) int64
    """

    def __init__(self, capacity: int, dim: int, device):
        self.capacity, self.device = capacity, device
        self.vectors = torch.empty(0, dim, device=device)
        self.labels = torch.empty(0, dtype=torch.long, device=device)

    def add(self, vectors: torch.Tensor, labels: torch.Tensor) -> None:
        """Append rows, and drop the oldest beyond the capacity."""
        dropped = max(0, len(self.vectors) + len(vectors) - self.capacity)
        self.vectors = torch.cat([self.vectors[dropped:], vectors.detach()])
        self.labels = torch.cat([self.labels[dropped:], labels])

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"vectors": self.vectors, "labels": self.labels}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.vectors, self.labels = (state[k].to(self.device) for k in ("vectors", "labels"))


def make_projector(in_channels: int) -> nn.Sequential:
    """Two 1x1 convolutions to the space of the contrast."""
    hidden = nn.Conv2d(in_channels, in_channels, 1)
    return nn.Sequential(hidden, nn.ReLU(), nn.Conv2d(in_channels, EMBEDDING, 1))


class TwoCropNetwork(nn.Module):
    """The network and its projector, in one module for DDP."""

    def __init__(self, network: nn.Module, projector: nn.Module):
        super().__init__()
        self.network, self.projector = network, projector

    def forward(self, image: torch.Tensor, unlabeled: bool = False):
        """Logits (B, C, H, W), or of unlabeled images their places, S = H / 8 a side.

        Returns:
            of unlabeled images: unit vectors (B, S, S, D), and without gradient pseudo-labels
            (B, S, S) int64 and confidences (B, S, S)
        """
        if not unlabeled:
            return self.network(image)
        features = F.avg_pool2d(self.network.head(*self.network.encode(image)), 2)  # stride 8
        # Detached, not under no_grad, where autocast would keep the weight without its gradient.
        logits = full_precision(self.network.classifier(features.detach())).detach()
        confidence, pseudo_label = logits.softmax(1).max(1)
        vector = F.normalize(full_precision(self.projector(features)), dim=1)
        return vector.permute(0, 2, 3, 1), pseudo_label, confidence


def take(maps, index: torch.Tensor) -> list[torch.Tensor]:
    """Maps (B, S, S, ...) at the places `index` (n,) of the flattened batch: (n, ...) each."""
    return [each.flatten(0, 2).index_select(0, index) for each in maps]


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
        crop, least, greatest = self.crop_size, *self.scale
        scale = least + (greatest - least) * float(torch.rand(()))
        resized = [max(1, round(length * scale)) for length in image.shape[1:]]
        draw = (torch.default_generator, self.min_overlap)
        *corners, rectangle_1, rectangle_2 = overlapping_crops(*resized, crop, *draw)
        flip = torch.rand(2) < 0.5
        # The window around both crops, in pixels of the resized image and of the source.
        window, source = [], []
        for a, b, new, old in zip(*corners, resized, image.shape[1:], strict=True):
            begin, end = min(a, b), min(max(a, b) + crop, new)
            size = min(max(1, round((end - begin) / scale)), old)
            window.append((begin, end - begin))
            source.append((min(round(begin / scale), old - size), size))
        views = []
        for tensor, fill in ((image, list(MEAN_COLOR)), (label, IGNORE)):
            (top, height), (left, width) = source
            part = TF.crop(tensor, top, left, height, width)
            (top, height), (left, width) = window
            part = TF.resize(part, [height, width], antialias=False)
            part = TF.pad(part, [0, 0, max(0, crop - width), max(0, crop - height)], fill=fill)
            crops = [TF.crop(part, y - top, x - left, crop, crop) for y, x in corners]
            crops = [TF.horizontal_flip(c) if f else c for c, f in zip(crops, flip, strict=True)]
            views.append(torch.stack([each.as_subclass(torch.Tensor) for each in crops]))
        return *views, torch.tensor([rectangle_1, rectangle_2]), flip


def make_pairs(args, data, ids, stream, start, rank, world_size, device, labels):
    """As `make_batches`, with the two crops of `PairView`.

    Yields (image_1, image_2), (label_1, label_2), rectangles (B, 2, 4) and flips (B, 2), the last
    two on the CPU.
    """
    if not ids:
        raise UserError(f"--split {args.split}: there are no {stream} images")
    sampler = StreamSampler(len(ids), args.batch_size, args.seed, rank, world_size, start, stream)
    loader = DataLoader(
        Samples(data, ids, PairView(args.crop_size, args.pair_scale, args.min_overlap), labels),
        batch_sampler=MicroBatches(sampler, args.accumulate),
        num_workers=args.num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # of its own: a loader draws a seed from it
        worker_init_fn=outlive_signals,
    )
    return (
        (
            [normalize(view) for view in image.to(device, non_blocking=True).unbind(1)],
            label.to(device, non_blocking=True).long().unbind(1), rectangle, flip,
        )
        for image, label, rectangle, flip in loader
    )  # fmt: skip


def overlap_places(rectangle: torch.Tensor, flip: torch.Tensor, side: int) -> torch.Tensor:
    """Places of the overlap in the flattened maps (B, side, side) of both crops: (2, n) int64.

    Column i of both is the same part of an image. Image by image and row by row; a flipped crop is
    read from right to left.

    Args:
        rectangle: (B, 2, 4) (top, left, bottom, right) in pixels of each crop before its flip
        flip: (B, 2) bool
    """
    index = []
    for corners, flipped in zip((rectangle // 8).unbind(1), flip.unbind(1), strict=True):
        top, left, bottom, right = corners[:, :, None].unbind(1)  # (B, 1) each
        at = torch.arange(side)
        rows, columns = (at >= top) & (at < bottom), (at >= left) & (at < right)
        image, row, column = (rows[:, :, None] & columns[:, None]).nonzero().unbind(1)
        column = torch.where(flipped[image], side - 1 - column, column)
        index.append((image * side + row) * side + column)
    return torch.stack(index)


def draw_places(
    batch_size: int, places: int, count: int, generator: torch.Generator
) -> torch.Tensor:
    """`count` different places of each crop, (2, B, count) int64; in order if these are all."""
    if count == places:
        return torch.arange(places).expand(2, batch_size, places)
    return torch.rand(2, batch_size, places, generator=generator).argsort(2)[:, :, :count]


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


# === losses (copied) ===
def full_precision(logits: torch.Tensor) -> torch.Tensor:
    """Half precision as fp32; fp32 and fp64 as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def cross_entropy(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the valid pixels of the local batch; 0 if there are none.

    Args:
        logits: (B, C, H, W)
        label: (B, H, W) int64 class ids, 255 ignored
    """
    logits = full_precision(logits)
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    # DIFFERS (supervised.md 6): 0 without valid pixels, not NaN.
    return loss.sum() / (label != IGNORE).sum().clamp(min=1)


def ohem_cross_entropy(
    logits: torch.Tensor, label: torch.Tensor, threshold: float = 0.7, min_kept: int = 50_000
) -> torch.Tensor:
    """Mean cross-entropy over the hard valid pixels of the local batch; 0 if there are none.

    Hard: the true class has at most probability `threshold`, or is among the `min_kept` lowest.
    Fewer valid pixels than `min_kept`, or `min_kept` 0: plain cross-entropy.
    """
    logits = full_precision(logits)
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")  # (B, H, W)
    valid = label != IGNORE
    if 0 < min_kept <= label.numel():
        with torch.no_grad():  # neither the threshold nor the choice carries gradient
            prob = torch.where(valid, (-loss).exp(), 1.0)
            kth_lowest = prob.flatten().kthvalue(min_kept).values
            hard = valid & (prob <= kth_lowest.clamp(min=threshold))
            valid = torch.where(valid.sum() >= min_kept, hard, valid)
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def supervised_loss(logits: torch.Tensor, label: torch.Tensor, kind: str) -> torch.Tensor:
    """`ce` or `ohem` (0.7, 50,000 pixels per image of the local batch, as in the CPS release)."""
    if kind == "ohem":
        return ohem_cross_entropy(logits, label, 0.7, 50_000 * len(label))
    return cross_entropy(logits, label)


# === model (copied) ===
class SlimBottleneck(Bottleneck):
    """torchvision's bottleneck with outputs of 64 to 512 channels instead of 256 to 2048."""

    expansion = 1


# name: (block, blocks per stage, stages without stride, width of the 3x3, head width, ASPP rates)
BACKBONES = {
    "resnet50": (Bottleneck, [3, 4, 6, 3], [False, False, True], 64, 256, (6, 12, 18)),
    "resnet101": (Bottleneck, [3, 4, 23, 3], [False, False, True], 64, 256, (6, 12, 18)),
    "resnet14": (SlimBottleneck, [1, 1, 1, 1], [False, True, True], 32, 64, (2, 4, 6)),
}


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling; the image-level branch is added, not concatenated."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int, rates: tuple[int, ...]):
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(in_channels, hidden, 1, bias=False)])
        for rate in rates:
            conv = nn.Conv2d(in_channels, hidden, 3, padding=rate, dilation=rate, bias=False)
            self.branches.append(conv)
        self.branches_bn = nn.BatchNorm2d(hidden * len(self.branches))
        self.project = nn.Conv2d(hidden * len(self.branches), out_channels, 1, bias=False)
        self.pool = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.pool_bn = nn.BatchNorm2d(hidden)
        self.pool_project = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.out_bn = nn.BatchNorm2d(out_channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        branches = torch.cat([branch(features) for branch in self.branches], dim=1)
        out = self.project(F.leaky_relu(self.branches_bn(branches), 0.01))
        pooled = self.pool(features.mean((2, 3), keepdim=True))  # (B, hidden, 1, 1)
        out = out + self.pool_project(F.leaky_relu(self.pool_bn(pooled), 0.01))
        return F.leaky_relu(self.out_bn(out), 0.01)


class Head(nn.Module):
    """DeepLabV3+ decoder: stage 1 and stage 4 features -> (B, width, H/4, W/4)."""

    def __init__(self, low_channels: int, high_channels: int, width: int, rates: tuple[int, ...]):
        super().__init__()
        self.aspp = ASPP(high_channels, width, width, rates)
        reduced = 48 * width // 256
        self.reduce = nn.Sequential(
            nn.Conv2d(low_channels, reduced, 1, bias=False), nn.BatchNorm2d(reduced), nn.ReLU()
        )
        self.fuse = nn.Sequential(
            nn.Conv2d(width + reduced, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )

    def forward(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        high = F.interpolate(self.aspp(high), low.shape[2:], mode="bilinear", align_corners=True)
        return self.fuse(torch.cat([high, self.reduce(low)], dim=1))


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ as in the CPS release, on torchvision's ResNet.

    (B, 3, H, W) normalized images -> (B, C, H, W) logits. Output stride 16, stage 4 dilated 2/4/8;
    resnet14 has output stride 8.
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


def load_backbone(backbone: nn.Module, name: str, weights: str) -> None:
    """Load torchvision's ImageNet weights, or a file of the same kind, strictly."""
    if weights == "none":
        return
    path = Path(weights)
    if weights == "imagenet":
        url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        try:
            fetch(url, path, path.stem.rsplit("-", 1)[1])  # the name ends in the SHA-256's start
        except UserError as error:
            raise UserError(
                f"--weights imagenet: {error}. Without a network, put the file at {path}, "
                "or use --weights none"
            ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        backbone.load_state_dict(state)
    except Exception as error:  # torch raises many kinds for a bad file
        raise UserError(f"--weights {weights}: {path} does not fit {name}: {error}") from None


# === data (copied) ===
def make_batches(
    args, data, ids, stream, start, rank, world_size, device, partner=None, labels="all"
):
    """Endless micro-batches of weak views on the device, from step `start` on.

    Yields (B, 3, H, W) normalized images and (B, H, W) int64 labels. `partner` as in
    `MicroBatches`, `labels` as in `Samples`.
    """
    if not ids:
        raise UserError(f"--split {args.split}: there are no {stream} images")
    sampler = StreamSampler(len(ids), args.batch_size, args.seed, rank, world_size, start, stream)
    loader = DataLoader(
        Samples(data, ids, WeakView(args.crop_size, data.scales), labels),
        batch_sampler=MicroBatches(sampler, args.accumulate, partner),
        num_workers=args.num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # of its own: a loader draws a seed from it
        worker_init_fn=outlive_signals,
    )
    return (
        (normalize(image.to(device, non_blocking=True)), label.to(device, non_blocking=True).long())
        for image, label in loader
    )


# === optimizer (copied) ===
def make_optimizer(networks, args, device) -> torch.optim.Optimizer:
    """One optimizer for all networks: without clipping the same as one for each."""
    groups: dict[tuple[float, float], list] = {}
    for network in networks:
        for name, parameter in network.named_parameters():
            lr_mult = 1.0 if name.startswith("backbone.") else args.head_lr_mult
            weight_decay = args.weight_decay if parameter.ndim > 1 else 0.0  # not BN and biases
            if parameter.requires_grad:
                groups.setdefault((lr_mult, weight_decay), []).append(parameter)
    groups = [
        {"params": parameters, "lr_mult": lr_mult, "weight_decay": weight_decay}
        for (lr_mult, weight_decay), parameters in groups.items()
    ]
    fused = device.type in ("cpu", "cuda")
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.lr, momentum=args.momentum, fused=fused)
    return torch.optim.AdamW(groups, args.lr, betas=(args.momentum, 0.999), fused=fused)


def poly_lr(base_lr: float, step: int, total_steps: int, power: float = 0.9) -> float:
    """base_lr (1 - step / total_steps)^power."""
    return base_lr * (1 - step / total_steps) ** power


# === run (copied) ===
# Flags that may change between the parts of one run: none changes its numbers but by rounding.
NEUTRAL = frozenset(
    "output_dir overwrite device compile deterministic num_workers log_every eval_every save_every "
    "data_root download check_data log_pseudo_accuracy".split()
)


def resolve(args):
    """Fill every None from the data set's row of PAPER, and check all values.

    Raises:
        UserError: names the flag and what it may be.
    """
    for name in [field.name for field in fields(args)]:
        value = getattr(args, name)
        if value is None:
            value = PAPER[args.dataset].get(name)
            value = value(args) if callable(value) else value
        args = replace(args, **{name: str(value) if isinstance(value, Path) else value})
    if args.eval_every is None:
        args = replace(args, eval_every=max(1, args.steps // 10))
    if args.num_workers is None:
        on_cpu = args.device == "cpu" or not torch.accelerator.is_available()
        args = replace(args, num_workers=0 if on_cpu else 2)
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if isinstance(value, int) and not isinstance(value, bool):
            least = {"seed": 0, "split_seed": 0, "num_workers": 0, "crop_size": 32}.get(name, 1)
            if value < least:
                raise UserError(f"{flag}: must be a whole number, {least} or more")
        elif isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            raise UserError(f"{flag}: must be a finite number, 0 or more")
    if args.lr == 0:
        raise UserError("--lr 0: must be above 0")
    if args.momentum >= 1:
        raise UserError(f"--momentum {args.momentum}: must be below 1")
    if not args.exp_name or "/" in args.exp_name or "__" in args.exp_name:
        raise UserError(f"--exp-name {args.exp_name!r}: must be a name without / and __")
    if args.weights == "imagenet" and args.backbone == "resnet14":
        raise UserError("--weights imagenet: resnet14 has none; use --weights none")
    if args.weights not in ("imagenet", "none") and not Path(args.weights).is_file():
        raise UserError(f"--weights {args.weights}: no such file; or use imagenet or none")
    return args


def setup_distributed(args) -> tuple[int, int, torch.device]:
    """(rank, world_size, device) from torchrun's variables; one process when there are none."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = args.device
    if kind == "auto":
        kind = "cuda" if has["cuda"] else "mps" if has["mps"] and world_size == 1 else "cpu"
    if not has[kind]:
        raise UserError(f"--device {kind}: this machine or this torch build has none; use cpu")
    device = torch.device(kind)
    if kind == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise UserError(f"--nproc_per_node: this machine has {count} GPUs; use at most {count}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when deterministic
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not args.deterministic
    share = world_size * args.accumulate
    if args.batch_size % share:
        raise UserError(
            f"--batch-size {args.batch_size} is not divisible by {world_size} processes x "
            f"--accumulate {args.accumulate}; use a multiple of {share}"
        )
    # SyncBN joins the processes' micro-batches on GPUs; elsewhere each has its own statistics.
    per_forward = args.batch_size // (args.accumulate if kind == "cuda" else share)
    if per_forward < 2:
        raise UserError(
            f"BatchNorm would see {per_forward} image per forward: --batch-size {args.batch_size} "
            f"/ {share} (processes x --accumulate); use --batch-size {2 * share} or more"
        )
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        patience = timedelta(hours=2)  # rank 0 may download
        store, *_ = next(dist.rendezvous("env://", timeout=patience))
        # torchrun keeps its store over restarts: no addresses of processes that are gone.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=patience
        )
    return rank, world_size, device


def rank_0_first(function, rank: int, world_size: int, share: bool = False):
    """Call on rank 0 (which may download), then on the others, or `share` the result with them.

    A UserError or SystemExit of rank 0 ends every process; rank 0 alone says why.
    """
    result, code, error = None, 0, None
    if rank == 0:
        try:
            result = function()
        except (UserError, SystemExit) as caught:
            error, code = caught, 2 if isinstance(caught, UserError) else caught.code
    if world_size > 1:
        told = [error is not None, code, result if share else None]
        dist.broadcast_object_list(told)
        if rank != 0 and told[0]:
            raise SystemExit(told[1])
        if rank != 0:
            return told[2] if share else function()
    if error is not None:
        raise error
    return result


def amp_type(args, device) -> str:
    """What `--amp` comes to on this device: bf16, fp16 or off."""
    if args.amp != "auto":
        return args.amp
    if device.type != "cuda":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def make_autocast(args, device):
    """(autocast context, gradient scaler that does nothing unless fp16)."""
    amp = amp_type(args, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    if amp == "off":
        return nullcontext(), scaler
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]), scaler


def make_network(args, num_classes, name, rank, world_size, device):
    """A network and what to call for training: itself, or its DDP wrapper."""
    torch.manual_seed(stream_seed(args.seed, f"weights/{name}"))  # the same on every process
    network = DeepLabV3Plus(num_classes, args.backbone)
    rank_0_first(
        lambda: load_backbone(network.backbone, args.backbone, args.weights), rank, world_size
    )
    return prepare(network, args, world_size, device)


def prepare(network, args, world_size, device):
    """(module on its device, what to call for training), with SyncBN, compilation and DDP."""
    if world_size > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.to(device, memory_format=torch.channels_last)
    if args.compile:
        network.compile()
    if world_size == 1:
        return network, network
    # Buffers stay local: a broadcast between two forwards would change what backward needs.
    return network, DistributedDataParallel(
        network, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def sync_buffers(modules, world_size: int) -> None:
    """Give every process rank 0's buffers (BatchNorm statistics), before evaluating or saving."""
    for module in modules if world_size > 1 else ():
        for buffer in module.buffers() if isinstance(module, nn.Module) else ():
            dist.broadcast(buffer, src=0)


def average(history: list[dict], world_size: int) -> dict[str, float]:
    """Means of the logged tensors over the steps and processes."""
    names = list(history[0])
    values = torch.stack([torch.stack([row[name] for name in names]) for row in history]).float()
    if world_size > 1:
        dist.all_reduce(values)
        values /= world_size
    return dict(zip(names, values.mean(0).tolist(), strict=True))


def first_bad(history: list[dict], done: int) -> str:
    """Says which loss was not finite first, among the steps that end with `done`; "" if none."""
    for step, terms in enumerate(history, done - len(history) + 1):
        for name, value in terms.items():
            if name.startswith("loss/") and not math.isfinite(value):
                return f"{name} is {float(value)} at step {step}"
    return ""


def agree(flags: list[int], world_size: int) -> list[int]:
    """The greatest of each flag over the processes, by way of the CPU: no GPU waits for it."""
    if world_size == 1:
        return flags
    tensor = torch.tensor(flags)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


class Run:
    """The run directory: lock, log, TensorBoard, checkpoints. Other ranks than 0 write nothing.

    Raises:
        UserError: the directory cannot be written, is in use, or holds a run with other arguments.
    """

    def __init__(self, args, data, split, protocol, device, rank: int):
        parts = [args.dataset, split.slug, args.exp_name, args.backbone, f"s{args.seed}"]
        self.folder = Path(args.output_dir) / "__".join(parts)
        self.args, self.data, self.protocol, self.rank = args, data, protocol, rank
        self.device, self.signal, self.handlers, self.open_files = device, 0, {}, []
        self.overwrite = args.overwrite
        script = Path(__file__).stem
        self.saved_args = asdict(args) | {"script": script, "split_identity": split.identity}
        self.meta = {
            "args": {k: v for k, v in self.saved_args.items() if k not in NEUTRAL},
            "classes": list(data.classes),
            "palette": [list(color) for color in data.palette],
            "mean": list(MEAN),
            "std": list(STD),
            "sliding": data.sliding,
            "data_root": args.data_root,
        }
        if rank == 0:
            self._claim()
            print(f"{self.folder}\n{split.identity}\n{json.dumps(asdict(args))}", flush=True)

    def _on_signal(self, number, frame) -> None:
        self.signal = self.signal or number  # torchrun passes on what a terminal sent already

    def _claim(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock = (self.folder / "lock").open("a+")
        except OSError as error:
            raise UserError(f"--output-dir {self.args.output_dir}: {error}") from None
        try:
            import fcntl  # POSIX only

            # Not inherited by loader processes; the system releases it when this process dies.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"{self.folder} is in use by another run; wait for it or use another --exp-name"
            ) from None
        except (ImportError, OSError):
            print(f"{self.folder}: this system has no file locks; start no second run here")
        self.open_files.append(lock)
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
            lock.truncate(0)
        else:  # torchrun's next attempt resumes, if one before it has emptied the directory
            lock.seek(0)
            self.overwrite = self.overwrite and not lock.read()

    def load(self) -> dict | None:
        """The last complete checkpoint; None if there is none, so that the run starts anew."""
        if self.overwrite:
            return None
        last, previous = self.folder / "last.pt", self.folder / "previous.pt"
        for path in (last, previous):
            try:
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                break
            except FileNotFoundError:
                continue
            except Exception as error:  # torch raises many kinds for a damaged file
                print(f"{path} is damaged ({type(error).__name__}), trying the one before")
        else:
            if not last.exists() and not previous.exists():
                return None
            raise UserError(f"{self.folder}: no readable checkpoint; --overwrite starts anew")
        if path == previous:
            last.unlink(missing_ok=True)  # or the next save would move it over the good one
        before, now = checkpoint["meta"]["args"], self.meta["args"]
        differing = [
            f"--{key.replace('_', '-')} {before.get(key)} -> {now.get(key)}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if differing:
            raise UserError(
                f"{self.folder} holds a run with other arguments: {'; '.join(differing)}. "
                "Use another --exp-name to keep both, or --overwrite to replace it"
            )
        return checkpoint

    def open(self, start: int) -> None:
        """Begin or continue the files; rows of the log beyond step `start` are cut."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self._on_signal)
        silent = self.rank != 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=self.args.steps, initial=start, disable=silent, unit="step")
        self.open_files.append(self.bar)
        if self.rank != 0:
            return
        if self.overwrite:  # only now that all checks are passed
            for path in self.folder.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.lock.write("emptied")
            self.lock.flush()
        rows = []
        if start and (self.folder / "log.jsonl").exists():
            for line in (self.folder / "log.jsonl").read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except ValueError:  # the process died while it wrote this line
                    break
        else:
            for path in self.folder.glob("events.*"):
                path.unlink()
        rows = [row for row in rows if row["step"] <= start]
        part = self.folder / "log.part"
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(part, self.folder / "log.jsonl")
        (self.folder / "args.json").write_text(json.dumps(self.saved_args, indent=1))
        (self.folder / "env.json").write_text(
            json.dumps(environment(self.args, self.device), indent=1)
        )
        source, copy = Path(__file__), self.folder / Path(__file__).name
        if start and copy.exists() and copy.read_bytes() != source.read_bytes():
            print(f"{source.name} was edited since this run began; the run keeps its first copy")
        else:
            shutil.copy(source, copy)
        self.rows = (self.folder / "log.jsonl").open("a")
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.writer = SummaryWriter(str(self.folder), purge_step=start + 1)
        self.open_files += [self.rows, self.writer]

    def log(self, step: int, row: dict[str, float]) -> None:
        """One JSON object, the same keys in TensorBoard, and a line or the progress bar."""
        if self.rank != 0:
            return
        known = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self.rows.write(json.dumps({"step": step} | known) + "\n")  # JSON has no NaN
        self.rows.flush()
        for key, value in row.items():
            self.writer.add_scalar(key, value, step)
        shown = {k: v for k, v in row.items() if not k.startswith("val/iou/")}
        text = "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
        if self.bar.disable:
            print(f"step {step}/{self.args.steps}  {text}", flush=True)
        else:
            self.bar.set_postfix_str(text)

    def pictures(self, step: int, rows: dict[str, tuple[list, list]]) -> None:
        """TensorBoard pictures: (images, maps) of each row side by side, in the data's colors."""
        for name, (images, maps) in rows.items() if self.rank == 0 else ():
            self.writer.add_image(name, side_by_side(images, maps, self.data.palette), step)

    def save(self, name: str, checkpoint: dict) -> None:
        """Write atomically; the previous last.pt survives until the new one is complete."""
        if self.rank != 0:
            return
        path = self.folder / name
        part = path.with_suffix(".part")
        try:
            with part.open("wb") as file:
                torch.save({"meta": self.meta} | checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch puts its own error over a full disk's
            part.unlink(missing_ok=True)
            raise UserError(
                f"{path} cannot be written ({error.__context__ or error}); what was saved before "
                "is whole: make room, and the same command continues"
            ) from None
        if name == "last.pt" and path.exists():
            os.replace(path, self.folder / "previous.pt")
        os.replace(part, path)

    def finish(self, miou: float, best_miou: float, how: str) -> dict:
        """Close everything; one line with the result and the command that predicts with it."""
        if self.rank == 0:
            print(
                f"{self.folder} {how}: mIoU {100 * miou:.2f} (last), {100 * best_miou:.2f} (best); "
                f"{self.args.backbone}, {self.protocol}; "
                f"python predict.py {self.folder}/last.pt IMAGE --out predictions"
            )
        self.close()
        result = {"miou": miou, "best_miou": best_miou, "steps": self.args.steps}
        return result | {"run_dir": str(self.folder)}

    def close(self) -> None:
        for file in self.open_files:
            file.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def environment(args, device: torch.device) -> dict:
    """What ran where: versions, device, precision, commit."""
    folder, commit = str(Path(__file__).resolve().parent), None
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40"]
    with suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    return {
        "command": sys.argv,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "amp": amp_type(args, device),
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "threads": torch.get_num_threads(),
        "commit": commit,
        "dirty": None if commit is None else commit.endswith("-dirty"),
    }


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def command_line() -> None:
    """`main` with the command line's flags; a mistake in the input is one line, exit code 2."""
    import tyro

    try:
        main(tyro.cli(Args))
    except (UserError, FloatingPointError, RuntimeError, OSError) as error:
        # An error of a loader process arrives wrapped in its traceback.
        text = str(error).rsplit("UserError: ", 1)[-1].strip()
        if isinstance(error, OSError) and error.errno in FULL:
            text += "; make room, and the same command continues"
        elif type(error) is RuntimeError and "DataLoader worker" in text:
            text += " The same command continues."
        elif not isinstance(error, UserError | FloatingPointError):
            raise
        # Before the processes meet, all find the same mistake; afterwards it is this one's own.
        if os.environ.get("RANK", "0") == "0" or dist.is_initialized():
            print(f"error: {text}", file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None


def main(args: Args) -> dict:
    """Train and evaluate; returns miou, best_miou, steps and run_dir."""
    # === setup (copied) ===
    args = resolve(args)
    rank, world_size, device = setup_distributed(args)
    data, split = rank_0_first(
        lambda: open_data(
            args.dataset, args.data_root, args.split, args.split_seed, args.unlabeled,
            args.download, args.check_data,
        ),
        rank, world_size,
    )  # fmt: skip
    autocast, scaler = make_autocast(args, device)
    protocol = Protocol(pad_to=args.crop_size, window=args.crop_size if data.sliding else None)
    run = rank_0_first(lambda: Run(args, data, split, protocol, device, rank), rank, world_size)
    checkpoint = rank_0_first(run.load, rank, world_size, share=True)
    start = checkpoint["step"] if checkpoint else 0
    if start == args.steps:
        return run.finish(checkpoint["miou"], checkpoint["best_miou"], "was finished before")
    place = (start, rank, world_size, device)

    # === networks ===
    batches_l = make_batches(args, data, split.labeled, "labeled", *place)
    labels = "known" if args.log_pseudo_accuracy else "none"
    batches_u = make_pairs(args, data, split.unlabeled, "unlabeled", *place, labels)
    images_per_step = 2 * args.batch_size
    alone = replace(args, compile=False)  # it is wrapped below, with its projector
    network, _ = rank_0_first(
        lambda: make_network(alone, len(data.classes), "1", 0, 1, device), rank, world_size
    )
    torch.manual_seed(stream_seed(args.seed, "weights/projector"))  # the same on every process
    projector = make_projector(network.classifier.in_channels)
    _, ddp = prepare(TwoCropNetwork(network, projector), args, world_size, device)
    ddps = [ddp]
    per_step = 2 * args.batch_size * args.negatives
    bank = NegativeBank(args.bank_steps * per_step, EMBEDDING, device)
    optimizer = make_optimizer([network, projector], args, device)
    saved = {"network": network, "projector": projector, "bank": bank}
    evaluated = "network"

    # === resume (copied) ===
    saved |= {"optimizer": optimizer, "scaler": scaler}
    miou, best_miou = -1.0, -1.0
    if checkpoint:
        for name, thing in saved.items():
            if checkpoint[name]:  # the scaler's state is empty unless fp16
                thing.load_state_dict(checkpoint[name])
        miou, best_miou = checkpoint["miou"], checkpoint["best_miou"]
        del checkpoint
    run.open(start)
    history, clock = [], time.perf_counter()

    for step in range(start, args.steps):
        # === batch (copied) ===
        # Reseeded at every step, so that a resumed run draws what the first one would have drawn.
        torch.manual_seed(stream_seed(args.seed, f"step/rank {rank}", step))
        lr = poly_lr(args.lr, step, args.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        terms = {}
        for micro in range(args.accumulate):
            for wrapper in ddps:  # gradients are averaged once, in the last micro-batch
                wrapper.require_backward_grad_sync = micro == args.accumulate - 1
            image_l, label_l = next(batches_l)

            # === loss ===
            image_u, label_u, rectangle, flip = next(batches_u)
            n, side = len(image_l), args.crop_size // 8
            first = (rank * args.accumulate + micro) * n  # this micro-batch in the global one
            generator = step_generator(args.seed, "colors", step)
            image_u = [change_colors(view, args.batch_size, first, generator) for view in image_u]
            overlap = overlap_places(rectangle, flip, side).to(device, non_blocking=True)
            generator = step_generator(args.seed, "negatives", step)
            chosen = draw_places(args.batch_size, side**2, args.negatives, generator)
            chosen = chosen[:, first : first + n] + side**2 * torch.arange(n)[:, None]
            chosen = chosen.flatten(1).to(device, non_blocking=True)
            with autocast:  # labeled images and the two crops apart, for BatchNorm
                logits_l = ddp(image_l)
                crop_1, crop_2 = (ddp(view, True) for view in image_u)
            loss_sup = supervised_loss(logits_l, label_l, args.supervised_loss)
            # Negatives are places of whole crops, padding included.
            # DIFFERS (dcc.md 4): they enter the bank before the loss sets in, too.
            with torch.no_grad():
                pairs = zip(take(crop_1[:2], chosen[0]), take(crop_2[:2], chosen[1]), strict=True)
                bank.add(*(gather_views(torch.stack(pair), world_size) for pair in pairs))
            view_1, view_2 = take(crop_1, overlap[0]), take(crop_2, overlap[1])
            sums, active = both_directions(view_1, view_2, bank.vectors, bank.labels, args)
            same = view_1[1] == view_2[1]
            counts = torch.cat([active, torch.stack([same.sum(), torch.ones_like(same).sum()])])
            # DIFFERS (dcc.md 1): mean over the active places, as released; the paper's is of all.
            # DIFFERS (dcc.md 3): of all processes, not of each.
            counts = over_processes(counts.to(sums.dtype), world_size)
            loss_contrastive = (sums / counts[:2].clamp(min=1 / world_size)).sum()
            weight, start_step = 0.0, args.dcc_start * args.steps
            if step >= start_step:
                weight = args.lambda_u * ramp_up(step - start_step, args.ramp_up * args.steps)
            loss = loss_sup + weight * loss_contrastive

            logs = {"loss/sup": loss_sup, "loss/contrastive": loss_contrastive}
            logs["pseudo/confidence"] = (crop_1[2].mean() + crop_2[2].mean()) / 2
            places = counts[3].clamp(min=1 / world_size)  # of the overlaps
            logs |= {"pseudo/active": (counts[0] + counts[1]) / (2 * places)}
            logs |= {"pseudo/agreement": counts[2] / places}
            if args.log_pseudo_accuracy:
                label_u = torch.stack(label_u)[:, :, 4::8, 4::8]  # at the middle of a place
                known = label_u < UNKNOWN
                right = (torch.stack([crop_1[1], crop_2[1]]) == label_u) & known
                logs["pseudo/accuracy"] = right.sum() / known.sum().clamp(min=1)
            maps = [*crop_1[1:], *crop_2[1:]]  # 1/8 of the crop's size
            pictures = {"labeled": ([image_l], [label_l, logits_l]), "unlabeled": (image_u, maps)}

            # === backward (copied) ===
            scaler.scale(loss / args.accumulate).backward()
            for name, value in logs.items():
                terms[name] = terms.get(name, 0) + value.detach() / args.accumulate

        # === step (copied) ===
        done = step + 1
        history.append(terms)
        log_now = done % args.log_every == 0 or done == args.steps
        eval_now = done % args.eval_every == 0 or done == args.steps
        save_now = done % args.save_every == 0 or done == args.steps
        bad = ""
        if device.type == "cpu" or log_now or eval_now or save_now or run.signal:
            bad = first_bad(history if log_now else [terms], done)  # makes a GPU wait
        stop, failed = agree([run.signal, int(bad != "")], world_size)
        if failed:
            every_bad = [bad]
            if world_size > 1:
                every_bad = [None] * world_size
                dist.all_gather_object(every_bad, bad)
            run.save("failed.pt", {k: v.state_dict() for k, v in saved.items()} | {"step": step})
            run.close()
            if rank != 0:
                raise SystemExit(1)
            raise FloatingPointError(
                f"{max(every_bad)}: stopped before the update of step {done}. The state at this "
                f"point is in {run.folder}/failed.pt; last.pt was left as it is"
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # === report (copied) ===
        run.bar.update()
        save_now = save_now or bool(stop)
        row = {}
        if log_now:
            per_s = images_per_step * len(history) / (time.perf_counter() - clock)
            row = average(history, world_size) | {"lr": lr, "time/images_per_s": per_s}
            history, clock = [], time.perf_counter()
        paused = time.perf_counter()
        if eval_now or save_now:
            sync_buffers(saved.values(), world_size)
        if eval_now:
            reported = saved[evaluated]
            mode = reported.training
            with autocast:  # .forward passes the compiled call by: whole images vary in size
                confusion = validate(
                    reported.eval().forward, Validation(data, data.val_ids), len(data.classes),
                    protocol, device, rank, world_size, args.num_workers,
                )  # fmt: skip
            reported.train(mode)
            miou, iou = mean_iou(confusion), iou_per_class(confusion).tolist()
            row |= {"val/miou": miou}
            row |= {f"val/iou/{c}": v for c, v in zip(data.classes, iou, strict=True)}
            run.pictures(done, pictures)
            if miou > best_miou:
                best_miou = miou
                best = {"network": reported.state_dict(), "evaluated": "network"}
                run.save("best.pt", best | {"step": done, "miou": miou})
        if row:
            run.log(done, row)
        if save_now:
            scores = {"step": done, "miou": miou, "best_miou": best_miou, "evaluated": evaluated}
            run.save("last.pt", {k: v.state_dict() for k, v in saved.items()} | scores)
        if stop:
            run.close()
            if rank == 0:
                print(f"signal {stop}: saved step {done}; the same command continues", flush=True)
            raise SystemExit(128 + stop)
        clock += time.perf_counter() - paused  # evaluating and saving is not training time

    # === finish (copied) ===
    return run.finish(miou, best_miou, "done")


if __name__ == "__main__":
    command_line()
