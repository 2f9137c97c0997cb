"""pseudoseg.py: branch, fusion, losses and views against the authors' code, whole steps, runs."""

import pytest
import torch
from conftest import RecordedError, golden_files, load_golden
from torch import nn
from torch.nn import functional as F

import pseudoseg
from pseudoseg import (
    Args,
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
    self_attention,
    sharpen,
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


# --- the authors' numbers


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
    factors = golden.tensor("jitter/brightness_contrast_saturation_hue").float().T
    for i, order in enumerate(golden["jitter/order"].tolist()):
        out = jitter_colors(image[i : i + 1], factors[:, i : i + 1], order)
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
        return self.decoder(larger) if decode else None, high, hypercolumn


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
