"""predict.py: what it writes, what it never writes over, windows, programs, messages."""

import numpy as np
import pytest
import torch
from conftest import weights
from PIL import Image
from test_cli import call
from test_datasets import label, make_folder, noise, save

import predict
from common.evaluation import sliding_window_labels, sliding_window_logits
from supervised import Args, DeepLabV3Plus, main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    args = Args(
        dataset="shapes", device="cpu", batch_size=2, crop_size=32, steps=1, split="4",
        output_dir=str(tmp_path_factory.mktemp("runs")),
    )  # fmt: skip
    return f"{main(args)['run_dir']}/last.pt"


@pytest.fixture
def run(checkpoint, monkeypatch, capsys):
    def call_it(*flags):
        line = [checkpoint, *map(str, flags), "--device", "cpu"]
        return call(predict, monkeypatch, capsys, *line, entry="command_line")

    return call_it


def ids(path) -> np.ndarray:
    with Image.open(path) as file:
        assert file.mode == "L"
        return np.array(file)


def test_folders_are_mirrored_and_names_kept(run, tmp_path):
    photos = make_folder(tmp_path / "mine") / "images"
    save(photos / ".hidden.png", noise())
    code, out, err = run(photos, "--out", tmp_path / "out")
    assert code == 0 and "6 images" in out and "1 other files skipped" in err, err
    for name, size in (("a", (6, 8)), ("sub/c.d", (6, 8)), ("v", (6, 8))):
        assert ids(tmp_path / "out" / f"{name}.png").shape == size
        for kind in ("color", "overlay"):
            with Image.open(tmp_path / "out" / f"{name}_{kind}.png") as file:
                assert file.mode == "RGB" and file.size == size[::-1]
    assert len(list((tmp_path / "out").rglob("*"))) == 3 * 6 + 1  # and the folder `sub`
    assert run(photos, "--out", tmp_path / "out")[0] == 0  # again, over its own results


def test_colors_are_the_palette_and_overlays_half_of_it(run, tmp_path, checkpoint):
    photo = save(tmp_path / "a.png", noise(size=(40, 50)))
    assert run(photo, "--out", tmp_path / "out")[0] == 0
    palette = np.array(torch.load(checkpoint)["meta"]["palette"])
    colors = palette[ids(tmp_path / "out" / "a.png")]
    np.testing.assert_array_equal(Image.open(tmp_path / "out" / "a_color.png"), colors)
    overlay = np.array(Image.open(tmp_path / "out" / "a_overlay.png")).astype(int)
    assert abs(overlay - (noise(size=(40, 50)).astype(int) + colors) / 2).max() <= 1


def test_nothing_is_written_over(run, tmp_path):
    photos = tmp_path / "photos"
    first = save(photos / "a.png", noise())
    before = first.read_bytes()
    for out in (photos, tmp_path / "photos" / ".." / "photos"):
        code, _, err = run(photos, "--out", out)
        assert code == 2 and "holds the images themselves" in err
    code, _, err = run(first, "--out", photos)
    assert code == 2 and "is one of the images" in err
    save(tmp_path / "out" / "a.png", label(1))  # a mask by hand, say
    code, _, err = run(first, "--out", tmp_path / "out")
    assert code == 2 and "is there already" in err
    other = save(tmp_path / "b" / "a.jpg", noise(1))
    assert run(first, "--out", tmp_path / "c")[0] == 0
    code, _, err = run(other, "--out", tmp_path / "c")  # another image of the same name
    assert code == 2 and "is there already" in err
    code, _, err = run(first, other, "--out", tmp_path / "d")
    assert code == 2 and "would both become" in err and not (tmp_path / "d").exists()
    assert first.read_bytes() == before


def test_two_endings_of_one_name(run, tmp_path):
    save(tmp_path / "in" / "a.jpg", noise())
    save(tmp_path / "in" / "a.png", noise(1))
    assert run(tmp_path / "in", "--out", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "a.png").exists() and (tmp_path / "out" / "a.png.png").exists()


def test_results_inside_the_folder_are_no_images(run, tmp_path):
    save(tmp_path / "in" / "a.jpg", noise())
    for _ in range(2):
        code, out, _ = run(tmp_path / "in", "--out", tmp_path / "in" / "predictions")
        assert code == 0 and "1 images" in out


def test_results_are_known_by_their_real_place(run, tmp_path, monkeypatch):
    save(tmp_path / "in" / "a.jpg", noise())
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the photos by their whole path, the results by a relative one
        code, out, err = run(tmp_path / "in", "--out", "in/predictions")
        assert code == 0 and "1 images" in out, err
    (tmp_path / "in" / "a.jpg").rename(tmp_path / "a.jpg")
    code, _, err = run("in", "--out", "in/predictions")
    assert code == 2 and "holds no image" in err


def test_results_may_lie_in_a_folder_above_or_behind_a_link(run, tmp_path, monkeypatch):
    save(tmp_path / "in" / "a.jpg", noise())
    monkeypatch.chdir(tmp_path)
    assert run("in", "--out", ".")[0] == 0
    assert (tmp_path / "a.png").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    for _ in range(2):
        code, out, err = run("in", "--out", "out")
        assert code == 0 and "1 images" in out, err


def test_a_bad_file_stops_no_other(run, tmp_path):
    for name in ("a", "c"):
        save(tmp_path / "in" / f"{name}.png", noise())
    (tmp_path / "in" / "b.png").write_bytes(b"\x89PNG nothing")
    code, out, err = run(tmp_path / "in", "--out", tmp_path / "out")
    assert code == 1 and "2 images" in out and "skipped: " in err and "b.png" in err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"{name}{kind}.png" for name in "ac" for kind in ("", "_color", "_overlay")
    }
    code, _, err = run(tmp_path / "in" / "b.png", "--out", tmp_path / "out")
    assert code == 2 and "b.png" in err


def test_what_does_not_fit_into_memory_says_window(run, tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate")

    for name in ("a", "b"):
        save(tmp_path / f"{name}.png", noise())
    right = predict.predict_image
    broken = [full, right]
    monkeypatch.setattr(predict, "predict_image", lambda *inputs: broken.pop(0)(*inputs))
    monkeypatch.setattr(predict, "explain", lambda error: "can't allocate")
    code, _, err = run(tmp_path / "a.png", tmp_path / "b.png", "--out", tmp_path / "out")
    assert code == 1 and "a.png: does not fit into memory (can't allocate); use --window" in err


def test_notes_on_pages_and_transparency(run, tmp_path):
    save(tmp_path / "a.png", np.dstack([noise(), label(0, 255)]))
    pages = [Image.fromarray(noise(i)) for i in range(2)]
    pages[0].save(tmp_path / "b.tif", save_all=True, append_images=pages[1:])
    code, _, err = run(tmp_path / "a.png", tmp_path / "b.tif", "--out", tmp_path / "out")
    assert code == 0 and "a.png is transparent" in err and "b.tif has 2 pages" in err


@pytest.mark.parametrize("name", ["frames.txt", "clip.mp4"])
def test_lists_and_videos_are_no_images(run, tmp_path, name):
    (tmp_path / name).write_text("a.png\n")
    code, _, err = run(tmp_path / name)
    assert code == 2 and "is no image" in err and "frames" in err


@pytest.mark.parametrize("size", [(40, 60), (20, 70), (33, 33), (7, 5), (100, 64)])
def test_windows_in_little_memory_are_the_windows(size):
    torch.manual_seed(0)
    network, image = DeepLabV3Plus(5, "resnet14").eval(), torch.randint(256, (3, *size)).byte()

    def normalized(pixels):
        return pixels.float() / 255 - 0.5

    with torch.no_grad():
        logits = sliding_window_logits(network, normalized(image)[None], 5, 32, 22)
        found = sliding_window_labels(network, image, 5, 32, 22, normalized)
    assert torch.equal(found, logits.argmax(1)[0].byte())


def test_window_flag(run, tmp_path, checkpoint, monkeypatch):
    photo = save(tmp_path / "a.png", noise(size=(70, 90)))
    assert run(photo, "--out", tmp_path / "out", "--window", 48)[0] == 0
    assert ids(tmp_path / "out" / "a.png").shape == (70, 90)
    assert run(photo, "--out", tmp_path / "all", "--window", 48, "--flip")[0] == 0
    code, _, err = run(photo, "--window", 8)
    assert code == 2 and "--window 8" in err


def test_normalization_is_the_checkpoint_s(run, tmp_path, checkpoint):
    photo = save(tmp_path / "a.png", noise(size=(40, 40)))
    changed = torch.load(checkpoint)
    assert changed["meta"]["mean"] and changed["meta"]["std"]
    changed["meta"] |= {"mean": [0.9, 0.9, 0.9], "std": [0.01, 0.02, 0.03]}
    torch.save(changed, tmp_path / "other.pt")
    seen = []
    network, meta = predict.load(tmp_path / "other.pt", torch.device("cpu"))
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.from_numpy(noise(size=(40, 40))).permute(2, 0, 1)
    protocol = predict.Protocol(pad_to=32)
    predict.predict_image(network, image, meta, protocol, torch.device("cpu"))
    expected = (image.float() / 255 - 0.9) / torch.tensor([0.01, 0.02, 0.03]).view(3, 1, 1)
    torch.testing.assert_close(seen[0][0], expected)
    assert photo.exists()


@pytest.mark.parametrize("change", ["palette", "crop_size", "dataset", "shape"])
def test_checkpoints_of_forks(tmp_path, checkpoint, change):
    changed = torch.load(checkpoint)
    meta = changed["meta"]
    if change == "palette":
        del meta["palette"]
    elif change == "crop_size":
        del meta["args"]["crop_size"]
    elif change == "dataset":
        meta["args"]["dataset"] = "mydata"
    else:
        changed["network"]["classifier.weight"] = torch.zeros(3, 64, 1, 1)
    torch.save(changed, tmp_path / "fork.pt")
    said = {"dataset": "mydata, is none of", "shape": "another network.*classifier.weight"}
    with pytest.raises(predict.UserError, match=said.get(change, change)):
        predict.load(tmp_path / "fork.pt", torch.device("cpu"))


def test_evaluation_looks_at_the_masks(tmp_path, checkpoint, capsys):
    folder = make_folder(tmp_path / "mine")
    changed = torch.load(checkpoint)
    changed["meta"]["args"] |= {"dataset": "folder", "data_root": str(folder)}
    changed["meta"]["classes"] = ["dark", "bright light"]
    changed["network"] |= {
        key: value[:2] for key, value in changed["network"].items() if key.startswith("classifier")
    }
    torch.save(changed, tmp_path / "two.pt")
    arguments = predict.Args(checkpoint=tmp_path / "two.pt", evaluate=True, device="cpu")
    save(folder / "masks" / "v.png", label(0, 255))
    predict.main(arguments)
    assert "no validation mask holds class 1" in capsys.readouterr().err
    save(folder / "masks" / "v.png", label(0, 1), format="JPEG")
    with pytest.raises(predict.UserError, match="lossy"):
        predict.main(arguments)


@pytest.mark.parametrize("name", ["last.pt", "model.onnx", "folder.pt2"])
def test_programs_take_no_other_file_s_place(run, tmp_path, name):
    (tmp_path / "folder.pt2").mkdir()
    code, _, err = run("--export", tmp_path / name)
    assert code == 2 and f"{name}: name a file that ends with .pt2" in err


def test_a_file_for_a_folder_and_a_folder_for_a_file(run, tmp_path, checkpoint):
    photo = save(tmp_path / "a.png", noise())
    code, _, err = run(photo, "--out", photo)
    assert code == 2 and f"--out {photo}: is a file; name a folder" in err
    with pytest.raises(predict.UserError, match="a folder; name its last.pt"):
        predict.load(tmp_path, torch.device("cpu"))


def test_a_forks_network_is_explained(tmp_path, checkpoint, run):
    changed = torch.load(checkpoint)
    state = changed["network"]
    state["classifier.1.weight"] = state.pop("classifier.weight")
    torch.save(changed, tmp_path / "fork.pt")
    with pytest.raises(predict.UserError, match="another network than DeepLabV3Plus.*fork"):
        predict.load(tmp_path / "fork.pt", torch.device("cpu"))
    code, _, err = run("--network", "teacher", "--evaluate")
    assert code == 2 and "--network teacher" in err and "holds network" in err


def test_an_exported_program_gives_the_same_masks(run, tmp_path, checkpoint):
    code, out, err = run("--export", tmp_path / "new" / "model.pt2")
    assert code == 0 and "model.pt2" in out, err
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model.pt2"]
    program = torch.export.load(tmp_path / "new" / "model.pt2").module()
    network, meta = predict.load(checkpoint, torch.device("cpu"))
    for size in ((1, 3, 64, 64), (2, 3, 75, 130)):
        image = torch.randint(256, size, generator=torch.Generator().manual_seed(1)).byte()
        with torch.no_grad():
            expected = network(predict.normalize(image)).argmax(1)
            found = program(image).argmax(1)
        assert (found == expected).float().mean() > 0.999
    assert weights(checkpoint.rsplit("/", 1)[0])
