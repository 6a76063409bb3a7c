"""Flags that choose how to compute change neither loss nor gradient."""

import re

import numpy as np
import pytest

from tests.helpers.genome import prepare_part
from tests.helpers.launch import run, steps

# fp32: compiled sums in another order, over the few steps of a test
TOLERANCE = {"rtol": 2e-5, "atol": 1e-6}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "zero": 2},
        {"torch_compile_backend": "aot_eager"},
        {"torch_compile_backend": "aot_eager", "zero": 2},
        {"torch_compile_backend": "aot_eager", "gradient_checkpointing": True, "zero": 1},
    ],
    ids=lambda flags: "-".join(f"{name}={value}" for name, value in flags.items()),
)
def test_losses_are_those_without_the_flag(prepared, finished_run, tmp_path, flags, monkeypatch):
    monkeypatch.setenv("TORCH_LOGS", "+dynamo")
    output = run(**prepared.arguments(), **flags, output_dir=tmp_path).stdout
    assert "attention sdpa (flash_attention_4" in output and ": it needs a CUDA device, and this is cpu" in output
    compiled = set(re.findall(r"start compiling \S+ \S*/(\w+\.py)", output))
    assert compiled == ({"encoder.py"} if "torch_compile_backend" in flags else set())
    names = "loss", "grad_norm"
    expected, found = (steps(folder / "checkpoint-4", *names) for folder in (finished_run, tmp_path))
    np.testing.assert_allclose(found, expected, **TOLERANCE)


@pytest.mark.slow
def test_compilation_does_not_go_with_zero3(prepared, tmp_path):
    output = run(expect=None, **prepared.arguments(), torch_compile=True, zero=3, output_dir=tmp_path).stdout
    assert "dnazen: error: --torch-compile does not go with ZeRO-3" in output


@pytest.mark.slow
def test_kernels_and_batches_made_on_the_device_change_nothing(prepared, tmp_path):
    """Matching, masking and fusion interpreted on the CPU, as they run on a GPU: slowly, so on little data."""
    prepare_part(tmp_path, num_bases=20_000, max_tokens=126)
    data = {name: tmp_path / name for name in ("corpus", "ngrams")}
    short = {**prepared.arguments(), **data, "max_batch_tokens": 160, "gradient_accumulation_steps": 2, "max_steps": 3}
    runs = [
        run(**short, **flags, output_dir=tmp_path / name) and tmp_path / name / "checkpoint-3"
        for name, flags in {"plain": {}, "kernels": {"impl": "triton", "zero": 2}}.items()
    ]
    expected, found = (steps(checkpoint, "loss", "grad_norm", "mask_rate") for checkpoint in runs)
    assert len(expected) == 3
    np.testing.assert_allclose(found, expected, **TOLERANCE)
