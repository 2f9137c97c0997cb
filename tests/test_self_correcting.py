"""self_correcting.py: boxes, gates, corrections and losses against slow forms, stages, runs."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    TinyNet,
    assert_same,
    assert_unlabeled_labels_are_not_read,
    golden_files,
    load_golden,
    read_log,
    record_steps,
    weights,
)
from PIL import Image
from test_datasets import CITY, SBD, flags, label, make_cityscapes, make_devkit, make_folder, save
from test_distributed import run
from torch import nn
from torchvision import tv_tensors

import predict
import self_correcting
from common import UserError
from common.datasets import CamVid, Samples, Shapes, open_data, open_dataset
from common.files import check_boxes
from common.transforms import LocatedView
from self_correcting import (
    PAPER,
    AncillaryNet,
    Args,
    ConvCorrection,
    DeepLabV3Plus,
    alpha_schedule,
    ancillary_half,
    box_tensor,
    boxes_from_mask,
    boxes_in_view,
    cross_entropy,
    linear_correction,
    main,
    make_ancillary,
    poly_lr,
    resolve,
    soft_cross_entropy,
    stage_starts,
)

GOLDENS = golden_files("self_correcting_seed*.npz")
by_stem = {"ids": lambda path: f"{path.parent.name}-{path.stem}"}
VARIANTS = ("none", "linear", "conv")


def rows(boxes) -> list:
    return sorted(torch.as_tensor(boxes).tolist())


# ---- boxes ---------------------------------------------------------------------------------------


def test_boxes_of_a_mask_by_hand():
    drawn = "11..2", "1...2", ".1.X.", "...X3"  # X is ignored; the 1 below touches by its corner
    names = {".": 0, "X": 255}
    mask = torch.tensor([[names.get(c) if c in names else int(c) for c in row] for row in drawn])
    parts = [[1, 0, 0, 3, 2], [2, 0, 4, 2, 5], [3, 3, 4, 4, 5]]
    assert rows(boxes_from_mask(mask.byte(), 4)) == parts
    assert rows(boxes_from_mask(mask, 4, min_pixels=2)) == parts[:2]
    whole = boxes_from_mask(mask, 4, background=None)
    assert rows(whole) == [[0, 0, 0, 4, 5], *parts] and whole.dtype == torch.int64
    assert boxes_from_mask(torch.full((3, 3), 255), 4).shape == (0, 5)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_boxes_tensors_and_views_are_the_slow_ones(path):
    golden = load_golden(path)
    for background in (0, None):
        for pixels in (1, 4):
            for k, mask in enumerate(torch.from_numpy(golden["boxes/label"])):
                found = boxes_from_mask(mask, 5, background, pixels)
                assert rows(found) == rows(golden[f"boxes/{background}/{pixels}/{k}"])
        for name in ("none", "one", "overlap", "whole", "outside", "random"):
            boxes = golden.tensor(f"tensor/{name}/boxes").view(-1, 5)
            found = box_tensor(boxes, 11, 13, 5, background)
            assert found.dtype == torch.float32
            assert torch.equal(found.long(), golden.tensor(f"tensor/{name}/{background}"))
    for k, view in enumerate(golden.tensor("crop/views")):
        found = boxes_in_view(golden.tensor("crop/boxes"), view)
        assert rows(found) == rows(golden[f"crop/{k}"])


def test_box_tensor_by_hand():
    # Two classes share the middle; the second box leaves the 2 x 4 grid on two sides.
    boxes = torch.tensor([[1, 0, 0, 2, 3], [2, -1, 2, 1, 9]])
    expected = [[[0, 0, 0, 0], [0, 0, 0, 1]], [[1, 1, 1, 0]] * 2, [[0, 0, 1, 1], [0, 0, 0, 0]]]
    assert box_tensor(boxes, 2, 4, 3).tolist() == expected
    none = [[[0] * 4] * 2, *expected[1:], expected[0]]  # no background class: a channel of its own
    assert box_tensor(boxes, 2, 4, 3, background=None).tolist() == none
    assert box_tensor(boxes[:0], 2, 4, 3).sum((1, 2)).tolist() == [8, 0, 0]


def test_boxes_through_a_view_by_hand():
    boxes = torch.tensor([[3, 2, 1, 4, 4], [5, 0, 0, 1, 1]])
    image = [8, 6, 0, 0]
    # The whole image: as it is, flipped, twice as large, half as large, in the middle of a canvas.
    for place, expected in [
        ([8, 6, 8, 6, 0, 0, 0], [[3, 2, 1, 4, 4], [5, 0, 0, 1, 1]]),
        ([8, 6, 8, 6, 0, 0, 1], [[3, 2, 2, 4, 5], [5, 0, 5, 1, 6]]),
        ([8, 6, 16, 12, 0, 0, 0], [[3, 4, 2, 8, 8], [5, 0, 0, 2, 2]]),
        ([8, 6, 4, 3, 0, 0, 0], [[3, 1, 0, 2, 2]]),  # centers on 1, 3, 5: the last is outside
        ([8, 6, 8, 6, 2, 3, 1], [[3, 4, 5, 6, 8], [5, 2, 8, 3, 9]]),
    ]:
        assert rows(boxes_in_view(boxes, torch.tensor(image + place))) == rows(expected)
    # A window from (3, 2) on cuts the first and loses the second.
    window = torch.tensor([8, 6, 3, 2, 4, 4, 4, 4, 0, 0, 0])
    assert boxes_in_view(boxes, window).tolist() == [[3, 0, 0, 1, 2]]
    assert boxes_in_view(boxes[:0], window).shape == (0, 5)


def test_boxes_follow_the_pixels_of_a_view():
    """A mask of the box that is drawn at full size and goes through the view itself."""
    mask = torch.zeros(40, 56, dtype=torch.uint8)
    mask[9:23, 17:50] = 1
    image, mask = tv_tensors.Image(mask.expand(3, -1, -1)), tv_tensors.Mask(mask)
    for seed in range(60):
        torch.manual_seed(seed)
        _, seen, place = LocatedView(24, (0.5, 1.0, 2.0))(image, mask)
        boxes = boxes_in_view(torch.tensor([[1, 9, 17, 23, 50]]), place)
        drawn = box_tensor(boxes, 24, 24, 2)
        if place[4] == place[6]:  # not scaled: every pixel; else its edge may move by one
            assert torch.equal(drawn[1], (seen == 1).float())
        assert abs(drawn[1].sum() - (seen == 1).sum()) <= 2 * 24
        assert torch.equal(drawn.sum(0), torch.ones(24, 24))  # padding is where no box lies


def test_samples_carry_the_boxes_of_their_image_and_view():
    data, ids, view = Shapes(None), Shapes.train_ids[:3], LocatedView(48, Shapes.scales)
    with_boxes = self_correcting.BoxSamples(data, ids, view, "none")
    for pair in [(0, 5), (1, 6), (2, 7), (1, 8), (0, 5)]:
        image, mask, place = Samples(data, ids, view, "none")[pair]
        found = with_boxes[pair]
        expected = box_tensor(boxes_in_view(data.boxes(ids[pair[0]]), place), 48, 48, 8)
        assert all(map(torch.equal, found[:2], (image, mask)))
        assert found[2].dtype == torch.uint8 and torch.equal(found[2].float(), expected)


# ---- where they come from ------------------------------------------------------------------------

ANNOTATION = """<annotation><object><name>dog</name>
<bndbox><xmax>6</xmax><xmin>2.0</xmin><ymax>5</ymax><ymin>1</ymin></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>
</part></object><object><difficult>1</difficult><name>CAT</name>
<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object></annotation>"""
DOG = [12, 0, 1, 5, 6]  # from 0, behind the last


def voc(root):
    devkit = make_devkit(root)
    for image_id in SBD:
        save(devkit / "SegmentationClassAug" / f"{image_id}.png", label(0, 5))
    data = open_dataset("voc", root)
    (devkit / "Annotations").mkdir()
    for image_id in data.train_ids:
        text = ANNOTATION.replace("CAT", "cat")
        (devkit / "Annotations" / f"{image_id}.xml").write_text(text)
    return data


def test_boxes_of_voc(tmp_path, capsys):
    data = voc(tmp_path)
    assert rows(data.boxes(SBD[0])) == [[8, 1, 0, 4, 3], DOG]
    _, split = open_data(flags("voc", tmp_path, "2", 0), with_boxes=True)
    assert not capsys.readouterr().err
    path = data.box_files(split.unlabeled[0])[0]
    path.write_text(ANNOTATION)
    data, _ = open_data(flags("voc", tmp_path, "2", 0), with_boxes=True)
    assert rows(data.boxes(split.unlabeled[0])) == [DOG]
    assert "boxes of CAT are left out" in capsys.readouterr().err
    path.write_text(ANNOTATION.replace("<ymin>1", "<ymin>one"))
    with pytest.raises(UserError, match=f"{path}: not boxes"):
        open_data(flags("voc", tmp_path, "2", 0), with_boxes=True)
    path.unlink()
    with pytest.raises(UserError, match=f"1 files with boxes are missing: {path}"):
        open_data(flags("voc", tmp_path, "2", 0), with_boxes=True)
    open_data(flags("voc", tmp_path, "2", 0))  # other scripts need none


def test_a_run_is_of_its_boxes(tmp_path):
    voc(tmp_path)
    prints = []
    for boxes in (True, True, False):
        data, split = open_data(flags("voc", tmp_path, "2", 0), with_boxes=boxes)
        prints.append(data.fingerprint(split))
        path = data.box_files(split.unlabeled[-1])[0]
        path.write_text(path.read_text().replace("<xmin>1<", "<xmin>2<"))
    differ = {key for key in prints[0] if prints[0][key] != prints[1][key]}
    assert differ == {"boxes"} and prints[0].keys() - prints[2].keys() == {"boxes"}


def test_boxes_of_cityscapes(tmp_path):
    make_cityscapes(tmp_path)
    data = open_dataset("cityscapes", tmp_path)
    ids = label(7, 7, 26, 26, 26, 24, 29, size=(1, 7)).repeat(5, 0)
    path = data.label_path(CITY["train"][0])
    Image.fromarray(ids.astype(np.uint8)).save(path)
    instance = ids.astype(np.uint16)
    instance[:2, 2:4], instance[2:, 3:5], instance[:, 6] = 26_000, 26_001, 29_000
    Image.fromarray(instance).save(data.box_files(CITY["train"][0])[1])
    # Two cars that touch, the rest of their pixels, a person without a number, no caravan.
    cars = [[13, 0, 2, 2, 4], [13, 2, 3, 5, 5], [13, 0, 4, 2, 5], [13, 2, 2, 5, 3]]
    assert rows(data.boxes(CITY["train"][0])) == sorted([[0, 0, 0, 5, 2], *cars, [11, 0, 5, 5, 6]])
    with pytest.raises(UserError, match="1 files with boxes are missing"):
        data.check_boxes(CITY["train"])


def test_boxes_of_a_folder(tmp_path):
    (make_folder(tmp_path) / "boxes").mkdir()
    with pytest.raises(UserError, match=r"2 files with boxes are missing: .*boxes/x\.xml"):
        open_data(flags("folder", tmp_path, "labeled.txt"), with_boxes=True)
    for image_id in "xy":
        text = ANNOTATION.replace("dog", "bright light").replace("CAT", "dark")
        (tmp_path / "boxes" / f"{image_id}.xml").write_text(text)
    data, _ = open_data(flags("folder", tmp_path, "labeled.txt"), with_boxes=True)
    assert data.background is None and rows(data.boxes("x")) == [[0, 1, 0, 4, 3], [1, *DOG[1:]]]
    mask = data.load("a")[1]
    assert rows(data.boxes("a")) == rows(boxes_from_mask(mask, 2, None))  # none lies there
    (tmp_path / "boxes" / "y.xml").unlink()
    args = Args(dataset="folder", data_root=str(tmp_path), device="cpu", batch_size=2)
    with pytest.raises(UserError, match=r"1 files with boxes are missing: .*boxes/y\.xml"):
        main(args)
    for name in ("background", "_background_", "Background"):
        (tmp_path / "classes.txt").write_text(f"other\n{name}\n")
        assert open_dataset("folder", tmp_path).background == 1


def test_boxes_are_those_of_their_image(tmp_path):
    photo, path = tmp_path / "a.jpg", tmp_path / "a.xml"

    def check(boxes="2 1 6 5", size=None, turn=1):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.new("RGB", (8, 6)).save(photo, exif=exif)
        edges = zip(("xmin", "ymin", "xmax", "ymax"), boxes.split(), strict=True)
        edges = "".join(f"<{edge}>{value}</{edge}>" for edge, value in edges)
        size = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
        text = f"{size}<object><name>dog</name><bndbox>{edges}</bndbox></object>"
        path.write_text(f"<annotation>{text}</annotation>")
        return check_boxes(path, photo)

    assert check() == check(size=(8, 6)) == check(size=(0, 0)) == {"dog"}
    assert check("1 1 8 6") == check("0 0 9 7") == {"dog"}  # a pixel off
    assert check("1 1 6 8", size=(6, 8), turn=6) == {"dog"}  # drawn as it is seen
    for boxes in ("20 10 60 50", "0.2 0.1 0.6 0.5", "6 5 2 1"):
        with pytest.raises(UserError, match="is no box of pixels of .*a.jpg, 8 x 6"):
            check(boxes)
    with pytest.raises(UserError, match="boxes of a picture of 80 x 60, but .*a.jpg has 8 x 6"):
        check(size=(80, 60))
    for size, turn in ((None, 6), ((8, 6), 6), ((8, 6), 3), (None, 3)):
        with pytest.raises(UserError, match="EXIF turns it"):
            check(size=size, turn=turn)


def test_boxes_of_shapes_leave_small_parts_out():
    data = Shapes(None)
    mask = data.load("00003")[1]
    assert rows(data.boxes("00003")) == rows(boxes_from_mask(mask, 8, 0, 4)) != []
    assert (Shapes.min_pixels, CamVid.min_pixels) == (4, 16)


# ---- the networks --------------------------------------------------------------------------------


def test_open_gates_make_the_plain_network_and_boxes_matter():
    torch.manual_seed(0)
    network = AncillaryNet(5, "resnet14", box_channels=6).eval()
    low, high = network.box_low, network.box_high
    assert low.weight.shape == (64, 6, 3, 3) and high.weight.shape == (64, 6, 3, 3)
    assert AncillaryNet(5, "resnet14").box_low.in_channels == 5
    image = torch.randn(2, 3, 48, 48)
    boxes = torch.stack([box_tensor(torch.tensor([[2, 8, 8, 40, 30]]), 48, 48, 5, None)] * 2)
    with torch.no_grad():
        closed = network(image, boxes)
        assert closed.shape == (2, 5, 48, 48)
        assert not torch.allclose(closed, network(image, boxes.flip(3)), atol=1e-3)
        for gate in (low, high):  # one gate at a time: both hold something back
            gate.weight.zero_(), gate.bias.fill_(100.0)
            assert not torch.allclose(network(image, boxes), closed, atol=1e-3)
            closed = network(image, boxes)
        torch.testing.assert_close(network(image, boxes), network.network(image))
        for gate in (low, high):
            gate.bias.zero_()
        half, head = network(image, boxes), network.network.head
        head.aspp.register_forward_hook(lambda _, __, output: output / 2)
        head.reduce.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 2,))
        torch.testing.assert_close(half, network.network(image))


def test_a_gate_takes_the_pixel_where_its_feature_lies():
    network = AncillaryNet(2, "resnet14").eval()
    boxes = (torch.rand(1, 2, 48, 48, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    seen = {}
    for name in ("box_low", "box_high"):
        gate = getattr(network, name)
        gate.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0]}))
    network(torch.randn(1, 3, 48, 48), boxes)
    assert torch.equal(seen["box_low"], boxes[..., ::4, ::4])
    assert torch.equal(seen["box_high"], boxes[..., ::8, ::8])


def test_the_ancillary_networks_encoder_has_the_encoders_rate(quick, monkeypatch):
    made, make_optimizer = {}, self_correcting.make_optimizer

    def ancillary_of(*args):
        return made.setdefault("ancillary", make_ancillary(*args))

    def optimizer_of(networks, *args):
        made["optimizer"] = make_optimizer(networks, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(self_correcting, "make_ancillary", ancillary_of)
    monkeypatch.setattr(self_correcting, "make_optimizer", optimizer_of)
    with pytest.raises(KeyboardInterrupt):
        main(quick(Args, head_lr_mult=10.0))
    ancillary, optimizer = made["ancillary"], made["optimizer"]
    rates = {id(p): group["lr_mult"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in ancillary.named_parameters():
        assert rates[id(parameter)] == (1 if "backbone." in name else 10), name
    assert ancillary.box_low.in_channels == 8


def test_linear_correction_by_hand():
    # p = (3/4, 1/4), p_anc = (1/2, 1/2): the geometric mean at alpha 1 is sqrt(3) : 1.
    primary = torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1).requires_grad_()
    ancillary = torch.zeros(1, 2, 1, 1, requires_grad=True)
    found = linear_correction(primary, ancillary, 1.0)
    assert not found.requires_grad
    assert found.flatten().tolist() == pytest.approx([0.633975, 0.366025], rel=1e-5)
    assert linear_correction(primary, ancillary, 0).flatten().tolist() == pytest.approx(
        [0.75, 0.25]
    )
    assert linear_correction(primary.bfloat16(), ancillary.bfloat16(), 1.0).dtype == torch.float32
    # alpha 0: q = p, and its loss moves nothing.
    soft_cross_entropy(primary, linear_correction(primary, ancillary, 0)).backward()
    assert primary.grad.abs().max() < 1e-7


def test_soft_cross_entropy_by_hand():
    logits = torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1).repeat(2, 1, 1, 2).requires_grad_()
    target = torch.full((2, 2, 1, 2), 0.5, requires_grad=True)
    valid = torch.tensor([[[True, False]], [[False, False]]])
    expected = -0.5 * math.log(3 / 4) - 0.5 * math.log(1 / 4)
    for shape in ((2, 1, 2), (2, 1, 1, 2)):
        loss = soft_cross_entropy(logits, target, valid.view(shape))
        assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert target.grad is None and logits.grad[0, :, 0, 0].tolist() == pytest.approx([0.25, -0.25])
    assert logits.grad.count_nonzero() == 2
    logits.grad = None
    nothing = soft_cross_entropy(logits, target, valid & False)
    nothing.backward()
    assert nothing.item() == 0 and not logits.grad.any()
    assert soft_cross_entropy(logits.half(), target.half()).dtype == torch.float32
    hard = torch.tensor([[[0, 1]], [[1, 1]]])
    one_hot = nn.functional.one_hot(hard, 2).movedim(3, 1).float()
    torch.testing.assert_close(soft_cross_entropy(logits, one_hot), cross_entropy(logits, hard))


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_corrections_and_losses_are_the_slow_ones(path):
    golden = load_golden(path)
    total = int(golden["alpha/total"])
    found = [alpha_schedule(step, total) for step in golden["alpha/step"].tolist()]
    assert found == pytest.approx(golden["alpha/value"].tolist(), rel=1e-9)
    primary, ancillary = (torch.from_numpy(golden[f"linear/{k}"]) for k in ("primary", "ancillary"))
    for alpha in golden["linear/alphas"].tolist():
        expected = golden.tensor(f"linear/{alpha:g}/q")
        found = linear_correction(primary, ancillary, alpha)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    target = torch.from_numpy(golden["soft/target"])
    for ending, valid in (("", torch.from_numpy(golden["soft/valid"])), ("_all", None)):
        logits = torch.from_numpy(golden["soft/logits"]).requires_grad_()
        loss = soft_cross_entropy(logits, target, valid)
        assert loss.item() == pytest.approx(float(golden[f"soft/loss{ending}"]), 1e-5, 1e-7)
        loss.backward()
        assert_gradient(logits.grad, golden.tensor(f"soft/grad{ending}"))
    correction = conv_of(golden.part("conv/"))
    primary, ancillary = (each.double().requires_grad_() for each in (primary, ancillary))
    logits = correction(primary, ancillary)
    torch.testing.assert_close(logits, golden.tensor("conv/logits"), rtol=1e-5, atol=1e-7)
    loss = cross_entropy(logits, golden.tensor("conv/label"))
    assert loss.item() == pytest.approx(float(golden["conv/loss"]), 1e-5, 1e-7)
    loss.backward()
    assert primary.grad is None and ancillary.grad is None
    for name, parameter in zip(("w1", "b1", "w2", "b2"), correction.parameters(), strict=True):
        assert_gradient(parameter.grad, golden.tensor(f"conv/grad_{name}"))


def assert_gradient(gradient, expected) -> None:
    atol = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=atol)


def conv_of(state: dict[str, torch.Tensor]) -> ConvCorrection:
    hidden, classes = len(state["b1"]), len(state["b2"])
    correction = ConvCorrection(classes, hidden).double()
    assert not list(correction.buffers())
    for name, parameter in zip(("w1", "b1", "w2", "b2"), correction.parameters(), strict=True):
        parameter.data.copy_(state[name])
    return correction


def test_schedules_and_halves():
    assert [alpha_schedule(k, 600) for k in (0, 100, 600)] == pytest.approx([30, 11.03638, 0.5])
    assert alpha_schedule(409, 600) > 0.5 == alpha_schedule(410, 600)  # 0.6824 of the way
    assert alpha_schedule(1, 4, start=2.0, end=0.1) == pytest.approx(2 * math.exp(-1.5))
    assert stage_starts(1500, "linear") == stage_starts(1500, "none") == (500, 500)
    assert stage_starts(1500, "conv") == (500, 750)
    for steps in range(1, 40):
        second, third = stage_starts(steps, "conv")
        assert 0 <= second <= third < steps
    ids = [f"{i:02d}" for i in range(21)]
    half = ancillary_half(ids, 0)
    assert len(half) == len(set(half)) == 11 and set(half) < set(ids) and half != ids[:11]
    assert half == ancillary_half(ids, 0) != ancillary_half(ids, 1)
    assert ancillary_half(["a"], 0) == ["a"] and type(ancillary_half(("a", "b"), 3)) is list


# ---- runs ----------------------------------------------------------------------------------------


def tiny(state: dict[str, torch.Tensor]) -> TinyNet:
    """Of the goldens, which name its parts in their own way."""
    names = {
        "conv": "conv.weight", "gamma": "bn.weight", "beta": "bn.bias", "cls": "cls.weight",
        "bn_mean": "bn.running_mean", "bn_var": "bn.running_var", "bias": "cls.bias",
    }  # fmt: skip
    return TinyNet({names[key]: value for key, value in state.items()})


class Given(nn.Module):
    """An ancillary network whose logits are known, in the order in which they are asked for."""

    def __init__(self, logits):
        super().__init__()
        self.logits = iter(logits)

    def forward(self, image, boxes):
        assert not self.training and not torch.is_grad_enabled()
        return next(self.logits)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
@pytest.mark.parametrize("variant", VARIANTS)
def test_main_takes_the_steps(path, variant, quick, monkeypatch):
    """`main` itself on their networks and images: losses, weights, statistics."""
    golden, streams, asked, stages = load_golden(path), {"labeled": [], "unlabeled": []}, [], []
    while f"steps/{variant}/{len(stages)}/stage" in golden:
        part = golden.part(f"steps/{variant}/{len(stages)}/")
        valid = golden[f"steps/{variant}/{len(stages)}/valid_w"]
        stages.append(int(part["stage"]))
        streams["labeled"].append((part["image_f"], part["label"], None))
        asked += [part["ancillary_f"]] if variant == "conv" else []
        if stages[-1] == 3:
            inside = torch.from_numpy(np.where(valid, 254, 255))
            streams["unlabeled"].append((part["image_w"], inside, None))
            asked.append(part["ancillary_w"])
    primary, state = tiny(golden.part(f"steps/{variant}/before/")), {}
    correction = None
    if variant == "conv":
        correction = conv_of(golden.part("steps/conv/before_g/"))
    total, alpha_total = (int(golden[f"steps/{key}"]) for key in ("total", "alpha_total"))
    for name, value in {
        "make_ancillary": lambda *_: Given(asked),
        "stage_starts": lambda *_: (0, stages.index(3)),
        "alpha_schedule": lambda step, _, *rest: alpha_schedule(step, alpha_total, *rest),
        "ConvCorrection": lambda *_: correction,
    }.items():
        monkeypatch.setattr(self_correcting, name, value)
    args = quick(
        Args, steps=total, optimizer="sgd", lr=float(golden["steps/lr"]), momentum=0.9,
        weight_decay=float(golden["steps/weight_decay"]), batch_size=2, log_every=1,
        eval_every=10**6, correction=variant,
    )  # fmt: skip
    other = correction or nn.Identity()
    states, logs = record_steps(self_correcting, args, monkeypatch, primary, other, streams)
    assert len(states) == len(logs) == len(stages) >= 2
    for step, ((state, state_g), row) in enumerate(zip(states, logs, strict=True)):
        at = f"steps/{variant}/{step}/"
        for name, key in (("sup", "loss_f"), ("weak", "loss_w"), ("correction", "loss_q")):
            expected = float(golden[at + key])
            assert row.get(f"loss/{name}", 0) == pytest.approx(expected, 1e-6, 1e-7), (at, name)
        expected = tiny(golden.part(f"{at}after/")).state_dict()
        for key in expected:
            if not key.endswith("num_batches_tracked"):
                torch.testing.assert_close(state[key], expected[key], rtol=1e-6, atol=1e-6)
        if correction:
            expected = golden.part(f"{at}after_g/")
            for key, value in zip(("w1", "b1", "w2", "b2"), state_g.values(), strict=True):
                torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)


def snapshots(args, monkeypatch) -> list[dict[str, dict[str, torch.Tensor]]]:
    """States of the networks at the start and after each step."""
    first, states, prepare = [], {}, self_correcting.prepare

    def copy_of(network):
        return {key: value.clone() for key, value in network.state_dict().items()}

    def prepare_and_copy(network, *rest):
        first.append(copy_of(network))
        return prepare(network, *rest)

    def save(self, name, done, saved, *_, **__):
        networks = {key: thing for key, thing in saved.items() if isinstance(thing, nn.Module)}
        states[done] = {key: copy_of(network) for key, network in networks.items()}

    monkeypatch.setattr(self_correcting, "prepare", prepare_and_copy)
    monkeypatch.setattr(self_correcting.Run, "save", save)
    main(replace(args, save_every=1))
    names = ("ancillary", "primary", "correction")
    return [dict(zip(names, first, strict=False)), *states.values()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_stage_reads_its_stream(variant, quick, monkeypatch):
    asked, images, make_batches = [], {}, self_correcting.make_batches

    def batches(args, data, ids, stream, *rest):
        images[stream] = list(ids)
        for batch in make_batches(args, data, ids, stream, *rest):
            asked.append(stream)
            yield batch

    monkeypatch.setattr(self_correcting, "make_batches", batches)
    main(quick(Args, steps=6, correction=variant))
    pair = ["labeled", "unlabeled"]
    stage_1 = ["ancillary"] * 2
    assert asked == stage_1 + (["labeled"] + pair * 3 if variant == "conv" else pair * 4)
    half = ancillary_half(images["labeled"], 0)
    assert images["ancillary"] == (half if variant == "conv" else images["labeled"])
    assert len(images["labeled"]) == 8 and not {*images["labeled"]} & {*images["unlabeled"]}


def test_rates_fall_in_stage_1_and_once_more(quick):
    folder = main(quick(Args, steps=6, correction="conv", log_every=1, lr=0.5))["run_dir"]
    expected = [poly_lr(0.5, *at) for at in ((0, 2), (1, 2), (0, 4), (1, 4), (2, 4), (3, 4))]
    rows = read_log(folder)
    assert [row["lr"] for row in rows] == pytest.approx(expected)
    logged = [{key for key in row if key.startswith("loss/")} for row in rows]
    assert logged[:3] == [{"loss/anc"}, {"loss/anc"}, {"loss/sup", "loss/correction"}]
    assert logged[3:] == [{"loss/sup", "loss/correction", "loss/weak"}] * 3
    folder = main(quick(Args, steps=6, correction="conv", log_every=4, exp_name="b"))["run_dir"]
    first = read_log(folder)[0]  # of stage 3 alone
    assert first["step"] == 4 and first["loss/weak"] > 0 and "loss/anc" not in first


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_stage_trains_what_it_should_and_nothing_else(variant, quick, monkeypatch):
    args = quick(Args, steps=6, correction=variant, log_every=1)
    states = snapshots(args, monkeypatch)
    assert len(states) == 7
    expected = {
        "conv": [{"ancillary"}] * 2 + [{"primary", "correction"}] * 4,
        "linear": [{"ancillary"}] * 2 + [{"primary"}] * 4,
    }
    expected["none"] = expected["linear"]
    counter = "backbone.bn1.num_batches_tracked"
    for step, (before, after) in enumerate(pairwise(states)):
        changed = {
            name
            for name in after
            if any(not torch.equal(after[name][k], v) for k, v in before[name].items())
        }
        assert changed == expected[variant][step], step
        # Labeled images alone, then labeled and unlabeled ones, apart.
        forwards = after["primary"][counter] - before["primary"][counter]
        stage_3 = step >= (3 if variant == "conv" else 2)
        assert forwards == (0 if step < 2 else 2 if stage_3 else 1), step


def test_gradient_routes(quick, monkeypatch):
    """What each loss of stage 3 moves: the correction's nothing but the correction network, and the
    weak one the primary network alone, although its target comes from all three."""
    monkeypatch.setattr(self_correcting, "stage_starts", lambda *_: (0, 0))
    flags = {"steps": 1, "correction": "conv", "optimizer": "sgd", "momentum": 0.0}

    def moved(name, **losses) -> set[str]:
        with monkeypatch.context() as patch:
            for key, factor in losses.items():
                loss = getattr(self_correcting, key)
                patch.setattr(self_correcting, key, lambda *a, f=factor, loss=loss: loss(*a) * f)
            before, after = snapshots(quick(Args, exp_name=name, weight_decay=0.0, **flags), patch)
        return {
            net
            for net, state in after.items()
            if any(
                not torch.equal(state[k], v)
                for k, v in before[net].items()
                if v.is_floating_point() and "running" not in k
            )
        }

    assert moved("weak", supervised_loss=0, cross_entropy=0) == {"primary"}
    # supervised_loss calls cross_entropy itself; with weight 0 only the correction's is left.
    assert moved("g", supervised_loss=0, soft_cross_entropy=0) == {"correction"}
    assert moved("sup", cross_entropy=1, soft_cross_entropy=0) == {"primary", "correction"}


@pytest.mark.parametrize("variant", ["conv", "linear"])
def test_killed_in_each_stage_it_ends_with_the_same_bits(variant, quick, monkeypatch):
    args = quick(Args, steps=6, correction=variant, log_every=1, save_every=1, accumulate=2)
    whole = main(replace(args, exp_name="whole"))["run_dir"]
    save = self_correcting.Run.save
    for stop in (1, 2, 3, 5):  # in stage 1, at its end, at the end of conv's stage 2, in stage 3

        def save_and_stop(self, name, step, *rest, stop=stop, **more):
            save(self, name, step, *rest, **more)
            if name == "last.pt" and step == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(self_correcting.Run, "save", save_and_stop)
            main(args)
    resumed = main(args)["run_dir"]
    assert_same(weights(whole), weights(resumed))
    logs = [read_log(folder) for folder in (whole, resumed)]
    assert [row["step"] for row in logs[0]] == list(range(1, 7))
    for row in logs[0] + logs[1]:
        row.pop("time/images_per_s")
    assert json.dumps(logs[0]) == json.dumps(logs[1])


def test_two_processes_take_the_steps_of_one(quick):
    """A step of each stage where BatchNorm cannot differ."""
    args = quick(
        Args, steps=3, correction="conv", optimizer="sgd", lr=0.1, momentum=0.0, log_every=1,
        log_pseudo_accuracy=True,
    )  # fmt: skip
    one, two = (run(n, "self_correcting", args, frozen=True) for n in (1, 2))
    before, after = weights(one), weights(two)
    for key, value in before.items():
        torch.testing.assert_close(value, after[key], rtol=0, atol=1e-5)
    for row_1, row_2 in zip(read_log(one), read_log(two), strict=True):
        assert row_1.keys() == row_2.keys()
        for key in row_1.keys() - {"time/images_per_s"}:
            assert row_1[key] == pytest.approx(row_2[key], abs=1e-4, nan_ok=True), key


def test_masks_of_the_second_set_give_its_boxes_and_nothing_else(quick, monkeypatch):
    load = Shapes.load
    with monkeypatch.context() as patch:  # an annotator's boxes, whatever the masks say
        patch.setattr(Shapes, "load_label", lambda self, i: load(self, i)[1].numpy())
        assert_unlabeled_labels_are_not_read(self_correcting, quick, patch)
    first, boxes = main(quick(Args, exp_name="c"))["run_dir"], Shapes.boxes
    shift = torch.tensor([0, 5, 5, 5, 5])
    monkeypatch.setattr(Shapes, "boxes", lambda self, i: boxes(self, i) + shift)
    second = main(quick(Args, exp_name="d"))["run_dir"]
    assert not torch.equal(*(weights(f)["/primary/classifier.weight"] for f in (first, second)))


def test_the_checkpoint_is_a_plain_network(quick, monkeypatch, tmp_path, capsys):
    folder = main(quick(Args, correction="conv"))["run_dir"]
    checkpoint = torch.load(f"{folder}/last.pt", weights_only=True)
    assert checkpoint["evaluated"] == "primary"
    DeepLabV3Plus(8, "resnet14").load_state_dict(checkpoint["primary"])
    picture = tmp_path / "scene.png"
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(picture)
    predict.main(
        predict.Args(checkpoint=Path(folder) / "last.pt", images=(picture,), out=tmp_path / "out")
    )
    assert Image.open(tmp_path / "out" / "scene.png").size == (48, 40)


@pytest.mark.parametrize("value", [{"alpha_end": -1.0}, {"alpha_start": float("nan")}], ids=str)
def test_bad_flags(quick, value):
    with pytest.raises(UserError, match=next(iter(value)).replace("_", "-")):
        main(quick(Args, **value))


def test_paper_rows():
    corrections = ["conv", "conv", "linear", "linear", "conv"]
    assert [row["correction"] for row in PAPER.values()] == corrections
    args = Args(dataset="voc")
    assert (args.alpha_start, args.alpha_end) == (30.0, 0.5)
    for name, split, steps in (
        ("voc", "1/8", 39_338), ("voc", "classic:1464", 39_680), ("voc", "1/2", 39_660),
        ("cityscapes", "1/16", 44_544), ("cityscapes", "1/8", 44_525), ("shapes", "20", 1_000),
    ):  # fmt: skip
        assert resolve(Args(dataset=name, split=split)).steps == math.ceil(1.5 * steps)
