"""Step time against the floor, loader throughput and peak memory of every script.

    python benchmarks/speed.py                                   # CPU, resnet14, shapes-size crops
    python benchmarks/speed.py --device cuda --paper --num-workers 4 \\
        --dataset camvid --out benchmarks/results/speed_gpu.jsonl
    python benchmarks/speed.py --table                # results/speed*.jsonl -> docs/results.md

With `--paper` each script has resnet50 (DINOv2-S) and the batch and crop of its VOC row, in bf16,
in bf16 compiled and in fp32; the table then says what a run of the paper costs on that card.

The floor of a script is its forwards, losses, backward, optimizer step and EMA on tensors that are
already in memory. Blocks of the script's own loop (`main`, with its loading, logging and
checks) and blocks of the floor alternate in one process; the ratio of the medians is the overhead.
"""

import argparse
import importlib
import itertools
import json
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODES = {  # of --paper
    "bf16": ["--amp", "bf16"], "compiled": ["--amp", "bf16", "--compile"], "off": ["--amp", "off"],
}  # fmt: skip
BLOCK, SKIPPED = 12, 3  # steps per block, and those at its start that a full prefetch queue helps


class Floor:
    """What floors are built from: a script's own networks, losses and optimizer."""

    def __init__(self, script, args, classes: int, device):
        self.script, self.args, self.classes, self.device = script, args, classes, device
        self.autocast, self.scaler = script.make_autocast(args, device)
        self.names = iter("123456789")

    def network(self):
        return self.on_device(self.script.make_network(self.args, self.classes, next(self.names)))

    def on_device(self, module):
        return self.script.prepare(module, self.args, 1, self.device)

    def optimizer(self, *networks):
        return self.script.make_optimizer(networks, self.args, self.device)

    def image(self):
        size = (self.args.batch_size, 3, self.args.crop_size, self.args.crop_size)
        image = torch.randn(size, device=self.device)
        return image.contiguous(memory_format=torch.channels_last)

    def label(self):
        size = (self.args.batch_size, self.args.crop_size, self.args.crop_size)
        return torch.randint(self.classes, size, device=self.device)

    def update(self, loss, optimizer) -> None:
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()


# A floor gets a `Floor` and returns its step: forwards, losses, backward, optimizer and EMA on
# tensors that are already in memory.
def supervised_floor(f: Floor):
    net, image, label = f.network(), f.image(), f.label()
    optimizer = f.optimizer(net)

    def step():
        with f.autocast:
            logits = net(image)
        f.update(f.script.cross_entropy(logits, label), optimizer)

    return step


def cps_floor(f: Floor):
    nets = [f.network(), f.network()]
    optimizer = f.optimizer(*nets)
    labeled, u0, u1, mixed, label = f.image(), f.image(), f.image(), f.image(), f.label()

    def step():
        with torch.no_grad(), f.autocast:
            target_1, target_2 = ((net(u0).argmax(1), net(u1).argmax(1))[0] for net in nets)
        with f.autocast:
            logits_1, logits_2 = (net(mixed) for net in nets)
            labeled_1, labeled_2 = (net(labeled) for net in nets)
        loss = f.script.cross_entropy(labeled_1, label) + f.script.cross_entropy(labeled_2, label)
        loss = loss + f.script.cross_entropy(logits_1, target_2)
        f.update(loss + f.script.cross_entropy(logits_2, target_1), optimizer)

    return step


def teacher_floor(f: Floor, teacher_forwards: int, loss):
    """Student on labeled and unlabeled images, teacher without gradient, EMA of the parameters."""
    student = f.network()
    teacher = f.script.make_teacher(student, f.args)
    optimizer = f.optimizer(student)
    labeled, unlabeled, label = f.image(), f.image(), f.label()

    def step():
        with torch.no_grad(), f.autocast:
            for _ in range(teacher_forwards):
                target = teacher(unlabeled)
        with f.autocast:
            logits_l, logits_u = student(labeled), student(unlabeled)
        total = f.script.cross_entropy(logits_l, label) + loss(logits_u, target)
        f.update(total, optimizer)
        f.script.update_teacher(teacher, student, 0.99)

    return step


def mean_teacher_floor(f: Floor):
    """Both networks on all images, and the loss of all."""
    student = f.network()
    teacher = f.script.make_teacher(student, f.args)
    optimizer = f.optimizer(student)
    labeled, unlabeled, label = f.image(), f.image(), f.label()

    def step():
        with torch.no_grad(), f.autocast:
            targets = [teacher(labeled), teacher(unlabeled)]
        with f.autocast:
            logits = [student(labeled), student(unlabeled)]
        loss = f.script.consistency_loss(torch.cat(logits), torch.cat(targets))
        f.update(f.script.cross_entropy(logits[0], label) + loss, optimizer)
        f.script.update_teacher(teacher, student, 0.99)

    return step


def pi_model_floor(f: Floor):
    """Both views, neither cut nor noisy, but with dropout."""
    net, labeled, unlabeled, label = f.network(), f.image(), f.image(), f.label()
    f.script.add_dropout(net, f.args.dropout)
    optimizer = f.optimizer(net)

    def step():
        with f.autocast:
            logits = [torch.cat([net(labeled), net(unlabeled)]) for _ in range(2)]
        loss = f.script.cross_entropy(logits[0][: len(label)], label)
        f.update(loss + f.script.consistency_loss(*logits), optimizer)

    return step


def temporal_ensembling_floor(f: Floor):
    """Without noise and bank: every view shows its whole image, and the target is in memory."""
    net, labeled, unlabeled, label = f.network(), f.image(), f.image(), f.label()
    f.script.add_dropout(net, f.args.dropout)
    optimizer = f.optimizer(net)
    view = [*[f.args.crop_size] * 2, 0, 0, *[f.args.crop_size] * 4, 0, 0, 0]
    view = torch.tensor([view] * 2 * len(label), device=f.device)
    target = torch.rand(len(view), f.classes, *f.args.canvas, device=f.device).softmax(1)

    def step():
        with f.autocast:
            logits = torch.cat([net(labeled), net(unlabeled)])
        values, covered = f.script.to_canvas(logits, view, f.args.canvas)
        loss = f.script.consistency_loss(values.softmax(1), target, covered)
        f.update(f.script.cross_entropy(logits[: len(label)], label) + loss, optimizer)

    return step


def cutmix_mt_floor(f: Floor):
    return teacher_floor(f, 2, lambda logits, t: f.script.consistency_loss(logits, t.softmax(1)))


def classmix_floor(f: Floor):
    return teacher_floor(f, 1, lambda logits, t: f.script.cross_entropy(logits, t.argmax(1)))


def cct_floor(f: Floor):
    """The auxiliary decoders see clean features: the perturbations are not in the floor."""
    net = f.network()
    aux_decoders = f.script.AuxDecoders(net.classifier.in_channels, f.classes, f.args)
    f.on_device(aux_decoders)
    optimizer = f.optimizer(net, aux_decoders)
    labeled, unlabeled, label = f.image(), f.image(), f.label()
    shape = (sum(f.args.decoders), f.classes)

    def step():
        with f.autocast:
            logits_l = net(labeled)
            features = net.head(*net.encode(unlabeled))
            main_logits = net.classifier(features.detach())
            aux_logits = aux_decoders.conv(features).unflatten(1, shape).transpose(0, 1)
        prob = f.script.upsample(main_logits, unlabeled.shape[2:]).detach().softmax(1)
        aux_logits = f.script.full_precision(aux_logits).contiguous()
        loss_cons = f.script.DecoderLosses.apply(aux_logits, prob, "mse").mean()
        f.update(f.script.cross_entropy(logits_l, label) + 30 * loss_cons, optimizer)

    return step


def gct_floor(f: Floor):
    nets = [f.network(), f.network()]
    detector = f.script.make_detector(f.args, f.classes)
    f.on_device(detector)
    optimizers = [f.optimizer(*nets), torch.optim.Adam(detector.parameters(), 1e-4, fused=True)]
    labeled, unlabeled, label = f.image(), f.image(), f.label()
    script, n = f.script, len(label)
    true = torch.rand(n, 1, *label.shape[1:], device=f.device)  # and not made from the softmaxes
    both_flawed = true.repeat(2, 1, 1, 1) > 0.5

    def step():
        image = torch.cat([labeled, unlabeled])
        with f.autocast:
            logits = [torch.cat([net(labeled), net(unlabeled)]) for net in nets]
        probs = [script.full_precision(each).softmax(1) for each in logits]
        with f.autocast:
            flaws = [detector(image, prob.detach()) for prob in probs]
            detector.requires_grad_(False)
            seen = [detector(image, prob) for prob in probs]
            detector.requires_grad_(True)
        loss = 0
        for net in range(2):
            loss = loss + script.cross_entropy(logits[net][:n], label)
            loss = loss + torch.nn.functional.mse_loss(probs[net], probs[1 - net].detach())
            loss = loss + script.flaw_correction_loss(seen[net], both_flawed)
            loss = loss + script.detector_loss(flaws[net][:n], true)
        f.scaler.scale(loss).backward()
        for optimizer in optimizers:
            f.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        f.scaler.update()

    return step


def cmb_floor(f: Floor):
    """Without the views, and without filling the bank; the teacher sees labeled images for it."""
    net = f.network()
    heads = f.script.Heads(net.classifier.in_channels, f.classes, bank_attention=True)
    student = f.on_device(f.script.NetworkWithHeads(net, heads))
    teacher = f.script.make_teacher(student, f.args)
    bank = f.script.MemoryBank(f.classes, heads.dim, f.args.bank_size).to(f.device)
    bank.store.normal_()
    bank.filled.fill_(f.args.bank_size)
    optimizer = f.optimizer(net, heads)
    half = f.args.batch_size // 2
    labeled, views, label = f.image(), f.image()[: 2 * half], f.label()

    def step():
        with torch.no_grad(), f.autocast:
            confidence, pseudo_label = teacher(views[:half])[0].softmax(1).max(1)
            teacher(labeled)
        confidence, pseudo_label = confidence.repeat(2, 1, 1), pseudo_label.repeat(2, 1, 1)
        with f.autocast:
            logits_u, loss_u = student(views, pseudo_label, bank)
            logits_l, loss_l = student(labeled, label, bank)
        loss = f.script.cross_entropy(logits_l, label) + 0.1 * (loss_l + loss_u)
        loss = loss + f.script.pseudo_label_loss(logits_u, pseudo_label, confidence, 1.0)
        f.update(loss + 0.01 * f.script.entropy_loss(logits_u), optimizer)
        f.script.update_teacher(teacher, student, 0.995)

    return step


def dcc_floor(f: Floor):
    """Without the crops' color changes; the bank is full, the overlap is the average one."""
    net = f.network()
    projector = f.script.make_projector(f.args, net.classifier.in_channels)
    network = f.script.ContrastiveNetwork(net, projector)
    f.on_device(network)
    optimizer = f.optimizer(net, projector)
    labeled, crops, label = f.image(), [f.image(), f.image()], f.label()
    size, generator, shared = f.args.crop_size, torch.Generator().manual_seed(0), 0
    least, greatest = f.args.pair_scale
    for _ in range(300):  # images of CamVid's size
        scale = least + (greatest - least) * float(torch.rand((), generator=generator))
        sides = [round(scale * side) for side in (360, 480)]
        top, left, bottom, right = f.script.overlapping_crops(*sides, size, generator)[2]
        shared += (bottom - top) * (right - left) // 64 / 300
    places = len(label) * (size // 8) ** 2
    overlap = torch.randperm(places)[: round(len(label) * shared)]
    overlap = torch.stack([overlap, places + overlap]).to(f.device)  # of both crops
    bank = f.script.NegativeBank(f.args.bank_steps * 2 * len(label) * f.args.negatives, f.device)
    vectors = torch.randn(bank.capacity, f.script.EMBEDDING, device=f.device)
    labels = torch.randint(f.classes, (bank.capacity,), device=f.device)
    bank.add(torch.nn.functional.normalize(vectors), labels)

    def step():
        with f.autocast:
            logits, *maps = network(labeled, *crops)
        bank.add(*(each.detach().flatten(0, 3) for each in maps[:2]))
        maps = [f.script.take(each, overlap) for each in maps]
        sums, active = f.script.both_directions(*maps, bank.embeddings, bank.labels, f.args)
        loss = (sums / active.sum(1).clamp(min=1)).sum()
        f.update(f.script.cross_entropy(logits, label) + 0.1 * loss, optimizer)

    return step


def ael_floor(f: Floor):
    """Teacher on labeled images and on pairs; consistency on labeled and mixed images."""
    student = f.network()
    teacher = f.script.make_teacher(student, f.args)
    optimizer = f.optimizer(student)
    labeled, mixed, label = f.image(), f.image(), f.label()
    pair, rate = torch.cat([f.image(), f.image()]), torch.ones(f.classes, device=f.device)

    def step():
        with torch.no_grad(), f.autocast:
            targets = [t.softmax(1).max(1) for t in (teacher(labeled), teacher(pair))]
        with f.autocast:
            logits = student(labeled), student(mixed)
        loss = f.script.cross_entropy(logits[0], label)
        for student_logits, (confidence, target) in zip(logits, targets, strict=True):
            n = len(student_logits)
            loss = loss + f.script.consistency_loss(
                student_logits, target[:n], confidence[:n], rate, torch.ones_like(confidence[:n])
            )
        f.update(loss, optimizer)
        f.script.update_teacher(teacher, student, 0.99)

    return step


def pseudoseg_floor(f: Floor):
    """Without the strong view, and without gathering the classes of a label."""
    net, script = f.network(), f.script
    channels = net.backbone.inplanes
    classifier = f.on_device(torch.nn.Linear(channels, f.classes - 1))
    attention = script.SelfAttention(channels + channels // 2, f.classes, f.args.attention_dim)
    maps, attention = f.on_device(script.InnerMaps(net)), f.on_device(attention)
    optimizer = f.optimizer(net, classifier, attention)
    labeled, unlabeled, strong, label = f.image(), f.image(), f.image(), f.label()
    present = torch.randint(2, (len(label), f.classes - 1), device=f.device).float()
    inside = torch.ones_like(label)[:, None].float()

    def second_map(high, hypercolumn):
        cam = script.grad_cam(high, classifier.weight, present)
        return attention(hypercolumn, cam, script.shrink(inside, cam))

    def step():
        with torch.no_grad(), f.autocast:
            net.eval()
            inner = maps(unlabeled, decode=False)
            net.train()
            *_, logits_w = maps(unlabeled)
        with f.autocast:
            high, hypercolumn, logits_l = maps(labeled)
            *_, logits_s = maps(strong)
        with torch.no_grad():
            other = script.upsample(second_map(*inner), logits_w.shape[2:])
            target = script.make_target(logits_w, other, f.args)
        class_logits = classifier(high.mean((2, 3)))
        full = [
            script.upsample(z, label.shape[1:]) for z in (logits_l, second_map(high, hypercolumn))
        ]
        loss = script.cross_entropy(full[0], label) + script.cross_entropy(full[1], label)
        loss = loss + script.classification_loss(class_logits, present)
        valid = script.shrink(inside, logits_s)
        f.update(loss + script.consistency_loss(logits_s, target, valid), optimizer)

    return step


def self_training_floor(f: Floor):
    """A training on pseudo-labels, with its batch of twice the size; labeling is not in it."""
    net = f.network()
    image, label = torch.cat([f.image(), f.image()]), torch.cat([f.label(), f.label()])
    optimizer = f.optimizer(net)

    def step():
        with f.autocast:
            logits = net(image)
        f.update(f.script.cross_entropy(logits, label), optimizer)

    return step


def unimatch_v2_floor(f: Floor):
    """Without the strong views and the boxes: their images and channel masks are in memory."""
    student = f.network()
    teacher = f.script.make_teacher(student, f.args)
    optimizer = f.optimizer(student)
    weak, label = f.image(), f.label()
    images, n = torch.cat([f.image() for _ in range(3)]), len(label)
    generator = torch.Generator().manual_seed(0)
    masks = f.script.complementary_dropout(n, student.backbone.dim, generator)
    masks = torch.cat([torch.ones(n, student.backbone.dim), *masks]).to(f.device)
    valid = torch.ones_like(label, dtype=torch.bool)

    def step():
        with torch.no_grad(), f.autocast:
            confidence, pseudo_label = teacher(weak).softmax(1).max(1)
        with f.autocast:
            logits_l, *logits_u = student(images, masks).split(n)
        loss = f.script.cross_entropy(logits_l, label)
        for logits in logits_u:
            terms = (logits, pseudo_label, confidence, valid)
            loss = loss + f.script.unsupervised_loss(*terms) / 2
        f.update(loss / 2, optimizer)
        f.script.update_teacher(teacher, student, 0.99)

    return step


def self_correcting_floor(f: Floor):
    """The last stage with the linear correction, which the script is held to as well."""
    f.script.stage_starts = lambda *_: (0, 0)
    net = f.network()
    ancillary = f.on_device(f.script.AncillaryNet(f.classes, f.args.backbone)).eval()
    optimizer = f.optimizer(net)
    labeled, unlabeled, label = f.image(), f.image(), f.label()
    boxes = torch.nn.functional.one_hot(f.label(), f.classes).movedim(3, 1).float().contiguous()

    def step():
        with f.autocast:
            logits_l, logits_u = net(labeled), net(unlabeled)
        with torch.no_grad(), f.autocast:
            ancillary_u = ancillary(unlabeled, boxes)
        loss = f.script.cross_entropy(logits_l, label)
        prob = f.script.linear_correction(logits_u, ancillary_u, 1.0)
        f.update(loss + f.script.soft_cross_entropy(logits_u, prob), optimizer)

    return step


FLOORS = {
    "supervised": supervised_floor,
    "cps": cps_floor,
    "mean_teacher": mean_teacher_floor,
    "pi_model": pi_model_floor,
    "temporal_ensembling": temporal_ensembling_floor,
    "cutmix_mt": cutmix_mt_floor,
    "classmix": classmix_floor,
    "ael": ael_floor,
    "cct": cct_floor,
    "gct": gct_floor,
    "cmb": cmb_floor,
    "dcc": dcc_floor,
    "pseudoseg": pseudoseg_floor,
    "self_training": self_training_floor,
    "self_correcting": self_correcting_floor,
    "unimatch_v2": unimatch_v2_floor,
}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(name: str, flags, blocks: int) -> dict:
    """Medians of a script's step and of its floor, in seconds, measured by turns."""
    script = importlib.import_module(name)
    device = torch.device(flags.device)
    of_vit = {"resnet14": "vit_tiny", "resnet50": "dinov2_small"}
    backbone = of_vit[flags.backbone] if name == "unimatch_v2" else flags.backbone
    voc = script.PAPER["voc"]
    crop_size = voc["crop_size"] if flags.paper else flags.crop_size
    batch_size = voc["batch_size"] if flags.paper else flags.batch_size
    with tempfile.TemporaryDirectory() as folder:
        args = script.Args(
            dataset=flags.dataset, data_root=flags.data_root, backbone=backbone,
            weights="none", device=flags.device, amp=flags.amp, compile=flags.compile,
            crop_size=crop_size, batch_size=batch_size, split=flags.split,
            steps=blocks * BLOCK + 1, log_every=BLOCK, eval_every=10**9, save_every=10**9,
            num_workers=flags.num_workers, output_dir=folder,
        )  # fmt: skip
        step_of_floor = FLOORS[name](Floor(script, script.resolve(args), flags.classes, device))
        with FlopCounterMode(display=False) as counter:
            if not flags.compile:  # the counter sees no compiled network
                step_of_floor()

        def floor_step() -> float:
            synchronize(device)
            begin = time.perf_counter()
            step_of_floor()
            synchronize(device)
            return time.perf_counter() - begin

        times = {"script": [], "floor": []}
        poly_lr, began, seen = script.poly_lr, [0.0], [-1]

        def turn(base_lr, step, total_steps):
            """Called at the start of every step of `main`: ends a block, runs one of the floor."""
            if step == seen[0]:  # of another optimizer
                return poly_lr(base_lr, step, total_steps)
            seen[0] = step
            synchronize(device)
            if step == 0:  # of the last training, where there are several
                times["script"], times["floor"] = [], []
            if step % BLOCK == 0:
                if step > BLOCK:  # the first block warms up
                    times["script"].append((time.perf_counter() - began[0]) / (BLOCK - SKIPPED))
                block = [floor_step() for _ in range(BLOCK)]
                if step:
                    times["floor"].append(statistics.mean(block[SKIPPED:]))
            if step % BLOCK == SKIPPED:
                began[0] = time.perf_counter()
            return poly_lr(base_lr, step, total_steps)

        script.poly_lr = turn
        try:
            script.main(args)
        finally:
            script.poly_lr = poly_lr
    seconds = {key: statistics.median(values) for key, values in times.items()}
    ratios = [s / f for s, f in zip(times["script"], times["floor"], strict=False)]
    spread = statistics.stdev(ratios) / len(ratios) ** 0.5
    result = {
        "script": name, "backbone": backbone, "crop_size": crop_size, "batch_size": batch_size,
        "voc_steps": script.resolve(script.Args(dataset="voc")).steps,
        "tflop": counter.get_total_flops() / 1e12 or None,
        "step_s": seconds["script"], "floor_s": seconds["floor"],
        "ratio": seconds["script"] / seconds["floor"], "ratio_standard_error": spread,
        "blocks": len(ratios), "steps_per_block": BLOCK - SKIPPED,
    }  # fmt: skip
    # Of the process, with the floor's networks, on a CPU.
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    return result | {"peak_memory_gb": memory / 1e9}


def loader(data_root: str, crop_size: int, seconds: float) -> dict:
    """Images per second of one worker: decoding, weak view and collation, in this process."""
    from common.datasets import MicroBatches, Samples, StreamSampler, open_dataset
    from common.transforms import WeakView

    torch.set_num_threads(1)
    data = open_dataset("camvid", data_root)
    rates = {}
    for kind, labels in (("labeled", "all"), ("unlabeled", "none")):
        samples = Samples(data, data.train_ids, WeakView(crop_size, data.scales), labels)
        sampler = MicroBatches(StreamSampler(len(samples), 8, 0))
        batches = iter(torch.utils.data.DataLoader(samples, batch_sampler=sampler))
        for _ in range(5):
            next(batches)
        begin, images = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            images += len(next(batches)[0])
        rates[kind] = images / (time.perf_counter() - begin)
    return {"loader": "camvid", "crop_size": crop_size, "images_per_s_per_worker": rates}


def cost_table() -> str:
    """Markdown: what a run of the paper on VOC costs on one GPU, by the latest row of each mode."""
    path = ROOT / "benchmarks" / "results" / "speed_gpu.jsonl"
    if not path.exists():
        command = __doc__.split("\n    ")[2:4]
        return "\n".join(["Not measured yet:", "", "```bash", *command, "```"])
    rows = {}
    for row in map(json.loads, path.read_text().splitlines()):
        mode = "compiled" if row["flags"]["compile"] else row["flags"]["amp"]
        rows.setdefault(row["script"], {})[mode] = row
    lines = [
        "| script | crop, batch | bf16 | compiled | fp32 | step / floor | TFLOP/s | memory | "
        "steps | hours |",
        "|---" * 10 + "|",
    ]
    for name in (name for name in FLOORS if "bf16" in rows.get(name, {})):
        modes, row = rows[name], rows[name]["bf16"]
        times = [f"{1e3 * modes[m]['step_s']:.0f} ms" if m in modes else "" for m in MODES]
        best = min(modes[m]["step_s"] for m in ("bf16", "compiled") if m in modes)
        lines.append(
            f"| `{name}.py` | {row['crop_size']}, {row['batch_size']} | {' | '.join(times)} | "
            f"{row['ratio']:.3f} ± {row['ratio_standard_error']:.3f} | "
            f"{row['tflop'] / row['step_s']:.0f} | {row['peak_memory_gb']:.1f} GB | "
            f"{row['voc_steps']:,} | {best * row['voc_steps'] / 3600:.1f} |"
        )
    commits = ", ".join(dict.fromkeys(row["commit"] for row in (m["bf16"] for m in rows.values())))
    lines += [
        "",
        f"{row['machine']}, torch {row['torch']}, commit {commits}. ResNet-50 (UniMatch V2: "
        "DINOv2-S); step / floor, TFLOP/s and memory (with the floor's networks) in bf16; hours: "
        "the VOC 1/8 row's steps at the faster of bf16 and compiled, without evaluations. Papers "
        "with ResNet-101 take longer.",
    ]
    return "\n".join(lines)


def table() -> str:
    """Markdown: the latest row of every script, and of the loader."""
    path = ROOT / "benchmarks" / "results" / "speed.jsonl"
    rows = {}
    for row in map(json.loads, path.read_text().splitlines()):
        rows[row.get("script", "loader")] = row
    rates = rows.pop("loader")["images_per_s_per_worker"]
    lines = ["| script | step | floor | step / floor | peak memory |", "|---|---|---|---|---|"]
    for name in (name for name in FLOORS if name in rows):
        row = rows[name]
        lines.append(
            f"| `{name}.py` | {row['step_s']:.2f} s | {row['floor_s']:.2f} s | "
            f"{row['ratio']:.3f} ± {row['ratio_standard_error']:.3f} | "
            f"{row['peak_memory_gb']:.1f} GB |"
        )
    flags, where = row["flags"], f"{row['machine']}, torch {row['torch']}"
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows.values()))
    lines += [
        "",
        f"{flags['dataset']}, {flags['backbone']}, batch {flags['batch_size']}, crop "
        f"{flags['crop_size']}, {where}, commit {commits}. The floor is the "
        "same forwards, losses, backward, optimizer and EMA steps on tensors already in memory; "
        "steps of both were timed by turns (± standard error). The loader decodes, augments and "
        f"crops (320) {rates['labeled']:.0f} labeled or {rates['unlabeled']:.0f} unlabeled images "
        "of CamVid per second and worker.",
    ]
    return "\n".join(lines)


def write_tables() -> None:
    path = ROOT / "docs" / "results.md"
    for name, text in (("speed table", table()), ("cost table", cost_table())):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = path.read_text().split(begin)
        path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", default=list(FLOORS), choices=list(FLOORS))
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--split", default="1/8")
    parser.add_argument("--classes", type=int, default=11, help="of the floor's networks")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backbone", default=None, help="resnet14; with --paper resnet50")
    parser.add_argument("--crop-size", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--amp", default=None, choices=["off", "bf16", "fp16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--paper", action="store_true", help="crop and batch of VOC, all modes")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--loader", action="store_true", help="measure the CamVid loader instead")
    parser.add_argument("--out", default=None, help="append the rows to this .jsonl file")
    parser.add_argument("--table", action="store_true", help="write the table into docs/results.md")
    flags = parser.parse_args()
    if flags.table:
        return write_tables()
    flags.backbone = flags.backbone or ("resnet50" if flags.paper else "resnet14")
    modes = MODES.values() if flags.paper and not flags.amp else [["--amp", flags.amp or "off"]]
    if len(flags.scripts) * len(modes) > 1 and not flags.loader:
        failed = []  # each in a process of its own, for its memory
        for name, mode in itertools.product(flags.scripts, modes):
            command = [sys.executable, __file__, *sys.argv[1:], "--scripts", name, *mode]
            failed += [f"{name} {shlex.join(mode)}"] if subprocess.run(command).returncode else []
        raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)
    flags.amp = flags.amp or "off"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    cpu = Path("/proc/cpuinfo")
    names = [s for s in cpu.read_text().splitlines() if "model name" in s] if cpu.exists() else []
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' * (count > 1)} on "
    machine = f"{threads}{len(names)} cores of {names[0].split(': ')[1]}" if names else "cpu"
    machine = torch.cuda.get_device_name() if flags.device == "cuda" else machine
    own = {k: v for k, v in vars(flags).items() if k not in ("data_root", "out")}  # not of a place
    about = {"flags": own, "machine": machine, "torch": torch.__version__}
    for name in ["loader"] if flags.loader else flags.scripts:
        loading = name == "loader"
        row = loader(flags.data_root, 320, 10) if loading else measure(name, flags, flags.blocks)
        row |= about | {"commit": commit.stdout.strip()}
        print(json.dumps(row))
        if flags.out:
            with Path(flags.out).open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
