"""AEL: Adaptive Equalization Learning (Hu, Wei, Hu, Ye, Cui, Wang, NeurIPS 2021, 2110.05474).

    L = CE(f(x_l), y_l) + lambda r(t) (C(x_m) + C(x_l)), C = sum_p v_p CE(f_p, y_p) / sum_p v_p,
    v_p = c_p^2 [u_p > 1 - s(class of f_p)], s = (1 - A) / max(1 - A): few pixels of classes that do
    well by their running confidence A; the others are pasted on labeled images, and chosen for
    CutMix, more often. x_m: two unlabeled images mixed, p: pixels, u_p: uniform; y, c: argmax and
    max of g's softmax, mixed as x_m; g: an average of f over time, r: a ramp up to 1

    python ael.py --dataset shapes                               # no data, no GPU: minutes
    python ael.py --split 1/8                                    # one GPU, Pascal VOC
    torchrun --nproc_per_node=8 ael.py --split 1/8               # the same run on eight

Network, weak view and evaluation are those of the CPS paper (2106.01226v3), batch, crop, steps and
rates those of the release; docs/ael.md lists what differs.
"""

import copy
import itertools
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
from tqdm import tqdm

from common import UserError, claim, explain, written_whole
from common.datasets import (
    IGNORE,
    MicroBatches,
    Samples,
    StreamSampler,
    Validation,
    global_batch,
    open_data,
    step_generator,
    stream_seed,
)
from common.evaluation import Protocol, pixel_accuracy, side_by_side, validate
from common.files import load_weights, read_weights
from common.transforms import MEAN, STD, WeakView, normalize

# Kinds of numbers, with their least and greatest value.
Whole, Count = Annotated[int, 0, math.inf], Annotated[int, 1, math.inf]
Amount, Share = Annotated[float, 0, math.inf], Annotated[float, 0, 1]


@dataclass(frozen=True, kw_only=True)
class Args:
    """AEL. What is None takes its value from the data set's row of PAPER."""

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
    gamma: Amount = 2.0  # power of the teacher's confidence that weights a pixel; 0: no weights
    sampling: bool = True  # leave pixels of confident classes out of the consistency loss
    copy_paste: bool = True  # paste objects of classes that do badly on half of the labeled images
    paste_draws: Count | None = None  # draws, with replacement, of classes to paste at a step
    paste_exclude: Annotated[tuple[int, ...], 0, 254] | None = None  # class ids never pasted
    paste_any: bool = False  # paste from any labeled image, not from one that has such a class
    adaptive_cutmix: bool = True  # sources and boxes by classes that do badly; else at random
    min_region: Share | None = None  # a box needs a region of that class above this share of pixels
    min_presence: Share | None = None  # share of pixels from which an image is said to have a class
    bank_momentum: Share | None = None  # share of itself that a running confidence keeps per step
    bank_absent: Literal["zero", "keep"] = "zero"  # a class without pixels in a batch: 0, or as is
    labeled_consistency: bool = True  # consistency on labeled images too
    confidence_threshold: Share | None = None  # probability from which a pixel has a pseudo-label
    ema_decay: Share | None = None  # share of itself that the teacher keeps at every step
    ema_warmup: bool = True  # decay of 1 - 1/(step + 1) until that exceeds --ema-decay
    lambda_u: Amount | None = None  # weight of the consistency loss
    ramp_up: Share | None = None  # share of the steps over which it rises from 0.7 % to all of it
    evaluate: Literal["student", "teacher"] = "teacher"  # network to evaluate
    log_pseudo_accuracy: bool = False  # where unlabeled images have labels, for the log alone


# === paper ===
# Sources: AEL repository 747c797 (steps: its epochs on 8 GPUs); camvid and shapes are ours. An
# entry that depends on other flags is a function of them.
# DIFFERS (ael.md 2): lr and weight decay are those that act on the true mean gradient.
# DIFFERS (ael.md 21): camvid and shapes ramp the consistency in, since their networks start from
# scratch, and their teachers remember 10 steps, their banks 100.
# DIFFERS (ael.md 10): each data set has a list of its own of classes that are not pasted.
PAPER = {
    "voc": dict(
        split="1/8", backbone="resnet101", weights="imagenet", batch_size=16, crop_size=513,
        steps=lambda args: {"1/32": 51_280, "1/16": 49_600, "1/4": 39_680, "1/2": 26_480}.get(
            args.split.split(":")[-1], 46_320
        ),
        optimizer="sgd", lr=0.00125, head_lr_mult=10.0, momentum=0.9, weight_decay=8e-4,
        supervised_loss="ce", lambda_u=1.0, ramp_up=0.0, ema_decay=0.99, bank_momentum=0.999,
        confidence_threshold=0.7, paste_draws=1, paste_exclude=(0,),
        min_region=0.03, min_presence=0.03,
    ),
    "cityscapes": dict(
        split="1/8", backbone="resnet101", weights="imagenet", batch_size=16, crop_size=769,
        steps=lambda args: {"1/32": 36_000, "1/16": 34_800, "1/4": 27_800, "1/2": 18_600}.get(
            args.split.split(":")[-1], 32_600
        ),
        optimizer="sgd", lr=0.00125, head_lr_mult=10.0, momentum=0.9, weight_decay=8e-4,
        supervised_loss="ohem", lambda_u=1.0, ramp_up=0.0, ema_decay=0.99, bank_momentum=0.999,
        confidence_threshold=0.0, paste_draws=3, paste_exclude=(0, 1, 2, 8, 10),
        min_region=0.005, min_presence=0.01,
    ),
    "camvid": dict(
        split="1/8", backbone="resnet14", weights="none", batch_size=8, crop_size=160, steps=1_000,
        optimizer="adamw", lr=1e-3, head_lr_mult=1.0, momentum=0.9, weight_decay=1e-4,
        supervised_loss="ce", lambda_u=1.0, ramp_up=0.4, ema_decay=0.9, bank_momentum=0.99,
        confidence_threshold=0.0, paste_draws=3, paste_exclude=(0, 1, 3, 4, 5),
        min_region=0.005, min_presence=0.01,
    ),
}  # fmt: skip
PAPER["shapes"] = PAPER["camvid"] | dict(
    split="20", batch_size=16, crop_size=48, paste_draws=1, paste_exclude=(0,)
)
PAPER["folder"] = PAPER["voc"] | dict(
    split=lambda args: f"{args.data_root}/labeled.txt", paste_exclude=()
)


# === method ===
def consistency_loss(
    student_logits: torch.Tensor,
    pseudo_label: torch.Tensor,
    confidence: torch.Tensor,
    rate: torch.Tensor,
    uniform: torch.Tensor,
    gamma: float = 2.0,
    world_size: int = 1,
) -> torch.Tensor:
    """Weighted mean of the cross-entropies of the sampled pixels, over the whole batch; 0 if none.

    A pixel has the weight confidence^gamma, and is sampled by the rate of the *student's* class.
    Ignored pixels are part of the mean, with a cross-entropy of 0.

    student_logits: (B, C, H, W)
    pseudo_label, confidence: (B, H, W), the teacher's, label 255 ignored; no gradient
    rate: (C,), of `sampling_rate`
    uniform: (B or 1, H, W) in [0, 1); sampled where it is above 1 - rate
    world_size: processes over which the mean is taken, each with images of its own
    """
    logits = full_precision(student_logits)
    # DIFFERS (ael.md 5): as released, the student's class decides on sampling.
    sampled = uniform > 1 - rate.detach()[logits.argmax(1)]
    weight = confidence.detach() ** gamma * sampled
    loss = F.cross_entropy(logits, pseudo_label, ignore_index=IGNORE, reduction="none")
    # DIFFERS (ael.md 3): one mean over the batch, ignored pixels included, as released.
    return (weight * loss).sum() / (over_processes(weight.sum(), world_size) + 1e-12)


def pseudo_labels(
    logits: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidences and class ids, 255 where the confidence is below `threshold`: (B, H, W) each."""
    confidence, label = full_precision(logits.detach()).softmax(1).max(1)
    return confidence, label.where(confidence >= threshold, IGNORE)


def confidence_sums(
    logits: torch.Tensor, label: torch.Tensor, per_image: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the true class's probability over each class's pixels, and their counts, (C,) each.

    logits: (B, C, H, W), the student's on labeled images; no gradient
    label: (B, H, W) int64, 255 ignored
    per_image: (B, C) each
    """
    prob = full_precision(logits.detach()).softmax(1)
    true = class_masks(label, logits.shape[1])
    pixels = (2, 3) if per_image else (0, 2, 3)
    return (prob * true).sum(pixels), true.sum(pixels)


def sums_over_pairs(sums: torch.Tensor, counts: torch.Tensor, absent: Literal["zero", "keep"]):
    """Each pair's mean confidence summed over the pairs of a batch, and their number: (C,) each.

    sums, counts: (B, C), of `confidence_sums` for each image
    absent: a class without pixels in a pair has 0 there ("zero"), or the pair is left out ("keep")
    """
    sums, counts = (torch.stack([x.sum(0) for x in of.split(2)]) for of in (sums, counts))
    number = (counts if absent == "keep" else counts.sum(1, keepdim=True)) > 0
    return (sums / counts.clamp(min=1)).sum(0), number.expand_as(counts).sum(0)


def update_confidence(
    bank: torch.Tensor,
    sum: torch.Tensor,
    count: torch.Tensor,
    momentum: float = 0.999,
    absent: Literal["zero", "keep"] = "zero",
) -> torch.Tensor:
    """A <- momentum A + (1 - momentum) sum / count, for each class: (C,).

    A class without pixels counts as 0 ("zero", as released), or it will "keep" its value.
    """
    # DIFFERS (ael.md 8): "keep" is ours; "zero" pulls a class down whenever a pair lacks it.
    new = momentum * bank + (1 - momentum) * sum / count.clamp(min=1)
    return torch.where(count > 0, new, bank) if absent == "keep" else new


def sampling_rate(bank: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """((1 - A) / max(1 - A))^beta: share of a class's pixels that are trained on, (C,)."""
    lacking = 1 - bank.detach()
    return (lacking / (lacking.max() + 1e-12)) ** beta


def paste_probability(bank: torch.Tensor, classes: list[int]) -> torch.Tensor:
    """softmax(sqrt(1 - A)) over `classes`, in their order: (len(classes),)."""
    # DIFFERS (ael.md 4): the root is the released code's alone.
    return (1 - bank.detach()[list(classes)]).sqrt().softmax(0)


def cutmix_probability(bank: torch.Tensor) -> torch.Tensor:
    """softmax(1 - A) over all classes: (C,)."""
    return (1 - bank.detach()).softmax(0)


def copy_paste(
    image: torch.Tensor,
    label: torch.Tensor,
    paste_image: torch.Tensor,
    paste_label: torch.Tensor,
    classes: list[int] | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(image, label) with the other images' pixels of `classes` in the same places.

    image, paste_image: (B, 3, H, W)
    label, paste_label: (B, H, W) int64; where a paste label is 0 throughout, nothing is pasted
    classes: ids, for all images, or each image's as bool (B, C)
    """
    if not isinstance(classes, torch.Tensor):
        named = torch.zeros(256, dtype=torch.bool).index_fill(0, torch.tensor(classes).long(), True)
        classes = to_device(named.expand(len(label), -1), label.device)
    wanted = F.pad(classes, (0, IGNORE + 1 - classes.shape[1]))  # neither other ids nor 255
    mask = wanted.gather(1, paste_label.flatten(1)).view_as(paste_label)
    mask = mask & paste_label.flatten(1).any(1)[:, None, None]
    return paste(image, paste_image, mask[:, None]), paste(label, paste_label, mask[:, None])


def box_masks(
    batch_size: int,
    height: int,
    width: int,
    generator: torch.Generator,
    n_boxes: int = 1,
    area: tuple[float, float] = (0.5, 0.5),
) -> torch.Tensor:
    """CutMix masks (B, 1, H, W), float 0/1 (French et al., BMVC 2020, 1906.01916).

    The boxes of one mask share `area` (drawn from this range, as a share of the image), have random
    proportions and lie inside; each flips what it covers: where two overlap the mask is 0 again.
    """
    draw = {"generator": generator, "dtype": torch.float64}
    share = area[0] + (area[1] - area[0]) * torch.rand(batch_size, n_boxes, **draw)
    tallness = torch.rand(batch_size, n_boxes, **draw)
    position = torch.rand(batch_size, n_boxes, 2, **draw)  # (y, x)
    side = torch.stack([share**tallness, share / share**tallness], dim=2) / n_boxes**0.5
    image = torch.tensor([height, width], dtype=torch.float64)
    size = (side * image).round()
    corner = ((image - size) * position).round()
    (top, left), (bottom, right) = (at[..., None].unbind(2) for at in (corner, corner + size))
    y, x = torch.arange(height), torch.arange(width)
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)  # (B, n, H), (B, n, W)
    covered = rows.float().mT @ columns.float()  # by how many boxes: (B, H, W)
    return (covered % 2)[:, None]


def region_masks(
    label: torch.Tensor,
    classes: torch.Tensor,
    draw: torch.Tensor,
    min_share: float,
    fallback: torch.Tensor,
) -> torch.Tensor:
    """CutMix masks (B, 1, H, W), float 0/1: the tight box of one region of each image's class.

    label: (B, H, W) class ids; a region is 8-connected
    classes: (B,), the class of each image
    draw: (B,) in [0, 1), picks a region
    min_share: of the image's pixels; a region needs more
    fallback: (B, 1, H, W), the masks of images without such a region, or with that class alone
    """
    inside = label == classes[:, None, None]
    name = region_names(inside)
    pixels = torch.zeros_like(name).scatter_add_(1, name, inside.flatten(1).long())
    large = pixels > min_share * pixels.shape[1]
    number = (draw * large.sum(1)).long()  # of the region, among the large ones
    chosen = (large.cumsum(1) > number[:, None]).byte().argmax(1, keepdim=True)
    region = inside & (name == chosen).view_as(inside)
    rows, columns = (
        side.cummax(1).values & side.flip(1).cummax(1).values.flip(1)  # from the first to the last
        for side in (region.any(2), region.any(1))
    )
    box = rows[:, None, :, None] & columns[:, None, None, :]
    found = large.any(1) & ~inside.flatten(1).all(1)
    return torch.where(found[:, None, None, None], box, fallback > 0.5).float()


def region_names(inside: torch.Tensor, rounds: int = 12) -> torch.Tensor:
    """Names the 8-connected regions of a bool (B, H, W) mask: (B, H W), a number for each pixel.

    It is the position of a region's last pixel. All pixels at once, so that no GPU waits: in every
    round each region found so far joins a neighbor with a higher number.
    """
    size, inside_flat = inside.shape[1:], inside.flatten(1)
    name = torch.arange(inside_flat.shape[1], device=inside.device).expand(inside_flat.shape)
    for _ in range(rounds):
        last = name
        near = torch.where(inside_flat, name, -1).float().view(-1, 1, *size)  # exact below 2^24
        near = F.max_pool2d(near, 3, stride=1, padding=1).long().flatten(1)
        near = torch.where(inside_flat, near, -1)
        name = name.scatter_reduce(1, name, near, "amax")
        name = name.gather(1, name)
        name = name.gather(1, name)
        if inside.device.type == "cpu" and torch.equal(name, last):
            break
    return name


def class_masks(label: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(B, H, W) class ids -> bool (B, C, H, W), false everywhere at ids of C and above."""
    return label[:, None] == torch.arange(num_classes, device=label.device).view(-1, 1, 1)


def presence(label: torch.Tensor, num_classes: int, share: float) -> torch.Tensor:
    """Whether a class has at least this share of an image's pixels, and one at all: bool (B, C)."""
    pixels = class_masks(label, num_classes).sum((2, 3))
    return (pixels > 0) & (pixels >= share * label[0].numel())


def over_processes(value: torch.Tensor, world_size: int) -> torch.Tensor:
    """Mean of a tensor over the processes."""
    if world_size > 1:
        dist.all_reduce(value)
        value = value / world_size
    return value


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy for which no GPU has to be waited for."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# === choice of images ===
# DIFFERS (ael.md 14): steps between the choice of images and their use, while loaders fetch them.
AHEAD = 9
# DIFFERS (ael.md 17): scales of a pasted image in tenths; as released, half of them enlarge it.
PASTE_SCALES = tuple(i / 10 for i in range(1, 21))


def draw_classes(probability: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """Positions in `probability` (C,) by inverse distribution function, one for each `draw`."""
    cumulative = probability.double().cumsum(0)
    position = torch.searchsorted(cumulative / cumulative[-1], draw, right=True)
    return position.clamp(max=len(probability) - 1)


def draw_images(contains: torch.Tensor, classes: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """An image that contains each of `classes` (B,), or any where none does: (B,) positions.

    contains: (N, C) bool
    draw: (B,) in [0, 1), fp64
    """
    rows = contains[:, classes]
    rows = rows | ~rows.any(0)
    chosen = (draw * rows.sum(0)).long()
    return (rows.cumsum(0) > chosen).byte().argmax(0)


class Bank(nn.Module):
    """Each class's running confidence, and the images chosen by it; the same on every process.

    Images are chosen AHEAD steps before their use, so that loader processes, which know nothing of
    the bank, have the time to fetch them. All buffers shape the future, and are saved.

    labeled_classes: (N, C) bool, the classes in each labeled image
    confidence: (C,) fp32 on the training device
    contains: (N, C) bool, whether the teacher last saw a class in an unlabeled image
    pasted_classes, pasted_image, source_class, source_image: (AHEAD, B, C) bool and (AHEAD, B),
        chosen for step t in row t % AHEAD; image -1 stands for nothing to paste
    last_confidence, last_images, last_seen: what the last step left, on the CPU: (C,), and the
        (2 B) unlabeled images and (2 B, C) classes in them
    """

    def __init__(self, args, labeled_classes: torch.Tensor, num_unlabeled: int, device):
        super().__init__()
        self.args, self.labeled_classes, self.num_unlabeled = args, labeled_classes, num_unlabeled
        num_classes, exclude = labeled_classes.shape[1], args.paste_exclude
        present = labeled_classes.any(0).nonzero().flatten().tolist()
        self.pasteable = [c for c in present if c not in exclude]
        if max(exclude, default=0) >= num_classes or (args.copy_paste and not self.pasteable):
            mend = f"name ids below {num_classes}, and leave one that labeled images have"
            raise UserError(f"--paste-exclude {exclude}: {mend}, or use --no-copy-paste")
        self.on_gpu = device.type == "cuda"
        self.copied = torch.cuda.Event() if self.on_gpu else None
        # DIFFERS (ael.md 7): a bank starts at 0, not at random.
        self.confidence = nn.Buffer(torch.zeros(num_classes, device=device))
        self.contains = nn.Buffer(torch.zeros(num_unlabeled, num_classes, dtype=torch.bool))
        size = (AHEAD, args.batch_size, num_classes)
        self.pasted_classes = nn.Buffer(torch.zeros(size, dtype=torch.bool))
        self.pasted_image, self.source_class, self.source_image = (
            nn.Buffer(torch.zeros(AHEAD, args.batch_size, dtype=torch.long)) for _ in range(3)
        )
        size = (2 * args.batch_size, num_classes)
        self.last_confidence = nn.Buffer(torch.zeros(num_classes, pin_memory=self.on_gpu))
        self.last_images = nn.Buffer(torch.zeros(2 * args.batch_size, dtype=torch.long))
        self.last_seen = nn.Buffer(torch.zeros(size, dtype=torch.bool, pin_memory=self.on_gpu))
        for step in range(AHEAD):
            self.choose(step)

    def choose(self, step: int) -> None:
        """Draw the classes and images of a step, for the global batch."""
        args, row, confidence = self.args, step % AHEAD, self.last_confidence
        generator = step_generator(args.seed, "choices", step)
        coin, want, which, source, where = torch.rand(
            5, args.batch_size, generator=generator, dtype=torch.float64
        )
        classes = draw_classes(cutmix_probability(confidence), source)
        self.source_class[row] = classes
        contains = self.contains & args.adaptive_cutmix  # none: any image
        self.source_image[row] = draw_images(contains, classes, where)
        if args.copy_paste:
            # As in the release, of two images per process, each pair has classes of its own.
            size = (args.batch_size + 1) // 2, args.paste_draws
            draw = torch.rand(size, generator=generator, dtype=torch.float64)
            drawn = draw_classes(paste_probability(confidence, self.pasteable), draw)
            classes = torch.tensor(self.pasteable)[drawn].repeat_interleave(2, 0)[: len(coin)]
            self.pasted_classes[row] = False
            self.pasted_classes[row].scatter_(1, classes, True)
            # DIFFERS (ael.md 9): an image that contains one of the classes, not any image.
            contains = self.labeled_classes & (not args.paste_any)  # none: any image
            one = classes.gather(1, (want * args.paste_draws).long()[:, None])[:, 0]
            image = draw_images(contains, one, which)
            self.pasted_image[row] = image.where(coin < 0.5, -1)

    def update(self, step: int, confidence: torch.Tensor, seen: torch.Tensor) -> None:
        """After a step: its bank (C,) and the classes (2, B, C) that the teacher saw.

        The CPU works with those of the step before, for which no GPU has to be waited for.
        """
        if self.on_gpu:
            self.copied.synchronize()
        for image, classes in zip(self.last_images.tolist(), self.last_seen, strict=True):
            self.contains[image] = classes
        batch = self.args.batch_size, self.args.seed, "unlabeled", step
        ids = torch.tensor([index for index, _ in global_batch(self.num_unlabeled, *batch)])
        self.last_images = torch.cat([ids, self.source_image[step % AHEAD]])
        self.choose(step + AHEAD)
        self.confidence = confidence
        self.last_confidence.copy_(confidence, non_blocking=self.on_gpu)
        self.last_seen.copy_(seen.flatten(0, 1) > 0, non_blocking=self.on_gpu)
        if self.on_gpu:
            self.copied.record()


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


# === ema decay (copied) ===
def ema_decay(step: int, max_decay: float) -> float:
    """min(1 - 1 / (step + 1), max_decay): a plain mean at first; step 0 copies the student."""
    return min(1 - 1 / (step + 1), max_decay)


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


# === losses ===
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
    logits: torch.Tensor, label: torch.Tensor, threshold: float = 0.7, min_kept: int = 100_000
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
    """`ce`, or the mean of each pair's `ohem` (0.7, 100,000 pixels), on any number of processes."""
    if kind == "ohem":  # as released, with a pair of labeled images per process
        pairs = zip(logits.split(2), label.split(2), strict=True)
        each = [ohem_cross_entropy(z, y, min_kept=50_000 * len(y)) * len(y) for z, y in pairs]
        return torch.stack(each).sum() / len(label)
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
    labels = "known" if args.log_pseudo_accuracy else "none"
    batches_u = make_batches(args, data, split.unlabeled, "unlabeled", place, None, labels)
    labeled_classes = classes_of(args, data, split.labeled, rank)
    bank = Bank(args, labeled_classes, len(split.unlabeled), device)
    batches_p = make_chosen_batches(
        args, data, split.labeled, "pasted", place, bank.pasted_image, PASTE_SCALES
    )
    batches_v = make_chosen_batches(
        args, data, split.unlabeled, "source", place, bank.source_image, data.scales, labels
    )
    student = make_network(args, len(data.classes), "1")
    ddp = prepare(student, args, world_size, device)
    ddps = [ddp]
    teacher = make_teacher(student, args)
    optimizer = make_optimizer([student], args, device)
    saved = {"student": student, "teacher": teacher, "bank": bank}
    evaluated = args.evaluate

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
            image_v, label_v = next(batches_v)  # the sources of CutMix, chosen by the bank
            n, size, row = len(image_u), args.crop_size, step % AHEAD
            threshold = args.confidence_threshold
            first = (rank * args.accumulate + micro) * n  # this micro-batch in the global one
            generator = step_generator(args.seed, "boxes", step)
            boxes = box_masks(args.batch_size, size, size, generator)
            draw = torch.rand(args.batch_size, generator=generator)
            # DIFFERS (ael.md 13): one map for all images and classes, not one per class.
            uniform = to_device(torch.rand(2, 1, size, size, generator=generator), device)
            mix_mask, draw, source_class, pasted_classes = (
                to_device(of_batch[first : first + n], device)
                for of_batch in (boxes, draw, bank.source_class[row], bank.pasted_classes[row])
            )
            if micro == 0:  # of the images of the step's micro-batches
                shape = (2, args.batch_size, len(data.classes))
                sums, seen = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
            if args.copy_paste:
                image_p, label_p = next(batches_p)
                image_l, label_l = copy_paste(image_l, label_l, image_p, label_p, pasted_classes)

            with torch.no_grad(), autocast:
                if args.labeled_consistency:
                    confidence_l, pseudo_label_l = pseudo_labels(teacher(image_l), threshold)
                confidence, pseudo_label = pseudo_labels(teacher(torch.cat([image_u, image_v])))
                present = presence(pseudo_label, len(data.classes), args.min_presence)
                seen[:, first : first + n] = present.view(2, n, -1)
                pseudo_u, pseudo_v = pseudo_label.chunk(2)
                if args.adaptive_cutmix:
                    mix_mask = region_masks(pseudo_v, source_class, draw, args.min_region, mix_mask)
                image_u = paste(image_u, image_v, mix_mask)
                label_u = paste(label_u, label_v, mix_mask)
                # Labels and confidences mixed are the argmax and maximum of mixed softmaxes.
                pseudo_label = paste(pseudo_u, pseudo_v, mix_mask)
                confidence = paste(*confidence.chunk(2), mix_mask)
                pseudo_label = pseudo_label.where(confidence >= threshold, IGNORE)
            with autocast:
                logits_l, logits_u = ddp(image_l), ddp(image_u)
            loss_sup = supervised_loss(logits_l, label_l, args.supervised_loss)

            # DIFFERS (ael.md 6): the mean over all pairs, so that there is one bank.
            sums[:, first : first + n] = torch.stack(confidence_sums(logits_l, label_l, True))
            batch = world_size * over_processes(sums.clone(), world_size)
            new = sums_over_pairs(*batch, args.bank_absent)
            running = update_confidence(bank.confidence, *new, args.bank_momentum, args.bank_absent)
            rate = sampling_rate(running)
            if not args.sampling:  # every pixel
                rate, uniform = torch.ones_like(rate), torch.ones_like(uniform)
            loss_cons = consistency_loss(
                logits_u, pseudo_label, confidence, rate, uniform[0], args.gamma, world_size
            )
            if args.labeled_consistency:
                loss_cons = loss_cons + consistency_loss(
                    logits_l, pseudo_label_l, confidence_l, rate, uniform[1], args.gamma, world_size
                )
            weight = args.lambda_u * ramp_up(step, args.ramp_up * args.steps)
            loss = loss_sup + weight * loss_cons

            logs = {"loss/sup": loss_sup, "loss/cons": loss_cons}
            logs |= {"pseudo/confidence": confidence.mean(), "pseudo/box": mix_mask.mean()}
            logs["pseudo/rate"] = rate.mean()
            logs |= {f"pseudo/bank/{c}": a for c, a in zip(data.classes, running, strict=True)}
            if args.log_pseudo_accuracy:
                label_u = label_u.where(pseudo_label != IGNORE, IGNORE)
                logs["pseudo/accuracy"] = pixel_accuracy(pseudo_label, label_u)
            pictures = {
                "labeled": ([image_l], [label_l, logits_l]),
                "unlabeled": ([image_u], [pseudo_label, confidence, logits_u]),
            }

            # === backward (copied) ===
            scaler.scale(loss / args.accumulate).backward()
            history.append({name: value.detach() for name, value in logs.items()})

        # === step (copied) ===
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # === teacher ===
        decay = ema_decay(step, args.ema_decay) if args.ema_warmup else args.ema_decay
        update_teacher(teacher, student, decay)

        # === bank ===
        bank.update(step, running, over_processes(seen, world_size))

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


# === chosen images ===
class ChosenSamples(Samples):
    """`Samples`, where index -1 is a black image of label 0: nothing is pasted from it."""

    def __getitem__(self, pair: tuple[int, int]):
        if pair[0] >= 0:
            return super().__getitem__(pair)
        size = self.view.crop_size
        zeros = torch.zeros(4, size, size, dtype=torch.uint8)
        return zeros[:3], zeros[3]


def make_chosen_batches(args, data, ids, stream, place, chosen, scales, labels="all"):
    """`make_batches` of the images that row t % AHEAD of `chosen` (AHEAD, B) holds for step t."""
    start, rank, world_size, device = place

    def micro_batches():
        base, share = stream_seed(args.seed, stream) >> 1, args.batch_size // world_size
        for step in itertools.count(start):
            images, position = chosen[step % AHEAD].tolist(), base + step * args.batch_size
            pairs = [(image, position + i) for i, image in enumerate(images)]
            size = share // args.accumulate
            for first in range(rank * share, (rank + 1) * share, size):
                yield pairs[first : first + size]

    loader = DataLoader(
        ChosenSamples(data, ids, WeakView(args.crop_size, scales), labels),
        batch_sampler=micro_batches(),
        # Each loader process is two batches ahead; together they may be AHEAD - 1.
        num_workers=min(args.num_workers, (AHEAD - 1) // 2),
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )
    for batch in loader:  # begins at the first `next`, when a checkpoint has been loaded
        image, label = (part.to(device, non_blocking=True) for part in batch)
        yield normalize(image), label.long()


def classes_of(args, data, ids, rank: int) -> torch.Tensor:
    """Whether an image has a pixel of each class, bool (N, C); decodes every label."""
    images, workers = Validation(data, ids), args.num_workers
    loader = DataLoader(images, batch_size=None, num_workers=workers, generator=torch.Generator())
    silent = True if rank else None
    counts = [
        label.flatten().long().bincount(minlength=256)
        for _, label in tqdm(loader, desc="classes of the labeled images", disable=silent)
    ]
    return torch.stack(counts)[:, : len(data.classes)] > 0


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
