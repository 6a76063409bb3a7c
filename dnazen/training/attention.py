"""One attention for all processes of a run."""

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainingArguments

from dnazen.files import InputError
from dnazen.models.modeling_dnazen import DNAZenPreTrainedModel, Selection


def agree_on_attention(model: DNAZenPreTrainedModel, args: TrainingArguments) -> Selection:
    """Let `model` run the attention that the first process chooses, on every process; all of them must call this.

    Raises:
        InputError: it cannot run on some process, or the one asked for cannot; the message names process and reason.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    selection = reason = None
    if args.process_index == 0:
        try:
            selection = model.select_attention(args.device, dtype)
        except InputError as error:  # raised below, by all: none must wait for a process that has ended
            reason = str(error)
    (selection,) = broadcast_object_list([selection])
    if selection is not None:
        model.set_attn_implementation(selection.name)
        try:
            model.select_attention(args.device, dtype)
        except InputError as error:
            reason = str(error)
    reasons = gather_object([reason])
    failed = [f"process {rank}: {reason}" for rank, reason in enumerate(reasons) if reason is not None]
    if failed:
        raise InputError("; ".join(failed))
    return selection
