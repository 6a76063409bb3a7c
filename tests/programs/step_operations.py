"""On processes of a group: operations of an optimizer step of `base` in bf16, as JSON: by stage, those of ours, those
that DeepSpeed adds to the backward before it, and those of DeepSpeed's own step.

They depend on the number of parameters, not on their width, which is small here. Views are not counted: they launch
nothing.
"""

import json

import deepspeed
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.training.script import exit_process, leave_process_group
from tests.helpers.zero_engine import build_engine, take_norm_at_once


class CountLaunches(TorchDispatchMode):
    """Counts operations that compute something."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [value.alias_info for value in func._schema.returns]
        self.count += not aliases or any(alias is None or alias.is_write for alias in aliases)
        return func(*args, **(kwargs or {}))


def count(stage: int, at_once: bool) -> tuple[int, int]:
    """Operations of the second step, the first that makes no states, and of DeepSpeed in its backward."""
    config = DNAZenConfig.from_size(
        "base", vocab_size=64, ngram_vocab_size=32, hidden_size=24, num_attention_heads=12, intermediate_size=24
    )
    model = DNAZenForMaskedLM(config)
    vectors, matrices = ([p for p in model.parameters() if (p.dim() > 1) == is_matrix] for is_matrix in (False, True))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    engine = build_engine(model, optimizer, stage)
    if at_once:
        take_norm_at_once(engine)
    labels = torch.arange(5, 25)
    batch = {"input_ids": labels, "labels": labels, "cu_seqlens": torch.tensor([0, 20], dtype=torch.int32)}
    for _ in range(2):
        loss = engine(**batch, max_seqlen=20).loss
        with CountLaunches() as backward:
            engine.backward(loss)
        with CountLaunches() as launches:
            engine.step()
    engine.destroy()
    loss = DNAZenForMaskedLM(config).to(torch.bfloat16)(**batch, max_seqlen=20).loss
    with CountLaunches() as own:
        loss.backward()
    return launches.count, backward.count - own.count


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    counts = {f"ZeRO-{stage}": [*count(stage, True), count(stage, False)[0]] for stage in (1, 2, 3)}
    print(json.dumps(counts), flush=True)
    leave_process_group()
    exit_process(0)
