"""DeepSpeed's engine by the configurations that are shipped, without a Trainer."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch

from dnazen.training.gradients import NormAtOnce

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def build_engine(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    stage: int,
    batch_size: int = 1,
    accumulation: int = 1,
    bf16: bool = True,
    gradient_clipping: float = 1.0,
    **zero_options: Any,
) -> deepspeed.DeepSpeedEngine:
    """What Trainer would make of `zero<stage>.json`, with some options of `zero_optimization` replaced."""
    settings = json.loads((CONFIGS / f"zero{stage}.json").read_text())
    settings["zero_optimization"] |= zero_options
    settings |= {
        "bf16": {"enabled": bf16}, "gradient_clipping": gradient_clipping,
        "gradient_accumulation_steps": accumulation, "train_micro_batch_size_per_gpu": batch_size,
        "train_batch_size": batch_size * accumulation * torch.distributed.get_world_size(),
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def take_norm_at_once(engine: deepspeed.DeepSpeedEngine) -> None:
    """What Trainer's callback does when training begins."""
    NormAtOnce().on_train_begin(None, None, None, optimizer=SimpleNamespace(optimizer=engine.optimizer))
