"""Which images keep their labels: published lists, draws by seed, and the user's own list files.

The same ratio of two families is not the same task (the cps lists take 14 % of their labeled VOC
images from the 1,464 finely annotated ones, the u2pl lists 100 % at 1/16 and 1/8), so every split
carries a name and a digest of its labeled ids. Downloads are resumed and verified by SHA-256.
"""

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from lzma import LZMAError
from pathlib import Path

import torch
from tqdm import tqdm

from common import UserError
from common.files import listed_ids, read_text, without_suffix

RAW = "https://raw.githubusercontent.com"
TORCHSEMISEG_URL = f"{RAW}/charlesCXK/TorchSemiSeg/5e0c29c02738728b6848a732817db15620a6e034/DATA"
UNIMATCH_URL = f"{RAW}/LiheYoung/UniMatch/0324f3dd4a22128105a5eb135d2586c0bb3cc647/splits/pascal"
TRIES, PAUSE = 4, 1.0  # transfers per call of `fetch`, and the seconds between two of them

FULL_SIZE = {"voc": 10582, "cityscapes": 2975}  # images in the full lists that the families divide
CITYSCAPES_TRAIN = "b45be91d3bf8ebcc84214dc2b6c3867cd604a3d2ae493f1b42e7a3a211e1ebc3"  # train.txt
_SUMS = """
voc        cps       1/16 7dada8ccc5eb6309b4b81e172dfc24f0d83ea72078675083778ca10487182748
voc        cps       1/8  df63f50a798512c3befb5364052733bd8bc169f609e034e9f55b5853798ead10
voc        cps       1/4  62c450787069b36d88ea7bb35895a808885720ae833bae8b9c81775731062ea1
voc        cps       1/2  192132b4f645339dd143850359d4e27bb62ba3ce447553a07de23fbff4f0c8b9
voc        u2pl      1/16 a58cf5eda18c8e060c8fef0233b388b488e62e5903076fed90b5bd34cf6735d3
voc        u2pl      1/8  cebe5f2fda695dd72ff3336d6bfef95967c903fe4d404d9827a42c5fbc1dfd8a
voc        u2pl      1/4  b740bcf1ac91477ff0df913594ea70a00ced359a007a4050cac487f136470fa4
voc        pseudoseg 1/16 f9bb25964b8e110f8627a72ae8dac46e2434542d980c09d5ede2e71bc644d549
voc        pseudoseg 1/8  059a72de4349da85987c6d67746b9cb4adf3aed4d4cd22e72c78fa2f2f75c3c5
voc        pseudoseg 1/4  49a153ad29a53e4af0d028b3c8daf7a41a68b91adb5a4cffed3112d7b2c64fd2
voc        pseudoseg 1/2  6a7f49d09dce47787d2a4ada72119fea9a1c75f10048fdcb8e03b99cbd7d6da7
voc        classic   92   8a02aa6a1253178b105bd25b36f0a27daeedf6b3959f399aa47d24783f3a8306
voc        classic   183  de3f4680391cb15324402dae17ac0919933d0d9004c11a641c924f3f67147f9f
voc        classic   366  74f6bd1e459a8b46fc204529d70b603769f8a45aef4553df8a5c04b5698e77b7
voc        classic   732  02c8ec5b62e27364f5bc91eb95bccf54debaa721e9d31c50c07507aea258fd0f
voc        classic   1464 b20486876df309c57c8230e957b2957fff5392ff5cb11f225e8453ed6c50ba3e
cityscapes cps       1/16 4f2712f22e53acdf6e359c5afc4b10fa06725ff1e54b36abcf5dafc759b4405b
cityscapes cps       1/8  beee3025dd198cee48047a1a9a131adbd859ab1bdb7dfbb45df3583409720ed7
cityscapes cps       1/4  1eff973e47da3c5988b07891589faf3a41feef582ea1deae0dc22fad2ec1aba7
cityscapes cps       1/2  79cc85ca788bdf79d71f560ec597e30057056a7457971c4e51198a93b9521921
"""
PUBLISHED = {  # (data set, family, size): SHA-256 of the published labeled file
    tuple(key): sha256 for *key, sha256 in map(str.split, _SUMS.strip().splitlines())
}
PSEUDOSEG_UNLABELED = {  # SHA-256; only this family's unlabeled images are not simply all others
    "1/16": "676a6bd82f285e2e65db5444c1983f999c8827918c25a92854bd9aa9e0a0c2e0",
    "1/8": "1a2db3987cbf59c9b0f5df5371497e63d154caccdd664d04f16a081b611d934a",
    "1/4": "6d81e371b9623175180fa93001fff4403432153436b38d5b59a0eb586d1826ae",
    "1/2": "a891dcb1f2e3d8168c15653fa639281a2e4826717ff7981c64c56af6abe07b29",
}


@dataclass(frozen=True)
class Split:
    """Labeled and unlabeled image ids, both sorted, so that `digest` fixes the labeled order."""

    name: str  # "cps:1/8", "20 images, split seed 0", "list foo.txt"
    slug: str  # the same for directory names: "cps-1_8", "n20-d0", "foo-1f0a2b3c"
    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    digest: str  # first 8 hex digits of the SHA-256 of the sorted labeled ids, each with a "\n"
    fine: int | None = None  # labeled images among VOC's finely annotated ones; None elsewhere

    @property
    def identity(self) -> str:
        """One line that tells this task from others of the same ratio."""
        labeled = f"{len(self.labeled)} labeled"
        if self.fine is not None:
            labeled += f" ({self.fine} finely annotated, {self.fine / len(self.labeled):.1%})"
        unlabeled = f"{len(self.unlabeled)} unlabeled images"
        return f"{self.name}: {labeled} + {unlabeled}, sha256 {self.digest}"


def make_split(
    split,
    dataset,
    train_ids,
    data_root,
    split_seed=None,
    unlabeled="rest",
    fine_ids=None,
    extra_ids=(),
    val_ids=(),
    find=None,
) -> Split:
    """The labeled and unlabeled image ids that `--split` and its companions ask for.

    Args:    split: "1/8", "<family>:<size>", a number of images, "full", or the path of a list
             train_ids: ids that may be labeled; extra_ids: images that never have a label
             split_seed: >= 0, draws a ratio or number; None: the published list, else seed 0
             unlabeled: "rest", or "all": every image, the labeled ones too, without their labels
             fine_ids: VOC's finely annotated ids, to be counted; val_ids: refused in training
             find: (text of a list, its name) -> ids; None: lines are ids or names of their files
    Returns: Split; its `unlabeled` is empty where "rest" leaves no image
    Raises:  UserError for every mistake in these, in the list file, or in the data folder
    """
    flag, known = f"--split {split}", set(train_ids)
    if unlabeled not in ("rest", "all"):
        raise UserError(f"--unlabeled {unlabeled}: use rest or all")
    if split_seed is not None and not 0 <= split_seed < 2**63:
        raise UserError(f"--split-seed {split_seed}: use a number from 0 to 2^63 - 1")
    if not known:
        raise UserError(f"the training list of {dataset} is empty; it needs at least one image")
    _refuse(Counter(train_ids) - Counter(known), f"remove the repeated ids of {dataset}'s list")
    _refuse(known & set(extra_ids), f"{dataset}: keep ids in the labeled or the unlabeled list")

    find = find or partial(listed_ids, images={i: Path(i) for i in train_ids})
    name, slug, labeled, rest = _choose(split, dataset, train_ids, data_root, split_seed, find)
    chosen = set(labeled)
    if not chosen:
        raise UserError(f"{flag} names no image; write one image id per line")
    _refuse(
        chosen.union(rest or ()) - known,
        f"{flag} names ids that are not among the {len(known)} training images of {dataset}; "
        f"correct them, or complete the data in {data_root}",
    )
    pool = (known - chosen if rest is None else set(rest)) | set(extra_ids)
    if unlabeled == "all" or split == "full":
        pool = known | set(extra_ids)
    _refuse(
        (chosen | pool) & set(val_ids),
        f"{flag}: remove the ids of validation images from the training lists",
    )
    digest = _sha256("".join(f"{i}\n" for i in sorted(chosen)).encode("utf-8", "surrogateescape"))[
        :8
    ]
    fine = None if fine_ids is None else len(chosen & set(fine_ids))
    return Split(
        name,
        slug or f"{_slug(split)}-{digest}",
        tuple(sorted(chosen)),
        tuple(sorted(pool)),
        digest,
        fine,
    )


def _choose(split, dataset, train_ids, data_root, split_seed, find):
    """Name, slug ("" for a list file), labeled ids, and unlabeled ids (None: all others)."""
    flag, (family, _, size) = f"--split {split}", split.rpartition(":")
    ratio, number = re.fullmatch(r"1/([0-9]+)", split), re.fullmatch(r"[+-]?[0-9]+", split)
    if ratio and int(ratio[1]) < 2:
        raise UserError(f"{flag}: a ratio is 1/2 or smaller; use full to label every image")
    if ratio and split_seed is None and (dataset, "cps", "1/8") in PUBLISHED:
        family, size = "cps", split

    if family in {key[1] for key in PUBLISHED}:
        if split_seed is not None:
            raise UserError(f"{flag} is a published list, which no seed changes; drop --split-seed")
        labeled, rest = _published(flag, family, size, dataset, train_ids, data_root)
        return f"{family}:{size}", f"{family}-{size.replace('/', '_')}", labeled, rest
    if ratio or number:
        seed, most = split_seed or 0, len(train_ids)
        count = int(split) if number else max(1, round(most / int(ratio[1])))
        if not 1 <= count <= most:
            raise UserError(f"{flag}: {dataset} has {most} training images; use 1 to {most}")
        name, slug = (f"{count} images", f"n{count}") if number else (split, f"1_{ratio[1]}")
        return f"{name}, split seed {seed}", f"{slug}-d{seed}", draw(train_ids, count, seed), None
    if split_seed is not None:
        raise UserError(f"{flag} is not drawn, so a seed has no effect; drop --split-seed")
    if split == "full":
        return "full", "full", train_ids, None

    places = [place for place in (Path(split), Path(data_root) / split) if place.exists()]
    if not places:
        forms = ", ".join({key[1]: ":".join(key[1:]) for key in PUBLISHED}.values())
        raise UserError(
            f"{flag}: no such file, and none of the known forms: 1/8 (or another 1/r), "
            f"{forms}, a number of images, full, or a file of image ids"
        )
    if len({os.path.realpath(place) for place in places}) > 1:
        both = " or ".join(str(place.absolute()) for place in places)
        raise UserError(f"{flag}: which one, {both}? Give its whole path")
    try:
        text = read_text(places[0])
    except (OSError, UserError) as error:
        raise UserError(f"{flag}: not a readable text file of image ids ({error})") from None
    return f"list {Path(split).name}", "", find(text, flag), None


def _slug(path):
    return re.sub(r"[^\w.-]+|__+", "-", Path(path).stem)  # "__" parts a run directory's name


def draw(ids, count, seed) -> list[str]:
    """`count` of the ids by `seed`, sorted; a larger draw of one seed contains the smaller ones."""
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    ids = sorted(ids)
    return sorted(ids[i] for i in order[:count].tolist())


def read_ids(text) -> list[str]:
    """Image ids of a published list, in its order: of each line the first column's file name."""
    names = (Path(line.split()[0]).name for line in text.splitlines() if line.strip())
    return [without_suffix(name).removesuffix("_leftImg8bit") for name in names]


def _published(flag, family, size, dataset, train_ids, data_root):
    """Labeled ids of a published list, and its unlabeled ids where these are not all others."""
    sha256 = PUBLISHED.get((dataset, family, size))
    if sha256 is None:
        lists = ", ".join(":".join(key[1:]) for key in PUBLISHED if key[0] == dataset)
        raise UserError(
            f"{flag}: no such published list for {dataset}; there are "
            f"{lists or 'none'}; or draw one, as with --split 1/8 --split-seed 0"
        )
    folder, dashed = Path(data_root) / "splits" / family, size.replace("/", "-")
    if family == "pseudoseg":
        url = TORCHSEMISEG_URL + "/pascal_voc/subset_train_aug/pseudoseg_{}_" + dashed + ".txt"
        labeled, rest = (
            read_ids(_fetch_list([url.format(part)], folder / f"{dashed}_{part}.txt", pinned))
            for part, pinned in [("labeled", sha256), ("unlabeled", PSEUDOSEG_UNLABELED[size])]
        )
        both = set(labeled) & set(rest)  # one id, by a newline that the authors' file lacks
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{flag}: {', '.join(both)} is in both published files; kept as labeled only")
        return labeled, set(rest) - both

    incomplete = UserError(
        f"{flag}: found {len(train_ids)} training images where {dataset} has "
        f"{FULL_SIZE[dataset]:,}, or other ones; complete it in {data_root}"
    )
    if len(train_ids) != FULL_SIZE[dataset]:
        raise incomplete
    if family == "cps":  # the rule behind these files: every r-th line of the full list
        lines = [f"{i}\n" for i in sorted(train_ids)]
        if dataset == "cityscapes":  # the published order cannot be had from the ids
            url = f"{TORCHSEMISEG_URL}/city/config_new/train.txt"
            text = _fetch_list([url], folder / "cityscapes_train.txt", CITYSCAPES_TRAIN)
            lines = text.splitlines(keepends=True)
        text = "".join(lines[:: int(size.removeprefix("1/"))])
        if _sha256(text.encode()) != sha256:
            raise incomplete
        return read_ids(text), None
    # The checksum, not the name, identifies a list, so both spellings of a ratio may be tried.
    names = [size] if family == "classic" else [f"u2pl_1_{size[2:]}", f"u2pl_{dashed}"]
    urls = [f"{UNIMATCH_URL}/{name}/labeled.txt" for name in names]
    return read_ids(_fetch_list(urls, folder / f"{dashed}_labeled.txt", sha256)), None


def _fetch_list(urls, path, sha256):
    """Text of a published list from the first of `urls` that has it, or from its cached copy."""
    for url in urls:
        try:
            fetch(url, path, sha256)
            break
        except UserError:
            if url == urls[-1]:
                raise
    if _sha256(path.read_bytes()) != sha256:  # put there by hand, or edited since
        raise UserError(f"{path} is not the published list; delete it to fetch it from {urls[0]}")
    return path.read_bytes().decode()


def fetch(url, path, checksum, timeout=10.0) -> Path:
    """Download `url` to `path` unless it is there; continues what an earlier call left unfinished.

    Args:    checksum: SHA-256 of the whole file in hex, or its first digits; "md5:<hex>" where
                 the publisher gives no other; None where the server's bytes may vary
             timeout: seconds, to connect and for each read
    Raises:  UserError when nothing can be had from the server, or when the checksum is wrong
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {path.parent} ({error}); change --data-root") from None
    with locked(path.parent):
        if path.exists():  # verified before it got this name, perhaps by a run we waited for
            return path
        part = path.with_name(path.name + ".part")
        before = part.stat().st_size if part.exists() else 0
        for left in reversed(range(TRIES)):
            try:
                _transfer(url, part, timeout)
                break
            except (OSError, http.client.HTTPException) as error:
                # A server that gave nothing is not asked again; a transfer that broke is continued.
                if not left or not part.exists() or part.stat().st_size == before:
                    raise UserError(
                        f"cannot download {url} ({error}); check the network and run "
                        f"again, or put the file at {path} by hand"
                    ) from None
                time.sleep(PAUSE)
        kind, _, expected = (checksum or "").rpartition(":")
        with part.open("rb") as file:
            got = hashlib.file_digest(file, kind or "sha256").hexdigest()
        if not got.startswith(expected):
            part.unlink()
            raise UserError(
                f"{url} has {kind or 'sha256'} {got} where {expected} was expected; "
                f"run again, or put the right file at {path} by hand"
            )
        os.replace(part, path)
    return path


def _transfer(url, part, timeout):
    """Append to `part` what it lacks; OSError or HTTPException where the transfer breaks."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing lies beyond `have`; the checksum decides
            return
        raise
    with response:
        have = have if response.status == 206 else 0  # 200: the server sends the whole file again
        length = int(response.headers.get("Content-Length") or 0)  # 0: unknown
        quiet = not sys.stderr.isatty() or have + length < 10_000_000
        bar = tqdm(
            desc=part.stem,
            initial=have,
            total=have + length,
            unit="B",
            unit_scale=True,
            disable=quiet,
        )
        with bar, part.open("ab" if have else "wb") as file:
            while chunk := response.read1(1 << 16):  # read1: what has come is kept at a timeout
                bar.update(file.write(chunk))
    if length and part.stat().st_size < have + length:
        raise ConnectionError(f"{part.stat().st_size} of {have + length} bytes came")


def extract(archive, folder):
    """Unpack a tar or zip archive into `folder`, whole or not at all; files there are replaced.

    Raises:  UserError for a damaged archive, or one with a member that lies outside of the folder
    """
    archive, folder = Path(archive), Path(folder)
    try:
        base = folder if folder.is_dir() else folder.parent  # on the file system of the target
        base.mkdir(parents=True, exist_ok=True)
        with locked(base):
            scratch = base / f".{archive.name}.part"
            shutil.rmtree(scratch, ignore_errors=True)  # left by a run that was killed
            scratch.mkdir()
            try:
                _unpack(archive, scratch)
                _move(scratch, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except (
        OSError,
        EOFError,
        RuntimeError,
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        LZMAError,
    ) as error:
        raise UserError(
            f"cannot extract {archive} into {folder} ({error}); if the archive is "
            "damaged, delete it and run again"
        ) from None


def _unpack(archive, folder):
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        return
    with zipfile.ZipFile(archive) as packed:
        for name in packed.namelist():
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise zipfile.BadZipFile(f"{name} lies outside of the folder")
        packed.extractall(folder)


def _move(source, target):
    """Give `source` the place of `target`; a folder that is there already keeps its other files."""
    if source.is_dir() and target.is_dir():
        for entry in list(source.iterdir()):
            _move(entry, target / entry.name)
    else:
        os.replace(source, target)


@contextlib.contextmanager
def locked(folder):
    """One process at a time writes into `folder`; no lock where the system offers none."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # Windows; some network file systems
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _refuse(ids, message):
    """UserError with the first few of the offending ids and their count, if there are any."""
    if ids:
        few = ", ".join(sorted(ids)[:3]) + (", ..." if len(ids) > 3 else "")
        raise UserError(f"{message} ({len(ids)} {'id' if len(ids) == 1 else 'ids'}: {few})")
