"""People's files: images, masks, class names and lists, read as meant or refused with the mend."""

import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_cli import call
from test_datasets import (
    flags,
    label,
    make_camvid,
    make_cityscapes,
    make_devkit,
    make_folder,
    message,
    noise,
    save,
    values,
)

import supervised
from common import UserError, explain
from common.datasets import IGNORE, UNKNOWN, Folder, Samples, open_data, open_dataset
from common.files import (
    images_under,
    listed_ids,
    load_weights,
    read_classes,
    read_image,
    read_lines,
    read_weights,
    remarks,
)
from common.transforms import WeakView
from supervised import DeepLabV3Plus


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def opened(folder: Path, split: str = "full"):
    return open_data(flags("folder", folder, split))


# ---- images --------------------------------------------------------------------------------------


def test_twelve_bits_in_sixteen_keep_their_contrast(tmp_path):
    ramp = np.linspace(0, 4095, 48).astype(np.uint16).reshape(6, 8)
    found = read_image(save_as(tmp_path / "a.png", ramp))
    np.testing.assert_array_equal(found[..., 0], ramp >> 4)
    assert read_image(save_as(tmp_path / "b.tif", ramp.astype(np.int32))).max() == 255


def save_as(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array).save(path)
    return path


def test_float_images(tmp_path):
    unit = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    found = read_image(save_as(tmp_path / "a.tif", unit))
    np.testing.assert_array_equal(found[..., 1], (255 * unit).round())
    for bad in (unit * 4000 - 1000, unit * np.nan):
        text = message(read_image, save_as(tmp_path / "b.tif", bad))
        assert "b.tif" in text and "convert it to 8 bits" in text


def test_negative_values_are_refused(tmp_path):
    text = message(read_image, save_as(tmp_path / "a.tif", label(1).astype(np.int32) - 1000))
    assert "from -999 to -999" in text


def test_damaged_exif_does_not_hide_a_photo(tmp_path):
    path = tmp_path / "a.jpg"
    save(path, noise(), exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01nonsense")
    assert read_image(path).shape == (6, 8, 3)


def test_remarks(tmp_path):
    pages = [Image.fromarray(noise(i)) for i in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert remarks(tmp_path / "a.tif") == ["has 3 pages or frames, the first is used"]
    clear = np.dstack([noise(), label(0, 255)])
    assert "transparent" in remarks(save(tmp_path / "b.png", clear))[0]
    opaque = np.dstack([noise(), label(255)])
    assert remarks(save(tmp_path / "c.png", opaque)) == []
    assert remarks(save(tmp_path / "d.jpg", noise())) == []


def test_check_data_says_what_is_remarkable_and_what_the_masks_hold(folder, capsys):
    pages = [Image.fromarray(noise(i)) for i in range(2)]
    pages[0].save(folder / "images" / "x.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(SystemExit):
        open_data(flags("folder", folder, "full", check_data=True))
    printed = capsys.readouterr()
    assert "x.tif has 2 pages" in printed.out
    assert "1 files in" in printed.err and "notes.txt" in printed.err
    rows = [line.split() for line in printed.out.splitlines() if "%" in line]
    assert [row[0] for row in rows] == ["dark", "bright", "ignored"]
    assert [row[-4] for row in rows] == ["33.33"] * 3


# ---- masks ---------------------------------------------------------------------------------------


def png(path: Path, mask: np.ndarray, bits: int) -> None:
    """Gray of few bits, as MATLAB's BitDepth or an optimizer writes it."""
    per = 8 // bits
    rows = np.pad(mask, ((0, 0), (0, -mask.shape[1] % per))).reshape(len(mask), -1, per)
    packed = (rows << (8 - bits * np.arange(1, per + 1))).sum(2).astype(np.uint8)
    write_png(path, mask.shape, bits, 0, [row.tobytes() for row in packed])


def write_png(path: Path, size: tuple[int, int], bits: int, color: int, rows: list) -> None:
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    header = struct.pack(">IIBBBBB", size[1], size[0], bits, color, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    written = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))


def deep_png(path: Path, mask: np.ndarray, color: int, channels: int) -> None:
    """Class ids in 16 bits a channel, opaque where there is an alpha."""
    values = np.repeat(mask.astype(">u2")[..., None], channels, 2)
    if channels in (2, 4):
        values[..., -1] = 65_535
    write_png(path, mask.shape, 16, color, [row.tobytes() for row in values])


IDS = label(0, 1)
UNDERSTOOD = {
    "1 bit": lambda p: Image.fromarray(IDS * 255).convert("1").save(p),
    "16 bits": lambda p: Image.fromarray(IDS.astype(np.uint16)).save(p),
    "gray as RGB": lambda p: Image.fromarray(np.stack([IDS] * 3, 2)).save(p),
    "opaque RGBA": lambda p: Image.fromarray(np.dstack([IDS] * 3 + [label(255)])).save(p),
    "palette": lambda p: save(p, IDS, ((9, 9, 9), (200, 0, 0))),
    "lossless WebP": lambda p: Image.fromarray(IDS).save(p, format="WEBP", lossless=True),
    "gray palette of the ids": lambda p: save(p, IDS, ((0, 0, 0), (1, 1, 1))),
}


@pytest.mark.parametrize("kind", list(UNDERSTOOD))
def test_masks_that_are_unambiguous(folder, kind):
    for name in ("a", "b", "sub/c.d", "v"):
        UNDERSTOOD[kind](folder / "masks" / f"{name}.png")
    data, _ = opened(folder)
    np.testing.assert_array_equal(data.load("a")[1], IDS)


@pytest.mark.parametrize("ending", [".PNG", ".tif", ".TIFF", ".bmp"])
def test_masks_of_other_endings(folder, ending):
    (folder / "masks" / "a.png").unlink()
    save(folder / "masks" / f"a{ending}", label(1))
    assert values(opened(folder)[0], "a") == {1}


def only_ignored(folder: Path, *names: str) -> None:
    for name in names:
        save(folder / "masks" / f"{name}.png", label(IGNORE))


AMBIGUOUS = {  # what is done to the folder -> what the message says
    "0 and 255": (
        lambda f: [save(f / "masks" / f"{n}.png", label(0, 255)) for n in ("a", "b", "sub/c.d")],
        "no labeled mask holds class 1 (bright light), while they hold 255",
    ),
    "nothing labeled": (
        lambda f: only_ignored(f, "a", "b", "sub/c.d"),
        "all 3 labeled masks",
    ),
    "nothing to validate": (lambda f: only_ignored(f, "v"), "all 1 validation masks is ignored"),
    "JPEG": (
        lambda f: (f / "masks/a.png").unlink() or save(f / "masks/a.jpg", IDS),
        "masks/a.jpg: lossy compression",
    ),
    "a JPEG called .png": (
        lambda f: save(f / "masks/a.png", IDS, format="JPEG"),
        "masks/a.png: lossy compression",
    ),
    "lossy WebP": (
        lambda f: save(f / "masks/a.png", IDS, format="WEBP", quality=90),
        "a.png: lossy compression",
    ),
    "JPEG 2000": (
        lambda f: (
            save(f / "masks/v.png", label(0, 1, size=(40, 48)), format="JPEG2000")
            and save(f / "images/v.jpeg", noise(size=(40, 48)))
        ),
        "v.png: lossy compression",
    ),
    "RGB of 16 bits": (lambda f: deep_png(f / "masks/a.png", IDS, 2, 3), "a.png: 16 bits a"),
    "gray and alpha of 16 bits": (lambda f: deep_png(f / "masks/a.png", IDS, 4, 2), "a.png: 16 b"),
    "a page a class": (
        lambda f: save(
            f / "masks/a.png",
            IDS,
            format="TIFF",
            save_all=True,
            append_images=[Image.new("L", (8, 6))],
        ),
        "a.png: a mask of 2 pages",
    ),
    "2 bits": (lambda f: png(f / "masks/a.png", IDS, 2), "a.png: gray of less than 8 bits"),
    "4 bits": (lambda f: png(f / "masks/v.png", IDS, 4), "v.png: gray of less than 8 bits"),
    "shuffled grays": (
        lambda f: save(f / "masks/a.png", IDS, ((1, 1, 1), (0, 0, 0))),
        "a.png: its palette holds other grays than its indices",
    ),
    "other palettes": (
        lambda f: [
            save(f / "masks/a.png", IDS, ((0, 0, 0), (9, 0, 0))),
            save(f / "masks/v.png", IDS, ((9, 0, 0), (0, 0, 0))),
        ],
        "have different palettes",
    ),
    "two masks": (lambda f: save(f / "masks/a.bmp", IDS), "share an id"),
    "size": (lambda f: save(f / "masks/b.png", label(0, size=(5, 8))), "size 8x5 differs from 8x6"),
}


@pytest.mark.parametrize("kind", list(AMBIGUOUS))
def test_masks_that_are_refused_at_the_start(folder, kind):
    spoil, expected = AMBIGUOUS[kind]
    spoil(folder)
    text = message(opened, folder)
    assert expected in text and str(folder) in text, text


def test_a_class_without_pixels_is_said_where_nothing_is_ignored(folder, capsys):
    for name in ("a", "b", "sub/c.d"):
        save(folder / "masks" / f"{name}.png", label(0))
    opened(folder)
    assert "no labeled mask holds class 1 (bright light)" in capsys.readouterr().err


def test_a_small_draw_may_miss_a_class(folder):
    save(folder / "masks" / "a.png", label(0, 255))
    (folder / "few.txt").write_text("a")
    assert opened(folder, str(folder / "few.txt"))[1].labeled == ("a",)


def test_a_class_without_pixels_to_validate_on(folder, capsys):
    save(folder / "masks" / "v.png", label(0, 255))
    opened(folder)
    printed = capsys.readouterr().err
    assert "no validation mask holds class 1 (bright light), while they hold 255" in printed


@pytest.mark.parametrize("turn", [2, 3, 4, 6])
def test_a_mask_whose_size_does_not_tell_how_its_photo_was_turned(folder, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    square = {"size": (8, 8)}
    save(folder / "images" / "b.jpg", noise(**square), exif=exif)
    save(folder / "masks" / "b.png", label(0, 1, **square))
    text = message(opened, folder)
    assert "1 photos" in text and "turned or mirrored by EXIF" in text and "not tell" in text
    save(folder / "masks" / "b.png", label(0, 1, **square), exif=exif)  # turned as its photo
    assert opened(folder)


def test_orientations_that_are_stored_elsewhere_or_are_none(folder):
    exif = Image.Exif()
    exif[0x0112] = 9  # no such turn
    save(folder / "images" / "b.jpg", noise(), exif=exif)
    assert opened(folder)
    (folder / "images" / "b.jpg").unlink()
    exif[0x0112] = 8
    save(folder / "images" / "b.tif", noise(), exif=exif)
    assert "which EXIF turns by a quarter" in message(opened, folder)
    save(folder / "masks" / "b.png", label(0, 1, size=(8, 6)))
    assert opened(folder)[0].load("b")[1].shape == (8, 6)
    (folder / "images" / "b.tif").unlink()
    xmp = '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    save(folder / "images" / "b.png", noise(), pnginfo=info)
    assert opened(folder)[0].load("b")[1].shape == (8, 6)


def test_a_photo_that_exif_turns(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(folder / "images" / "b.jpg", noise(), exif=exif)
    assert "which EXIF turns by a quarter" in message(opened, folder)
    save(folder / "masks" / "b.png", label(0, 1, size=(8, 6)))  # drawn on the turned photo
    assert opened(folder)[0].load("b")[1].shape == (8, 6)


def test_masks_in_colors(folder):
    rgb = np.array([(128, 64, 128), (0, 0, 142)], np.uint8)
    for name in ("a", "b", "sub/c.d", "v"):
        save(folder / "masks" / f"{name}.png", rgb[IDS])
    assert "a mask in colors" in message(opened, folder)
    colors = "# label:color_rgb:parts:actions\nbright light:0,0,142::\ndark:128,64,128::\n"
    (folder / "labelmap.txt").write_text(colors)
    data, _ = opened(folder)
    assert data.classes == ("dark", "bright light")  # classes.txt gives the order
    np.testing.assert_array_equal(data.load("a")[1], IDS)
    save(folder / "masks" / "a.png", IDS, ((128, 64, 128), (0, 0, 142)))  # a palette of the colors
    np.testing.assert_array_equal(opened(folder)[0].load("a")[1], IDS)
    assert data.palette == ((128, 64, 128), (0, 0, 142))
    (folder / "labelmap.txt").unlink()
    (folder / "classes.txt").write_text("dark 128 64 128\nbright light 0 0 142\n")
    np.testing.assert_array_equal(opened(folder)[0].load("b")[1], IDS)
    save(folder / "masks" / "b.png", rgb[IDS] + np.uint8(1))
    assert "b.png: color 129 65 129 is no class's" in (text := message(data.load, "b"))
    assert "without smoothing" in text and "by a line `__ignore__ 129 65 129`" in text


def test_grays_that_stand_for_classes(folder):
    (folder / "classes.txt").write_text("dark 0 0 0\nbright light 255 255 255\n")
    for name in ("a", "b", "sub/c.d", "v"):
        save(folder / "masks" / f"{name}.png", IDS * 255)
    save(folder / "masks" / "b.png", IDS, ((0, 0, 0), (255, 255, 255)))
    Image.fromarray(IDS * 255).convert("1").save(folder / "masks" / "v.png")
    data, _ = opened(folder)
    for name in ("a", "b", "v"):
        np.testing.assert_array_equal(data.load(name)[1], IDS)
    (folder / "classes.txt").write_text("dark 0 0 0\nbright light 1 1 1\n")  # the ids themselves
    for name in ("a", "b", "sub/c.d", "v"):
        save(folder / "masks" / f"{name}.png", label(0, 1, 255))
    assert values(opened(folder)[0], "a") == {0, 1, 255}


COLORED = "wall 255 255 255\ncar 255 0 0\nfloor 0 0 0\n"


def colored(folder: Path, classes: str = COLORED, **masks) -> Path:
    """Masks in white, red and black, but for those given."""
    (folder / "classes.txt").write_text(classes)
    rgb = np.array([(255, 255, 255), (255, 0, 0), (0, 0, 0)], np.uint8)
    for name in ("a", "b", "sub/c.d", "v"):
        save(folder / "masks" / f"{name}.png", masks.get(name[0], rgb[label(0, 1, 2)]))
    return folder


@pytest.mark.parametrize("kind", ["gray", "1 bit"])
def test_a_gray_mask_among_colors_is_one_of_them(folder, kind):
    picture = Image.fromarray(label(255, 0))
    colored(folder, a=picture.convert("1") if kind == "1 bit" else picture)
    for split in ("full", "1"):  # the other masks tell, whether they are drawn or not
        np.testing.assert_array_equal(opened(folder, split)[0].load("a")[1], label(0, 2))
    save(folder / "masks" / "b.png", label(0, 1))  # a mask of ids among them
    assert "b.png: color 1 1 1 is no class's" in message(open_dataset("folder", folder).load, "b")


def test_gray_masks_alone_hold_ids(folder):
    gray = {name: label(0, 1, 2, 255) for name in "absv"}
    data, _ = opened(colored(folder, **gray))
    np.testing.assert_array_equal(data.load("a")[1], gray["a"])
    colored(folder, **gray | {"a": Image.fromarray(label(255, 0)).convert("1")})
    text = message(open_dataset("folder", folder).load, "a")
    assert "a.png: its black and white may be colors of classes.txt or the ids 0 and 1" in text


def test_white_to_ignore(folder):
    one_bit = Image.fromarray(label(255, 0)).convert("1")
    classes = "floor 0 0 0\ncar 255 0 0\n__ignore__ 255 255 255\n"
    data, _ = opened(colored(folder, classes, a=one_bit, b=label(255, 0)))
    for name in "ab":
        np.testing.assert_array_equal(data.load(name)[1], label(255, 0))


def test_ids_and_colors_side_by_side_where_no_gray_could_be_both(folder):
    classes = "floor 0 0 0\ncar 255 0 0\n"
    rgb = np.array([(0, 0, 0), (255, 0, 0)], np.uint8)
    everywhere = {name: rgb[IDS] for name in "bsv"}
    data, _ = opened(colored(folder, classes, a=IDS, **everywhere))
    for name in "ab":
        np.testing.assert_array_equal(data.load(name)[1], IDS)


def check_data(folder: Path) -> None:
    open_data(flags("folder", folder, "full", check_data=True))


def test_check_data_asks_about_255_beside_class_0(folder, capsys):
    save(folder / "masks" / "b.png", label(0, 255))
    save(folder / "masks" / "sub" / "c.d.png", label(255))
    with pytest.raises(SystemExit):
        check_data(folder)
    printed = capsys.readouterr().out
    assert f"note: 2 masks hold 255 and no class but 0 ({folder / 'masks' / 'b.png'}, " in printed


def test_check_data_reads_all_headers_first(folder):
    rough = {name: label(0, 1, 7) for name in ("a", "b")}
    for name, mask in rough.items():
        save(folder / "masks" / f"{name}.png", mask, format="JPEG", quality=20)
    text = message(check_data, folder)
    assert "2 of 6 samples are bad" in text and text.count("lossy compression changes") == 2


def test_check_data_prints_shares_of_good_masks_only(folder, capsys):
    for name in ("a", "b", "sub/c.d", "v"):
        save(folder / "masks" / f"{name}.png", label(0, 255))
    assert "give each class its color in classes.txt (`thing 255 255 255`)" in message(
        check_data, folder
    )
    assert "share" not in capsys.readouterr().out
    save(folder / "masks" / "a.png", label(0, 128, 255))
    assert "label value 128 is outside the 2 classes" in (text := message(check_data, folder))
    assert text.endswith("or give each class its color in classes.txt (`thing 255 255 255`)")


def test_check_data_aligns_its_table_and_says_where_unlabeled_images_lie(folder, capsys):
    (folder / "classes.txt").write_text("a\nb\n")
    save(folder / "images" / "masks" / "p.png", noise())
    save(folder / "images" / "masks" / "deep" / "q.png", noise())
    with pytest.raises(SystemExit):
        check_data(folder)
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines[:4]}) == 1, lines[:4]
    assert "images without labels: 2 in images/masks/, 2 in images/" in lines
    shutil.rmtree(folder / "images" / "masks")
    for name in ("x.tif", "y.bmp"):
        (folder / "images" / name).unlink()
    with pytest.raises(SystemExit):
        check_data(folder)
    assert "images without labels: none; add some to images/" in capsys.readouterr().out


def test_masks_of_other_names_are_said(folder):
    (folder / "masks" / "a.png").rename(folder / "masks" / "a_mask.png")
    (folder / "masks" / "b.png").rename(folder / "masks" / "b.gif")
    save(folder / "masks" / "x.png", label(0))  # of an unlabeled image
    text = message(opened, folder)
    assert "2 of 4 labels are missing" in text
    assert "masks/ holds 2 other files (b.gif, a_mask.png): a mask has its image's name" in text


def test_a_bad_mask_of_an_unlabeled_image_stops_no_training(folder):
    data = open_dataset("folder", folder)
    save(folder / "masks" / "x.png", noise())
    data = Folder(folder)
    samples = Samples(data, ("x",), WeakView(32, (1.0,)), "known")
    assert set(samples[0, 7][1].unique().tolist()) == {UNKNOWN, IGNORE}
    save(folder / "masks" / "x.png", label(1))
    assert set(Samples(data, ("x",), samples.view, "known")[0, 7][1].unique().tolist()) >= {1}


# ---- classes -------------------------------------------------------------------------------------

CLASSES = {
    "road\ncar\n": (("road", "car"), None),
    "road 128 64 128\nold car, 0, 0, 142\n": (
        ("road", "old car"), {(128, 64, 128): 0, (0, 0, 142): 1},
    ),
    "__ignore__\n_background_\ncar\n": (("_background_", "car"), None),
    "Pixel Value, Class\n0, background\n1, car\n": (("background", "car"), None),
    "id,name\n0,background\n1,car\n": (("background", "car"), None),
    "names:\n  0: background\n  1: car\n": (("background", "car"), None),
    "0 background\n1 car\n": (("background", "car"), None),
    "1 euro\n2 euro\n": (("1 euro", "2 euro"), None),
    "no coin\n0 euro\n1 euro\n": (("no coin", "0 euro", "1 euro"), None),
    "a 1 1 1\nb 2 2 2\n__ignore__ 9 9 9\n": (
        ("a", "b"), {(1, 1, 1): 0, (2, 2, 2): 1, (9, 9, 9): 255},
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", list(CLASSES))
def test_class_files(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    assert read_classes(tmp_path) == CLASSES[text]


@pytest.mark.parametrize(("text", "expected"), [
    ("a\nb\na\n", "class names occur twice: a"),
    ("# my classes\na\nb\n", "'# my classes' would be a class"),
    ("a\n__ignore__\nb\n", "__ignore__ must be the first line"),
    ("Pixel Value, Class\n1, a\n2, b\n", "its pixel values are not 0, 1, 2"),
    ("1 car\n0 background\n", "its pixel values are not 0, 1, 2"),
    ("1: background\n2: car\n", "its pixel values are not 0, 1, 2"),
    ("0 0 0 a\n128 64 128 b\n", "'0 0 0 a' holds a color; write lines as `road 128 64 128`"),
    ("a #000000\nb #804080\n", "'a #000000' holds a color"),
    ("a (0, 0, 0)\nb (1, 2, 3)\n", "'a (0, 0, 0)' holds a color"),
    ("a:0,0,0::\nb:1,2,3::\n", "'a:0,0,0::' holds a color"),
    ("a 1 2 3\nb 1 2 300\n", "the color of b is not one of 0..255"),
    ("a 1 2 3\nb\n", "'b' has no color"),
    ("a 1 2 3\nb 1 2 3\n", "two classes have one color"),
])  # fmt: skip
def test_class_files_that_are_refused(tmp_path, text, expected):
    (tmp_path / "classes.txt").write_text(text)
    assert expected in message(read_classes, tmp_path)


def test_labelmap_without_classes(tmp_path):
    (tmp_path / "labelmap.txt").write_text("# label:color_rgb\nbackground:0,0,0::\ncar:9,8,7::\n")
    assert read_classes(tmp_path) == (("background", "car"), {(0, 0, 0): 0, (9, 8, 7): 1})
    (tmp_path / "classes.txt").write_text("background\ntree\n")
    assert "has no color for tree" in message(read_classes, tmp_path)
    (tmp_path / "labelmap.txt").write_text("background 0 0 0\n")
    assert "is not CVAT's" in message(read_classes, tmp_path)


# ---- folders -------------------------------------------------------------------------------------


def test_hidden_files_are_no_data(folder):
    for name in ("._a.png", ".DS_Store", ".ipynb_checkpoints/v-checkpoint.png", ".Trash-0/f/v.png"):
        save(folder / "images" / name, noise(), format="PNG")
    assert open_dataset("folder", folder).extra_ids == ("x", "y")


def test_links_are_followed_once(folder, tmp_path):
    far = tmp_path / "far"
    save(far / "z.png", noise())
    (folder / "images" / "more").symlink_to(far)
    (far / "back").symlink_to(folder / "images")
    assert open_dataset("folder", folder).extra_ids == ("more/z", "x", "y")


@pytest.mark.parametrize("name", [
    "b_mask", "b.GT", "mask_b", "b-labelIds", "b_groundtruth", "b_color_mask", "sub/c.d_seg",
])  # fmt: skip
def test_masks_beside_images_are_refused(folder, name):
    save(folder / "images" / f"{name}.png", label(0, 1))
    text = message(open_dataset, "folder", folder)
    assert f"{name}.png seems to be the mask" in text and str(folder / "masks") in text


def test_names_that_only_look_like_a_mask_s(folder):
    for name in ("z_mask", "sub/b_mask", "b_2", "bmask", "mask"):
        save(folder / "images" / f"{name}.png", noise())
    assert {"z_mask", "sub/b_mask", "b_2", "bmask", "mask"} < {*Folder(folder).extra_ids}


def test_an_unreadable_folder_is_an_error(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="images"):
        images_under(folder / "images")


def test_names_in_other_encodings_and_normal_forms(tmp_path):
    apart, together = "caf\u0065\u0301", "caf\u00e9"
    for i, name in enumerate((apart, "b", "v")):
        save(tmp_path / "images" / f"{name}.png", noise(i))
    for name in (together, "b", "v"):
        save(tmp_path / "masks" / f"{name}.png", label(0, 1))
    (tmp_path / "labeled.txt").write_text(f"{together}.png\n", encoding="utf-16")
    (tmp_path / "val.txt").write_text("v\r\n")
    (tmp_path / "classes.txt").write_text("x\ny\n")
    os.rename(tmp_path / "images/b.png", os.fsencode(tmp_path) + b"/images/caf\xe9.png")
    data, split = opened(tmp_path, "labeled.txt")
    assert split.labeled == (together,) and len(split.unlabeled) == 1
    assert data.load(together)[1].max() == 1 and data.load(split.unlabeled[0], False)
    assert explain(UserError(split.unlabeled[0]))


def test_hidden_cities_are_no_data(tmp_path):
    make_cityscapes(tmp_path)
    before = open_dataset("cityscapes", tmp_path).train_ids
    train = tmp_path / "leftImg8bit" / "train"
    file = next(train.glob("*/*.png"))
    (train / ".ipynb_checkpoints").mkdir()
    shutil.copy(file, train / ".ipynb_checkpoints")
    assert open_dataset("cityscapes", tmp_path).train_ids == before
    (train / "backup").mkdir()
    shutil.copy(file, train / "backup")
    text = message(open_dataset, "cityscapes", tmp_path)
    assert "train images" in text and "occur twice" in text


def test_camvid_in_capitals(tmp_path):
    make_camvid(tmp_path, ".PNG")
    data = open_dataset("camvid", tmp_path)
    assert data.train_ids == ("a", "b") and data.load("a")


def test_a_validation_image_counts_once(tmp_path):
    folder = make_devkit(tmp_path)
    (folder / "SegmentationClassAug").mkdir()
    names = folder / "ImageSets" / "Segmentation" / "val.txt"
    names.write_text(2 * names.read_text())
    assert "val images" in (text := message(open_dataset, "voc", tmp_path)) and "twice" in text


# ---- lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [
    "a", "a.png", "./a.png", "images/a.png", "{root}/images/a.png", '"a"', "'a.png'", "a.jpg",
    "a.png masks/a.png", "images/a.png,masks/a.png", "a.png\tmasks/a", '"a.png", "a.png"',
    "images\\a.png", "a.png {root}/masks/a.png",
])  # fmt: skip
def test_lines_that_name_an_image(folder, line):
    (folder / "labeled.txt").write_text(f"# labeled by hand\n{line}\n".format(root=folder))
    assert open_dataset("folder", folder).train_ids == ("a",)


@pytest.mark.parametrize("line", [
    "other/a.png", "sub/a.png", "../a.png", "c.d", "a.png masks_fixed/a.png", "a.png b.png",
    "a.png masks/b.png", "a.png masks/a.png 0", "a 1", "a b", "masks/a.png", "/elsewhere/images/a",
])  # fmt: skip
def test_lines_that_do_not(folder, line):
    (folder / "labeled.txt").write_text(f"b\n{line}\n")
    text = message(open_dataset, "folder", folder)
    assert f"{folder / 'labeled.txt'}: 1 of 2 entries" in text and f"{line!r} (line 2)" in text


def test_names_with_spaces_commas_and_hashes():
    images = {name: Path(f"/d/images/{name}.png") for name in ("a b", "a, b", "#1", "x.y", "s/x")}
    text = "a b\na, b.png\n#1\n# 2\nimages/x.y.png\ns\\x.png"
    found = listed_ids(text, "list", images, lambda i: Path(f"/d/masks/{i}.png"))
    assert found == ["a b", "a, b", "#1", "x.y", "s/x"]


def test_a_published_set_knows_its_images_by_their_names(tmp_path):
    images = {"a_1": tmp_path / "leftImg8bit/train/a/a_1_leftImg8bit.png"}
    for line in ("a_1", "/x/a_1_leftImg8bit.png", "train/a/a_1_leftImg8bit.png t/a_1_gtFine.png"):
        assert listed_ids(line, "list", images) == ["a_1"]
    for line in ("a_2", "a_1_leftImg8bit.png gtFine/b_1_gtFine.png"):
        assert "entries name no image" in message(listed_ids, line, "list", images)


def test_long_lists_take_linear_time(tmp_path):
    ids = [f"f{i:06d}" for i in range(100_000)]
    images = {i: tmp_path / f"{i}.png" for i in ids}
    text = "\n".join((*ids, ids[3]))
    assert "occur twice: f000003;" in message(listed_ids, text, "list", images)


def test_a_text_file_that_is_none(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    assert "not a UTF-8 text file" in message(read_lines, tmp_path / "a.txt")


# ---- what a run was trained on -------------------------------------------------------------------


def test_fingerprint(folder):
    def prints(split="full"):
        data, drawn = opened(folder, split)
        return data.fingerprint(drawn)

    before = prints()
    assert prints() == before

    def changed() -> set[str]:
        return {key for key, value in prints().items() if value != before[key]}

    save(folder / "masks" / "a.png", label(1, 0, IGNORE))
    assert changed() == {"masks"}
    save(folder / "masks" / "a.png", label(0, 1, IGNORE))
    save(folder / "images" / "x.tif", noise(size=(9, 9)))
    assert changed() == {"sizes of the image files"}
    save(folder / "images" / "x.tif", noise(4))
    (folder / "classes.txt").write_text("bright light\ndark\n")
    assert changed() == {"classes"}
    (folder / "classes.txt").write_text("dark\nbright light\n")
    (folder / "classes.txt").write_text("dark 1 1 1\nbright light 0 0 0\n__ignore__ 255 255 255\n")
    assert changed() == {"colors"}
    (folder / "classes.txt").write_text("dark\nbright light\n")
    save(folder / "images" / "new.png", noise())
    assert changed() == {"unlabeled images", "sizes of the image files"}


# ---- weights -------------------------------------------------------------------------------------


def test_weights_of_others(tmp_path):
    source, target = DeepLabV3Plus(2, "resnet14"), DeepLabV3Plus(3, "resnet14")
    encoder = source.backbone.state_dict()
    files = {
        "bare": encoder,
        "module": {f"module.{key}": value for key, value in encoder.items()},
        "nested": {
            "epoch": 3,
            "state_dict": {f"module.q.{k}": v for k, v in encoder.items()},
        },
        "own": {"meta": {}, "evaluated": "teacher", "teacher": source.state_dict(), "step": 1},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        network = DeepLabV3Plus(3, "resnet14")
        load_weights(network, read_weights(tmp_path / name))
        for key, value in network.backbone.state_dict().items():
            assert torch.equal(value, encoder[key]), (name, key)
    head = network.head.fuse[0].weight  # of one of our own, the head comes too
    assert torch.equal(head, source.head.fuse[0].weight)
    assert network.classifier.weight.shape == target.classifier.weight.shape
    theirs = {f"backbone.{key}": value for key, value in encoder.items()}
    torch.save(theirs | {"classifier.4.weight": torch.zeros(21, 256, 1, 1)}, tmp_path / "deeplab")
    network = DeepLabV3Plus(3, "resnet14")
    load_weights(network, read_weights(tmp_path / "deeplab"))
    assert torch.equal(network.backbone.conv1.weight, encoder["conv1.weight"])
    two = {f"module.encoder_{k}.{key}": value for k in "qk" for key, value in encoder.items()}
    torch.save({"state_dict": two}, tmp_path / "moco")
    assert "several encoders (module.encoder_q., " in message(read_weights, tmp_path / "moco")
    del encoder["layer4.0.conv2.weight"]
    text = message(load_weights, network, encoder)
    assert text.startswith("1 of") and text.endswith(": layer4.0.conv2.weight")
    for content, expected in (([1], "holds no weights"), ({"a": 1}, "holds no weights")):
        torch.save(content, tmp_path / "bad")
        assert expected in message(read_weights, tmp_path / "bad")
    assert message(read_weights, tmp_path / "none") == "no such file"


# ---- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", None])
def test_damaged_arguments_of_a_run(quick, tmp_path, content):
    args = quick(supervised.Args, steps=1, split="4", batch_size=2)
    path = Path(supervised.main(args)["run_dir"]) / "args.json"
    path.unlink() if content is None else path.write_text(content)
    text = message(supervised.main, args)
    assert f"{path}: damaged" in text and f"delete {path.parent} to start anew" in text


@pytest.mark.parametrize("left", [{"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": ""}])
def test_variables_that_another_program_left(monkeypatch, capsys, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    code, _, err = call(supervised, monkeypatch, capsys, "--dataset", "shapes", "--device", "cpu")
    assert code == 2 and "RANK" in err and "not by torchrun: use it, or unset them" in err


# ---- machines ------------------------------------------------------------------------------------


def test_what_a_machine_says():
    def caused(error: Exception, cause: Exception) -> Exception:
        error.__context__ = cause
        return error

    said = {
        OSError(28, "No space left on device", "last.pt"): "make room",
        caused(RuntimeError("unexpected pos"), OSError(28, "No space left", "x")): "make room",
        OSError(24, "Too many open files"): "ulimit -n",
        RuntimeError("CUDA out of memory. Tried\nmore"): "memory. Tried; use --accumulate",
        RuntimeError("DefaultCPUAllocator: can't allocate memory"): "--crop-size",
        MemoryError(): "--accumulate",
        RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus."): "--num-workers 0",
        FloatingPointError("loss/sup is nan at step 3"): "at step 3",
        PermissionError(13, "Permission denied", "labeled.txt"): "labeled.txt",
    }
    for error, expected in said.items():
        assert expected in explain(error) and "\n" not in explain(error)
    assert explain(RuntimeError("size mismatch")) is None and explain(KeyError("x")) is None
