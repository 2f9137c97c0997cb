"""Steps on a GPU that is not there: nothing on the wrong device, and nothing waits for it.

Tensors on "cuda" have a shape, a type and a device here, but no values (torch's FakeTensor), and
every operation says if it would mix devices or need a value. Backward passes are left out.
"""

import pytest
import torch
from conftest import SCRIPTS
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py has the real thing"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),  # deepcopy
]


class FakeGPU(TorchDispatchMode):
    """What touches "cuda" is faked, everything else is computed."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        leaves = tree_leaves((args, kwargs))
        given = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        wanted = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not given and not wanted:
            return function(*args, **kwargs)
        to_cpu = function == aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        assert not to_cpu, "a copy to the CPU waits for the GPU"
        if function == aten.copy_.default and not isinstance(args[0], FakeTensor):
            assert args[2:] == (True,), "a blocking copy to the CPU"
            return args[0]
        with self.fake:
            return function(*args, **kwargs)


class Event:
    """torch.cuda.Event of a GPU that is always done."""

    record = synchronize = query = lambda self: True


def to(module, device, memory_format=torch.preserve_format):
    """nn.Module.to, which cannot move a fake tensor again."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, value in held.items():
                if value is not None and not isinstance(value, FakeTensor):
                    layout = memory_format if value.ndim == 4 else torch.preserve_format
                    moved = value.detach().to(device, memory_format=layout)
                    is_parameter = held is part._parameters
                    held[name] = nn.Parameter(moved, value.requires_grad) if is_parameter else moved
    return module


def no_gradients(outputs, inputs, *_, **__):
    inputs = [inputs] if isinstance(inputs, torch.Tensor) else inputs
    return tuple(torch.zeros_like(value) for value in inputs)


@pytest.fixture
def fake_gpu(monkeypatch):
    mode = FakeGPU()
    make = torch.tensor

    def tensor(*args, device=None, **kwargs):  # it creates where no mode sees it
        return make(*args, **kwargs) if device is None else make(*args, **kwargs).to(device)

    for owner, name, value in [
        (FakeTensorMode, "avoid_device_init", True),
        (fake_tensor, "init_gpu_context", lambda _: None),
        (torch, "tensor", tensor),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "set_device", lambda _: None),
        (torch.cuda, "is_bf16_supported", lambda **_: True),
        (torch.cuda, "get_device_name", lambda: "fake"),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "Event", Event),
        (torch.Tensor, "pin_memory", lambda self, *_: self),
        (torch.Tensor, "backward", lambda self: None),
        (torch.autograd, "grad", no_gradients),
        (nn.Module, "to", to),
    ]:
        monkeypatch.setattr(owner, name, value)
    return mode


def test_the_fake_gpu_sees_what_it_must(fake_gpu):
    with fake_gpu:
        here, there = torch.ones(3), torch.ones(3).to("cuda:0")
        assert (there + 1).device.type == "cuda"
        for wrong in (
            lambda: here + there, there.tolist, there.cpu, there.sum().item, there.nonzero,
            lambda: there[there > 0], lambda: here.copy_(there),
        ):  # fmt: skip
            with pytest.raises((AssertionError, RuntimeError)):
                wrong()


FLAGS = {
    "self_correcting": [{"correction": "none"}, {"correction": "conv"}],
    "cps": [{"supervised_loss": "ohem"}, {"cps_target": "probability"}],
    "cutmix_mt": [{"mask_mode": "cutout"}],
    "ael": [{"labeled_consistency": True, "paste_any": True}],
    "cct": [{"supervised_loss": "abce"}],
    "gct": [{"joint_batch": True, "lambda_dc": 0.0}],
    "cmb": [{"class_balance": True, "bank_attention": "off"}],
    "dcc": [{"epsilon": 1e-8}],
}


@pytest.mark.parametrize(
    ("name", "flags"),
    [(name, flags) for name in SCRIPTS for flags in [{}, *FLAGS.get(name, [])]],
    ids=str,
)
def test_steps_neither_mix_devices_nor_wait(name, flags, fake_gpu, quick, monkeypatch):
    script, steps = SCRIPTS[name], []

    def average(history, done, *_):
        steps.append(done)
        return {}

    monkeypatch.setattr(script, "average", average)
    monkeypatch.setattr(script, "validate", lambda *_: {"val/miou": 0.5})
    for method in ("save", "log"):
        monkeypatch.setattr(script.Run, method, lambda *_, **__: None)
    if name != "supervised":
        flags = {"log_pseudo_accuracy": True} | flags
    if name == "ael":
        monkeypatch.setattr(script, "AHEAD", 1)  # steps between the choice of images and their use
    with fake_gpu:
        script.main(quick(script.Args, device="cuda", batch_size=8, steps=2, **flags))
    assert steps == [2]  # it looks for NaN where it logs alone
