"""temporal_ensembling.py: canvas, averages and bank against slow forms, steps, routes, runs."""

import json
import os
import random
import re
import time
from dataclasses import replace
from pathlib import Path

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


def test_writes_may_be_partial(tmp_path):
    from types import SimpleNamespace

    banks = [PredictionBank(tmp_path / name, 6, 3, (4, 5)) for name in ("whole", "partial")]
    file = banks[1].file
    banks[1].file = SimpleNamespace(
        seek=file.seek, readinto=file.readinto, write=lambda data: file.write(data[:7])
    )
    for bank in banks:
        visit(bank, torch.Generator().manual_seed(0))
    assert content(banks[0]).any() and torch.equal(*map(content, banks))


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

    Their one batch is the labeled one here; the unlabeled one shows nothing, to another network.
    """
    golden = load_golden(path)
    number = {k: float(golden[f"steps/{k}"]) for k in ("lr", "weight_decay", "total", "lambda_u")}
    network, steps, streams = (
        tiny(golden.part("steps/before/")),
        [],
        {"labeled": [], "unlabeled": []},
    )
    while (at := f"steps/{len(steps)}/") + "image" in golden:
        parts = [golden.tensor(at + key) for key in ("image", "label", "view")]
        streams["labeled"].append(parts)
        nowhere = parts[2].clone()
        nowhere[:, 2] = nowhere[:, 0]  # a window below the image
        streams["unlabeled"].append((*parts[:2], nowhere))
        steps.append(at)
    assert len(steps) == 5
    forward, banks = network.forward, []

    def labeled_alone(image):
        network.calls = getattr(network, "calls", 0) + 1
        return forward(image) if network.calls % 2 else torch.zeros(2, classes, *image.shape[2:])

    def bank(path, count, num_classes, canvas_size):
        banks.append(PredictionBank(path, count, classes, canvas_size, torch.float32))
        return banks[0]

    def visited(args, split, step):
        return torch.cat([golden.tensor(f"steps/{step}/index"), torch.tensor([10, 11])])

    classes = len(golden["steps/before/bias"])
    monkeypatch.setattr(network, "forward", labeled_alone)
    monkeypatch.setattr(temporal_ensembling, "PredictionBank", bank)
    monkeypatch.setattr(temporal_ensembling, "canvases", visited)
    monkeypatch.setattr(temporal_ensembling, "add_dropout", lambda *_: None)
    args = quick(
        Args, steps=int(number["total"]), optimizer="sgd", lr=number["lr"], momentum=0.9,
        weight_decay=number["weight_decay"], lambda_u=number["lambda_u"], batch_size=2, noise=0.0,
        ramp_up=float(golden["steps/ramp_steps"]) / number["total"], log_every=1, eval_every=10**6,
        ensemble_decay=float(golden["steps/decay"]), canvas=tuple(golden["steps/canvas"].tolist()),
    )  # fmt: skip
    resolved = {"crop_size": golden["steps/0/image"].shape[-1]}  # smaller than a flag may say
    monkeypatch.setattr(
        temporal_ensembling, "resolve", lambda args: replace(resolve(args), **resolved)
    )
    states, rows = record_steps(temporal_ensembling, args, monkeypatch, network, network, streams)
    for at, (state, _), row in zip(steps, states, rows, strict=True):
        for name in ("sup", "cons"):
            expected = float(golden[f"{at}loss_{name}"])
            assert row[f"loss/{name}"] == pytest.approx(expected, 1e-5, 1e-9), (at, name)
        expected = tiny(golden.part(f"{at}after/")).state_dict()
        for key in expected:
            if not key.endswith("num_batches_tracked"):
                torch.testing.assert_close(state[key], expected[key], rtol=1e-5, atol=1e-5)
    banks[0].settle()
    expected = golden.tensor(f"{steps[-1]}past_after")
    past = banks[0].read(torch.arange(len(expected))).double()
    torch.testing.assert_close(past, expected, rtol=1e-5, atol=1e-5)


def bank_of(folder) -> torch.Tensor:
    """Every average of a run, as its last checkpoint has them."""
    state = torch.load(Path(folder) / "last.pt", weights_only=True)
    canvas, count = state["meta"]["args"]["canvas"], len(state["bank"]["slot"])
    bank = PredictionBank(Path(folder) / "bank.bin", count, len(state["meta"]["classes"]), canvas)
    bank.load_state_dict(state["bank"])
    return bank.read(torch.arange(count))


def assert_same_end(whole, other) -> None:
    """Weights, optimizer and averages; the slots in which these lie may differ."""
    found = [weights(folder) for folder in (whole, other)]
    assert_same(*({k: v for k, v in each.items() if k != "/bank/slot"} for each in found))
    averages = bank_of(whole)
    assert averages.any() and torch.equal(averages, bank_of(other))


class StopError(Exception):
    pass


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_stopped_while_it_writes_or_saves(where, quick, monkeypatch):
    """In the bank's second write after a checkpoint; or with the next one all but in its place."""
    args = quick(Args, steps=6, save_every=2, split="5")  # images return within the run
    whole = main(replace(args, exp_name="whole", save_every=100))["run_dir"]
    calls = []

    def stop_at(right, count):
        def stopped(*inputs):
            calls.append(None)
            if len(calls) == count:
                raise StopError
            return right(*inputs)

        return stopped

    with monkeypatch.context() as patch, pytest.raises(StopError):
        if where == "write":  # 8 images a step, two steps a checkpoint
            patch.setattr(PredictionBank, "seek", stop_at(PredictionBank.seek, 85))
        else:  # of the second last.pt; before it env, args and last, and to fsync the bank twice
            count = {"fsync": 6, "replace": 4}[where]
            patch.setattr(os, where, stop_at(getattr(os, where), count))
        main(args)
    (folder,) = Path(args.output_dir).glob("*__temporal_ensembling__*")
    assert torch.load(folder / "last.pt", weights_only=True)["step"] in (2, 4)
    assert_same_end(whole, main(args)["run_dir"])


def test_killed_at_random_moments(quick):
    """KILLS SIGKILLs (3), with a checkpoint at every step, so that many come while it saves."""
    from test_resume import complete, end, logged_rows, start

    args = quick(Args, steps=24, save_every=1, split="5", log_every=1, eval_every=1000)
    complete("temporal_ensembling", replace(args, exp_name="whole", save_every=1000))
    draw, steps, killed = random.Random(0), [0], []
    for _ in range(int(os.environ.get("KILLS", 3))):
        process = start("temporal_ensembling", args)
        while process.is_alive() and logged_rows(args) <= steps[-1]:
            time.sleep(0.01)
        process.join(draw.uniform(0.0, 0.4))
        process.kill()
        process.join()
        killed.append(process)
        steps.append(logged_rows(args))
    complete("temporal_ensembling", args)
    for process in killed:
        end(process)
    assert len(set(steps)) > 2 and steps[-2] < args.steps, f"kills too early or late: {steps}"
    (whole,), (other,) = (
        Path(args.output_dir).glob(f"*__{name}__*") for name in ("whole", args.exp_name)
    )
    assert_same_end(whole, other)
    rows = [read_log(folder) for folder in (whole, other)]
    for row in rows[0] + rows[1]:
        row.pop("time/images_per_s")
    assert json.dumps(rows[0]) == json.dumps(rows[1])


def test_a_full_disk_is_one_error_and_loses_nothing(quick, monkeypatch, capsys):
    import resource
    from types import SimpleNamespace

    args = quick(Args, save_every=2, eval_every=6)
    whole = main(replace(args, exp_name="whole"))["run_dir"]
    before, save = resource.getrlimit(resource.RLIMIT_FSIZE), temporal_ensembling.Run.save

    def save_until_full(self, name, *rest):
        save(self, name, *rest)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    capsys.readouterr()
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(temporal_ensembling.Run, "save", save_until_full)
            patch.setattr(temporal_ensembling, "tyro", SimpleNamespace(cli=lambda _: args))
            patch.setattr(
                temporal_ensembling.sys.stdout, "reconfigure", lambda **_: 0, raising=False
            )
            temporal_ensembling.command_line()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert stop.value.code == 2 and len(lines) == 1 and "File too large" in lines[0], lines
    assert_same_end(whole, main(args)["run_dir"])


def test_two_processes_leave_the_bank_of_one(quick):
    """In micro-batches, too, and with images that occur twice in a batch: 8 of 5."""
    from test_distributed import run

    args = quick(
        Args, steps=3, batch_size=8, split="5", lr=0.0, log_every=1, eval_every=3, ramp_up=0.0
    )
    one = run(1, "temporal_ensembling", args, frozen=True)
    two = run(2, "temporal_ensembling", replace(args, accumulate=2), frozen=True)
    banks = bank_of(one), bank_of(two)
    torch.testing.assert_close(*(bank.float() for bank in banks), rtol=0, atol=1e-3)
    assert (banks[0] > 0).any((1, 2, 3)).sum() >= 5 + 20
    rows = [read_log(folder) for folder in (one, two)]
    assert rows[0][-1]["pseudo/confidence"] > 0.05 and rows[0][-1]["loss/sup"] > 0
    for row_1, row_2 in zip(*rows, strict=True):
        assert row_1["loss/sup"] == pytest.approx(row_2["loss/sup"], abs=1e-5)
        # A mean over micro-batches that cover more or less; the second process has targets, too.
        assert row_1["pseudo/seen"] == pytest.approx(row_2["pseudo/seen"], rel=0.1)
    assert rows[0][-1]["pseudo/seen"] > 0.3


def test_the_same_view_twice_agrees_with_itself(quick, monkeypatch):
    """Without noise, dropout and learning the second visit finds its own prediction."""
    scales = temporal_ensembling.LocatedView

    class Whole(scales):
        def make_params(self, flat):
            return {"corner": [0, 0], "size": [64, 64], "resized": [64, 64], "flip": False}

    monkeypatch.setattr(temporal_ensembling, "LocatedView", Whole)
    from test_supervised import freeze_batchnorm

    freeze_batchnorm(monkeypatch, temporal_ensembling)
    args = quick(
        Args, steps=4, batch_size=4, crop_size=64, split="4", lr=0.0, noise=0.0, dropout=0.0,
        log_every=1, unlabeled="all",
    )  # fmt: skip
    rows = read_log(main(args)["run_dir"])
    assert rows[0]["loss/cons"] == rows[0]["pseudo/seen"] == 0
    for row in rows[1:]:  # the labeled ones return at every step
        assert row["pseudo/seen"] == 0.5 and row["loss/cons"] < 1e-7
        assert row["pseudo/agreement"] > 0.99


def test_gradient_reaches_the_network_by_the_prediction_alone(quick, monkeypatch):
    right, seen = temporal_ensembling.consistency_loss, []

    def watch(values, target, counted):
        values.retain_grad()
        seen.append((values, target, counted))
        return right(values, target, counted)

    monkeypatch.setattr(temporal_ensembling, "consistency_loss", watch)
    monkeypatch.setattr(temporal_ensembling, "supervised_loss", lambda logits, *_: 0 * logits.sum())
    main(quick(Args, steps=3, split="5", **active(temporal_ensembling)))
    for values, target, counted in seen[1:]:
        assert not target.requires_grad and counted.any()
        assert values.grad.any() and not (values.grad * ~counted).any()


def test_flags_have_their_effects(quick):
    def end(**flags):
        flags = {"split": "5", "exp_name": str(flags)[2:9]} | active(temporal_ensembling) | flags
        return torch.load(f"{main(quick(Args, steps=4, **flags))['run_dir']}/last.pt")["network"]

    plain = end()
    for flags in (
        {"canvas": (8, 8)}, {"noise": 0.3}, {"dropout": 0.2}, {"lambda_u": 1.0}, {"ramp_up": 0.9},
        {"ensemble_decay": 0.1},
    ):  # fmt: skip
        changed = end(**flags)
        assert any(not torch.equal(plain[key], changed[key]) for key in plain), flags


def test_it_trains_and_says_how_much_disk_it_takes(quick, capsys):
    args = quick(Args, steps=40, log_every=1, lr=3e-3, log_pseudo_accuracy=True, split="1000")
    folder = main(args)["run_dir"]
    rows = read_log(folder)
    loss = [row["loss/sup"] for row in rows]
    assert sum(loss[-10:]) < 0.9 * sum(loss[:10])
    assert rows[0]["loss/cons"] == 0 < rows[-1]["loss/cons"]
    assert 0.2 < rows[-1]["pseudo/seen"] <= 1 and 1 / 8 < rows[-1]["pseudo/confidence"] < 1
    assert max(row["pseudo/accuracy"] for row in rows) > 0
    size, most = map(
        float, re.search(r"grow to (\S+) GB .* most (\S+) GB", capsys.readouterr().out).groups()
    )
    assert size == pytest.approx(1024 * 8 * 16 * 16 * 2 / 1e9, rel=0.01)
    assert most == pytest.approx(2 * size, rel=0.01)
    assert os.stat(f"{folder}/bank.bin").st_blocks * 512 <= most * 1e9


def test_unlabeled_labels_are_never_read(quick, monkeypatch):
    quick_5 = lambda *a, **flags: quick(*a, **{"split": "1000", "batch_size": 24} | flags)  # noqa: E731
    assert_unlabeled_labels_are_not_read(temporal_ensembling, quick_5, monkeypatch)


@pytest.mark.parametrize("flags", [
    {"ensemble_decay": 1.0}, {"ensemble_decay": -0.1}, {"canvas": (0, 4)}, {"noise": -0.1},
    {"dropout": 1.5}, {"lambda_u": -1.0}, {"ramp_up": 1.5},
], ids=str)  # fmt: skip
def test_bad_flags(quick, flags):
    with pytest.raises(UserError, match=next(iter(flags)).replace("_", "-")):
        main(quick(Args, **flags))


def test_paper_rows():
    canvas = [(64, 64), (128, 256), (45, 60), (16, 16), (64, 64)]
    assert [row["canvas"] for row in PAPER.values()] == canvas
    assert [PAPER[name]["lambda_u"] for name in list(PAPER)[:4]] == [30, 30, 16, 11]
    args = resolve(Args(dataset="cityscapes"))
    assert (args.noise, args.dropout, args.ramp_up, args.ensemble_decay) == (
        0.15,
        0.5,
        80 / 300,
        0.6,
    )


def test_own_data_has_the_weight_per_pixel_of_voc(tmp_path):
    """The loss is a mean over the classes, 21 on VOC. What the user says is not rescaled."""
    from test_cli import make_folder

    flags = {"dataset": "folder", "data_root": str(make_folder(tmp_path))}  # of two classes
    assert temporal_ensembling.resolve(Args(**flags)).lambda_u == pytest.approx(30 * 2 / 21)
    assert temporal_ensembling.resolve(Args(**flags, lambda_u=7.0)).lambda_u == 7
