"""GUE's data sets and how each is fine-tuned: DNABERT-2's published protocol.

Source: `finetune/scripts/run_dnabert2.sh` and README of MAGICS-LAB/DNABERT_2, commit 7d569d7: learning rate 3e-5 for
all; 8 sequences on each of 4 GPUs, "global batch size 32" (virus/covid: 32 on each, 128 a step, where it has 32 here as
the others have); evaluated every 200 or 400 steps.
"""

from typing import NamedTuple

from dnazen.gue.paper import DATASETS

SEQUENCES_PER_STEP = 32


class Protocol(NamedTuple):
    """How a data set is trained on."""

    epochs: int
    max_length: int  # tokens, special ones included
    eval_steps: int
    warmup_steps: int = 50
    max_steps: int = -1  # instead of epochs, if positive


def _protocol(dataset: str) -> Protocol:
    group, name = dataset.split("/")
    if group == "EMP":
        return Protocol(epochs=3, max_length=128, eval_steps=200)
    if group == "prom":
        is_tata = name.endswith("_tata")
        return Protocol(
            epochs=10 if is_tata else 4, max_length=20 if "_core_" in name else 70, eval_steps=200 if is_tata else 400
        )
    return {
        "tf": Protocol(epochs=3, max_length=30, eval_steps=200, warmup_steps=30),
        "mouse": Protocol(epochs=5, max_length=30, eval_steps=200, warmup_steps=30, max_steps=1000),
        "virus": Protocol(epochs=8, max_length=256, eval_steps=200),
        "splice": Protocol(epochs=5, max_length=80, eval_steps=200),
    }[group]


PROTOCOLS = {dataset: _protocol(dataset) for dataset in DATASETS}
