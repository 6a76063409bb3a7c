"""A run that was killed goes on as if it had not been."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dnazen.files import lock_run, sha256_file
from dnazen.pretraining.checkpoint import list_checkpoints
from tests.helpers.launch import PROGRAMS, copy_checkpoint, log_history, run, run_until, steps
from tests.pretraining.conftest import STRAIGHT, straight_arguments

KILLER = PROGRAMS / "killer.py"


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
@pytest.mark.parametrize("layout", STRAIGHT)
def test_killed_and_resumed_equals_straight_bit_for_bit(prepared, straight_run, tmp_path, layout):
    """8 steps straight, against a kill -9 after the checkpoint of step 4. Drop-out is on: its generator counts."""
    arguments = {**straight_arguments(prepared, layout), "output_dir": tmp_path}
    run_until(tmp_path / "checkpoint-4" / "checkpoint.json", tmp_path / "output.txt", **arguments)
    assert not (tmp_path / "final").exists()
    assert "resuming from checkpoint-4" in run(**arguments).stdout
    assert_same_run(straight_run(layout) / "checkpoint-8", tmp_path / "checkpoint-8")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero2-2", "zero3-2"])
def test_processes_draw_drop_out_of_their_own(straight_run, layout):
    states = [straight_run(layout) / "checkpoint-8" / f"rng_state_{rank}.pth" for rank in (0, 1)]
    generators = [torch.Generator() for _ in states]
    for generator, path in zip(generators, states, strict=True):
        generator.set_state(torch.load(path, weights_only=False)["cpu"])
    assert [generator.initial_seed() for generator in generators] == [42, 43]
    first, second = (torch.randint(2**63 - 1, (8,), generator=generator) for generator in generators)
    assert not (first == second).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill_at, layout",
    [
        ("optimizer.pt", "plain"),
        ("checkpoint.json", "plain"),
        ("rename", "plain"),
        ("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero2-2"),
    ],
    ids=["optimizer", "manifest", "rename", "zero2-2"],
)
def test_kill_while_a_checkpoint_is_written(prepared, straight_run, tmp_path, kill_at, layout):
    """Killed in the middle of writing the checkpoint of step 8, the run goes on from that of step 4."""
    arguments = {**straight_arguments(prepared, layout), "output_dir": tmp_path}
    run(expect=None, **arguments, script=KILLER, kill_at=kill_at, kill_step=8)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4"]
    assert (tmp_path / ".checkpoint-8.tmp").exists()
    output = run(**arguments).stdout
    assert "resuming from checkpoint-4" in output and "removing" in output
    assert not list(tmp_path.glob(".checkpoint-*"))
    assert_same_run(straight_run(layout) / "checkpoint-8", tmp_path / "checkpoint-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "before, after, zero, bf16, optim",
    [
        (2, 1, 1, False, "muon"),
        (2, 1, 2, False, "adamw_torch_fused"),
        (1, 2, 2, True, "muon"),
        (2, 1, 3, True, "adamw_torch_fused"),
        (1, 2, 3, False, "adamw_torch_fused"),
    ],
)
def test_resume_on_another_number_of_processes(prepared, tmp_path, before, after, zero, bf16, optim):
    """DeepSpeed's universal checkpoint; the data goes on where it was, so the losses are those of an unbroken run."""
    arguments = {**prepared.arguments(), "zero": zero, "bf16": bf16, "learning_rate": 1e-2, "max_steps": 8}
    arguments |= {"optim": optim, "mlm_probability_end": 0.3}
    accumulation = {1: 2, 2: 1}

    def go(processes: int, name: str) -> str:
        layout = {"processes": processes, "gradient_accumulation_steps": accumulation[processes]}
        return run(**arguments, **layout, lr_scheduler_type="constant", output_dir=tmp_path / name).stdout

    go(before, "stayed")
    copy_checkpoint(tmp_path / "stayed" / "checkpoint-4", tmp_path / "moved")
    assert "resuming from checkpoint-4" in go(after, "moved")
    expected, found = (steps(tmp_path / name / "checkpoint-8", "loss", "epoch") for name in ("stayed", "moved"))
    assert len(expected) == 8 and expected[0][0] - expected[-1][0] > 0.1, "the losses must move for the test to tell"
    # fp32 sums in another order, through four optimizer steps; in bf16 each gradient is rounded to 2^-9 of itself
    np.testing.assert_allclose(found, expected, rtol=2e-3 if bf16 else 2e-5)


@pytest.mark.slow
def test_cut_checkpoint_is_passed_over_and_said_so(prepared, finished):
    cut = finished / "checkpoint-4" / "optimizer.pt"
    cut.write_bytes(cut.read_bytes()[:1000])
    output = run(**{**prepared.arguments(), "save_steps": 2}, output_dir=finished).stdout
    assert "passing over a checkpoint that is not whole, now checkpoint-4.broken" in output
    assert "optimizer.pt: expected" in output and "resuming from checkpoint-2" in output
    assert (finished / "checkpoint-4.broken" / "optimizer.pt").stat().st_size == 1000
    assert [path.name for path in list_checkpoints(finished)] == ["checkpoint-4", "checkpoint-2"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "zero2-1", "zero3-2"])
def test_finished_run_says_the_same_again(prepared, straight_run, tmp_path, layout):
    """Nothing is trained, the report is the same, and the model is there again if it was deleted."""
    output_dir = shutil.copytree(straight_run(layout), tmp_path / "run")
    report, model = (output_dir / "report.json").read_text(), load_file(output_dir / "final" / "model.safetensors")
    shutil.rmtree(output_dir / "final")
    output = run(**straight_arguments(prepared, layout), output_dir=output_dir).stdout
    assert "resuming from checkpoint-8" in output and "nothing is left to train" in output and "'loss'" not in output
    assert (output_dir / "report.json").read_text() == report
    again = load_file(output_dir / "final" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.items()) and len(again) == len(model) > 10


@pytest.mark.slow
def test_last_step_is_evaluated_and_saved_whatever_the_strategies(prepared, tmp_path):
    never = {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "eval_on_start": True}
    output = run(**{**prepared.arguments(), **never, "output_dir": tmp_path, "max_steps": 2}).stdout
    assert f"newest checkpoint: {tmp_path}/checkpoint-2" in output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["step"] == 2 and report["trained_tokens"] > 600 and report["held_out"]["num_targets"] > 100


@pytest.mark.slow
def test_named_checkpoint_older_than_the_newest_is_refused(prepared, finished, refused):
    """The run would write among the newer ones, and the oldest are deleted first: its own."""
    arguments = {**prepared.arguments(), "output_dir": finished, "save_steps": 2, "max_steps": 6}
    older = {**arguments, "resume_from_checkpoint": finished / "checkpoint-2"}
    assert "holds newer checkpoints" in refused(**older)
    (finished / "checkpoint-4").rename(finished / "kept")
    output = run(**older).stdout
    assert "resuming from checkpoint-2" in output and "changed: max_steps: the checkpoint has 4, this run 6" in output
    assert [path.name for path in list_checkpoints(finished)] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.slow
def test_checkpoint_that_would_run_code_is_refused(prepared, straight_run, tmp_path):
    """Its checksums are right: whoever made the file made the list of checksums too."""
    copy_checkpoint(straight_run("zero2-1") / "checkpoint-8", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-8"
    (file,) = checkpoint.rglob("*optim_states.pt")
    state = torch.load(file, weights_only=False)
    torch.save({**state, "extra": Payload(tmp_path / "ran")}, file)
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    manifest["files"][str(file.relative_to(checkpoint))] = [file.stat().st_size, sha256_file(file)]
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))
    arguments = {**straight_arguments(prepared, "zero2-1"), "max_steps": 10}
    output = run(expect=1, **arguments, output_dir=tmp_path / "run").stdout
    assert re.search(f"{re.escape(str(file))}: reading it would call .*posix.mkdir", output)
    assert "Traceback" not in output and not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_second_run_in_the_same_folder_is_refused(prepared, refused, finished):
    """And, once the first one has ended, goes on."""
    with lock_run(finished):
        assert "another run is writing there" in refused(**prepared.arguments(), output_dir=finished)
    assert "nothing is left to train" in run(**prepared.arguments(), output_dir=finished).stdout


@pytest.mark.slow
def test_other_data_masking_or_optimizer_is_refused(prepared, finished):
    before = json.loads((finished / "checkpoint-4" / "checkpoint.json").read_text())
    others = {"seed": 7, "max_batch_tokens": 700, "max_steps": 8, "learning_rate": 1e-4, "zero": 2}
    output = run(expect=1, **{**prepared.arguments(), **others}, output_dir=finished).stdout
    assert "engine: the checkpoint has 'PyTorch', this run 'DeepSpeed ZeRO-2'" in output
    assert "learning_rate: the checkpoint has 0.0005, this run 0.0001" in output
    assert "belongs to another run" in output and "max_batch_tokens: the checkpoint has 640, this run 700" in output
    assert "seed: the checkpoint has 42, this run 7" in output
    assert json.loads((finished / "checkpoint-4" / "checkpoint.json").read_text()) == before
