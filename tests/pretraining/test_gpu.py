"""Training on a GPU against training on a CPU. Without a GPU the same tests hold DeepSpeed against plain PyTorch.

What is expected always comes from a CPU: in processes of their own, to which the GPU is not shown.
"""

import json

import numpy as np
import pytest
import torch

from tests.helpers.launch import copy_checkpoint, run, steps

NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
# A logit passes through some 40 operations, two layers forward and backward. In fp32 each sums up to 256 products,
# whose roundings, 2^-24 of them, add up as a random walk: 40 * 16 * 2^-24 = 4e-5. In bf16 sums are fp32's and each
# result is rounded by 2^-9: sqrt(40) * 2^-9 = 1.2e-2 of a logit; a loss is the mean over some 20 masked tokens.
TOLERANCE = {"fp32": 4e-5, "bf16": 1.2e-2 / 20**0.5}
FAST = {"learning_rate": 3e-2, "lr_scheduler_type": "constant", "warmup_steps": 0, "residual_learning_rate": 1.0}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def cpu_run(**arguments) -> None:
    """`run` without the GPU."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NO_GPU.items():
            patch.setenv(name, value)
        run(**arguments)


def short_arguments(prepared) -> dict:
    return {**prepared.arguments(), **FAST, "max_batch_tokens": 160, "max_steps": 3}


@pytest.fixture(scope="module")
def cpu_losses(prepared, tmp_path_factory) -> np.ndarray:
    """Of three steps in fp32."""
    folder = tmp_path_factory.mktemp("cpu")
    cpu_run(**short_arguments(prepared), output_dir=folder)
    return np.array(steps(folder / "checkpoint-3", "loss")).ravel()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_three_steps_have_the_losses_of_a_cpu(prepared, tmp_path, device, cpu_losses, precision):
    """In bf16 under ZeRO-2, whose weights are bf16 too; in fp32 only where nothing else would differ."""
    here = {"zero": 2, "bf16": True} if precision == "bf16" else {"zero": 2} if device.type == "cpu" else {}
    output = run(**{**short_arguments(prepared), **here}, output_dir=tmp_path).stdout
    assert f"1 process(es) on {device_name(device)}," in output
    found = np.array(steps(tmp_path / "checkpoint-3", "loss")).ravel()
    assert len(cpu_losses) == 3
    moved = abs(cpu_losses[2] - cpu_losses[0]) / cpu_losses[0]
    assert moved > 3 * TOLERANCE[precision], "the losses must move for the test to tell"
    np.testing.assert_allclose(found, cpu_losses, rtol=TOLERANCE[precision])


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_checkpoint_of_two_cpu_processes_goes_on_here(prepared, tmp_path, device, zero):
    """DeepSpeed's universal checkpoint, whose states it loads on the CPU; the losses are those of a run that stayed."""
    arguments = {**prepared.arguments(), **FAST, "learning_rate": 1e-2, "max_steps": 8, "zero": zero}
    # torchrun: `deepspeed` would show its processes the GPU whatever the environment says
    cpu_run(**arguments, processes=2, gradient_accumulation_steps=1, output_dir=tmp_path / "stayed")
    copy_checkpoint(tmp_path / "stayed" / "checkpoint-4", tmp_path / "moved")
    output = run(**arguments, gradient_accumulation_steps=2, output_dir=tmp_path / "moved").stdout
    assert "resuming from checkpoint-4" in output and "1 process(es)" in output
    expected, found = (
        np.array(steps(tmp_path / name / "checkpoint-8", "loss", "epoch")) for name in ("stayed", "moved")
    )
    assert len(expected) == 8 and expected[0, 0] - expected[-1, 0] > 0.1, "the losses must move for the test to tell"
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE["fp32"])


@pytest.mark.slow
def test_the_main_job_runs_here(prepared, tmp_path, device):
    """`make pretrain`'s command on a part of the genome, a few steps long."""
    short = {"max_steps": 3, "eval_steps": 3, "max_batch_tokens": 1024}
    launcher = "deepspeed" if device.type == "cuda" else None  # `tests/test_readme.py` starts it on a CPU
    output = run(zero=2, launcher=launcher, fasta=prepared.fasta, work_dir=tmp_path, **short).stdout
    assert f"bf16, DeepSpeed ZeRO-2, 1 process(es) on {device_name(device)}," in output
    folder = tmp_path / "part" / "tiny"
    report = json.loads((folder / "report.json").read_text())
    assert report["step"] == 3 and (folder / "final" / "model.safetensors").is_file()
    assert "Hidden tokens of held-out sequences" in output
