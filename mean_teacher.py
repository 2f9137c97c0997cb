"""Mean Teacher (Tarvainen, Valpola, NeurIPS 2017, 1703.01780) as CPS's authors run it.

    L = CE(f(x_l), y_l) + lambda r(t) |softmax f(x) - softmax g(x)|^2, x: labeled and unlabeled,
    g: an exponential moving average of the student f over its own training; r: a ramp up to 1

    python mean_teacher.py --dataset shapes                      # no data, no GPU: minutes
    python mean_teacher.py --split 1/8                           # one GPU, Pascal VOC
    torchrun --nproc_per_node=8 mean_teacher.py --split 1/8      # the same run on eight

The protocol is that of the CPS paper (2106.01226v3); docs/mean_teacher.md lists what differs.
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
from tqdm import tqdm

from common import UserError, claim, explain, written_whole
from common.datasets import (
    IGNORE,
    MicroBatches,
    Samples,
    StreamSampler,
    open_data,
    open_dataset,
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
    """Mean Teacher. What is None takes its value from the data set's row of PAPER."""

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
    ema_decay: Share | None = None  # share of itself that the teacher keeps at every step
    ema_warmup: bool = False  # decay of 1 - 1/(step + 1) until that exceeds --ema-decay
    noise: Amount = 0.0  # greatest deviation of noise, share of an image's range; each has its own
    lambda_u: Amount | None = None  # weight of the consistency loss
    ramp_up: Share | None = None  # share of the steps over which it rises from 0.7 % to all of it
    evaluate: Literal["student", "teacher"] = "student"  # network to evaluate
    log_pseudo_accuracy: bool = False  # where unlabeled images have labels, for the log alone


# === paper ===
# Sources: CPS repository 5e0c29c; camvid and shapes are ours. An entry that depends on other flags
# is a function of them.
# DIFFERS (supervised.md 2): lr and weight decay are those that act on the true mean gradient.
# DIFFERS (mean_teacher.md 3): camvid and shapes ramp the consistency in, since their networks start
# from scratch, and their teachers remember 10 steps. They and folder have VOC's weight per pixel.
PAPER = {
    "voc": dict(
        split="1/8", backbone="resnet50", weights="imagenet", batch_size=8, crop_size=512,
        steps=lambda args: {"1/8": 39_338, "1/2": 39_660}.get(args.split.split(":")[-1], 39_680),
        optimizer="sgd", lr=0.0025, momentum=0.9, weight_decay=4e-4, supervised_loss="ce",
        lambda_u=100.0, ramp_up=0.0, ema_decay=0.99,
    ),
    "cityscapes": dict(
        split="1/8", backbone="resnet50", weights="imagenet", batch_size=8, crop_size=800,
        steps=lambda args: {"1/16": 44_544, "1/8": 44_525}.get(args.split.split(":")[-1], 44_640),
        optimizer="sgd", lr=0.0025, momentum=0.9, weight_decay=8e-4, supervised_loss="ohem",
        lambda_u=100.0, ramp_up=0.0, ema_decay=0.99,
    ),
    "camvid": dict(
        split="1/8", backbone="resnet14", weights="none", batch_size=8, crop_size=160, steps=1_000,
        optimizer="adamw", lr=1e-3, momentum=0.9, weight_decay=1e-4, supervised_loss="ce",
        lambda_u=52.0, ramp_up=0.4, ema_decay=0.9,
    ),
}  # fmt: skip
PAPER["shapes"] = PAPER["camvid"] | dict(split="20", batch_size=16, crop_size=48, lambda_u=38.0)
PAPER["folder"] = PAPER["voc"] | dict(
    split=lambda args: f"{args.data_root}/labeled.txt", steps=39_680,
    lambda_u=lambda args: 100 / 21 * len(open_dataset("folder", args.data_root).classes),
)  # fmt: skip


# === method ===
def consistency_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Squared difference of the softmaxes, mean over all B C H W entries; gradient to the student.

    The mean over classes makes a weight of 100 one of 100 / C on the sum over classes.
    """
    student_prob = full_precision(student_logits).softmax(1)
    teacher_prob = full_precision(teacher_logits.detach()).softmax(1)
    return F.mse_loss(student_prob, teacher_prob)


def add_noise(image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """`noise` in units of each image's own range (over its pixels and channels), clipped to it."""
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    span = high - low + 1e-9
    return ((image - low) / span + noise).clamp(0, 1) * span + low


def draw_noise(
    batch_size: int, size: int, deviation: float, generator: torch.Generator
) -> torch.Tensor:
    """Gaussian noise (B, 3, size, size), its deviation drawn once, from 0 to `deviation`."""
    deviation = deviation * torch.rand((), generator=generator)
    return deviation * torch.randn(batch_size, 3, size, size, generator=generator)


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
    student = make_network(args, len(data.classes), "1")
    ddp = prepare(student, args, world_size, device)
    ddps = [ddp]
    teacher = make_teacher(student, args)
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
            image_u, label_u = next(batches_u)
            # DIFFERS (mean_teacher.md 1): student and teacher see one view, as released.
            images = [image_l, image_l, image_u, image_u]  # by turns for student and teacher
            if args.noise > 0:
                n = len(image_l)
                first = (rank * args.accumulate + micro) * n  # this micro-batch in the global one
                generator = step_generator(args.seed, "noise", step)
                shape = (args.batch_size, args.crop_size, args.noise, generator)
                images = [
                    add_noise(image, draw_noise(*shape)[first : first + n].to(device))
                    for image in images
                ]
            image_l, taught_l, image_u, taught_u = images
            with torch.no_grad(), autocast:
                teacher_l = teacher(taught_l)
                # DIFFERS (mean_teacher.md 2): once a step, between the teacher's forwards and
                # before the student's step, as released.
                if micro == 0:
                    decay = ema_decay(step, args.ema_decay) if args.ema_warmup else args.ema_decay
                    update_teacher(teacher, student, decay)
                teacher_u = teacher(taught_u)
            with autocast:
                logits_l, logits_u = ddp(image_l), ddp(image_u)
            loss_sup = supervised_loss(logits_l, label_l, args.supervised_loss)
            # Labeled and unlabeled images, padding included.
            loss_cons = consistency_loss(
                torch.cat([logits_l, logits_u]), torch.cat([teacher_l, teacher_u])
            )
            weight = args.lambda_u * ramp_up(step, args.ramp_up * args.steps)
            loss = loss_sup + weight * loss_cons

            pseudo_label = teacher_u.argmax(1)
            logs = {"loss/sup": loss_sup, "loss/cons": loss_cons}
            logs["pseudo/agreement"] = (pseudo_label == logits_u.argmax(1)).float().mean()
            if args.log_pseudo_accuracy:
                logs["pseudo/accuracy"] = pixel_accuracy(pseudo_label, label_u)
            pictures = {
                "labeled": ([image_l], [label_l, logits_l]),
                "unlabeled": ([image_u], [pseudo_label, logits_u]),
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
