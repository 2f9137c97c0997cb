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
