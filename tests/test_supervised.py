"""supervised.py: losses against hand-worked and the authors' numbers, the network, training."""

import math
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import golden_files, load_golden, read_log, weights
from torch import nn
from torchvision import tv_tensors

import supervised
from common import datasets
from supervised import (
    ASPP,
    PAPER,
    Args,
    DeepLabV3Plus,
    cross_entropy,
    main,
    ohem_cross_entropy,
    poly_lr,
)

CPS_GOLDENS = golden_files("cps_seed*.npz")


def test_cross_entropy_by_hand():
    # Two classes on 2x2 pixels, one ignored. Logit gap g for the true class: log(1 + exp(-g)).
    gap = torch.tensor([[[2.0, -1.0], [0.0, 5.0]]])
    logits = torch.stack([gap, torch.zeros_like(gap)], dim=1)
    label = torch.tensor([[[0, 0], [1, 255]]])
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1)) + math.log(2)) / 3
    assert cross_entropy(logits, label).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", [cross_entropy, ohem_cross_entropy])
def test_no_valid_pixel_gives_zero_and_no_gradient(loss):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    value = loss(logits, torch.full((2, 4, 4), 255))
    value.backward()
    assert value.item() == 0 and logits.grad.abs().max() == 0


@pytest.mark.parametrize("loss", [cross_entropy, ohem_cross_entropy])
def test_half_precision_is_computed_in_fp32(loss):
    logits, label = torch.randn(1, 5, 8, 8).bfloat16(), torch.randint(0, 5, (1, 8, 8))
    assert loss(logits, label).dtype == torch.float32
    assert loss(logits, label) == loss(logits.float(), label)
    assert loss(logits.double(), label).dtype == torch.float64


@pytest.mark.parametrize("path", CPS_GOLDENS, ids=lambda path: path.stem)
@pytest.mark.parametrize("case", ["k100", "k0", "khalf", "kbig", "keqvalid", "kgtvalid"])
def test_ohem_is_the_authors(path, case):
    golden = load_golden(path)
    logits = golden.tensor("ohem.in.logits").requires_grad_()
    label = golden.tensor("ohem.in.labels")
    loss = ohem_cross_entropy(logits, label, 0.7, int(golden[f"ohem.{case}.in.min_kept"]))
    assert loss.item() == pytest.approx(float(golden[f"ohem.{case}.out.loss"]), abs=1e-10)
    loss.backward()
    grad = logits.grad.abs().sum((0, 2, 3))
    expected = golden.tensor(f"ohem.{case}.out.grad_abs_sum_per_class")
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)
    used = logits.grad.abs().sum(1) > 0
    assert torch.equal(used, golden.tensor(f"ohem.{case}.out.used_mask") > 0)


def test_poly_lr():
    golden = load_golden(CPS_GOLDENS[0])
    for name in ("voc_1_8", "city_1_8"):
        base, total = float(golden[f"lr.{name}.in.base"]), int(golden[f"lr.{name}.in.total"])
        for step, lr in zip(
            golden[f"lr.{name}.in.steps"], golden[f"lr.{name}.out.lr"], strict=True
        ):
            assert poly_lr(base, int(step), total) == pytest.approx(float(lr), rel=1e-12)


def test_steps_are_the_authors_schedule():
    golden = load_golden(CPS_GOLDENS[0])
    total = golden["schedule.table"][:, list(golden["schedule.columns"]).index("total_iters")]
    for number, (dataset, ratio) in enumerate(
        (d, r) for d in ("voc", "cityscapes") for r in ("1/16", "1/8", "1/4", "1/2")
    ):
        args = supervised.resolve(Args(dataset=dataset, split=ratio))
        assert args.steps == total[number], (dataset, ratio)


@pytest.mark.parametrize("path", CPS_GOLDENS, ids=lambda path: path.stem)
def test_aspp_is_the_authors(path):
    golden = load_golden(path)
    weight = golden.part("aspp.in.")
    names = {"pool.bn": "pool_bn", "pool.conv": "pool", "pool.project": "pool_project"}
    names |= {"project.conv": "project"}
    names |= {f"branch{i}.conv": f"branches.{i}" for i in range(4)}
    state = {}
    for key, value in weight.items():
        module, _, leaf = key.rpartition(".")
        state[f"{names.get(module, module)}.{leaf}"] = value
    image = state.pop(".x")
    aspp = ASPP(8, 4, 5, (6, 12, 18)).double()
    missing, unexpected = aspp.load_state_dict(state, strict=False)
    assert not unexpected and all("num_batches" in key for key in missing)
    torch.testing.assert_close(
        aspp.train()(image), golden.tensor("aspp.out.train"), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        aspp.eval()(image), golden.tensor("aspp.out.eval"), rtol=1e-9, atol=1e-9
    )


def test_network_size():
    for name, backbone in (("resnet50", 23_508_032), ("resnet101", 42_500_160)):
        network = DeepLabV3Plus(21, name)
        count = {
            key: sum(p.numel() for p in part.parameters()) for key, part in network.named_children()
        }
        assert count == {"backbone": backbone, "head": 16_838_752, "classifier": 5_397}


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_torchvision_weights_fit(name, tmp_path):
    state = torchvision.models.get_model(name).state_dict()
    args = Args(backbone=name, weights=str(tmp_path / "weights.pth"))
    torch.save(state, tmp_path / "weights.pth")
    network = supervised.make_network(args, 3, "1")
    for key, value in network.backbone.state_dict().items():
        assert torch.equal(value, state[key]), key
    del state["layer1.0.conv1.weight"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(supervised.UserError, match="layer1.0.conv1.weight"):
        supervised.make_network(args, 3, "1")


def test_whole_network_is_the_authors():
    """Their ResNet-50 logits, with their three-convolution stem put before our stages."""
    golden = load_golden(golden_files("cps_net_r50.npz")[0])
    network = DeepLabV3Plus(21, "resnet50")

    def conv_bn(inp, out, stride):
        conv = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        return [conv, nn.BatchNorm2d(out), nn.ReLU()]

    backbone = network.backbone
    backbone.conv1 = nn.Sequential(
        *conv_bn(3, 64, 2), *conv_bn(64, 64, 1), nn.Conv2d(64, 128, 3, 1, 1, bias=False)
    )
    backbone.bn1 = nn.BatchNorm2d(128)
    backbone.layer1[0].conv1 = nn.Conv2d(128, 64, 1, bias=False)
    backbone.layer1[0].downsample[0] = nn.Conv2d(128, 256, 1, bias=False)

    def ours(role: str) -> str:
        for theirs, mine in (
            ("stem.conv1", "backbone.conv1.0"), ("stem.bn1", "backbone.conv1.1"),
            ("stem.conv2", "backbone.conv1.3"), ("stem.bn2", "backbone.conv1.4"),
            ("stem.conv3", "backbone.conv1.6"), ("stem.bn3", "backbone.bn1"),
            ("shortcut.conv", "downsample.0"), ("shortcut.bn", "downsample.1"),
            ("pool.conv", "pool"), ("pool.bn", "pool_bn"), ("pool.project", "pool_project"),
            ("project.conv", "project"), ("low.conv", "head.reduce.0"), ("low.bn", "head.reduce.1"),
            ("decoder.conv1", "head.fuse.0"), ("decoder.bn1", "head.fuse.1"),
            ("decoder.conv2", "head.fuse.3"), ("decoder.bn2", "head.fuse.4"),
            ("aspp.", "head.aspp."),
        ):  # fmt: skip
            role = role.replace(theirs, mine)
        for i in range(4):
            role = role.replace(f"branch{i}.conv", f"branches.{i}")
        for i in range(1, 5):
            role = role.replace(f"stage{i}.", f"backbone.layer{i}.")
        for i in range(1, 7):
            role = role.replace(f"block{i}.", f"{i - 1}.")
        return role

    import numpy as np

    state = {}
    for index, role, shape, formula in golden["tensors"]:
        shape = [int(n) for n in shape.split("x")]
        z = np.random.RandomState(10_000 + int(index)).standard_normal(shape)
        value = {
            "z sqrt(2/fan_in)": lambda z=z: z * np.sqrt(2 / np.prod(z.shape[1:])),
            "1+0.1 z": lambda z=z: 1 + 0.1 * z,
            "0.1 z": lambda z=z: 0.1 * z,
            "1+0.2|z|": lambda z=z: 1 + 0.2 * abs(z),
        }[formula]()
        state[ours(role)] = torch.from_numpy(value)
    network.double()
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all("num_batches" in key for key in missing), (unexpected, missing)
    with torch.no_grad():
        logits = network.eval()(golden.tensor("a.in.x"))[:, :, ::4, ::4]
    expected = golden.tensor("r50.a.eval.logits")
    assert (logits - expected).abs().max() < 1e-8 * expected.abs().max()


def test_head_start_and_stage_4():
    network = DeepLabV3Plus(21, "resnet50")
    conv = network.head.fuse[3].weight
    assert conv.std().item() == pytest.approx((2 / conv[0].numel()) ** 0.5, rel=0.02)
    dilations = [unit.conv2.dilation for unit in network.backbone.layer4]
    assert dilations == [(2, 2), (4, 4), (8, 8)]
    assert not any(isinstance(m, nn.Dropout) for m in network.modules())


@pytest.mark.parametrize("size", [(33, 47), (32, 32)])
def test_logits_have_the_images_size(size):
    network = DeepLabV3Plus(5, "resnet14").eval()
    assert network(torch.randn(1, 3, *size)).shape == (1, 5, *size)


def test_training_changes_the_weights_and_the_loss_falls(quick):
    result = main(quick(Args, steps=60, lr=3e-3, log_every=1, eval_every=20))
    assert result["steps"] == 60 and 0 <= result["miou"] <= result["best_miou"] <= 1
    rows = read_log(result["run_dir"])
    assert [row["step"] for row in rows] == list(range(1, 61))
    loss = [row["loss/sup"] for row in rows]
    assert sum(loss[-10:]) < 0.8 * sum(loss[:10])
    torch.manual_seed(0)
    assert [row["step"] for row in rows if "val/miou" in row] == [20, 40, 60]
    moved = weights(result["run_dir"])
    again = main(quick(Args, steps=1, exp_name="one", lr=1e-9))
    start = weights(again["run_dir"])
    for key in moved:
        if key.startswith("/network/") and key.endswith("weight"):
            assert not torch.equal(moved[key], start[key]), key


def test_loss_falls_with_every_optimizer_and_loss(quick):
    for number, flags in enumerate(({"optimizer": "sgd", "lr": 0.05}, {"supervised_loss": "ohem"})):
        result = main(quick(Args, steps=30, log_every=1, exp_name=f"run{number}", **flags))
        loss = [row["loss/sup"] for row in read_log(result["run_dir"])]
        assert sum(loss[-5:]) < 0.9 * sum(loss[:5])


def test_ohem_mines_each_image():
    """All of 62,500 pixels with p = 0.4, and 50,000 with 0.8 but none of 12,500 with 0.9."""
    prob = torch.full((2, 1, 250, 250), 0.4)
    prob[1, :, :200], prob[1, :, 200:] = 0.8, 0.9
    logits = torch.cat([prob, 1 - prob], dim=1).log()
    label = torch.zeros(2, 250, 250, dtype=torch.long)
    loss = supervised.supervised_loss(logits, label, "ohem")
    assert loss.item() == pytest.approx(-(math.log(0.4) + math.log(0.8)) / 2)
    for parts in (1, 2):  # of as many processes or micro-batches
        pairs = zip(logits.chunk(parts), label.chunk(parts), strict=True)
        each = [supervised.supervised_loss(*pair, "ohem") for pair in pairs]
        assert torch.stack(each).mean().item() == pytest.approx(loss.item())


def test_accumulate_takes_the_mean_gradient(quick, monkeypatch):
    """Where BatchNorm cannot differ (eval mode), 2 x 2 images give the step of 1 x 4."""
    freeze_batchnorm(monkeypatch, supervised)
    results = [
        main(
            quick(
                Args, steps=1, optimizer="sgd", lr=1.0, momentum=0.0, accumulate=n, exp_name=f"n{n}"
            )
        )
        for n in (1, 2)
    ]
    one, two = (weights(result["run_dir"]) for result in results)
    for key in one:
        if key.startswith("/network/"):
            torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)


def freeze_batchnorm(monkeypatch, script):
    """BatchNorm in eval mode, and no ignored pixel, so that means of means are means."""
    from common.datasets import Shapes

    load = Shapes.load

    def load_valid(self, image_id, with_label=True):
        image, label = load(self, image_id, with_label)
        return image, tv_tensors.wrap(label.where(label != 255, 0), like=label)

    class Frozen(DeepLabV3Plus):
        def train(self, mode=True):
            return super().train(False)

    monkeypatch.setattr(Shapes, "load", load_valid)
    monkeypatch.setattr(script, "DeepLabV3Plus", lambda *a: Frozen(*a).eval(), raising=False)
    prepare = script.prepare

    def prepare_frozen(network, *rest):  # a script's other networks pass here, too
        for module in network.eval().modules():
            if isinstance(module, nn.BatchNorm2d) and not module.track_running_stats:
                module.running_mean = torch.zeros(module.num_features)
                module.running_var = torch.ones(module.num_features)
        return prepare(network, *rest)

    monkeypatch.setattr(script, "prepare", prepare_frozen)


def test_paper_rows_fill_every_flag():
    for dataset in PAPER:
        args = supervised.resolve(Args(dataset=dataset, split="1/8"))
        unset = [name for name, value in vars(args).items() if value is None]
        assert unset == ["split_seed"]


def test_every_flag_is_read():
    text = Path(supervised.__file__).read_text() + Path(datasets.__file__).read_text()
    for name in Args.__dataclass_fields__:
        assert f"args.{name}" in text or name in ("exp_name",), f"--{name} is parsed and ignored"
