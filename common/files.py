"""The files people have: images, masks and lists, read as they are meant or refused with the mend.

Nothing is guessed in silence: what can be read in two ways is refused, with the file's name.
"""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageOps

from common import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
ORIENTATION = 0x0112  # EXIF tag
Colors = dict[tuple[int, int, int], int]  # of masks, and their class ids
Image.MAX_IMAGE_PIXELS = None  # a user's own aerial picture is no attack


def first(items, count: int = 3) -> str:
    """The first few of many things, for an error message."""
    return ", ".join(str(item) for item in items[:count]) + (", ..." if len(items) > count else "")


def normal(name: str) -> str:
    """A name by which files are compared: macOS stores accents apart from their letters."""
    return unicodedata.normalize("NFC", name)


def without_suffix(name: str) -> str:
    stem, dot, ending = name.rpartition(".")
    return stem if f"{dot}{ending.lower()}" in IMAGE_SUFFIXES and stem else name


def read_text(path: Path) -> str:
    """A text file, in UTF-8, or in UTF-16 as Windows writes it."""
    if not path.exists():
        raise UserError(f"{path}: no such file; the data set needs it")
    data = path.read_bytes()
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")  # a byte order mark is left out
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text file ({error}); save it as one") from None


def read_lines(path: Path) -> tuple[str, ...]:
    return tuple(line.strip() for line in read_text(path).splitlines() if line.strip())


def visible(paths) -> list[Path]:
    """Sorted, without hidden files: .DS_Store, and the ._name that a Mac leaves beside each."""
    return sorted(path for path in paths if not path.name.startswith("."))


def images_under(folder: Path, twins: bool = False) -> tuple[dict[str, str], list[Path]]:
    """({relative name without ending: file} of the images, other files); links are followed.

    Hidden files and folders are no data. OSError where a folder cannot be read. Two images that
    differ in their ending alone keep it with `twins`, and are an error without.
    """

    def stop(error: OSError) -> None:
        raise error

    images: dict[str, str] = {}  # no Paths, which take longer to make than a list to read
    others, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        if real in seen:  # a link back to a folder above it
            folders.clear()
            continue
        seen.add(real)
        inner = Path(place).relative_to(folder).as_posix()
        for name in sorted(name for name in names if name[0] != "."):
            file = os.path.join(place, name)
            if os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
                others.append(Path(file))
                continue
            key = normal(name if inner == "." else f"{inner}/{name}")
            twin = images.setdefault(without_suffix(key), file)
            if twin is not file and not twins:
                raise UserError(f"{file} and {twin} share an id; rename or remove one")
            if twin is not file:
                images[key] = file
    return dict(sorted(images.items())), others


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file; whatever goes wrong with it becomes a UserError that names it."""
    try:
        with Image.open(path) as file:
            yield file
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    except (SyntaxError, ValueError, EOFError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.errno:  # the system's word, not Pillow's
        return UserError(f"{path}: cannot be read ({error.strerror})")
    mend = "replace it, or convert it to an 8-bit PNG"
    return UserError(f"{path}: cannot be read as an image ({error}); {mend}")


def _turn(file: Image.Image) -> None:
    with suppress(Exception):  # damaged EXIF, of which Pillow raises many kinds; pixels are sound
        ImageOps.exif_transpose(file, in_place=True)


def orientation(file: Image.Image) -> int:
    """EXIF's (or XMP's) orientation, 1 to 8; from 5 on width and height change places."""
    if file.format == "PNG" and not {"exif", "XML:com.adobe.xmp"} & file.info.keys():
        return 1  # or Pillow would decode the whole file to look for it at the end
    with suppress(Exception):  # likewise
        turn = int(file.getexif().get(ORIENTATION, 1))
        return turn if 1 <= turn <= 8 else 1
    return 1


def _turned_size(file: Image.Image) -> tuple[int, int]:
    size = file.size
    if file.format == "TIFF":  # some versions of Pillow give the turned size, some the stored
        size = (file.tag_v2[256], file.tag_v2[257])
    return size if orientation(file) < 5 else size[::-1]


def read_image(path: Path) -> np.ndarray:
    """Any image as uint8 (H, W, 3) RGB, turned as EXIF says.

    16-bit gray is scaled by the bits that the image uses (12-bit data in 16 bits keep their
    contrast), float gray from [0, 1].
    """
    with opened(path) as file:
        stored = str(file.tile)  # after decoding Pillow no longer tells 16 bits from 8
        _turn(file)
        if file.mode.startswith("I") or file.mode == "F":
            return np.repeat(_eight_bits(np.asarray(file), path)[..., None], 3, axis=2)
        image = np.array(file if file.mode == "RGB" else file.convert("RGB"))
        if ";16" in stored and image.max() < 32:
            raise UserError(f"{path}: uses few of its 16 bits; convert it to 8 bits a channel")
        return image


def _eight_bits(values: np.ndarray, path: Path) -> np.ndarray:
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and 0 <= low <= high <= 1:
        return (255 * values).round().astype(np.uint8)
    if values.dtype.kind != "f" and low >= 0:
        return (values >> max(0, int(high).bit_length() - 8)).astype(np.uint8)
    raise UserError(
        f"{path}: holds {values.dtype} values from {low:g} to {high:g}, whose range only you know; "
        "convert it to 8 bits"
    )


def remarks(path: Path) -> list[str]:
    """What a reader of this image should know, in a few words each; usually nothing."""
    found = []
    with opened(path) as file:
        pages = getattr(file, "n_frames", 1)
        if pages > 1 and file.format != "MPO":  # of a phone's photo and its preview
            found.append(f"has {pages} pages or frames, the first is used")
        if file.has_transparency_data and file.convert("RGBA").getextrema()[3][0] < 255:
            found.append("is transparent in places, where the colors under it are used")
    return found


def check_mask(path: Path, image: Path, colors: Colors | None = None) -> tuple[int, ...] | None:
    """Refuse, by its header alone, a mask that cannot be this image's or is ambiguous.

    Returns its palette, to be compared with others'; None where its values need none, or where
    `colors` say what they mean.
    """
    with opened(image) as file:
        turn, size = orientation(file), _turned_size(file)
    with opened(path) as file:
        mask_size = _turned_size(file)
        if mask_size != size:
            raise _size_error(path, mask_size, image, size, turn)
        if _lossy(file, path):
            raise UserError(f"{path}: lossy compression changes class ids; save masks as PNG")
        if (pages := getattr(file, "n_frames", 1)) > 1:
            raise UserError(f"{path}: a mask of {pages} pages or frames; save one mask a file")
        if file.mode == "L" and any(f"L;{bits}" in str(file.tile) for bits in (2, 4)):
            raise UserError(f"{path}: gray of less than 8 bits; save class ids as 8-bit gray")
        if ";16" in str(file.tile) and file.mode[:1] != "I":  # Pillow keeps the high 8 of them
            raise UserError(f"{path}: 16 bits a channel; save class ids as 8-bit gray")
        if file.mode != "P" or colors:
            return None
        palette = tuple(file.getpalette("RGB"))
    if all(a == b == c for a, b, c in zip(*[iter(palette)] * 3, strict=True)):
        if palette[::3] != tuple(range(len(palette) // 3)):
            raise UserError(
                f"{path}: its palette holds other grays than its indices, so either may be the "
                "class ids; save class ids as 8-bit gray"
            )
        return None
    return palette


def _lossy(file: Image.Image, path: Path) -> bool:
    if file.format == "WEBP":  # either; only a lossless one begins so
        with path.open("rb") as stored:
            return stored.read(16)[12:] != b"VP8L"
    lossy = ("JPEG", "MPO", "JPEG2000", "AVIF")
    return file.format in lossy or file.info.get("compression") == "jpeg"


def turned_alike(path: Path, image: Path) -> bool:
    """Whether EXIF turns or mirrors an image but not its mask, and no size tells which is meant."""
    with opened(image) as file:
        turn, (width, height) = orientation(file), file.size
    if turn == 1 or (turn > 4 and width != height):
        return False
    with opened(path) as file:
        return orientation(file) != turn


def _size_error(path, size, image, image_size, turn) -> UserError:
    width, height = image_size
    text = f"{path}: size {size[0]}x{size[1]} differs from {width}x{height} of {image}"
    if turn > 4 and size == image_size[::-1]:
        return UserError(
            f"{text}, which EXIF turns by a quarter while its mask was drawn on the stored pixels; "
            "store the image turned (mogrify -auto-orient), or turn the mask"
        )
    return UserError(f"{text}; they must agree")


def read_mask(path: Path, colors: Colors | None = None, gray_is_color: bool = False) -> np.ndarray:
    """A mask as uint8 (H, W) ids: gray values or palette indices, else colors by this table.

    With `gray_is_color` the table tells what gray values mean, too. Gray stored as RGB is read as
    gray where there is no table, and a 1-bit mask as 0 and 1.
    """
    with opened(path) as file:
        _turn(file)
        if colors and (file.mode == "P" or (file.mode in ("L", "1") and gray_is_color)):
            return _ids_of_colors(np.asarray(file.convert("RGB")), colors, path)
        black, white = (0, 0, 0), (255, 255, 255)
        if colors and file.mode == "1" and (colors.get(black, 0), colors.get(white, 1)) != (0, 1):
            raise UserError(
                f"{path}: its black and white may be colors of classes.txt or the ids 0 and 1; "
                "save it as RGB, or class ids as 8-bit gray"
            )
        if file.mode in ("L", "P", "1"):
            return np.array(file, dtype=np.uint8)
        if file.mode.startswith("I"):
            values = np.asarray(file)
            if not 0 <= values.min() <= values.max() <= 255:
                worst = values.max() if values.max() > 255 else values.min()
                raise UserError(f"{path}: label value {worst} is outside 0..255; use class ids")
            return values.astype(np.uint8)
        if file.mode == "F":
            raise UserError(f"{path}: a mask of floating-point values; save class ids, 8-bit gray")
        if file.has_transparency_data and file.convert("RGBA").getextrema()[3][0] < 255:
            raise UserError(f"{path}: a mask that is transparent in places; save it without alpha")
        rgb = np.asarray(file.convert("RGB"))
        if colors:
            return _ids_of_colors(rgb, colors, path)
        if (rgb == rgb[..., :1]).all():
            return rgb[..., 0].copy()
        raise UserError(
            f"{path}: a mask in colors; give them in classes.txt (`road 128 64 128`), put CVAT's "
            "labelmap.txt beside that, or save class ids as 8-bit gray"
        )


def reads_gray(colors: Colors, masks: Iterable[Path]) -> bool:
    """Whether gray masks of a data set hold colors of its table, not ids.

    So they do where the table knows grays alone (`thing 255 255 255`), or where other masks are in
    color: a PNG optimizer stores a mask as gray that happens to show only grays.
    """
    grays = {color[0]: i for color, i in colors.items() if len(set(color)) == 1}
    if all(gray == i < 255 for gray, i in grays.items()):  # either way the same; white may be 1 bit
        return False
    return len(grays) == len(colors) or any(map(_in_color, masks))


def _in_color(path: Path) -> bool:
    with opened(path) as file:
        return file.mode not in ("L", "1", "F") and file.mode[0] != "I"


def _ids_of_colors(rgb: np.ndarray, colors: Colors, path: Path) -> np.ndarray:
    table = sorted((red << 16 | green << 8 | blue, i) for (red, green, blue), i in colors.items())
    codes = np.array([code for code, _ in table])
    ids = np.array([i for _, i in table], np.uint8)
    pixels = rgb.astype(np.int64) @ (65_536, 256, 1)
    place = np.searchsorted(codes, pixels).clip(max=len(codes) - 1)
    if (wrong := codes[place] != pixels).any():
        color = " ".join(map(str, rgb[wrong][0]))
        raise UserError(
            f"{path}: color {color} is no class's; save masks without smoothing, add it to the "
            f"classes' colors, or ignore it by a line `__ignore__ {color}`"
        )
    return ids[place]


def read_boxes(path: Path) -> list[tuple[str, int, int, int, int]]:
    """(name, top, left, bottom, right) of the objects in an annotation of VOC's form, half-open.

    The file counts rows and columns from 1 and includes the last; boxes of an object's parts are
    no objects.
    """
    try:
        rows = []
        for thing in ElementTree.parse(path).iterfind("object"):
            left, top, right, bottom = (
                round(float(thing.findtext(f"bndbox/{edge}")))
                for edge in ("xmin", "ymin", "xmax", "ymax")
            )
            rows.append((thing.findtext("name").strip(), top - 1, left - 1, bottom, right))
        return rows
    except Exception as error:  # a damaged file raises many kinds
        raise UserError(f"{path}: not boxes in VOC's form ({error}); replace it") from None


def check_boxes(path: Path, image: Path) -> set[str]:
    """The names in an annotation of VOC's form; refuses boxes that cannot be this image's."""
    rows = read_boxes(path)
    with opened(image) as file:
        turn, (width, height) = orientation(file), _turned_size(file)
    said = [ElementTree.parse(path).findtext(f"size/{side}", "0") for side in ("width", "height")]
    said = tuple(int(side) if side.strip().isdecimal() else 0 for side in said)
    if turn != 1 and (turn < 5 or width == height or said != (width, height)):
        raise UserError(
            f"{image}: EXIF turns it, and {path} does not say which pixels its boxes are of; save "
            "the photo turned, without EXIF, and draw the boxes on that"
        )
    if all(said) and said != (width, height):
        raise UserError(
            f"{path}: boxes of a picture of {said[0]} x {said[1]}, but {image} has {width} x "
            f"{height}; draw them on this image"
        )
    for name, top, left, bottom, right in rows:  # some tools are a pixel off, some write shares
        inside = -1 <= left < right <= width + 1 and -1 <= top < bottom <= height + 1
        if not inside or max(right, bottom) <= 1:
            raise UserError(
                f"{path}: {name} from ({left + 1}, {top + 1}) to ({right}, {bottom}) is no box of "
                f"pixels of {image}, {width} x {height}; write xmin, ymin, xmax, ymax in pixels"
            )
    return {row[0] for row in rows}


def read_classes(root: Path) -> tuple[tuple[str, ...], Colors | None]:
    """Class names of a folder, in the order of their ids, and the colors of its masks, if any.

    classes.txt holds a name a line, with or without a color (`road 128 64 128`), or is what labelme
    (`__ignore__` first) or Roboflow (`0, road` under a header) wrote; CVAT's labelmap.txt gives the
    colors, and the names where classes.txt is missing.
    """
    path, map_path = root / "classes.txt", root / "labelmap.txt"
    entries = {}
    if map_path.is_file():  # background:0,0,0::
        rows = [row for row in read_lines(map_path) if not row.startswith("#")]
        found = [re.fullmatch(r"(.+?):(\d+),(\d+),(\d+)(:.*)?", row) for row in rows]
        if not all(found):
            raise UserError(f"{map_path}: {rows[found.index(None)]!r} is not CVAT's name:R,G,B::")
        entries = {row[1]: tuple(map(int, row.group(2, 3, 4))) for row in found}
    if entries and not path.is_file():
        path, lines = map_path, list(entries)
    else:
        lines = list(read_lines(path))
    lines = _unnumbered(lines, path)
    if comments := [line for line in lines if line.startswith("#")]:
        raise UserError(f"{path}: {comments[0]!r} would be a class; take comments out of it")
    with_color = [re.fullmatch(r"(.+?)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\d+)", line) for line in lines]
    if any(with_color):
        if not all(with_color):
            raise UserError(f"{path}: {lines[with_color.index(None)]!r} has no color, others have")
        lines = [line[1] for line in with_color]
        entries = {line[1]: tuple(map(int, line.group(2, 3, 4))) for line in with_color}
    form = re.compile(r"\d[\s,;:/]+\d+[\s,;:/]+\d|#[0-9A-Fa-f]{6}\b")  # of a color in a name
    if other := [line for line in lines if form.search(line)]:
        raise UserError(f"{path}: {other[0]!r} holds a color; write lines as `road 128 64 128`")
    if high := [name for name, color in entries.items() if max(color) > 255]:
        raise UserError(f"{path}: the color of {first(high)} is not one of 0..255")
    if twice := [name for name, count in Counter(lines).items() if count > 1]:
        raise UserError(f"{path}: class names occur twice: {first(twice)}; tell them apart")
    if "__ignore__" in lines:
        if not entries and lines[0] != "__ignore__":
            raise UserError(f"{path}: __ignore__ must be the first line (it has no id), or go")
        lines.remove("__ignore__")
    if entries and (unknown := [name for name in lines if name not in entries]):
        raise UserError(f"{map_path}: has no color for {first(unknown)} of {path.name}")
    if not 1 < len(lines) < 255:
        raise UserError(f"{path}: needs 2 to 254 lines, one class name each, has {len(lines)}")
    ids = {name: i for i, name in enumerate(lines)} | {"__ignore__": 255}
    colors = {entries[name]: i for name, i in ids.items() if name in entries}
    if len(colors) < len([name for name in ids if name in entries]):
        raise UserError(f"{path}: two classes have one color; tell them apart")
    return tuple(lines), colors or None


def _unnumbered(lines: list[str], path: Path) -> list[str]:
    """Names from lines that number them: `0, road` under a header or none, or `0 road`."""
    rows = [re.fullmatch(r"(\d+)(\s*[:,;=\t]\s*| +)([^\d\s].*)", line) for line in lines]
    apart = all(row[2].strip(" ") for row in rows[1:] if row)  # by more than spaces
    if len(rows) > 2 and not rows[0] and apart and all(rows[1:]):
        del rows[0]
    if not rows or not all(rows):
        return lines
    numbers = [int(row[1]) for row in rows]
    if numbers == list(range(len(numbers))):
        return [row[3] for row in rows]
    if not apart and min(numbers) > 0:  # `1 euro` and `2 euro` are names
        return lines
    raise UserError(
        f"{path}: its pixel values are not 0, 1, 2, ... in this order; sort the lines, and "
        "renumber the masks if these do not begin at 0"
    )


def listed_ids(
    text: str,
    source: str,
    images: Mapping[str, Path],
    mask_of: Callable[[str], Path] | None = None,
    where: str = "",
) -> list[str]:
    """Image ids that a list names, in its order, a line each; UserError names the bad lines.

    A line holds an id, a file name or a path, relative or absolute, perhaps in quotes, perhaps with
    the image's mask in a second column. Never another image than the one named: a path must end as
    the image's own, and a second column as that of its mask.

    Args:    images: {id: path of its image}; source, where: for the message
             mask_of: path of an id's mask; None: file names are unique, so folders do not count,
                 and a mask's name begins with the id
    """
    exact = {normal(image_id): image_id for image_id in images}

    @cache
    def by_name() -> dict[str, list[str]]:
        found = defaultdict(list)
        for image_id, path in images.items():
            found[_parts(path)[-1]].append(image_id)
        return found

    def find(words: str) -> str | None:
        parts = _parts(words.strip(" \t\"'").replace("\\", "/"))
        if "/".join(parts) in exact:
            return exact["/".join(parts)]
        for image_id in by_name().get(parts[-1], ()) if parts else ():
            whole = len(parts) > image_id.count("/") and _ends_with(images[image_id], parts)
            if whole or not mask_of:
                return image_id
        return None

    def image_of(line: str) -> str | None:
        if line in exact or without_suffix(line) in exact:
            return exact.get(line) or exact[without_suffix(line)]
        if image_id := find(line):
            return image_id
        for separator in ("\t", ",", ";", None):
            columns = [column.strip(" \t\"'") for column in line.split(separator) if column.strip()]
            if len(columns) == 2 and (image_id := find(columns[0])):
                mask = _parts(columns[1].replace("\\", "/"))
                own = (
                    _ends_with(mask_of(image_id), mask)
                    if mask_of
                    else mask[-1].startswith(image_id)
                )
                return image_id if own else None
        return None

    ids, bad = [], []
    for number, line in enumerate(map(normal, text.splitlines()), 1):
        image_id = image_of(line.strip())
        if image_id or line.strip()[:1] not in ("", "#"):  # a comment, if no image is called so
            ids.append(image_id)
            bad += [] if image_id else [f"{line.strip()!r} (line {number})"]
    if bad:
        raise UserError(
            f"{source}: {len(bad)} of {len(ids)} entries name no image{where}, or another's mask: "
            f"{first(bad)}; correct them, or add the files"
        )
    if twice := [image_id for image_id, count in Counter(ids).items() if count > 1]:
        raise UserError(f"{source}: entries occur twice: {first(twice)}; remove the repeated")
    if not ids:
        raise UserError(f"{source}: is empty; write one image id per line")
    return ids


def _parts(path: str | Path) -> tuple[str, ...]:
    """Of a path, without `.` and the image's ending."""
    parts = [part for part in normal(str(path)).split("/") if part not in ("", ".")]
    return (*parts[:-1], without_suffix(parts[-1])) if parts else ()


def _ends_with(path: Path, parts: tuple[str, ...]) -> bool:
    places: Iterable[str] = (os.path.abspath(path), os.path.realpath(path))
    return bool(parts) and any(_parts(place)[-len(parts) :] == parts for place in places)


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """A state dict, from what people have: a bare one, one inside a training checkpoint, with the
    prefix of a wrapper, or the evaluated network of a checkpoint of these scripts."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError("no such file") from None
    except Exception as error:  # torch raises many kinds for a bad file
        raise UserError(f"not a file of weights ({type(error).__name__})") from None
    names = ("state_dict", "model_state_dict", "model", "network", "teacher", "student")
    for name in (state.get("evaluated"), *names) if isinstance(state, dict) else ():
        if isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not any(torch.is_tensor(v) for v in state.values()):
        raise UserError("holds no weights by their names")
    stem = "layer1.0.conv1.weight"  # of a ResNet; what stands before it is a wrapper's
    prefixes = [key.removesuffix(stem) for key in state if key.endswith(stem)]
    if len(prefixes) > 1:  # such as MoCo's two
        raise UserError(f"holds several encoders ({first(prefixes)}); save one as a state dict")
    prefix = "".join(prefixes).removesuffix("backbone.")
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def load_weights(network: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Into the whole network, or into its `backbone` if the state has no head like ours.

    The classifier keeps its start where the classes are others; all else must be there and fit.
    """
    whole = any(key.startswith("head.") for key in state)
    part = network if whole else network.backbone
    if not whole:  # of another kind of segmentation network, such as torchvision's
        state = {key.removeprefix("backbone."): value for key, value in state.items()}
    own = {k: v for k, v in part.state_dict().items() if not k.endswith("num_batches_tracked")}
    fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    lost = [key for key in own if key not in fits and not (whole and key.startswith("classifier."))]
    if lost:
        raise UserError(f"{len(lost)} of {len(own)} tensors are missing or differ: {first(lost)}")
    part.load_state_dict(fits, strict=False)
