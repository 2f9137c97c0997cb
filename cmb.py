"""CMB: class-wise memory bank (Alonso, Sabater, Ferstl, Montesano, Murillo, ICCV 2021, 2104.13415).

    L = CE(f(x_l), y_l) + lambda_u r(t) max g(x_u)^6 CE(f(a(x_u)), a(argmax g(x_u)))
        + lambda_entropy H(f(a(x_u))) + lambda_contrastive [D(q(x_l), y_l)
        + D(q(a(x_u)), a(argmax g(x_u)))],
    D: weighted mean cosine distance of features q from the memory bank of their class, which holds
    features of labeled pixels where the teacher g is right and sure; H: entropy; a: a strong view,
    two of each image; r: a ramp up to 1

    python cmb.py --dataset shapes                               # no data, no GPU: minutes
    python cmb.py --split 1/8                                    # one GPU, Pascal VOC
    torchrun --nproc_per_node=5 cmb.py --split 1/8               # the same run on five

Network, weak view and evaluation are those of the CPS paper (2106.01226v3), batch, crop, steps and
rates those of the release; docs/cmb.md lists what differs.
"""

import copy
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
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
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
from common.transforms import MEAN, STD, WeakView, color_jitter, normalize, statistics

# Kinds of numbers, with their least and greatest value.
Whole, Count = Annotated[int, 0, math.inf], Annotated[int, 1, math.inf]
Amount, Share = Annotated[float, 0, math.inf], Annotated[float, 0, 1]


@dataclass(frozen=True, kw_only=True)
class Args:
    """CMB. What is None takes its value from the data set's row of PAPER.

    Attributes:
        batch_size: labeled images per step, all processes (half as many unlabeled, in two views)
    """

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
    ema_decay: Share | None = None  # share of itself that the teacher keeps at first; rises to 1
    lambda_u: Amount = 1.0  # weight of the pseudo-label loss
    lambda_entropy: Amount = 0.01  # weight of the entropy loss
    lambda_contrastive: Amount = 0.1  # weight of the contrastive loss, labeled and unlabeled each
    confidence_power: Amount = 6.0  # a pseudo-label counts by its confidence to this power
    bank_size: Annotated[int, 2, math.inf] = 256  # features in the memory bank of each class
    bank_threshold: Share = 0.95  # confidence above which a feature may enter the bank
    bank_rank: Literal["highest", "lowest"] = "highest"  # which of too many; lowest: as released
    bank_attention: Literal["on", "off"] = "on"  # weights for its vectors; off: as released
    classmix: Annotated[tuple[float, float], 0, 1] = (0.2, 0.75)  # chances: labeled, unlabeled view
    blur: Literal["isotropic", "horizontal"] = "isotropic"  # horizontal: along rows, as released
    class_balance: bool | None = None  # rare classes weigh more in L_p, and in plain cross-entropy
    ramp_up: Share | None = None  # share of the steps before all terms act (the bank: half of it)
    evaluate: Literal["student", "teacher"] = "student"  # network to evaluate
    log_pseudo_accuracy: bool = False  # where unlabeled images have labels, for the log alone


# === paper ===
# Sources: SemiSeg-Contrastive dc53c6d (DeepLabV3+ with ResNet-50); camvid and shapes are ours.
# DIFFERS (cmb.md 17): the labeled images are those of the published lists.
# DIFFERS (cmb.md 3): weight decay acts on weights only; the supervised loss is that of all scripts.
# DIFFERS (cmb.md 12): camvid and shapes ramp up longer, since their networks start from scratch;
# their teachers remember 10 steps at first.
PAPER = {
    "voc": dict(
        split="1/8", backbone="resnet50", weights="imagenet", batch_size=20, crop_size=321,
        steps=150_000,
        optimizer="sgd", lr=2e-4, momentum=0.9, weight_decay=5e-4, supervised_loss="ce",
        ramp_up=1 / 75, ema_decay=0.995, class_balance=False,
    ),
    "cityscapes": dict(
        split="1/8", backbone="resnet50", weights="imagenet", batch_size=7, crop_size=512,
        steps=150_000,
        optimizer="sgd", lr=4e-4, momentum=0.9, weight_decay=5e-4, supervised_loss="ohem",
        ramp_up=1 / 75, ema_decay=0.995, class_balance=True,
    ),
    "camvid": dict(
        split="1/8", backbone="resnet14", weights="none", batch_size=8, crop_size=160, steps=1_000,
        optimizer="adamw", lr=1e-3, momentum=0.9, weight_decay=1e-4, supervised_loss="ce",
        ramp_up=0.4, ema_decay=0.9, class_balance=False,
    ),
}  # fmt: skip
PAPER["shapes"] = PAPER["camvid"] | dict(split="20", batch_size=16, crop_size=48)
PAPER["folder"] = PAPER["voc"] | dict(split=lambda args: f"{args.data_root}/labeled.txt")


# === method ===
def pseudo_label_loss(
    logits: torch.Tensor,
    pseudo_label: torch.Tensor,
    confidence: torch.Tensor,
    ramp: float,
    class_weight: torch.Tensor | None = None,
    power: float = 6.0,
) -> torch.Tensor:
    """Cross-entropy times ramp, confidence^power and weight of the class, mean over all B H W.

    pseudo_label, confidence: (B, H, W), the teacher's, no gradient; label 255 adds nothing, but is
    counted. class_weight: (C,); the mean is not divided by the weights.
    """
    logits = full_precision(logits)
    weight = None if class_weight is None else class_weight.to(logits.dtype)
    loss = F.cross_entropy(logits, pseudo_label, weight, ignore_index=IGNORE, reduction="none")
    return (loss * full_precision(confidence.detach()).pow(power)).mean() * ramp


def entropy_loss(logits: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Entropy of the softmax, 0 to 1: mean over all pixels, or over the `valid`, bool (B, H, W)."""
    # DIFFERS (cmb.md 5): normalized by log C, as released.
    log_prob = full_precision(logits).log_softmax(1)
    entropy = -(log_prob.exp() * log_prob).sum(1) / math.log(logits.shape[1])
    if valid is None:
        return entropy.mean()
    return (entropy * valid).sum() / valid.sum().clamp(min=1)


def contrastive_loss(
    features: torch.Tensor,
    labels: torch.Tensor,
    bank,
    selectors,
    num_classes: int,
    bank_selectors=None,
) -> torch.Tensor:
    """Mean of a_i v_j (1 - cos(f_i, z_j)) over features i and bank vectors j; sum over classes / C.

    The weights a = sigmoid(selector(f)) and v (1, or likewise of the bank's selectors) are divided
    by their means within the class. A class counts that has two features and two vectors at least.
    Gradient to the features by the distance alone, to the selectors by the weights alone.

    features: (M, D); labels: (M,) int64, outside of the classes: ignored
    bank: MemoryBank, or C tensors (N_c, D); selectors, bank_selectors: C FeatureSelectors each
    """
    features = full_precision(features)
    if isinstance(bank, MemoryBank):
        store, filled = bank.store, bank.filled
    else:
        store = nn.utils.rnn.pad_sequence(list(bank), batch_first=True)
        filled = torch.tensor([len(rows) for rows in bank], device=features.device)
    store = store.detach().to(features.dtype)
    labels = labels.where((labels >= 0) & (labels < num_classes), num_classes)
    of_class = labels[:, None] == torch.arange(num_classes, device=labels.device)  # (M, C)
    used = (sum_over_processes(of_class.sum(0)) > 1) & (filled > 1)
    of_class = of_class.to(features.dtype)
    centers = bank_centers(store, filled, bank_selectors, used)
    attention = run_selectors(selectors, features.detach(), labels, used).sigmoid()
    distance = 1 - (F.normalize(features, dim=1) * (of_class @ centers)).sum(1)
    weighted, total = (of_class.T @ torch.stack([attention * distance, attention], 1)).unbind(1)
    total = sum_over_processes(total)
    per_class = torch.where(used, weighted / total.where(used, 1), 0)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    # Each process has its rows' share of the sums; the mean over processes is the whole loss.
    return world_size * per_class.sum() / num_classes


def bank_centers(store, filled, bank_selectors, used) -> torch.Tensor:
    """(C, D) means of each class's unit vectors, weighted by the bank's selectors if there are any.

    As the cosine distance is linear in a unit vector, the mean distance from all of them is the
    distance from this mean: no M x N matrix.
    """
    unit = F.normalize(store, dim=2)
    valid = torch.arange(store.shape[1], device=store.device) < filled[:, None]  # (C, N)
    weight = valid.to(store.dtype)
    # DIFFERS (cmb.md 7): the release divides each score by itself, so that all weights are 1.
    if bank_selectors:
        owner = torch.arange(len(store), device=store.device)
        scores = run_mlps(bank_selectors, unit, owner, valid, used, shared=True)
        weight = weight * scores[..., 0].sigmoid()
    return (weight[:, None] @ unit)[:, 0] / weight.sum(1, keepdim=True).clamp(min=1e-12)


class MemoryBank(nn.Module):
    """The latest features of each class, without gradient; the same on every process."""

    def __init__(self, num_classes: int, dim: int, capacity: int = 256):
        super().__init__()
        self.register_buffer("store", torch.zeros(num_classes, capacity, dim))  # newest first
        self.register_buffer("filled", torch.zeros(num_classes, dtype=torch.long))

    @property
    def vectors(self) -> list[torch.Tensor]:
        """(N_c, D) for each class, newest first; makes a GPU wait."""
        return [rows[:count] for rows, count in zip(self.store, self.filled.tolist(), strict=True)]

    @torch.no_grad()
    def add(self, features, labels, selectors, quota: int, rank: str = "lowest") -> None:
        """Put rows of each class in front; the oldest fall out.

        A class of which all processes together have more rows than `quota` gives so many, those
        with the highest or the lowest score; the others give all, in order.

        features: (M, D), projected; labels: (M,) int64, outside of the classes: no candidate
        """
        classes, capacity, dim = self.store.shape
        features = full_precision(features.detach())
        group = labels.where((labels >= 0) & (labels < classes), classes)
        count = sum_over_processes(group_sizes(group, classes))
        ranked = count > quota
        score = run_selectors(selectors, features, group, ranked)
        # DIFFERS (cmb.md 6): the release keeps the lowest, against its own comment.
        score = {"highest": -1, "lowest": 1}[rank] * score
        key = torch.where(F.pad(ranked, (0, 1))[group], score, 0)
        new = take_first(torch.cat([features, key[:, None]], 1), group, classes, quota)
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Every process takes the first of what all have, in the order of the global batch.
            new = gather(new.flatten(0, 1))
            group = torch.arange(len(new), device=new.device) // quota % classes
            new = take_first(new, group, classes, quota)
        # DIFFERS (cmb.md 15): never more than `capacity`, not in the first call either.
        count = count.clamp(max=quota)[:, None]
        place = torch.arange(capacity, device=new.device)
        place = torch.where(place < count, place, quota + place - count)  # in [new, old]
        both = torch.cat([new[..., :dim], self.store.to(new.dtype)], 1)
        self.store = both.gather(1, place[..., None].expand(-1, -1, dim))
        self.filled = (self.filled + count[:, 0]).clamp(max=capacity)


@torch.no_grad()
def fill_bank(bank, heads, logits, features, label, threshold: float, quota: int, rank: str):
    """Add the teacher's features where it classifies a labeled pixel right and is sure of it."""
    confidence, prediction = full_precision(logits).softmax(1).max(1)
    label = label.where((prediction == label) & (confidence > threshold), IGNORE)
    bank.add(*heads.project(features, label), heads.feature_selectors, quota, rank)


def quota(num_labeled: int, capacity: int, dataset: str, num_classes: int = 21) -> int:
    """Features that one class may give the bank per labeled image; `dataset`: voc or cityscapes."""
    share = num_classes / 3 if dataset == "voc" else 1  # an image of VOC shows few of the classes
    return max(1, int(share * round(capacity / num_labeled)))


class FeatureSelector(nn.Sequential):
    """Score of a feature of one class, (n, dim) -> (n, 1); the sigmoid follows outside."""

    def __init__(self, dim: int, hidden: int = 256):
        super().__init__(
            nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 1)
        )


def projection_head(in_dim: int, dim: int = 256) -> nn.Sequential:
    """Features of the network (n, in_dim) -> those of the bank (n, dim)."""
    return nn.Sequential(
        nn.Linear(in_dim, dim), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, dim)
    )


def prediction_head(dim: int = 256) -> nn.Sequential:
    """Projected features (n, dim) -> what is compared with the bank (n, dim); student only."""
    return projection_head(dim, dim)


class Heads(nn.Module):
    """Projection and prediction head, and the selectors of features and of bank vectors."""

    def __init__(self, dim: int, num_classes: int, bank_attention: bool):
        super().__init__()
        self.dim = dim
        self.projection, self.prediction = projection_head(dim, dim), prediction_head(dim)
        self.feature_selectors, self.bank_selectors = (
            nn.ModuleList([FeatureSelector(dim, dim) for _ in range(count)])
            for count in (num_classes, num_classes * bank_attention)
        )

    def project(self, features: torch.Tensor, label: torch.Tensor):
        """(B, D, h, w) features, (B, H, W) labels -> (B h w, D) projected rows, (B h w,) labels."""
        rows = full_precision(features).permute(0, 2, 3, 1).flatten(0, 2)
        label = nearest(label, features.shape[2:]).flatten()
        return run_mlp(self.projection, rows, label != IGNORE), label

    @torch.compiler.disable  # it sums over the processes
    def forward(self, features: torch.Tensor, label: torch.Tensor, bank: MemoryBank):
        """`contrastive_loss` of all positions whose label is not 255."""
        with torch.autocast(features.device.type, enabled=False):
            rows, label = self.project(features, label)
            rows = run_mlp(self.prediction, rows, label != IGNORE)
            selectors, bank_selectors = self.feature_selectors, self.bank_selectors
            return contrastive_loss(rows, label, bank, selectors, len(selectors), bank_selectors)


class NetworkWithHeads(nn.Module):
    """The network and its heads in one module, since DDP covers what its own `forward` does."""

    def __init__(self, network: nn.Module, heads: Heads):
        super().__init__()
        self.network, self.heads = network, heads

    def forward(self, image: torch.Tensor, label: torch.Tensor | None = None, bank=None):
        """Logits (B, C, H, W) with the contrastive loss, or without a label with the features."""
        features = self.network.head(*self.network.encode(image))
        logits = full_precision(self.network.classifier(features))
        logits = F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=True)
        return logits, features if label is None else self.heads(features, label, bank)


# === class balance ===
class ClassBalance(nn.Module):
    """Weights of the classes from their pixels among labels and pseudo-labels.

    Labels count until each image has been seen about once, pseudo-labels over a sliding window of
    one pass (windows in micro-batches); before both windows are full all weights are 1.
    """

    def __init__(self, num_classes: int, labeled_window: int, unlabeled_window: int):
        super().__init__()
        self.windows = max(1, labeled_window), max(1, unlabeled_window)
        self.register_buffer("labeled", torch.zeros(num_classes, dtype=torch.long))
        unlabeled = torch.zeros(self.windows[1], num_classes, dtype=torch.long)
        self.register_buffer("unlabeled", unlabeled)

    def update(self, number: int, label: torch.Tensor, pseudo_label: torch.Tensor) -> None:
        """Count the labels of micro-batch `number`, of all processes."""
        sizes = [group_sizes(each.flatten(), len(self.labeled)) for each in (label, pseudo_label)]
        labeled, unlabeled = sum_over_processes(torch.stack(sizes))
        if number < self.windows[0]:
            self.labeled += labeled
        self.unlabeled[number % self.windows[1]] = unlabeled

    def weight(self, number: int) -> torch.Tensor:
        """(C,) sqrt(median / frequency) after `update(number)`; unseen classes: the greatest."""
        if number + 1 < max(self.windows):
            return torch.ones_like(self.labeled, dtype=torch.float32)
        frequency = (self.labeled + self.unlabeled.sum(0)).float()
        middle = frequency.sort().values
        middle = (middle[(len(middle) - 1) // 2] + middle[len(middle) // 2]) / 2
        # DIFFERS (cmb.md 16): a median of 0 counts as 1 pixel.
        ratio = torch.where(frequency > 0, middle.clamp(min=1) / frequency.clamp(min=1), 1)
        return torch.where(frequency > 0, ratio, ratio.max()).sqrt()


def weighted_cross_entropy(
    logits: torch.Tensor, label: torch.Tensor, class_weight: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy over the valid pixels, mean weighted by their classes' (C,) weights."""
    logits = full_precision(logits)
    class_weight = class_weight.to(logits.dtype)
    loss = F.cross_entropy(logits, label, class_weight, ignore_index=IGNORE, reduction="none")
    weight = torch.where(label != IGNORE, class_weight[label.clamp(max=len(class_weight) - 1)], 0)
    return loss.sum() / weight.sum().clamp(min=1e-12)


# === views ===
def classes_to_paste(label: torch.Tensor, draw: torch.Tensor, background: bool) -> torch.Tensor:
    """floor(n / 2) + 1 of the n classes in each image: bool (B, C + 1), C stands for ignored.

    Ignored pixels, and class 0 if it is the `background`, are candidates only without others.

    label: (B, H, W) int64, 255 ignored
    draw: (B, C + 1), uniform in [0, 1); the present classes with the lowest are chosen
    """
    last = draw.shape[1] - 1
    present = torch.zeros_like(draw, dtype=torch.bool)
    present.scatter_(1, label.flatten(1).clamp(max=last), True)
    present[:, last] &= ~present[:, :last].any(1)
    if background:
        present[:, 0] &= ~present[:, 1:last].any(1)
    count = present.sum(1, keepdim=True)
    rank = draw.masked_fill(~present, 2).argsort(1).argsort(1)
    return (rank < count // 2 + 1) & present


def classmix(maps, classes, chance: float, span, generator: torch.Generator) -> list[torch.Tensor]:
    """Paste classes of the next image on each image of a batch, or on none: one coin for all.

    maps: images, labels and more that mix alike: n of each, or n + 1 with the partner of the last
    classes: names, of which "background" is pasted only if there is no other
    span: (B, first, n): images `first` to `first + n` of a global batch of B. Returns n of each.
    """
    batch_size, first, n = span
    mixing = torch.rand((), generator=generator).item() < chance
    draw = torch.rand(batch_size, len(classes) + 1, generator=generator)[first : first + n]
    own = [each[:n] for each in maps]
    if not mixing:
        return own
    partner = [each.roll(-1, 0)[:n] for each in maps]
    label = partner[1]
    draw = draw.to(label.device, non_blocking=True)
    background = classes[0].strip("_").lower() == "background"  # labelme's has underlines
    chosen = classes_to_paste(label, draw, background)
    mask = chosen.gather(1, label.flatten(1).clamp(max=len(classes))).view_as(label)[:, None]
    return [paste(a, b, mask) for a, b in zip(own, partner, strict=True)]


def strong_augmentation(image, label, confidence, blur: str, span, generator: torch.Generator):
    """Scale, mirror, color and blur a batch alike, labels and confidences with the images.

    One draw for the global batch each: whether and what, but for the factors of the colors, of
    which each image has its own. image: (n, 3, H, W) normalized; span: as in `classmix`
    """
    batch_size, first, n = span
    coins = torch.rand(4, generator=generator).tolist()
    scale, top, left, sigma = torch.rand(4, generator=generator).tolist()
    order = torch.randperm(4, generator=generator).tolist()
    shift = 0.5 * torch.rand(4, batch_size, generator=generator) - 0.25
    if coins[0] < 0.8:
        image, label, confidence = rescale(image, label, confidence, 0.75 + scale, (top, left))
    if coins[1] < 0.5:
        image, label, confidence = (each.flip(-1) for each in (image, label, confidence))
    if coins[2] < 0.8:
        mean, std = statistics(image.device)
        brightness, contrast, saturation, hue = shift[:, first : first + n]
        factors = (1 + brightness, 1 + contrast, 1 + saturation / 2, hue / 3)
        image = (color_jitter((image * std + mean).clamp(0, 1), *factors, order) - mean) / std
    if coins[3] < 0.2:
        image = blurred(image, (0.1, 1.5) if blur == "horizontal" else (0.1 + 1.4 * sigma,) * 2)
    return image, label, confidence


def rescale(image, label, confidence, scale: float, corner: tuple[float, float]):
    """Views at `scale`, padded (image 0, label 255, confidence 0) or cropped to the size they had.

    corner: (y, x) of the crop, as shares in [0, 1) of the places it may have
    """
    size = image.shape[2:]
    scaled = [math.floor(scale * side) for side in size]
    maps = torch.cat([image, confidence[:, None]], 1)
    maps = F.interpolate(maps, scaled, mode="bilinear", align_corners=True)
    label = nearest(label, scaled)[:, None]
    gap = [side - small for side, small in zip(size, scaled, strict=True)]
    if scale < 1:  # the odd row above, the odd column at the right
        rows, columns = gap
        margins = [columns // 2, columns - columns // 2, rows - rows // 2, rows // 2]
        # DIFFERS (cmb.md 13): padded with the mean color, which is 0, not with black.
        maps, label = F.pad(maps, margins), F.pad(label, margins, value=IGNORE)
    else:
        top, left = (int(share * (1 - more)) for share, more in zip(corner, gap, strict=True))
        window = slice(top, top + size[0]), slice(left, left + size[1])
        maps, label = maps[:, :, *window], label[:, :, *window]
    return maps[:, :3], label[:, 0], maps[:, 3]


def blurred(image: torch.Tensor, sigma: tuple[float, float]) -> torch.Tensor:
    """Gaussian blur with a kernel of 23 pixels a side and deviations (vertical, horizontal)."""
    # DIFFERS (cmb.md 8): the release means a range of deviations; its library takes two sides.
    return TF.gaussian_blur(image, [23, 23], [sigma[1], sigma[0]])


def nearest(label: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, H, W) int64 labels at another size."""
    return F.interpolate(label[:, None].float(), size, mode="nearest")[:, 0].long()


# === rows by class, over all processes ===
# Each class has rows of its own, and all run at once. No size depends on how many rows a class has,
# so that no GPU waits for a count.
def group_sizes(group: torch.Tensor, number: int) -> torch.Tensor:
    """How many of `group` (M,) are 0, 1, ..., number - 1."""
    return (group[:, None] == torch.arange(number, device=group.device)).sum(0)


def place_in_group(group: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """How many rows of its own group stand before each row of a sorted `group` (M,)."""
    return torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group]


def take_first(rows: torch.Tensor, group: torch.Tensor, num_groups: int, count: int):
    """Of every group the `count` rows with the lowest last column, in order: ties keep theirs.

    rows: (M, D); group: (M,) int64, where `num_groups` is none of them
    Returns (num_groups, count, D), infinite beyond the number of a group's rows.
    """
    order = rows[:, -1].argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    group = group[order]
    place = place_in_group(group, group_sizes(group, num_groups + 1))
    kept = (place < count) & (group < num_groups)
    place = torch.where(kept, group * count + place, num_groups * count)  # the last is thrown away
    taken = rows.new_full((num_groups * count + 1, rows.shape[1]), math.inf)
    return taken.index_copy_(0, place, rows[order])[:-1].view(num_groups, count, -1)


def run_selectors(selectors, rows: torch.Tensor, group: torch.Tensor, moved) -> torch.Tensor:
    """Scores (M,) of (M, D) rows, each by the selector of its class; `group` (M,): C is no class.

    The rows are sorted into blocks that hold one class each. However many rows each class has, they
    fit into the same number of blocks. `moved`: as in `run_mlps`
    """
    number, classes = len(rows), len(selectors)
    block = max(16, number // (4 * classes))
    blocks = number // block + classes + 1
    sizes = group_sizes(group, classes + 1)
    needed = (sizes + block - 1) // block  # blocks of each class
    end = needed.cumsum(0)
    order = group.argsort(stable=True)
    place = place_in_group(group[order], sizes) + (end - needed)[group[order]] * block
    place = torch.empty_like(place).scatter_(0, order, place)  # of the rows as they came
    owner = (torch.arange(blocks, device=rows.device)[:, None] >= end).sum(1)
    valid = group.new_zeros(blocks * block, dtype=torch.bool)
    valid = valid.index_copy_(0, place, group < classes).view(blocks, block)
    sorted_rows = rows.new_zeros(blocks * block, rows.shape[1]).index_copy_(0, place, rows)
    sorted_rows = sorted_rows.view(blocks, block, -1)
    scores = run_mlps(selectors, sorted_rows, owner.clamp(max=classes - 1), valid, moved)
    return scores.flatten()[place]


def run_mlp(mlp, rows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """One head on the valid of (M, D) rows; (M, out)."""
    owner = torch.zeros(1, dtype=torch.long, device=rows.device)
    return run_mlps([mlp], rows[None], owner, valid[None])[0]


def run_mlps(
    mlps, rows: torch.Tensor, owner: torch.Tensor, valid: torch.Tensor, moved=None, shared=False
) -> torch.Tensor:
    """Heads or selectors (Linear, BatchNorm1d, activation, Linear), each on rows of its own.

    The same as one call of each module, but all at once.

    mlps: K modules of one shape; rows: (n, b, D), n blocks of b rows
    owner: (n,) int64, the module to which each block belongs
    valid: (n, b) bool; the other rows take no part in the statistics
    moved: (K,) bool, whose running statistics move; None: those with two valid rows or more
    shared: every process holds the same rows, otherwise each has its part of them
    Returns (n, b, out).
    """

    def stacked(number: int, name: str) -> torch.Tensor:
        return torch.stack([getattr(mlp[number], name) for mlp in mlps]).to(rows.dtype)

    def linear(rows: torch.Tensor, number: int) -> torch.Tensor:
        weight, bias = stacked(number, "weight"), stacked(number, "bias")
        return torch.baddbmm(bias[owner][:, None], rows, weight[owner].mT)

    hidden = linear(rows, 0)
    norms = [mlp[1] for mlp in mlps]
    if norms[0].training:
        # DIFFERS (cmb.md 9): one row is no error: its variance is 0.
        # DIFFERS (cmb.md 10): mean and variance are those of the rows of all processes.
        reduce = (lambda value: value) if shared else sum_over_processes
        of_owner = (owner == torch.arange(len(mlps), device=rows.device)[:, None]).to(rows.dtype)
        weight = valid.to(rows.dtype)
        total = of_owner @ (weight[:, None] @ hidden)[:, 0]  # (K, hidden)
        total = reduce(torch.cat([total, (of_owner @ weight.sum(1))[:, None]], 1))
        mean, count = total[:, :-1] / total[:, -1:].clamp(min=1), total[:, -1:].detach()
        centered = hidden - mean[owner][:, None]
        var = reduce(of_owner @ (weight[:, None] @ centered.square())[:, 0]) / count.clamp(min=1)
        moved = count > 1 if moved is None else moved[:, None]
        move_statistics(norms, mean, var * (count / (count - 1).clamp(min=1)), moved)
    else:
        mean, var = stacked(1, "running_mean"), stacked(1, "running_var")
        centered = hidden - mean[owner][:, None]
    scale = stacked(1, "weight") * (var + norms[0].eps).rsqrt()
    hidden = centered * scale[owner][:, None] + stacked(1, "bias")[owner][:, None]
    return linear(mlps[0][2](hidden), 3)


@torch.no_grad()
def move_statistics(norms, mean: torch.Tensor, var: torch.Tensor, moved: torch.Tensor) -> None:
    """BatchNorm's running averages of K modules, where (K, 1) `moved`, towards (K, D) values."""
    momentum = norms[0].momentum * moved.to(mean.dtype)
    for name, value in (("running_mean", mean), ("running_var", var)):
        buffers = [getattr(norm, name) for norm in norms]
        value = torch.lerp(torch.stack(buffers).to(mean.dtype), value, momentum)
        torch._foreach_copy_(buffers, list(value.unbind()))
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], list(moved[:, 0].long()))


class SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over the processes; its gradient, summed likewise, reaches every part."""

    @staticmethod
    def forward(ctx, value):
        value = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx, grad):
        return SumOverProcesses.apply(grad)


def sum_over_processes(value: torch.Tensor) -> torch.Tensor:
    """As `SumOverProcesses`; of one process the value itself."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return SumOverProcesses.apply(value) if several else value


def gather(value: torch.Tensor) -> torch.Tensor:
    """The tensors of all processes, which have one shape, one after another."""
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def cosine_decay(step: int, steps: int, start: float) -> float:
    """EMA decay: `start`, rising to 1 at the end by half a cosine; 1 - 1/(10 t + 1) at first."""
    rest = (1 - start) * (math.cos(math.pi * step / steps) + 1) / 2
    return min(1 - 1 / (10 * step + 1), 1 - rest)


# === mixing (copied) ===
def paste(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`a` where the mask (B, 1, H, W) is 0, `b` where it is 1; maps (B, H, W) mix likewise."""
    return torch.where((mask if a.ndim == 4 else mask[:, 0]) > 0.5, b, a)


# === schedules (copied) ===
def ramp_up(step: int, ramp_up_steps: float) -> float:
    """exp(-5 (1 - t)^2) with t = step / ramp_up_steps; 1 from `ramp_up_steps` on."""
    if step >= ramp_up_steps:
        return 1.0
    return math.exp(-5 * (1 - step / ramp_up_steps) ** 2)


# === teacher (copied) ===
def make_teacher(student: nn.Module, args) -> nn.Module:
    """A copy of the student, buffers included, that no gradient reaches; in train mode."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    if args.compile:
        teacher.compile()
    return teacher


def update_teacher(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """g <- decay g + (1 - decay) f: parameters in place, buffers left alone."""
    average_parameters = get_ema_multi_avg_fn(decay)
    average_parameters(list(teacher.parameters()), list(student.parameters()), None)


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
    args_u = replace(args, batch_size=args.batch_size // 2)  # two views of each image
    micro_batches = world_size * args.accumulate
    if args_u.batch_size % micro_batches or args_u.batch_size < 2:
        mend = f"use a multiple of {2 * micro_batches}, and 4 or more"
        raise UserError(f"--batch-size {args.batch_size}: half as many unlabeled images; {mend}")
    batches_l = make_batches(args, data, split.labeled, "labeled", place, "next")
    labels = "known" if args.log_pseudo_accuracy else "none"
    batches_u = make_batches(args_u, data, split.unlabeled, "unlabeled", place, "next", labels)
    network = make_network(args, len(data.classes), "1")  # DIFFERS (cmb.md 1): as in all scripts
    torch.manual_seed(stream_seed(args.seed, "weights/heads"))
    heads = Heads(network.classifier.in_channels, len(data.classes), args.bank_attention == "on")
    student = NetworkWithHeads(network, heads)
    ddp = prepare(student, args, world_size, device)
    ddps = [ddp]
    teacher = make_teacher(student, args)  # DIFFERS (cmb.md 14): BatchNorm's statistics too
    bank = MemoryBank(len(data.classes), heads.dim, args.bank_size).to(device)
    rule = "voc" if args.dataset in ("voc", "folder") else "cityscapes"
    per_image = quota(len(split.labeled), args.bank_size, rule, len(data.classes))
    pass_l = len(split.labeled) * args.accumulate // args.batch_size  # micro-batches
    pass_u = len(split.unlabeled) * args.accumulate // args_u.batch_size
    balance = ClassBalance(len(data.classes), pass_l, pass_u).to(device)
    optimizer = make_optimizer([network, heads], args, device)
    saved = {"student": network, "student_heads": heads, "bank": bank, "balance": balance}
    saved |= {"teacher": teacher.network, "teacher_heads": teacher.heads}
    evaluated = args.evaluate  # DIFFERS (cmb.md 4): at the end, not the best on the way
    ramp_steps = args.ramp_up * args.steps  # before all terms act; the bank fills from half of them

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
            image_u, label_u = next(batches_u)
            n, n_u = len(image_l) - 1, len(image_u) - 1  # the last one is there to paste from
            part = rank * args.accumulate + micro  # this micro-batch in the global batch
            span_l, span_u = (args.batch_size, part * n, n), (args_u.batch_size, part * n_u, n_u)
            # DIFFERS (cmb.md 10): the teacher sees the last one too, unless it is the first again.
            image_u, label_u = image_u[: args_u.batch_size], label_u[: args_u.batch_size]
            with torch.no_grad(), autocast:
                # DIFFERS (cmb.md 2): the teacher sees the weak view of all scripts.
                prob = full_precision(teacher(image_u)[0]).softmax(1)
            confidence, pseudo_label = prob.max(1)
            # DIFFERS (cmb.md 2): none in the padding: an unlabeled label is 255 there alone.
            pseudo_label = pseudo_label.where(label_u != IGNORE, IGNORE)
            started = step >= ramp_steps
            class_weight = None
            if args.class_balance:
                number = step * args.accumulate + micro
                balance.update(number, label_l[:n], pseudo_label[:n_u])
                class_weight = balance.weight(number) if started else None

            generator = step_generator(args.seed, "labeled view", step)
            image_l, label_l = classmix(
                [image_l, label_l], data.classes, args.classmix[0], span_l, generator
            )
            views, maps = [], [image_u, pseudo_label, confidence]
            for name in ("first view", "second view"):
                generator = step_generator(args.seed, name, step)
                chance = args.classmix[1] if started else 0.0
                view = classmix(maps, data.classes, chance, span_u, generator)
                views.append(strong_augmentation(*view, args.blur, span_u, generator))
            # Strong views, 2 n_u of each.
            image_s, pseudo_label_s, confidence_s = map(torch.cat, zip(*views, strict=True))

            if step >= ramp_steps / 2:
                with torch.no_grad(), autocast:  # the views that the student sees
                    logits_l, features_l = teacher(image_l)
                fill_bank(
                    bank, teacher.heads, logits_l, features_l, label_l, args.bank_threshold,
                    per_image * n * world_size, args.bank_rank,
                )  # fmt: skip
            with autocast:  # labeled and unlabeled images apart, for BatchNorm
                logits_s, loss_contrastive_u = ddp(image_s, pseudo_label_s, bank)
                logits_l, loss_contrastive_l = ddp(image_l, label_l, bank)
            if args.supervised_loss == "ce" and class_weight is not None:
                loss_sup = weighted_cross_entropy(logits_l, label_l, class_weight)
            else:
                loss_sup = supervised_loss(logits_l, label_l, args.supervised_loss)
            loss_pseudo = pseudo_label_loss(
                logits_s, pseudo_label_s, confidence_s, ramp_up(step, ramp_steps), class_weight,
                args.confidence_power,
            )  # fmt: skip
            loss_entropy = entropy_loss(logits_s, pseudo_label_s != IGNORE)
            loss = loss_sup + args.lambda_u * loss_pseudo + args.lambda_entropy * loss_entropy
            # DIFFERS (cmb.md 11): before it starts it has weight 0, since DDP needs all parameters.
            weight = args.lambda_contrastive if started else 0.0
            loss = loss + weight * (loss_contrastive_l + loss_contrastive_u)

            logs = {"loss/sup": loss_sup, "loss/pseudo": loss_pseudo, "loss/entropy": loss_entropy}
            logs["loss/contrastive_l"] = loss_contrastive_l
            logs["loss/contrastive_u"] = loss_contrastive_u
            logs["pseudo/confidence"] = confidence[:n_u].mean()
            logs["pseudo/bank"] = bank.filled.float().mean() / args.bank_size
            if args.log_pseudo_accuracy:
                logs["pseudo/accuracy"] = pixel_accuracy(pseudo_label[:n_u], label_u[:n_u])
            first = slice(n_u)  # of the two views
            pictures = {
                "labeled": ([image_l], [label_l, logits_l]),
                "unlabeled": (
                    [image_u[:n_u], image_s[first]],
                    [pseudo_label_s[first], confidence_s[first], logits_s[first]],
                ),
            }

            # === backward (copied) ===
            scaler.scale(loss / args.accumulate).backward()
            history.append({name: value.detach() for name, value in logs.items()})

        # === step (copied) ===
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # === teacher ===
        update_teacher(teacher, student, cosine_decay(step, args.steps, args.ema_decay))

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
