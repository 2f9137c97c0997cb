"""Masks, color pictures and overlays from any checkpoint, or its score on the validation set.

    python predict.py runs/<run>/last.pt photo.jpg folder/ --out predictions
    python predict.py runs/<run>/best.pt --evaluate --data-root data --scales 0.75 1 1.25 --flip

Backbone, classes, palette, normalization and protocol come from the checkpoint.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image
from tqdm import tqdm

from common import UserError
from common.datasets import DATASETS, IMAGE_SUFFIXES, decode, open_dataset
from common.evaluation import Protocol, colorize, predict, validate
from common.transforms import normalize
from supervised import DeepLabV3Plus
from unimatch_v2 import BACKBONES, DPT


@dataclass(frozen=True, kw_only=True)
class Args:
    """Predict with a trained network."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """last.pt or best.pt of a run"""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """image files, or folders of them"""
    out: Path = Path("predictions")
    """folder for <name>.png (class ids), <name>_color.png and <name>_overlay.png"""
    evaluate: bool = False
    """score the checkpoint on its data set's validation images"""
    network: str | None = None
    """another network of last.pt, such as teacher; None: the one the run evaluates"""
    data_root: Path | None = None
    """folder of the data set; None: the one the run used"""
    scales: tuple[float, ...] = (1.0,)
    """average the probabilities over these scales"""
    flip: bool = False
    """average with the mirrored image"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu"""


def load(path: Path, device: torch.device, name: str | None = None):
    """(network in eval mode, metadata) of a checkpoint; `name` picks one of several networks."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        meta = checkpoint["meta"]
        backbone = meta["args"]["backbone"]
        network_class = DPT if backbone in BACKBONES else DeepLabV3Plus
        network = network_class(len(meta["classes"]), backbone)
        names = [
            key for key, value in checkpoint.items()
            if isinstance(value, dict) and value.keys() == network.state_dict().keys()
        ]  # fmt: skip
        name = name or checkpoint["evaluated"]
        if name not in names:
            raise UserError(f"--network {name}: {path} holds {', '.join(names)}")
        network.load_state_dict(checkpoint[name])
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch raises many kinds for a file that is something else
        raise UserError(
            f"{path}: not a checkpoint of these scripts ({type(error).__name__}: {error})"
        ) from None
    network = network.eval().to(device, memory_format=torch.channels_last)
    return network, meta | {"network": name}


def files_of(paths: tuple[Path, ...]) -> list[Path]:
    """The image files among the paths and, in order, inside the folders among them."""
    files = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise UserError(f"{path}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such image or folder")
    names = [file.stem for file in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"several images are called {twice[0]}: predict them in separate calls")
    return files


@torch.no_grad()
def predict_files(args, network, meta, protocol, device) -> None:
    files = files_of(args.images)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error}") from None
    for file in tqdm(files, disable=None):
        image = torch.from_numpy(decode(file, "RGB")).permute(2, 0, 1)[None]
        scores = predict(network, normalize(image.to(device)), len(meta["classes"]), protocol)
        label = scores.argmax(1)[0].byte().cpu()  # (H, W)
        color = colorize(label, meta["palette"])
        overlay = (image[0].float() / 2 + color.float() / 2).byte()
        Image.fromarray(label.numpy()).save(args.out / f"{file.stem}.png")
        for kind, picture in (("color", color), ("overlay", overlay)):
            picture = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
            picture.save(args.out / f"{file.stem}_{kind}.png")
    print(f"{len(files)} images -> {args.out}: class ids, _color, _overlay")


def evaluate(args, network, meta, protocol, device) -> float:
    run = meta["args"]
    data = open_dataset(run["dataset"], args.data_root or Path(run["data_root"]))
    if list(data.classes) != list(meta["classes"]):
        raise UserError(f"{args.checkpoint}: trained on other classes than {run['dataset']} has")
    data.check_files(data.val_ids, data.val_ids)
    scores = validate(network, data, protocol, device, num_workers=2)
    for name, iou in scores.items():
        if name.startswith("val/iou/"):
            print(f"{name.removeprefix('val/iou/'):16} {100 * iou:6.2f}")
    miou = scores["val/miou"]
    print(
        f"{'mIoU':16} {100 * miou:6.2f}   {run['dataset']} val, {len(data.val_ids)} images; "
        f"{args.checkpoint.name} ({meta['network']}), {run['backbone']}, {protocol}"
    )
    return miou


def main(args: Args) -> float | None:
    """Predict or evaluate; returns the mIoU of an evaluation."""
    if not args.evaluate and not args.images:
        raise UserError("name the images to predict, or --evaluate")
    if not args.scales or min(args.scales) <= 0:
        raise UserError(f"--scales {args.scales}: must be above 0")
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kinds["cpu"] = True
    kind = next(k for k in kinds if kinds[k]) if args.device == "auto" else args.device
    if not kinds[kind]:
        raise UserError(f"--device {kind}: this machine or this torch build has none; use cpu")
    device = torch.device(kind)
    network, meta = load(args.checkpoint, device, args.network)
    crop = meta["args"]["crop_size"]
    sliding = DATASETS[meta["args"]["dataset"]].sliding
    pad_to = 1 if isinstance(network, DPT) else crop  # DPT resizes, others pad
    protocol = Protocol(pad_to=pad_to, window=crop if sliding else None)
    protocol = replace(protocol, scales=args.scales, flip=args.flip)
    if args.images:
        predict_files(args, network, meta, protocol, device)
    return evaluate(args, network, meta, protocol, device) if args.evaluate else None


def command_line() -> None:
    """`main` with the command line's flags; a mistake in the input is one line, exit code 2."""
    try:
        main(tyro.cli(Args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    command_line()
