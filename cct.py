"""Cross-Consistency Training (Ouali, Hudelot, Tami, CVPR 2020, 2003.09005).

    L = CE(f(z(x_l)), y_l)
        + lambda r(t) / K sum_k |softmax g_k(p_k(z(x_u))) - softmax f(z(x_u))|^2,
    z: the encoder's features, f: the main decoder, a constant in the second term,
    p_k: a perturbation of the features, g_k: an auxiliary decoder of its own; r: a ramp up to 1

    python cct.py --dataset shapes                               # no data, no GPU: minutes
    python cct.py --split 1/8                                    # one GPU, Pascal VOC
    torchrun --nproc_per_node=8 cct.py --split 1/8               # the same run on eight

The protocol is that of the CPS paper (2106.01226v3); docs/cct.md lists what differs.
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
from functools import partial
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
Wholes = Annotated[tuple[int, int, int, int, int, int, int], 0, math.inf]


@dataclass(frozen=True, kw_only=True)
class Args:
    """CCT. What is None takes its value from the data set's row of PAPER."""

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
    supervised_loss: Literal["ce", "ohem", "abce"] | None = None  # as above, or annealed (abce)
    abce_end: Share = 0.9  # abce: the paper's loss, of pixels below this true-class probability
    abce_anneal: Share = 0.4  # share of the steps over which that rises from 1 / classes
    decoders: Wholes = (2,) * 7  # of vat dropout cutout context object feature_drop feature_noise
    vat_xi: Amount = 1.0  # length of VAT's trial step; the released 1e-6 is lost in rounding
    vat_eps: Amount = 2.0  # length of VAT's perturbation of an image's features
    dropout: Annotated[float, 0, 0.999] = 0.5  # share of the channels that dropout zeroes
    cutout: Share = 0.4  # side of guided cutout's rectangle, share of the object's box
    feature_drop: Annotated[tuple[float, float], 0, 1] = (0.7, 0.9)  # threshold, share of the peak
    feature_noise: Amount = 0.3  # feature noise multiplies by 1 - this to 1 + this
    consistency: Literal["mse", "kl", "js"] = "mse"  # distance of the softmaxes
    lambda_u: Amount | None = None  # weight of the consistency loss
    ramp_up: Share | None = None  # share of the steps over which it rises from 0.7 % to all of it
    log_pseudo_accuracy: bool = False  # where unlabeled images have labels, for the log alone


# === paper ===
# Sources: CPS repository 5e0c29c, for the method CCT 65d4e5b; camvid and shapes are ours. An entry
# that depends on other flags is a function of them.
# DIFFERS (supervised.md 2): lr and weight decay are those that act on the true mean gradient.
# DIFFERS (cct.md 1): the supervised loss is that of the other scripts, not abce.
# DIFFERS (cct.md 4): two decoders of each kind (`Args.decoders`), not 2, 6, 6, 2, 2, 6, 6.
# DIFFERS (cct.md 8): camvid and shapes ramp the consistency in longer, since their networks start
# from scratch. They and folder have VOC's weight per pixel.
PAPER = {
    "voc": dict(
        split="1/8", backbone="resnet50", weights="imagenet", batch_size=8, crop_size=512,
        steps=lambda args: {"1/8": 39_338, "1/2": 39_660}.get(args.split.split(":")[-1], 39_680),
        optimizer="sgd", lr=0.0025, momentum=0.9, weight_decay=4e-4, supervised_loss="ce",
        lambda_u=30.0, ramp_up=0.1,
    ),
    "cityscapes": dict(
        split="1/8", backbone="resnet50", weights="imagenet", batch_size=8, crop_size=800,
        steps=lambda args: {"1/16": 44_544, "1/8": 44_525}.get(args.split.split(":")[-1], 44_640),
        optimizer="sgd", lr=0.0025, momentum=0.9, weight_decay=8e-4, supervised_loss="ohem",
        lambda_u=30.0, ramp_up=0.1,
    ),
    "camvid": dict(
        split="1/8", backbone="resnet14", weights="none", batch_size=8, crop_size=160, steps=1_000,
        optimizer="adamw", lr=1e-3, momentum=0.9, weight_decay=1e-4, supervised_loss="ce",
        lambda_u=15.7, ramp_up=0.4,
    ),
}  # fmt: skip
PAPER["shapes"] = PAPER["camvid"] | dict(split="20", batch_size=16, crop_size=48, lambda_u=11.4)
PAPER["folder"] = PAPER["voc"] | dict(
    split=lambda args: f"{args.data_root}/labeled.txt", steps=39_680,
    lambda_u=lambda args: 30 / 21 * len(open_dataset("folder", args.data_root).classes),
)  # fmt: skip


# === method ===
# The perturbations, in the order of `Args.decoders`: I-VAT, DropOut, G-Cutout, Con-Msk, Obj-Msk,
# F-Drop and F-Noise.
KINDS = ("vat", "dropout", "cutout", "context", "object", "feature_drop", "feature_noise")


def consistency_loss(
    logits: torch.Tensor, target_prob: torch.Tensor, kind: str = "mse"
) -> torch.Tensor:
    """Distance of softmax(logits) from `target_prob`, mean over all B C H W entries.

    The mean over classes makes a weight of 30 one of 30 / C on the sum over classes. No gradient
    reaches the target. "kl": KL(target || prob); "js", as released, with the mean m of both:
    (KL(m || prob) + KL(m || target)) / 2.
    """
    logits, target = full_precision(logits), full_precision(target_prob.detach())
    if kind == "mse":
        return F.mse_loss(logits.softmax(1), target)
    log_prob = logits.log_softmax(1)
    if kind == "kl":
        return F.kl_div(log_prob, target, reduction="none").mean()
    middle = ((log_prob.exp() + target) / 2).clamp(min=torch.finfo(target.dtype).tiny)
    log_target = (target + 1e-5).log()
    return (middle * (middle.log() - (log_prob + log_target) / 2)).mean()


def upsample(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """To full size, as `DeepLabV3Plus.forward` does with the classifier's logits."""
    return F.interpolate(full_precision(logits), size, mode="bilinear", align_corners=True)


class DecoderLosses(torch.autograd.Function):
    """Each decoder's consistency loss at full size, (K,), from logits (K, B, C, h, w).

    The gradient is taken in the forward pass, decoder by decoder, so that the memory at full size
    is that of one decoder whatever their number.
    """

    @staticmethod
    def forward(ctx, aux_logits, target_prob, kind):
        losses, gradients = aux_logits.new_empty(len(aux_logits)), torch.empty_like(aux_logits)
        for k, logits in enumerate(aux_logits):
            with torch.enable_grad():
                logits = logits.detach().requires_grad_()
                loss = consistency_loss(upsample(logits, target_prob.shape[2:]), target_prob, kind)
            losses[k] = loss.detach()
            (gradients[k],) = torch.autograd.grad(loss, logits)
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        (gradients,) = ctx.saved_tensors
        return gradients * grad_losses.view(-1, 1, 1, 1, 1), None, None


class AuxDecoders(nn.Module):
    """K auxiliary decoders, each a perturbation and a 1x1 convolution; the upsampling follows.

    All run together. Without its bias a 1x1 convolution commutes with a mask of positions, and a
    mask of channels is one of the weight's columns: only VAT and noise need features of their own.
    Where a mask is 0, such a decoder sends the encoder no gradient.
    """

    # DIFFERS (cct.md 3): what CPS's authors put on DeepLabV3+, not three pixel shuffles with ReLU.
    def __init__(self, in_channels: int, num_classes: int, args):
        super().__init__()
        self.args, self.num_classes = args, num_classes
        self.conv = nn.Conv2d(in_channels, sum(args.decoders) * num_classes, 1)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(
        self, features: torch.Tensor, logits: torch.Tensor, draws: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Logits (K, B, C, h, w) in the order of KINDS, and what to log about the perturbations.

        features: (B, D, h, w); logits: (B, C, H, W) of the main decoder; draws: uniform numbers
        """
        args, size = self.args, features.shape[2:]
        vat, dropout, cutout, context, objects, drop, noise = args.decoders
        foreground = foreground_mask(logits, logits.shape[2:])
        # Products of matrices in fp32: bf16, or a GPU's convolution (TF32), would round the small
        # step of VAT away.
        with torch.autocast(features.device.type, enabled=False):
            features = full_precision(features)
            weight = self.conv.weight.view(-1, self.num_classes, features.shape[1])  # (K, C, D)
            bias = self.conv.bias.view(-1, self.num_classes)  # (K, C)
            masked = cutout + context + objects + drop
            w_vat, w_dropout, w_masked, w_noise = weight.split([vat, dropout, masked, noise])

            r = torch.empty_like(draws["vat"])  # (k, B, D, h, w), k: decoders of this kind
            for k, draw in enumerate(draws["vat"]):
                decoder = partial(decode, weight=w_vat[k], bias=bias[k])
                r[k] = vat_perturbation(features, decoder, args.vat_xi, args.vat_eps, draw)

            keep = (draws["dropout"] >= args.dropout) / (1 - args.dropout)  # (k, B, D)
            w_dropout = w_dropout[:, None] * keep[:, :, None]  # (k, B, C, D)

            erasing = guided_cutout(foreground[:, 0] > 0, size, draws["cutout"], args.cutout)
            is_object = F.interpolate(foreground, size, mode="nearest")  # (B, 1, h, w)
            least, greatest = args.feature_drop
            gamma = least + (greatest - least) * draws["feature_drop"]
            masks = torch.cat([  # (k, B, 1, h, w)
                erasing,
                is_object.expand(context, *is_object.shape),
                (1 - is_object).expand(objects, *is_object.shape),
                feature_drop_mask(features, gamma),
            ])  # fmt: skip

            factor = 1 + args.feature_noise * (2 * draws["feature_noise"] - 1)  # (k, 1, D, h, w)

            aux_logits = torch.cat([
                torch.einsum("kcd,kbdhw->kbchw", w_vat, features + r),
                torch.einsum("kbcd,bdhw->kbchw", w_dropout, features),
                torch.einsum("kcd,bdhw->kbchw", w_masked, features) * masks,
                torch.einsum("kcd,kbdhw->kbchw", w_noise, features * factor),
            ])  # fmt: skip
        logs = {"pseudo/foreground": foreground.mean()}
        if vat:
            logs["pseudo/vat_norm"] = r.flatten(2).norm(dim=2).mean()
        if cutout:
            logs["pseudo/erased"] = 1 - erasing.mean()
        return aux_logits + bias[:, None, :, None, None], logs


def decode(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A 1x1 convolution: (B, D, h, w) features, (C, D) weight, (C,) bias -> (B, C, h, w)."""
    return torch.einsum("cd,bdhw->bchw", weight, features) + bias[:, None, None]


def unit(direction: torch.Tensor) -> torch.Tensor:
    """Each image's (B, D, h, w) direction at length 1; 0 stays 0."""
    return direction / (direction.flatten(1).norm(dim=1)[:, None, None, None] + 1e-8)


def vat_perturbation(
    features: torch.Tensor, decoder, xi: float, eps: float, draw: torch.Tensor
) -> torch.Tensor:
    """The direction of length `eps` that changes the decoder's output most (Miyato, 1704.03976).

    One power iteration from `draw` (B, D, h, w), uniform in [0, 1), with a step of length `xi`; in
    full precision also under autocast. Neither features nor weights of the decoder get a gradient.
    """
    features = full_precision(features.detach())
    with torch.autocast(features.device.type, enabled=False), torch.enable_grad():
        with torch.no_grad():
            prob = decoder(features).softmax(1)
        start = unit(draw.to(features.dtype) - 0.5).requires_grad_()
        # DIFFERS (cct.md 2): a step of 1e-6, as released, is below the features' rounding.
        log_prob = decoder(features + xi * start).log_softmax(1)
        divergence = F.kl_div(log_prob, prob, reduction="batchmean")
        (direction,) = torch.autograd.grad(divergence, start)
    return eps * unit(direction)


def foreground_mask(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """1 where the class is not 0, the background: (B, C, H, W) logits -> (B, 1, h, w), nearest."""
    # DIFFERS (cct.md 9): on data sets without a background, 1 is "everything but class 0".
    foreground = (logits.detach().argmax(1, keepdim=True) != 0).to(logits.dtype)
    return F.interpolate(foreground, size, mode="nearest")


def feature_drop_mask(features: torch.Tensor, gamma: torch.Tensor | float) -> torch.Tensor:
    """0 where the mean activation is at least gamma of the image's greatest: (B, 1, h, w)."""
    activation = features.detach().mean(1, keepdim=True)
    return (activation < gamma * activation.amax((2, 3), keepdim=True)).to(features.dtype)


def feature_drop(features: torch.Tensor, gamma: torch.Tensor | float) -> torch.Tensor:
    """Features (B, D, h, w) without the most active positions; `AuxDecoders` masks their logits."""
    return features * feature_drop_mask(features, gamma)


# === schedules (copied) ===
def ramp_up(step: int, ramp_up_steps: float) -> float:
    """exp(-5 (1 - t)^2) with t = step / ramp_up_steps; 1 from `ramp_up_steps` on."""
    if step >= ramp_up_steps:
        return 1.0
    return math.exp(-5 * (1 - step / ramp_up_steps) ** 2)


# === bootstrapped cross-entropy ===
def bootstrap_threshold(
    step: int, annealing_steps: float, num_classes: int, end: float = 0.9
) -> float:
    """1/C + (end - 1/C) (1 - exp(-5 t)), t = step / annealing_steps up to 1: just below `end`."""
    t = min(step / annealing_steps, 1.0) if annealing_steps > 0 else 1.0
    return 1 / num_classes + (end - 1 / num_classes) * (1 - math.exp(-5 * t))


def bootstrapped_cross_entropy(
    logits: torch.Tensor, label: torch.Tensor, threshold: float, min_kept: int = 1
) -> torch.Tensor:
    """Mean cross-entropy over the valid pixels that are not learned yet; 0 if there are none.

    Not learned: the true class has less probability than `threshold`, or less than the
    (min_kept B + 1)-th lowest of the local batch has.
    """
    loss = F.cross_entropy(full_precision(logits), label, ignore_index=IGNORE, reduction="none")
    valid = label != IGNORE  # (B, H, W), as the loss
    with torch.no_grad():  # neither the threshold nor the choice carries gradient
        prob = torch.where(valid, (-loss).exp(), 2.0)  # ignored pixels rank last
        kept = min(min_kept * len(label), label.numel() - 1)
        lowest = prob.flatten().topk(kept + 1, largest=False).values
        last = (valid.sum() - 1).clamp(0, kept)
        chosen = valid & (prob < lowest.gather(0, last[None]).clamp(min=threshold))
    return (loss * chosen).sum() / chosen.sum().clamp(min=1)


# === random numbers ===
def uniform(seed: int, first: int, count: int, shape: tuple, device) -> torch.Tensor:
    """Rows `first` to `first + count` of a table of uniform numbers in [0, 1), each of `shape`.

    Features are too many to draw them for a global batch on the CPU. So a number is a hash of its
    place in the table (lowbias32, in 32-bit integers that wrap around), made where it is needed:
    every device and any number of processes see the same.
    """
    size, odd = math.prod(shape), 0x9E3779B1
    begin = (first * size * odd + seed) % 2**32
    x = torch.arange(count * size, dtype=torch.int32, device=device)
    x = x * (odd - 2**32) + (begin - 2**32 if begin >= 2**31 else begin)
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    x = x ^ (x >> 16 & 0xFFFF)
    return (x >> 8 & 0xFFFFFF).float().div_(2**24).view(count, *shape)


def draw_perturbations(args, step: int, first: int, features: torch.Tensor) -> dict:
    """Uniform numbers for each kind of decoder, the images from `first` on of the global batch."""
    vat, dropout, cutout, _, _, drop, noise = args.decoders
    batch, channels, height, width = features.shape

    def draw(kind: str, first: int, count: int, *shape: int) -> torch.Tensor:
        seed = stream_seed(args.seed, kind, step)
        return uniform(seed, first, count, shape, features.device).transpose(0, 1)

    return {
        # In the memory order of the features, which is channels last.
        "vat": draw("vat", first, batch, vat, height, width, channels).movedim(4, 2),
        "dropout": draw("dropout", first, batch, dropout, channels),
        "cutout": draw("cutout", first, batch, cutout, MAX_CONTOURS, 2),
        # One draw for the global batch.
        "feature_drop": draw("feature_drop", 0, 1, drop, 1, 1, 1),
        "feature_noise": draw("feature_noise", 0, 1, noise, height, width, channels).movedim(4, 2),
    }


# === guided cutout ===
MAX_CONTOURS = 64  # that it cuts in one image
# The eight neighbors (dy, dx) of a pixel in a circle; every other one, from the first, shares a
# side with it.
RING = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


def guided_cutout(
    foreground: torch.Tensor, size: tuple[int, int], draw: torch.Tensor, share: float = 0.4
) -> torch.Tensor:
    """Masks that erase a part of every object: k of them, (k, B, 1, h, w) float, 0 where erased.

    Objects are the outermost regions whose contour has more than 50 points, so that simple shapes
    are left alone. The erased rectangle has `share` of both sides of the object's box.

    foreground: bool (B, H, W); draw: (k, B, M, 2) uniform in [0, 1), horizontal and vertical place
    of the M rectangles
    """
    boxes, points = contour_boxes(foreground)
    (height, width), (h, w) = foreground.shape[1:], size

    def covered(first, last, place, pixels: int, cells: int) -> torch.Tensor:
        """Which of the cells along one side a rectangle covers: (k, B, M, cells) bool."""
        extent, rounding = (last - first).float(), 1e-3  # fp32 may fall below a whole product
        begin = first + (place * ((1 - share) * extent + rounding).floor().add(1)).floor()
        end = begin + (share * extent + rounding).floor()
        cell = torch.arange(cells, device=draw.device) * pixels // cells  # nearest: its top left
        return (cell >= begin[..., None]) & (cell < end[..., None])

    top, bottom, left, right = boxes.unbind(2)
    rows = covered(top, bottom, draw[..., 1], height, h) & (points > 50)[..., None]
    columns = covered(left, right, draw[..., 0], width, w)
    erased = torch.einsum("kbmh,kbmw->kbhw", rows.float(), columns.float()) > 0
    return 1 - erased[:, :, None].float()


def contour_boxes(foreground: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes around the outermost regions of a bool (B, H, W) mask, and their contours' points.

    The points are the corners of the border's chain of pixels: straight runs in any of the eight
    directions count once. Regions inside the holes of others are not found.

    Returns (B, M, 4) int64, first and last row, first and last column, and (B, M) points, 0 where
    there are fewer than M = MAX_CONTOURS regions.
    """
    mask = F.pad(foreground, (1, 1, 1, 1))
    label = regions(mask)
    filled = mask | (label != 0)  # region 0 is the background that touches the frame
    code = sum(filled.roll((-dy, -dx), (1, 2)).long() << bit for bit, (dy, dx) in enumerate(RING))
    table = torch.tensor(POINTS).to(mask.device, non_blocking=True)
    label, points = label.flatten(1), torch.where(filled, table[code], 0).flatten(1)
    width = mask.shape[2]
    index = torch.arange(label.shape[1], device=mask.device).expand_as(label)
    zeros = torch.zeros_like(label)
    points = zeros.scatter_add(1, label, points)
    bottom = zeros.scatter_reduce(1, label, index // width, "amax")
    right = zeros.scatter_reduce(1, label, index % width, "amax")
    left = (zeros + width).scatter_reduce(1, label, index % width, "amin")
    # DIFFERS (cct.md 6): the longest contours of an image, where there are very many.
    points, first = points.topk(min(MAX_CONTOURS, label.shape[1]), dim=1)
    box = [first // width, bottom.gather(1, first), left.gather(1, first), right.gather(1, first)]
    return torch.stack(box, dim=2) - 1, points  # without the frame


def contour_points(neighbors: int) -> int:
    """Corners that a border has at a pixel; bit i of `neighbors`: RING[i] is in the region, too.

    A border passes a pixel once for every gap between neighbors that contains a side. It goes on
    straight, without a corner, if the gap's ends are opposite to each other.
    """
    inside = [i for i in range(8) if neighbors >> i & 1]
    if not inside:
        return 1
    gaps = zip(inside, [*inside[1:], inside[0] + 8], strict=True)
    return sum(any(i % 2 == 0 for i in range(a + 1, b)) and b - a != 4 for a, b in gaps)


POINTS = [contour_points(neighbors) for neighbors in range(256)]


def regions(mask: torch.Tensor) -> torch.Tensor:
    """Connected regions of a bool (B, H, W) mask: each pixel's is the index of its first pixel.

    Regions of 1 hold together over sides and corners, those of 0 over sides only. The outermost
    rows and columns must be 0. Labels sink to the lowest of their neighbors, and take along the
    pixel that they stand for (union-find on all pixels at once): the number of rounds grows as the
    logarithm of the side.
    """
    batch, height, width = mask.shape
    last = height * width

    def lowest_along(label: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.minimum(label, torch.minimum(label.roll(1, dim), label.roll(-1, dim)))

    label = torch.arange(last, device=mask.device).repeat(batch, 1)  # (B, H W)
    for _ in range(max(height, width).bit_length()):
        ones, zeros = (label.view_as(mask).where(part, last) for part in (mask, ~mask))
        ones = lowest_along(lowest_along(ones, 1), 2)
        zeros = torch.minimum(lowest_along(zeros, 1), lowest_along(zeros, 2))
        lowest = torch.where(mask, ones, zeros).flatten(1)
        label = label.scatter_reduce(1, label, lowest, "amin")
        label = label.gather(1, label)
        label = label.gather(1, label)
    return label.view_as(mask)


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
    network = make_network(args, len(data.classes), "1")
    ddp = prepare(network, args, world_size, device)
    torch.manual_seed(stream_seed(args.seed, "weights/auxiliary"))
    aux_decoders = AuxDecoders(network.classifier.in_channels, len(data.classes), args)
    ddp_aux = prepare(aux_decoders, args, world_size, device)
    ddps = [ddp, ddp_aux]
    if args.compile:  # unlabeled images pass these two, not the network's own call
        network.encode = torch.compile(network.encode)
        network.head.compile()
    optimizer = make_optimizer([network, aux_decoders], args, device)
    saved = {"network": network, "aux_decoders": aux_decoders}
    evaluated = "network"

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
            with autocast:  # labeled and unlabeled images apart, for BatchNorm
                logits_l = ddp(image_l)
                # Not through `ddp`: its call above lets it average the gradients of both passes.
                features = network.head(*network.encode(image_u))  # z
                # A constant: the main decoder learns from labeled images alone.
                logits_u = upsample(network.classifier(features), image_u.shape[2:]).detach()
                first = (rank * args.accumulate + micro) * len(image_u)  # in the global batch
                draws = draw_perturbations(args, step, first, features)
                aux_logits, aux_logs = ddp_aux(features, logits_u, draws)
            if args.supervised_loss == "abce":
                annealing_steps, classes = args.abce_anneal * args.steps, len(data.classes)
                threshold = bootstrap_threshold(step, annealing_steps, classes, args.abce_end)
                loss_sup = bootstrapped_cross_entropy(logits_l, label_l, threshold)
            else:
                loss_sup = supervised_loss(logits_l, label_l, args.supervised_loss)
            prob = logits_u.softmax(1)
            aux_losses = DecoderLosses.apply(aux_logits, prob, args.consistency)  # (K,)
            loss_cons = aux_losses.mean()  # padding counts, as released
            weight = args.lambda_u * ramp_up(step, args.ramp_up * args.steps)
            loss = loss_sup + weight * loss_cons

            confidence, pseudo_label = prob.max(1)
            logs = {"loss/sup": loss_sup, "loss/cons": loss_cons}
            for kind, losses in zip(KINDS, aux_losses.split(args.decoders), strict=True):
                if len(losses):
                    logs[f"loss/cons_{kind}"] = losses.mean()
            logs |= {"pseudo/confidence": confidence.mean()} | aux_logs
            if args.log_pseudo_accuracy:
                logs["pseudo/accuracy"] = pixel_accuracy(pseudo_label, label_u)
            pictures = {
                "labeled": ([image_l], [label_l, logits_l]),
                "unlabeled": ([image_u], [pseudo_label, confidence]),
            }

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
