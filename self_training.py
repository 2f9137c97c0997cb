"""Self-training, plain and as ST and ST++ (Yang, Zhuo, Qi, Shi, Gao, CVPR 2022, 2106.05095).

    1. L = CE(f1(x_l), y_l)    2. y_u = argmax f1(x_u)    3. L = CE(f2(x), y) with a new network f2,
    x: labeled and unlabeled images in one list, y: true and pseudo-labels

    python self_training.py --dataset shapes                     # no data, no GPU: minutes
    python self_training.py --split 1/8                          # one GPU, Pascal VOC
    torchrun --nproc_per_node=8 self_training.py --plus          # ST++ on eight

The protocol is that of the CPS paper (2106.01226v3); docs/self_training.md lists what differs and
numbers the equations.
"""

import copy
import io
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
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision import tv_tensors
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms import v2
from tqdm import tqdm

from common import UserError, claim, explain, written_whole
from common.datasets import (
    IGNORE,
    UNKNOWN,
    MicroBatches,
    Samples,
    StreamSampler,
    global_batch,
    open_data,
    stream_seed,
)
from common.evaluation import Protocol, confusion_matrix, mean_iou, side_by_side, validate
from common.files import load_weights, read_mask, read_weights
from common.transforms import MEAN, STD, WeakView, denormalize, normalize

# Kinds of numbers, with their least and greatest value.
Whole, Count = Annotated[int, 0, math.inf], Annotated[int, 1, math.inf]
Amount, Share = Annotated[float, 0, math.inf], Annotated[float, 0, 1]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Self-training. What is None takes its value from the data set's row of PAPER."""

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
    plus: bool = False  # ST++: the more stable images first; sets the three flags below
    strong: bool = False  # strong augmentation of pseudo-labeled images
    tta: bool = False  # pseudo-labels from five scales and their mirror images
    oversample: bool = False  # repeat the labeled images until they are half of the list
    teacher: Literal["last", "best"] = "last"  # which network of a training labels; best: on val
    log_pseudo_accuracy: bool = False  # where unlabeled images have labels, for the log alone


# === paper ===
# Sources: CPS repository 5e0c29c; camvid and shapes are ours. An entry that depends on other flags
# is a function of them.
# DIFFERS (self_training.md 3): every training is as long as supervised.py's, `steps` are the whole.
# DIFFERS (supervised.md 2): lr and weight decay are those that act on the true mean gradient.
PAPER = {
    "voc": dict(
        split="1/8", backbone="resnet50", weights="imagenet", batch_size=8, crop_size=512,
        steps=lambda args: trainings(args)
        * {"1/8": 39_338, "1/2": 39_660}.get(args.split.split(":")[-1], 39_680),
        optimizer="sgd", lr=0.0025, momentum=0.9, weight_decay=4e-4, supervised_loss="ce",
    ),
    "cityscapes": dict(
        split="1/8", backbone="resnet50", weights="imagenet", batch_size=8, crop_size=800,
        steps=lambda args: trainings(args)
        * {"1/16": 44_544, "1/8": 44_525}.get(args.split.split(":")[-1], 44_640),
        optimizer="sgd", lr=0.0025, momentum=0.9, weight_decay=8e-4, supervised_loss="ohem",
    ),
    "camvid": dict(
        split="1/8", backbone="resnet14", weights="none", batch_size=8, crop_size=160,
        steps=lambda args: trainings(args) * 1_000,
        optimizer="adamw", lr=1e-3, momentum=0.9, weight_decay=1e-4, supervised_loss="ce",
    ),
}  # fmt: skip
PAPER["shapes"] = PAPER["camvid"] | dict(split="20", batch_size=16, crop_size=48)
PAPER["folder"] = PAPER["voc"] | dict(
    split=lambda args: f"{args.data_root}/labeled.txt",
    steps=lambda args: trainings(args) * 39_680,
)


# === method ===
def trainings(args) -> int:
    """Of a run: on labeled images, (ST++: with the reliable half,) with all unlabeled ones."""
    return 3 if args.plus else 2


def pseudo_label(logits: torch.Tensor) -> torch.Tensor:
    """Eq. (1): the class of the greatest logit or probability, the first of ties.

    (B, C, H, W) -> (B, H, W) int64. No threshold: every pixel gets a label.
    """
    return logits.detach().argmax(1)


@torch.no_grad()
def tta_probabilities(
    model,
    image: torch.Tensor,
    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 2.0),
    flip: bool = True,
) -> torch.Tensor:
    """Eq. (3): mean softmax over scales and mirror images, (B, 3, H, W) -> (B, C, H, W)."""
    size, total, count = image.shape[2:], 0.0, 0
    for scale in scales:
        scaled = F.interpolate(
            image, [int(scale * side) for side in size], mode="bilinear", align_corners=True
        )
        views = [model(scaled)] + ([model(scaled.flip(3)).flip(3)] if flip else [])
        for logits in views:  # softmax, then resize: the other order gives other labels
            prob = full_precision(logits).softmax(1)
            total = total + F.interpolate(prob, size, mode="bilinear", align_corners=True)
            count += 1
    return total / count


def checkpoint_steps(steps: int, count: int = 3) -> list[int]:
    """After which steps a training of `steps` keeps its network, the last one included."""
    return sorted({steps * k // count for k in range(1, count + 1)} - {0})


def stability_score(predictions: list[torch.Tensor], num_classes: int) -> float:
    """Eq. (5): mean over the earlier checkpoints of the mIoU of their map with the last one's.

    predictions: (H, W) label maps of one image. The classes are those of either map.
    """
    *earlier, last = predictions
    return mean(mean_iou(confusion_matrix(last, each, num_classes).cpu()) for each in earlier)


def mean(values) -> float:
    """0 of none: a training of one step has no earlier checkpoint."""
    values = list(values)
    return sum(values) / max(1, len(values))


def select_reliable(scores: list[float]) -> tuple[list[int], list[int]]:
    """Indices of the more and of the less stable half, each from the most stable on."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])  # keeps ties in order
    half = len(scores) // 2
    return order[:half], order[half:]


def joint_ids(labeled: list, unlabeled: list, oversample: bool = True) -> list:
    """Eq. (4): labeled entries, as often as makes them half of the list, and unlabeled ones."""
    repeats = -(-len(unlabeled) // len(labeled)) if oversample else 1
    return [*labeled] * max(1, repeats) + [*unlabeled]


def cutout_box(
    height: int,
    width: int,
    generator: torch.Generator | None = None,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a box with a share of the image's `area`, height / width in
    `aspect`. All is drawn anew until it fits, as released: large boxes are rare.
    """
    while True:
        share, ratio, *place = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        pixels = (area[0] + (area[1] - area[0]) * share) * height * width
        ratio = aspect[0] + (aspect[1] - aspect[0]) * ratio
        top, left = int(place[0] * height), int(place[1] * width)
        bottom, right = top + int((pixels * ratio) ** 0.5), left + int((pixels / ratio) ** 0.5)
        if bottom <= height and right <= width:
            return top, left, bottom, right


def erase(
    image: torch.Tensor, label: torch.Tensor, box: tuple[int, int, int, int], noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, H, W) and (H, W) with noise and label 255 in the box."""
    top, left, bottom, right = box
    image, label = image.clone(), label.clone()
    image[:, top:bottom, left:right] = noise
    label[top:bottom, left:right] = IGNORE
    return image, label


STRONG_COLORS = v2.Compose([
    v2.RandomApply([v2.ColorJitter(0.5, 0.5, 0.5, 0.25)], p=0.8),
    v2.RandomGrayscale(p=0.2),
    # DIFFERS (self_training.md 4): a Gaussian kernel, not PIL's repeated boxes.
    v2.RandomApply([v2.GaussianBlur(13, sigma=(0.1, 2.0))], p=0.5),
])  # fmt: skip


def strong_views(
    image: torch.Tensor, label: torch.Tensor, seeds: dict[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A normalized batch and its labels, with strong augmentation of the images in `seeds`."""
    image, label = denormalize(image), label.clone()  # uint8, as released
    for index, seed in seeds.items():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stream_seed(seed, "strong"))
            image[index] = STRONG_COLORS(image[index])
            if torch.rand(()) < 0.5:
                top, left, bottom, right = box = cutout_box(*label.shape[1:])
                noise = torch.randint(255, (3, bottom - top, right - left), dtype=torch.uint8)
                noise = noise.to(image.device, non_blocking=True)
                image[index], label[index] = erase(image[index], label[index], box, noise)
    return normalize(image), label


def loss_parts(
    logits: torch.Tensor, label: torch.Tensor, is_pseudo: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the labeled and the pseudo-labeled images (B,) add to `cross_entropy` of the batch."""
    loss = F.cross_entropy(full_precision(logits), label, ignore_index=IGNORE, reduction="none")
    loss = loss.sum((1, 2)) / (label != IGNORE).sum().clamp(min=1)
    return (loss * ~is_pseudo).sum(), (loss * is_pseudo).sum()


# === pseudo-labels ===
class PseudoLabeled:
    """A data set whose unlabeled images have pseudo-labels and scores: files in a run directory.

    Its entries are (image id, whether that is a labeled image).
    """

    def __init__(self, data, folder: Path):
        self.data, self.folder, self.scales = data, folder, data.scales
        self.score_file = folder / "reliability.json"

    def file(self, image_id: str) -> Path:
        return self.folder / "pseudo" / f"{image_id}.png"

    def scores(self) -> dict[str, float]:
        return json.loads(self.score_file.read_text())

    def label(self, image_id: str) -> torch.Tensor:
        return tv_tensors.Mask(torch.from_numpy(read_mask(self.file(image_id))))

    def load(self, entry: tuple[str, bool], with_label: bool = True):
        image_id, labeled = entry
        image, label = self.data.load(image_id, with_label=labeled)
        return image, label if labeled else self.label(image_id)


def whole_images(args, data, ids, place):
    """Unlabeled images one by one, at their own size: normalized (1, 3, H, W)."""
    _, rank, _, device = place
    loader = DataLoader(
        Samples(data, ids, v2.Identity(), "none"),
        sampler=[(index, 0) for index in range(len(ids))],
        num_workers=args.num_workers,
        generator=torch.Generator(),  # of its own, as in make_batches
    )
    for image, _ in tqdm(loader, desc="unlabeled images", leave=False, disable=bool(rank) or None):
        yield normalize(image.to(device))


def write_file(file: Path, content: bytes) -> None:
    """A file that is there is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)  # an id may name a subfolder
    with written_whole(file) as opened:
        opened.write(content)


@torch.no_grad()
def write_pseudo_labels(args, network, joint: PseudoLabeled, ids, place, autocast) -> None:
    """Label the images that have no file yet: their share on every process."""
    _, rank, world_size, _ = place
    ids = [image_id for image_id in ids[rank::world_size] if not joint.file(image_id).exists()]
    model = network.eval().forward  # past a compiled call: whole images vary in size
    images = whole_images(args, joint.data, ids, place)
    for image_id, image in zip(ids, images, strict=True):
        with autocast:
            scores = tta_probabilities(model, image) if args.tta else model(image)
        picture = Image.fromarray(pseudo_label(scores)[0].byte().cpu().numpy())
        picture.putpalette([value for color in joint.data.palette for value in color])
        content = io.BytesIO()
        picture.save(content, "PNG")
        write_file(joint.file(image_id), content.getvalue())
    if world_size > 1:
        dist.barrier()


@torch.no_grad()
def write_scores(args, network, joint: PseudoLabeled, ids, place, autocast) -> None:
    """`stability_score` of every image, if there is no file yet: their share on every process."""
    _, rank, world_size, device = place
    if joint.score_file.exists():
        return
    files = [joint.folder / f"step_{n}.pt" for n in checkpoint_steps(args.steps // trainings(args))]
    networks = [restore(copy.deepcopy(network), file) for file in files[:-1]] + [network]
    models = [each.eval().forward for each in networks]
    scores = torch.zeros(len(ids), dtype=torch.float64)
    share = range(rank, len(ids), world_size)
    images = whole_images(args, joint.data, [ids[index] for index in share], place)
    for index, image in zip(share, images, strict=True):
        with autocast:
            predictions = [pseudo_label(model(image))[0] for model in models]
        scores[index] = stability_score(predictions, len(joint.data.classes))
    if world_size > 1:
        scores = scores.to(device)
        dist.all_reduce(scores)
    if rank == 0:
        scores = dict(zip(ids, scores.tolist(), strict=True))
        write_file(joint.score_file, json.dumps(scores, indent=1).encode())
    if world_size > 1:
        dist.barrier()


def used_images(args, joint: PseudoLabeled, ids, stage: int) -> list[str]:
    """The unlabeled images of a training: none, (ST++: the reliable half,) all."""
    if args.plus and stage == 1:
        scores = joint.scores()
        reliable, _ = select_reliable([scores[image_id] for image_id in ids])
        return [ids[index] for index in reliable]
    return [*ids] if stage > 0 else []


def pseudo_miou(joint: PseudoLabeled, ids, place) -> float:
    """mIoU of the files over the pixels whose class is known, 0 if there are none."""
    _, rank, world_size, device = place
    samples = Samples(joint.data, ids, v2.Identity(), "known")
    confusion = torch.zeros(2 * [len(joint.data.classes)], dtype=torch.int64)
    for index in range(rank, len(ids), world_size):
        _, truth = samples[index, 0]
        truth[truth == UNKNOWN] = IGNORE
        confusion += confusion_matrix(truth, joint.label(ids[index]), len(confusion))
    if world_size > 1:
        confusion = confusion.to(device)
        dist.all_reduce(confusion)
    return mean_iou(confusion) if confusion.any() else 0.0


def restore(network: nn.Module, checkpoint: Path) -> nn.Module:
    """The network, with the weights it had in a checkpoint."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    network.load_state_dict(state["network"])
    return network


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
    if args.plus:
        args = replace(args, strong=True, tta=True, oversample=True)
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
    if not split.unlabeled:
        raise UserError("there are no unlabeled images; use another --split")
    bounds = [args.steps * k // trainings(args) for k in range(trainings(args) + 1)]
    joint, notes = PseudoLabeled(data, run.folder), {}  # notes: for the next row of the log
    if start == 0 and rank == 0:  # left by a run whose last.pt was deleted
        shutil.rmtree(run.folder / "pseudo", ignore_errors=True)
        joint.score_file.unlink(missing_ok=True)
    network = make_network(args, len(data.classes), "1")
    ddp = prepare(network, args, world_size, device)
    optimizer = make_optimizer([network], args, device)
    saved = {"network": network}
    evaluated = "network"

    # === resume (copied) ===
    saved |= {"optimizer": optimizer, "scaler": scaler}
    for name, thing in saved.items() if start else ():
        if state := checkpoint.pop(name):  # the scaler's is empty unless fp16
            thing.load_state_dict(state)
    history, clock = [], time.perf_counter()
    silent = True if rank else None  # None: silent unless stderr is a terminal
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, disable=silent):
        # === between trainings ===
        stage = sum(step >= bound for bound in bounds[1:-1])  # the training, counted from 0
        begin, end = bounds[stage : stage + 2]
        if step == begin and stage > 0:  # the network is still that of the training before
            if world_size > 1:
                dist.barrier()  # rank 0 has written all checkpoints
            if args.plus and stage == 1:
                write_scores(args, network, joint, split.unlabeled, place, autocast)
            used = used_images(args, joint, split.unlabeled, stage)
            # DIFFERS (self_training.md 1): the last network labels, not the best on val.
            if args.teacher == "best":
                restore(network, run.folder / "best.pt")
            write_pseudo_labels(args, network, joint, used, place, autocast)

            if args.plus and stage == 1:
                scores = joint.scores()
                notes["pseudo/reliability"] = mean(scores.values())
                notes["pseudo/reliability_chosen"] = mean(scores[image_id] for image_id in used)
            if args.log_pseudo_accuracy:
                notes["pseudo/miou"] = pseudo_miou(joint, used, place)

            network = make_network(args, len(data.classes), str(stage + 1))
            ddp = prepare(network, args, world_size, device)
            optimizer = make_optimizer([network], args, device)
            saved |= {"network": network, "optimizer": optimizer}
            run.miou = run.best_miou = -1.0
        if step in (start, begin):  # a training begins, or is continued
            used = used_images(args, joint, split.unlabeled, stage)
            labeled, pseudo = [(i, True) for i in split.labeled], [(i, False) for i in used]
            entries = joint_ids(labeled, pseudo, args.oversample)
            # DIFFERS (self_training.md 2): half the batch while there are labeled images alone.
            stream, size = "labeled", args.batch_size
            if stage > 0:
                stream, size = f"joint {stage}", 2 * args.batch_size
            now = (step - begin, rank, world_size, device)
            batches = make_batches(replace(args, batch_size=size), joint, entries, stream, now)
            clock = time.perf_counter()

        # === batch ===
        torch.manual_seed(stream_seed(args.seed, f"step/rank {rank}", step))  # as if never stopped
        lr = poly_lr(args.lr, step - begin, end - begin)  # anew in every training
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        for micro in range(args.accumulate):
            # Gradients are averaged once, in the last micro-batch.
            ddp.require_backward_grad_sync = micro == args.accumulate - 1
            image, label = next(batches)

            # === loss ===
            first = (rank * args.accumulate + micro) * len(image)  # in the global batch
            pairs = global_batch(len(entries), size, args.seed, stream, step - begin)
            pairs = pairs[first : first + len(image)]
            is_pseudo = [not entries[index][1] for index, _ in pairs]
            weak = image
            if args.strong:
                seeds = {n: seed for n, (_, seed) in enumerate(pairs) if is_pseudo[n]}
                image, label = strong_views(image, label, seeds)
            with autocast:
                logits = ddp(image)
            loss = supervised_loss(logits, label, args.supervised_loss)  # Eq. (2)
            is_pseudo = torch.tensor(is_pseudo).to(device, non_blocking=True)
            loss_sup, loss_pseudo = loss_parts(logits.detach(), label, is_pseudo)
            logs = {"loss/joint": loss, "loss/sup": loss_sup, "loss/pseudo": loss_pseudo}
            pictures = {"training": ([weak, image], [label, logits])}

            # === backward (copied) ===
            scaler.scale(loss / args.accumulate).backward()
            history.append({name: value.detach() for name, value in logs.items()})

        # === step (copied) ===
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # === earlier checkpoints ===
        if args.plus and step + 1 in checkpoint_steps(bounds[1])[:-1]:  # the last is last.pt
            run.save(f"step_{step + 1}.pt", step + 1, {evaluated: network}, evaluated)

        # === report ===
        done, last = step + 1, step + 1 == end  # the last of this training
        eval_now = last or done % args.eval_every == 0
        save_now = last or done % args.save_every == 0
        if not (eval_now or save_now or done % args.log_every == 0):
            continue
        row = average(history, done, args.accumulate, world_size)  # makes a GPU wait
        images = size * len(history) / args.accumulate
        row |= {"lr": lr, "time/images_per_s": images / (time.perf_counter() - clock)} | notes
        if done == args.steps:  # a fault in the last evaluation loses no training
            run.save("last.pt", done, saved, evaluated, unscored=row)
        if eval_now:
            with autocast:
                scores = validate(saved[evaluated], data, protocol, device, args.num_workers)
            run.miou = scores["val/miou"]
            row |= scores if end == args.steps else {f"val/stage{stage + 1}/miou": run.miou}
        run.log(done, row, pictures if eval_now else {})
        if run.miou > run.best_miou:
            run.best_miou = run.miou
            run.save("best.pt", done, {evaluated: saved[evaluated]}, evaluated)
        if save_now:
            run.save("last.pt", done, saved, evaluated)
        history, clock, notes = [], time.perf_counter(), {}

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
