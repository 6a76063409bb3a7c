"""Hugging Face's `TrainingArguments` with defaults that suit pretraining, and those of its flags that are refused."""

import sys
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import HfDeepSpeedConfig
from transformers import TrainingArguments

from dnazen.files import InputError
from dnazen.training.command_line import described
from dnazen.training.configurations import find_configuration
from dnazen.training.script import flag, refuse_flags, require_one_device, require_reporters

ADAMW, MUON = "adamw_torch_fused", "muon"
_PACKED = "has no effect: batches are packed by tokens; use --max-batch-tokens"
_ORDER = "has no effect: the order of the data depends on --seed alone"
_UNSUPPORTED = "is not supported in pretraining"
# Hugging Face's flags that would be ignored in silence, or break what a run promises
REFUSED = {
    "per_device_train_batch_size": _PACKED,
    "per_device_eval_batch_size": _PACKED,
    "auto_find_batch_size": _PACKED,
    "data_seed": _ORDER,
    "dataloader_drop_last": _ORDER,
    "train_sampling_strategy": _ORDER,
    "label_smoothing_factor": _UNSUPPORTED,
    "torch_empty_cache_steps": _UNSUPPORTED,
    "neftune_noise_alpha": _UNSUPPORTED,
    "fsdp": _UNSUPPORTED + ": use --deepspeed",
    "push_to_hub": _UNSUPPORTED + ": publish final/ with `hf upload`",
    "load_best_model_at_end": _UNSUPPORTED + ": the last model is kept",
    "save_only_model": _UNSUPPORTED + ": such a checkpoint cannot be resumed; final/ holds the model alone",
}


# shown by `--help` beside ours and those whose default is ours; the others by `--help-all`
USUAL = {
    "deepspeed", "num_train_epochs", "max_steps", "gradient_accumulation_steps", "lr_scheduler_type", "max_grad_norm",
    "seed", "resume_from_checkpoint", "report_to", "torch_compile", "activation_checkpointing",
}  # fmt: skip


@dataclass
class PretrainingArguments(TrainingArguments):
    """Hugging Face's arguments; defaults after DNABERT-2's pretraining where the paper is silent.

    Raises:
        InputError: see `refuse`; or the process has several GPUs, or the arguments do not go together.
    """

    output_dir: str | None = described(None, "where the run writes; default: WORK_DIR/NAME/MODEL")
    learning_rate: float = described(5e-4, "highest rate; default: by model size")
    optim: str = described(
        ADAMW, f"optimizer: {MUON} for the matrices of the layers (without DeepSpeed, or under ZeRO-1 or 2), or one of "
        "Hugging Face's, for all weights"
    )  # fmt: skip
    muon_learning_rate: float | None = described(None, "highest rate of Muon's; default: that of --learning-rate")
    weight_decay: float = described(0.01, "of all weights but biases and norms")
    adam_beta2: float = described(0.98, "of Adam")
    adam_epsilon: float = described(1e-6, "of Adam")
    warmup_steps: float = described(0.06, "steps, or below 1 their share, over which the rate rises")
    bf16: bool = described(True, "train in bf16, on a CPU too")
    logging_steps: float = described(25, "steps from log to log")
    eval_strategy: str = described("steps", "steps, or no: at the end alone")
    eval_steps: float | None = described(250, "steps from evaluation to evaluation")
    save_steps: float = described(500, "steps from checkpoint to checkpoint")
    save_total_limit: int | None = described(3, "checkpoints that are kept")
    disable_tqdm: bool | None = described(None, "no progress bar; default: where stderr is no terminal")
    # a loss that is not finite must stop the run, not be averaged away
    logging_nan_inf_filter: bool = described(False, "pass over a loss that is not finite")
    # every parameter has a gradient in every step, also where there are no G-grams
    ddp_find_unused_parameters: bool = described(False, "look for parameters without a gradient")
    # a GPU must not wait while the next batch is read
    dataloader_num_workers: int = field(
        default_factory=lambda: 2 if torch.cuda.is_available() else 0,
        metadata={"help": "processes that read ahead; default: 2 with a GPU, else 0"},
    )

    @classmethod
    def refuse(cls, values: "Namespace | PretrainingArguments") -> None:
        """Check what can be checked before the process group is joined.

        Raises:
            InputError: names the flag that would have no effect, is not supported or out of range.
        """
        refuse_flags(values, REFUSED, cls)
        deepspeed = find_configuration(values.deepspeed)
        if values.optim == MUON and deepspeed:
            _require_whole_matrices(deepspeed)
        for name in ("logging_strategy", "eval_strategy", "save_strategy"):
            found = getattr(values, name)
            if found not in ("no", "steps"):
                raise InputError(f"{flag(name)} must be no or steps, for the data has no end, got {found}")
        if values.muon_learning_rate is not None and not (values.optim == MUON and values.muon_learning_rate > 0):
            raise InputError(
                f"--muon-learning-rate must be above 0 and go with --optim {MUON}, got {values.muon_learning_rate}"
            )
        if values.seed < 0:
            raise InputError(f"--seed must be at least 0, got {values.seed}")
        require_reporters(values.report_to)

    def __post_init__(self):
        self.refuse(self)
        self.deepspeed = find_configuration(self.deepspeed)
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        uses_muon = self.optim == MUON
        if uses_muon:
            self.optim = ADAMW  # Hugging Face knows no other name for it
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        super().__post_init__()
        if uses_muon:
            self.optim = MUON
        if self.torch_compile and self.deepspeed and self.hf_deepspeed_config.is_zero3():
            raise InputError(
                "--torch-compile does not go with ZeRO-3, whose hooks around every layer cannot be compiled: use ZeRO-2"
            )
        require_one_device(self)


def _require_whole_matrices(deepspeed: Any) -> None:
    zero = HfDeepSpeedConfig(deepspeed)
    stage = zero.get_value("zero_optimization.stage", 0)
    if stage not in (1, 2) or zero.is_offload():
        found = f"ZeRO-{stage}" + " with an optimizer that is offloaded" * zero.is_offload()
        raise InputError(
            f"--optim {MUON} needs whole matrices on the device: use ZeRO-1 or ZeRO-2 without offloading, or no "
            f"DeepSpeed, got {found}"
        )
