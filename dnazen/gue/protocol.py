"""GUE's data sets and how each is fine-tuned: DNABERT-2's published protocol.

Source: `finetune/scripts/run_dnabert2.sh` and README of MAGICS-LAB/DNABERT_2, commit 7d569d7: learning rate 3e-5 for
all; 8 sequences on each of 4 GPUs, "global batch size 32" (virus/covid: 32 on each, 128 a step, where it has 32 here as
the others have); evaluated every 200 or 400 steps.
"""

from pathlib import Path
from typing import NamedTuple

from dnazen.files import InputError
from dnazen.finetuning.data import SPLITS, find_splits
from dnazen.gue.paper import DATASETS

LEARNING_RATE = 3e-5
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


def choose_datasets(folder: Path, chosen: list[str] | None) -> tuple[dict[str, Path], dict[str, str]]:
    """The data sets under a folder that can be run, and why each other one cannot.

    Args:
        folder: with a folder for each data set, as published: `prom/prom_core_tata`, `mouse/2`, ...
        chosen: names, with or without the folder above; None for all.

    Raises:
        InputError: a name is unknown, or what it names cannot be run; nothing can be run.
    """
    # tf/0 and mouse/0 are no names without what is above
    short = {name.split("/")[1]: name for name in DATASETS if not name.startswith(("tf/", "mouse/"))}
    names = {**short, **{name: name for name in DATASETS}}
    if unknown := sorted(set(chosen or ()) - names.keys()):
        raise InputError(f"--tasks: expected data sets of GUE ({', '.join(DATASETS)}), found {', '.join(unknown)}")
    present, absent = {}, {}
    for name in DATASETS:
        try:
            splits = find_splits(folder / name)
        except InputError as error:
            absent[name] = f"unclear: {error}"
            continue
        missing = [split for split in SPLITS if split not in splits]
        if not missing:
            present[name] = folder / name
        else:
            absent[name] = "absent" if len(missing) == len(SPLITS) else f"without {' and '.join(missing)}"
    if chosen:
        wanted = list(dict.fromkeys(names[name] for name in chosen))
        if unusable := [f"{name} {absent[name]}" for name in wanted if name in absent]:
            expected = f"{', '.join(SPLITS)} of each data set of --tasks"
            raise InputError(f"{folder}: expected {expected}, found {'; '.join(unusable)}")
        present = {name: present[name] for name in wanted}
    if not present:
        raise InputError(f"{folder}: expected data sets of GUE (such as {DATASETS[-2]}/train.csv), found none")
    return present, absent
