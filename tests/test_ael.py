"""ael.py: losses, bank, choices and boxes against the authors' numbers, whole steps, runs."""

import json
import math

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
from torch import nn

import ael
from ael import (
    AHEAD,
    PAPER,
    Args,
    Bank,
    box_masks,
    confidence_sums,
    consistency_loss,
    copy_paste,
    cutmix_probability,
    draw_classes,
    draw_images,
    ema_decay,
    main,
    ohem_cross_entropy,
    paste,
    paste_probability,
    poly_lr,
    presence,
    pseudo_labels,
    region_masks,
    region_names,
    sampling_rate,
    sums_over_pairs,
    update_confidence,
    update_teacher,
)
from common.datasets import IGNORE, UNKNOWN, global_batch

GOLDENS = golden_files("ael_seed*.npz")
WHOLE = [path for path in GOLDENS if "sup_logits_main" in load_golden(path)]
by_stem = {"ids": lambda path: f"{path.parent.name}-{path.stem}"}


# Group A of the goldens: supervised loss
@pytest.mark.parametrize("path", WHOLE, **by_stem)
@pytest.mark.parametrize("case", ["a_default", "b_thresh", "c_kth", "d_minkept0", "e_equal"])
def test_hard_pixels_are_the_authors(path, case):
    golden = load_golden(path)
    threshold, min_kept, aux_weight = golden[f"sup_{case}_cfg"].tolist()
    label, total = golden.tensor("sup_label"), 0
    grads = {}
    for head, weight in (("main", 1.0), ("aux", aux_weight)):
        logits = golden.tensor(f"sup_logits_{head}").requires_grad_()
        loss = ohem_cross_entropy(logits, label, threshold, int(min_kept))
        expected = float(golden[f"sup_{case}_loss_{head}"])
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        (grads[head],) = torch.autograd.grad(weight * loss, logits)
        kept = golden.tensor(f"sup_{case}_kept_{head}").bool()
        assert torch.equal(grads[head].abs().sum(1) > 0, kept)
        total = total + weight * loss
    assert total.item() == pytest.approx(float(golden[f"sup_{case}_loss_total"]), rel=1e-5)
    if case == "b_thresh":
        for head, grad in grads.items():
            expected = golden.tensor(f"sup_{case}_grad_{head}")
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-9)


def test_hard_pixels_by_hand():
    # True classes with probabilities 1/2, 3/4, 9/10; the fourth pixel is ignored.
    odds = torch.tensor([1.0, 3.0, 9.0, 1.0]).log()
    logits = torch.stack([odds, torch.zeros(4)])[None, :, None].double().requires_grad_()
    label = torch.tensor([[[0, 0, 0, IGNORE]]])
    assert ohem_cross_entropy(logits, label, 0.7, 1).item() == pytest.approx(math.log(2))
    two = ohem_cross_entropy(logits, label, 0.7, 2)
    assert two.item() == pytest.approx((math.log(2) - math.log(0.75)) / 2)
    mean = -(math.log(0.5) + math.log(0.75) + math.log(0.9)) / 3
    assert ohem_cross_entropy(logits, label).item() == pytest.approx(mean)  # below 100,000
    nothing = ohem_cross_entropy(logits, torch.full_like(label, IGNORE), 0.7, 1)
    nothing.backward()
    assert nothing.item() == 0 and not logits.grad.any()


# Group B of the goldens: confidence bank
@pytest.mark.parametrize("path", WHOLE, **by_stem)
@pytest.mark.parametrize("momentum", [0.9, 0.999])
def test_the_bank_is_the_authors(path, momentum):
    golden = load_golden(path)
    bank = golden.tensor("bank_init_3xC")[0]
    for t in range(6):
        label = golden.tensor("bank_labels")[t]
        sums, counts = confidence_sums(golden.tensor("bank_logits")[t], label)
        assert counts.tolist() == label[label < 21].bincount(minlength=21).tolist()
        mean = sums / counts.clamp(min=1)
        expected = golden.tensor("bank_step_conf")[t]
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-8)
        kept = update_confidence(bank, sums, counts, momentum, "keep")
        assert torch.equal(kept[counts == 0], bank[counts == 0])
        bank = update_confidence(bank, sums, counts, momentum)
        torch.testing.assert_close(kept[counts > 0], bank[counts > 0])
        expected = golden.tensor(f"bank_m{momentum}_trace")[t]
        torch.testing.assert_close(bank, expected, rtol=1e-5, atol=1e-8)


def test_bank_by_hand():
    logits = torch.tensor([[0.0, math.log(3), 0.0], [0.0, 0.0, 0.0]]).view(1, 2, 1, 3)
    sums, counts = confidence_sums(logits.requires_grad_(), torch.tensor([[[0, 0, IGNORE]]]))
    assert sums.tolist() == pytest.approx([1.25, 0]) and counts.tolist() == [2, 0]
    assert not sums.requires_grad
    bank = torch.tensor([0.5, 0.5])
    assert update_confidence(bank, sums, counts, 0.9).tolist() == pytest.approx([0.5125, 0.45])
    kept = update_confidence(bank, sums, counts, 0.9, "keep")
    assert kept.tolist() == pytest.approx([0.5125, 0.5])
    with_both = torch.full((1, 2), 0.5), torch.full((1, 2), 2)
    alone = torch.tensor([[0.75, 0.0]]), torch.tensor([[1, 0]])
    nothing = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.long)
    images = [torch.cat(x) for x in zip(with_both, with_both, alone, alone, nothing, strict=True)]
    # Pairs of (0.25, 0.25) and (0.75, none); one without any label does not count.
    for absent, number in (("zero", [2, 2]), ("keep", [2, 1])):
        pairs = sums_over_pairs(*images, absent)
        assert pairs[0].tolist() == [1.0, 0.25] and pairs[1].tolist() == number
    assert sampling_rate(torch.tensor([0.5, 0.0, 1.0])).tolist() == pytest.approx([0.5, 1, 0])
    assert sampling_rate(torch.tensor([0.5, 0.0]), 2.0).tolist() == pytest.approx([0.25, 1])
    assert sampling_rate(torch.ones(3)).tolist() == [0, 0, 0]
    odds = paste_probability(torch.tensor([0.0, 0.75, 1.0]), [0, 2])
    assert odds.tolist() == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e)])
    odds = cutmix_probability(torch.tensor([0.25, 0.75]))
    assert (odds[0] / odds[1]).item() == pytest.approx(math.exp(0.5))


# Group C of the goldens: the consistency loss.
@pytest.mark.parametrize("path", WHOLE, **by_stem)
@pytest.mark.parametrize(
    "case", ["sup_thr0", "sup_thr07", "uns_thr07", "nosample", "gamma0_beta05", "gamma1_beta2"]
)
def test_consistency_is_the_authors(path, case):
    golden = load_golden(path)
    gamma, sampling, beta, threshold, n = golden[f"cons_{case}_cfg"].tolist()
    n = int(n)
    logits = golden.tensor("sup_logits_main")[:n].requires_grad_()
    confidence, label = pseudo_labels(golden.tensor("cons_teacher_logits")[:n], threshold)
    assert torch.equal(label, golden.tensor(f"cons_{case}_pseudo"))
    expected = golden.tensor(f"cons_{case}_conf")
    torch.testing.assert_close(confidence, expected, rtol=1e-5, atol=1e-8)
    rate = sampling_rate(golden.tensor("cons_bank"), beta)
    uniform = golden.tensor("cons_rand_maps").gather(0, logits.detach().argmax(1))
    if sampling:
        torch.testing.assert_close(rate, golden.tensor(f"cons_{case}_rate"), rtol=1e-5, atol=1e-8)
        sampled = uniform > 1 - rate[logits.argmax(1)]
        assert torch.equal(sampled, golden.tensor(f"cons_{case}_samplemap").bool())
    else:
        rate, uniform = torch.ones_like(rate), torch.ones_like(uniform)
    loss = consistency_loss(logits, label, confidence, rate, uniform, gamma)
    assert loss.item() == pytest.approx(float(golden[f"cons_{case}_loss"]), rel=1e-5)
    if f"cons_{case}_grad" in golden:
        loss.backward()
        expected = golden.tensor(f"cons_{case}_grad")
        torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-9)


def test_consistency_by_hand():
    # Three pixels of class 0 by the student (p = 3/4), labels 0, 1 and none; the last is not drawn.
    logits = torch.tensor([[math.log(3)] * 4, [0.0] * 4]).view(1, 2, 1, 4).requires_grad_()
    label = torch.tensor([[[0, 1, IGNORE, 0]]])
    confidence = torch.tensor([[[1.0, 0.5, 0.5, 1.0]]], requires_grad=True)
    rate = torch.tensor([0.5, 1.0], requires_grad=True)
    uniform = torch.tensor([[[0.6, 0.9, 0.6, 0.5]]])  # sampled above 1/2, strictly
    loss = consistency_loss(logits, label, confidence, rate, uniform)
    weighted = -math.log(0.75) - 0.25 * math.log(0.25)
    assert loss.item() == pytest.approx(weighted / 1.5)  # the ignored pixel is in the mean
    loss.backward()
    assert confidence.grad is None and rate.grad is None
    assert logits.grad[0, 0, 0].tolist() == pytest.approx([-0.25 / 1.5, 0.75 / 6, 0, 0])
    for nothing in ((label, torch.zeros(2)), (torch.full_like(label, IGNORE), rate)):
        logits.grad = None
        loss = consistency_loss(logits, nothing[0], confidence, nothing[1], uniform)
        loss.backward()
        assert loss.item() == 0 and not logits.grad.any()
    double = consistency_loss(logits.double(), label, confidence.double(), rate, uniform)
    half = consistency_loss(logits.bfloat16(), label, confidence, rate, uniform)
    assert double.dtype == torch.float64 and half.dtype == torch.float32


# Group D of the goldens: which classes and images
@pytest.mark.parametrize("path", GOLDENS, **by_stem)
@pytest.mark.parametrize("tag", ["voc21", "city19"])
def test_choices_are_the_authors(path, tag):
    golden = load_golden(path).part(f"prob_{tag}_")
    classes = golden["target_classes"]
    odds = paste_probability(golden["bank"], classes.tolist())
    torch.testing.assert_close(odds, golden["paste_p"], rtol=1e-5, atol=1e-8)
    drawn = draw_classes(odds, golden["paste_u"])
    assert torch.equal(classes[drawn], golden["paste_drawn"])
    for row, expected in zip(drawn, golden["paste_unique"], strict=True):
        assert classes[row.unique()].tolist() == expected[expected >= 0].tolist()
    odds = cutmix_probability(golden["bank"])
    torch.testing.assert_close(odds, golden["cutmix_p"], rtol=1e-5, atol=1e-8)
    drawn = draw_classes(odds, golden["cutmix_u"])
    assert torch.equal(drawn, golden["cutmix_class"])
    contains = golden["cutmix_bank"].T.bool()
    images = draw_images(contains, drawn, torch.rand(30, dtype=torch.float64))
    for chosen in (images, golden["cutmix_image"]):
        assert (contains[chosen, drawn] | ~contains[:, drawn].any(0)).all()


def test_images_are_drawn_uniformly():
    contains = torch.tensor([[True, False], [False, False], [True, False]])
    draw = torch.tensor([0.0, 0.49, 0.5, 0.999, 0.0, 0.34, 0.67, 1 - 1e-12], dtype=torch.float64)
    classes = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert draw_images(contains, classes, draw).tolist() == [0, 0, 2, 2, 0, 1, 2, 2]


# Group E of the goldens: schedules of both networks.
@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_schedules_are_the_authors(path):
    golden = load_golden(path)
    decays = [ema_decay(int(step), 0.99) for step in golden["ema_iters"]]
    assert decays == pytest.approx(golden["ema_decay_0.99"].tolist(), rel=1e-12)
    epochs, iterations, power = golden["lr_cfg_epochs_iters_power"].tolist()
    for step, rates in enumerate(golden["lr_used"]):
        rate = poly_lr(0.01, step, int(epochs * iterations), power)
        assert rates.tolist() == pytest.approx([rate, 10 * rate, 10 * rate], rel=1e-9)
    student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)).double() for _ in range(2))
    teacher.load_state_dict({"0.weight": golden.tensor("ema_teacher_w0")})
    for step in range(4):
        student.load_state_dict({"0.weight": golden.tensor("ema_student_w")[step]})
        update_teacher(teacher, student, ema_decay(step, 0.99))
        expected = golden.tensor("ema_teacher_w")[step]
        torch.testing.assert_close(teacher[0].weight.data, expected, rtol=1e-5, atol=1e-8)


# Group F of the goldens: pasted objects
@pytest.mark.parametrize("path", WHOLE, **by_stem)
@pytest.mark.parametrize("query", ["q1", "q3", "qall", "qabsent", "qempty", "qwith0"])
def test_copy_paste_is_the_authors(path, query):
    golden = load_golden(path)
    images, labels = golden.tensor("cp_images6"), golden.tensor("cp_labels2h")
    image, label = copy_paste(
        images[:, :3], labels[:, :33], images[:, 3:], labels[:, 33:],
        golden[f"cp_{query}_classes"].tolist(),
    )  # fmt: skip
    assert torch.equal(image, golden.tensor(f"cp_{query}_images"))
    assert torch.equal(label, golden.tensor(f"cp_{query}_labels"))


def test_copy_paste_by_hand():
    image, label = torch.zeros(2, 3, 1, 3), torch.tensor([[[0, IGNORE, 2]]] * 2)
    others = torch.tensor([[[1, 2, IGNORE]], [[0, 0, 0]]])
    pasted, labels = copy_paste(image, label, torch.ones(2, 3, 1, 3), others, [2, 0])
    assert labels.tolist() == [[[0, 2, 2]], [[0, IGNORE, 2]]]
    assert pasted[:, 0].tolist() == [[[0, 1, 0]], [[0, 0, 0]]]
    each = torch.tensor([[False, True, False], [False, False, True]])
    _, labels = copy_paste(image, label, torch.ones(2, 3, 1, 3), others[:1].expand(2, 1, 3), each)
    assert labels.tolist() == [[[1, IGNORE, 2]], [[0, 2, 2]]]


def rectangle(box, height=40, width=40) -> torch.Tensor:
    """The mask (1, 1, H, W) of top, left, bottom, right."""
    top, left, bottom, right = (int(side) for side in box)
    mask = torch.zeros(1, 1, height, width)
    mask[..., top:bottom, left:right] = 1
    return mask


# Group G of the goldens: CutMix by regions
@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_boxes_are_the_authors(path):
    golden = load_golden(path)
    label, share = golden.tensor("cm_pred")[1:], float(golden["cm_thr"])
    fallback = rectangle((1, 2, 3, 4))
    rows = golden["cm_components"].astype(int)
    for number in set(rows[:, 0].tolist()) | {20}:
        classes = torch.tensor([number])
        large = [row[1:5].tolist() for row in rows if row[0] == number and row[5] > share * 1600]
        masks = [
            region_masks(label, classes, torch.tensor([draw]), share, fallback)
            for draw in torch.linspace(0, 0.999, 60).tolist()
        ]
        expected = torch.cat([rectangle(box) for box in large or [(1, 2, 3, 4)]])
        assert torch.equal(torch.cat(masks).unique(dim=0), expected.unique(dim=0))
    for case in golden["cm_box_cases"]:
        if not case[1]:
            number, box = int(case[0]), tuple(case[2:6].astype(int).tolist())
            assert box in {tuple(row[1:5].tolist()) for row in rows if row[0] == number}
    full = region_masks(torch.full_like(label, 3), torch.tensor([3]), torch.zeros(1), 0, fallback)
    assert golden["cm_fullcover_uses_fallback"] == 1 and torch.equal(full, fallback)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_fallback_boxes_are_the_authors(path, monkeypatch):
    golden = load_golden(path)
    cases = [row.tolist() for row in golden["cm_fallback_size_and_u"]]
    cases += [[40.0, *row[7:11]] for row in golden["cm_box_cases"] if row[1]]
    expected = [row.tolist() for row in golden["cm_fallback_rect"]]
    expected += [row[2:6].tolist() for row in golden["cm_box_cases"] if row[1]]
    for (size, *draws), box in zip(cases, expected, strict=True):
        parts = [
            torch.tensor(part, dtype=torch.float64) for part in (draws[:1], draws[1:2], draws[2:])
        ]
        drawn = iter(parts)
        monkeypatch.setattr(torch, "rand", lambda *shape, d=drawn, **_: next(d).view(shape))
        ours = box_masks(1, int(size), int(size), torch.Generator())
        monkeypatch.undo()
        assert torch.equal(ours, rectangle(box, int(size), int(size)))


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_presence_is_the_authors(path):
    golden = load_golden(path)
    label = golden.tensor("cm_pred")
    for share, images in ((0.005, [2, 6]), (0.03, [2, 6]), (0.03, [4, 4])):
        contains = golden.tensor("cmb_bank_before").T.bool()
        contains.numpy()[images] = presence(label, 21, share).numpy()
        expected = golden.tensor(f"cmb_after_thr{share}_i{images[0]}_j{images[1]}")
        assert torch.equal(contains.T, expected.bool())


@pytest.mark.parametrize("path", WHOLE, **by_stem)
def test_mixing_is_the_authors(path):
    """Labels and confidences mixed are those of the mixed logits."""
    golden = load_golden(path)
    mask = golden.tensor("cm_mask")[None, None].double()
    mixed = paste(*golden.tensor("cm_images")[:, None], mask)
    assert torch.equal(mixed[0], golden.tensor("cm_mixed_image"))
    confidence, label = pseudo_labels(golden.tensor("cm_teacher_logits"))
    confidence, label = (paste(*both[:, None], mask) for both in (confidence, label))
    torch.testing.assert_close(confidence, golden.tensor("cm_conf"), rtol=1e-5, atol=1e-8)
    for threshold in (0.0, 0.3, 0.7):
        kept = label.where(confidence >= threshold, IGNORE)
        assert torch.equal(kept, golden.tensor(f"cm_pseudo_thr{threshold}"))


def test_regions_are_scipys():
    from scipy import ndimage

    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(3, 40, 47, generator=generator) < p for p in (0.3, 0.41, 0.6)]
    spiral = torch.zeros(1, 40, 47, dtype=torch.bool)
    for ring in range(0, 18, 2):
        spiral[0, ring : 40 - ring, ring : 47 - ring] = True
        spiral[0, ring + 1 : 39 - ring, ring + 1 : 46 - ring] = False
        spiral[0, ring + 1, ring + 1 : ring + 2] = True
    for mask in (*masks, spiral):
        for inside, names in zip(mask, region_names(mask), strict=True):
            theirs, count = ndimage.label(inside, np.ones((3, 3)))
            names = names.view_as(inside)[inside]
            pairs = set(zip(names.tolist(), theirs[inside.numpy()].tolist(), strict=True))
            assert len(pairs) == len(names.unique()) == count


# Group K of the goldens: whole steps
class TwoHeads(nn.Module):
    """The network of the step goldens; it remembers what its auxiliary head gave."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.main, self.aux = nn.Conv2d(6, 21, 1), nn.Conv2d(6, 21, 1)
        self.double().train()
        self.load_state_dict(state)
        self.aux_logits = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self.bn(self.conv(image)).relu()
        self.aux_logits.append(self.aux(features))
        return self.main(features)


@pytest.mark.parametrize("path", GOLDENS, **by_stem)
def test_main_takes_the_authors_steps(path, quick, monkeypatch):
    """`main` itself, four steps: losses, bank, membership, rates, both networks."""
    from common.datasets import Shapes

    golden = load_golden(path)
    config = json.loads(str(golden["step_cfg_json"]))
    images = golden.tensor("step_unsup_imgs")
    first = golden["step_pick_u"] > 0.5
    ids = np.where(first, *golden["step_unsup_batch_ids"].T).tolist()
    sources = golden["step_bank_image"].tolist()

    def net(name):
        prefix = f"step_{name}_"
        state = {k: v[0] for k, v in golden.part(prefix).items()}
        return TwoHeads({k.replace("_", ".", 1): v for k, v in state.items()})

    student, teacher = net("student"), net("teacher").requires_grad_(False)
    unknown = torch.full((1, 24, 24), UNKNOWN)
    streams = {"labeled": [], "unlabeled": [(images[[i]], unknown) for i in ids]}
    chosen = {"pasted": [], "source": [(images[[i]], unknown) for i in sources]}
    for t in range(4):
        image = golden.tensor("step_sup_img6")[t % 3]
        label = golden.tensor("step_sup_lab2h")[t % 3]
        streams["labeled"].append((image[:, :3], label[:, :24]))
        chosen["pasted"].append((image[:, 3:], label[:, 24:]))
    monkeypatch.setattr(
        ael, "make_chosen_batches", lambda args, data, ids, stream, *_: iter(chosen[stream])
    )

    # Two slots for the unlabeled image and two for its source, of which theirs fill one each.
    monkeypatch.setattr(ael, "global_batch", lambda *_: [(ids[_[-1]], 0), (900, 0)])
    contains, labels, losses, counted = [], [], [], []

    class Preset(Bank):
        def __init__(self, *args):
            super().__init__(*args)
            self.confidence = golden.tensor("step_bank0")[0]
            self.pasted_classes[:] = False
            for t, query in enumerate(golden["step_query"]):
                self.pasted_classes[t][:, query[query >= 0]] = True
                self.source_class[t] = int(golden["step_bank_class"][t])
                self.source_image[t] = torch.tensor([sources[t], 901])

        def update(self, *args):
            super().update(*args)
            after = self.contains.clone()
            after.numpy()[self.last_images.numpy()] = self.last_seen.numpy()
            contains.append(after[:5].T)

    def consistency(logits, label, confidence, rate, _, gamma, world_size):
        maps = golden.tensor("step_rand_maps")[len(losses) // 2, int(len(logits) == 1)]
        uniform = maps.gather(0, logits.detach().argmax(1))
        losses.append(consistency_loss(logits, label, confidence, rate, uniform, gamma))
        return losses[-1]

    def supervised(logits, label, kind):
        labels.append(label)
        loss = [
            ohem_cross_entropy(x, label, config["ohem_thresh"], config["ohem_min_kept"])
            for x in (logits, student.aux_logits[-2])
        ]
        return loss[0] + config["aux_weight"] * loss[1]

    def sgd(networks, args, device):  # theirs decays every parameter
        parts = [(1.0, [student.conv, student.bn]), (10.0, [student.main, student.aux])]
        groups = [
            {"params": [p for m in modules for p in m.parameters()], "lr_mult": mult}
            for mult, modules in parts
        ]
        wd, momentum = config["weight_decay"], config["momentum"]
        return torch.optim.SGD(groups, config["lr_backbone"], momentum, weight_decay=wd)

    # Theirs mixes one image for two labeled ones: the pair's sums and classes in that one's place.
    monkeypatch.setattr(ael, "confidence_sums", lambda *pair: [
        of_pair[None] for of_pair in confidence_sums(*pair[:2])
    ])  # fmt: skip
    monkeypatch.setattr(ael, "copy_paste", lambda *images: copy_paste(
        *images[:4], images[4].expand(2, -1)
    ))  # fmt: skip

    def remember_presence(label, num_classes, share):
        counted.append(share)
        return presence(label, num_classes, share)

    masks = list(golden.tensor("step_box_mask")[:, None, None].double())
    monkeypatch.setattr(ael, "Bank", Preset)
    monkeypatch.setattr(ael, "consistency_loss", consistency)
    monkeypatch.setattr(ael, "supervised_loss", supervised)
    monkeypatch.setattr(ael, "make_optimizer", sgd)
    monkeypatch.setattr(ael, "presence", remember_presence)
    monkeypatch.setattr(ael, "region_masks", lambda *_: masks.pop(0))
    monkeypatch.setattr(Shapes, "classes", tuple(f"class {i}" for i in range(21)))
    args = quick(
        Args, batch_size=2, steps=config["epochs"] * config["iters_per_epoch"], log_every=1,
        lr=config["lr_backbone"], lambda_u=float(config["unsup_weight"]), ramp_up=0.0,
        gamma=float(config["gamma"]), confidence_threshold=config["pseudo_threshold"],
        min_presence=config["cutmix_bank_area_thresh"], min_region=config["box_area_thresh"],
        bank_momentum=config["bank_momentum"], ema_decay=config["ema_decay"], eval_every=10**6,
    )  # fmt: skip
    states, rows = record_steps(ael, args, monkeypatch, student, teacher, streams)
    assert len(states) == 4 and set(counted) == {0.01}
    for t in range(4):
        assert torch.equal(labels[t], golden.tensor("step_sup_label_after_paste")[t])
        assert rows[t]["lr"] == pytest.approx(golden["step_lr"][t, 0], rel=1e-9)
        assert rows[t]["loss/sup"] == pytest.approx(float(golden["step_loss_sup"][t]), rel=1e-5)
        for number, which in ((0, 1), (1, 0)):  # ours begins with the mixed image
            expected = float(golden["step_loss_cons"][t, which])
            assert losses[2 * t + number].item() == pytest.approx(expected, rel=1e-5)
        bank = [value for key, value in rows[t].items() if key.startswith("pseudo/bank/")]
        assert bank == pytest.approx(golden["step_bank"][t].tolist(), rel=1e-5)
        assert torch.equal(contains[t], golden.tensor("step_cutmix_bank")[t].bool())
        for name, state in zip(("student", "teacher"), states[t], strict=True):
            for key, value in state.items():
                expected = golden.tensor(f"step_{name}_{key.replace('.', '_')}")[t + 1]
                torch.testing.assert_close(value, expected, rtol=2e-4, atol=1e-6)


# Runs
@pytest.mark.parametrize("flags", [
    {}, {"gamma": 0.0, "sampling": False, "adaptive_cutmix": False, "copy_paste": False},
    {"accumulate": 2, "confidence_threshold": 0.3, "bank_absent": "keep"},
], ids=str)  # fmt: skip
def test_it_trains(quick, flags):
    flags = {"log_pseudo_accuracy": True, "bank_momentum": 0.9} | flags
    args = quick(Args, steps=40, log_every=1, lr=3e-3, **flags, **active(ael))
    rows = read_log(main(args)["run_dir"])
    loss = [row["loss/sup"] for row in rows]
    assert sum(loss[-10:]) < 0.9 * sum(loss[:10])
    assert all(row["loss/cons"] > 0 for row in rows)
    assert all(0 < row["pseudo/rate"] <= 1 and 0 < row["pseudo/box"] <= 1 for row in rows)
    assert 0 < rows[-1]["pseudo/accuracy"] <= 1
    assert 0.05 < rows[-1]["pseudo/bank/background"] < 1
    assert (rows[-1]["pseudo/rate"] < 1) == args.sampling


FLAGS = [
    {"gamma": 0.0}, {"sampling": False}, {"copy_paste": False}, {"paste_draws": 4},
    {"paste_exclude": (0, 1, 2, 3)}, {"paste_any": True}, {"adaptive_cutmix": False},
    {"min_region": 0.5}, {"bank_momentum": 0.5},
    {"labeled_consistency": False}, {"confidence_threshold": 0.4}, {"lambda_u": 3.0},
    {"ramp_up": 0.9}, {"ema_decay": 0.3}, {"ema_warmup": False}, {"head_lr_mult": 3.0},
]  # fmt: skip


def test_flags_have_their_effects(quick):
    def saved(name, **flags):
        flags = {"bank_momentum": 0.2, "steps": 3, "batch_size": 8} | active(ael) | flags
        result = main(quick(Args, exp_name=name, **flags))
        return torch.load(f"{result['run_dir']}/last.pt", weights_only=True)

    plain = saved("plain")
    for number, flags in enumerate(FLAGS):
        other = saved(f"n{number}", **flags)["teacher"]
        assert any(not torch.equal(v, other[key]) for key, v in plain["teacher"].items()), flags
    # Which classes an image is taken to have shows in the choices alone, AHEAD steps later.
    few = [saved(rule, bank_absent=rule, batch_size=2)["bank"] for rule in ("zero", "keep")]
    assert not torch.equal(few[0]["confidence"], few[1]["confidence"])
    other = saved("presence", min_presence=0.5)["bank"]
    assert not torch.equal(plain["bank"]["last_seen"], other["last_seen"])
    assert plain["evaluated"] == "teacher"
    assert saved("student", evaluate="student")["evaluated"] == "student"


@pytest.mark.parametrize("flags", [
    {"gamma": -1.0}, {"paste_draws": 0}, {"paste_exclude": (-1,)}, {"paste_exclude": (0, 8)},
    {"paste_exclude": tuple(range(8))}, {"min_region": 1.5}, {"min_presence": -0.1},
    {"bank_momentum": 1.1}, {"confidence_threshold": -0.5}, {"ema_decay": 1.5}, {"ramp_up": 2.0},
    {"lambda_u": -1.0}, {"head_lr_mult": -1.0},
], ids=str)  # fmt: skip
def test_bad_flags(quick, flags):
    with pytest.raises(ael.UserError, match=next(iter(flags)).replace("_", "-")):
        main(quick(Args, **flags))


def test_paper_rows():
    rows = {name: ael.resolve(Args(dataset=name)) for name in ("voc", "cityscapes")}
    for args in rows.values():  # 0.01 and 1e-4, divided and multiplied by eight processes
        assert (args.lr, args.head_lr_mult, args.weight_decay) == (0.00125, 10, 8e-4)
        assert (args.batch_size, args.gamma, args.bank_momentum) == (16, 2, 0.999)
        assert (args.lambda_u, args.ramp_up, args.ema_decay) == (1, 0, 0.99)
    voc, cityscapes = rows.values()
    assert (voc.crop_size, cityscapes.crop_size) == (513, 769)
    assert (voc.steps, cityscapes.steps) == (46_320, 32_600)
    assert ael.resolve(Args(split="cps:1/2")).steps == 26_480
    assert (voc.confidence_threshold, cityscapes.confidence_threshold) == (0.7, 0)
    assert (voc.paste_draws, voc.min_region, voc.min_presence) == (1, 0.03, 0.03)
    assert (cityscapes.paste_draws, cityscapes.min_region) == (3, 0.005)
    assert (cityscapes.min_presence, cityscapes.paste_exclude) == (0.01, (0, 1, 2, 8, 10))
    assert len(ael.PASTE_SCALES) == 20 and ael.PASTE_SCALES[0] == 0.1
    assert all(set(row) == set(PAPER["voc"]) for row in PAPER.values())


def test_unlabeled_labels_are_never_read(quick, monkeypatch):
    assert_unlabeled_labels_are_not_read(ael, quick, monkeypatch)


def test_bf16_keeps_every_gradient_and_the_bank_in_fp32(quick):
    result = main(quick(Args, amp="bf16", steps=2, lr=1e-2, **active(ael)))
    checkpoint = torch.load(f"{result['run_dir']}/last.pt", weights_only=True)
    for number, moments in checkpoint["optimizer"]["state"].items():
        assert moments["exp_avg"].abs().max() > 0, f"parameter {number} got no gradient"
    assert checkpoint["bank"]["confidence"].dtype == torch.float32
    # A step of 0.001 is below the resolution of bf16 near 1, not of fp32.
    bank = torch.tensor([0.9])
    assert update_confidence(bank, torch.ones(1), torch.ones(1)) > bank


def test_workers_and_a_resume_change_nothing(quick, monkeypatch):
    """Beyond AHEAD steps, so that images are used that the bank chose."""
    from test_resume import stop_in

    flags = {"steps": AHEAD + 4, "bank_momentum": 0.5, "paste_draws": 2, **active(ael)}
    flags["save_every"] = AHEAD + 1
    whole = main(quick(Args, exp_name="whole", **flags))
    args = quick(Args, exp_name="stopped", num_workers=1, **flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(ael, patch, AHEAD + 3)
        main(args)
    assert_same(weights(whole["run_dir"]), weights(main(args)["run_dir"]))


def bank_of(args, images=30, classes=8):
    labeled_classes = torch.ones(8, classes, dtype=torch.bool)
    return Bank(args, labeled_classes, images, torch.device("cpu"))


def test_the_bank_chooses_ahead(quick):
    """A class that does badly is chosen more often, from images that have it, AHEAD steps later."""
    args = ael.resolve(quick(Args, batch_size=64))
    bank = bank_of(args)
    assert (bank.last_confidence == 0).all() and bank.pasteable == [1, 2, 3, 4, 5, 6, 7]
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    good = torch.ones(8)
    good[5] = 0  # e times as likely as another
    seen = torch.zeros(2, 64, 8)
    ids = [i for i, _ in global_batch(30, 64, args.seed, "unlabeled", 0)]
    seen[0, ids.index(17), 5] = 1  # of several views of one image the last counts
    seen[0, [n for n, i in enumerate(ids) if i == 17], 5] = 1
    sources = bank.source_image[0].tolist()
    seen[1, [n for n, i in enumerate(sources) if i == 17], 5] = 1
    bank.update(0, good, seen)
    bank.update(1, good, seen * 0)
    assert bank.contains[17, 5] and bank.contains.sum() == 1
    row = 1 % AHEAD  # of step 1 + AHEAD, the first that knows of step 0
    chosen = bank.source_class[row] == 5
    assert 0.15 < chosen.float().mean() < 0.5  # e / (e + 7) = 0.28
    assert (bank.source_image[row][chosen] == 17).all()
    assert len(bank.source_image[row][~chosen].unique()) > 10
    assert 0.3 < (bank.pasted_image[row] >= 0).float().mean() < 0.7
    for name in ("source_class", "source_image", "pasted_image"):  # rows of the steps to come
        assert torch.equal(before[name][2:], getattr(bank, name)[2:])
    other = bank_of(args)
    other.load_state_dict(bank.state_dict())
    assert_same(bank.state_dict(), other.state_dict())
    assert_same({name: getattr(bank, name) for name in before}, bank.state_dict())


def test_pasted_images_contain_a_drawn_class(quick):
    index = torch.eye(8, dtype=torch.bool)
    for paste_any in (False, True):
        args = ael.resolve(quick(Args, batch_size=16, paste_draws=2, paste_any=paste_any))
        bank = Bank(args, index, 30, torch.device("cpu"))
        right = []
        for image, classes in zip(
            bank.pasted_image.flatten().tolist(), bank.pasted_classes.flatten(0, 1), strict=True
        ):
            drawn = classes.nonzero().flatten().tolist()
            assert 1 <= len(drawn) <= 2 and 0 not in drawn
            right += [image in drawn] if image >= 0 else []
        assert all(right) != paste_any and any(right)
        first, second = bank.pasted_classes.unflatten(1, (8, 2)).unbind(2)
        assert torch.equal(first, second)  # of a pair
        assert len(first[0].unique(dim=0)) > 4  # of the pairs of a step
    rare = index.clone()
    rare[:, 3] = False  # no image has it: it is never drawn
    assert Bank(args, rare, 30, torch.device("cpu")).pasteable == [1, 2, 4, 5, 6, 7]


def test_chosen_batches_are_those_of_one_process(quick):
    args = ael.resolve(quick(Args, batch_size=4, accumulate=2))
    data, split = ael.open_data(args)
    chosen = torch.arange(AHEAD * 4).view(AHEAD, 4).remainder(8)
    chosen[:, 1] = -1

    def batches(rank, world_size, steps, **flags):
        stream = ael.make_chosen_batches(
            ael.replace(args, **flags), data, split.labeled, "pasted",
            (2, rank, world_size, torch.device("cpu")), chosen, ael.PASTE_SCALES,
        )  # fmt: skip
        return [next(stream) for _ in range(steps)]

    one = batches(0, 1, 4)
    two = [batches(rank, 2, 4) for rank in (0, 1)]
    more = batches(0, 1, 4, num_workers=2)
    for step in range(2):
        micro = one[2 * step : 2 * step + 2]
        halves = [pair for rank in two for pair in rank[2 * step : 2 * step + 2]]
        for part in (0, 1):
            whole = torch.cat([batch[part] for batch in micro])
            assert torch.equal(whole, torch.cat([half[part] for half in halves]))
            assert torch.equal(whole, torch.cat([b[part] for b in more[2 * step : 2 * step + 2]]))
    assert not one[0][1][1].any() and one[0][1][0].any()  # nothing to paste: label 0
    # Images are chosen up to the batch in preparation, not beyond.
    start = chosen.clone()
    stream = ael.make_chosen_batches(
        ael.replace(args, accumulate=1), data, split.labeled, "pasted",
        (0, 0, 1, torch.device("cpu")), chosen, (1.0,),
    )  # fmt: skip
    chosen[:] = -1  # before the first `next`, as a resumed run loads its choices
    assert not next(stream)[1].any() and start.any()


def test_loaders_never_need_a_choice_that_is_not_made(quick, monkeypatch):
    """With any number of workers no row is read more than AHEAD - 1 steps before its use."""
    made = {}
    loader = ael.DataLoader

    def remember(dataset, batch_sampler=None, num_workers=0, **rest):
        if isinstance(dataset, ael.ChosenSamples):
            made[num_workers] = loader(dataset, batch_sampler=batch_sampler, **rest)
            return made[num_workers]
        return loader(dataset, batch_sampler=batch_sampler, num_workers=0, **rest)

    monkeypatch.setattr(ael, "DataLoader", remember)
    main(quick(Args, num_workers=16, steps=1))
    assert set(made) == {4} and 2 * max(made) <= AHEAD - 1


def test_classes_of_the_labels(quick):
    args = ael.resolve(quick(Args))
    data, split = ael.open_data(args)
    found = ael.classes_of(args, data, split.labeled, 0)
    for row, image_id in zip(found, split.labeled, strict=True):
        label = data.load(image_id)[1]
        assert row.nonzero().flatten().tolist() == label[label != IGNORE].unique().tolist()


def test_accumulated_micro_batches_have_the_bank_of_the_whole_batch(quick, monkeypatch):
    """The bank moves once per step, by all of its pixels."""
    from test_supervised import freeze_batchnorm

    freeze_batchnorm(monkeypatch, ael)
    banks = [
        torch.load(
            main(quick(Args, steps=1, accumulate=n, exp_name=f"n{n}"))["run_dir"] + "/last.pt"
        )
        for n in (1, 2)
    ]  # fmt: skip
    for name in ("confidence", "last_seen", "last_images"):
        torch.testing.assert_close(banks[0]["bank"][name], banks[1]["bank"][name])
