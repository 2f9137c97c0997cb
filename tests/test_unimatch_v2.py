"""unimatch_v2.py: network, views, boxes, loss, whole steps against the authors' numbers, runs."""

import math
from dataclasses import replace

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
    record_steps,
    weights,
)
from test_cli import QUICK, call
from test_supervised import freeze_batchnorm

import predict
import unimatch_v2
from common.transforms import MEAN, STD
from unimatch_v2 import (
    DPT,
    PAPER,
    WEIGHTS,
    Args,
    DPTHead,
    ViTEncoder,
    box_masks,
    channel_masks,
    complementary_dropout,
    load_dinov2,
    main,
    strong_view,
    unsupervised_loss,
    whole_image_logits,
)

GOLDENS = golden_files("unimatch_v2_seed*.npz")
WHOLE = [path for path in GOLDENS if "encoder/56x56/map0" in load_golden(path)]
by_stem = {"ids": lambda path: f"{path.parent.name}-{path.stem}"}


def assert_near(value, expected, tolerance):
    assert (value - expected).abs().max() <= tolerance * expected.abs().max()


# ---- network -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WHOLE, **by_stem)
def test_encoder_is_the_authors(path):
    """At two sizes whose grids are not that of the position table, with its gradient."""
    golden = load_golden(path)
    encoder = ViTEncoder(48, 2, 3, (0, 1)).double()
    encoder.load_state_dict(load_dinov2(golden.part("encoder/state/")))
    for size in ("56x56", "70x84"):
        image = golden.tensor(f"encoder/{size}/image").double().requires_grad_()
        maps = encoder(image)
        assert len(maps) == 2
        for number, features in enumerate(maps):
            assert_near(features, golden.tensor(f"encoder/{size}/map{number}"), 1.5e-6)
    (maps[0] * golden.tensor("encoder/70x84/weight_of_map0")).sum().backward()
    expected = golden.tensor("encoder/70x84/grad_image_channel0")
    assert_near(image.grad[:, 0, ::2, ::2], expected, 2e-6)
    expected = golden.tensor("encoder/position_4x5_first_12_channels")
    assert_near(encoder.position(4, 5)[..., :12], expected, 1e-5)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_head_is_the_authors(path):
    golden = load_golden(path)
    head = DPTHead(12, 3, 8, (4, 6, 8, 10)).double()
    head.load_state_dict(golden.part("head/state/"))
    for size in ("4x5", "3x3"):
        maps = [golden.tensor(f"head/{size}/map{i}").requires_grad_() for i in range(4)]
        logits = head(maps)
        assert_near(logits[:, :, ::2, ::3], golden.tensor(f"head/{size}/logits"), 1e-6)
    (logits * golden.tensor("head/3x3/weight")).sum().backward()
    for number, features in enumerate(maps):
        assert_near(features.grad, golden.tensor(f"head/3x3/grad_map{number}"), 2e-6)


def test_sizes():
    """Parameters of encoder and head (21 classes), as the authors' code counts its used ones."""
    for name, expected in (
        ("dinov2_small", (22_056_192, 2_665_205)), ("dinov2_base", (86_579_712, 10_653_141)),
    ):  # fmt: skip
        with torch.device("meta"):
            network = DPT(21, name)
        parts = network.backbone, network.head
        assert tuple(sum(p.numel() for p in part.parameters()) for part in parts) == expected
        assert (network.backbone.patch_size, network.backbone.grid) == (14, 37)


def metas_state(dim: int, depth: int, grid: int, patch: int) -> dict[str, torch.Tensor]:
    """Random values under the names and shapes of Meta's files."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + grid**2, dim), "mask_token": (1, dim)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.{name}": shape
            for name, shape in {
                "norm1.weight": (dim,), "norm1.bias": (dim,),
                "norm2.weight": (dim,), "norm2.bias": (dim,),
                "attn.qkv.weight": (3 * dim, dim), "attn.qkv.bias": (3 * dim,),
                "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,),
                "mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,),
                "mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,),
                "ls1.gamma": (dim,), "ls2.gamma": (dim,),
            }.items()
        }  # fmt: skip
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_metas_checkpoint_loads_strictly():
    state = metas_state(384, 12, 37, 14)
    before = dict(state)
    assert len(state) == 175
    loaded = load_dinov2(state)
    encoder = DPT(3, "dinov2_small").backbone
    encoder.load_state_dict(loaded, strict=True)
    assert state == before and len(encoder.state_dict()) == 174
    assert torch.equal(encoder.blocks[7].ls2["gamma"], state["blocks.7.ls2.gamma"])


def test_encoder_by_hand():
    """One block that adds nothing: the normalized patches, row by row, at their positions."""
    encoder = ViTEncoder(4, 1, 2, (0,), grid=2, patch_size=3)
    with torch.no_grad():
        for gamma in (encoder.blocks[0].ls1["gamma"], encoder.blocks[0].ls2["gamma"]):
            gamma.zero_()
    image = torch.randn(2, 3, 6, 6)
    (features,) = encoder(image)
    assert features.shape == (2, 4, 2, 2)
    patch = image[1, :, 3:6, 0:3]  # row 1, column 0: entry 2 of the table, after the class token's
    token = (encoder.patch_embed["proj"].weight * patch).sum((1, 2, 3))
    token = token + encoder.patch_embed["proj"].bias + encoder.pos_embed[0, 1 + 2]
    token = (token - token.mean()) / (token.var(unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(features[1, :, 1, 0], token, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="multiples of 3"):
        encoder(torch.randn(1, 3, 6, 7))


def test_every_parameter_gets_a_gradient_and_nothing_else_has_a_state():
    network = DPT(5, "vit_tiny")
    assert not list(network.buffers())
    image, mask = torch.randn(2, 3, 48, 48), torch.rand(2, 64)
    logits = network.train()(image, mask)
    logits.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert torch.equal(network.eval()(image, mask), logits)


def test_channel_mask_multiplies_all_four_maps():
    network, seen = DPT(5, "vit_tiny"), []
    network.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    image, mask = torch.randn(2, 3, 32, 48), 2.0 * torch.randint(2, (2, 64))
    network(image, mask)
    for features, expected in zip(seen[0], network.backbone(image), strict=True):
        torch.testing.assert_close(features, expected * mask[:, :, None, None])
    assert torch.equal(network(image), network(image, torch.ones(2, 64)))


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_whole_images_are_evaluated_as_the_authors_do(path):
    golden = load_golden(path)
    weight, bias = golden.tensor("eval/conv/weight"), golden.tensor("eval/conv/bias")
    numbers = [number for number in range(3) if f"eval/{number}/image" in golden]
    assert numbers
    for number in numbers:
        seen = []

        def model(image, seen=seen):
            seen.append(tuple(image.shape[2:]))
            return F.conv2d(image, weight, bias, padding=2)

        logits = whole_image_logits(model, golden.tensor(f"eval/{number}/image").double())
        assert seen == [tuple(golden[f"eval/{number}/size_seen"])]
        assert_near(logits[:, :, ::4, ::4], golden.tensor(f"eval/{number}/logits"), 1e-6)


def test_network_resizes_what_the_patch_does_not_divide():
    network, mask = DPT(5, "vit_tiny"), torch.rand(1, 64)  # patches of 8 pixels
    image = torch.randn(1, 3, 44, 3)  # halves go up: 48; at least one patch: 8
    logits = network(image, mask)
    seen = []

    def model(image):
        seen.append(tuple(image.shape[2:]))
        return network(image, mask)

    assert torch.equal(logits, whole_image_logits(model, image, 8))
    assert logits.shape == (1, 5, 44, 3) and seen == [(48, 8)]
    image = torch.randn(1, 3, 24, 16)
    assert_near(whole_image_logits(network, image, 8), network(image), 1e-6)


# ---- weights -------------------------------------------------------------------------------------


def test_weights_from_a_file(monkeypatch, capsys, tmp_path):
    """A file with Meta's layout starts the encoder, and nothing but it; a wrong one is refused."""
    state = metas_state(64, 4, 6, 8)
    file = tmp_path / "weights.pth"
    torch.save(state, file)
    network = unimatch_v2.make_network(Args(backbone="vit_tiny", weights=str(file)), 3, "1")
    for name, value in network.backbone.state_dict().items():
        assert torch.equal(value, state[name]), name
    plain = unimatch_v2.make_network(Args(backbone="vit_tiny", weights="none"), 3, "1")
    assert_same(network.head.state_dict(), plain.head.state_dict())
    flags = [*QUICK, "--output-dir", tmp_path / "runs", "--weights", file]
    assert call(unimatch_v2, monkeypatch, capsys, *flags)[0] == 0
    del state["blocks.1.ls1.gamma"]
    torch.save(state, file)
    with pytest.raises(unimatch_v2.UserError, match="(?s)--weights .*blocks.1.ls1.gamma"):
        unimatch_v2.make_network(Args(backbone="vit_tiny", weights=str(file)), 3, "1")


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_weights_without_a_network(name, monkeypatch, capsys, tmp_path):
    """The error names the flag, the URL, and where to put the file by hand."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    line = [*QUICK, "--output-dir", tmp_path / "runs", "--backbone", name, "--weights", "dinov2"]
    code, _, err = call(unimatch_v2, monkeypatch, capsys, *line)
    file = f"dinov2_vit{name[7]}14_pretrain.pth"
    assert code == 2 and "Traceback" not in err and f"--weights dinov2, {name}: " in err
    assert f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{name[7]}14/{file} " in err
    assert str(tmp_path / "hub" / "checkpoints" / file) in err and "--weights none or FILE" in err


def test_weights_are_fetched_and_verified(server, monkeypatch, tmp_path):
    import hashlib

    state = metas_state(64, 4, 6, 8)
    torch.save(state, tmp_path / "tiny.pth")
    body = (tmp_path / "tiny.pth").read_bytes()
    server.files["/tiny.pth"] = body
    sha256 = hashlib.sha256(body).hexdigest()
    monkeypatch.setattr(unimatch_v2, "DINOV2", server.url)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    args = Args(backbone="vit_tiny", weights="dinov2")
    monkeypatch.setitem(WEIGHTS, "vit_tiny", ("tiny.pth", "0" * 64))
    with pytest.raises(unimatch_v2.UserError, match=f"{sha256} where 0000"):
        unimatch_v2.make_network(args, 3, "1")
    monkeypatch.setitem(WEIGHTS, "vit_tiny", ("tiny.pth", sha256))
    network = unimatch_v2.make_network(args, 3, "1")
    assert torch.equal(network.backbone.norm.weight, state["norm.weight"])
    assert (tmp_path / "hub/checkpoints/tiny.pth").read_bytes() == body


# ---- loss, masks, boxes, views -------------------------------------------------------------------


def test_loss_by_hand():
    """Four pixels, logits (log 3, 0): one counts, one is unsure, one padding, one at the edge."""
    logits = torch.zeros(1, 2, 2, 2)
    logits[:, 0] = math.log(3)
    logits.requires_grad_()
    pseudo_label = torch.tensor([[[0, 1], [0, 1]]])
    confidence = torch.tensor([[[0.99, 0.5], [0.99, 0.95]]], requires_grad=True)
    valid = torch.tensor([[[True, True], [False, True]]])
    loss = unsupervised_loss(logits, pseudo_label, confidence, valid)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 3)
    loss.backward()
    assert confidence.grad is None
    # (softmax - one-hot) / 3 where it counts.
    expected = [[-0.25, 0.25], [0, 0], [0, 0], [0.75, -0.75]]
    torch.testing.assert_close(logits.grad[0].flatten(1).mT, torch.tensor(expected) / 3)
    for threshold, count in ((0.0, 3), (0.96, 1), (1.0, 0)):
        value = unsupervised_loss(logits * 0, pseudo_label, confidence, valid, threshold)
        assert value.item() == pytest.approx(count * math.log(2) / 3)
    nothing = unsupervised_loss(logits, pseudo_label, confidence, torch.zeros_like(valid))
    assert nothing.item() == 0
    half = unsupervised_loss(logits.bfloat16(), pseudo_label, confidence, valid)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_loss_is_the_authors(path):
    golden = load_golden(path)
    logits = golden.tensor("loss/logits").requires_grad_()
    pseudo_label, confidence = golden.tensor("loss/pseudo_label"), golden.tensor("loss/confidence")
    parts = (logits, pseudo_label, confidence, golden.tensor("loss/valid").bool())
    assert (confidence == 0.95).sum() == 4
    for threshold in (0.9, 0.97, 0.0):
        expected = float(golden[f"loss/value_threshold_{threshold}"])
        assert unsupervised_loss(*parts, threshold).item() == pytest.approx(expected, rel=1e-9)
    loss = unsupervised_loss(*parts)
    assert loss.item() == pytest.approx(float(golden["loss/value"]), rel=1e-9)
    loss.backward()
    assert_near(logits.grad, golden.tensor("loss/grad"), 1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_complementary_dropout(batch_size):
    generator, coins, kept = torch.Generator().manual_seed(0), [], []
    for _ in range(200):
        mask_1, mask_2 = complementary_dropout(batch_size, 32, generator)
        assert mask_1.shape == mask_2.shape == (batch_size, 32) and mask_1.dtype == torch.float32
        assert torch.equal(mask_1 + mask_2, torch.full_like(mask_1, 2))
        whole = (mask_1 == 1).all(1)
        assert whole.sum() == batch_size // 2
        assert ((mask_1[~whole] == 0) | (mask_1[~whole] == 2)).all()
        coins.append(mask_1[~whole].flatten())
        kept.append(whole)
    assert torch.cat(coins).mean().item() == pytest.approx(1, abs=0.05)  # fair
    share = torch.stack(kept).float().mean(0)  # any image may be kept whole
    assert (share - batch_size // 2 / batch_size).abs().max() < 0.12
    assert len({tuple(coin.tolist()) for coin in coins}) == 200  # drawn anew each time


def test_kinds_of_channel_masks():
    def draw(kind):
        return channel_masks(kind, 4, 64, torch.Generator().manual_seed(3))

    one, two = draw("complementary")
    same, apart = draw("independent")
    assert torch.equal(one + two, torch.full_like(one, 2)) and torch.equal(one, same)
    assert not torch.equal(apart, two) and (apart == 1).all(1).sum() == 2
    assert all(torch.equal(mask, torch.ones(4, 64)) for mask in draw("none"))


def distance(a, b) -> float:
    """Kolmogorov and Smirnov's, in units of what two samples of one distribution have (1.95: one
    in a thousand has more).
    """
    a, b = np.sort(np.asarray(a, float)), np.sort(np.asarray(b, float))
    at = np.concatenate([a, b])
    gap = np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)
    return abs(gap).max() * math.sqrt(len(a) * len(b) / (len(a) + len(b)))


def boxes_of(masks):
    """(top, left, height, width) of each mask's box, and that it is one."""
    found = []
    for mask in masks[:, 0].bool():
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        if len(rows):
            found.append((rows[0], columns[0], len(rows), len(columns)))
            assert mask.sum() == len(rows) * len(columns)
    return np.array(found)


def test_boxes_are_the_authors():
    theirs = np.concatenate([load_golden(path)["boxes/96"] for path in GOLDENS[-2:]])
    masks = box_masks(6000, 96, 96, torch.Generator().manual_seed(0))
    assert masks.shape == (6000, 1, 96, 96) and masks.dtype == torch.float32
    assert masks.amax((1, 2, 3)).mean().item() == pytest.approx(0.5, abs=0.02)
    ours = boxes_of(masks)
    for values in (
        lambda box: box[:, 0], lambda box: box[:, 1], lambda box: box[:, 2], lambda box: box[:, 3],
        lambda box: box[:, 2] * box[:, 3], lambda box: np.log(box[:, 2] / box[:, 3]),
    ):  # fmt: skip
        assert distance(values(ours), values(theirs)) < 1.95


def test_boxes_keep_their_area_and_ratio():
    draw = torch.Generator().manual_seed(0)
    boxes = boxes_of(box_masks(300, 64, 96, draw, probability=1.0, area=(0.25, 0.25)))
    assert len(boxes) == 300
    top, left, height, width = boxes.T
    assert (height * width > 0.25 * 64 * 96 * 0.93).all()
    assert (height * width <= 0.25 * 64 * 96).all()
    assert (top + height).max() == 64 and (left + width).max() == 96
    assert (top.min(), left.min()) == (0, 0)
    ratio = height / width
    assert 0.27 < ratio.min() < 0.5 and 1.2 < ratio.max() <= 64 / 24
    tall = boxes_of(box_masks(20, 64, 64, draw, probability=1.0, area=(0.1, 0.1), ratio=(2, 2)))
    assert {tuple(box[2:]) for box in tall} == {(28, 14)}  # sqrt(409.6 * 2), sqrt(409.6 / 2)
    assert not box_masks(20, 64, 64, draw, probability=0.0).any()


def look(picture, columns, count):
    """`count` views of a uint8 picture, in levels, at (row, column) places."""
    image = torch.from_numpy(picture)[None].float() / 255
    generator = torch.Generator().manual_seed(0)
    views = 255 * strong_view(image.expand(count, -1, -1, -1), generator)
    return columns(views.round().double()).numpy()


def test_strong_views_are_the_authors():
    """Brightness, contrast, saturation and hue as distributions; shares of gray and unchanged."""
    goldens = [load_golden(path) for path in GOLDENS[-2:]]
    count = 3000

    def gray_columns(view):
        colors = [view[:, :, 16, column] for column in (1, 30)]
        return torch.cat([*colors, view[:, 0, 16, 12:20]], 1)

    def color_columns(view):
        return torch.cat([view[:, :, 8, column] for column in (8, 24, 40)], 1)

    theirs = np.concatenate([g["strong/gray/samples"] for g in goldens]).astype(float)
    ours = look(goldens[0]["strong/gray/picture"], gray_columns, count)

    def brightness(sample):
        return (sample[:, 0] + sample[:, 3]) / 127

    def contrast(sample):
        return (sample[:, 3] - sample[:, 0]) / (sample[:, 0] + sample[:, 3])

    def sharpness(sample):  # of the edge, relative to its height
        step = np.maximum(sample[:, 3] - sample[:, 0], 1)
        return (sample[:, 10] - sample[:, 9]) / step

    for value in (brightness, contrast):
        assert distance(value(ours), value(theirs)) < 1.95
    for edge in (0.97, 0.6):  # PIL's three boxes blur a little where a Gaussian does nothing yet
        share = [(sharpness(sample) < edge).mean() for sample in (ours, theirs)]
        assert share[0] == pytest.approx(share[1], abs=0.045), (edge, share)
    assert min(sharpness(ours)) == pytest.approx(min(sharpness(theirs)), abs=0.02)

    theirs = np.concatenate([g["strong/color/samples"] for g in goldens]).astype(float)
    ours = look(goldens[0]["strong/color/picture"], color_columns, count)

    def chroma(sample):
        return sample[:, 6:].max(1) - sample[:, 6:].min(1)

    def saturation(sample):
        """Of the views with enough contrast and some color, in units of the picture's."""
        sample = sample[(sample[:, 3] - sample[:, 0] > 25) & (chroma(sample) > 0)]
        return chroma(sample) / (sample[:, 3] - sample[:, 0]) / (40 / 50)

    def hue(sample):
        """In turns, of the views with a clear color."""
        red, green, blue = sample[chroma(sample) > 20][:, 6:].T
        return np.arctan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * math.pi)

    for value in (saturation, hue):
        assert distance(value(ours), value(theirs)) < 1.95
    ends = [np.percentile(saturation(sample), (2, 98)) for sample in (ours, theirs)]
    assert ends[0] == pytest.approx(ends[1], abs=0.02)
    original = np.array([60] * 3 + [110] * 3 + [120, 80, 80])
    for share in (lambda s: (chroma(s) == 0).mean(), lambda s: (s == original).all(1).mean()):
        assert share(ours) == pytest.approx(share(theirs), abs=0.04)


def test_strong_views_are_drawn_for_each_image_of_the_global_batch():
    image, draw = torch.rand(6, 3, 20, 24), lambda: torch.Generator().manual_seed(1)
    before = image.clone()
    whole = strong_view(image, draw())
    assert torch.equal(image, before) and whole.shape == image.shape
    assert whole.min() >= 0 and whole.max() <= 1
    assert torch.equal(strong_view(image, draw()), whole)
    part = strong_view(image[[4, 5, 0]], draw(), first=4, batch_size=6)  # round the end
    assert torch.equal(part, whole[[4, 5, 0]])
    same = strong_view(image[:1].expand(6, -1, -1, -1), draw())
    assert len({tuple(view.flatten().tolist()) for view in same}) > 3  # each by itself
    state = torch.get_rng_state()
    assert torch.equal(strong_view(image, draw(), strength=0.0), image)
    assert torch.equal(torch.get_rng_state(), state)


# ---- steps ---------------------------------------------------------------------------------------


class Golden(DPT):
    """The network of the step goldens."""

    def __init__(self, golden, more=None):
        super().__init__(5, "vit_tiny")
        self.backbone = ViTEncoder(24, 4, 3, (0, 1, 2, 3), grid=3)
        self.head = DPTHead(24, 5, 8, (6, 8, 10, 12))
        self.double()
        self.backbone.load_state_dict(load_dinov2(golden.part("step/backbone/")))
        self.head.load_state_dict(golden.part("step/head/") | golden.part(more or "step/head/"))


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_main_takes_the_authors_steps(path, quick, monkeypatch):
    """`main` itself on their network, images, boxes and masks: losses, both networks."""
    golden = load_golden(path)
    steps = [k for k in range(2) if f"step/{k}/img_x" in golden]
    student = Golden(golden)
    teacher = Golden(golden, "step/teacher_head/").requires_grad_(False)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    streams = {"labeled": [], "unlabeled": []}
    views, boxes, masks = [], [], []

    def with_one_more(images):  # the partner of the last, which is another one in the release
        return torch.cat([images, images[:1]])

    for k in steps:
        image, label = golden.tensor(f"step/{k}/img_x"), golden.tensor(f"step/{k}/label_x")
        streams["labeled"].append((image.double(), label))
        label = torch.where(golden.tensor(f"step/{k}/valid").bool(), 254, 255)
        image = golden.tensor(f"step/{k}/img_u_w").double()
        streams["unlabeled"].append((with_one_more(image), with_one_more(label)))
        for view in (1, 2):
            image = golden.tensor(f"step/{k}/img_u_s{view}").double()
            views.append(with_one_more(image) * std + mean)
            boxes.append(golden.tensor(f"step/{k}/box{view}")[:, None].float())
        masks.append([golden.tensor(f"step/{k}/channel_mask{view}").double() for view in (1, 2)])
    iters = int(golden["step/0/iters"])

    def adamw(networks, args, device):
        groups = [
            {"params": list(part.parameters()), "lr_mult": factor}
            for part, factor in ((student.backbone, 1.0), (student.head, args.head_lr_mult))
        ]
        return torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.999), weight_decay=0.01)

    paste, ema_decay = unimatch_v2.paste, unimatch_v2.ema_decay
    rates = [float(golden[f"step/{k}/lr"]) for k in steps] + [0.0]
    for name, value in {
        "strong_view": lambda *_: views.pop(0),
        "box_masks": lambda *_: boxes.pop(0),
        "channel_masks": lambda *_: masks.pop(0),
        "paste": lambda a, _, mask: paste(a, a.flip(0), mask),  # their partners
        "make_optimizer": adamw,
        "poly_lr": lambda _, step, total_steps: rates[step],
        "ema_decay": lambda step, cap: ema_decay(step + iters, cap),
    }.items():
        monkeypatch.setattr(unimatch_v2, name, value)
    args = quick(
        Args, head_lr_mult=float(golden["step/lr_mult"]), ramp_up=0.0, ema_decay=0.996,
        threshold=float(golden["step/threshold"]), log_every=1, eval_every=10**6,
    )  # fmt: skip
    states, rows = record_steps(unimatch_v2, args, monkeypatch, student, teacher, streams)
    probe = golden.tensor("step/probe").double()
    for k in steps:
        at, tolerance = f"step/{k}/", (2e-5, 5e-4)[k]
        assert rows[k]["loss/sup"] == pytest.approx(float(golden[at + "loss_x"]), rel=tolerance)
        expected = (float(golden[at + "loss_s1"]) + float(golden[at + "loss_s2"])) / 2
        assert rows[k]["loss/cons"] == pytest.approx(expected, rel=tolerance)
        assert rows[k]["pseudo/confident"] == pytest.approx(float(golden[at + "mask_ratio"]), 1e-6)
        assert min(1 - 1 / (iters + k + 1), 0.996) == pytest.approx(float(golden[at + "ema_decay"]))
        for name, state, most in zip(("student", "teacher"), states[k], (1e-3, 1e-4), strict=True):
            network = Golden(golden)
            network.load_state_dict(state)
            logits = network(probe)[:, :, ::4, ::4]
            assert_near(logits, golden.tensor(f"{at}{name}_probe"), most)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_gradients_of_a_step_are_the_authors(path, monkeypatch):
    """By the loss of `main`, at the images, which both networks' logits reach."""
    golden, network = load_golden(path), Golden(load_golden(path))
    teacher = Golden(golden, "step/teacher_head/")
    image_l = golden.tensor("step/0/img_x").double().requires_grad_()
    weak = golden.tensor("step/0/img_u_w").double()
    valid = golden.tensor("step/0/valid").bool()
    logits = teacher(weak)
    assert_near(logits[:, :, ::4, ::4], golden.tensor("step/0/teacher_logits"), 1e-6)
    confidence, pseudo_label = logits.detach().softmax(1).max(1)
    images, losses = [], []
    for view in (1, 2):
        box = golden.tensor(f"step/0/box{view}")[:, None]
        strong = golden.tensor(f"step/0/img_u_s{view}").double()
        strong, *target = (
            unimatch_v2.paste(each, each.flip(0), box)
            for each in (strong, pseudo_label, confidence, valid)
        )
        images.append(strong.requires_grad_())
        logits = network(strong, golden.tensor(f"step/0/channel_mask{view}").double())
        losses.append(unsupervised_loss(logits, *target, float(golden["step/threshold"])))
    assert_near(logits[:, :, ::4, ::4], golden.tensor("step/0/student_logits_u"), 1e-6)
    loss_sup = unimatch_v2.cross_entropy(network(image_l), golden.tensor("step/0/label_x"))
    loss = (loss_sup + sum(losses) / 2) / 2
    assert loss.item() == pytest.approx(float(golden["step/0/loss"]), rel=1e-6)
    loss.backward()
    assert_near(image_l.grad[:, :, ::6, ::6], golden.tensor("step/0/grad_img_x"), 5e-6)
    gradient = torch.cat([image.grad for image in images])
    assert_near(gradient[:, :, ::7, ::7], golden.tensor("step/0/grad_img_u"), 5e-6)


class Recorder:
    """What the student and the teacher see: lists of (image, channel mask)."""

    def __init__(self, monkeypatch):
        self.student, self.teacher, forward = [], [], DPT.forward

        def remember(network, image, channel_mask=None):
            seen = self.student if torch.is_grad_enabled() else self.teacher
            seen.append((image, channel_mask))
            return forward(network, image, channel_mask)

        monkeypatch.setattr(DPT, "forward", remember)


def test_views_of_a_step(quick, monkeypatch):
    """Complements in one micro-batch, half of the images whole, boxes from the next image."""
    seen = Recorder(monkeypatch)
    args = quick(Args, steps=1, batch_size=8, accumulate=2, view_strength=0.0)
    main(replace(args, exp_name="two"))
    halves, seen.student[:] = seen.student[:2], []
    weak = [image for image, mask in seen.teacher[:2] if mask is None]
    pixels = torch.cat([image[:4] for image in weak])  # the global batch
    assert len(pixels) == 8 and torch.equal(weak[0][4], pixels[4])
    assert torch.equal(weak[1][4], pixels[0])
    ones = torch.ones(4, 64)
    for image, mask in halves:
        assert len(image) == len(mask) == 12 and torch.equal(mask[:4], ones)
        assert torch.equal(mask[4:8] + mask[8:], 2 * ones)
    whole = torch.cat([(mask[4:8] == 1).all(1) for _, mask in halves])
    assert whole.sum() == 4
    mixed = 0
    for view in (slice(4, 8), slice(8, 12)):
        strong = torch.cat([image[view] for image, _ in halves])
        own = torch.isclose(strong, pixels, atol=1e-5).all(1)
        after = torch.isclose(strong, pixels.roll(-1, 0), atol=1e-5).all(1)
        assert (own | after).all() and not after.all()
        boxes = boxes_of((~own)[:, None])  # what is not its own is one box (or very nearly)
        mixed += len(boxes)
    assert 2 < mixed < 14
    main(replace(args, exp_name="one", accumulate=1))  # the same, in one piece
    ((image, mask),) = seen.student[:1]
    for view, part in ((slice(8, 16), slice(4, 8)), (slice(16, 24), slice(8, 12))):
        for whole, number in ((image, 0), (mask, 1)):
            assert torch.equal(whole[view], torch.cat([half[number][part] for half in halves]))


def test_fixmatch_sees_one_view_with_all_channels(quick, monkeypatch):
    seen = Recorder(monkeypatch)
    main(quick(Args, steps=1, views=1, feature_dropout="none"))
    ((image, mask),) = seen.student
    assert image.shape == (8, 3, 32, 32) and torch.equal(mask, torch.ones(8, 64))


def test_loss_of_a_step(quick, monkeypatch):
    """(L_l + lambda r (L_1 + L_2) / 2) / 2 of the views' own losses."""
    values, totals = [], []
    right, backward = unsupervised_loss, torch.Tensor.backward

    def remember(logits, pseudo_label, confidence, valid, threshold):
        assert threshold == 0.14 and not confidence.requires_grad
        values.append(right(logits, pseudo_label, confidence, valid, threshold))
        return values[-1]

    def total(loss):
        totals.append(loss.item())
        backward(loss)

    monkeypatch.setattr(unimatch_v2, "unsupervised_loss", remember)
    monkeypatch.setattr(torch.Tensor, "backward", total)
    for views in (1, 2):
        values.clear(), totals.clear()
        args = quick(Args, steps=1, log_every=1, threshold=0.14, views=views, lambda_u=3.0)
        (row,) = read_log(main(replace(args, ramp_up=0.0, exp_name=f"v{views}"))["run_dir"])
        assert len(values) == views and values[0] > 0
        cons = sum(value.item() for value in values) / views
        assert row["loss/cons"] == pytest.approx(cons, rel=1e-6)
        assert totals == [pytest.approx((row["loss/sup"] + 3 * cons) / 2, rel=1e-6)]
    args = quick(Args, steps=1, log_every=1, threshold=0.14, ramp_up=1.0, exp_name="ramp")
    totals.clear()
    (row,) = read_log(main(args)["run_dir"])
    share = math.exp(-5)
    assert totals == [pytest.approx((row["loss/sup"] + share * row["loss/cons"]) / 2, rel=1e-6)]


def test_padding_has_no_pseudo_label(quick, monkeypatch):
    """Scenes have 64 pixels, so most of a crop of 128 is padding; it is mixed like the images."""
    seen = []

    def remember(logits, pseudo_label, confidence, valid, threshold):
        seen.append(valid)
        return unsupervised_loss(logits, pseudo_label, confidence, valid, threshold)

    monkeypatch.setattr(unimatch_v2, "unsupervised_loss", remember)
    main(quick(Args, steps=2, crop_size=128))
    assert all(0.1 < valid.float().mean() < 0.6 for valid in seen)
    assert len(seen) == 4 and not torch.equal(seen[0], seen[1])  # boxes of their own


def test_teacher_follows_by_its_formula(quick, monkeypatch):
    seen, right = [], unimatch_v2.update_teacher

    def remember(teacher, student, decay):
        seen.append([p.detach().clone() for p in student.parameters()])
        right(teacher, student, decay)

    monkeypatch.setattr(unimatch_v2, "update_teacher", remember)
    result = main(quick(Args, steps=5, ema_decay=0.6))
    teacher = [torch.zeros_like(p) for p in seen[0]]  # step 0 copies the student
    for step, student in enumerate(seen):
        decay = min(1 - 1 / (step + 1), 0.6)
        teacher = [decay * a + (1 - decay) * b for a, b in zip(teacher, student, strict=True)]
    saved = torch.load(f"{result['run_dir']}/last.pt", weights_only=True)
    assert saved["evaluated"] == "teacher"
    for (name, _), value in zip(DPT(8, "vit_tiny").named_parameters(), teacher, strict=True):
        torch.testing.assert_close(saved["teacher"][name], value, rtol=1e-5, atol=1e-6)


def checkpoint(result):
    return torch.load(f"{result['run_dir']}/last.pt", weights_only=True)


def test_student_as_its_own_teacher(quick, monkeypatch):
    seen = Recorder(monkeypatch)
    state = checkpoint(main(quick(Args, steps=3, teacher="student", threshold=0.14)))
    assert_same(state["student"], state["teacher"])
    assert len(seen.student) == len(seen.teacher[:-7]) == 3  # and 7 of the validation


def test_frozen_backbone(quick):
    args = quick(Args, freeze_backbone=True)
    state = checkpoint(main(args))
    start = unimatch_v2.make_network(unimatch_v2.resolve(args), 8, "1").state_dict()
    for name, value in state["student"].items():
        moved = not torch.equal(value, start[name])
        assert moved == name.startswith("head."), name
        if not moved:
            assert torch.equal(state["teacher"][name], value), name


def test_flags_have_their_effects(quick):
    def networks(name, **flags):
        flags = {"threshold": 0.14, "ramp_up": 0.0, "view_strength": 0.5} | flags
        state = checkpoint(main(quick(Args, exp_name=name, **flags)))
        return [*state["student"].values(), *state["teacher"].values()]

    plain = networks("plain")
    for number, flags in enumerate((
        {"views": 1}, {"feature_dropout": "none"}, {"feature_dropout": "independent"},
        {"threshold": 0.3}, {"view_strength": 1.0}, {"lambda_u": 0.5}, {"ramp_up": 0.9},
        {"ema_decay": 0.5}, {"head_lr_mult": 2.0},
    )):  # fmt: skip
        changed = networks(f"n{number}", **flags)
        assert any(not torch.equal(*pair) for pair in zip(plain, changed, strict=True)), flags


def test_ohem_keeps_100_000_pixels_an_image():
    logits = torch.zeros(1, 2, 320, 320)
    logits[:, 0, :, 160:] = 5.0  # half of the 102,400 pixels are easy
    label = torch.zeros(1, 320, 320, dtype=torch.int64)
    loss = unimatch_v2.supervised_loss(logits, label, "ohem").item()
    assert loss == pytest.approx(unimatch_v2.cross_entropy(logits, label).item(), rel=1e-6)
    hard = unimatch_v2.ohem_cross_entropy(logits, label).item()
    assert hard == pytest.approx(math.log(2), rel=1e-6) and hard > 1.5 * loss


def test_it_trains(quick):
    flags = {"threshold": 0.3, "ramp_up": 0.0, "view_strength": 1.0, "log_pseudo_accuracy": True}
    rows = read_log(main(quick(Args, steps=60, log_every=1, lr=3e-3, **flags))["run_dir"])
    loss = [row["loss/sup"] for row in rows]
    assert sum(loss[-10:]) < 0.9 * sum(loss[:10])
    assert all(row["loss/cons"] > 0 for row in rows[20:])
    confident = [row["pseudo/confident"] for row in rows]
    assert all(0 <= share <= 1 for share in confident) and confident[-1] > confident[0]
    assert 0 < rows[-1]["pseudo/accuracy"] <= 1


def test_accumulate_takes_the_mean_gradient(quick, monkeypatch):
    """2 x 2 images give the step of 1 x 4 where no pixel is ignored and every one counts."""
    freeze_batchnorm(monkeypatch, unimatch_v2)  # for its images without ignored pixels
    flags = {"optimizer": "sgd", "lr": 1.0, "momentum": 0.0, "threshold": 0.0, "ramp_up": 0.0}
    one, two = (
        weights(main(quick(Args, steps=1, accumulate=n, exp_name=f"n{n}", **flags))["run_dir"])
        for n in (1, 2)
    )
    start = unimatch_v2.make_network(unimatch_v2.resolve(quick(Args)), 8, "1").state_dict()
    for key, value in start.items():
        assert not torch.equal(one[f"/student/{key}"], value), key
        torch.testing.assert_close(
            one[f"/student/{key}"], two[f"/student/{key}"], rtol=1e-4, atol=1e-6
        )


def test_unlabeled_labels_are_never_read(quick, monkeypatch):
    def make(args_class, **flags):
        return quick(args_class, threshold=0.14, **flags)

    assert_unlabeled_labels_are_not_read(unimatch_v2, make, monkeypatch)


def test_predict_reads_its_checkpoints(quick, monkeypatch, capsys, tmp_path):
    """Both evaluate whole scenes without padding; a photograph that the patch does not divide."""
    seen = Recorder(monkeypatch)
    result = main(quick(Args, crop_size=96, steps=2))
    assert [image.shape[2] for image, _ in seen.teacher] == [96] * 2 + [64] * 7
    for name in ("last.pt", "best.pt"):
        line = [f"{result['run_dir']}/{name}", "--evaluate", "--device", "cpu"]
        code, out, err = call(predict, monkeypatch, capsys, *line)
        assert code == 0 and "(teacher), vit_tiny, whole image" in out, err
        assert f"{100 * result['miou']:.2f}" in out.splitlines()[-1]
    assert [image.shape[2] for image, _ in seen.teacher[9:]] == [64] * 14
    from PIL import Image

    Image.new("RGB", (61, 45), "red").save(tmp_path / "photo.png")
    line = [f"{result['run_dir']}/last.pt", tmp_path / "photo.png", "--out", tmp_path / "out"]
    assert call(predict, monkeypatch, capsys, *line, "--network", "student")[0] == 0
    assert Image.open(tmp_path / "out" / "photo.png").size == (61, 45)
    line = [f"{result['run_dir']}/last.pt", "--export", tmp_path / "vit.pt2", "--device", "cpu"]
    code, out, err = call(predict, monkeypatch, capsys, *line)
    assert code == 0 and "uint8 (B, 3, 96, 96) RGB" in out, err  # of its crops' size alone
    program = torch.export.load(tmp_path / "vit.pt2").module()
    network, _ = predict.load(tmp_path / f"{result['run_dir']}/last.pt", torch.device("cpu"))
    image = torch.randint(256, (3, 3, 96, 96), generator=torch.Generator().manual_seed(1)).byte()
    with torch.no_grad():
        torch.testing.assert_close(program(image), network(predict.normalize(image)))


@pytest.mark.parametrize("flags", [
    {"threshold": 1.5}, {"view_strength": -0.1}, {"lambda_u": -1.0}, {"ramp_up": 2.0},
    {"ema_decay": 1.5}, {"head_lr_mult": -1.0},
], ids=str)  # fmt: skip
def test_bad_flags(quick, flags):
    with pytest.raises(unimatch_v2.UserError, match=next(iter(flags)).replace("_", "-")):
        main(quick(Args, **flags))


def test_paper_rows():
    for dataset, expected in {
        "voc": dict(batch_size=16, crop_size=518, supervised_loss="ce", steps=39_000),
        "cityscapes": dict(batch_size=8, crop_size=798, supervised_loss="ohem", steps=58_500),
    }.items():  # fmt: skip
        args = unimatch_v2.resolve(Args(dataset=dataset))
        expected |= dict(
            optimizer="adamw", lr=5e-6, head_lr_mult=40.0, momentum=0.9, weight_decay=0.01,
            backbone="dinov2_small", weights="dinov2", ema_decay=0.996, threshold=0.95, views=2,
            view_strength=1.0, lambda_u=1.0, ramp_up=0.0, feature_dropout="complementary",
            teacher="ema", evaluate="teacher", freeze_backbone=False,
        )  # fmt: skip
        assert {name: getattr(args, name) for name in expected} == expected
    # 60 or 180 times what four loaders of four or two images each make of the unlabeled ones.
    for dataset, images, each, epochs, labels in (
        ("voc", 10_582, 4, 60, {f"classic:{n}": n for n in (92, 183, 366, 732, 1464)}),
        ("cityscapes", 2_975, 2, 180, {"1/16": 186, "1/8": 372, "1/4": 744, "1/2": 1488}),
    ):
        for split, count in labels.items():
            steps = epochs * (math.ceil((images - count) / 4) // each)
            assert unimatch_v2.resolve(Args(dataset=dataset, split=split)).steps == steps, split
    for dataset in PAPER:
        args = unimatch_v2.resolve(Args(dataset=dataset, split="1/8"))
        assert [name for name, value in vars(args).items() if value is None] == ["split_seed"]
