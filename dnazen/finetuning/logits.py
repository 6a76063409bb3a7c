"""What a model computes for encoded rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from dnazen.batches.streaming import run_batches
from dnazen.finetuning.preprocessing import Preprocessor
from dnazen.finetuning.tasks import Task


def compute_logits(
    model: nn.Module, preprocessor: Preprocessor, task: Task, input_ids: list[np.ndarray]
) -> list[np.ndarray]:
    """Logits of each row, in fp32: `[num_labels]`, or `[tokens, num_labels]` if the task's are per token."""

    def compute(batch: dict[str, Any]) -> Sequence[Tensor]:
        logits = model(**batch).logits.float().cpu()
        return logits.split(batch["cu_seqlens"].diff().tolist()) if task.is_per_token else logits.unbind()

    rows = enumerate([row] for row in input_ids)
    device = next(model.parameters()).device
    return [result.numpy() for _, (result,) in run_batches(rows, preprocessor.make_collator(), compute, device)]
