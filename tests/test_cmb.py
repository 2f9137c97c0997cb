"""cmb.py: losses, bank, selectors and views against hand-worked numbers and the authors' code."""

import math

import pytest
import torch
from conftest import (
    SHARED,
    active,
    assert_unlabeled_labels_are_not_read,
    golden_files,
    load_golden,
    read_log,
    weights,
)
from test_supervised import freeze_batchnorm
from torch import nn

import cmb
from cmb import (
    PAPER,
    Args,
    ClassBalance,
    FeatureSelector,
    Heads,
    MemoryBank,
    classes_to_paste,
    classmix,
    contrastive_loss,
    cosine_decay,
    entropy_loss,
    main,
    projection_head,
    pseudo_label_loss,
    quota,
    ramp_up,
    rescale,
    run_mlp,
    run_selectors,
    strong_augmentation,
    weighted_cross_entropy,
)

GOLDENS = golden_files("cmb_seed*.npz")
WHOLE = [path for path in GOLDENS if "aug/images" in load_golden(path)]  # not the small copy
by_stem = {"ids": lambda path: f"{path.parent.name}-{path.stem}"}
CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # of the goldens' README; theirs are fp32, ours fp64
GRADIENTS = {"rtol": 1e-3, "atol": 1e-5}
LAYERS = {"0": "lin1", "1": "bn", "3": "lin2"}


def module_of(golden, prefix: str) -> nn.Sequential:
    """A head or selector with the goldens' weights, in fp64."""
    hidden, dim = golden[f"{prefix}/lin1.weight"].shape
    module = (FeatureSelector if "sel_" in prefix else projection_head)(dim, hidden)
    module.double().load_state_dict(
        {key: golden.tensor(name_of(prefix, key)) for key in module.state_dict()}
    )
    return module


def name_of(prefix: str, key: str) -> str:
    layer, name = key.split(".")
    return f"{prefix}/{LAYERS[layer]}.{name}"


def assert_state(module, golden, prefix: str) -> None:
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, golden.tensor(name_of(prefix, key)), **CLOSE)


def selectors_of(golden, prefix: str, kind: str = "feat") -> list[nn.Sequential]:
    return [module_of(golden, f"{prefix}/sel_{kind}/{c}") for c in range(6)]


def random_selectors(num_classes: int, dim: int, hidden: int = 5) -> list[nn.Sequential]:
    return [FeatureSelector(dim, hidden).double() for _ in range(num_classes)]


def double_loop(features, labels, bank, selectors, num_classes, bank_selectors=None):
    """The loss as the spec has it: classes one by one, the whole M x N matrix."""
    total = features.new_zeros(())
    for c in range(num_classes):
        own, vectors = features[labels == c], bank[c]
        if len(own) < 2 or len(vectors) < 2:
            continue
        attention = selectors[c](own.detach()).sigmoid()[:, 0]
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        value = torch.ones(len(vectors)).to(own)
        if bank_selectors:
            value = bank_selectors[c](vectors).sigmoid()[:, 0]
        attention = attention * len(own) / attention.sum()
        value = value * len(value) / value.sum()
        distance = 1 - own / own.norm(dim=1, keepdim=True) @ vectors.T
        for i in range(len(own)):
            for j in range(len(vectors)):
                total = total + attention[i] * value[j] * distance[i, j] / distance.numel()
    return total / num_classes


# --- losses


def test_pseudo_label_loss_by_hand():
    # Two pixels of two classes at p = 3/4 for class 0; the second is ignored but counted.
    logits = torch.tensor([math.log(3.0), 0.0]).view(1, 2, 1, 1).repeat(1, 1, 1, 2)
    logits.requires_grad_()
    label, confidence = torch.tensor([[[0, 255]]]), torch.tensor([[[0.5, 1.0]]])
    loss = pseudo_label_loss(logits, label, confidence, 0.5)
    assert loss.item() == pytest.approx(0.5 * 0.5**6 * -math.log(0.75) / 2)
    loss.backward()
    assert logits.grad[0, 0, 0].tolist() == pytest.approx([0.5 * 0.5**6 * -0.25 / 2, 0])
    weight = torch.tensor([3.0, 1.0])
    assert pseudo_label_loss(logits, label, confidence, 0.5, weight).item() == pytest.approx(
        3 * loss.item()
    )
    assert pseudo_label_loss(logits, label, confidence, 1, None, 2).item() == pytest.approx(
        0.5**2 * -math.log(0.75) / 2
    )


def test_entropy_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]).T[None, :, None]  # (1, 2, 1, 2)
    first = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert entropy_loss(logits).item() == pytest.approx((first + 1) / 2)
    assert entropy_loss(logits, torch.tensor([[[True, False]]])).item() == pytest.approx(first)
    sure = torch.tensor([200.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    loss = entropy_loss(sure)
    loss.backward()
    assert loss == 0 and torch.equal(sure.grad, torch.zeros_like(sure))


def test_losses_are_zero_where_nothing_counts():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    label, confidence = torch.full((2, 4, 4), 255), torch.rand(2, 4, 4)
    features = torch.randn(32, 6, requires_grad=True)
    selectors, empty = random_selectors(3, 6), [torch.zeros(0, 6)] * 3
    full, nobody = [torch.randn(4, 6)] * 3, torch.full((32,), 255)
    some = torch.randint(3, (32,))
    for loss in (
        pseudo_label_loss(logits, label, confidence, 1.0),
        pseudo_label_loss(logits, label * 0, confidence * 0, 1.0),
        weighted_cross_entropy(logits, label, torch.ones(3)),
        entropy_loss(logits, label != 255),
        contrastive_loss(features, some, empty, selectors, 3),
        contrastive_loss(features, some, [rows[:1] for rows in full], selectors, 3),
        contrastive_loss(features, nobody, full, selectors, 3),
        contrastive_loss(features[:3], torch.arange(3), full, selectors, 3, selectors),
    ):
        logits.grad = features.grad = None
        loss.backward()
        assert loss == 0
        for given in (logits, features):
            assert given.grad is None or not given.grad.any()
    for selector in selectors:
        assert all(p.grad is None or not p.grad.any() for p in selector.parameters())
        assert torch.equal(selector[1].running_mean, torch.zeros(5).double())


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_pixel_losses_are_the_authors(path):
    golden = load_golden(path)
    label, weight = golden.tensor("pix/target"), golden.tensor("pix/class_weights")
    label[label == int(golden["pix/ignore"])] = 255
    ramp = ramp_up(int(golden["pix/iter"]), 2000)
    assert ramp == pytest.approx(float(golden["pix/ramp"]))
    for name, loss in {
        "sup_ce": lambda x: weighted_cross_entropy(x, label, weight),
        "pseudo_ce": lambda x: pseudo_label_loss(x, label, golden.tensor("pix/conf"), ramp, weight),
        "entropy": lambda x: entropy_loss(x, label != 255),
    }.items():
        logits = golden.tensor("pix/logits").requires_grad_()
        value = loss(logits)
        value.backward()
        torch.testing.assert_close(value, golden.tensor(f"pix/{name}"), **CLOSE)
        torch.testing.assert_close(logits.grad, golden.tensor(f"pix/{name}_grad"), **GRADIENTS)
    torch.testing.assert_close(
        entropy_loss(logits.detach()), golden.tensor("pix/entropy_nomask"), **CLOSE
    )
    torch.testing.assert_close(
        cmb.cross_entropy(logits, label), golden.tensor("pix/sup_ce_unweighted"), **CLOSE
    )


# --- contrastive loss, heads and selectors


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_contrastive_loss_is_the_authors(path, mode):
    golden = load_golden(path)
    selectors = selectors_of(golden, "heads")
    for selector in selectors:
        selector.train(mode == "train")
    features = golden.tensor("contr/features").requires_grad_()
    labels = golden.tensor("contr/labels")
    bank = [golden.tensor(f"contr/bank_c{c}") for c in range(6)]
    loss = contrastive_loss(features, labels, bank, selectors, 6)
    torch.testing.assert_close(loss, golden.tensor(f"contr/{mode}/loss"), **CLOSE)
    loss.backward()
    torch.testing.assert_close(
        features.grad, golden.tensor(f"contr/{mode}/grad_features"), **GRADIENTS
    )
    for c, selector in enumerate(selectors):
        used = f"contr/{mode}/selector_logit_feat_c{c}" in golden
        for key, parameter in selector.named_parameters():
            name = name_of(f"contr/{mode}/grad/sel_feat/{c}", key)
            assert (name in golden) == used
            if used:
                torch.testing.assert_close(parameter.grad, golden.tensor(name), **GRADIENTS)
            else:
                assert not parameter.grad.any()
        after = "contr/train/heads_after" if mode == "train" else "heads"
        assert_state(selector, golden, f"{after}/sel_feat/{c}")
    for c in range(6):  # each class's part of the sum
        alone = contrastive_loss(features, labels.where(labels == c, 255), bank, selectors, 6)
        expected = golden.tensor(f"contr/{mode}/per_class_contribution")[c]
        torch.testing.assert_close(alone, expected, **CLOSE)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_heads_are_the_authors(path):
    """Raw features, projection, prediction, loss; some ignored rows change nothing."""
    golden = load_golden(path)
    projection, prediction = (module_of(golden, f"heads/{name}") for name in ("proj", "pred"))
    raw, labels = golden.tensor("head/raw"), golden.tensor("contr/labels")
    rows = torch.cat([raw[:20], torch.randn(7, raw.shape[1]).double() * 9, raw[20:]])
    labels = torch.cat([labels[:20], torch.full((7,), 255), labels[20:]])
    rows.requires_grad_()
    valid = labels != 255
    projected = run_mlp(projection, rows, valid)
    predicted = run_mlp(prediction, projected, valid)
    torch.testing.assert_close(projected[valid], golden.tensor("head/proj"), **CLOSE)
    torch.testing.assert_close(predicted[valid], golden.tensor("head/pred"), **CLOSE)
    bank = [golden.tensor(f"contr/bank_c{c}") for c in range(6)]
    loss = contrastive_loss(predicted, labels, bank, selectors_of(golden, "heads"), 6)
    torch.testing.assert_close(loss, golden.tensor("head/loss"), **CLOSE)
    loss.backward()
    torch.testing.assert_close(rows.grad[valid], golden.tensor("head/grad_raw"), **GRADIENTS)
    assert not rows.grad[~valid].any()


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("counts", [(400, 1, 2, 0, 30), (0, 0, 5, 3, 1), (16, 16, 32, 17, 15)])
def test_contrastive_loss_is_the_double_loop(counts, attention):
    torch.manual_seed(0)
    classes, dim = len(counts), 6
    labels = torch.cat(
        [torch.full((n,), c) for c, n in enumerate(counts)] + [torch.full((9,), 255)]
    )
    labels = labels[torch.randperm(len(labels))]
    bank = [torch.randn(n, dim).double() for n in (5, 5, 1, 4, 3)]
    features = torch.randn(len(labels), dim).double()
    selectors, bank_selectors = (random_selectors(classes, dim) for _ in range(2))
    found = []
    for function in (contrastive_loss, double_loop):
        modules = [*selectors, *bank_selectors]
        states = [{k: v.clone() for k, v in m.state_dict().items()} for m in modules]
        given = features.clone().requires_grad_()
        vectors = [rows.clone().requires_grad_() for rows in bank]
        loss = function(
            given, labels, vectors, selectors, classes, bank_selectors if attention else None
        )
        if loss.requires_grad:
            loss.backward()
        gradients = [
            p.grad if p.grad is not None else p * 0 for m in modules for p in m.parameters()
        ]
        after = [v.clone() for m in modules for v in m.state_dict().values()]
        found.append([loss, given.grad, *gradients, *after])
        for module, state in zip(modules, states, strict=True):
            module.load_state_dict(state)
            module.zero_grad()
        if function is contrastive_loss:
            assert all(rows.grad is None for rows in vectors)  # the bank is a constant
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert found[0][0] > 0


def test_bank_attention_has_an_effect_and_its_selectors_a_gradient():
    torch.manual_seed(0)
    selectors, bank_selectors = random_selectors(2, 6), random_selectors(2, 6)
    features, labels = torch.randn(20, 6).double(), torch.arange(20) % 2
    bank = [torch.randn(8, 6).double() for _ in range(2)]
    off = contrastive_loss(features, labels, bank, selectors, 2)
    on = contrastive_loss(features, labels, bank, selectors, 2, bank_selectors)
    on.backward()
    assert on != off
    assert all(p.grad.abs().max() > 0 for m in bank_selectors for p in (m[0].weight, m[3].weight))
    # What a selector sees is a constant: features get gradient by the distance alone.
    features.requires_grad_()
    contrastive_loss(features, labels, bank, selectors, 2).backward()
    through_loss = features.grad.clone()
    features.grad = None
    weight = torch.stack([selectors[c](features[labels == c]).sigmoid()[:, 0] for c in (0, 1)])
    weight = (weight / weight.sum(1, keepdim=True)).detach()
    for c in (0, 1):
        center = nn.functional.normalize(bank[c], dim=1).mean(0)
        cosine = nn.functional.normalize(features[labels == c], dim=1) @ center
        ((1 - cosine) * weight[c]).sum().div(2).backward()
    torch.testing.assert_close(features.grad, through_loss)


def test_no_matrix_of_features_and_vectors(monkeypatch):
    """The largest tensor has M x D numbers and a rest, not M x N."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    Largest.size = max(Largest.size, tensor.numel())
            return out

    features, labels = torch.randn(4000, 4, requires_grad=True), torch.randint(3, (4000,))
    bank = [torch.randn(256, 4) for _ in range(3)]
    selectors = [FeatureSelector(4, 4) for _ in range(3)]
    with Largest():
        contrastive_loss(features, labels, bank, selectors, 3).backward()
    assert Largest.size < 2 * 4000 * 4


def test_half_precision_is_computed_in_fp32():
    features, labels = torch.randn(40, 6), torch.randint(2, (40,))
    bank, selectors = [torch.randn(8, 6)] * 2, [FeatureSelector(6) for _ in range(2)]
    half = features.bfloat16()
    loss = contrastive_loss(half, labels, bank, selectors, 2)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, contrastive_loss(half.float(), labels, bank, selectors, 2))
    logits = torch.randn(2, 3, 4, 4).bfloat16()
    assert entropy_loss(logits).dtype == torch.float32
    assert entropy_loss(logits.double()).dtype == torch.float64


def test_one_row_of_a_class_and_of_a_head():
    head, rows = projection_head(4, 4), torch.randn(9, 4, requires_grad=True)
    out = run_mlp(head, rows, torch.arange(9) == 3)
    out.sum().backward()
    assert out.isfinite().all() and rows.grad.isfinite().all()
    assert torch.equal(head[1].running_var, torch.ones(4))  # one row says nothing
    bank = MemoryBank(2, 4, 3)
    selectors = [FeatureSelector(4, 4) for _ in range(2)]
    bank.add(rows[:3], torch.tensor([1, 255, 0]), selectors, 1)
    assert [len(vectors) for vectors in bank.vectors] == [1, 1]
    bank.add(rows[:0], torch.zeros(0, dtype=torch.long), selectors, 1)
    assert [len(vectors) for vectors in bank.vectors] == [1, 1]


def test_heads_ignore_the_rows_of_padding():
    heads = Heads(8, 3, bank_attention=True)
    bank = MemoryBank(3, 8, 4)
    bank.add(torch.randn(12, 8), torch.arange(12) % 3, heads.feature_selectors, 4)
    features, label = torch.randn(2, 8, 4, 4), torch.randint(3, (2, 16, 16))
    label[:, :, 8:] = 255
    other = features.clone()
    other[..., 2:] = 7
    values = [heads(each, label, bank) for each in (features, other)]
    assert values[0] > 0 and torch.equal(*values)
    assert len(list(Heads(8, 3, bank_attention=False).bank_selectors)) == 0


# --- bank


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_bank_is_the_authors(path):
    """Five updates, lowest ranked, bit for bit; the selectors' statistics move only if ranked."""
    golden = load_golden(path)
    selectors = selectors_of(golden, "bank/heads")
    bank = MemoryBank(6, 8, int(golden["bank/capacity"]))
    assert [tuple(rows.shape) for rows in bank.vectors] == [(0, 8)] * 6
    dataset = "voc" if golden["bank/dataset_is_voc"] else "cityscapes"
    number, capacity = int(golden["bank/n_labelled"]), int(golden["bank/capacity"])
    per_image = quota(number, capacity, dataset, num_classes=6)
    assert per_image == golden["bank/quota_per_image"]
    most = per_image * int(golden["bank/batch_size"])
    assert most == golden["bank/quota_per_update"]
    for t in range(5):
        at = f"bank/step{t}/"
        bank.add(golden.tensor(at + "features"), golden.tensor(at + "labels"), selectors, most)
        for c in range(6):
            assert torch.equal(bank.vectors[c], golden.tensor(f"{at}bank_c{c}")), (t, c)
    for c in range(6):
        assert_state(selectors[c], golden, f"bank/heads_after/sel_feat/{c}")


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_quota_is_the_authors(path):
    golden = load_golden(path)
    for name, dataset in (("pascal_voc", "voc"), ("cityscapes", "cityscapes")):
        for number, expected in golden.part(f"bank/quota/{name}/").items():
            assert quota(int(number), 256, dataset) == expected


def test_bank_keeps_the_highest_or_lowest_and_forgets_the_oldest():
    torch.manual_seed(0)
    selectors = random_selectors(2, 4)
    features, labels = torch.randn(30, 4), torch.arange(30) % 2
    found = {}
    for rank in ("highest", "lowest"):
        bank = MemoryBank(2, 4, 7)
        bank.add(features, labels, selectors, 5, rank)
        found[rank] = bank.vectors
    for c in (0, 1):
        own = features[labels == c]
        score = selectors[c](own.double())[:, 0]
        order = score.argsort()
        assert torch.equal(found["lowest"][c], own[order[:5]])
        assert torch.equal(found["highest"][c], own[order.flip(0)[:5]])
    before = bank.vectors
    bank.add(features[:4] + 1, torch.tensor([0, 0, 0, 2]), selectors, 5)
    assert torch.equal(bank.vectors[0], torch.cat([features[:3] + 1, before[0][:4]]))
    assert torch.equal(bank.vectors[1], before[1])
    with pytest.raises(KeyError, match="best"):
        bank.add(features, labels, selectors, 5, "best")
    assert not any(rows.requires_grad for rows in bank.vectors)


def test_selectors_at_once_are_the_modules_one_by_one():
    torch.manual_seed(0)
    for count in (3, 50, 400):
        selectors, group = random_selectors(4, 6), torch.randint(5, (count,))
        rows = torch.randn(count, 6).double()
        scores = run_selectors(selectors, rows, group, None)
        for c, selector in enumerate(selectors):
            if (group == c).sum() > 1:
                torch.testing.assert_close(scores[group == c], selector(rows[group == c])[:, 0])


def two_processes(rank: int, port: int, folder: str) -> None:
    """Half of the rows of every class; what comes of them is written for the test."""
    import torch.distributed as dist

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save(rank_result(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def rank_result(rank: int, world_size: int):
    """Bank and gradients from this process's rows: 60 rows of 3 classes and ignored ones."""
    torch.manual_seed(1)
    heads = Heads(6, 3, bank_attention=True).double()
    label = torch.randint(4, (2, 5, 6))
    label[1, :4] = 2  # one class is nearly all in the second image
    label[label == 3] = 255
    features = torch.randn(2, 6, 5, 6).double()
    mine = slice(rank, rank + 1) if world_size > 1 else slice(2)
    bank = MemoryBank(3, 6, 12).double()
    contents = []
    for most, kind in ((40, "lowest"), (5, "highest"), (4, "lowest")):
        rows, labels = heads.project(features[mine] + most, label[mine])
        bank.add(rows, labels, heads.feature_selectors, most, kind)
        contents += [rows.clone() for rows in bank.vectors]
    loss = heads(features[mine], label[mine], bank)
    loss.backward()
    gradients = [p.grad for p in heads.parameters()]
    buffers = [b.clone() for b in heads.buffers()]
    return contents, loss.detach(), gradients, buffers


def test_two_processes_are_one(tmp_path):
    """The same bank on both as on one, and the mean of the gradients is that of one."""
    import multiprocessing
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=two_processes, args=(rank, port, str(tmp_path))) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    contents, loss, gradients, buffers = rank_result(0, 1)
    for ours, one, two in zip(contents, both[0][0], both[1][0], strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, ours)
    torch.testing.assert_close((both[0][1] + both[1][1]) / 2, loss)
    for ours, one, two in zip(gradients, both[0][2], both[1][2], strict=True):
        torch.testing.assert_close((one + two) / 2, ours)
    for ours, one, two in zip(buffers, both[0][3], both[1][3], strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, ours)


# --- schedules, class balance, views


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_schedules_are_the_authors(path):
    golden = load_golden(path)
    for i, t in enumerate(golden["sched/iters"].tolist()):
        assert cmb.poly_lr(2e-4, t, 150_000) == pytest.approx(golden["sched/lr_poly_2e-4"][i])
        assert ramp_up(t, 2000) == pytest.approx(golden["sched/ramp_2000"][i])
        decay = golden["sched/ema_keep_rate"][i]
        assert cosine_decay(t, 150_000, 0.995) == pytest.approx(decay, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_class_balance_is_the_authors(path):
    golden = load_golden(path)
    windows = int(golden["bal/labeled_iters"]), int(golden["bal/unlabeled_iters"])
    balance = ClassBalance(6, *windows)
    for t in range(9):
        label, pseudo_label = golden.tensor("bal/labels")[t], golden.tensor("bal/pseudo")[t]
        balance.update(t, label, pseudo_label)
        expected = golden.tensor("bal/weights_after_step")[t].float()
        torch.testing.assert_close(balance.weight(t), expected, **CLOSE)


def test_class_balance_by_hand():
    balance = ClassBalance(4, 1, 2)
    label = torch.tensor([[[0, 0, 0, 0, 0, 0, 1, 255]]])
    balance.update(0, label, label[..., -2:])
    assert torch.equal(balance.weight(0), torch.ones(4).double())  # not yet full
    balance.update(1, label, torch.full((1, 1, 2), 2))
    # Labels once: 6, 1; pseudo-labels: one of class 1, two of class 2: 6, 2, 2, 0. Median 2.
    assert balance.weight(1).tolist() == pytest.approx([(2 / 6) ** 0.5, 1, 1, 1])
    balance.update(2, label, torch.full((1, 1, 1), 2))
    # The first is forgotten: 6, 1, 3, 0. Median 2, and the unseen class has the greatest weight.
    expected = [(2 / 6) ** 0.5, 2**0.5, (2 / 3) ** 0.5, 2**0.5]
    assert balance.weight(2).tolist() == pytest.approx(expected)
    nothing = ClassBalance(4, 1, 1)
    nothing.update(0, label * 0, label * 0)
    assert nothing.weight(0).isfinite().all()


@pytest.mark.parametrize("path", WHOLE, **by_stem)
def test_classmix_is_the_authors(path, monkeypatch):
    golden = load_golden(path)
    image, label, prob = (golden.tensor(f"aug/{name}") for name in ("images", "labels", "probs"))
    chosen = torch.zeros(3, 7, dtype=torch.bool)
    for i in range(3):
        chosen[(i - 1) % 3, golden.tensor(f"aug/mix_classes_{i}")] = True  # of the next image
    with monkeypatch.context() as patch:
        patch.setattr(cmb, "classes_to_paste", lambda *_: chosen)
        # The last image's partner is the first one, or the one more that is given.
        more = [torch.cat([each, each[:1]]) for each in (image, label, prob)]
        mixed, same = (
            classmix(maps, "abcdef", 1.0, (3, 0, 3), torch.Generator())
            for maps in ([image, label, prob], more)
        )
    for ours, theirs in zip(mixed, same, strict=True):
        assert torch.equal(ours, theirs)
    for name, value in zip(("images", "labels", "probs"), mixed, strict=True):
        assert torch.equal(value, golden.tensor(f"aug/mix_{name}")), name
    for candidates, count in zip(
        golden["aug/classmix_ncand"], golden["aug/classmix_npick"], strict=True
    ):
        labels = torch.arange(candidates)[None, None]
        assert classes_to_paste(labels, torch.rand(1, 20), False).sum() == count


def test_classes_to_paste_by_hand():
    draw = torch.tensor([[0.1, 0.2, 0.3, 0.0]]).repeat(5, 1)
    label = torch.tensor([[0, 1, 2, 255], [0, 0, 255, 255], [255] * 4, [0, 2, 2, 2], [0, 0, 0, 0]])
    chosen = classes_to_paste(label[:, None], draw, background=True).long().tolist()
    assert chosen == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0]]
    chosen = classes_to_paste(label[:, None], draw, background=False).long().tolist()
    assert chosen[0] == [1, 1, 0, 0] and chosen[3] == [1, 0, 1, 0]
    label = torch.arange(2).repeat(2, 4, 2)  # 0 and 1 by turns, the other way in the partner
    label[1] = 1 - label[1]
    for name, pasted in (("background", False), ("_background_", False), ("road", True)):
        generators = [torch.Generator().manual_seed(seed) for seed in range(20)]
        mixed = [classmix([label, label], [name, "car"], 1.0, (2, 0, 2), g)[1] for g in generators]
        assert any(bool(((each == 0) & (label != 0)).any()) for each in mixed) is pasted


@pytest.mark.parametrize("path", WHOLE, **by_stem)
def test_scales_are_the_authors(path):
    golden = load_golden(path)
    views = [golden.tensor(f"aug/{name}") for name in ("images", "labels", "probs")]
    for kind in ("down", "up"):
        scale, corner = float(golden[f"aug/{kind}_scale"]), (0.0, 0.0)
        if kind == "up":
            x, y = golden["aug/up_offset_lastdim_then_rowdim"]
            places = math.floor(scale * 12) - 12 + 1
            corner = ((y + 0.5) / places, (x + 0.5) / places)
        scaled = rescale(*views, scale, corner)
        for name, value in zip(("images", "labels", "probs"), scaled, strict=True):
            expected = golden.tensor(f"aug/{kind}_{name}")
            torch.testing.assert_close(value, expected, rtol=2e-5, atol=2e-4)  # of 255


@pytest.mark.parametrize("path", WHOLE, **by_stem)
def test_horizontal_blur_is_the_authors(path):
    golden = load_golden(path)
    image = torch.zeros(1, 3, 31, 31)
    image[..., 15, 15] = 255
    expected = golden.tensor("aug/blur_impulse_response").float()
    found = cmb.blurred(image, (0.1, 1.5))[0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert cmb.blurred(image, (1.5, 1.5))[0, 0, 14, 15] > 1


def test_strong_view_keeps_images_labels_and_confidences_together(monkeypatch):
    """A label painted into the image is found under it afterwards; all processes see one view."""
    label = torch.randint(5, (4, 1, 1)).repeat(1, 40, 40)
    label[:, :20, :13] = 5
    confidence = 0.1 + 0.1 * label.float()
    image = label[:, None].repeat(1, 3, 1, 1).float()
    monkeypatch.setattr(cmb, "color_jitter", lambda image, *_: image)
    changes = 0
    for seed in range(12):
        draw = [torch.Generator().manual_seed(seed) for _ in range(3)]
        views = strong_augmentation(image * 0.1, label, confidence, "isotropic", (4, 0, 4), draw[0])
        inside = views[1] != 255
        found = (views[2][inside] - 0.1) * 10
        assert ((found - views[1][inside]).abs() < 0.6).float().mean() > 0.95
        assert not views[2][~inside].any()
        changes += not torch.equal(views[1], label)
        for first, generator in zip((0, 2), draw[1:], strict=True):
            part = slice(first, first + 2)
            maps = image[part] * 0.1, label[part], confidence[part]
            half = strong_augmentation(*maps, "isotropic", (4, first, 2), generator)
            for whole, own in zip(views, half, strict=True):
                torch.testing.assert_close(whole[part], own)
    assert changes >= 10


# --- runs


@pytest.mark.parametrize("flags", [
    {}, {"bank_attention": "off", "bank_rank": "lowest", "blur": "horizontal"},
    {"class_balance": True, "evaluate": "teacher", "classmix": (1.0, 1.0)},
], ids=str)  # fmt: skip
def test_it_trains(quick, flags):
    args = quick(Args, steps=40, log_every=1, lr=3e-3, bank_threshold=0.3, ramp_up=0.25)
    args = cmb.replace(args, log_pseudo_accuracy=True, **flags)
    result = main(args)
    rows = read_log(result["run_dir"])
    assert result["steps"] == 40 and 0 <= result["miou"] <= result["best_miou"] <= 1
    loss = [row["loss/sup"] for row in rows]
    assert sum(loss[-10:]) < 0.9 * sum(loss[:10])
    assert all(row["pseudo/bank"] == 0 for row in rows[:5]) and rows[-1]["pseudo/bank"] > 0
    assert all(row["loss/contrastive_l"] == 0 for row in rows[:5])
    assert 0 < rows[-1]["loss/contrastive_l"] < 2 and 0 < rows[-1]["loss/contrastive_u"] < 2
    assert 0 < rows[-1]["pseudo/accuracy"] <= 1
    saved = torch.load(f"{result['run_dir']}/last.pt", weights_only=True)
    attention = flags.get("bank_attention", "on") == "on"
    assert any(key.startswith("bank_selectors") for key in saved["student_heads"]) == attention


FEW = {"steps": 4, "ramp_up": 0.0, "bank_threshold": 0.15, "bank_size": 8}


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Tensors after a few steps in which all terms act."""
    args = Args(
        dataset="shapes", backbone="resnet14", device="cpu", num_workers=0, batch_size=4,
        crop_size=32, split="8", output_dir=str(tmp_path_factory.mktemp("runs")), **FEW,
    )  # fmt: skip
    return weights(main(args)["run_dir"])


@pytest.mark.parametrize(("flags", "part"), [
    ({"lambda_u": 0.0}, "student"), ({"lambda_entropy": 0.0}, "student"),
    ({"lambda_contrastive": 0.0}, "student"), ({"confidence_power": 1.0}, "student"),
    ({"bank_size": 16}, "bank"), ({"bank_threshold": 0.3}, "bank"),
    ({"bank_rank": "lowest"}, "bank"), ({"bank_attention": "off"}, "student"),
    ({"classmix": (1.0, 0.75)}, "student"), ({"classmix": (0.2, 0.0)}, "student"),
    ({"blur": "horizontal"}, "student"), ({"class_balance": True}, "student"),
    ({"class_balance": True, "supervised_loss": "ohem"}, "student"),
    ({"ema_decay": 0.5}, "teacher"), ({"ramp_up": 0.5}, "student"),
], ids=str)  # fmt: skip
def test_every_flag_has_an_effect(quick, flags, part, monkeypatch, usual):
    if "class_balance" in flags:  # its windows are full at once
        monkeypatch.setattr(cmb, "ClassBalance", lambda classes, *_: ClassBalance(classes, 1, 1))
    after = weights(main(quick(Args, **FEW | flags))["run_dir"])
    names = [name for name in usual if name.startswith(f"/{part}/")]
    assert any(not torch.equal(usual[name], after[name]) for name in names)


def test_unlabeled_labels_are_never_read(quick, monkeypatch):
    assert_unlabeled_labels_are_not_read(cmb, quick, monkeypatch)


def test_padding_of_unlabeled_images_takes_no_part(quick, monkeypatch):
    """It alone has no pseudo-label; where all is padding the three losses are 0."""
    make_batches, padding, strong = cmb.make_batches, None, cmb.strong_augmentation

    def padded(args, data, ids, stream, *rest):
        for image, label in make_batches(args, data, ids, stream, *rest):
            yield image, label.where(~padding, 255) if stream == "unlabeled" else label

    def look(image, label, *rest):
        assert torch.equal(label == 255, padding.expand_as(label))
        return strong(image, label, *rest)

    monkeypatch.setattr(cmb, "make_batches", padded)
    monkeypatch.setattr(cmb, "strong_augmentation", look)
    flags = FEW | {"classmix": (0.0, 0.0), "log_every": 1}
    for share, name in ((32, "all"), (11, "some")):
        padding = (torch.arange(32) < share).expand(32, 32)
        rows = read_log(main(quick(Args, exp_name=name, **flags))["run_dir"])
        for key in ("loss/pseudo", "loss/entropy", "loss/contrastive_u"):
            assert all((row[key] == 0) == (name == "all") for row in rows), key
        assert all(row["loss/contrastive_l"] > 0 for row in rows)


def test_bf16_keeps_every_gradient(quick, monkeypatch):
    """The teacher's passes must not leave autocast's weights without gradient for the next."""
    names, make_optimizer = {}, cmb.make_optimizer

    def look(networks, *rest):
        optimizer = make_optimizer(networks, *rest)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for network in networks:
            for name, parameter in network.named_parameters():
                names[name] = [p is parameter for p in parameters].index(True)
        return optimizer

    monkeypatch.setattr(cmb, "make_optimizer", look)
    result = main(quick(Args, amp="bf16", lr=1e-2, eval_every=1, **FEW))
    checkpoint = torch.load(f"{result['run_dir']}/last.pt", weights_only=True)
    assert checkpoint["bank"]["store"].dtype == torch.float32
    filled = checkpoint["bank"]["filled"].tolist()
    state = checkpoint["optimizer"]["state"]
    assert len(names) == len(state)
    for name, number in names.items():
        unseen = "selectors." in name and filled[int(name.split(".")[1])] < 2
        if not unseen:
            assert state[number]["exp_avg"].abs().max() > 0, f"{name} got no gradient"


def test_gradient_is_zero_where_it_must_be(quick, monkeypatch):
    """Teacher and bank are constants, and before its start the contrastive loss moves nothing."""
    seen = []
    step = cmb.update_teacher

    def look(teacher, student, decay):
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        seen.append([p.detach().clone() for p in student.heads.parameters()])
        step(teacher, student, decay)

    monkeypatch.setattr(cmb, "update_teacher", look)
    flags = {"bank_threshold": 0.1, "weight_decay": 0.0, "optimizer": "sgd", "lr": 0.1}
    main(quick(Args, steps=6, ramp_up=0.5, **flags))  # starts at step 3, the bank at step 2
    for before, after in ((0, 1), (1, 2)):
        assert all(torch.equal(a, b) for a, b in zip(seen[before], seen[after], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[2], seen[4], strict=True))


def test_bank_holds_right_and_sure_features_of_labeled_pixels():
    bank, heads = MemoryBank(3, 4, 50), Heads(4, 3, False)
    logits = torch.zeros(1, 3, 2, 3)
    logits[0, 1] = 4.0  # class 1, p = 0.96
    logits[0, 1, 1, 2] = 2.0  # unsure
    label = torch.tensor([[[1, 0, 255], [1, 1, 1]]])
    features = torch.randn(1, 4, 2, 3)
    cmb.fill_bank(bank, heads, logits, features, label, 0.95, 20, "highest")
    assert bank.filled.tolist() == [0, 3, 0]
    rows = features[0].permute(1, 2, 0).reshape(6, 4)
    projected = projection_head(4, 4)
    projected.load_state_dict(heads.projection.state_dict())
    torch.testing.assert_close(bank.vectors[1], projected(rows[[0, 3, 4]]).detach())


@pytest.mark.parametrize("flags", [
    {"bank_threshold": 1.5}, {"bank_size": 1}, {"classmix": (0.5, 1.5)}, {"ema_decay": 1.5},
    {"ramp_up": 1.5}, {"lambda_u": -1.0}, {"lambda_entropy": float("nan")},
    {"lambda_contrastive": -1.0}, {"confidence_power": -1.0}, {"batch_size": 2},
], ids=str)  # fmt: skip
def test_bad_flags(quick, flags):
    with pytest.raises(cmb.UserError, match=next(iter(flags)).replace("_", "-")):
        main(quick(Args, **flags))


def test_unlabeled_batch_is_half_of_the_labeled_one(quick, monkeypatch):
    with pytest.raises(cmb.UserError, match="--batch-size 6: half as many.*multiple of 4"):
        main(quick(Args, batch_size=6, accumulate=2))
    sizes = []
    strong = cmb.strong_augmentation

    def look(image, *rest):
        sizes.append(len(image))
        return strong(image, *rest)

    monkeypatch.setattr(cmb, "strong_augmentation", look)
    main(quick(Args, batch_size=7, steps=1))
    assert sizes == [3, 3]


def test_accumulate_takes_the_mean_gradient(quick, monkeypatch):
    freeze_batchnorm(monkeypatch, cmb)
    flags = {"steps": 1, "optimizer": "sgd", "lr": 1.0, "momentum": 0.0} | active(cmb)
    one, two = (
        weights(main(quick(Args, accumulate=n, exp_name=f"n{n}", **flags))["run_dir"])
        for n in (1, 2)
    )
    for key in one:
        if key.startswith("/student/"):
            torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)


def test_paper_rows():
    for dataset, batch, crop, lr in (("voc", 20, 321, 2e-4), ("cityscapes", 7, 512, 4e-4)):
        args = cmb.resolve(Args(dataset=dataset))
        assert (args.batch_size, args.crop_size, args.lr) == (batch, crop, lr)
        assert args.steps == 150_000 and args.weight_decay == 5e-4 and args.head_lr_mult == 1
        assert args.ramp_up * args.steps == pytest.approx(2000) and args.ema_decay == 0.995
        assert args.class_balance == (dataset == "cityscapes")
    assert PAPER["folder"]["batch_size"] == 20
    assert (Args.lambda_u, Args.lambda_entropy, Args.lambda_contrastive) == (1, 0.01, 0.1)
    assert (Args.bank_size, Args.bank_threshold, Args.confidence_power) == (256, 0.95, 6)
    assert (Args.bank_rank, Args.bank_attention) == ("highest", "on")


def test_no_golden_is_missing():
    """A clone has a small part of the numbers; where all are at hand, all are compared."""
    assert GOLDENS
    assert not SHARED.exists() or len(GOLDENS) >= 2
