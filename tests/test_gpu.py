"""What only a GPU can show; skipped without one."""

import pytest
import torch
from conftest import SCRIPTS, assert_same, read_log, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("flags", [
    {"amp": "off"}, {"amp": "bf16"}, {"amp": "fp16"}, {"amp": "bf16", "compile": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("script", list(SCRIPTS.values()), ids=list(SCRIPTS))
def test_training_falls(script, flags, quick):
    result = script.main(quick(script.Args, device="cuda", steps=60, log_every=1, **flags))
    loss = [row["loss/sup"] for row in read_log(result["run_dir"])]
    assert sum(loss[-10:]) < 0.9 * sum(loss[:10])


@pytest.mark.parametrize("script", list(SCRIPTS.values()), ids=list(SCRIPTS))
def test_deterministic_runs_are_equal(script, quick):
    flags = {"device": "cuda", "deterministic": True, "amp": "off", "steps": 10}
    first, second = (script.main(quick(script.Args, exp_name=name, **flags)) for name in ("a", "b"))
    assert_same(weights(first["run_dir"]), weights(second["run_dir"]))
