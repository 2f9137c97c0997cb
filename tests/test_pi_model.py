"""pi_model.py: shifts, loss and schedules against slow forms, steps, gradient routes, runs."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import (
    TinyNet,
    active,
    assert_unlabeled_labels_are_not_read,
    golden_files,
    load_golden,
    read_log,
    record_steps,
)

import pi_model
from pi_model import (
    PAPER,
    Args,
    DeepLabV3Plus,
    add_dropout,
    align,
    consistency_loss,
    cross_entropy,
    draw_shifts,
    input_noise,
    main,
    ramp_up,
    shifted_view,
)

GOLDENS = golden_files("pi_model_seed*.npz")
by_stem = {"ids": lambda path: f"{path.parent.name}-{path.stem}"}


def assert_gradients(pairs) -> None:
    """Within 1e-4 of the largest entry."""
    for gradient, expected in pairs:
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=atol)


def test_loss_by_hand():
    # Softmaxes (3/4, 1/4) and (1/2, 1/2): squared differences of 1/16 in both classes.
    logits_1 = torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1).requires_grad_()
    logits_2 = torch.zeros(1, 2, 1, 1, requires_grad=True)
    loss = consistency_loss(logits_1, logits_2)
    assert loss.item() == pytest.approx(1 / 16)
    loss.backward()  # through Jacobians p0 p1 (1, -1) of 3/16 and 1/4: both views learn
    assert logits_1.grad.flatten().tolist() == pytest.approx([3 / 32, -3 / 32])
    assert logits_2.grad.flatten().tolist() == pytest.approx([-1 / 8, 1 / 8])
    assert consistency_loss(logits_1.double(), logits_2.double()).dtype == torch.float64
    assert consistency_loss(logits_1.bfloat16(), logits_2.bfloat16()).dtype == torch.float32


def test_loss_is_a_mean_over_valid_pixels():
    logits_1, logits_2 = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    valid = torch.zeros(2, 4, 5, dtype=torch.bool)
    assert consistency_loss(logits_1.requires_grad_(), logits_2, valid).item() == 0
    consistency_loss(logits_1, logits_2, valid).backward()
    assert not logits_1.grad.any()  # not NaN
    valid[1, 2, 3] = True
    one = consistency_loss(logits_1[1:, :, 2:3, 3:4], logits_2[1:, :, 2:3, 3:4])
    for shape in ((2, 4, 5), (2, 1, 4, 5)):
        torch.testing.assert_close(consistency_loss(logits_1, logits_2, valid.view(shape)), one)
    # The views can be exchanged.
    assert consistency_loss(logits_2, logits_1, valid).item() == pytest.approx(one.item(), 1e-6)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
@pytest.mark.parametrize("ending", ["", "_all"])
def test_loss_and_gradients_are_the_slow_ones(path, ending):
    golden = load_golden(path)
    views = [torch.from_numpy(golden[f"cons/logits_{k}"]).requires_grad_() for k in (1, 2)]
    valid = None if ending else torch.from_numpy(golden["cons/valid"])
    loss = consistency_loss(*views, valid)
    assert loss.item() == pytest.approx(float(golden[f"cons/loss{ending}"]), 1e-5, 1e-7)
    loss.backward()
    assert_gradients(
        [(v.grad, golden.tensor(f"cons/grad_{k}{ending}")) for k, v in enumerate(views, 1)]
    )


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_views_and_their_alignment(path):
    golden = load_golden(path)
    size, side = int(golden["shift/size"]), golden["shift/window"].shape[-1]
    label, aligned, covered, maps = golden.tensor("shift/label_window"), [], [], []
    for k in (1, 2):
        offsets = golden.tensor(f"shift/offsets_{k}")
        view = shifted_view(golden.tensor("shift/window"), offsets, size)
        assert torch.equal(view, golden.tensor(f"shift/view_{k}"))
        assert torch.equal(
            shifted_view(label, offsets, size), golden.tensor(f"shift/label_view_{k}")
        )
        maps.append(torch.from_numpy(golden[f"shift/logits_{k}"]).requires_grad_())
        for found, each in zip((aligned, covered), align(maps[-1], offsets, side), strict=True):
            found.append(each)
        assert torch.equal(aligned[-1].double(), golden.tensor(f"shift/aligned_{k}"))
        assert torch.equal(covered[-1][:, 0].long(), golden.tensor(f"shift/covered_{k}"))
    valid = covered[0] & covered[1] & (label != 255)[:, None]
    assert torch.equal(valid[:, 0].long(), golden.tensor("shift/valid"))
    loss = consistency_loss(*aligned, valid)
    assert loss.item() == pytest.approx(float(golden["shift/loss"]), 1e-5, 1e-7)
    loss.backward()
    assert_gradients(
        [(each.grad, golden.tensor(f"shift/grad_{k}")) for k, each in enumerate(maps, 1)]
    )


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_main_takes_the_steps(path, quick, monkeypatch):
    """`main` itself on their network, windows, offsets and noise: losses, weights, statistics."""
    golden = load_golden(path)
    number = {
        k: float(golden[f"steps/{k}"])
        for k in ("lr", "weight_decay", "total", "ramp_steps", "lambda_u", "size", "shift")
    }
    network, streams, steps = (
        tiny(golden.part("steps/before/")),
        {"labeled": [], "unlabeled": []},
        [],
    )
    draws = {"shifts": [], "noise": []}
    while f"steps/{len(steps)}/window" in golden:
        at = f"steps/{len(steps)}/"
        window, label = golden.tensor(at + "window"), golden.tensor(at + "label")
        streams["labeled"].append((window[:2], label[:2]))
        streams["unlabeled"].append((window[2:], label[2:]))
        draws["shifts"].append([golden.tensor(f"{at}offsets_{k}") for k in (1, 2)])
        draws["noise"] += [golden.tensor(f"{at}noise_{k}") for k in (1, 2)]
        steps.append(at)
    assert len(steps) == 4
    drawn = {name: iter(values) for name, values in draws.items()}
    monkeypatch.setattr(pi_model, "draw_shifts", lambda *_: next(drawn["shifts"]))
    monkeypatch.setattr(pi_model, "input_noise", lambda *_: next(drawn["noise"]))
    monkeypatch.setattr(pi_model, "add_dropout", lambda *_: None)
    args = quick(
        Args, steps=int(number["total"]), optimizer="sgd", lr=number["lr"], momentum=0.9,
        weight_decay=number["weight_decay"], lambda_u=number["lambda_u"], batch_size=2,
        ramp_up=number["ramp_steps"] / number["total"], shift=int(number["shift"]), log_every=1,
        eval_every=10**6,
    )  # fmt: skip
    resolve = pi_model.resolve  # their crops are smaller than a flag may say
    resized = {"crop_size": int(number["size"])}
    monkeypatch.setattr(pi_model, "resolve", lambda args: replace(resolve(args), **resized))
    states, rows = record_steps(pi_model, args, monkeypatch, network, network, streams)
    for at, (state, _), row in zip(steps, states, rows, strict=True):
        for name in ("sup", "cons"):
            expected = float(golden[f"{at}loss_{name}"])
            assert row[f"loss/{name}"] == pytest.approx(expected, 1e-6), (at, name)
        expected = tiny(golden.part(f"{at}after/")).state_dict()
        for key in expected:
            if not key.endswith("num_batches_tracked"):
                torch.testing.assert_close(state[key], expected[key], rtol=1e-6, atol=1e-6)


def tiny(state: dict[str, torch.Tensor]) -> TinyNet:
    """Of the goldens, which name its parts in their own way."""
    names = {
        "conv": "conv.weight", "gamma": "bn.weight", "beta": "bn.bias", "cls": "cls.weight",
        "bn_mean": "bn.running_mean", "bn_var": "bn.running_var", "bias": "cls.bias",
    }  # fmt: skip
    state = {names[key]: value for key, value in state.items()}
    classes, width = len(state["cls.bias"]), len(state["conv.weight"])
    return TinyNet(state | {"cls.weight": state["cls.weight"].view(classes, width, 1, 1)})


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_ramp_and_weight_are_the_papers(path):
    """Its share of labeled images in the weight cancels against its sum over a whole minibatch."""
    golden = load_golden(path)
    ramps = [ramp_up(int(epoch), 80) for epoch in golden["original/epoch"]]
    assert ramps == pytest.approx(golden["original/ramp_up"].tolist(), abs=1e-9)
    assert ramp_up(0, 0) == ramp_up(5, 5) == 1.0 and ramp_up(0, 10) == math.exp(-5)
    logits = [golden.tensor(f"original/z_{k}").log()[..., None, None] for k in "ab"]
    label = golden.tensor("original/label").where(golden.tensor("original/mask") > 0, 255)
    loss = cross_entropy(logits[0], label[:, None, None])
    loss = loss + float(golden["original/unscaled_weight"]) * consistency_loss(*logits)
    assert loss.item() == pytest.approx(float(golden["original/loss_over_share"]), 1e-9)


def test_shifts_are_uniform_and_independent():
    offsets = torch.stack(draw_shifts(5000, 2, torch.Generator().manual_seed(0)))
    assert offsets.shape == (2, 5000, 2) and offsets.dtype == torch.int64
    columns = offsets.permute(0, 2, 1).flatten(0, 1)  # of both views: down, right
    for one in columns:
        assert torch.bincount(one, minlength=5).tolist() == pytest.approx([1000] * 5, abs=150)
    correlation = torch.corrcoef(columns.double()) - torch.eye(4)
    assert correlation.abs().max() < 0.06
    assert not torch.stack(draw_shifts(3, 0, torch.Generator())).any()


def test_noise_has_a_fixed_deviation():
    generator = torch.Generator().manual_seed(0)
    noise = [input_noise(2, 40, 0.15, generator) for _ in range(20)]
    assert noise[0].shape == (2, 3, 40, 40) and noise[0].dtype == torch.float32
    assert all(one.std().item() == pytest.approx(0.15, rel=0.05) for one in noise)
    assert not torch.equal(noise[0], noise[1])


def test_dropout_is_in_train_mode_alone_and_in_no_state():
    plain, network = DeepLabV3Plus(5, "resnet14"), DeepLabV3Plus(5, "resnet14")
    network.load_state_dict(plain.state_dict())
    names, seen = list(network.state_dict()), []
    add_dropout(network, 0.5)
    assert list(network.state_dict()) == names
    network.classifier.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0]))
    network.head.fuse.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(network.eval()(image), plain.eval()(image))
    seen.clear()
    with torch.no_grad():
        torch.manual_seed(0)
        first = network.train()(image)
        assert not torch.equal(first, network(image))  # anew in every forward
        torch.manual_seed(0)
        assert torch.equal(first, network(image))
    # Elements, not channels: of ASPP's output (upsampled, so four pixels must be 0), and half of
    # what was not 0 already of the classifier's input.
    assert (seen[1] == 0).float().mean().item() > 0.5
    assert (seen[1] == 0).float().mean((2, 3)).min() > 0 and not (seen[1] == 0).all((2, 3)).all()
    low = seen[0][:, : network.classifier.in_channels]
    assert (low == 0).any() and not (low == 0).all((2, 3)).any()


def first_row(quick, **flags) -> dict:
    off = {"shift": 0, "noise": 0.0, "dropout": 0.0}
    name = "-".join(flags) or "off"
    return read_log(
        main(quick(Args, steps=1, log_every=1, exp_name=name, **off | flags))["run_dir"]
    )[0]


def test_each_difference_of_the_views_makes_them_differ(quick):
    row = first_row(quick)
    assert row["loss/cons"] == 0 and row["pseudo/agreement"] == 1
    for flags in ({"shift": 2}, {"noise": 0.15}, {"dropout": 0.5}):
        assert first_row(quick, **flags)["loss/cons"] > 1e-6, flags


def test_both_views_learn(quick, monkeypatch):
    """A gradient of the consistency alone arrives at both views' logits."""
    right, seen = pi_model.consistency_loss, []

    def watch(*inputs):
        for each in inputs[:2]:
            each.retain_grad()
        seen.extend(inputs[:2])
        return right(*inputs)

    monkeypatch.setattr(pi_model, "consistency_loss", watch)
    monkeypatch.setattr(pi_model, "supervised_loss", lambda logits, *_: 0 * logits.sum())
    main(quick(Args, steps=1, **active(pi_model)))
    assert len(seen) == 2 and all(each.grad.abs().max() > 0 for each in seen)


def test_flags_have_their_effects(quick):
    def network(**flags):
        args = quick(Args, steps=3, exp_name=str(flags)[2:9], **active(pi_model) | flags)
        return torch.load(f"{main(args)['run_dir']}/last.pt", weights_only=True)["network"]

    plain = network()
    for flags in (
        {"shift": 1}, {"noise": 0.3}, {"dropout": 0.2}, {"lambda_u": 1.0}, {"ramp_up": 0.9},
    ):  # fmt: skip
        changed = network(**flags)
        assert any(not torch.equal(plain[key], changed[key]) for key in plain), flags


def test_it_trains(quick):
    args = quick(Args, steps=40, log_every=1, lr=3e-3, log_pseudo_accuracy=True)
    rows = read_log(main(args)["run_dir"])
    loss = [row["loss/sup"] for row in rows]
    assert sum(loss[-10:]) < 0.9 * sum(loss[:10])
    assert all(row["loss/cons"] > 0 and 0 <= row["pseudo/agreement"] <= 1 for row in rows)
    assert 0 < rows[-1]["pseudo/accuracy"] <= 1


def test_unlabeled_labels_are_never_read(quick, monkeypatch):
    assert_unlabeled_labels_are_not_read(pi_model, quick, monkeypatch)


@pytest.mark.parametrize("flags", [
    {"shift": -1}, {"noise": -0.1}, {"dropout": 1.5}, {"lambda_u": -1.0}, {"ramp_up": 1.5},
], ids=str)  # fmt: skip
def test_bad_flags(quick, flags):
    with pytest.raises(pi_model.UserError, match=next(iter(flags)).replace("_", "-")):
        main(quick(Args, **flags))


def test_paper_rows():
    assert [row["shift"] for row in PAPER.values()] == [32, 48, 10, 3, 32]
    assert [PAPER[name]["lambda_u"] for name in list(PAPER)[:4]] == [100, 100, 52, 38]
    args = pi_model.resolve(Args(dataset="cityscapes"))
    assert (args.noise, args.dropout, args.ramp_up) == (0.15, 0.5, 80 / 300)


def test_own_data_has_the_weight_per_pixel_of_voc(tmp_path):
    """The loss is a mean over the classes, 21 on VOC. What the user says is not rescaled."""
    from test_cli import make_folder

    flags = {"dataset": "folder", "data_root": str(make_folder(tmp_path))}  # of two classes
    assert pi_model.resolve(Args(**flags)).lambda_u == pytest.approx(100 * 2 / 21)
    assert pi_model.resolve(Args(**flags, lambda_u=7.0)).lambda_u == 7
