"""pseudoseg.py: branch, fusion, losses and views against the authors' code, whole steps, runs."""

import math
from pathlib import Path

import pytest
import torch
from conftest import (
    RecordedError,
    active,
    assert_unlabeled_labels_are_not_read,
    golden_files,
    load_golden,
    read_log,
    weights,
)
from torch import nn
from torch.nn import functional as F

import predict
import pseudoseg
from common.datasets import IGNORE, UNKNOWN, step_generator
from common.transforms import color_jitter
from pseudoseg import (
    PAPER,
    Args,
    DeepLabV3Plus,
    InnerMaps,
    SelfAttention,
    calibration_norm,
    classification_loss,
    consistency_loss,
    cutout_mask,
    fuse_calibrated,
    grad_cam,
    image_labels,
    jitter_colors,
    main,
    make_target,
    resolve,
    self_attention,
    sharpen,
    shrink,
    strong_view,
    upsample,
)

GOLDENS = golden_files("pseudoseg_seed*.npz")
each_golden = pytest.mark.parametrize(
    "path", GOLDENS, ids=lambda path: f"{path.parent.name}-{path.stem}"
)


def close(value, expected, tolerance=1e-5, floor=1e-7):
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=floor)


def gradient_close(value, expected, tolerance=1e-5):
    """Within a share of the largest entry."""
    close(value, expected, 0, tolerance * max(expected.abs().max().item(), 1e-12))


@each_golden
def test_image_labels_and_their_loss_are_the_authors(path):
    golden = load_golden(path)
    label = golden.tensor("labels/label")
    assert torch.equal(image_labels(label, 5).double(), golden.tensor("labels/image_label"))
    logits = golden.tensor("cls/logits").requires_grad_()
    loss = classification_loss(logits, golden.tensor("cls/image_label"))
    close(loss, golden.tensor("cls/loss"))
    loss.backward()
    close(logits.grad, golden.tensor("cls/grad"))


@each_golden
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_grad_cam_is_the_authors(path, dtype):
    golden = load_golden(path)
    features, weight, present = (
        golden.tensor(f"cam/{key}").to(dtype) for key in ("features", "weight", "image_label")
    )
    weight.requires_grad_()
    cam = grad_cam(features, weight, present)
    assert cam.dtype == dtype and not cam.requires_grad
    expected = golden.tensor("cam/out").to(dtype)
    close(cam, expected)
    close(grad_cam(features[:1], weight, present[:1]), golden.tensor("cam/one_out").to(dtype))
    tiny = grad_cam(golden.tensor("cam/tiny_features").to(dtype), weight, present)
    close(tiny, golden.tensor("cam/tiny_out").to(dtype))


@each_golden
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_is_the_authors(path, dtype):
    golden = load_golden(path)
    query, key, cam, valid = (
        golden.tensor(f"att/{name}").to(dtype) for name in ("query", "key", "cam", "valid")
    )
    query.requires_grad_(), key.requires_grad_(), cam.requires_grad_()
    everywhere = torch.ones_like(valid)
    score = self_attention(query, key, cam, everywhere)
    close(score, golden.tensor("att/out_all_valid").to(dtype))
    (score * golden.tensor("att/probe").to(dtype)).sum().backward()
    gradient_close(query.grad, golden.tensor("att/grad_query").to(dtype), 2e-5)
    gradient_close(key.grad, golden.tensor("att/grad_key").to(dtype), 2e-5)
    assert cam.grad is None
    masked = self_attention(query, key, cam, valid)
    close(masked, golden.tensor("att/out").to(dtype))  # at padded positions, too
    nowhere = self_attention(query, key, cam, 0 * valid)
    close(nowhere, golden.tensor("att/out_none_valid").to(dtype))
    one = self_attention(query[:1], key[:1], cam[:1], everywhere[:1])
    close(one, golden.tensor("att/one_out").to(dtype))


@each_golden
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_branch_is_the_authors(path, dtype):
    golden = load_golden(path)
    branch = SelfAttention(16, 5, dim=16).to(dtype)
    for name, parameter in (
        ("query_weight", branch.query.weight), ("key_weight", branch.key.weight),
        ("calibrate_weight", branch.calibrate.weight), ("calibrate_bias", branch.norm.bias),
    ):  # fmt: skip
        parameter.data = golden.tensor(f"sgc/{name}").to(dtype).view_as(parameter)
    inputs = [golden.tensor(f"sgc/{name}").to(dtype) for name in ("hypercolumn", "cam", "valid")]
    close(branch(*inputs), golden.tensor("sgc/uniform/out").to(dtype), 1e-4, 2e-5)
    out = branch(*inputs[:2], torch.ones_like(inputs[2]))
    close(out, golden.tensor("sgc/all_valid/out").to(dtype), 1e-4, 2e-5)
    (out * golden.tensor("sgc/probe").to(dtype)).sum().backward()
    for name, parameter in (
        ("query_weight", branch.query.weight), ("key_weight", branch.key.weight),
        ("calibrate_weight", branch.calibrate.weight), ("calibrate_bias", branch.norm.bias),
    ):  # fmt: skip
        expected = golden.tensor(f"sgc/all_valid/grad_{name}").to(dtype).view_as(parameter)
        gradient_close(parameter.grad, expected, 2e-4)
    assert branch.norm.weight.grad is None


@each_golden
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fusion_is_the_authors(path, dtype):
    golden = load_golden(path)
    maps = [golden.tensor(f"fuse/{name}").to(dtype) for name in ("logits", "sgc_logits")]
    maps[0].requires_grad_()
    close(calibration_norm(*maps), golden.tensor("fuse/norm").to(dtype))
    target = fuse_calibrated(*maps)
    assert target.dtype == dtype and not target.requires_grad
    for value, name in (
        (target, "out"), (fuse_calibrated(*maps, 1.0), "average"),
        (fuse_calibrated(*maps, temperature=0.1), "out_T0.1"),
        (fuse_calibrated(*(z[:1] for z in maps)), "one_out"),
        (fuse_calibrated(*(1000 * z for z in maps)), "loud_out"),
        (fuse_calibrated(*maps[::-1]), "swapped_out"),
    ):  # fmt: skip
        close(value, golden.tensor(f"fuse/{name}").to(dtype), 1e-4)
    for temperature in (1.0, 0.5, 0.25, 2.0):
        prob = sharpen(golden.tensor("sharpen/prob").to(dtype), temperature)
        close(prob, golden.tensor(f"sharpen/T{temperature}").to(dtype), 1e-4)


@each_golden
def test_consistency_is_the_authors(path):
    golden = load_golden(path)
    target, valid = golden.tensor("cons/target"), golden.tensor("cons/valid")
    for kind in ("soft", "hard"):
        for threshold in (0.0, 0.5, 0.8):
            logits = golden.tensor("cons/logits").requires_grad_()
            loss = consistency_loss(logits, target, valid, threshold, hard=kind == "hard")
            close(loss, golden.tensor(f"cons/{kind}_{threshold}"))
            loss.backward()
            gradient_close(logits.grad, golden.tensor(f"cons/{kind}_{threshold}_grad"))
    one = consistency_loss(golden.tensor("cons/logits")[1:2], target[1:2], valid[1:2])
    close(one, golden.tensor("cons/one"))


@each_golden
def test_views_are_the_authors(path):
    golden = load_golden(path)
    for number, ((height, width), size) in enumerate(
        zip(golden["cutout/hw"].tolist(), golden["cutout/size"].tolist(), strict=True)
    ):
        mask = cutout_mask(height, width, golden.tensor(f"cutout/center{number}"), size)
        assert torch.equal(mask, golden.tensor(f"cutout/mask{number}").float())
    image = golden.tensor("jitter/image").float()
    added, *factors = golden.tensor("jitter/brightness_contrast_saturation_hue").float().T
    for i, order in enumerate(golden["jitter/order"].tolist()):
        out = jitter_colors(image[[i]], *(f[[i]] for f in (1 + added, *factors)), order)
        close(out, golden.tensor("jitter/out")[i : i + 1].float(), 1e-5, 2e-6)


class ToyNetwork(nn.Module):
    """The network of the step goldens, with the interface of `InnerMaps`."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.decoder = nn.Conv2d(8, 5, 1)
        self.backbone = type("Backbone", (), {"inplanes": 8})  # channels of stage 4

    def forward(self, image, decode=True):
        image = F.pad(image, (1, 1, 1, 1))  # 17 pixels to 5: (5 - 1) 4 + 3 - 17 = 2 more
        middle = self.bn1(F.conv2d(image, self.conv1.weight, stride=4)).relu()
        high = self.conv2(middle).relu()
        hypercolumn = torch.cat([high, middle], 1).detach()
        larger = F.interpolate(high, (9, 9), mode="bilinear", align_corners=True)
        return (high, hypercolumn, self.decoder(larger))[: 3 if decode else 2]


@each_golden
def test_main_takes_the_authors_step(path, quick, monkeypatch):
    """`main` itself on their network, views and masks: every loss, and the sum of the gradients."""
    golden = load_golden(path)
    start, toy, modules, rows = golden.part("step/w/"), ToyNetwork(), [], []

    def prepare(module, *_):
        """Give it their weights; `main` itself makes the classifier."""
        for name, parameter in module.named_parameters():
            name = f"classifier.{name}" if isinstance(module, nn.Linear) else name
            parameter.data = start.get(name, parameter.data).reshape(parameter.shape).clone()
        for name in ("running_mean", "running_var") if module is toy else ():
            setattr(toy.bn1, name, start[f"bn1.{name}"])
        modules.append(module.double())
        return module

    def batches(args, data, ids, stream, *_):
        image = golden.tensor("step/in/x_l" if stream == "labeled" else "step/in/x_w")
        yield image, golden.tensor("step/in/label")
        raise RecordedError

    def open_data(args, right=pseudoseg.open_data):
        data, split = right(args)
        data.classes = data.classes[:5]
        return data, split

    def shrink(mask, like, right=pseudoseg.shrink):
        """Their mask of the labeled images knows no void pixels; it goes from 17 to 5 at once."""
        labeled = (mask.shape[2], like.shape[2]) == (17, 5)
        return right(torch.ones_like(mask) if labeled else mask, like)

    strong = golden.tensor("step/in/x_s"), golden.tensor("step/in/valid_u").double()
    for name, value in {
        "make_network": lambda *_: toy, "InnerMaps": lambda network: network, "prepare": prepare,
        "SelfAttention": lambda *_: SelfAttention(14, 5, dim=16), "make_batches": batches,
        "open_data": open_data, "strong_view": lambda *_: strong, "shrink": shrink,
    }.items():  # fmt: skip
        monkeypatch.setattr(pseudoseg, name, value)
    monkeypatch.setattr(pseudoseg.Run, "log", lambda self, step, row, _: rows.append(row))
    weight = {"sup": 1.0, "unsup": 0.7, "attention": 1.0, "classification": 0.3}
    args = quick(
        Args, batch_size=2, optimizer="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, log_every=1,
        ramp_up=0.0, lambda_u=weight["unsup"], lambda_classification=weight["classification"],
    )  # fmt: skip
    with pytest.raises(RecordedError):
        main(args)
    for term in weight:
        close(torch.tensor(rows[0][f"loss/{term}"]), golden.tensor(f"step/out/loss_{term}").float())
    labels = golden.tensor("step/out/predicted_image_label")
    assert rows[0]["pseudo/classes"] == labels.sum(1).double().mean()
    moved = {}
    for prefix, module in zip(("", "classifier.", ""), modules, strict=True):
        moved |= {prefix + name: value for name, value in module.named_parameters()}
    for name in start.keys() - {"bn1.running_mean", "bn1.running_var"}:
        parts = [
            weight[term] * golden.tensor(f"step/out/grad_{term}/{name}")
            for term in weight if f"step/out/grad_{term}/{name}" in golden
        ]  # fmt: skip
        expected = sum(parts).reshape(moved[name].shape)
        gradient_close(start[name].reshape(moved[name].shape) - moved[name].data, expected, 1e-4)


def test_by_hand():
    # The CAM of one class over two positions, 4 and 1: divided by the greatest.
    features = torch.tensor([[[[2.0, 1.0]], [[0.0, -1.0]]]])
    weight = torch.tensor([[2.0, 1.0]])
    cam = grad_cam(features, weight, torch.ones(1, 1))
    assert cam.flatten().tolist() == [1.0, 0.25]
    # Similarities (ln 3, 0) of position 0 and (0, 0) of position 1: weights 3/4, 1/4 and 1/2, 1/2.
    query, key = torch.tensor([[[[math.log(3), 0.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
    score = self_attention(query, key, cam, torch.ones(1, 1, 1, 2))
    expected = [3 / 4 + 1 / 16 + 1, 5 / 8 + 1 / 4]
    assert score[0, 1, 0].tolist() == pytest.approx(expected)
    assert score[0, 0, 0].tolist() == pytest.approx([2 - value for value in expected])
    # Logits (2, -2) and (0, 0): squares of 4, 4, 0, 0, so a norm of the root of 2.
    logits = torch.tensor([2.0, -2.0]).view(1, 2, 1, 1)
    assert calibration_norm(logits, 0 * logits).item() == pytest.approx(math.sqrt(2))
    mean = (1 / (1 + math.exp(-4 / math.sqrt(2))) + 1 / 2) / 2
    target = fuse_calibrated(logits, 0 * logits).flatten().tolist()
    assert target[0] == pytest.approx(mean**2 / (mean**2 + (1 - mean) ** 2))
    # Targets of 3/4 and 1/2 on logits of 0: entropy ln 2 each, the second below the threshold;
    # a third pixel does not count, but the second does in the denominator.
    target = torch.tensor([[[[0.75, 0.5, 1.0]], [[0.25, 0.5, 0.0]]]])
    valid = torch.tensor([1.0, 1.0, 0.0]).view(1, 1, 1, 3)
    logits = torch.zeros(1, 2, 1, 3, requires_grad=True)
    assert consistency_loss(logits, target, valid).item() == pytest.approx(math.log(2))
    loss = consistency_loss(logits, target, valid, threshold=0.75)
    assert loss.item() == pytest.approx(math.log(2) / 2)
    loss.backward()
    assert logits.grad[0, 0, 0].tolist() == pytest.approx([(1 / 2 - 3 / 4) / 2, 0, 0])
    hard = consistency_loss(logits, target, valid, 0.75, hard=True)
    assert torch.autograd.grad(hard, logits)[0][0, 0, 0].tolist() == pytest.approx([-1 / 4, 0, 0])


def test_grad_cam_is_the_gradient_of_the_classifier():
    torch.manual_seed(0)
    classifier = nn.Linear(6, 3)
    features = torch.randn(2, 6, 4, 5, requires_grad=True)
    expected = []
    for c in range(3):
        (gradient,) = torch.autograd.grad(classifier(features.mean((2, 3)))[:, c].sum(), features)
        alpha = gradient.mean((2, 3), keepdim=True)
        cam = (alpha * features).sum(1).relu()
        expected.append(cam / cam.amax((1, 2), keepdim=True))
    cam = grad_cam(features, classifier.weight, torch.ones(2, 3))
    torch.testing.assert_close(cam, torch.stack(expected, 1).detach())


def test_an_image_without_classes_is_background():
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 4, 3, 3)
    cam = grad_cam(torch.rand(2, 5, 3, 3), torch.randn(3, 5), torch.zeros(2, 3))
    score = self_attention(query, key, cam, torch.ones(2, 1, 3, 3))
    assert torch.equal(score[:, 0], torch.full((2, 3, 3), 2.0)) and not score[:, 1:].any()
    constant = SelfAttention(5, 4, dim=4)(torch.rand(2, 5, 3, 3), cam, torch.ones(2, 1, 3, 3))
    assert constant.isfinite().all() and constant.std((2, 3)).max() < 1e-6


def test_padding_changes_nothing_inside():
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 4, 3, 3)
    cam, valid = torch.rand(2, 3, 3, 3), torch.ones(2, 1, 3, 3)
    valid[0, :, 1:, 2] = 0
    before = self_attention(query, key, cam, valid)
    padding = torch.where(valid > 0, 0, 100 * torch.randn(2, 1, 3, 3))
    after = self_attention(query + padding, key + padding, cam + padding, valid)
    torch.testing.assert_close(*(z.movedim(1, 3)[valid[:, 0] > 0] for z in (before, after)))
    assert after.isfinite().all()


def test_fusion_knows_no_common_factor_and_no_order():
    torch.manual_seed(0)
    logits, sgc_logits = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    target = fuse_calibrated(logits, sgc_logits)
    torch.testing.assert_close(target.sum(1), torch.ones(2, 4, 4, dtype=torch.float64))
    torch.testing.assert_close(target, fuse_calibrated(sgc_logits, logits))
    torch.testing.assert_close(target, fuse_calibrated(100 * logits, 100 * sgc_logits))
    plain = fuse_calibrated(logits, sgc_logits, 1.0, norm=False)
    torch.testing.assert_close(plain, (logits.softmax(1) + sgc_logits.softmax(1)) / 2)
    one = fuse_calibrated(logits[:1], sgc_logits[:1])
    assert (one - target[:1]).abs().max() > 1e-3  # one norm for the batch
    for prob in ([1.0, 0.0, 0.0], [0.3, 0.4, 0.3]):  # 0.4^200 is nothing in single precision
        sharp = sharpen(torch.tensor(prob).view(1, 3, 1, 1), 0.005).flatten()
        assert sharp.argmax() == torch.tensor(prob).argmax() and sharp.max() == 1
    loud = (300 * logits).half()  # its squares are beyond half precision
    target = fuse_calibrated(loud, loud.flip(1))
    torch.testing.assert_close(target, fuse_calibrated(loud.float(), loud.flip(1).float()))


def test_targets_that_the_flags_name():
    torch.manual_seed(0)
    maps = torch.randn(2, 2, 3, 4, 4)
    for flags, expected in (
        ({}, fuse_calibrated(*maps)), ({"temperature": 0.2}, fuse_calibrated(*maps, 0.2)),
        ({"hard": True}, fuse_calibrated(*maps, 1.0)),  # hard labels are not sharpened
        ({"logit_norm": False}, fuse_calibrated(*maps, norm=False)),
        ({"pseudo_source": "attention"}, sharpen(maps[1].softmax(1), 0.5)),
        ({"pseudo_source": "attention", "hard": True}, maps[1].softmax(1)),
    ):  # fmt: skip
        torch.testing.assert_close(make_target(*maps, Args(**flags)), expected)


def test_losses_without_anything_that_counts():
    for dtype in (torch.float32, torch.float64):
        logits = torch.randn(1, 3, 2, 2, dtype=dtype, requires_grad=True)
        target = torch.rand(1, 3, 2, 2, dtype=dtype, requires_grad=True)
        nowhere = torch.zeros(1, 1, 2, 2, dtype=dtype)
        for loss in (
            consistency_loss(logits, target, nowhere),
            consistency_loss(logits, target.softmax(1), 1 + nowhere, threshold=1.0, hard=True),
        ):
            assert loss.item() == 0 and loss.dtype == dtype and loss.ndim == 0
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
            assert not gradient.any()
            assert torch.autograd.grad(loss, target, allow_unused=True) == (None,)
    ignored = image_labels(torch.full((2, 3, 3), IGNORE), 4)
    assert ignored.shape == (2, 3) and not ignored.any()


def test_inner_maps_are_those_of_the_network():
    torch.manual_seed(0)
    network = DeepLabV3Plus(5, "resnet14").eval()
    image = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        high, hypercolumn, logits = InnerMaps(network)(image)
        assert torch.equal(high, network.encode(image)[1])
        assert torch.equal(upsample(logits, image.shape[2:]), network(image))
        again, _ = InnerMaps(network)(image, decode=False)
    assert torch.equal(again, high) and torch.equal(hypercolumn[:, : high.shape[1]], high)
    assert logits.shape == (2, 5, 12, 10) and hypercolumn.shape == (2, 512 + 256, 6, 5)
    for backbone in ("resnet14", "resnet50"):
        network = DeepLabV3Plus(2, backbone)
        count = network.backbone.inplanes  # as `main` counts the channels
        assert network.backbone.layer4[-1].bn3.num_features == count
        assert network.backbone.layer3[-1].bn3.num_features == count // 2


def test_strong_view():
    torch.manual_seed(0)
    weak = torch.randn(8, 3, 48, 48)
    inside = torch.ones(8, 1, 48, 48)
    inside[:, :, 40:] = 0
    halves = [
        strong_view(weak[f : f + 4], inside[f : f + 4], 8, f, step_generator(0, "s", 3))
        for f in (0, 4)
    ]
    view, valid = strong_view(weak, inside, 8, 0, step_generator(0, "s", 3))
    for whole, parts in zip((view, valid), zip(*halves, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))
    assert not view[(valid == 0).expand_as(view)].any()  # the mean color
    cut = (inside - valid).sum((1, 2, 3))
    assert cut.max() == 100 and (cut > 0).sum() >= 6  # 10 pixels a side, clipped or in the padding
    assert (view != weak).any((1, 2, 3)).all()
    other = strong_view(weak, inside, 8, 0, step_generator(0, "s", 4))[0]
    assert not torch.equal(view, other)
    assert inside[:, :, :40].all()  # not changed in place


@pytest.mark.parametrize(("crop", "side"), [(512, 100), (800, 156), (160, 32), (48, 10)])
def test_side_of_the_cutout(crop, side, monkeypatch):
    sizes = []

    def remember(height, width, center, size):
        sizes.append(size)
        return torch.ones(len(center), 1, height, width)

    monkeypatch.setattr(pseudoseg, "cutout_mask", remember)
    image = torch.zeros(1, 3, crop, crop)
    strong_view(image, image[:, :1], 1, 0, torch.Generator())
    assert sizes == [side]


def test_ranges_of_the_jitter(monkeypatch):
    """Brightness -0.5 to 0.5, contrast and saturation 0.5 to 1.5, hue -0.25 to 0.25 turns."""
    factors = []

    def remember(image, *drawn):
        factors.append(torch.stack(drawn[:4]))
        return image

    monkeypatch.setattr(pseudoseg, "jitter_colors", remember)
    image = torch.zeros(500, 3, 4, 4)
    out, _ = strong_view(image, image[:, :1] + 1, 500, 0, torch.Generator().manual_seed(0))
    low, high = factors[0].amin(1).tolist(), factors[0].amax(1).tolist()
    assert low == pytest.approx([0.5, 0.5, 0.5, -0.25], abs=0.01)
    assert high == pytest.approx([1.5, 1.5, 1.5, 0.25], abs=0.01)
    assert out.abs().max() < 1e-5  # normalized as before
    # Without contrast it is the other scripts' jitter.
    image, drawn = torch.rand(3, 3, 5, 5), factors[0][:, :3]
    order = [3, 0, 2]
    monkeypatch.undo()
    assert torch.equal(jitter_colors(image, *drawn, order), color_jitter(image, *drawn, order))


def checkpoint(result):
    return torch.load(f"{result['run_dir']}/last.pt", weights_only=True)


LOSSES = ("supervised_loss", "consistency_loss", "cross_entropy", "classification_loss")


@pytest.mark.parametrize("term", LOSSES)
def test_gradient_routes(term, quick, monkeypatch):
    """What each term reaches, through `main`, and nothing else."""
    for name in LOSSES:
        if name != term:
            monkeypatch.setattr(pseudoseg, name, lambda logits, *_: 0 * logits.sum())
    if term == "supervised_loss":  # it calls the one that is 0 now
        monkeypatch.setattr(
            pseudoseg, term, lambda z, y, _: F.cross_entropy(z, y, ignore_index=255)
        )
    modules = {
        "network": DeepLabV3Plus(8, "resnet14"), "classifier": nn.Linear(512, 7),
        "attention": SelfAttention(768, 8),
    }  # fmt: skip
    names = [f"{part}.{name}" for part, m in modules.items() for name, _ in m.named_parameters()]
    result = main(quick(Args, steps=1, weight_decay=0.0, **active(pseudoseg)))
    state = checkpoint(result)["optimizer"]["state"]  # without decay all are in one group
    reached = {names[number] for number, m in state.items() if m["exp_avg"].any()}
    wanted = {
        "supervised_loss": "network.", "consistency_loss": "network.",
        "cross_entropy": ("attention.query", "attention.key", "attention.cal", "attention.norm.b"),
        "classification_loss": ("network.backbone.", "classifier."),
    }  # fmt: skip
    assert reached == {name for name in names if name.startswith(wanted[term])}


def test_forwards_of_a_step(quick, monkeypatch):
    """Encoder and decoder learn their statistics from weak, strong and labeled images, once each;
    the CAM's forward, in eval mode, leaves them alone."""
    modes, right = [], InnerMaps.forward

    def forward(self, image, decode=True):
        modes.append((self.network.training, torch.is_grad_enabled(), decode))
        return right(self, image, decode)

    monkeypatch.setattr(InnerMaps, "forward", forward)
    state = checkpoint(main(quick(Args, steps=2)))
    step = [(False, False, False), (True, False, True), (True, True, True), (True, True, True)]
    assert modes == 2 * step
    assert state["network"]["backbone.bn1.num_batches_tracked"] == 6
    assert state["network"]["head.fuse.1.num_batches_tracked"] == 6


def test_a_step_without_a_valid_pixel(quick, monkeypatch):
    right = pseudoseg.make_batches

    def nothing(*args):
        return ((image, torch.full_like(label, IGNORE)) for image, label in right(*args))

    monkeypatch.setattr(pseudoseg, "make_batches", nothing)
    rows = read_log(main(quick(Args, steps=2, log_every=1, **active(pseudoseg)))["run_dir"])
    for row in rows:
        assert row["loss/sup"] == row["loss/unsup"] == row["loss/attention"] == 0
        assert row["loss/classification"] > 0


@pytest.mark.parametrize("size", [1, 2])
def test_one_image(size):
    """Shapes that are not square, a batch of one, both precisions."""
    for dtype in (torch.float32, torch.float64):
        features = torch.rand(size, 6, 3, 5, dtype=dtype)
        branch = SelfAttention(6, 4, dim=7).to(dtype)
        cam = grad_cam(features, torch.randn(3, 6, dtype=dtype), torch.ones(size, 3, dtype=dtype))
        sgc = branch(features, cam, torch.ones(size, 1, 3, 5, dtype=dtype))
        assert sgc.shape == (size, 4, 3, 5) and sgc.dtype == dtype
        torch.testing.assert_close(sgc.mean((0, 2, 3)), torch.zeros(4, dtype=dtype))
        target = fuse_calibrated(upsample(sgc, (6, 10)), torch.randn(size, 4, 6, 10, dtype=dtype))
        assert target.dtype == dtype and not target.requires_grad


def test_branch_uses_the_batch_always():
    branch = SelfAttention(6, 4)
    inputs = torch.rand(2, 6, 3, 3), torch.rand(2, 3, 3, 3), torch.ones(2, 1, 3, 3)
    assert torch.equal(branch.train()(*inputs), branch.eval()(*inputs))
    assert branch.norm.eps == 1e-3 and not branch.norm.weight.requires_grad
    assert torch.equal(branch.norm.weight, torch.ones(4)) and not branch.norm.bias.any()
    bound = math.sqrt(6 / (6 + 128))  # Xavier
    for weight in (branch.query.weight, branch.key.weight):
        assert 0.9 * bound < weight.abs().max() <= bound


def test_shrink_takes_the_pixel_of_the_floor():
    mask = torch.arange(17.0).view(1, 1, 1, 17).expand(1, 1, 17, 17)
    small = shrink(shrink(mask, torch.empty(1, 1, 9, 9)), torch.empty(1, 1, 5, 5))
    assert small[0, 0, 0].tolist() == [i * 9 // 5 * 17 // 9 for i in range(5)]


def test_it_trains(quick):
    args = quick(Args, steps=40, log_every=1, lr=3e-3, log_pseudo_accuracy=True)
    result = main(args)
    rows = read_log(result["run_dir"])
    assert result["steps"] == 40 and 0 <= result["miou"] <= result["best_miou"] <= 1
    for term in ("sup", "classification", "attention"):
        loss = [row[f"loss/{term}"] for row in rows]
        assert sum(loss[-10:]) < 0.95 * sum(loss[:10]), term
    assert all(0 <= row["pseudo/attention_agreement"] <= 1 for row in rows)
    assert all(1 / 8 < row["pseudo/confidence"] <= 1 for row in rows)
    assert all(0 <= row["pseudo/classes"] <= 7 and row["pseudo/norm"] > 0 for row in rows)
    assert 0 < rows[-1]["pseudo/accuracy"] <= 1
    assert rows[0]["pseudo/classes"] > 1  # of the new classifier's logits about half are above 0


def test_bf16_keeps_every_gradient(quick):
    """The forwards without gradient must not leave autocast's weights without one for the next."""
    result = main(quick(Args, amp="bf16", steps=2, lr=1e-2, **active(pseudoseg)))
    state = checkpoint(result)["optimizer"]["state"]
    count = sum(1 for _ in DeepLabV3Plus(8, "resnet14").parameters()) + 2 + 4
    assert len(state) == count  # all but the branch's scale
    for number, moments in state.items():
        assert moments["exp_avg"].abs().max() > 0, f"parameter {number} got no gradient"


def test_flags_have_their_effects(quick):
    plain = weights(main(quick(Args, steps=2, **active(pseudoseg)))["run_dir"])
    for flags in (
        {"lambda_u": 0.5}, {"ramp_up": 0.9}, {"lambda_classification": 0.5}, {"temperature": 0.9},
        {"threshold": 0.6}, {"hard": True}, {"pseudo_source": "attention"}, {"logit_norm": False},
        {"attention_dim": 16},
    ):  # fmt: skip
        flags = active(pseudoseg) | flags
        other = weights(main(quick(Args, steps=2, exp_name=str(flags), **flags))["run_dir"])
        same = [torch.equal(plain[key], other[key]) for key in plain if "/network/" in key]
        assert len(same) > 50 and not all(same), flags


def test_accumulate_sees_the_same_views(quick, monkeypatch):
    """Micro-batches get their part of the global batch's draws, new ones at every step."""
    parts, seeds = {}, {}
    for count in (1, 2):
        parts[count], seeds[count] = [], []

        def remember(image, valid, size, first, generator, calls=parts[count], s=seeds[count]):
            s.append(generator.initial_seed())
            calls.append(strong_view(image, valid, size, first, generator))
            return calls[-1]

        monkeypatch.setattr(pseudoseg, "strong_view", remember)
        main(quick(Args, steps=2, accumulate=count, exp_name=f"a{count}"))
    assert seeds[2] == [s for s in seeds[1] for _ in range(2)] and len(set(seeds[1])) == 2
    for step in range(2):
        halves = zip(*parts[2][2 * step : 2 * step + 2], strict=True)
        for one, two in zip(parts[1][step], halves, strict=True):
            assert torch.equal(one, torch.cat(two))


def test_unlabeled_labels_are_never_read(quick, monkeypatch):
    assert_unlabeled_labels_are_not_read(pseudoseg, quick, monkeypatch)
    assert UNKNOWN != IGNORE  # so that padding is known without them


def test_predict_reads_the_checkpoint(quick):
    result = main(quick(Args, steps=2))
    saved = checkpoint(result)
    assert saved["evaluated"] == "network"
    assert saved["network"].keys() == DeepLabV3Plus(8, "resnet14").state_dict().keys()
    assert {"classifier", "attention"} <= saved.keys()
    network, _ = predict.load(Path(result["run_dir"]) / "last.pt", torch.device("cpu"))
    assert torch.equal(network.classifier.weight, saved["network"]["classifier.weight"])


@pytest.mark.parametrize("flags", [
    {"temperature": 0.0}, {"threshold": 1.5}, {"lambda_u": -1.0}, {"ramp_up": 1.5},
    {"lambda_classification": float("nan")}, {"attention_dim": 0},
], ids=str)  # fmt: skip
def test_bad_flags(quick, flags):
    with pytest.raises(pseudoseg.UserError, match=next(iter(flags)).replace("_", "-")):
        main(quick(Args, **flags))


def test_paper_rows():
    for name in ("voc", "cityscapes", "folder"):
        row = PAPER[name]
        assert (row["lambda_u"], row["lambda_classification"], row["ramp_up"]) == (1, 1, 0)
    args = resolve(Args())
    assert (args.temperature, args.threshold, args.attention_dim) == (0.5, 0, 128)
    assert args.pseudo_source == "average" and args.logit_norm and not args.hard
    assert resolve(Args(dataset="cityscapes")).supervised_loss == "ohem"
