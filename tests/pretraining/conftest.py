"""Runs that several tests look at; each test that goes on from one works on a copy."""

import shutil
from pathlib import Path

import pytest

from dnazen.pretraining.command import main
from tests.helpers.launch import flags, run

STRAIGHT = {
    "plain": {},
    "zero2-1": {
        "zero": 2, "bf16": True, "optim": "muon", "muon_learning_rate": 2e-3, "mlm_probability_end": 0.6,
        "lr_scheduler_type": "warmup_stable_decay",
    },
    "zero2-2": {"zero": 2, "processes": 2, "bf16": True},
    "zero3-2": {"zero": 3, "processes": 2},
}  # fmt: skip


@pytest.fixture
def refused(monkeypatch, capsys):
    """Call the entry point in this process with arguments that it must refuse; returns the last line on stderr."""

    def call(**arguments) -> str:
        monkeypatch.setattr("sys.argv", ["pretrain.py", *flags(**arguments)])
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # TrainingArguments set it
        assert main() == 1
        return capsys.readouterr().err.splitlines()[-1]

    return call


@pytest.fixture(scope="session")
def finished_run(prepared, tmp_path_factory) -> Path:
    """Output folder of a run of 4 steps on one process without DeepSpeed, with checkpoints of steps 2 and 4,
    and beside them what it said, `output.txt`."""
    output_dir = tmp_path_factory.mktemp("finished")
    result = run(**{**prepared.arguments(), "save_steps": 2}, output_dir=output_dir)
    (output_dir / "output.txt").write_text(result.stdout)
    return output_dir


@pytest.fixture
def finished(finished_run, tmp_path) -> Path:
    """A copy of `finished_run`."""
    return shutil.copytree(finished_run, tmp_path / "finished")


@pytest.fixture(scope="session")
def straight_run(prepared, tmp_path_factory):
    """Output folder of an unbroken run of 8 steps with drop-out, whose generator counts, by a name of `STRAIGHT`."""
    folders: dict[str, Path] = {}

    def get(layout: str) -> Path:
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp(layout)
            run(**straight_arguments(prepared, layout), output_dir=folders[layout])
        return folders[layout]

    return get


def straight_arguments(prepared, layout: str) -> dict:
    """What `straight_run` was called with."""
    return {**prepared.arguments(), **STRAIGHT[layout], "model": prepared.dropout_model, "max_steps": 8}
