"""A run that was killed goes on as if it had not been."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dnazen.train.checkpoint import list_checkpoints
from tests.train.launch import log_history, run, run_until, steps

KILLER = Path(__file__).with_name("killer.py")


def tensors(value, prefix="") -> dict[str, torch.Tensor]:
    """All tensors in a nested state, by path."""
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {name: tensor for key, item in items for name, tensor in tensors(item, f"{prefix}/{key}").items()}


def optimizer_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Tensors of the optimizer, of Trainer's own file or of DeepSpeed's."""
    files = sorted(checkpoint.rglob("*optim_states.pt")) or [checkpoint / "optimizer.pt"]
    return {
        f"{file.name}{name}": tensor
        for file in files
        for name, tensor in tensors(torch.load(file, weights_only=False)).items()
    }


def assert_same_run(expected: Path, found: Path) -> None:
    """Weights, optimizer and loss log are equal bit for bit."""
    assert load_file(expected / "model.safetensors").keys() == load_file(found / "model.safetensors").keys()
    for name, tensor in load_file(expected / "model.safetensors").items():
        assert torch.equal(tensor, load_file(found / "model.safetensors")[name]), name
    expected_state, found_state = optimizer_state(expected), optimizer_state(found)
    assert expected_state.keys() == found_state.keys() and len(expected_state) > 2
    for name, tensor in expected_state.items():
        assert torch.equal(tensor, found_state[name]), name
    assert log_history(expected) == log_history(found)
    assert len(steps(expected, "loss")) >= 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [{}, {"zero": 2, "bf16": True}, {"zero": 2, "processes": 2, "bf16": True}, {"zero": 3, "processes": 2}],
    ids=["plain", "zero2-1", "zero2-2", "zero3-2"],
)
def test_killed_and_resumed_equals_straight_bit_for_bit(prepared, tmp_path, layout):
    """8 steps straight, against a kill -9 after the checkpoint of step 4. Drop-out is on: its generator counts."""
    arguments = {**prepared.arguments(), **layout, "model": prepared.dropout_model, "max_steps": 8}
    run(**arguments, output_dir=tmp_path / "straight")
    run_until(tmp_path / "killed" / "checkpoint-4" / "checkpoint.json", **arguments, output_dir=tmp_path / "killed")
    assert not (tmp_path / "killed" / "final").exists()
    output = run(**arguments, output_dir=tmp_path / "killed").stdout
    assert "resuming from checkpoint-" in output
    assert_same_run(tmp_path / "straight" / "checkpoint-8", tmp_path / "killed" / "checkpoint-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill_at, layout",
    [
        ("optimizer.pt", {}),
        ("checkpoint.json", {}),
        ("rename", {}),
        ("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", {"zero": 2, "processes": 2, "bf16": True}),
    ],
    ids=["optimizer", "manifest", "rename", "zero2-2"],
)
def test_kill_while_a_checkpoint_is_written(prepared, tmp_path, kill_at, layout):
    """Killed in the middle of writing the checkpoint of step 8, the run goes on from that of step 4."""
    arguments = {**prepared.arguments(), **layout, "max_steps": 8}
    run(expect=None, **arguments, script=KILLER, kill_at=kill_at, kill_step=8, output_dir=tmp_path / "killed")
    assert [path.name for path in list_checkpoints(tmp_path / "killed")] == ["checkpoint-4"]
    assert (tmp_path / "killed" / ".checkpoint-8.tmp").exists()
    output = run(**arguments, output_dir=tmp_path / "killed").stdout
    assert "resuming from checkpoint-4" in output and "removing" in output
    assert not list((tmp_path / "killed").glob(".checkpoint-*"))
    run(**arguments, output_dir=tmp_path / "straight")
    assert_same_run(tmp_path / "straight" / "checkpoint-8", tmp_path / "killed" / "checkpoint-8")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_resume_on_another_number_of_processes(prepared, tmp_path, before, after, zero):
    """DeepSpeed's universal checkpoint; the data goes on where it was, so the losses are those of an unbroken run."""
    arguments = {**prepared.arguments(), "zero": zero, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    accumulation = {1: 2, 2: 1}

    def go(processes: int, name: str, max_steps: int) -> None:
        layout = {"processes": processes, "gradient_accumulation_steps": accumulation[processes]}
        run(**{**arguments, "max_steps": max_steps}, **layout, output_dir=tmp_path / name)

    go(before, "moved", 4)
    shutil.copytree(tmp_path / "moved", tmp_path / "stayed")
    go(after, "moved", 8)
    go(before, "stayed", 8)
    expected, found = (steps(tmp_path / name / "checkpoint-8", "loss", "epoch") for name in ("stayed", "moved"))
    assert len(expected) == 8 and expected[0][0] - expected[-1][0] > 0.1, "the losses must move for the test to tell"
    # fp32 sums in another order, through four optimizer steps
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.slow
def test_cut_checkpoint_is_passed_over_and_said_so(prepared, tmp_path):
    arguments = {**prepared.arguments(), "output_dir": tmp_path}
    run(**{**arguments, "max_steps": 8})
    cut = tmp_path / "checkpoint-8" / "optimizer.pt"
    cut.write_bytes(cut.read_bytes()[:1000])
    output = run(**{**arguments, "max_steps": 8}).stdout
    assert "passing over a checkpoint that is not whole" in output and "optimizer.pt: expected" in output
    assert "resuming from checkpoint-4" in output
    # finished already: nothing is trained again, and the report is made anew
    output = run(**{**arguments, "max_steps": 8}).stdout
    assert "resuming from checkpoint-8" in output and "'loss'" not in output and "Masked tokens of" in output


@pytest.mark.slow
def test_other_data_or_masking_is_refused(prepared, tmp_path):
    arguments = {**prepared.arguments(), "output_dir": tmp_path, "max_steps": 4}
    run(**arguments)
    before = json.loads((tmp_path / "checkpoint-4" / "checkpoint.json").read_text())
    output = run(expect=1, **{**arguments, "seed": 7, "max_batch_tokens": 700, "max_steps": 8}).stdout
    assert "belongs to another run" in output and "max_batch_tokens: the checkpoint has 640, this run 700" in output
    assert "seed: the checkpoint has 42, this run 7" in output
    assert json.loads((tmp_path / "checkpoint-4" / "checkpoint.json").read_text()) == before
