"""CutMix and CutOut with a mean teacher (French, Laine, Aila, Mackiewicz, Finlayson, BMVC 2020,
1906.01916v4).

    L = CE(f(x_l), y_l) + w r |softmax f(mix(x_0, x_1)) - mix(softmax g(x_0), softmax g(x_1))|^2,
    r: share of the pixels on which the teacher g is confident, mix: a rectangle of the other image

    python cutmix_mt.py --dataset shapes                         # no data, no GPU: minutes
    python cutmix_mt.py --split 1/8                              # one GPU, Pascal VOC
    torchrun --nproc_per_node=8 cutmix_mt.py --split 1/8         # the same run on eight

The protocol is that of the CPS paper (2106.01226v3); docs/cutmix_mt.md lists what differs.
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
from common.transforms import MEAN, STD, WeakView, normalize


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
    """CutMix mean teacher. What is None takes its value from the data set's row of PAPER."""

    mask_mode: Literal["cutmix", "cutout"] = "cutmix"
    """paste boxes of a second image, or show the boxes alone, on the mean color"""
    n_boxes: int = 1
    """boxes per mask; where an even number overlap, the mask is 0 again"""
    box_area: tuple[float, float] | None = None
    """least and greatest area of a mask's boxes together; None: 0.5 0.5 (cutout: 0 1)"""
    consistency: Literal["var", "bce", "kld"] = "var"
    """squared difference, binary cross-entropy per class, or Kullback-Leibler divergence"""
    confidence_threshold: float = 0.97
    """probability from which the teacher is confident; 0: always"""
    confidence_per_pixel: bool = False
    """leave out each unsure pixel, instead of weighting all by the share of the confident ones"""
    ema_decay: float | None = None
    """share of itself that the teacher keeps at every step"""
    ema_warmup: bool = False
    """a shorter memory at first: a decay of 1 - 1/(step + 1) until that exceeds --ema-decay"""
    lambda_u: float | None = None
    """weight of the consistency loss"""
    ramp_up: float | None = None
    """share of the steps over which that weight rises from 0.7 % to all of it; 0: at once"""
    evaluate: Literal["student", "teacher"] = "teacher"
    """network to evaluate"""
    log_pseudo_accuracy: bool = False
    """log pseudo/accuracy, where unlabeled images have labels: a diagnostic, never trained on"""

    def __post_init__(self):
        if self.box_area and not 0 <= self.box_area[0] <= self.box_area[1] <= 1:
            raise UserError(f"--box-area {self.box_area}: needs 0 <= least <= greatest <= 1")
        if not 0 <= self.confidence_threshold <= 1:
            raise UserError(f"--confidence-threshold {self.confidence_threshold}: is from 0 to 1")
        if self.ema_decay is not None and not 0 <= self.ema_decay <= 1:
            raise UserError(f"--ema-decay {self.ema_decay}: must be from 0 to 1")
        if self.ramp_up is not None and not 0 <= self.ramp_up <= 1:
            raise UserError(f"--ramp-up {self.ramp_up}: is a share of the steps, from 0 to 1")


# Sources: CPS repository 5e0c29c, for the method cutmix-semisup-seg af6183a; camvid and shapes are
# ours. An entry that depends on other flags is a function of them.
# DIFFERS (supervised.md 2): lr and weight decay are those that act on the true mean gradient.
# DIFFERS (cutmix_mt.md 5): camvid and shapes ramp the consistency in, since their networks start
# from scratch, and their teachers remember 10 steps.
BOX_AREA = {"cutmix": (0.5, 0.5), "cutout": (0.0, 1.0)}
PAPER = {
    "voc": dict(
        split="1/8", backbone="resnet50", weights="imagenet", batch_size=8, crop_size=512,
        steps=lambda args: {"1/8": 39_338, "1/2": 39_660}.get(args.split.split(":")[-1], 39_680),
        optimizer="sgd", lr=0.0025, momentum=0.9, weight_decay=4e-4, supervised_loss="ce",
        lambda_u=1.0, ramp_up=0.0, ema_decay=0.99, box_area=lambda args: BOX_AREA[args.mask_mode],
    ),
    "cityscapes": dict(
        split="1/8", backbone="resnet50", weights="imagenet", batch_size=8, crop_size=800,
        steps=lambda args: {"1/16": 44_544, "1/8": 44_525}.get(args.split.split(":")[-1], 44_640),
        optimizer="sgd", lr=0.0025, momentum=0.9, weight_decay=8e-4, supervised_loss="ohem",
        lambda_u=1.0, ramp_up=0.0, ema_decay=0.99, box_area=lambda args: BOX_AREA[args.mask_mode],
    ),
    "camvid": dict(
        split="1/8", backbone="resnet14", weights="none", batch_size=8, crop_size=160,
        steps=1_000,
        optimizer="adamw", lr=1e-3, momentum=0.9, weight_decay=1e-4, supervised_loss="ce",
        lambda_u=1.0, ramp_up=0.4, ema_decay=0.9, box_area=lambda args: BOX_AREA[args.mask_mode],
    ),
    "shapes": dict(
        split="20", backbone="resnet14", weights="none", batch_size=16, crop_size=48,
        steps=1_000,
        optimizer="adamw", lr=1e-3, momentum=0.9, weight_decay=1e-4, supervised_loss="ce",
        lambda_u=1.0, ramp_up=0.4, ema_decay=0.9, box_area=lambda args: BOX_AREA[args.mask_mode],
    ),
}  # fmt: skip
PAPER["folder"] = PAPER["voc"] | {"split": "labeled.txt", "steps": 39_680}


# === method ===
def consistency_loss(
    student_logits: torch.Tensor,
    teacher_prob: torch.Tensor,
    kind: str = "var",
    weight: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Difference of student and teacher, summed over classes, mean over all B H W pixels.

    Args:
        student_logits: (B, C, H, W)
        teacher_prob: (B, C, H, W), sums to 1 over classes; no gradient
        kind: "var" |s - t|^2; "kld" KL(t || s); "bce" binary cross-entropies of each class
        weight: factor of each pixel, a number or (B, 1, H, W); the mean is over all pixels anyway
    """
    logits, target = full_precision(student_logits), full_precision(teacher_prob.detach())
    if kind == "var":
        difference = (logits.softmax(1) - target).square()
    elif kind == "kld":
        difference = torch.xlogy(target, target) - target * logits.log_softmax(1)
    elif kind == "bce":
        prob = logits.softmax(1)
        difference = -target * (prob + 1e-6).log() - (1 - target) * (1 - prob + 1e-6).log()
    else:
        raise ValueError(f"kind {kind!r}: use var, kld or bce")
    per_pixel = difference.sum(1, keepdim=True)
    return (per_pixel if weight is None else per_pixel * weight).mean()


def confidence_weight(
    teacher_prob: torch.Tensor, threshold: float, per_pixel: bool = False
) -> torch.Tensor:
    """Share of the batch's pixels whose greatest probability is at least `threshold`.

    With `per_pixel` 0 or 1 for each, (B, 1, H, W). Only the greatest of `teacher_prob`
    (B, C, H, W) matters, so that (B, 1, H, W) confidences do as well.
    """
    confident = (teacher_prob.detach().amax(1, keepdim=True) >= threshold).to(teacher_prob.dtype)
    return confident if per_pixel else confident.mean()


def update_buffers(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """g <- decay g + (1 - decay) f for BatchNorm's statistics, as `update_teacher`."""
    pairs = zip(teacher.buffers(), student.buffers(), strict=True)
    pairs = [(ours, theirs) for ours, theirs in pairs if ours.is_floating_point()]
    get_ema_multi_avg_fn(decay)(*(list(buffers) for buffers in zip(*pairs, strict=True)), None)


def over_processes(value: torch.Tensor, world_size: int) -> torch.Tensor:
    """Mean of a tensor over the processes."""
    if world_size > 1:
        dist.all_reduce(value)
        value = value / world_size
    return value


def box_masks(
    batch_size: int,
    height: int,
    width: int,
    generator: torch.Generator,
    n_boxes: int = 1,
    area: tuple[float, float] = (0.5, 0.5),
) -> torch.Tensor:
    """Masks (B, 1, H, W), float 0/1, 1 in the boxes: for CutMix one box of half the image.

    The boxes of one mask share `area` (drawn from this range, as a share of the image), have random
    proportions and lie inside; each flips what it covers: where two overlap the mask is 0 again.
    Training draws for the global batch and fills for its share.
    """
    boxes = draw_boxes(batch_size, height, width, generator, n_boxes, area)
    return fill_boxes(boxes, height, width)


# === mixing (copied) ===
def draw_boxes(
    batch_size: int,
    height: int,
    width: int,
    generator: torch.Generator,
    n_boxes: int,
    area: tuple[float, float],
) -> torch.Tensor:
    """The boxes of `box_masks`, (B, n, 4) int64: (top, left, bottom, right), ends excluded."""
    draw = {"generator": generator, "dtype": torch.float64}
    share = area[0] + (area[1] - area[0]) * torch.rand(batch_size, n_boxes, **draw)
    tallness = torch.rand(batch_size, n_boxes, **draw)
    position = torch.rand(batch_size, n_boxes, 2, **draw)  # (y, x)
    side = torch.stack([share**tallness, share / share**tallness], dim=2) / n_boxes**0.5
    image = torch.tensor([height, width], dtype=torch.float64)
    size = (side * image).round()
    corner = ((image - size) * position).round()
    return torch.cat([corner, corner + size], dim=2).long()


def fill_boxes(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, n, 4) boxes -> (B, 1, H, W) float 0/1 on their device."""
    top, left, bottom, right = boxes[..., None].unbind(2)  # (B, n, 1) each
    y, x = (torch.arange(length, device=boxes.device) for length in (height, width))
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)  # (B, n, H), (B, n, W)
    covered = (rows[..., :, None] & columns[..., None, :]).sum(1, keepdim=True)
    return (covered % 2).float()


def paste(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`a` where the mask (B, 1, H, W) is 0, `b` where it is 1; maps (B, H, W) mix likewise."""
    return torch.where((mask if a.ndim == 4 else mask[:, 0]) > 0.5, b, a)


# === schedules (copied) ===
def ramp_up(step: int, ramp_up_steps: float) -> float:
    """exp(-5 (1 - t)^2) with t = step / ramp_up_steps; 1 from `ramp_up_steps` on."""
    if step >= ramp_up_steps:
        return 1.0
    return math.exp(-5 * (1 - step / ramp_up_steps) ** 2)


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
    batches_u = make_batches(args, data, split.unlabeled, "unlabeled", *place, None, labels)
    if args.mask_mode == "cutmix":  # the images that are pasted: a second order of the same pool
        batches_v = make_batches(args, data, split.unlabeled, "pasted", *place, None, labels)
    images_per_step = 2 * args.batch_size
    student, ddp = make_network(args, len(data.classes), "1", rank, world_size, device)
    teacher = make_teacher(student, args)
    ddps = [ddp]
    optimizer = make_optimizer([student], args, device)
    saved = {"student": student, "teacher": teacher}
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
            n, size = len(image_l), args.crop_size
            generator = step_generator(args.seed, "boxes", step)
            boxes = draw_boxes(args.batch_size, size, size, generator, args.n_boxes, args.box_area)
            first = (rank * args.accumulate + micro) * n  # this micro-batch in the global one
            boxes = boxes[first : first + n].to(device, non_blocking=True)
            mix_mask = fill_boxes(boxes, size, size)
            with torch.no_grad(), autocast:  # two forwards: BatchNorm sees one stream at a time
                teacher_u = teacher(image_u)
                if args.mask_mode == "cutmix":
                    image_v, label_v = next(batches_v)
                    teacher_u = paste(teacher_u, teacher(image_v), mix_mask)
                    image_u = paste(image_u, image_v, mix_mask)
                    label_u = paste(label_u, label_v, mix_mask)
                else:  # the teacher sees all of the image, the student the boxes alone
                    image_u = image_u * mix_mask
                    label_u = label_u.where(mix_mask[:, 0] > 0.5, IGNORE)
                prob = full_precision(teacher_u).softmax(1)
            with autocast:
                logits_l, logits_u = ddp(image_l), ddp(image_u)
            loss_sup = supervised_loss(logits_l, label_l, args.supervised_loss)
            per_pixel = args.confidence_per_pixel
            confident = confidence_weight(prob, args.confidence_threshold, per_pixel)
            if not per_pixel:
                # DIFFERS (cutmix_mt.md 4): the share over all processes.
                confident = over_processes(confident, world_size)
            # DIFFERS (cutmix_mt.md 3): 0 in the padding and where cut out, else 1.
            inside = (label_u != IGNORE)[:, None]
            loss_cons = consistency_loss(logits_u, prob, args.consistency, confident * inside)
            weight = args.lambda_u * ramp_up(step, args.ramp_up * args.steps)
            loss = loss_sup + weight * loss_cons

            confidence, pseudo_label = prob.max(1)
            logs = {"loss/sup": loss_sup, "loss/cons": loss_cons}
            logs |= {"pseudo/confidence": confidence.mean(), "pseudo/confident": confident.mean()}
            if args.log_pseudo_accuracy:
                known = label_u < UNKNOWN
                right = (pseudo_label == label_u) & known
                logs["pseudo/accuracy"] = right.sum() / known.sum().clamp(min=1)
            pictures = {
                "labeled": ([image_l], [label_l, logits_l]),
                "unlabeled": ([image_u], [pseudo_label, confidence, logits_u]),
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
        decay = ema_decay(step, args.ema_decay) if args.ema_warmup else args.ema_decay
        update_teacher(teacher, student, decay)
        update_buffers(teacher, student, decay)

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
