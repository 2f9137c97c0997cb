"""temporal_ensembling.py: canvas, averages and bank against slow forms, steps, routes, runs."""

import json
import math
import os
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    active,
    assert_same,
    assert_unlabeled_labels_are_not_read,
    golden_files,
    load_golden,
    read_log,
    record_steps,
    weights,
)
from test_pi_model import assert_gradients, tiny

import temporal_ensembling
from common import UserError
from common.datasets import global_batch, open_data
from common.transforms import LocatedView
from temporal_ensembling import (
    PAPER,
    Args,
    PredictionBank,
    canvases,
    consistency_loss,
    ensemble,
    ensemble_target,
    main,
    resolve,
    to_canvas,
)

GOLDENS = golden_files("temporal_ensembling_seed*.npz")
by_stem = {"ids": lambda path: f"{path.parent.name}-{path.stem}"}


def bools(golden, key: str) -> torch.Tensor:
    """(B, h, w) of a golden as (B, 1, h, w)."""
    return torch.from_numpy(golden[key])[..., None, :, :]


def test_loss_by_hand():
    values = torch.tensor([[0.75, 0.5], [0.25, 0.5]]).view(1, 2, 1, 2).requires_grad_()
    target = torch.tensor([[0.5, 0.0], [0.5, 1.0]]).view(1, 2, 1, 2).requires_grad_()
    counted = torch.tensor([True, False]).view(1, 1, 1, 2)
    loss = consistency_loss(values, target, counted)  # one cell: 1/16 in both classes
    assert loss.item() == pytest.approx(1 / 16)
    loss.backward()
    assert values.grad.flatten().tolist() == [0.25, 0, -0.25, 0] and target.grad is None
    assert consistency_loss(values.double(), target.double(), counted).dtype == torch.float64
    assert consistency_loss(values.half(), target.half(), counted).dtype == torch.float32
    values.grad = None
    consistency_loss(values, target, ~counted & False).backward()
    assert not values.grad.any()


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_loss_and_gradient_are_the_slow_ones(path):
    golden = load_golden(path)
    values = torch.from_numpy(golden["loss/values"]).requires_grad_()
    target = torch.from_numpy(golden["loss/target"]).requires_grad_()
    loss = consistency_loss(values, target, bools(golden, "loss/counted"))
    assert loss.item() == pytest.approx(float(golden["loss/loss"]), 1e-5, 1e-7)
    loss.backward()
    assert_gradients([(values.grad, golden.tensor("loss/grad"))])
    assert target.grad is None


def test_a_canvas_by_hand():
    # An image of 4 x 4 pixels, of which the view shows rows 2 and 3, flipped, all four columns,
    # at twice the size with a margin of 2 above: 2 x 2 cells, the lower two are covered.
    view = torch.tensor([[4, 4, 2, 0, 2, 4, 4, 8, 2, 0, 1]])
    maps = torch.arange(64.0).view(1, 1, 8, 8)
    values, covered = to_canvas(maps, view, (2, 2))
    # Their centers, row 3 and columns 1 and 3 of the image, lie at 1 of 2 rows and at 1 and 3 of 4
    # columns of the window: row 2 + 2, columns 7 - 2 and 7 - 6.
    assert covered.tolist() == [[[[False, False], [True, True]]]]
    assert values.tolist() == [[[[0, 0], [4 * 8 + 5, 4 * 8 + 1]]]]


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_canvas_is_the_slow_one(path):
    golden = load_golden(path)
    maps, view = torch.from_numpy(golden["canvas/maps"]), golden.tensor("canvas/views")
    size = tuple(golden["canvas/size"].tolist())
    values, covered = to_canvas(maps.requires_grad_(), view, size)
    assert torch.equal(values, torch.from_numpy(golden["canvas/values"]))
    assert torch.equal(covered, bools(golden, "canvas/covered"))
    (values * torch.from_numpy(golden["canvas/weights"])).sum().backward()
    assert_gradients([(maps.grad, golden.tensor("canvas/grad"))])
    for dtype in (torch.float16, torch.float64):
        assert to_canvas(maps.to(dtype), view, size)[0].dtype == dtype


def test_canvas_of_a_views_label_is_that_of_the_image():
    """Where the view only cuts and flips, exactly; scaled, within a pixel."""
    from torchvision import tv_tensors

    height, width, size = 20, 30, (5, 6)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    label = tv_tensors.Mask((rows * 8 + columns % 8).byte())  # both can be read from it
    image = tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))
    centers = label[2::4, 2::5].long()
    for scales, tolerance in (((1.0,), 0), ((0.5, 2.0), 1)):
        seen = 0
        for seed in range(40):
            torch.manual_seed(seed)
            _, found, view = LocatedView(16, scales)(image, label)
            values, covered = to_canvas(found[None, None].float(), view[None], size)
            values, covered = values[0, 0].long(), covered[0, 0]
            assert not (values[covered] == 255).any()
            down = (values // 8 - centers // 8)[covered].abs()
            across = (values % 8 - centers % 8)[covered].abs()
            assert down.max() <= tolerance and torch.minimum(across, 8 - across).max() <= tolerance
            seen += int(covered.sum())
        assert seen > 40 * 5


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
@pytest.mark.parametrize("decay", [0.6, 0.0, 0.9, 1.0])
def test_averages_are_the_slow_ones(path, decay):
    golden = load_golden(path)
    values = torch.from_numpy(golden["cells/values"]).requires_grad_()
    covered, past = bools(golden, "cells/covered"), torch.zeros(values.shape[1:])
    for t in range(len(values)):
        at = f"cells/decay_{decay}/{t}/"
        past = ensemble(past, values[t], covered[t], decay)
        target, seen = ensemble_target(past)
        assert not past.requires_grad and not target.requires_grad and target.isfinite().all()
        for found, key in ((past, "past"), (target, "target")):
            torch.testing.assert_close(
                found.double(), golden.tensor(at + key), rtol=1e-5, atol=1e-7
            )
        assert torch.equal(seen, bools(golden, at + "seen"))


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
@pytest.mark.parametrize("kind", ["all", "sparse"])
def test_targets_are_the_papers_by_epochs(path, kind):
    golden = load_golden(path)
    prob, executed = golden.tensor(f"original/{kind}/prob"), golden[f"original/{kind}/executed"]
    past = torch.zeros(*prob.shape[1:], 1, 1, dtype=torch.float64)
    for epoch, here in enumerate(executed):
        covered = torch.from_numpy(here).view(-1, 1, 1, 1)
        past = ensemble(past, prob[epoch][..., None, None], covered)
        target, _ = ensemble_target(past)
        expected = golden.tensor(f"original/{kind}/targets")[epoch]
        torch.testing.assert_close(target[..., 0, 0], expected, rtol=1e-6, atol=1e-7)


def test_a_constant_prediction_is_its_own_target():
    prob, covered = torch.rand(2, 5, 3, 4).softmax(1), torch.rand(2, 1, 3, 4) < 0.7
    past = torch.zeros_like(prob)
    for _ in range(4):
        past = ensemble(past, prob, covered, 0.6)
        target, seen = ensemble_target(past)
        assert torch.equal(seen, covered)
        torch.testing.assert_close(target, prob * covered)


# ---- the bank ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_bank_is_the_slow_one(path, tmp_path):
    golden = load_golden(path)
    index, count = golden.tensor("bank/index"), int(golden["bank/num_images"])
    shape = golden["bank/0/values"].shape[1:]
    exact, half = (
        PredictionBank(tmp_path / str(dtype), count, shape[0], shape[1:], dtype)
        for dtype in (torch.float32, torch.float16)
    )
    for t, batch in enumerate(index):
        at = f"bank/{t}/"
        for bank, tolerance in ((exact, 1e-5), (half, 1e-3)):
            target, seen = bank.targets(batch)
            assert target.dtype == torch.float32 and torch.equal(seen, bools(golden, at + "seen"))
            expected = golden.tensor(at + "target").float()
            torch.testing.assert_close(target, expected, rtol=tolerance, atol=tolerance)
            values = torch.from_numpy(golden[at + "values"])
            bank.update(batch, values, bools(golden, at + "covered"), float(golden["bank/decay"]))
        exact.settle()
        past = exact.read(torch.arange(count)).double()
        torch.testing.assert_close(past, golden.tensor(at + "past_after"), rtol=1e-5, atol=1e-7)


def visit(bank, generator, images=6, batch=4) -> None:
    """A random batch, images twice in it included."""
    index = torch.randint(images, (batch,), generator=generator)
    values = torch.rand(batch, *bank.shape, generator=generator).softmax(1)
    bank.update(index, values, torch.rand(batch, 1, *bank.shape[1:], generator=generator) < 0.8)


def content(bank, images=6) -> torch.Tensor:
    return torch.cat(bank.targets(torch.arange(images)), 1)


def new_bank(tmp_path) -> PredictionBank:
    return PredictionBank(tmp_path / "bank.bin", 6, 3, (4, 5))


def test_a_state_is_small_and_can_be_taken_back(tmp_path):
    """By the same and by a new object, again and again, whatever was written since."""
    bank, generator = new_bank(tmp_path), torch.Generator().manual_seed(0)
    for _ in range(20):
        for _ in range(int(torch.randint(4, (), generator=generator))):
            visit(bank, generator)
        state, expected = bank.state_dict(), content(bank)
        copy = {name: value.clone() for name, value in state.items()}
        assert sum(v.numel() * v.element_size() for v in state.values()) <= 64 * 6
        for _ in range(3):  # restarts from one state, each of which writes
            for _ in range(3):
                visit(bank, generator)
            assert not torch.equal(content(bank), expected)
            bank = new_bank(tmp_path)
            assert not content(bank).any()  # without a state it has seen nothing
            bank.load_state_dict(state)
            assert torch.equal(content(bank), expected)
        assert_same(copy, state)  # no view of the live table


def test_a_bank_that_is_gone_is_an_error(tmp_path):
    bank = new_bank(tmp_path)
    bank.load_state_dict(bank.state_dict())  # nothing was written, so nothing is missing
    visit(bank, torch.Generator().manual_seed(0))
    state = bank.state_dict()
    os.truncate(bank.path, bank.path.stat().st_size - 1)
    for _ in range(2):
        with pytest.raises(UserError, match=r"bank.bin: is missing or cut short; .*delete last.pt"):
            new_bank(tmp_path).load_state_dict(state)
        bank.path.unlink(missing_ok=True)


def test_canvases_are_those_of_the_global_batch(tmp_path):
    args = resolve(Args(dataset="shapes", split="8", batch_size=4))
    _, split = open_data(args)
    labeled, unlabeled = canvases(args, split, 3).view(2, 4).tolist()
    for found, stream, before in ((labeled, "labeled", 0), (unlabeled, "unlabeled", 8)):
        ids = split.labeled if stream == "labeled" else split.unlabeled
        pairs = global_batch(len(ids), 4, args.seed, stream, 3)
        assert found == [before + index for index, _ in pairs]


# ---- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_main_takes_the_steps(path, quick, monkeypatch):
    """`main` itself on their network, crops and views: losses, weights, statistics, bank.

    Their batches are one forward of images that share one list; here it is the labeled stream, and
    the unlabeled one shows the same images to canvases of their own.
    """
