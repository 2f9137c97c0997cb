"""Guided Collaborative Training (Ke, Qiu, Li, Yan, Lau, ECCV 2020, 2008.05258).

    L = sum_k CE(f_k(x_l), y_l) + lambda_dc r(t) |p_k - P_k|^2 + lambda_fc |M D(x, p_k)|^2, k = 1, 2
    p_k: softmax of network f_k on labeled and unlabeled images x; r: a ramp up to 1
    D: a flaw detector, trained on labeled images, apart, to see where p_k is wrong
    P_k: the softmax in which D sees the lesser flaw; M: the pixels where it sees one in both

    python gct.py --dataset shapes                               # no data, no GPU: minutes
    python gct.py --split 1/8                                    # one GPU, Pascal VOC
    torchrun --nproc_per_node=8 gct.py --split 1/8               # the same run on eight

The protocol is that of the CPS paper (2106.01226v3); docs/gct.md lists what differs.
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
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import tyro
from torch import nn
from torch.nn.parallel import DistributedDataParallel
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
    open_data,
    open_dataset,
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
    """GCT. What is None takes its value from the data set's row of PAPER."""

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
    flaw_threshold: Share = 0.6  # handled flaw map above which a network's output is flawed
    flaw_rounds: Count = 1  # rounds of dilation and blur that spread the true flaws
    clamp_flaw_map: bool = True  # the detector's loss takes negative outputs as 0, by value alone
    joint_batch: bool = False  # labeled and unlabeled images in one BatchNorm batch (PixelSSL)
    lambda_dc: Amount | None = None  # weight of dynamic consistency; 0: correct flaws at all pixels
    ramp_up: Share | None = None  # share of the steps over which it rises from 0.7 % to all of it
    lambda_fc: Amount | None = None  # weight of flaw correction
    detector_lr: Amount | None = None  # the flaw detector's rate at step 0 (Adam, poly schedule)
    detector_width: Annotated[int, 2, math.inf] | None = None  # channels of its first convolution
    detector_stages: Annotated[int, 1, 6] | None = None  # how often its channels double
    log_pseudo_accuracy: bool = False  # where unlabeled images have labels, for the log alone


# === paper ===
# Sources: CPS repository 5e0c29c, whose rows of GCT are for VOC alone; PixelSSL ce19203; camvid and
# shapes are ours. An entry that depends on other flags is a function of them.
# DIFFERS (supervised.md 2): lr and weight decay are those that act on the true mean gradient.
# DIFFERS (gct.md 5): Adam is blind to that factor: the detector's rate is the released 4 x 1e-4.
# DIFFERS (gct.md 6): a ramp of three of the CPS paper's epochs, as released, on Cityscapes, too.
# camvid and shapes ramp for longer, since their networks start from scratch, and have 3 % of the
# weights that a pixel has on VOC (100 / 21 and 1); folder has all of them.
PAPER = {
    "voc": dict(
        split="1/8", backbone="resnet50", weights="imagenet", batch_size=8, crop_size=512,
        steps=lambda args: {"1/8": 39_338, "1/2": 39_660}.get(args.split.split(":")[-1], 39_680),
        optimizer="sgd", lr=0.0025, momentum=0.9, weight_decay=4e-4, supervised_loss="ce",
        lambda_dc=100.0, lambda_fc=1.0, ramp_up=lambda args:
            3 / {"1/16": 32, "1/4": 40, "1/2": 60}.get(args.split.split(":")[-1], 34),
        detector_lr=4e-4, detector_width=64,
        detector_stages=lambda args: fitting_stages(args.crop_size),
    ),
    "cityscapes": dict(
        split="1/8", backbone="resnet50", weights="imagenet", batch_size=8, crop_size=800,
        steps=lambda args: {"1/16": 44_544, "1/8": 44_525}.get(args.split.split(":")[-1], 44_640),
        optimizer="sgd", lr=0.0025, momentum=0.9, weight_decay=8e-4, supervised_loss="ohem",
        lambda_dc=100.0, lambda_fc=1.0, ramp_up=lambda args:
            3 / {"1/16": 128, "1/4": 160, "1/2": 240}.get(args.split.split(":")[-1], 137),
        detector_lr=4e-4, detector_width=64,
        detector_stages=lambda args: fitting_stages(args.crop_size),
    ),
    "camvid": dict(
        split="1/8", backbone="resnet14", weights="none", batch_size=8, crop_size=160, steps=1_000,
        optimizer="adamw", lr=1e-3, momentum=0.9, weight_decay=1e-4, supervised_loss="ce",
        lambda_dc=1.56, lambda_fc=0.03, ramp_up=0.4,
        detector_lr=4e-4, detector_width=16,
        detector_stages=lambda args: fitting_stages(args.crop_size),
    ),
}  # fmt: skip
PAPER["shapes"] = PAPER["camvid"] | dict(split="20", batch_size=16, crop_size=48, lambda_dc=1.14)
PAPER["folder"] = PAPER["voc"] | dict(
    split=lambda args: f"{args.data_root}/labeled.txt", steps=39_680,
    lambda_dc=lambda args: 100 / 21 * len(open_dataset("folder", args.data_root).classes),
)  # fmt: skip


# === method ===
@torch.no_grad()
def dynamic_targets(
    prob_1: torch.Tensor,
    prob_2: torch.Tensor,
    flaw_1: torch.Tensor,
    flaw_2: torch.Tensor,
    threshold: float = 0.6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Who teaches whom: at each pixel the softmax with the lesser flaw is both networks' target.

    Where both are equally or both badly flawed, each keeps its own: its difference there is 0.

    prob: (B, C, H, W); flaw: handled maps (B, 1, H, W), above `threshold` an output is flawed
    Returns target_1, target_2 (B, C, H, W) and both_flawed (B, 1, H, W) bool, without gradient.
    """
    flawed_1, flawed_2 = (flaw.float() > threshold for flaw in (flaw_1, flaw_2))
    flaw_1, flaw_2 = torch.where(flawed_1, 1, flaw_1), torch.where(flawed_2, 1, flaw_2)
    target_1 = torch.where(flaw_1 <= flaw_2, prob_1, prob_2)
    target_2 = torch.where(flaw_2 <= flaw_1, prob_2, prob_1)
    return target_1, target_2, flawed_1 & flawed_2


def flaw_correction_loss(flaw_map: torch.Tensor, both_flawed: torch.Tensor) -> torch.Tensor:
    """Squared flaw map where both outputs are flawed, mean over all pixels.

    flaw_map: (B, 1, H, W) of the detector, not handled: negative values are pushed to 0, too
    both_flawed: (B, 1, H, W) bool or 0/1
    """
    return (full_precision(flaw_map).square() * both_flawed).mean()


def detector_loss(flaw_map: torch.Tensor, target: torch.Tensor, clamp: bool = True) -> torch.Tensor:
    """Mean squared difference of the detector's maps and the true flaws, both (B, 1, H, W).

    `clamp`: negative values count as 0 but keep their gradient. In the release the handling of the
    maps overwrites them in place, after the forward pass, and the backward pass does not know.
    """
    flaw_map = full_precision(flaw_map)
    if clamp:  # DIFFERS (gct.md 10): on all GPUs, where the release does it on the first alone
        flaw_map = flaw_map + (flaw_map.relu() - flaw_map).detach()
    return F.mse_loss(flaw_map, target)


@torch.no_grad()
def flaw_target(
    prob: torch.Tensor, label: torch.Tensor, crop_size: int, rounds: int = 1
) -> torch.Tensor:
    """What the flaw detector learns: where `prob` is wrong, spread and stretched to [0, 1].

    prob: (B, C, H, W); label: (B, H, W) int64, 255 ignored: half a flaw, as released
    crop_size: sets the widths of the blurs; rounds: of dilation and blur
    Returns (B, 1, H, W), without gradient.
    """
    prob, label = full_precision(prob), label[:, None]
    valid = (label != IGNORE).to(prob.dtype)
    one_hot = torch.zeros_like(prob).scatter_(1, label.clamp(max=prob.shape[1] - 1), valid)
    flaw = (one_hot - prob).abs().sum(1, keepdim=True) / 2  # 1 - p_y where labeled
    flaw = blur(flaw, blur_size(crop_size, 8))
    for _ in range(rounds):
        flaw = blur(F.max_pool2d(flaw, 3, stride=1, padding=1), blur_size(crop_size, 4))
    low, high = extremes(flaw)
    return (flaw - low) / (high - low + 1e-9)


@torch.no_grad()
def handle_flaw_map(flaw_map: torch.Tensor, crop_size: int) -> torch.Tensor:
    """The detector's map (B, 1, H, W), blurred and stretched, to compare two networks by.

    An image without a flaw above 0.1 becomes a constant, 0 or less, and loses none.
    """
    flaw = blur(full_precision(flaw_map).clamp(min=0), blur_size(crop_size, 16))
    low, high = extremes(flaw)
    flaw = torch.where(high > 0.1, flaw, 0)
    return (flaw - low) / (high - low + 1e-9)  # with the extremes from before, as released


def extremes(flaw_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest value of each image, (B, 1, 1, 1)."""
    return flaw_map.amin((1, 2, 3), keepdim=True), flaw_map.amax((1, 2, 3), keepdim=True)


def blur_size(crop_size: int, part: int) -> int:
    """An odd number, about a `part`-th of the crop."""
    return (crop_size // part) | 1


def blur(flaw_map: torch.Tensor, size: int) -> torch.Tensor:
    """Gaussian blur of (B, 1, H, W) by an odd `size`: two passes, each one matrix product."""
    # DIFFERS (gct.md 8): the released two-dimensional convolution is exactly these two passes.
    rows, columns = (
        blur_matrix(length, size, flaw_map.dtype, flaw_map.device) for length in flaw_map.shape[2:]
    )
    return rows @ flaw_map @ columns.T


@cache
def blur_matrix(length: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(length, length): blurs a column of pixels; mirrored at its ends, the edge not repeated."""
    source = torch.arange(length)[:, None] + torch.arange(size) - size // 2  # (length, size)
    source = length - 1 - (length - 1 - source.abs()).abs()
    weight = blur_kernel(size).expand(length, -1)
    matrix = torch.zeros(length, length, dtype=torch.float64).scatter_add_(1, source, weight)
    return matrix.to(device, dtype)


def blur_kernel(size: int) -> torch.Tensor:
    """The released Gaussian (size,) fp64, sum 1.

    Cut at 4 deviations and thus wider than `size`; what hangs over is folded back at both ends.
    """
    deviation = 0.3 * ((size - 1) / 2 - 1) + 0.8
    radius = int(4 * deviation + 0.5)
    offset = torch.arange(-radius, radius + 1)
    weight = torch.exp(-0.5 * (offset / deviation).double().square())
    position = (offset + size // 2) % (2 * size)
    position = torch.minimum(position, 2 * size - 1 - position)  # the edge is repeated
    kernel = torch.zeros(size, dtype=torch.float64).scatter_add_(0, position, weight)
    return kernel / weight.sum()


class InstanceBatchNorm(nn.Module):
    """BatchNorm for the first half of the channels, InstanceNorm without weights for the rest."""

    def __init__(self, channels: int):
        super().__init__()
        self.halves = (channels + 1) // 2, channels // 2
        self.batch_norm = nn.BatchNorm2d(self.halves[0])
        self.instance_norm = nn.InstanceNorm2d(self.halves[1])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        first, rest = full_precision(features).split(self.halves, dim=1)  # small maps need fp32
        return torch.cat([self.batch_norm(first), self.instance_norm(rest)], dim=1)


class FlawDetector(nn.Module):
    """Where is the softmax `prob` wrong? A regression: no activation at the end.

    (B, 3, H, W) normalized images and (B, C, H, W) -> (B, 1, H, W). `in_channels` counts image and
    classes, `width` the channels after the first convolution; each of the stages between that and
    the last one doubles them and has one of the `strides`.
    """

    def __init__(self, in_channels: int, width: int = 64, strides: tuple[int, ...] = (2, 2, 2)):
        super().__init__()
        convs = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1)]
        for stride in strides:
            convs.append(nn.Conv2d(width, 2 * width, 4, stride=stride, padding=1))
            width = 2 * width
            convs.append(nn.Conv2d(width, width, 4, padding=1))
        layers = []
        for layer in convs:
            layers += [layer, InstanceBatchNorm(layer.out_channels), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, stride=2, padding=1))

    def forward(self, image: torch.Tensor, prob: torch.Tensor) -> torch.Tensor:
        flaw_map = full_precision(self.layers(torch.cat([image, prob], dim=1)))
        return F.interpolate(flaw_map, image.shape[2:], mode="bilinear", align_corners=True)


def last_map(crop_size: int, strides: tuple[int, ...]) -> int:
    """Side of the flaw detector's map before it is enlarged to the crop."""
    size = crop_size // 2
    for stride in strides:
        size = (size // 2 if stride == 2 else size - 1) - 1
    return size // 2


# DIFFERS (gct.md 7): small crops get a shallower detector that halves its map less often.
def fitting_stages(crop_size: int) -> int:
    """The paper's 3, or fewer where they would leave less than 5 pixels a side."""
    return next((n for n in (3, 2) if last_map(crop_size, (2,) * n) >= 5), 1)


def fitting_strides(crop_size: int, stages: int) -> tuple[int, ...]:
    """2 while that leaves 9 pixels a side, which the paper's crops of 321 have, and then 1."""
    choices = [(2,) * n + (1,) * (stages - n) for n in range(stages, -1, -1)]
    return next((strides for strides in choices if last_map(crop_size, strides) >= 9), choices[-1])


def make_detector(args, num_classes: int) -> FlawDetector:
    """A flaw detector that starts from the seed, as deep as --detector-stages says."""
    torch.manual_seed(stream_seed(args.seed, "weights/detector"))
    strides = fitting_strides(args.crop_size, args.detector_stages)
    return FlawDetector(3 + num_classes, args.detector_width, strides)


@torch.no_grad()
def correlation(flaw_map: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of two (B, 1, H, W) maps over the pixels of each image, mean over images; 0 if constant."""
    a, b = (full_precision(each).flatten(1) for each in (flaw_map, target))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return ((a * b).mean(1) / (a.square().mean(1) * b.square().mean(1)).sqrt().add(1e-9)).mean()


def choice_accuracy(pseudo_label, target_label, label: torch.Tensor) -> torch.Tensor:
    """How often the right network teaches the other, where one alone is right and one teaches.

    pseudo_label, target_label: classes (B, H, W) of both networks and of their targets
    """
    one_is_right = (pseudo_label[0] == label) != (pseudo_label[1] == label)
    one_teaches = target_label[0] == target_label[1]  # otherwise each keeps its own
    return pixel_accuracy(target_label[0], label.where(one_is_right & one_teaches, IGNORE))


# === schedules (copied) ===
def ramp_up(step: int, ramp_up_steps: float) -> float:
    """exp(-5 (1 - t)^2) with t = step / ramp_up_steps; 1 from `ramp_up_steps` on."""
    if step >= ramp_up_steps:
        return 1.0
    return math.exp(-5 * (1 - step / ramp_up_steps) ** 2)


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
    labels = "known" if args.log_pseudo_accuracy else "none"
    batches_u = make_batches(args, data, split.unlabeled, "unlabeled", place, None, labels)
    networks = [make_network(args, len(data.classes), name) for name in ("1", "2")]
    detector = make_detector(args, len(data.classes))
    ddps = [prepare(module, args, world_size, device) for module in (*networks, detector)]
    *ddp_networks, ddp_detector = ddps
    optimizer = make_optimizer(networks, args, device)
    detector_optimizer = torch.optim.Adam(
        detector.parameters(), args.detector_lr, betas=(0.9, 0.99), fused=device.type != "mps"
    )
    saved = {"network_1": networks[0], "network_2": networks[1]}
    saved |= {"detector": detector, "detector_optimizer": detector_optimizer}
    # DIFFERS (gct.md 11): the release reports both networks, the CPS repository this one alone.
    evaluated = "network_1"

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
            n, image = len(image_l), torch.cat([image_l, image_u])
            # DIFFERS (gct.md 4): labeled and unlabeled images apart, for BatchNorm, and once each;
            # the release has them together (`joint_batch`), twice.
            parts = [image] if args.joint_batch else [image_l, image_u]
            with autocast:
                logits = [torch.cat([ddp(part) for part in parts]) for ddp in ddp_networks]
            probs = [full_precision(z).softmax(1) for z in logits]
            with autocast:  # one softmax at a time: the detector's BatchNorm never mixes them
                # The detector learns from constant softmaxes, ...
                flaw_maps = [ddp_detector(image, prob.detach()) for prob in probs]
                # ... the networks from a frozen detector, through the softmaxes that it is shown.
                detector.requires_grad_(False)
                frozen_maps = [detector(image, prob) for prob in probs]
                detector.requires_grad_(True)
            handled_maps = [handle_flaw_map(flaw_map, args.crop_size) for flaw_map in flaw_maps]
            *targets, both_flawed = dynamic_targets(*probs, *handled_maps, args.flaw_threshold)

            # DIFFERS (gct.md 2): mean over valid pixels, where the release counts ignored ones.
            loss_sup = sum(supervised_loss(z[:n], label_l, args.supervised_loss) for z in logits)
            # Labeled and unlabeled images, padding included; mean over all B C H W entries.
            loss_dc = F.mse_loss(probs[0], targets[0]) + F.mse_loss(probs[1], targets[1])
            # Flaw correction without dynamic consistency acts on all pixels, as released.
            corrected = both_flawed if args.lambda_dc > 0 else torch.ones_like(both_flawed)
            loss_fc = sum(flaw_correction_loss(each, corrected) for each in frozen_maps)
            # The detector's own loss: labeled images alone.
            true_maps = [
                flaw_target(prob[:n], label_l, args.crop_size, args.flaw_rounds) for prob in probs
            ]
            pairs = [(seen[:n], true) for seen, true in zip(flaw_maps, true_maps, strict=True)]
            loss_fd = sum(detector_loss(*pair, args.clamp_flaw_map) for pair in pairs) / 2
            weight_dc = args.lambda_dc * ramp_up(step, args.ramp_up * args.steps)
            # The factor 10 is the released one; the size of Adam's steps does not depend on it.
            # DIFFERS (gct.md 9): one backward pass for all three networks; the release takes turns.
            loss = loss_sup + weight_dc * loss_dc + args.lambda_fc * loss_fc + 10 * loss_fd

            pseudo_label = [prob.argmax(1) for prob in probs]
            taught = [(p != t).any(1).float() for p, t in zip(probs, targets, strict=True)]
            logs = {"loss/sup": loss_sup, "loss/dc": loss_dc, "loss/fc": loss_fc}
            logs |= {"loss/fd": loss_fd, "pseudo/both_flawed": both_flawed.float().mean()}
            logs["pseudo/agreement"] = (pseudo_label[0] == pseudo_label[1]).float().mean()
            logs |= {"pseudo/taught_1": taught[0].mean(), "pseudo/taught_2": taught[1].mean()}
            logs["pseudo/flaw"] = sum(each.mean() for each in handled_maps) / 2
            logs["pseudo/flaw_correlation"] = sum(correlation(*pair) for pair in pairs) / 2
            if args.log_pseudo_accuracy:
                taught_u = [target[n:].argmax(1) for target in targets]
                logs["pseudo/accuracy"] = pixel_accuracy(taught_u[0], label_u)
                own_u = [each[n:] for each in pseudo_label]
                logs["pseudo/choice"] = choice_accuracy(own_u, taught_u, label_u)
            shown = [each[n:, 0].clamp(0, 1) for each in handled_maps]
            maps = [pseudo_label[0][n:], shown[0], pseudo_label[1][n:], shown[1], targets[0][n:]]
            pictures = {
                "labeled": ([image_l], [label_l, logits[0][:n], true_maps[0][:, 0]]),
                "unlabeled": ([image_u], maps),
            }

            # === backward (copied) ===
            scaler.scale(loss / args.accumulate).backward()
            history.append({name: value.detach() for name, value in logs.items()})

        # === step ===
        for group in detector_optimizer.param_groups:
            group["lr"] = poly_lr(args.detector_lr, step, args.steps)
        scaler.step(optimizer)
        scaler.step(detector_optimizer)
        scaler.update()
        optimizer.zero_grad()
        detector_optimizer.zero_grad()

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
