"""Fixtures: the authors' numbers, quick runs on the shapes data set, and an HTTP server."""

import http.server
import importlib
import signal
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from same_sections import existing
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SCRIPTS = {name: importlib.import_module(name) for name in existing()}

torch.set_num_threads(1)  # small tensors, and busy machines
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it


class Golden(dict):
    """Arrays that the authors' code computed; `tensor` gives labels as int64, the rest as fp64."""

    def tensor(self, key: str) -> torch.Tensor:
        value = torch.from_numpy(np.asarray(self[key]))
        return value.double() if value.is_floating_point() else value.long()

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): self.tensor(k) for k in self if k.startswith(prefix)}


def load_golden(path: Path) -> Golden:
    with np.load(path) as file:
        return Golden({key: file[key] for key in file.files})


def golden_files(pattern: str) -> list[Path]:
    """The small copies in tests/golden, and the whole collection where it is at hand."""
    return sorted((ROOT / "tests/golden").glob(pattern)) + sorted(
        (SHARED / "goldens").glob(pattern)
    )


class TinyNet(nn.Module):
    """The network of the step goldens, in DeepLabV3Plus's place; `state` as they name it."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        state = {k.replace("conv1.", "conv.").replace("bn1.", "bn."): v for k, v in state.items()}
        width, classes = len(state["conv.weight"]), len(state["cls.bias"])
        self.conv = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.cls = nn.Conv2d(width, classes, 1)
        self.double().train()
        self.load_state_dict(state, strict=False)  # some goldens leave BatchNorm's counter out

    def assert_like(self, state: dict[str, torch.Tensor], expected: dict, **tolerance) -> None:
        """Compare a state of this network with what the goldens say."""
        for key, value in TinyNet(expected).state_dict().items():
            if not key.endswith("num_batches_tracked"):
                torch.testing.assert_close(state[key], value, **tolerance)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = self.cls(self.bn(self.conv(image)).relu())
        return nn.functional.interpolate(
            logits, image.shape[2:], mode="bilinear", align_corners=True
        )


class RecordedError(Exception):
    """Ends a run after the golden steps."""


def record_steps(script, args, monkeypatch, student, teacher, streams):
    """Run `main` on given networks and batches, stream name -> list of (image, label).

    Returns the state dicts of (student, teacher) after each step, and the logged rows.
    """
    states, rows = [], []

    def batches(args, data, ids, stream, *_):
        for number, batch in enumerate([*streams[stream], None]):
            if stream == "labeled" and number:  # the step before is complete
                states.append(
                    [{k: v.clone() for k, v in n.state_dict().items()} for n in (student, teacher)]
                )
            if batch is None:
                raise RecordedError
            yield batch

    monkeypatch.setattr(script, "make_network", lambda *_: student)
    monkeypatch.setattr(script, "make_teacher", lambda *_: teacher, raising=False)
    monkeypatch.setattr(script, "make_batches", batches)
    monkeypatch.setattr(script.Run, "log", lambda self, step, row, pictures: rows.append(row))
    with pytest.raises(RecordedError):
        script.main(args)
    return states, rows


@pytest.fixture
def quick(tmp_path):
    """quick(Args, **flags): a run of a few steps on shapes, in a folder of its own."""

    def make(args_class, **flags):
        args = args_class(
            dataset="shapes", device="cpu", num_workers=0, batch_size=4, crop_size=32, steps=6,
            split="8", log_every=2, eval_every=1000, save_every=1000,
            output_dir=str(tmp_path / "runs"),
        )  # fmt: skip
        return replace(args, **flags)

    return make


def active(script) -> dict[str, float]:
    """Flags that give every term of a script its full weight from the first step on."""
    at_once = ("cps_start", "cps_full", "dcc_start", "ramp_up")
    return {field.name: 0.0 for field in fields(script.Args) if field.name in at_once}


@pytest.fixture(autouse=True)
def few_validation_images(monkeypatch):
    """Seven are enough for these tests, and no number of processes divides them."""
    from common.datasets import Shapes

    monkeypatch.setattr(Shapes, "val_ids", Shapes.val_ids[:7])


def read_log(run_dir) -> list[dict]:
    import json

    return [json.loads(line) for line in (Path(run_dir) / "log.jsonl").read_text().splitlines()]


def weights(run_dir, name: str = "last.pt") -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's networks and optimizer under a flat name."""
    checkpoint = torch.load(Path(run_dir) / name, weights_only=True)
    flat = {}

    def walk(prefix, value):
        if isinstance(value, torch.Tensor):
            flat[prefix] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}/{key}", item)

    walk("", {key: value for key, value in checkpoint.items() if key != "meta"})
    return flat


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, f"{len(different)} of {len(a)} tensors differ: {different[:3]}"


def assert_unlabeled_labels_are_not_read(script, quick, monkeypatch, key="pseudo/accuracy"):
    """Other labels on the unlabeled images change nothing but the diagnostic."""
    flags = {"log_pseudo_accuracy": True} | active(script)
    first = script.main(quick(script.Args, exp_name="a", **flags))
    from torchvision.tv_tensors import wrap

    from common.datasets import Shapes

    load, open_data, labeled = Shapes.load, script.open_data, set()

    def remember(*args, **flags):
        data, split = open_data(*args, **flags)
        labeled.update(split.labeled, data.val_ids)
        return data, split

    def load_wrong(self, image_id, with_label=True):
        image, label = load(self, image_id, with_label)
        return image, label if image_id in labeled else wrap(label * 0 + 3, like=label)

    monkeypatch.setattr(script, "open_data", remember)
    monkeypatch.setattr(Shapes, "load", load_wrong)
    second = script.main(quick(script.Args, exp_name="b", **flags))
    assert_same(weights(first["run_dir"]), weights(second["run_dir"]))
    rows = [[r for r in read_log(run["run_dir"]) if key in r][-1] for run in (first, second)]
    assert rows[0][key] != rows[1][key]


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> bytes) on 127.0.0.1; the attributes make it misbehave."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests = {}, []  # requests: (path, Range header)
        self.honors_range, self.break_after, self.breaks = True, None, 0
        self.hang, self.closing, self.delay = None, threading.Event(), 0.0  # hang: "start", "body"
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, start = self.server, 0
        wanted = self.headers.get("Range")
        server.requests.append((self.path, wanted))
        if server.hang == "start":
            server.closing.wait()
            return
        time.sleep(server.delay)
        body = server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        if wanted and server.honors_range:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if server.hang == "body":
            self.wfile.write(body[start : start + 1000])
            server.closing.wait()
        elif server.breaks:
            server.breaks -= 1
            self.wfile.write(body[start : start + server.break_after])
        else:
            self.wfile.write(body[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    from common import splits

    server = Server()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(splits, "PAUSE", 0.0)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()
