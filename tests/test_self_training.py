"""self_training.py: labels, scores, lists and boxes against hand-worked numbers and the authors'
code; runs that are stopped anywhere; labels by one process and by two.
"""

import itertools
import json
import math
import os
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    assert_same,
    assert_unlabeled_labels_are_not_read,
    golden_files,
    load_golden,
    read_log,
    weights,
)
from PIL import Image
from test_distributed import run as run_processes

import self_training
import supervised
from common import UserError
from common.datasets import Shapes
from common.transforms import normalize
from self_training import (
    PAPER,
    Args,
    checkpoint_steps,
    cross_entropy,
    cutout_box,
    erase,
    joint_ids,
    loss_parts,
    main,
    pseudo_label,
    select_reliable,
    stability_score,
    strong_views,
    tta_probabilities,
)

GOLDENS = golden_files("self_training_seed*.npz")
golden = pytest.mark.parametrize(
    "golden", [load_golden(path) for path in GOLDENS],
    ids=[f"{path.parent.name}-{path.stem}" for path in GOLDENS],
)  # fmt: skip
SYSTEMS = {
    "plain": {},
    "ST": {"strong": True, "tta": True, "oversample": True},
    "ST++": {"plus": True},
}
systems = pytest.mark.parametrize("flags", SYSTEMS.values(), ids=SYSTEMS)


@pytest.fixture(autouse=True)
def few_unlabeled_images(monkeypatch):
    """Thirteen: no number of processes divides them, nor two halves."""
    monkeypatch.setattr(Shapes, "train_ids", Shapes.train_ids[:21])


# Against the authors' code.


@golden
def test_labels_are_the_authors(golden):
    label = pseudo_label(golden.tensor("label/logits"))
    assert label.dtype == torch.int64 and torch.equal(label, golden.tensor("label/out"))


@golden
@pytest.mark.parametrize("case", ["a", "b"])
def test_tta_is_the_authors(golden, case):
    def model(image):
        hidden = F.conv2d(image, weight["w1"], weight["b1"], stride=2, padding=1).relu()
        logits = F.conv2d(hidden, weight["w2"], weight["b2"])
        return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=True)

    weight = {key: value.requires_grad_() for key, value in golden.part("tta/").items()
              if key in ("w1", "b1", "w2", "b2")}  # fmt: skip
    image = golden.tensor(f"tta/{case}/image")
    before = image.clone()
    prob = tta_probabilities(model, image)
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(prob, golden.tensor(f"tta/{case}/prob"), **close)
    assert torch.equal(pseudo_label(prob), golden.tensor(f"tta/{case}/label"))
    assert not prob.requires_grad and torch.equal(image, before)
    for key, flags in (("no_flip", ((0.5, 1, 2), False)), ("single", ((1.0,), False))):
        expected = golden.tensor(f"tta/{case}/prob_{key}")
        torch.testing.assert_close(tta_probabilities(model, image, *flags), expected, **close)


@golden
def test_scores_are_the_authors(golden):
    for number, expected in enumerate(golden["stability/scores"]):
        maps = [golden.tensor(f"stability/{number}/pred{k}") for k in range(3)]
        assert stability_score(maps, 6) == pytest.approx(expected, rel=1e-12)
        two = float(golden[f"stability/{number}/two"])
        assert stability_score(maps[1:], 6) == pytest.approx(two, rel=1e-12)


@golden
def test_lists_are_the_authors(golden):
    for case in "abcde":
        halves = select_reliable(golden[f"select/{case}/scores"].tolist())
        expected = [golden[f"select/{case}/{half}"].tolist() for half in ("reliable", "unreliable")]
        assert list(halves) == expected
    for steps, at in zip(golden["checkpoints/steps"], golden["checkpoints/at"], strict=True):
        assert checkpoint_steps(int(steps)) == [step for step in at.tolist() if step >= 0]
    sizes = golden["joint/sizes"].tolist()
    for (labeled, unlabeled), length in zip(sizes, golden["joint/length"], strict=True):
        assert len(joint_ids([0] * labeled, [1] * unlabeled)) == length


@golden
def test_erase_is_the_authors(golden):
    image, label = golden.tensor("erase/image"), golden.tensor("erase/label")
    before = image.clone(), label.clone()
    for number, box in enumerate(golden["erase/box"].tolist()):
        erased = erase(image, label, box, golden.tensor(f"erase/{number}/noise"))
        for part, name in zip(erased, ("image", "label"), strict=True):
            assert torch.equal(part, golden.tensor(f"erase/{number}/{name}"))
    assert torch.equal(image, before[0]) and torch.equal(label, before[1])


@golden
@pytest.mark.parametrize("case", [0, 1, 2])
def test_boxes_are_distributed_as_the_authors(golden, case):
    """3,000 of theirs and of ours: means within 5 standard errors, deviations within 10 %."""
    height, width = golden[f"box/{case}/hw"].tolist()
    generator = torch.Generator().manual_seed(case)
    boxes = torch.tensor([cutout_box(height, width, generator) for _ in range(3000)])
    top, left, bottom, right = boxes.double().T
    rows, columns = (bottom - top) / height, (right - left) / width
    ratio = ((bottom - top) / (right - left)).log()
    middle = (top + bottom) / 2 / height, (left + right) / 2 / width
    values = torch.stack([rows * columns, ratio, *middle, rows, columns])
    mean, std = (golden.tensor(f"box/{case}/{key}") for key in ("mean", "std"))
    assert ((values.mean(1) - mean).abs() < 5 * std * (2 / 3000) ** 0.5).all()
    torch.testing.assert_close(values.std(1), std, rtol=0.1, atol=0)
    low, high = (golden.tensor(f"box/{case}/{key}") for key in ("min", "max"))
    slack = 0.05 * (high - low)
    assert (values.amin(1) > low - slack).all() and (values.amax(1) < high + slack).all()


# By hand.


def test_tta_by_hand():
    """The model looks at the place alone: class 1 has 3/4 in the left column, 1/2 in the right."""
    seen = []

    def model(image):
        seen.append(tuple(image.shape[2:]))
        logits = torch.zeros(1, 2, *image.shape[2:])
        logits[:, 1, :, : image.shape[3] // 2] = math.log(3)
        return logits

    prob = tta_probabilities(model, torch.zeros(1, 3, 4, 2), (1.0,))
    assert torch.allclose(prob[:, 1], torch.full((1, 4, 2), (3 / 4 + 1 / 2) / 2))
    # Column 0 of the image has 3/4 at scale 1; at scale 2 its columns 0 and 1 have, and column 0 of
    # the result is column 0 (aligned corners), so is column 1 of column 3.
    prob = tta_probabilities(model, torch.zeros(1, 3, 4, 2), (1.0, 2.0), flip=False)
    assert torch.allclose(prob[0, 1, 0], torch.tensor([3 / 4, 1 / 2]))
    seen.clear()
    tta_probabilities(model, torch.zeros(1, 3, 17, 22))
    sizes = [(8, 11), (12, 16), (17, 22), (25, 33), (34, 44)]  # truncated
    assert seen == [size for size in sizes for _ in range(2)]


def test_the_mirror_image_is_that_of_the_resized_one():
    image, seen = torch.rand(1, 3, 5, 7), []
    tta_probabilities(lambda view: seen.append(view) or view, image, (0.75,))
    assert torch.equal(seen[1], seen[0].flip(3)) and not torch.equal(seen[0], seen[1])


def test_score_by_hand():
    last = torch.tensor([[0, 0], [1, 1]])
    other = torch.tensor([[0, 0], [0, 1]])  # class 0: 2 of 3 pixels, class 1: 1 of 2
    assert stability_score([other, last], 5) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert stability_score([other, last, last], 5) == pytest.approx((7 / 12 + 1) / 2)
    assert stability_score([last, other, other], 5) == pytest.approx((7 / 12 + 1) / 2)
    comes = torch.tensor([[0, 0], [1, 4]])  # a class in one of the two maps counts as 0
    assert stability_score([comes, last], 5) == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_select_by_hand():
    assert select_reliable([0.5, 0.9, 0.5, 0.7, 0.9]) == ([1, 4], [3, 0, 2])
    assert select_reliable([0.1]) == ([], [0]) and select_reliable([]) == ([], [])


def test_lists_by_hand():
    assert sorted(joint_ids("ab", "vwxyz")) == sorted("aaabbbvwxyz")
    assert sorted(joint_ids("ab", "vwxyz", oversample=False)) == sorted("abvwxyz")
    assert sorted(joint_ids("abc", "z")) == sorted("abcz") and joint_ids("ab", "") == ["a", "b"]
    assert checkpoint_steps(80) == [26, 53, 80] and checkpoint_steps(2) == [1, 2]
    assert checkpoint_steps(7, 2) == [3, 7] and checkpoint_steps(1) == [1]


def test_boxes_lie_inside_and_follow_their_generator():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        top, left, bottom, right = cutout_box(30, 20, generator, area=(0.1, 0.2), aspect=(1, 2))
        height, width = bottom - top, right - left
        assert min(top, left) >= 0 and bottom <= 30 and right <= 20
        assert (height + 1) * (width + 1) >= 60 and height * width <= 120
        assert (height + 1) / width >= 1 and height / (width + 1) <= 2
    boxes = []
    for _ in range(2):
        torch.manual_seed(5)  # the default generator, as views use
        boxes.append([cutout_box(30, 20) for _ in range(3)])
    assert boxes[0] == boxes[1] and len(set(boxes[0])) == 3


def test_strong_views_change_the_chosen_images_alone():
    image = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    label = torch.randint(8, (40, 32, 32))
    state = torch.get_rng_state()
    seeds = {number: 100 + number for number in range(30)}
    views, labels = strong_views(normalize(image), label, seeds)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(views[30:], normalize(image)[30:]) and torch.equal(labels[30:], label[30:])
    cut = (labels == 255).flatten(1).float().mean(1)
    assert torch.equal(labels[labels != 255], label[labels != 255])
    assert 5 < (cut[:30] > 0).sum() < 25 and cut.max() <= 0.4  # a box in half of the images
    changed = (views != normalize(image)).flatten(1).any(1)
    assert changed[:30].sum() > 20
    # Each image depends on its own seed, wherever it stands in the batch.
    alone, label_alone = strong_views(normalize(image[7:8]), label[7:8], {0: 107})
    assert torch.equal(alone[0], views[7]) and torch.equal(label_alone[0], labels[7])
    other, _ = strong_views(normalize(image), label, {n: 200 + n for n in range(30)})
    assert not torch.equal(other, views)


def test_noise_of_a_cut_out_is_uniform_below_255(monkeypatch):
    monkeypatch.setattr(self_training, "STRONG_COLORS", lambda image: image)
    black = normalize(torch.zeros(60, 3, 64, 64, dtype=torch.uint8))
    views, label = strong_views(black, torch.zeros(60, 64, 64).long(), {n: n for n in range(60)})
    noise = self_training.denormalize(views).movedim(1, 3)[label == 255].double()
    assert noise.min() == 0 and noise.max() == 254
    assert noise.mean().item() == pytest.approx(127, abs=1)
    assert noise.std().item() == pytest.approx(254 / 12**0.5, abs=1)
    assert (views.movedim(1, 3)[label == 0] == black.movedim(1, 3)[label == 0]).all()


def test_parts_of_the_loss_by_hand():
    """Two classes, gap g for the true one: log(1 + exp(-g)); image 0 is labeled, 1 is not."""
    gap = torch.tensor([[[2.0, -1.0]], [[0.0, 5.0]]])
    logits = torch.stack([gap, torch.zeros_like(gap)], dim=1)
    label = torch.tensor([[[0, 0]], [[0, 255]]])
    values = [math.log1p(math.exp(-g)) for g in (2, -1, 0)]
    parts = loss_parts(logits, label, torch.tensor([False, True]))
    assert parts[0].item() == pytest.approx(sum(values[:2]) / 3)
    assert parts[1].item() == pytest.approx(values[2] / 3)
    assert sum(parts).item() == pytest.approx(cross_entropy(logits, label).item())


# Runs.


def folder_of(args) -> Path:
    (folder,) = Path(args.output_dir).glob(f"*__{args.exp_name}__*")
    return folder


def labels_of(args) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder_of(args).glob("pseudo/*")}


@contextmanager
def stop(monkeypatch, name: str, number: int):
    """Ctrl-C at the n-th call of a function of the script."""
    function, calls = getattr(self_training, name), itertools.count(1)

    def interrupted(*args, **kwargs):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(self_training, name, interrupted)
        yield


@systems
def test_the_first_training_is_the_baseline(flags, quick, monkeypatch):
    """Bit for bit, optimizer included."""
    length = 4
    args = quick(Args, steps=length * self_training.trainings(Args(**flags)), **flags)
    with stop(monkeypatch, "write_pseudo_labels", 1):
        main(args)
    baseline = supervised.main(quick(supervised.Args, steps=length))
    assert_same(weights(folder_of(args)), weights(baseline["run_dir"]))


@systems
def test_it_trains(flags, quick):
    args = quick(Args, steps=90, log_every=1, lr=3e-3, eval_every=14, log_pseudo_accuracy=True)
    result = main(replace(args, **flags))
    folder, rows = Path(result["run_dir"]), read_log(result["run_dir"])
    count = 3 if "plus" in flags else 2
    assert [row["step"] for row in rows] == list(range(1, 91)) and result["steps"] == 90
    # Every training starts anew, with its own schedule, and learns.
    bounds = [90 * k // count for k in range(count + 1)]
    for begin, end in zip(bounds, bounds[1:], strict=False):
        loss = [row["loss/joint"] for row in rows[begin:end]]
        assert sum(loss[-8:]) < 0.9 * sum(loss[:8]) and loss[0] > 1.5
        expected = [3e-3 * (1 - k / (end - begin)) ** 0.9 for k in range(end - begin)]
        assert [row["lr"] for row in rows[begin:end]] == pytest.approx(expected)
    for row in rows:
        assert row["loss/sup"] + row["loss/pseudo"] == pytest.approx(row["loss/joint"], abs=1e-4)
    assert all(row["loss/pseudo"] == 0 for row in rows[: bounds[1]])
    assert sum(row["loss/pseudo"] for row in rows[bounds[1] :]) > 0
    # Scores of the earlier trainings are theirs.
    for number, begin in enumerate(bounds[:-2], 1):
        there = [row["step"] for row in rows if f"val/stage{number}/miou" in row]
        steps = range(begin + 1, bounds[number] + 1)
        assert there == [step for step in steps if step % 14 == 0 or step == bounds[number]]
    scores = [row["val/miou"] for row in rows if "val/miou" in row]
    assert len(scores) == 90 // 14 - bounds[-2] // 14 + 1
    assert result["miou"] == scores[-1] and result["best_miou"] == max(scores)
    assert torch.load(folder / "best.pt", weights_only=True)["step"] > bounds[-2]
    # Every unlabeled image has a label of its size, of known classes.
    files = sorted(folder.glob("pseudo/*"))
    split = self_training.open_data(self_training.resolve(args))[1]
    assert [file.stem for file in files] == sorted(split.unlabeled)
    for file in files:
        label = np.asarray(Image.open(file))
        assert label.shape == (64, 64) and label.dtype == np.uint8 and label.max() < 8
    assert [row["step"] - 1 for row in rows if "pseudo/miou" in row] == bounds[1:-1]
    if "plus" not in flags:  # all of them were in use in one training
        labels = np.stack([np.asarray(Image.open(file)) for file in files])
        truth = np.stack([Shapes(Path()).load(file.stem)[1].numpy() for file in files])
        both = [(labels == c, truth == c) for c in range(8)]
        iou = [(a & b).sum() / ((a | b) & (truth != 255)).sum() for a, b in both if (a | b).any()]
        assert rows[bounds[1]]["pseudo/miou"] == pytest.approx(np.mean(iou))
    assert ("pseudo/reliability" in rows[bounds[1]]) == ("plus" in flags)
    if "plus" in flags:
        scores = json.loads((folder / "reliability.json").read_text())
        assert list(scores) == list(split.unlabeled)
        row, best = rows[30], sorted(scores.values())[-(len(scores) // 2) :]
        assert row["pseudo/reliability"] == pytest.approx(np.mean(list(scores.values())))
        assert row["pseudo/reliability_chosen"] == pytest.approx(np.mean(best))
        assert {f.name for f in folder.glob("step_*")} == {"step_10.pt", "step_20.pt"}
        halves = select_reliable([*scores.values()])
        times = [[files[i].stat().st_mtime_ns for i in half] for half in halves]
        assert max(times[0]) <= min(times[1])  # the reliable half keeps its first labels


def predictions(folder, checkpoint, ids, tta: bool) -> dict[str, np.ndarray]:
    """Labels made here, from a checkpoint that a run left."""
    network = self_training.DeepLabV3Plus(8, "resnet14")
    state = torch.load(folder / checkpoint, weights_only=True)["network"]
    network.load_state_dict(state)
    network.eval()
    found, data = {}, Shapes(Path())
    for image_id in ids:
        image = normalize(data.load(image_id)[0][None].as_subclass(torch.Tensor))
        with torch.no_grad():
            scores = tta_probabilities(network, image) if tta else network(image)
        found[image_id] = pseudo_label(scores)[0].numpy()
    return found


@pytest.mark.parametrize("flags", [
    {}, {"tta": True}, {"teacher": "best"}, {"teacher": "best", "tta": True},
], ids=str)  # fmt: skip
def test_who_labels_and_how(flags, quick, monkeypatch):
    """`last`: the checkpoint at the end; `best`: the one that scored best, here the first."""
    scores = iter([0.9, 0.2, 0.3, 0.1])
    monkeypatch.setattr(self_training, "validate", lambda *_: {"val/miou": next(scores)})
    args = quick(Args, steps=40, lr=3e-3, eval_every=10, **flags)
    with stop(monkeypatch, "make_network", 2):  # after labeling
        main(args)
    folder = folder_of(args)
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 20
    assert torch.load(folder / "best.pt", weights_only=True)["step"] == 10
    ids = [file.stem for file in folder.glob("pseudo/*.png")]
    assert len(ids) == 13
    kind = flags.get("teacher", "last")
    right = predictions(folder, f"{kind}.pt", ids, "tta" in flags)
    wrong = predictions(folder, "last.pt" if kind == "best" else "best.pt", ids, "tta" in flags)
    files = {i: np.asarray(Image.open(folder / "pseudo" / f"{i}.png")) for i in ids}
    assert all((files[i] == right[i]).all() for i in ids)
    assert any((files[i] != wrong[i]).any() for i in ids)


def test_scores_compare_the_three_checkpoints(quick, monkeypatch):
    args = quick(Args, steps=36, lr=3e-3, plus=True)
    with stop(monkeypatch, "write_pseudo_labels", 1):
        main(args)
    folder = folder_of(args)
    scores = json.loads((folder / "reliability.json").read_text())
    maps = [predictions(folder, name, scores, False) for name in
            ("step_4.pt", "step_8.pt", "last.pt")]  # fmt: skip
    for image_id, score in scores.items():
        three = [torch.from_numpy(each[image_id]) for each in maps]
        assert stability_score(three, 8) == pytest.approx(score, abs=1e-12)
    assert len(set(scores.values())) > 5


def test_what_each_training_sees(quick, monkeypatch):
    """Ids and labels of the lists, batch sizes, and strong views of pseudo-labeled images alone."""
    lists, seen = [], []
    make_batches, augment = self_training.make_batches, self_training.strong_views

    def batches(args, data, ids, stream, place):
        lists.append((args.batch_size, ids, stream, place[0]))
        return make_batches(args, data, ids, stream, place)

    def strong(image, label, seeds):
        seen.append((len(image), set(seeds)))
        return augment(image, label, seeds)

    monkeypatch.setattr(self_training, "make_batches", batches)
    monkeypatch.setattr(self_training, "strong_views", strong)
    args = quick(Args, steps=12, plus=True)
    main(args)
    split = self_training.open_data(self_training.resolve(args))[1]
    scores = json.loads((folder_of(args) / "reliability.json").read_text())
    reliable = {split.unlabeled[i] for i in select_reliable([*scores.values()])[0]}
    assert len(split.labeled) == 8 and len(split.unlabeled) == 13 and len(reliable) == 6
    for (size, ids, _, _), pseudo, repeats in zip(
        lists, (set(), reliable, set(split.unlabeled)), (1, 1, 2), strict=True
    ):
        assert size == (8 if pseudo else 4)
        assert sorted(i for i, labeled in ids if labeled) == sorted([*split.labeled] * repeats)
        assert sorted(i for i, labeled in ids if not labeled) == sorted(pseudo)
    assert len({stream for _, _, stream, _ in lists}) == 3 and {at for *_, at in lists} == {0}
    assert [count for count, _ in seen] == [4] * 4 + [8] * 8
    for step, (_, chosen) in enumerate(seen):
        size, ids, stream, _ = lists[step // 4]
        pairs = self_training.global_batch(len(ids), size, args.seed, stream, step % 4)
        assert chosen == {n for n, (index, _) in enumerate(pairs) if not ids[index][1]}
    assert any(chosen for _, chosen in seen) and not any(chosen for _, chosen in seen[:4])


def test_batches_hold_the_files_labels(quick, monkeypatch):
    """What is written into the files is what the loss sees of pseudo-labeled images alone."""
    losses, write = [], self_training.write_pseudo_labels

    def write_sevens(args, network, joint, ids, place, autocast):
        write(args, network, joint, ids, place, autocast)
        for image_id in ids:
            Image.fromarray(np.full((64, 64), 7, np.uint8)).save(joint.file(image_id))

    def supervised_loss(logits, label, kind):
        losses.append(label)
        return cross_entropy(logits, label)

    monkeypatch.setattr(self_training, "write_pseudo_labels", write_sevens)
    monkeypatch.setattr(self_training, "supervised_loss", supervised_loss)
    args = quick(Args, steps=8)
    main(args)
    split = self_training.open_data(self_training.resolve(args))[1]
    entries = joint_ids(split.labeled, split.unlabeled, False)
    for step in range(4):
        pairs = self_training.global_batch(len(entries), 8, args.seed, "joint 1", step)
        all_sevens = (losses[4 + step] == 7).flatten(1).all(1).tolist()
        assert all_sevens == [entries[index] in split.unlabeled for index, _ in pairs]


STOPS = {
    "best": [("poly_lr", 3), ("write_file", 5), ("poly_lr", 9)],  # after best.pt is another's
    "plain": [("poly_lr", 3), ("write_file", 5), ("poly_lr", 9)],
    "ST": [("poly_lr", 4), ("write_file", 13), ("poly_lr", 2)],
    "ST++": [
        ("poly_lr", 4), ("stability_score", 7), ("write_file", 1), ("write_file", 4),
        ("poly_lr", 2), ("write_file", 3), ("write_file", 2), ("poly_lr", 3),
    ],
}  # fmt: skip


@pytest.mark.parametrize("system", STOPS)
def test_stopped_anywhere_it_ends_with_the_same_bits(system, quick, monkeypatch):
    """In a training, while scoring, while labeling, and again; files and log rows as well."""
    args = quick(Args, steps=24, save_every=5, log_every=1, eval_every=5, log_pseudo_accuracy=True)
    flags = SYSTEMS.get(system, {"teacher": "best", "save_every": 100})
    args = replace(args, exp_name="stopped", **flags)
    whole = replace(args, exp_name="whole")
    expected = main(whole)
    written = []
    for name, number in STOPS[system]:
        with stop(monkeypatch, name, number):
            main(args)
        written.append(len(labels_of(args)))
    labels = {file: file.stat().st_mtime_ns for file in folder_of(args).glob("pseudo/*.png")}
    result = main(args)
    assert result["miou"] == expected["miou"] and result["best_miou"] == expected["best_miou"]
    for name in ("last.pt", "best.pt"):
        assert_same(weights(folder_of(whole), name), weights(folder_of(args), name))
    assert labels_of(args) == labels_of(whole) and len(labels_of(whole)) == 13
    assert 0 in written[:1] and any(0 < count < 13 for count in written)
    for file, time in labels.items():  # what was there is not made again
        assert file.stat().st_mtime_ns == time
    rows = [read_log(folder_of(each)) for each in (whole, args)]
    for row in rows[0] + rows[1]:
        row.pop("time/images_per_s")
    assert json.dumps(rows[0]) == json.dumps(rows[1])
    if system == "ST++":
        scores = [(folder_of(each) / "reliability.json").read_bytes() for each in (whole, args)]
        assert scores[0] == scores[1]


def test_a_file_that_is_there_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGINT))
    for before in (None, b"old"):
        file = tmp_path / f"{before}.png"
        if before:
            file.write_bytes(before)
        with pytest.raises(KeyboardInterrupt):
            self_training.write_file(file, b"new")
        assert (file.read_bytes() if file.exists() else None) == before


def test_the_labels_of_a_deleted_run_are_not_used(quick, monkeypatch):
    args = quick(Args, steps=6, plus=True)
    main(args)
    before, folder = labels_of(args), folder_of(args)
    (folder / "last.pt").unlink()
    for file in [*folder.glob("pseudo/*"), folder / "reliability.json"]:
        file.write_bytes(b"of another run")
    main(args)
    assert labels_of(args) == before


def test_two_processes_write_the_labels_of_one(quick, monkeypatch):
    """From one checkpoint: scores, and the labels of the half that they choose."""
    args = quick(Args, steps=6, plus=True, exp_name="labels", split="1003")
    monkeypatch.undo()  # the processes see all images, and so must this one
    with stop(monkeypatch, "write_scores", 1):
        main(replace(args, exp_name="labels-1"))
    first = folder_of(replace(args, exp_name="labels-1"))
    second = first.with_name(first.name.replace("labels-1", "labels-2"))
    shutil.copytree(first, second)
    saved = json.loads((second / "args.json").read_text())
    (second / "args.json").write_text(json.dumps(saved | {"exp_name": "labels-2"}))
    assert torch.load(second / "last.pt", weights_only=True)["step"] == 2
    for count, folder in ((1, first), (2, second)):
        assert run_processes(count, "self_training", args) == folder
    scores = [(folder / "reliability.json").read_bytes() for folder in (first, second)]
    assert scores[0] == scores[1]
    values = json.loads(scores[0])
    reliable, _ = select_reliable([*values.values()])
    assert len(values) == 21 and len(reliable) == 10
    for image_id in (list(values)[index] for index in reliable):
        one, two = ((f / "pseudo" / f"{image_id}.png").read_bytes() for f in (first, second))
        assert one == two
    assert len(list(second.glob("pseudo/*.png"))) == 21 and not list(second.glob("pseudo/*.part"))


def test_micro_batches_are_the_batch_of_one(quick, monkeypatch):
    """Strong views too belong to the image's place in the global batch."""
    seen = []

    def supervised_loss(logits, label, kind):
        seen[-1].append(label == 255)  # the classes depend on BatchNorm's micro-batches
        return cross_entropy(logits, label)

    monkeypatch.setattr(self_training, "supervised_loss", supervised_loss)
    for accumulate in (1, 2):
        seen.append([])
        flags = {"accumulate": accumulate, "exp_name": f"n{accumulate}", "lr": 0.0}
        main(quick(Args, steps=4, strong=True, batch_size=8, **flags))
    one, two = (torch.cat(each) for each in seen)
    assert torch.equal(one, two) and one[16:].flatten(1).float().mean(1).max() > 0.02


def test_unlabeled_labels_are_never_read(quick, monkeypatch):
    assert_unlabeled_labels_are_not_read(self_training, quick, monkeypatch, "pseudo/miou")


def test_own_photos_in_subfolders_and_without_masks(tmp_path, monkeypatch, capsys):
    from test_cli import call, make_folder

    folder = make_folder(tmp_path)
    (folder / "images" / "more").mkdir()
    for number in (8, 9):
        source = folder / "images" / f"img{number}.png"
        source.rename(folder / "images" / "more" / f"img{number}.v1.png")
    flags = [
        "--dataset", "folder", "--data-root", folder, "--backbone", "resnet14", "--weights", "none",
        "--device", "cpu", "--batch-size", 4, "--crop-size", 32, "--steps", 4, "--num-workers", 2,
        "--output-dir", tmp_path / "runs", "--log-pseudo-accuracy", "--log-every", 1,
    ]  # fmt: skip
    for which, known in (("rest", False), ("all", True)):
        more = ["--unlabeled", which, "--exp-name", which]
        code, _, err = call(self_training, monkeypatch, capsys, *flags, *more)
        assert code == 0, err
        (run,) = tmp_path.glob(f"runs/*__{which}__*")
        files = [p.relative_to(run / "pseudo").as_posix() for p in run.rglob("pseudo/**/*.png")]
        expected = ["img6.png", "img7.png", "more/img8.v1.png", "more/img9.v1.png"]
        labeled = ["img0.png", "img1.png", "img2.png", "img3.png"] if known else []
        assert sorted(files) == labeled + expected
        assert Image.open(run / "pseudo" / files[0]).size == (48, 40)
        assert (read_log(run)[2]["pseudo/miou"] > 0) == known  # where no mask is, none is asked


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("plus", [False, True])
def test_runs_of_few_steps(steps, plus, quick):
    result = main(quick(Args, steps=steps, plus=plus))
    assert result["steps"] == steps and 0 <= result["miou"] <= 1
    assert len(list(Path(result["run_dir"]).glob("pseudo/*.png"))) == 13


def test_a_checkpoint_of_any_training_predicts(quick, tmp_path, monkeypatch, capsys):
    from test_cli import call

    import predict

    args = quick(Args, steps=9, plus=True)
    main(args)
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "photo.png")
    for name in ("last.pt", "best.pt", "step_1.pt"):
        flags = [folder_of(args) / name, tmp_path / "photo.png", "--out", tmp_path / name]
        assert call(predict, monkeypatch, capsys, *flags, "--device", "cpu")[0] == 0
        assert (tmp_path / name / "photo.png").is_file()


def test_plus_is_the_three_flags_and_the_selection(quick):
    args = quick(Args, steps=3, plus=True)
    main(args)
    saved = json.loads((folder_of(args) / "args.json").read_text())
    assert all(saved[flag] for flag in ("strong", "tta", "oversample"))
    main(replace(args, strong=True, tta=True, oversample=True))  # is the same run, finished


def test_paper_rows():
    def resolved(**flags):
        return self_training.resolve(Args(**flags))

    assert resolved(split="1/8").steps == 2 * 39_338 and resolved(plus=True).steps == 3 * 39_338
    assert resolved(dataset="shapes").steps == 2_000
    for dataset in PAPER:
        ours = resolved(dataset=dataset, split="1/8")
        theirs = supervised.resolve(supervised.Args(dataset=dataset, split="1/8"))
        assert [n for n, value in vars(ours).items() if value is None] == ["split_seed"]
        same = set(vars(theirs)) - {"exp_name", "steps", "eval_every"}
        assert {name: getattr(ours, name) for name in same} == {
            name: getattr(theirs, name) for name in same
        }
        assert ours.steps == 2 * theirs.steps and not (ours.strong or ours.tta or ours.oversample)


def test_no_unlabeled_images(quick):
    with pytest.raises(UserError, match="no unlabeled images"):
        main(quick(Args, split="21"))
