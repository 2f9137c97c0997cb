"""UniMatch V2 (Yang, Zhao, Zhao, 2024, 2410.10777) on DINOv2; FixMatch is its ablation.

    L = (CE(f(x_l), y_l) + (L_1 + L_2) / 2) / 2,
    L_k = sum [c >= 0.95] CE(f(x_k; m_k), argmax g(x_w)) / number of valid pixels,
    x_1, x_2: strong views of the crop x_w, each mixed with another image by a box of its own;
    m_1 + m_2 = 2: every channel of the encoder is alive in one of them; c: max softmax g(x_w);
    g: an exponential moving average of the student f. FixMatch: --views 1 --feature-dropout none

    python unimatch_v2.py --dataset shapes                       # no data, no GPU: minutes
    python unimatch_v2.py --split classic:183                    # one GPU, Pascal VOC
    torchrun --nproc_per_node=8 unimatch_v2.py --split classic:183     # the same run on eight

Released code: UniMatch-V2 f6afb4d; docs/unimatch_v2.md lists what differs.
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
import tyro
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2
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
from common.files import read_weights
from common.splits import fetch
from common.transforms import MEAN, STD, WeakView, normalize, statistics

# Kinds of numbers, with their least and greatest value.
Whole, Count = Annotated[int, 0, math.inf], Annotated[int, 1, math.inf]
Amount, Share = Annotated[float, 0, math.inf], Annotated[float, 0, 1]


@dataclass(frozen=True, kw_only=True)
class Args:
    """UniMatch V2. What is None takes its value from the data set's row of PAPER."""

    # === common flags ===
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

    backbone: Literal["dinov2_small", "dinov2_base", "vit_tiny"] | None = None  # tiny: for CPUs
    weights: str | None = None  # the encoder's start: dinov2, none, or a state dict like DINOv2's
    batch_size: Count | None = None  # labeled images per step, all processes (as many unlabeled)
    accumulate: Count = 1  # micro-batches per step, for small cards
    crop_size: Annotated[int, 32, math.inf] | None = None  # side of the training crops, pixels
    steps: Count | None = None  # optimizer steps; ramps and warm-ups are fractions of it
    optimizer: Literal["sgd", "adamw"] | None = None  # poly schedule, power 0.9
    lr: Amount | None = None  # learning rate at step 0, for any number of processes
    head_lr_mult: Amount | None = None  # of all but the encoder, as a multiple of the encoder's
    momentum: Annotated[float, 0, 0.999] | None = None  # SGD's momentum, AdamW's beta_1
    weight_decay: Amount | None = None  # of weights; LayerNorm and biases have none
    supervised_loss: Literal["ce", "ohem"] | None = None  # ohem: hard ones (0.7, 100,000 an image)

    log_every: Count = 50  # steps between rows of the log
    eval_every: Count | None = None  # steps between evaluations; None: a tenth of the run
    save_every: Count = 500  # steps between checkpoints

    # === flags of the method ===
    views: Literal[1, 2] = 2  # strong views of an unlabeled image; 1: FixMatch's
    # which channels a strong view loses: those that the other keeps, others of its own, or none
    feature_dropout: Literal["complementary", "independent", "none"] = "complementary"
    threshold: Share = 0.95  # confidence from which on a pseudo-label counts
    view_strength: Share | None = None  # of jitter, grayscale and blur; 0: CutMix alone
    lambda_u: Amount = 1.0  # weight of the unlabeled loss
    ramp_up: Share | None = None  # share of the steps over which it rises from 0.7 % to all of it
    teacher: Literal["ema", "student"] = "ema"  # who gives the pseudo-labels
    ema_decay: Share | None = None  # share of itself that the teacher keeps, after a warm-up
    freeze_backbone: bool = False  # train the head alone
    evaluate: Literal["student", "teacher"] = "teacher"  # network to evaluate
    log_pseudo_accuracy: bool = False  # where unlabeled images have labels, for the log alone


# === paper ===
# Sources: UniMatch-V2 f6afb4d and its logs; camvid and shapes are ours. An entry that depends on
# other flags is a function of them.
# DIFFERS (unimatch_v2.md 8): camvid and shapes start from random weights.
PAPER = {
    "voc": dict(
        split="classic:183", backbone="dinov2_small", weights="dinov2", batch_size=16,
        crop_size=518,
        steps=lambda args: {  # 60 passes over the unlabeled images
            "92": 39_300, "183": 39_000, "366": 38_280, "732": 36_900, "1464": 34_200,
        }.get(args.split.split(":")[-1], 39_000),
        optimizer="adamw", lr=5e-6, head_lr_mult=40.0, momentum=0.9, weight_decay=0.01,
        supervised_loss="ce", view_strength=1.0, ramp_up=0.0, ema_decay=0.996,
    ),
    "cityscapes": dict(
        split="1/8", backbone="dinov2_small", weights="dinov2", batch_size=8, crop_size=798,
        steps=lambda args: {  # 180 passes
            "1/16": 62_820, "1/8": 58_500, "1/4": 50_220, "1/2": 33_480,
        }.get(args.split.split(":")[-1], 58_500),
        optimizer="adamw", lr=5e-6, head_lr_mult=40.0, momentum=0.9, weight_decay=0.01,
        supervised_loss="ohem", view_strength=1.0, ramp_up=0.0, ema_decay=0.996,
    ),
    "camvid": dict(
        split="1/8", backbone="vit_tiny", weights="none", batch_size=8, crop_size=160, steps=1_000,
        optimizer="adamw", lr=1e-3, head_lr_mult=1.0, momentum=0.9, weight_decay=1e-4,
        supervised_loss="ce", view_strength=0.0, ramp_up=0.4, ema_decay=0.99,
    ),
}  # fmt: skip
PAPER["shapes"] = PAPER["camvid"] | dict(split="20", batch_size=16, crop_size=48)
PAPER["folder"] = PAPER["voc"] | dict(split=lambda args: f"{args.data_root}/labeled.txt")


# === method ===
def unsupervised_loss(
    logits: torch.Tensor,
    pseudo_label: torch.Tensor,
    confidence: torch.Tensor,
    valid: torch.Tensor,
    threshold: float = 0.95,
) -> torch.Tensor:
    """Cross-entropy of the confident valid pixels over the number of valid ones, of one view.

    Few confident pixels make a small loss: the method's own warm-up. 0 without valid pixels.
    logits: (B, C, H, W); the others: (B, H, W), the teacher's, all mixed; no gradient
    """
    logits = full_precision(logits)
    loss = F.cross_entropy(logits, pseudo_label, ignore_index=IGNORE, reduction="none")
    # DIFFERS (unimatch_v2.md 7): 0 without valid pixels, not NaN.
    return (loss * (valid & (confidence >= threshold))).sum() / valid.sum().clamp(min=1)


def complementary_dropout(
    batch_size: int, dim: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Channel masks (batch_size, dim) of the two views: 0 or 2, and 2 minus that.

    Half of the images, chosen at random, keep all channels in both: 1 and 1.
    """
    mask = 2.0 * torch.randint(2, (batch_size, dim), generator=generator)
    mask[torch.randperm(batch_size, generator=generator)[: batch_size // 2]] = 1.0
    return mask, 2 - mask


def channel_masks(
    kind: str, batch_size: int, dim: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the two views: complementary, drawn apart (independent), or ones (none)."""
    if kind == "none":
        return torch.ones(batch_size, dim), torch.ones(batch_size, dim)
    mask_1, mask_2 = complementary_dropout(batch_size, dim, generator)
    if kind == "independent":
        mask_2, _ = complementary_dropout(batch_size, dim, generator)
    return mask_1, mask_2


def box_masks(
    batch_size: int,
    height: int,
    width: int,
    generator: torch.Generator,
    probability: float = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> torch.Tensor:
    """CutMix masks (B, 1, H, W), float 0/1: one box with `probability`, else none.

    `area` is a share of the image, `ratio` height by width; both are drawn uniformly. Ratio and
    corner, not the area, are drawn again until the box lies inside, so tall boxes prevail.
    """

    def draw(low, high):
        return low + (high - low) * torch.rand(batch_size, generator=generator)

    pixels, missing = draw(*area) * height * width, draw(0, 1) < probability
    box = torch.zeros(4, batch_size)  # top, left, bottom, right
    while missing.any():
        tallness, top, left = draw(*ratio), draw(0, height).floor(), draw(0, width).floor()
        bottom = top + (pixels * tallness).sqrt().floor()
        right = left + (pixels / tallness).sqrt().floor()
        fits = missing & (bottom <= height) & (right <= width)
        box = torch.where(fits, torch.stack([top, left, bottom, right]), box)
        missing &= ~fits
    top, left, bottom, right = box[:, :, None]
    y, x = torch.arange(height), torch.arange(width)
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)  # (B, H), (B, W)
    return (rows[:, None, :, None] & columns[:, None, None]).float()


def strong_view(
    image: torch.Tensor,
    generator: torch.Generator,
    strength: float = 1.0,
    first: int = 0,
    batch_size: int | None = None,
) -> torch.Tensor:
    """Colors, grayscale and blur, of each image by itself: (B, 3, H, W) in [0, 1], likewise back.

    The generator draws for a global batch of `batch_size` (None: that of `image`), in which the
    images are number `first` and those that follow, round its end.
    """
    view = v2.Compose([
        v2.RandomApply([v2.ColorJitter(*[0.5 * strength] * 3, 0.25 * strength)], 0.8),
        v2.RandomGrayscale(0.2 * strength),
        v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], 0.5 * strength),
    ])  # fmt: skip
    seeds = torch.randint(2**32, (batch_size or len(image),), generator=generator).tolist()
    views = []
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's default generator
        for number, each in enumerate(image, first):
            torch.default_generator.manual_seed(seeds[number % len(seeds)])
            views.append(view(each))
    return torch.stack(views)


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
    """`ce`, or the mean of each pair's `ohem` (0.7, 200,000 pixels), on any number of processes."""
    if kind == "ohem":  # as released, with a pair of labeled images per process
        pairs = zip(logits.split(2), label.split(2), strict=True)
        each = [ohem_cross_entropy(z, y, min_kept=100_000 * len(y)) * len(y) for z, y in pairs]
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
    # Whole images are not padded: the network resizes them (`whole_image_logits`).
    protocol = replace(protocol, pad_to=1)
    batches_l = make_batches(args, data, split.labeled, "labeled", place)
    labels = "known" if args.log_pseudo_accuracy else "none"
    batches_u = make_batches(args, data, split.unlabeled, "unlabeled", place, "next", labels)
    student = make_network(args, len(data.classes), "1")
    student.backbone.requires_grad_(not args.freeze_backbone)
    ddp = prepare(student, args, world_size, device)
    ddps = [ddp]
    teacher = make_teacher(student, args) if args.teacher == "ema" else student
    optimizer = make_optimizer([student], args, device)
    saved = {"student": student, "teacher": teacher}
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
            image_u, label_u = next(batches_u)  # weak views, and after them the last one's partner
            n, size = len(image_u) - 1, args.crop_size
            first = (rank * args.accumulate + micro) * n  # this micro-batch in the global one
            here, generator = slice(first, first + n), step_generator(args.seed, "views", step)
            with torch.no_grad(), autocast:
                confidence, pseudo_label = teacher(image_u).softmax(1).max(1)
            valid = label_u != IGNORE  # not the padding
            mean, std = statistics(device)
            images, targets = [image_l], []
            for _ in range(args.views):
                draw = (generator, args.view_strength, first, args.batch_size)
                view = strong_view((image_u * std + mean).clamp(0, 1), *draw)
                box = box_masks(args.batch_size, size, size, generator)[here]
                box = box.to(device, non_blocking=True)
                # DIFFERS (unimatch_v2.md 1): the partner is the next image of the global batch.
                mixed, *target = (
                    paste(each[:n], each[-n:], box)
                    for each in ((view - mean) / std, pseudo_label, confidence, valid)
                )
                images.append(mixed)
                targets.append(target)
            dim = student.backbone.dim
            # DIFFERS (unimatch_v2.md 6): half of the global batch keeps all channels.
            masks = channel_masks(args.feature_dropout, args.batch_size, dim, generator)
            masks = [torch.ones(len(image_l), dim), *(mask[here] for mask in masks[: args.views])]
            channel_mask = torch.cat(masks).to(device, non_blocking=True)
            with autocast:  # one forward: without BatchNorm the same as one for each
                logits = ddp(torch.cat(images), channel_mask)
            logits_l, *logits_u = logits.split([len(image_l), *[n] * args.views])
            loss_sup = supervised_loss(logits_l, label_l, args.supervised_loss)
            losses = (
                unsupervised_loss(each, *target, args.threshold)
                for each, target in zip(logits_u, targets, strict=True)
            )
            loss_cons = sum(losses) / args.views
            weight = args.lambda_u * ramp_up(step, args.ramp_up * args.steps)
            loss = (loss_sup + weight * loss_cons) / 2

            image_u, label_u, pseudo_label, confidence, valid = (
                each[:n] for each in (image_u, label_u, pseudo_label, confidence, valid)
            )
            confident = (valid & (confidence >= args.threshold)).sum() / valid.sum().clamp(min=1)
            logs = {"loss/sup": loss_sup, "loss/cons": loss_cons, "pseudo/confident": confident}
            if args.log_pseudo_accuracy:
                logs["pseudo/accuracy"] = pixel_accuracy(pseudo_label, label_u)
            pictures = {
                "labeled": ([image_l], [label_l, logits_l]),
                "unlabeled": ([image_u, *images[1:]], [pseudo_label, confidence, logits_u[0]]),
            }

            # === backward (copied) ===
            scaler.scale(loss / args.accumulate).backward()
            history.append({name: value.detach() for name, value in logs.items()})

        # === step (copied) ===
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # === teacher ===
        update_teacher(teacher, student, ema_decay(step, args.ema_decay))

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


# === model ===
# name: (width, blocks, heads, blocks whose output is taken, side of the position table, patch size,
#        width of the head, widths of its four maps)
BACKBONES = {
    "dinov2_small": (384, 12, 6, (2, 5, 8, 11), 37, 14, 64, (48, 96, 192, 384)),
    "dinov2_base": (768, 12, 12, (2, 5, 8, 11), 37, 14, 128, (96, 192, 384, 768)),
    "vit_tiny": (64, 4, 4, (0, 1, 2, 3), 6, 8, 32, (8, 16, 32, 64)),
}
DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"
WEIGHTS = {  # name: (file, SHA-256)
    "dinov2_small": (
        "dinov2_vits14/dinov2_vits14_pretrain.pth",
        "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    ),
    "dinov2_base": (
        "dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    ),
}


class Block(nn.Module):
    """Pre-norm transformer block whose branches are scaled channel by channel (LayerScale)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(dim)}) for _ in range(2))

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        qkv = self.attn["qkv"](tokens).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, tokens, D / heads) each
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.attn["proj"](out)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.ls1["gamma"] * self.attention(self.norm1(tokens))
        hidden = F.gelu(self.mlp["fc1"](self.norm2(tokens)))
        return tokens + self.ls2["gamma"] * self.mlp["fc2"](hidden)


class ViTEncoder(nn.Module):
    """Vision transformer of DINOv2, its parameters named as in Meta's files.

    (B, 3, H, W) -> (B, dim, H / patch, W / patch) after each block in `layers`, normalized

    Args:
        layers: numbers of the blocks, from 0
        grid: side of the position table, resized to other grids
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        layers: tuple[int, ...],
        grid: int = 37,
        patch_size: int = 14,
    ):
        super().__init__()
        self.dim, self.layers, self.grid, self.patch_size = dim, layers, grid, patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for weight in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def position(self, height: int, width: int) -> torch.Tensor:
        """The position table for a grid of patches: (1, 1 + height width, dim)."""
        if height == width == self.grid:
            return self.pos_embed
        table = self.pos_embed[:, 1:].mT.unflatten(2, (self.grid, self.grid))
        # As in DINOv2: the 0.1 makes sure of the size, and shifts where the table is read.
        scale = ((height + 0.1) / self.grid, (width + 0.1) / self.grid)
        table = F.interpolate(table, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).mT], 1)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        if any(side % self.patch_size for side in image.shape[2:]):
            raise ValueError(f"{tuple(image.shape[2:])}: no multiples of {self.patch_size} pixels")
        patches = self.patch_embed["proj"](image)  # (B, dim, h, w)
        grid, first = patches.shape[2:], self.cls_token.expand(patches.shape[0], -1, -1)
        tokens = torch.cat([first, patches.flatten(2).mT], 1)
        tokens, maps = tokens + self.position(*grid), []
        for number, block in enumerate(self.blocks):
            tokens = block(tokens)
            if number in self.layers:
                maps.append(self.norm(tokens)[:, 1:].mT.unflatten(2, grid))
        return maps


def load_dinov2(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Meta's checkpoint as `ViTEncoder` takes it: without the mask token of its pretraining."""
    return {name: value for name, value in state_dict.items() if name != "mask_token"}


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.conv2(self.conv1(features.relu()).relu())


class Fusion(nn.Module):
    """Adds a map to what comes from the deeper ones, and enlarges the result to `size`."""

    def __init__(self, width: int, deepest: bool):
        super().__init__()
        self.skip = nn.Identity() if deepest else ResidualUnit(width)
        self.refine = ResidualUnit(width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, deeper, features: torch.Tensor, size) -> torch.Tensor:
        out = self.out(self.refine(deeper + self.skip(features)))
        return F.interpolate(out, size, mode="bilinear", align_corners=True)


class DPTHead(nn.Module):
    """Dense prediction transformer's decoder (Ranftl et al., ICCV 2021), as in the release.

    Four (B, in_channels, h, w) maps, shallow first -> (B, C, 8h, 8w)

    Args:
        features: width of all maps from the fusion on
        out_channels: their four widths before it
    """

    def __init__(
        self, in_channels: int, num_classes: int, features: int, out_channels: tuple[int, ...]
    ):
        super().__init__()
        widths = out_channels
        self.project = nn.ModuleList(nn.Conv2d(in_channels, width, 1) for width in widths)
        self.resize = nn.ModuleList([  # to strides of 1/4, 1/2, 1 and 2 patches
            nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
            nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
            nn.Identity(),
            nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1),
        ])  # fmt: skip
        self.lateral = nn.ModuleList(
            nn.Conv2d(width, features, 3, padding=1, bias=False) for width in widths
        )
        # DIFFERS (unimatch_v2.md 11): without an unused unit for the deepest map, which stalls DDP.
        self.fuse = nn.ModuleList(Fusion(features, deepest=i == 3) for i in range(4))
        self.classifier = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1), nn.ReLU(),
            nn.Conv2d(features, num_classes, 1),
        )  # fmt: skip

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        stages = zip(self.project, self.resize, self.lateral, maps, strict=True)
        maps = [lateral(resize(project(each))) for project, resize, lateral, each in stages]
        sizes = [[2 * side for side in maps[0].shape[2:]], *(each.shape[2:] for each in maps[:3])]
        out = 0
        for i in (3, 2, 1, 0):  # each is enlarged to the size of the next
            out = self.fuse[i](out, maps[i], sizes[i])
        return self.classifier(out)


class DPT(nn.Module):
    """A vision transformer with a DPT head: (B, 3, H, W) normalized images -> (B, C, H, W) logits.

    It has no BatchNorm and no dropout: training and evaluation are the same function.
    channel_mask: (B, dim), multiplies all four maps of the encoder
    """

    def __init__(self, num_classes: int, backbone: str = "dinov2_small"):
        super().__init__()
        *vit, features, out_channels = BACKBONES[backbone]
        self.backbone = ViTEncoder(*vit)
        self.head = DPTHead(self.backbone.dim, num_classes, features, out_channels)

    def forward(
        self, image: torch.Tensor, channel_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        size, patch = image.shape[2:], self.backbone.patch_size
        if any(side % patch for side in size):
            return whole_image_logits(lambda image: self(image, channel_mask), image, patch)
        maps = self.backbone(image)
        if channel_mask is not None:
            maps = [each * channel_mask[:, :, None, None] for each in maps]
        logits = full_precision(self.head(maps))  # or confidences are steps of 1/256
        return F.interpolate(logits, size, mode="bilinear", align_corners=True)


def whole_image_logits(model, image: torch.Tensor, multiple: int = 14) -> torch.Tensor:
    """Logits of any size: the model sees the image resized to the nearest multiples, halves up."""
    resize = dict(mode="bilinear", align_corners=True)
    size = [max(1, int(side / multiple + 0.5)) * multiple for side in image.shape[2:]]
    return F.interpolate(model(F.interpolate(image, size, **resize)), image.shape[2:], **resize)


def make_network(args, num_classes: int, name: str) -> DPT:
    """A network that starts from (seed, name), its encoder from Meta's weights or a file."""
    torch.manual_seed(stream_seed(args.seed, f"weights/{name}"))
    network = DPT(num_classes, args.backbone)
    if args.weights == "none" or (dist.is_initialized() and dist.get_rank() > 0):
        return network  # DDP gives every process rank 0's
    try:
        path = Path(args.weights).expanduser()
        if args.weights == "dinov2":
            file, sha256 = WEIGHTS[args.backbone]
            path = Path(torch.hub.get_dir()) / "checkpoints" / Path(file).name
            fetch(f"{DINOV2}/{file}", path, sha256)
        network.backbone.load_state_dict(load_dinov2(read_weights(path)))
    except Exception as error:  # torch raises many kinds for a bad file
        mend = f"use --weights none or FILE, named as in Meta's; dinov2 has {', '.join(WEIGHTS)}"
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
