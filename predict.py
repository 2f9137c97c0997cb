"""Masks, color pictures and overlays from any checkpoint, its score, or a program to deploy.

    python predict.py runs/<run>/last.pt photo.jpg folder/ --out predictions
    python predict.py runs/<run>/last.pt aerial.tif --window 512     # any size in little memory
    python predict.py runs/<run>/best.pt --evaluate --scales 0.75 1 1.25 --flip
    python predict.py runs/<run>/best.pt --export model.pt2     # torch.export: pixels to logits

Backbone, classes, palette, normalization and protocol come from the checkpoint.
"""

import math
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn
from tqdm import tqdm

from common import UserError, explain
from common.datasets import DATASETS, open_dataset
from common.evaluation import Protocol, predict, sliding_window_labels, validate
from common.files import IMAGE_SUFFIXES, first, images_under, read_image, remarks
from common.transforms import MEAN, STD, normalize
from supervised import DeepLabV3Plus
from unimatch_v2 import BACKBONES, DPT

SOURCE = "predicted from"  # the key, in a written PNG, of the image that it belongs to


@dataclass(frozen=True, kw_only=True)
class Args:
    """Predict with a trained network."""

    checkpoint: Annotated[Path, tyro.conf.Positional]  # last.pt or best.pt of a run
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()  # files, or folders of them
    out: Path = Path("predictions")  # folder of <name>.png (ids), <name>_color.png, _overlay.png
    window: Annotated[int, 32, math.inf] | None = None  # slide one of this side, pixels; None: as
    #   in training's evaluation, which takes whole images of most data sets
    evaluate: bool = False  # score the checkpoint on its data set's validation images
    export: Path | None = None  # write a torch.export program: uint8 (B, 3, H, W) RGB -> logits
    network: str | None = None  # another network of last.pt, such as teacher
    data_root: Path | None = None  # folder of the data set; None: the one the run used
    scales: tuple[float, ...] = (1.0,)  # average the probabilities over these scales
    flip: bool = False  # average with the mirrored image
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu


def shapes(state: dict) -> dict:
    return {key: getattr(value, "shape", None) for key, value in state.items()}


def load(path: Path, device: torch.device, name: str | None = None):
    """(network in eval mode, metadata) of a checkpoint; `name` picks one of several networks."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        meta, name = checkpoint["meta"], name or checkpoint["evaluated"]
        backbone = meta["args"]["backbone"]
        network_class = DPT if backbone in BACKBONES else DeepLabV3Plus
        network = network_class(len(meta["classes"]), backbone)
        needed = meta["palette"], meta["args"]["crop_size"], meta["args"]["dataset"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; name its last.pt or best.pt") from None
    except Exception as error:  # torch raises many kinds for a file that is something else
        raise UserError(
            f"{path}: not a checkpoint of these scripts ({type(error).__name__}: {error})"
        ) from None
    if needed[-1] not in DATASETS:
        raise UserError(f"{path}: its data set, {needed[-1]}, is none of {', '.join(DATASETS)}")
    own = shapes(network.state_dict())
    states = {k: shapes(v) for k, v in checkpoint.items() if isinstance(v, dict)}
    names = [key for key, state in states.items() if state == own]
    if name in states and name not in names:
        state = states[name]
        differing = sorted(k for k in own.keys() | state.keys() if own.get(k) != state.get(k))
        raise UserError(
            f"{path}: its {name} is another network than DeepLabV3Plus ({first(differing)}), as of "
            "a fork; import the fork's network in predict.py in the place of supervised's"
        )
    if name not in names:
        raise UserError(f"--network {name}: {path} holds {', '.join(names)}")
    network.load_state_dict(checkpoint[name])
    network = network.eval().to(device, memory_format=torch.channels_last)
    statistics = (tuple(meta.get("mean", MEAN)), tuple(meta.get("std", STD)))
    return network, meta | {"network": name, "statistics": statistics}


def files_of(paths: tuple[Path, ...], out: Path) -> tuple[dict[Path, Path], list[Path]]:
    """({image: its place below `out`, without ending}, other files found in the folders)."""
    files: dict[Path, Path] = {}
    others: list[Path] = []
    results = Path(os.path.realpath(out))
    for path in paths:
        if path.is_dir():
            if out.exists() and out.samefile(path):
                raise UserError(f"--out {out}: holds the images themselves; name another folder")
            images, left_out = images_under(path, twins=True)
            inside = {Path(file): Path(name) for name, file in images.items()}
            if results not in (real := Path(os.path.realpath(path)), *real.parents):
                inside = {f: name for f, name in inside.items() if not is_result(f, results)}
            files |= inside
            others += left_out
            if not inside:
                raise UserError(f"{path}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
        elif path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
            files[path] = Path(path.stem)
        elif path.is_file():
            mend = "name images or their folder; of a video, extract the frames first"
            raise UserError(f"{path}: is no image ({', '.join(IMAGE_SUFFIXES)}); {mend}")
        else:
            raise UserError(f"{path}: no such image or folder")
    return files, others


def is_result(file: Path, results: Path) -> bool:
    return results in Path(os.path.realpath(file)).parents


def results_of(place: Path) -> list[Path]:
    return [place.with_name(f"{place.name}{kind}.png") for kind in ("", "_color", "_overlay")]


def check_results(files: dict[Path, Path], out: Path) -> None:
    """Refuse to write over an input, over another image's result, or over what is no result."""
    inputs = {os.path.realpath(file) for file in files}
    taken: dict[Path, Path] = {}
    for file, name in files.items():
        for path in results_of(out / name):
            if taken.setdefault(path, file) is not file:
                raise UserError(
                    f"{file} and {taken[path]} would both become {path}; predict them into "
                    "different folders (--out), or rename one"
                )
            if os.path.realpath(path) in inputs:
                raise UserError(f"--out {out}: {path} is one of the images; name another folder")
            if path.exists() and source_of(path) != os.path.realpath(file):
                raise UserError(
                    f"--out {out}: {path} is there already and not from {file}; name another folder"
                )


def source_of(path: Path) -> str | None:
    """The image that a result was made from, as it says itself."""
    try:
        with Image.open(path) as file:
            return file.info.get(SOURCE)
    except (OSError, SyntaxError, ValueError):
        return None


def save(picture: Image.Image, path: Path, source: Path) -> None:
    """Write a PNG atomically; it names its image."""
    info = PngInfo()
    info.add_itxt(SOURCE, os.path.realpath(source).encode("utf-8", "replace").decode())
    part = path.with_name(f"{path.name}.part")
    picture.save(part, format="PNG", pnginfo=info)
    os.replace(part, path)


@torch.no_grad()
def predict_image(network, image: torch.Tensor, meta, protocol: Protocol, device) -> torch.Tensor:
    """uint8 (3, H, W) RGB -> uint8 (H, W) class ids."""
    classes, (mean, std) = len(meta["classes"]), meta["statistics"]

    def normalized(pixels: torch.Tensor) -> torch.Tensor:
        return normalize(pixels.to(device), mean, std)

    if protocol.window and protocol.scales == (1.0,) and not protocol.flip:
        size, stride = protocol.window, protocol.stride
        return sliding_window_labels(network, image, classes, size, stride, normalized)
    scores = predict(network, normalized(image[None]), classes, protocol)
    return scores.argmax(1)[0].byte().cpu()


def predict_files(args, network, meta, protocol, device) -> int:
    """Predict every image that can be read; returns how many could not."""
    files, others = files_of(args.images, args.out)
    check_results(files, args.out)
    colors = [value for color in meta["palette"] for value in color]
    notes = [f"{len(others)} other files skipped: {first(others)}"] if others else []
    skipped = []
    for file, name in tqdm(files.items(), disable=None):
        try:
            pixels = read_image(file)
            notes += [f"{file} {remark}" for remark in remarks(file)]
            image = torch.from_numpy(pixels).permute(2, 0, 1)
            label = Image.fromarray(predict_image(network, image, meta, protocol, device).numpy())
        except Exception as error:
            if not (text := explain(error)):
                raise
            if isinstance(error, RuntimeError | MemoryError):
                text = f"{file}: does not fit into memory ({text}); use --window 512"
            skipped.append(text)
            continue
        color = label.copy()
        color.putpalette(colors)
        color = color.convert("RGB")
        overlay = Image.blend(Image.fromarray(pixels), color, 0.5)
        paths = results_of(args.out / name)
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for path, picture in zip(paths, (label, color, overlay), strict=True):
            save(picture, path, file)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if len(skipped) == len(files):
        raise UserError("; ".join(skipped[:3]))
    print(f"{len(files) - len(skipped)} images -> {args.out}: class ids, _color, _overlay")
    for text in skipped:
        print(f"skipped: {text}", file=sys.stderr)
    return len(skipped)


def evaluate(args, network, meta, protocol, device) -> float:
    run = meta["args"]
    data = open_dataset(run["dataset"], args.data_root or Path(run["data_root"]))
    if list(data.classes) != list(meta["classes"]):
        raise UserError(f"{args.checkpoint}: trained on other classes than {run['dataset']} has")
    data.check_files(data.val_ids, data.val_ids)
    data.check_labels((), data.val_ids)
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)
    scores = validate(network, data, protocol, device, 2, *meta["statistics"])
    for name, iou in scores.items():
        if name.startswith("val/iou/"):
            print(f"{name.removeprefix('val/iou/'):16} {100 * iou:6.2f}")
    miou = scores["val/miou"]
    print(
        f"{'mIoU':16} {100 * miou:6.2f}   {run['dataset']} val, {len(data.val_ids)} images; "
        f"{args.checkpoint.name} ({meta['network']}), {run['backbone']}, {protocol}"
    )
    return miou


class Program(nn.Module):
    """What is exported: uint8 (B, 3, H, W) RGB -> (B, C, H, W) logits."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network((image.float() / 255 - self.mean) / self.std)


@torch.no_grad()
def export(path: Path, network: nn.Module, meta) -> None:
    """Write a program for any batch and size, once it agrees with the network on two of them.

    UniMatch V2's is for the side of its crops: the position table is drawn up for that.
    """
    side = meta["args"]["crop_size"] if isinstance(network, DPT) else None
    program = Program(network.cpu(), *meta["statistics"]).eval()
    draw = torch.Generator().manual_seed(0)

    def pixels(*size: int) -> torch.Tensor:
        return torch.randint(256, size, generator=draw).byte()

    sizes = dict.fromkeys([0] if side else [0, 2, 3], torch.export.Dim.DYNAMIC)
    example = pixels(2, 3, side or 96, side or 128)
    made = torch.export.export(program, (example,), dynamic_shapes=(sizes,))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.part.pt2")
    torch.export.save(made, part)
    again = torch.export.load(part).module()
    for size in ((1, 3, side or 101, side or 67), (3, 3, side or 160, side or 224)):
        image = pixels(*size)
        torch.testing.assert_close(again(image), program(image), rtol=1e-4, atol=1e-4)
    os.replace(part, path)
    height, width = (side, side) if side else ("H", "W")
    print(
        f"{path}: uint8 (B, 3, {height}, {width}) RGB -> (B, {len(meta['classes'])}, {height}, "
        f"{width}) logits, as the network's on two batches; "
        f"torch.export.load({str(path)!r}).module()"
    )


def main(args: Args) -> float | None:
    """Predict, evaluate, export; returns the mIoU of an evaluation."""
    if not (args.evaluate or args.images or args.export):
        raise UserError("name the images to predict, or --evaluate, or --export")
    if not args.scales or not all(0 < scale < math.inf for scale in args.scales):
        raise UserError(f"--scales {args.scales}: must be above 0")
    if args.export and (args.export.suffix != ".pt2" or args.export.is_dir()):
        raise UserError(f"--export {args.export}: name a file that ends with .pt2")
    if args.out.is_file():
        raise UserError(f"--out {args.out}: is a file; name a folder")
    if args.window is not None and args.window < 32:
        raise UserError(f"--window {args.window}: must be 32 pixels or more")
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
    protocol = Protocol(pad_to=pad_to, window=args.window or (crop if sliding else None))
    protocol = replace(protocol, scales=args.scales, flip=args.flip)
    skipped = predict_files(args, network, meta, protocol, device) if args.images else 0
    miou = evaluate(args, network, meta, protocol, device) if args.evaluate else None
    if args.export:
        export(args.export, network, meta)
    if skipped:
        raise SystemExit(1)
    return miou


def command_line() -> None:
    """`main` with the command line's flags; a mistake in the input is one line, exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names that a terminal cannot show
    try:
        main(tyro.cli(Args))
    except Exception as error:
        if not (text := explain(error)):
            raise
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: what is written is whole
    command_line()
