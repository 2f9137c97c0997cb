"""Splits and downloads: published lists against their files, a real HTTP server, every message."""

import dataclasses
import hashlib
import io
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
from conftest import Server

from common import UserError, splits
from common.splits import Split, extract, fetch, make_split, read_ids

SHARED = Path(__file__).resolve().parents[2] / "shared" / "splits"
needs_lists = pytest.mark.skipif(not SHARED.is_dir(), reason="the published files are not here")
IDS = [f"img_{i:02d}" for i in range(24)]
PAYLOAD = bytes(range(256)) * 2000  # 512,000 bytes


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def server(server, monkeypatch):
    monkeypatch.setattr(splits, "TORCHSEMISEG_URL", f"{server.url}/tss")
    monkeypatch.setattr(splits, "UNIMATCH_URL", f"{server.url}/um")
    return server


# ---- fetch ---------------------------------------------------------------------------------------


def test_fetch_downloads_once(server, tmp_path):
    server.files["/a"] = PAYLOAD
    path = tmp_path / "new" / "folder" / "a.bin"
    assert fetch(f"{server.url}/a", path, sha256(PAYLOAD)) == path
    assert path.read_bytes() == PAYLOAD
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]
    fetch(f"{server.url}/a", str(path), sha256(PAYLOAD))
    assert server.requests == [("/a", None)]


def test_fetch_refuses_a_wrong_checksum(server, tmp_path):
    server.files["/a"] = PAYLOAD
    with pytest.raises(UserError) as error:
        fetch(f"{server.url}/a", tmp_path / "a", sha256(b"other"))
    for part in (f"{server.url}/a", sha256(b"other"), sha256(PAYLOAD), str(tmp_path / "a")):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())
    assert fetch(f"{server.url}/a", tmp_path / "a", None).read_bytes() == PAYLOAD


def test_fetch_continues_a_broken_transfer(server, tmp_path):
    server.files["/a"], server.break_after, server.breaks = PAYLOAD, 300_000, 1
    assert fetch(f"{server.url}/a", tmp_path / "a", sha256(PAYLOAD)).read_bytes() == PAYLOAD
    assert server.requests == [("/a", None), ("/a", "bytes=300000-")]


def test_fetch_gives_up_and_the_next_call_continues(server, tmp_path):
    server.files["/a"], server.break_after, server.breaks = PAYLOAD, 100_000, splits.TRIES
    with pytest.raises(UserError, match=r"400000 of 512000 bytes came.*by hand"):
        fetch(f"{server.url}/a", tmp_path / "a", sha256(PAYLOAD))
    assert len(server.requests) == splits.TRIES
    assert [p.name for p in tmp_path.iterdir()] == ["a.part"]
    fetch(f"{server.url}/a", tmp_path / "a", sha256(PAYLOAD))
    assert server.requests[-1] == ("/a", "bytes=400000-")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_fetch_starts_over_where_range_is_ignored(server, tmp_path):
    server.files["/a"], server.honors_range = PAYLOAD, False
    server.break_after, server.breaks = 300_000, 1
    assert fetch(f"{server.url}/a", tmp_path / "a", sha256(PAYLOAD)).read_bytes() == PAYLOAD
    assert server.requests[1] == ("/a", "bytes=300000-")


def test_fetch_accepts_a_part_that_lacks_nothing(server, tmp_path):
    server.files["/a"] = PAYLOAD  # a run was killed between the last byte and the checksum
    (tmp_path / "a.part").write_bytes(PAYLOAD)
    assert fetch(f"{server.url}/a", tmp_path / "a", sha256(PAYLOAD)).read_bytes() == PAYLOAD


@pytest.mark.parametrize(("hang", "requests"), [("start", 1), ("body", splits.TRIES)])
def test_fetch_times_out(server, tmp_path, hang, requests):
    server.files["/a"], server.hang = PAYLOAD, hang
    start = time.monotonic()
    with pytest.raises(UserError, match="timed out") as error:
        fetch(f"{server.url}/a", tmp_path / "a", sha256(PAYLOAD), timeout=0.2)
    assert time.monotonic() - start < 3
    assert f"{server.url}/a" in str(error.value) and str(tmp_path / "a") in str(error.value)
    assert len(server.requests) == requests
    if hang == "body":  # what had come is kept
        assert (tmp_path / "a.part").read_bytes() == PAYLOAD[: 1000 * splits.TRIES]


def test_fetch_without_a_server(server, tmp_path):
    other = Server()
    other.server_close()  # its port is free again
    with pytest.raises(UserError, match="refused") as error:
        fetch(f"{other.url}/a", tmp_path / "a", sha256(PAYLOAD))
    assert f"{other.url}/a" in str(error.value) and str(tmp_path / "a") in str(error.value)
    with pytest.raises(UserError, match="404"):
        fetch(f"{server.url}/missing", tmp_path / "a", sha256(PAYLOAD))
    assert len(server.requests) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot create .*file.*--data-root"):
        fetch(f"{server.url}/a", tmp_path / "file" / "a", sha256(PAYLOAD))


def test_fetch_by_two_runs_at_once(server, tmp_path):
    pytest.importorskip("fcntl")
    server.files["/a"], server.delay = PAYLOAD, 0.2
    runs = [
        threading.Thread(target=fetch, args=(f"{server.url}/a", tmp_path / "a", None))
        for _ in range(3)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert (tmp_path / "a").read_bytes() == PAYLOAD
    assert len(server.requests) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_fetch_shows_progress_on_a_terminal_only(server, tmp_path, monkeypatch, terminal):
    server.files["/a"], stderr = bytes(11_000_000), io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    fetch(f"{server.url}/a", tmp_path / "a.tar", None)
    assert ("a.tar: 100%" in stderr.getvalue()) == terminal


# ---- extract -------------------------------------------------------------------------------------


def tar_file(path, members, mode="w", kind=tarfile.REGTYPE, link=""):
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, link
            tar.addfile(info, io.BytesIO(data))
    return path


def zip_file(path, members):
    with zipfile.ZipFile(path, "w") as packed:
        for name, data in members.items():
            packed.writestr(name, data)
    return path


@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
@pytest.mark.parametrize("present", [True, False])
def test_extract(tmp_path, kind, present):
    members, archive = {"top/a.txt": b"new", "top/sub/b.txt": b"b"}, tmp_path / f"x.{kind}"
    if kind == "zip":
        zip_file(archive, members)
    else:
        tar_file(archive, members, "w:gz" if kind == "tgz" else "w")
    folder = tmp_path / "data" / "voc"
    if present:
        (folder / "top").mkdir(parents=True)
        (folder / "top" / "a.txt").write_text("old")
        (folder / "top" / "mine.txt").write_text("mine")
    extract(archive, folder)
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    assert found == members | ({"top/mine.txt": b"mine"} if present else {})
    assert not list(tmp_path.rglob("*.part"))
    (tmp_path / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("case", ["tar", "link", "zip", "absolute", "cut", "gz", "text", "missing"])
def test_extract_refuses(tmp_path, case):
    archive, folder = tmp_path / "in" / "x", tmp_path / "in" / "out"
    archive.parent.mkdir()
    if case == "tar":
        tar_file(archive, {"good": b"1", "../../escaped": b"2"})
    elif case == "link":
        tar_file(archive, {"escaped": b""}, kind=tarfile.SYMTYPE, link="../../..")
    elif case == "zip":
        zip_file(archive, {"good": b"1", "../../escaped": b"2"})
    elif case == "absolute":
        zip_file(archive, {"good": b"1", f"{tmp_path}/escaped": b"2"})
    elif case == "cut":
        tar_file(archive, {"good": b"1", "more": PAYLOAD})
        archive.write_bytes(archive.read_bytes()[:100_000])
    elif case == "gz":
        tar_file(archive, {"good": b"1", "more": PAYLOAD}, "w:gz")
        archive.write_bytes(archive.read_bytes()[:-500])
    elif case == "text":
        archive.write_text("not found")
    with pytest.raises(UserError) as error:
        extract(archive, folder)
    assert str(archive) in str(error.value) and str(folder) in str(error.value)
    assert {p.name for p in tmp_path.rglob("*")} <= {"in", "x"}


# ---- published lists, against the files themselves -----------------------------------------------


def lines(name):
    """Ids of a published file, read in the plainest way."""
    text = (SHARED / name).read_text()
    return [line.split()[0].split("/")[-1].split(".")[0] for line in text.split("\n") if line]


@pytest.fixture(scope="module")
def voc():
    ids = lines("voc/train_aug_labeled_1-2.txt") + lines("voc/train_aug_unlabeled_1-2.txt")
    return sorted(ids), frozenset(lines("voc/classic_1464_labeled.txt"))


def serve(server, url, name):
    server.files[url] = (SHARED / name).read_bytes()


@needs_lists
@pytest.mark.parametrize(("size", "fine"), [("1/16", 93), ("1/8", 193), ("1/4", 388), ("1/2", 742)])
def test_voc_cps(server, tmp_path, voc, size, fine):
    split = make_split(size, "voc", voc[0], tmp_path, fine_ids=voc[1])
    dashed = size.replace("/", "-")
    for part in ("labeled", "unlabeled"):  # byte for byte
        text = "".join(f"{i}\n" for i in getattr(split, part))
        assert text == (SHARED / f"voc/train_aug_{part}_{dashed}.txt").read_text()
    assert (split.name, split.slug) == (f"cps:{size}", f"cps-{size.replace('/', '_')}")
    assert split.fine == fine
    assert split == make_split(f"cps:{size}", "voc", voc[0], tmp_path, fine_ids=voc[1])
    assert not server.requests


@needs_lists
@pytest.mark.parametrize("size", ["1/16", "1/8", "1/4", "1/2"])
def test_cityscapes_cps(server, tmp_path, size):
    serve(server, "/tss/city/config_new/train.txt", "cityscapes/train.txt")
    ids, dashed = [i.removesuffix("_gtFine") for i in lines("cityscapes/train.txt")], size[2:]
    for _ in range(2):
        split = make_split(size, "cityscapes", sorted(ids), tmp_path)
    assert list(split.labeled) == sorted(lines(f"cityscapes/train_aug_labeled_1-{dashed}.txt"))
    assert list(split.unlabeled) == sorted(lines(f"cityscapes/train_aug_unlabeled_1-{dashed}.txt"))
    assert (split.name, split.slug, split.fine) == (f"cps:{size}", f"cps-1_{dashed}", None)
    assert len(server.requests) == 1
    assert (tmp_path / "splits/cps/cityscapes_train.txt").is_file()


@needs_lists
@pytest.mark.parametrize(
    ("split", "url", "count", "fine"),
    [
        ("classic:92", "92", 92, 92),
        ("classic:183", "183", 183, 183),
        ("classic:366", "366", 366, 366),
        ("classic:732", "732", 732, 732),
        ("classic:1464", "1464", 1464, 1464),
        ("u2pl:1/16", "u2pl_1_16", 662, 662),
        ("u2pl:1/8", "u2pl_1_8", 1323, 1323),
        ("u2pl:1/4", "u2pl_1-4", 2646, 1464),
    ],
)
def test_voc_classic_and_u2pl(server, tmp_path, voc, split, url, count, fine):
    name = split.replace(":", "_").replace("/", "-")
    serve(server, f"/um/{url}/labeled.txt", f"voc/{name}_labeled.txt")
    found = make_split(split, "voc", voc[0], tmp_path, fine_ids=voc[1])
    assert list(found.labeled) == sorted(lines(f"voc/{name}_labeled.txt"))
    assert list(found.unlabeled) == sorted(lines(f"voc/{name}_unlabeled.txt"))
    assert (len(found.labeled), found.fine) == (count, fine)
    assert found.slug == split.replace(":", "-").replace("/", "_")
    asked = len(server.requests)
    assert make_split(split, "voc", voc[0], tmp_path, fine_ids=voc[1]) == found
    assert len(server.requests) == asked


@needs_lists
@pytest.mark.parametrize(
    ("size", "count", "twice"),
    [
        ("1/16", 92, "2008_004822"),
        ("1/8", 183, "2009_001036"),
        ("1/4", 366, "2007_000032"),
        ("1/2", 732, "2009_000662"),
    ],
)
def test_voc_pseudoseg(server, tmp_path, voc, capsys, monkeypatch, size, count, twice):
    files = [f"pseudoseg_{part}_{size.replace('/', '-')}.txt" for part in ("labeled", "unlabeled")]
    for file in files:
        serve(server, f"/tss/pascal_voc/subset_train_aug/{file}", f"voc/{file}")
    split = make_split(f"pseudoseg:{size}", "voc", voc[0], tmp_path, fine_ids=voc[1])
    assert list(split.labeled) == sorted(lines(f"voc/{files[0]}"))
    assert list(split.unlabeled) == sorted(set(lines(f"voc/{files[1]}")) - {twice})
    assert (len(split.labeled), set(split.labeled + split.unlabeled)) == (count, voc[1])
    printed = capsys.readouterr().out
    assert twice in printed and printed.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    every = make_split(f"pseudoseg:{size}", "voc", voc[0], tmp_path, unlabeled="all")
    assert every.unlabeled == tuple(voc[0])  # the paper's few-label setting: all 10,582
    assert capsys.readouterr().out == ""


@needs_lists
def test_incomplete_voc(server, tmp_path, voc):
    for split in ("1/8", "u2pl:1/8", "classic:92"):
        with pytest.raises(UserError, match=r"found 10581 .* voc has 10,582.*" + str(tmp_path)):
            make_split(split, "voc", voc[0][1:], tmp_path)
    with pytest.raises(UserError, match=r"--split 1/8: found 10582 .* or other ones"):
        make_split("1/8", "voc", ["2006_000001", *voc[0][1:]], tmp_path)
    assert not server.requests


@pytest.fixture
def tiny(server, monkeypatch):
    """A published world of 24 images, so that the code is covered where the real files are not."""
    texts = {
        ("voc", "cps", "1/8"): "img_00\nimg_08\nimg_16\n",
        ("voc", "classic", "2"): "JPEGImages/img_05.jpg SegmentationClass/img_05.png\n"
        "JPEGImages/img_03.jpg SegmentationClass/img_03.png",
        ("voc", "u2pl", "1/8"): "JPEGImages/img_07.jpg SegmentationClass/img_07.png\n",
        ("voc", "pseudoseg", "1/2"): "img_09\r\nimg_02",
        ("cityscapes", "cps", "1/8"): "/i/train/img_23.png\t/s/img_23_gtFine.png\n"
        "/i/train/img_15.png\t/s/img_15_gtFine.png\n"
        "/i/train/img_07.png\t/s/img_07_gtFine.png\n",
    }
    order = "".join(f"/i/train/{i}.png\t/s/{i}_gtFine.png\n" for i in reversed(IDS))
    rest = "img_01\r\nimg_02\r\nimg_04\r\n"
    monkeypatch.setattr(splits, "FULL_SIZE", {"voc": 24, "cityscapes": 24})
    monkeypatch.setattr(splits, "PUBLISHED", {k: sha256(t.encode()) for k, t in texts.items()})
    monkeypatch.setattr(splits, "PSEUDOSEG_UNLABELED", {"1/2": sha256(rest.encode())})
    monkeypatch.setattr(splits, "CITYSCAPES_TRAIN", sha256(order.encode()))
    voc = "/tss/pascal_voc/subset_train_aug/pseudoseg_"
    server.files = {
        path: text.encode()
        for path, text in {
            "/um/2/labeled.txt": texts["voc", "classic", "2"],
            "/um/u2pl_1-8/labeled.txt": texts["voc", "u2pl", "1/8"],
            f"{voc}labeled_1-2.txt": texts["voc", "pseudoseg", "1/2"],
            f"{voc}unlabeled_1-2.txt": rest,
            "/tss/city/config_new/train.txt": order,
        }.items()
    }
    return server


@pytest.mark.parametrize(
    ("split", "dataset", "labeled", "unlabeled"),
    [
        ("1/8", "voc", [0, 8, 16], 21),
        ("cps:1/8", "cityscapes", [7, 15, 23], 21),
        ("classic:2", "voc", [3, 5], 22),
        ("u2pl:1/8", "voc", [7], 23),
        ("pseudoseg:1/2", "voc", [2, 9], 2),
    ],
)
def test_published_rules(tiny, tmp_path, split, dataset, labeled, unlabeled):
    found = make_split(split, dataset, IDS, tmp_path)
    assert found.labeled == tuple(f"img_{i:02d}" for i in labeled)
    assert len(found.unlabeled) == unlabeled
    assert not set(found.labeled) & set(found.unlabeled)


def test_cached_list_is_checked(tiny, tmp_path):
    make_split("classic:2", "voc", IDS, tmp_path)
    path = tmp_path / "splits" / "classic" / "2_labeled.txt"
    path.write_text("img_01\n")
    with pytest.raises(UserError, match="2_labeled.txt is not the published list; delete it"):
        make_split("classic:2", "voc", IDS, tmp_path)


def test_published_list_without_network(tiny, tmp_path):
    tiny.files = {}
    with pytest.raises(UserError, match=r"/um/2/labeled.txt .*404.*splits/classic/2_labeled.txt"):
        make_split("classic:2", "voc", IDS, tmp_path)
    with pytest.raises(UserError, match=r"/um/u2pl_1-8/labeled.txt"):
        make_split("u2pl:1/8", "voc", IDS, tmp_path)


def test_published_lists_name_missing_images(tiny, tmp_path):
    ids = [i.replace("img_07", "img_99") for i in IDS]
    with pytest.raises(UserError, match=r"not among the 24 .* of cityscapes; .* \(1 id: img_07\)"):
        make_split("1/8", "cityscapes", ids, tmp_path)
    with pytest.raises(UserError, match=r"not among the 20 .* of voc; .* \(1 id: img_04\)"):
        make_split("pseudoseg:1/2", "voc", IDS[:4] + IDS[8:], tmp_path)  # of its unlabeled file


# ---- drawn splits --------------------------------------------------------------------------------


def labeled(split, seed=None, dataset="camvid", ids=IDS):
    return make_split(split, dataset, ids, "data", split_seed=seed).labeled


def test_drawn_ids_are_pinned():
    assert labeled("4") == labeled("4", 0) == ("img_03", "img_05", "img_12", "img_20")
    assert labeled("4", 1) == ("img_02", "img_13", "img_18", "img_20")
    assert labeled("1/8") == labeled("3")
    assert labeled("1/8", 0, "voc") == labeled("3")  # a seed on VOC draws: no network, no list
    assert labeled("1/100") == labeled("1")  # at least one
    assert [len(labeled(f"1/{r}")) for r in (2, 3, 5, 7)] == [12, 8, 5, 3]


def test_drawn_splits_are_nested_and_forget_the_order():
    for seed in range(3):
        sets = [set(labeled(str(n), seed)) for n in range(1, 25)]
        assert all(a < b for a, b in zip(sets, sets[1:], strict=False))
        assert labeled("5", seed, ids=IDS[::-1]) == labeled("5", seed)
    assert len({labeled("5", seed) for seed in range(20)}) == 20


@pytest.mark.parametrize(
    ("split", "seed", "name", "slug"),
    [
        ("20", None, "20 images, split seed 0", "n20-d0"),
        ("020", 7, "20 images, split seed 7", "n20-d7"),
        ("1/8", None, "1/8, split seed 0", "1_8-d0"),
        ("1/3", 5, "1/3, split seed 5", "1_3-d5"),
        ("full", None, "full", "full"),
    ],
)
def test_names(split, seed, name, slug):
    found = make_split(split, "camvid", IDS, "data", split_seed=seed)
    assert (found.name, found.slug) == (name, slug)


# ---- list files, pools, identity -----------------------------------------------------------------

LISTS = {
    "plain": "img_05\nimg_03\n",
    "crlf, no final newline": "img_05\r\nimg_03",
    "blank lines and a byte order mark": "\ufeff\n  img_05  \n\n\nimg_03\n\n",
    "two columns": "JPEGImages/img_05.jpg SegmentationClass/img_05.png\n"
    "JPEGImages/img_03.jpg SegmentationClass/img_03.png",
    "two columns, tab": "/images/train/img_05.png\t/labels/img_05_gtFine.png\r\n"
    "/images/train/img_03.png\t/labels/img_03_gtFine.png\r\n",
    "quotes, commas, comments": '# mine\n"img_05.jpg", "masks/img_05.png"\n./a/img_03\n',
    "upper-case suffix": "img_05.JPG\nimg_03.PNG\n",
}


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS)
def test_list_file(tmp_path, text):
    path = tmp_path / "my__list v1.2.txt"
    path.write_bytes(text.encode())
    split = make_split(str(path), "folder", IDS, tmp_path)
    assert split.labeled == ("img_03", "img_05")
    assert len(split.unlabeled) == 22
    assert split.name == "list my__list v1.2.txt"
    assert split.digest == sha256(b"img_03\nimg_05\n")[:8]
    assert split.slug == f"my-list-v1.2-{split.digest}"


def test_published_lists_name_files():
    text = "JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png\n\n"
    assert read_ids(text) == ["2007_000032"]
    text = "leftImg8bit/train/a/a_1_2_leftImg8bit.png\tgtFine/train/a/a_1_2_gtFine_labelIds.png\r\n"
    assert read_ids(text) == ["a_1_2"]


def test_two_lists_of_one_name(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for folder, ids in ((tmp_path, IDS[:3]), (tmp_path / "data", IDS[:5])):
        (folder / "few.txt").write_text("\n".join(ids))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="--split few.txt: which one, .*/few.txt or .*/data/few.txt"
    ):
        make_split("few.txt", "folder", IDS, "data")
    assert len(make_split("data/few.txt", "folder", IDS, "data").labeled) == 5
    assert len(make_split("few.txt", "folder", IDS, tmp_path).labeled) == 3


def test_unlabeled_pools():
    extra = ["z_1", "z_0"]
    few = make_split("3", "folder", IDS, "data", extra_ids=extra)
    assert few.unlabeled == (*(i for i in IDS if i not in few.labeled), "z_0", "z_1")
    more = make_split("3", "folder", IDS, "data", extra_ids=extra, unlabeled="all")
    assert more.unlabeled == (*IDS, "z_0", "z_1")
    assert more.labeled == few.labeled
    full = make_split("full", "folder", IDS[::-1], "data", extra_ids=extra)
    assert (full.labeled, full.unlabeled) == (tuple(IDS), (*IDS, "z_0", "z_1"))
    assert make_split("24", "folder", IDS, "data").unlabeled == ()


def test_list_in_the_data_folder(tmp_path):
    (tmp_path / "labeled.txt").write_text("\n".join(IDS[:3]))
    split = make_split("labeled.txt", "folder", IDS[:3], tmp_path, extra_ids=IDS[3:])
    assert (split.labeled, split.unlabeled) == (tuple(IDS[:3]), tuple(IDS[3:]))


def test_identity():
    split = make_split("full", "voc", IDS, "data", fine_ids={"img_01", "img_02", "img_03", "other"})
    assert split.fine == 3
    digest = sha256("".join(f"{i}\n" for i in IDS).encode())[:8]
    assert split.identity == (
        f"full: 24 labeled (3 finely annotated, 12.5%) + 24 unlabeled images, sha256 {digest}"
    )
    split = make_split("4", "camvid", IDS, "data")
    assert split.identity == (
        f"4 images, split seed 0: 4 labeled + 20 unlabeled images, sha256 {split.digest}"
    )
    assert make_split("4", "voc", IDS, "data", fine_ids=frozenset()).fine == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        split.name = "other"
    assert isinstance(split, Split)


# ---- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "dataset", "flags", "message"),
    [
        ("1/1", "voc", {}, "--split 1/1: a ratio is 1/2 or smaller; use full"),
        ("1/0", "camvid", {}, "--split 1/0: a ratio"),
        ("0", "camvid", {}, "--split 0: camvid has 24 training images; use 1 to 24"),
        ("-3", "camvid", {}, "--split -3: camvid has 24"),
        ("25", "camvid", {}, "--split 25: camvid has 24"),
        (
            "1/32",
            "voc",
            {},
            "--split 1/32: no such published list for voc; there are cps:1/16, cps:1/8, cps:1/4, cps:1/2, "
            "u2pl:1/16,",
        ),
        ("u2pl:1/2", "voc", {}, "--split u2pl:1/2: no such published list for voc; there are"),
        (
            "classic:92",
            "cityscapes",
            {},
            "for cityscapes; there are cps:1/16, cps:1/8, cps:1/4, cps:1/2; or draw one",
        ),
        (
            "cps:1/8",
            "camvid",
            {},
            "--split cps:1/8: no such published list for camvid; there are none; "
            "or draw one, as with --split 1/8 --split-seed 0",
        ),
        (
            "classic:92",
            "voc",
            {"split_seed": 0},
            "--split classic:92 is a published list, which no seed changes; drop --split-seed",
        ),
        (
            "full",
            "voc",
            {"split_seed": 3},
            "--split full is not drawn, so a seed has no effect; drop --split-seed",
        ),
        ("8", "voc", {"split_seed": -1}, "--split-seed -1: use a number from 0"),
        ("8", "voc", {"split_seed": 2**63}, f"--split-seed {2**63}: use a number from 0"),
        ("8", "voc", {"unlabeled": "some"}, "--unlabeled some: use rest or all"),
        (
            "nowhere.txt",
            "voc",
            {},
            "--split nowhere.txt: no such file, and none of the known forms: 1/8 (or another 1/r), "
            "cps:1/2, u2pl:1/4, pseudoseg:1/2, classic:1464, a number of images, full, or a file of "
            "image ids",
        ),
        ("2/8", "voc", {}, "--split 2/8: no such file"),
        ("", "voc", {}, "--split : not a readable text file"),
        ("{tmp}", "voc", {}, "--split {tmp}: not a readable text file of image ids"),
        ("{tmp}/binary", "voc", {}, "--split {tmp}/binary: not a readable text file of image ids"),
        (
            "{tmp}/empty",
            "voc",
            {},
            "--split {tmp}/empty: is empty; write one image id per line",
        ),
        ("{tmp}/twice", "voc", {}, "--split {tmp}/twice: entries occur twice: img_01; remove"),
        (
            "{tmp}/unknown",
            "voc",
            {},
            "--split {tmp}/unknown: 4 of 5 entries name no image, or another's mask: 'no_3' (line 2), "
            "'no_2' (line 3), 'no_1' (line 4), ...; correct them, or add the files",
        ),
    ],
)
def test_messages(tmp_path, split, dataset, flags, message):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("\r\n \n")
    (tmp_path / "twice").write_text("img_01\nimg_02\nimg_01.jpg\n")
    (tmp_path / "unknown").write_text("img_01\nno_3\nno_2\nno_1\nno_0\n")
    with pytest.raises(UserError) as error:
        make_split(split.format(tmp=tmp_path), dataset, IDS, "data", **flags)
    assert message.format(tmp=tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"val_ids": ["img_03"]},
            "--split full: remove the ids of validation images from the training "
            "lists (1 id: img_03)",
        ),
        ({"extra_ids": ["e"], "val_ids": ["e"]}, "(1 id: e)"),
        ({"extra_ids": ["img_04"]}, "keep ids in the labeled or the unlabeled list (1 id: img_04)"),
        (
            {"train_ids": [*IDS, "img_02"]},
            "remove the repeated ids of camvid's list (1 id: img_02)",
        ),
        ({"train_ids": []}, "the training list of camvid is empty"),
    ],
)
def test_messages_about_the_lists_of_a_data_set(changes, message):
    arguments = {"train_ids": IDS, "data_root": "data"} | changes
    with pytest.raises(UserError) as error:
        make_split("full", "camvid", **arguments)
    assert message in str(error.value)
