"""What is done around DeepSpeed 0.19: checkpoints that load on another number of processes, and safe to unpickle."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def pickle_stages_by_value() -> None:
    """Let this process pickle DeepSpeed's `ZeroStageEnum` by its value.

    Early versions of Python 3.11 pickle it by a call of `getattr`, which a checkpoint must not hold.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    ZeroStageEnum.__reduce_ex__ = lambda stage, protocol: (type(stage), (stage.value,))


def convert_to_universal(checkpoint: Path) -> None:
    """Add DeepSpeed's universal form to a checkpoint, which loads on any number of processes.

    Raises:
        RuntimeError: the conversion failed; the message ends with its output.
    """
    if (checkpoint / "latest_universal").is_file():
        return
    tag = (checkpoint / "latest").read_text().strip()
    target = checkpoint / f"{tag}_universal"
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "dnazen.pretraining.universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint / tag), "--output_folder", str(target)]
    # the launcher's variables would make the converter join this run's process group
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{checkpoint}: conversion to a universal checkpoint failed:\n{result.stderr[-2000:]}")


def load_universal(settings: dict[str, Any]) -> None:
    """Set in DeepSpeed's configuration that its engine loads checkpoints in their universal form."""
    settings.setdefault("checkpoint", {})["load_universal"] = True


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """All that each parameter group says beside its parameters."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def restore_groups(optimizer: torch.optim.Optimizer, settings: list[dict[str, Any]], rates: list[float]) -> None:
    """Give each parameter group its settings and learning rate back after a universal checkpoint was loaded.

    DeepSpeed loads the first group's settings into every group: biases and norms would decay too, and all learn at one
    rate.
    """
    for group, own, rate in zip(optimizer.param_groups, settings, rates, strict=True):
        group |= own | {"lr": rate}


def separate_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter a step counter of its own, on the device where the optimizer reads it.

    From a universal checkpoint DeepSpeed loads, under ZeRO-3, one counter on the CPU for all groups, and each of them
    would advance it. It goes past `Optimizer.load_state_dict`, which moves counters to the parameter's device if the
    optimizer is fused or capturable: its kernel reads them there, and would read a pointer to the host's memory.
    """
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for parameter, state in optimizer.state.items():
        device = parameter.device if on_device else state["step"].device
        state["step"] = state["step"].to(device, copy=True)
