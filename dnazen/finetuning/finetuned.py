"""A fine-tuned model: the record beside its weights, and the model that is made of both."""

from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from dnazen.defaults import PRECISIONS
from dnazen.files import InputError, read_json, write_json
from dnazen.finetuning.adapters import load_adapters
from dnazen.finetuning.loading import checksum_weights, load_model
from dnazen.finetuning.logits import compute_logits
from dnazen.finetuning.preprocessing import Encoded, Preprocessor, open_preprocessor
from dnazen.finetuning.tasks import Task, task_from_record

RECORD_FILE = "finetune.json"
FORMAT = 1
# by name: of the type in which matrices are multiplied, beside weights in fp32
_AUTOCAST = dict(zip(PRECISIONS, (None, "bfloat16"), strict=True))


def write_record(
    directory: str | PathLike, preprocessor: Preprocessor, task: Task, has_adapters: bool, is_pair: bool,
    autocast: dict[str, str],
) -> None:  # fmt: skip
    """Write `finetune.json`: what `open_finetuned` needs to know beside model and tokenizer.

    Args:
        directory: of the fine-tuned model.
        preprocessor: its own.
        task: what it predicts.
        has_adapters: whether the folder has adapters in place of weights.
        is_pair: whether it takes pairs of sequences.
        autocast: the `dtype` in which it was evaluated on dev, by type of device.
    """
    record = {"format": FORMAT, **task.record(), "is_pair": is_pair, "max_length": preprocessor.max_length}
    record |= {"autocast": autocast, "use_ngrams": preprocessor.use_ngrams, "base": None}
    if has_adapters:
        folder = preprocessor.folder
        record["base"] = {"folder": str(folder.resolve()), "sha256": checksum_weights(folder)}
    write_json(Path(directory) / RECORD_FILE, record)


class Finetuned(NamedTuple):
    """A fine-tuned model, in evaluation mode, on the GPU if there is one."""

    preprocessor: Preprocessor
    task: Task
    is_pair: bool  # whether it takes pairs of sequences
    model: nn.Module
    autocast: str | None  # the `dtype` in which matrices are multiplied; None: fp32

    def compute_logits(self, encoded: Encoded) -> list[np.ndarray]:
        """Logits of each row; see `logits.compute_logits`."""
        device = next(self.model.parameters()).device.type
        dtype = getattr(torch, self.autocast or "bfloat16")
        with torch.autocast(device, dtype, enabled=self.autocast is not None):
            return compute_logits(self.model, self.preprocessor, self.task, encoded.input_ids)


def open_finetuned(
    folder: str | PathLike, precision: str | None = None, attn_implementation: str | None = None
) -> Finetuned:
    """Load what `dnazen/finetune.py` wrote (its `final/`), adapters onto the model that they were trained for.

    Args:
        folder: with `finetune.json`.
        precision: one of `PRECISIONS`; default: that of the evaluations in training, if they ran on such a device.
        attn_implementation: attention by name; default: the best that runs.

    Raises:
        InputError: it is no such folder; a file is damaged; the adapters' model is not where it was, or another;
            precision or attention are unknown.
    """
    if precision is not None and precision not in PRECISIONS:
        raise InputError(f"precision: expected {' or '.join(PRECISIONS)}, found {precision}")
    folder = Path(folder)
    record = read_json(folder / RECORD_FILE, "a fine-tuned model's record (a folder final/ of dnazen/finetune.py)")
    if record.get("format") != FORMAT:
        raise InputError(f"{folder / RECORD_FILE}: format: expected {FORMAT}, found {record.get('format')!r}")
    try:
        task = task_from_record(record)
    except KeyError as error:
        raise InputError(f"{folder / RECORD_FILE}: expected a task of this version, found none: {error}") from error
    base = record["base"]
    if base and not Path(base["folder"]).is_dir():
        raise InputError(f"{folder}: expected the model that its adapters belong to in {base['folder']}, found nothing")
    if base and (found := checksum_weights(Path(base["folder"]))) != base["sha256"]:
        raise InputError(f"{base['folder']}: expected weights with SHA-256 {base['sha256']}, found {found}")
    preprocessor = open_preprocessor(base["folder"] if base else folder, record["max_length"], record["use_ngrams"])
    model = load_model(preprocessor, task, attn_implementation, may_lack_head=base is not None)
    if base:
        model = load_adapters(model, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = record.get("autocast", {}).get(device) if precision is None else _AUTOCAST[precision]
    return Finetuned(preprocessor, task, record["is_pair"], model.to(device).eval(), autocast)
