"""CMB: class-wise memory bank (Alonso, Sabater, Ferstl, Montesano, Murillo, ICCV 2021, 2104.13415).

    L = CE(f(x_l), y_l) + r(t) CE(f(a(x_u)), a(argmax g(x_u))) max(g)^6 + w_h H(f(a(x_u)))
        + w_c [D(q(x_l), y_l) + D(q(a(x_u)), argmax g)],
    D: weighted mean cosine distance of the features of a class from that class's memory bank, which
    holds features of labeled pixels on which the teacher g is right and sure; a: a strong view

    python cmb.py --dataset shapes                               # no data, no GPU: minutes
    python cmb.py --split 1/8                                    # one GPU, Pascal VOC
    torchrun --nproc_per_node=5 cmb.py --split 1/8               # the same run on five

Network, weak view and evaluation are those of the CPS paper (2106.01226v3), batch, crop, steps and
rates those of the release; docs/cmb.md lists what differs.
"""

import copy
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
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
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
from common.transforms import MEAN, STD, WeakView, color_jitter, normalize, statistics


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
    """CMB. What is None takes its value from the data set's row of PAPER."""

    batch_size: int | None = None
    """labeled images per step over all processes; half as many unlabeled ones, in two views each"""

    lambda_u: float = 1.0
    """weight of the pseudo-label loss"""
    lambda_entropy: float = 0.01
    """weight of the entropy loss"""
    lambda_contrastive: float = 0.1
    """weight of the contrastive loss, of labeled and of unlabeled features each"""
    confidence_power: float = 6.0
    """a pseudo-label counts by the teacher's confidence to this power"""
    bank_size: int = 256
    """features in the memory bank of each class"""
    bank_threshold: float = 0.95
    """confidence above which a feature that the teacher classifies right may enter the bank"""
    bank_rank: Literal["highest", "lowest"] = "highest"
    """of too many features take those that the class's selector ranks so; lowest: as released"""
    bank_attention: Literal["on", "off"] = "on"
    """weigh the features in the bank by selectors of their own; off: as released"""
    classmix: tuple[float, float] = (0.2, 0.75)
    """chances that classes of other images are pasted: labeled batch, unlabeled view"""
    blur: Literal["isotropic", "horizontal"] = "isotropic"
    """blur of strong views: deviation drawn up to 1.5; or 1.5 along rows alone, as released"""
    class_balance: bool | None = None
    """weigh classes by 1 / sqrt(frequency) in the pseudo-label loss (supervised: with ce only)"""
    ema_decay: float | None = None
    """share of itself that the teacher keeps at first; rises to 1 by half a cosine"""
    ramp_up: float | None = None
    """share of the steps before all terms act: pseudo-labels ramp up, banks fill from half of it"""
    evaluate: Literal["student", "teacher"] = "student"
    """network to evaluate"""
    log_pseudo_accuracy: bool = False
    """log pseudo/accuracy, where unlabeled images have labels: a diagnostic, never trained on"""

    def __post_init__(self):
        if not 0 <= self.bank_threshold <= 1:
            raise UserError(f"--bank-threshold {self.bank_threshold}: must be from 0 to 1")
        if self.bank_size < 2:
            raise UserError(f"--bank-size {self.bank_size}: must be a whole number, 2 or more")
        if not all(0 <= chance <= 1 for chance in self.classmix):
            raise UserError(f"--classmix {self.classmix}: are two chances, from 0 to 1")
        if self.ema_decay is not None and not 0 <= self.ema_decay <= 1:
            raise UserError(f"--ema-decay {self.ema_decay}: must be from 0 to 1")
        if self.ramp_up is not None and not 0 <= self.ramp_up <= 1:
            raise UserError(f"--ramp-up {self.ramp_up}: is a share of the steps, from 0 to 1")


# Sources: SemiSeg-Contrastive dc53c6d (DeepLabV3+ with ResNet-50); camvid and shapes are ours. An
# entry that depends on other flags is a function of them.
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
        split="1/8", backbone="resnet14", weights="none", batch_size=8, crop_size=160,
        steps=1_000,
        optimizer="adamw", lr=1e-3, momentum=0.9, weight_decay=1e-4, supervised_loss="ce",
        ramp_up=0.4, ema_decay=0.9, class_balance=False,
    ),
    "shapes": dict(
        split="20", backbone="resnet14", weights="none", batch_size=16, crop_size=48,
        steps=1_000,
        optimizer="adamw", lr=1e-3, momentum=0.9, weight_decay=1e-4, supervised_loss="ce",
        ramp_up=0.4, ema_decay=0.9, class_balance=False,
    ),
}  # fmt: skip
PAPER["folder"] = PAPER["voc"] | {"split": "labeled.txt"}


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

    Args:
        logits: (B, C, H, W)
        pseudo_label, confidence: (B, H, W), the teacher's; no gradient. Pixels with label 255 add
            nothing, but are counted
        class_weight: (C,), by which the mean is not divided again
    """
    logits = full_precision(logits)
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    loss = F.cross_entropy(
        logits, pseudo_label, class_weight, ignore_index=IGNORE, reduction="none"
    )
    return (loss * full_precision(confidence.detach()).pow(power)).mean() * ramp


def weighted_cross_entropy(
    logits: torch.Tensor, label: torch.Tensor, class_weight: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy over the valid pixels, mean weighted by their classes' (C,) weights."""
    logits = full_precision(logits)
    class_weight = class_weight.to(logits.dtype)
    loss = F.cross_entropy(logits, label, class_weight, ignore_index=IGNORE, reduction="none")
    weight = torch.where(label != IGNORE, class_weight[label.clamp(max=len(class_weight) - 1)], 0)
    return loss.sum() / weight.sum().clamp(min=1e-12)


def entropy_loss(logits: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Entropy of the softmax over log C, so from 0 to 1: mean over all pixels, or the valid ones.

    Args:
        logits: (B, C, H, W)
        valid: bool (B, H, W)
    """
    # DIFFERS (cmb.md 5): normalized by log C, as released.
    log_prob = full_precision(logits).log_softmax(1)
    entropy = -(log_prob.exp() * log_prob).sum(1) / math.log(logits.shape[1])
    if valid is None:
        return entropy.mean()
    return (entropy * valid).sum() / valid.sum().clamp(min=1)


def quota(num_labeled: int, capacity: int, dataset: str, num_classes: int = 21) -> int:
    """Features that one class may give the bank per labeled image; `dataset`: voc or cityscapes."""
    share = num_classes / 3 if dataset == "voc" else 1  # an image of VOC shows few of the classes
    return max(1, int(share * round(capacity / num_labeled)))


def ramp_up(step: int, ramp_up_steps: float) -> float:
    """exp(-5 (1 - t)^2) with t = step / ramp_up_steps; 1 from `ramp_up_steps` on."""
    if step >= ramp_up_steps:
        return 1.0
    return math.exp(-5 * (1 - step / ramp_up_steps) ** 2)


def cosine_decay(step: int, steps: int, start: float) -> float:
    """EMA decay: `start`, rising to 1 at the end by half a cosine; 1 - 1/(10 t + 1) at first."""
    rest = (1 - start) * (math.cos(math.pi * step / steps) + 1) / 2
    return min(1 - 1 / (10 * step + 1), 1 - rest)


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


def run_mlps(
    mlps, rows: torch.Tensor, owner: torch.Tensor, valid: torch.Tensor, moved=None, shared=False
) -> torch.Tensor:
    """Heads or selectors (Linear, BatchNorm1d, activation, Linear), each on rows of its own.

    The same as one call of each module, but all at once, and the sizes do not depend on how many
    rows each has, so that no device has to wait for a count. One valid row is no error. Statistics
    are those of the rows of all processes.

    Args:
        mlps: K modules of one shape
        rows: (n, b, D), n blocks of b rows
        owner: (n,) int64, the module to which each block belongs
        valid: (n, b) bool; the other rows take no part in the statistics
        moved: (K,) bool, whose running statistics move; None: those with two valid rows or more
        shared: every process holds the same rows

    Returns:
        (n, b, out)
    """

    def stacked(number: int, name: str) -> torch.Tensor:
        return torch.stack([getattr(mlp[number], name) for mlp in mlps]).to(rows.dtype)

    def linear(rows: torch.Tensor, number: int) -> torch.Tensor:
        weight, bias = stacked(number, "weight"), stacked(number, "bias")
        return torch.baddbmm(bias[owner][:, None], rows, weight[owner].mT)

    hidden = linear(rows, 0)
    # DIFFERS (cmb.md 9): one row is no error: its variance is 0.
    # DIFFERS (cmb.md 10): mean and variance are those of the rows of all processes.
    norms = [mlp[1] for mlp in mlps]
    if norms[0].training:
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


def run_mlp(mlp, rows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """One head on the valid of (M, D) rows; (M, out)."""
    owner = torch.zeros(1, dtype=torch.long, device=rows.device)
    return run_mlps([mlp], rows[None], owner, valid[None])[0]


def run_selectors(selectors, rows: torch.Tensor, group: torch.Tensor, moved) -> torch.Tensor:
    """Scores (M,) of (M, D) rows, each by the selector of its class; `group` (M,): C is no class.

    The rows are sorted into blocks that hold one class each. However many rows each class has, they
    fit into the same number of blocks.
    """
    device, number, classes = rows.device, len(rows), len(selectors)
    size = max(16, number // (4 * classes))
    blocks = number // size + classes + 1
    count = (group[:, None] == torch.arange(classes + 1, device=device)).sum(0)
    last = ((count + size - 1) // size).cumsum(0)  # block after those of each class
    order = group.argsort(stable=True)
    ordered = group[order]
    place = torch.arange(number, device=device) - (count.cumsum(0) - count)[ordered]
    place = place + (last - (count + size - 1) // size)[ordered] * size
    place = torch.empty_like(place).scatter_(0, order, place)
    owner = (torch.arange(blocks, device=device)[:, None] >= last).sum(1).clamp(max=classes - 1)
    sorted_rows = rows.new_zeros(blocks * size, rows.shape[1]).index_copy_(0, place, rows)
    valid = torch.zeros(blocks * size, dtype=torch.bool, device=device)
    valid = valid.index_copy_(0, place, group < classes).view(blocks, size)
    scores = run_mlps(selectors, sorted_rows.view(blocks, size, -1), owner, valid, moved)
    return scores.flatten()[place]


def take_first(rows, key, group, num_groups: int, count: int):
    """Of every group the `count` rows with the lowest keys, in order: ties keep theirs.

    Args:
        rows: (M, D)
        key: (M,)
        group: (M,) int64; `num_groups` and above: none

    Returns:
        (C, count, D) rows and (C, count) keys, 0 beyond the number of each group's rows
    """
    order = key.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    group = group[order]
    size = (group[:, None] == torch.arange(num_groups + 1, device=rows.device)).sum(0)
    place = torch.arange(len(rows), device=rows.device) - (size.cumsum(0) - size)[group]
    kept = (place < count) & (group < num_groups)
    place = torch.where(kept, group * count + place, num_groups * count)  # the last is thrown away
    taken = rows.new_zeros(num_groups * count + 1, rows.shape[1]).index_copy_(0, place, rows[order])
    keys = key.new_zeros(num_groups * count + 1).index_copy_(0, place, key[order])
    return taken[:-1].view(num_groups, count, -1), keys[:-1].view(num_groups, count)


class MemoryBank(nn.Module):
    """The latest features of each class, without gradient; the same on every process."""

    def __init__(self, num_classes: int, dim: int, capacity: int = 256):
        super().__init__()
        self.register_buffer("store", torch.zeros(num_classes, capacity, dim))  # newest first
        self.register_buffer("filled", torch.zeros(num_classes, dtype=torch.long))

    @property
    def vectors(self) -> list[torch.Tensor]:
        """(N_c, D) for each class, newest first."""
        counts = self.filled.tolist()
        return [rows[:count] for rows, count in zip(self.store, counts, strict=True)]

    def share(self) -> torch.Tensor:
        """Share of the bank that is filled."""
        return self.filled.float().mean() / self.store.shape[1]

    @torch.no_grad()
    def add(self, features, labels, selectors, quota: int, rank: str = "lowest") -> None:
        """Put rows of each class in front; the oldest fall out.

        A class with more rows than `quota` gives those with the lowest or highest score; the
        others give all, in order. With several processes it is the rows of all that count.

        Args:
            features: (M, D), projected
            labels: (M,) int64; outside of the classes: no candidate
            selectors: C FeatureSelectors
            quota: the most rows of a class in this call
            rank: "highest" or "lowest" (as released)
        """
        if rank not in ("highest", "lowest"):
            raise ValueError(f"rank {rank!r}: use highest or lowest")
        classes, capacity, dim = self.store.shape
        features = full_precision(features.detach())
        group = labels.where((labels >= 0) & (labels < classes), classes)
        count = (group[:, None] == torch.arange(classes, device=group.device)).sum(0)
        count = sum_over_processes(count)
        ranked = count > quota
        # DIFFERS (cmb.md 6): the release keeps the lowest, against its own comment.
        score = run_selectors(selectors, features, group, ranked)
        score = score if rank == "lowest" else -score
        key = torch.where(F.pad(ranked, (0, 1))[group], score, 0)
        new, key = take_first(features, key, group, classes, quota)
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Every process takes the first of what all have, in the order of the global batch.
            own = (group[:, None] == torch.arange(classes, device=group.device)).sum(0)
            world_size, here = dist.get_world_size(), torch.arange(quota, device=group.device)
            group = torch.arange(classes, device=group.device)[:, None].expand(-1, quota)
            group = group.where(here < own[:, None], classes)
            new, key, group = (
                torch.cat(gather(each.flatten(0, 1), world_size)) for each in (new, key, group)
            )
            new, _ = take_first(new, key, group, classes, quota)
        count = count.clamp(max=quota)[:, None]
        place = torch.arange(capacity, device=group.device)
        place = torch.where(place < count, place, quota + place - count)  # in [new, old]
        both = torch.cat([new, self.store.to(new.dtype)], 1)
        self.store = both.gather(1, place[..., None].expand(-1, -1, dim))
        self.filled = (self.filled + count[:, 0]).clamp(max=capacity)


def gather(value: torch.Tensor, world_size: int) -> list[torch.Tensor]:
    """A tensor of every process, in their order."""
    found = [torch.empty_like(value) for _ in range(world_size)]
    dist.all_gather(found, value.contiguous())
    return found


def bank_centers(store, filled, bank_selectors, used) -> torch.Tensor:
    """Mean of each class's unit vectors, (C, D), or their mean weighted by the bank's selectors.

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

    Args:
        features: (M, D)
        labels: (M,) int64; outside of the classes: ignored
        bank: MemoryBank, or C tensors (N_c, D)
        selectors, bank_selectors: C FeatureSelectors each; without the latter v = 1
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


def nearest(label: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, H, W) int64 labels at another size."""
    return F.interpolate(label[:, None].float(), size, mode="nearest")[:, 0].long()


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
    """The network and its heads, in one module for DDP."""

    def __init__(self, network: nn.Module, heads: Heads):
        super().__init__()
        self.network, self.heads = network, heads

    def forward(self, image: torch.Tensor, label: torch.Tensor | None = None, bank=None):
        """Logits (B, C, H, W) with the contrastive loss, or without a label with the features."""
        features = self.network.head(*self.network.encode(image))
        logits = upsample(self.network.classifier(features), image.shape[2:])
        return logits, features if label is None else self.heads(features, label, bank)


def upsample(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """What `DeepLabV3Plus.forward` does with the classifier's logits."""
    return F.interpolate(full_precision(logits), size, mode="bilinear", align_corners=True)


@torch.no_grad()
def fill_bank(bank, heads, logits, features, label, threshold: float, quota: int, rank: str):
    """Add the teacher's features where it classifies a labeled pixel right and is sure of it."""
    confidence, prediction = full_precision(logits).softmax(1).max(1)
    label = label.where((prediction == label) & (confidence > threshold), IGNORE)
    bank.add(*heads.project(features, label), heads.feature_selectors, quota, rank)


class ClassBalance(nn.Module):
    """Weights of the classes from their pixels among labels and pseudo-labels.

    Labels count until each image has been seen about once, pseudo-labels over a sliding window of
    one pass; before both windows are full all weights are 1.
    """

    def __init__(self, num_classes: int, labeled_window: int, unlabeled_window: int):
        super().__init__()
        self.windows = max(1, labeled_window), max(1, unlabeled_window)
        self.register_buffer("labeled", torch.zeros(num_classes, dtype=torch.long))
        unlabeled = torch.zeros(self.windows[1], num_classes, dtype=torch.long)
        self.register_buffer("unlabeled", unlabeled)

    def update(self, number: int, label: torch.Tensor, pseudo_label: torch.Tensor) -> None:
        """Count the labels of micro-batch `number`, of all processes."""
        classes = len(self.labeled)
        counts = [
            torch.histc(labels.float(), classes, -0.5, classes - 0.5).long()
            for labels in (label, pseudo_label)
        ]
        counts = sum_over_processes(torch.stack(counts))
        if number < self.windows[0]:
            self.labeled += counts[0]
        self.unlabeled[number % self.windows[1]] = counts[1]

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


def half_batch(args, rank: int, world_size: int) -> int:
    """Unlabeled images per step: each has two views, so half as many as labeled ones."""

    def check() -> None:
        half, share = args.batch_size // 2, world_size * args.accumulate
        if half % share:
            raise UserError(
                f"--batch-size {args.batch_size}: half as many unlabeled images are not divisible "
                f"by {world_size} processes x --accumulate {args.accumulate}; use a multiple of "
                f"{2 * share}"
            )
        if half < 2:
            raise UserError(f"--batch-size {args.batch_size}: needs 2 unlabeled images; use 4")

    rank_0_first(check, rank, world_size)
    return args.batch_size // 2


def classes_to_paste(label: torch.Tensor, draw: torch.Tensor, background: bool) -> torch.Tensor:
    """floor(n / 2) + 1 of the n classes in each image: bool (B, C + 1), C stands for ignored.

    Ignored pixels, and class 0 if it is the `background`, are candidates only without others.

    Args:
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


def mask_of(chosen: torch.Tensor, pseudo_label: torch.Tensor) -> torch.Tensor:
    """1 where a pixel's class is among the `chosen` (B, C): float (B, 1, H, W)."""
    mask = chosen.float().gather(1, pseudo_label.flatten(1))
    return mask.view_as(pseudo_label)[:, None]


def paste(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`a` where the mask (B, 1, H, W) is 0, `b` where it is 1; maps (B, H, W) mix likewise."""
    return torch.where((mask if a.ndim == 4 else mask[:, 0]) > 0.5, b, a)


def classmix(draw: torch.Tensor, background: bool, image, label, *maps) -> list[torch.Tensor]:
    """Paste classes of the next image on each of the first len(draw) images; the maps likewise."""
    n = len(draw)
    after = (torch.arange(n, device=label.device) + 1) % len(image)
    chosen = classes_to_paste(label[after], draw, background)
    mask = mask_of(chosen, label[after].clamp(max=draw.shape[1] - 1))
    return [paste(each[:n], each[after], mask) for each in (image, label, *maps)]


def rescale(image, label, confidence, scale: float, corner: tuple[float, float]):
    """Views at `scale`, padded (image 0, label 255, confidence 0) or cropped to the size they had.

    Args:
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
        maps, label = F.pad(maps, margins), F.pad(label, margins, value=IGNORE)
    else:
        top, left = (int(share * (1 - more)) for share, more in zip(corner, gap, strict=True))
        window = slice(top, top + size[0]), slice(left, left + size[1])
        maps, label = maps[:, :, *window], label[:, :, *window]
    return maps[:, :3], label[:, 0], maps[:, 3]


def strong_augmentation(image, label, confidence, batch_size, first, blur, generator):
    """Scale, mirror, color and blur a batch alike, labels and confidences with the images.

    One draw for the global batch each: whether and what, but for the factors of the colors, which
    each of the `batch_size` images has its own of.

    Args:
        image: (n, 3, H, W) normalized, images `first` to `first + n` of the global batch
        blur: "isotropic" or "horizontal"
    """
    coins = torch.rand(4, generator=generator).tolist()
    scale, top, left, sigma = torch.rand(4, generator=generator).tolist()
    order = torch.randperm(4, generator=generator).tolist()
    shift = 0.5 * torch.rand(4, batch_size, generator=generator) - 0.25  # of each image
    if coins[0] < 0.8:
        image, label, confidence = rescale(image, label, confidence, 0.75 + scale, (top, left))
    if coins[1] < 0.5:
        image, label, confidence = (each.flip(-1) for each in (image, label, confidence))
    if coins[2] < 0.8:
        mean, std = statistics(image.device)
        brightness, contrast, saturation, hue = shift[:, first : first + len(image)]
        factors = (1 + brightness, 1 + contrast, 1 + saturation / 2, hue / 3)
        image = (color_jitter((image * std + mean).clamp(0, 1), *factors, order) - mean) / std
    if coins[3] < 0.2:
        image = blurred(image, (0.1, 1.5) if blur == "horizontal" else (0.1 + 1.4 * sigma,) * 2)
    return image, label, confidence


def blurred(image: torch.Tensor, sigma: tuple[float, float]) -> torch.Tensor:
    """Gaussian blur with a kernel of 23 pixels a side and deviations (vertical, horizontal)."""
    # DIFFERS (cmb.md 8): the release means a range of deviations; its library takes two sides.
    return TF.gaussian_blur(image, [23, 23], [sigma[1], sigma[0]])


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
    args_u = replace(args, batch_size=half_batch(args, rank, world_size))
    batches_l = make_batches(args, data, split.labeled, "labeled", *place, "next")
    labels = "known" if args.log_pseudo_accuracy else "none"
    batches_u = make_batches(args_u, data, split.unlabeled, "unlabeled", *place, "next", labels)
    images_per_step = args.batch_size + args_u.batch_size
    alone = replace(args, compile=False)  # it is wrapped below, with its heads
    network, _ = rank_0_first(
        lambda: make_network(alone, len(data.classes), "1", 0, 1, device), rank, world_size
    )
    torch.manual_seed(stream_seed(args.seed, "weights/heads"))  # the same on every process
    heads = Heads(network.classifier.in_channels, len(data.classes), args.bank_attention == "on")
    student, ddp = prepare(NetworkWithHeads(network, heads), args, world_size, device)
    teacher = make_teacher(student, args)
    bank = MemoryBank(len(data.classes), heads.dim, args.bank_size).to(device)
    rule = "voc" if args.dataset in ("voc", "folder") else "cityscapes"
    per_image = quota(len(split.labeled), args.bank_size, rule, len(data.classes))
    images_l, images_u = (a.batch_size // args.accumulate for a in (args, args_u))
    windows = len(split.labeled) // images_l, len(split.unlabeled) // images_u
    balance = ClassBalance(len(data.classes), *windows).to(device)
    background = data.classes[0] == "background"
    ddps = [ddp]
    optimizer = make_optimizer([student.network, student.heads], args, device)
    saved = {"student": student.network, "student_heads": student.heads, "bank": bank}
    saved |= {"teacher": teacher.network, "teacher_heads": teacher.heads, "balance": balance}
    evaluated = args.evaluate

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
            image_u, label_u = next(batches_u)
            part = rank * args.accumulate + micro  # this micro-batch in the global one
            ramp_steps = args.ramp_up * args.steps
            started = step >= ramp_steps
            with torch.no_grad(), autocast:
                # DIFFERS (cmb.md 2): the teacher sees the weak view of all scripts.
                prob = full_precision(teacher(image_u)[0]).softmax(1)
            confidence, pseudo_label = prob.max(1)  # padding has them, too
            n, n_u = images_l // world_size, images_u // world_size
            class_weight = None
            if args.class_balance:
                balance.update(step * args.accumulate + micro, label_l[:n], pseudo_label[:n_u])
                class_weight = balance.weight(step * args.accumulate + micro) if started else None

            generator = step_generator(args.seed, "labeled view", step)
            mixing = torch.rand((), generator=generator).item() < args.classmix[0]
            draw = torch.rand(args.batch_size, len(data.classes) + 1, generator=generator)
            if mixing:
                draw = draw[part * n : part * n + n].to(device, non_blocking=True)
                image_l, label_l = classmix(draw, background, image_l, label_l)
            image_l, label_l = image_l[:n], label_l[:n]
            views = []
            for name in ("first view", "second view"):
                generator = step_generator(args.seed, name, step)
                mixing = torch.rand((), generator=generator).item() < args.classmix[1]
                draw = torch.rand(args_u.batch_size, len(data.classes) + 1, generator=generator)
                view = image_u, pseudo_label, confidence
                if mixing and started:
                    draw = draw[part * n_u : part * n_u + n_u].to(device, non_blocking=True)
                    view = classmix(draw, background, *view)
                view = [each[:n_u] for each in view]
                count, first = args_u.batch_size, part * n_u
                views.append(strong_augmentation(*view, count, first, args.blur, generator))
            image_s, pseudo_label_s, confidence_s = map(torch.cat, zip(*views, strict=True))

            if step >= ramp_steps / 2:
                with torch.no_grad(), autocast:  # the views that the student sees
                    logits_l, features_l = teacher(image_l)
                fill_bank(
                    bank, teacher.heads, logits_l, features_l, label_l, args.bank_threshold,
                    per_image * images_l, args.bank_rank,
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
            # Before its start the contrastive loss has weight 0, for DDP.
            loss_contrastive = loss_contrastive_l + loss_contrastive_u
            loss = loss_sup + args.lambda_u * loss_pseudo + args.lambda_entropy * loss_entropy
            loss = loss + started * args.lambda_contrastive * loss_contrastive

            logs = {"loss/sup": loss_sup, "loss/pseudo": loss_pseudo, "loss/entropy": loss_entropy}
            logs |= {"loss/contrastive_l": loss_contrastive_l}
            logs |= {"loss/contrastive_u": loss_contrastive_u}
            logs |= {"pseudo/confidence": confidence[:n_u].mean(), "pseudo/bank": bank.share()}
            if args.log_pseudo_accuracy:
                known = label_u[:n_u] < UNKNOWN
                right = (pseudo_label[:n_u] == label_u[:n_u]) & known
                logs["pseudo/accuracy"] = right.sum() / known.sum().clamp(min=1)
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

        # === teacher ===
        update_teacher(teacher, student, cosine_decay(step, args.steps, args.ema_decay))

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
