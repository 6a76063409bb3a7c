"""Arguments of fine-tuning: ours, and Hugging Face's `TrainingArguments` with defaults that suit it."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from dnazen.files import InputError
from dnazen.finetuning.tasks import TASKS, Classification
from dnazen.training.command_line import described
from dnazen.training.configurations import find_configuration
from dnazen.training.script import refuse_flags, require_one_device, require_reporters

_BEST = "has no effect: the model that is best on dev is kept, and nothing else"
_UNSUPPORTED = "is not supported in fine-tuning"
# Hugging Face's flags that would be ignored in silence, or break what a run promises
REFUSED = {
    "save_strategy": _BEST,
    "save_steps": _BEST,
    "save_total_limit": _BEST,
    "save_only_model": _BEST,
    "load_best_model_at_end": _BEST,
    "greater_is_better": "has no effect: that depends on --metric-for-best-model",
    "resume_from_checkpoint": _UNSUPPORTED + ": start anew",
    "per_device_eval_batch_size": "has no effect: evaluation packs by tokens",
    "auto_find_batch_size": _UNSUPPORTED,
    "label_smoothing_factor": _UNSUPPORTED,
    "train_sampling_strategy": _UNSUPPORTED,
    "torch_compile": _UNSUPPORTED,
    "eval_delay": _UNSUPPORTED + ": the best model is kept from the first evaluation on",
    "bf16_full_eval": "has no effect: evaluation computes as training does",
    "fp16_full_eval": "has no effect: evaluation computes as training does",
    "do_train": "has no effect: a run trains",
    "do_eval": "has no effect: a run evaluates on dev",
    "do_predict": "has no effect: a run tests if there is a test split; otherwise use `dnazen predict`",
    "fsdp": _UNSUPPORTED + ": use --deepspeed",
    "push_to_hub": _UNSUPPORTED + ": publish final/ with `hf upload`",
}
# shown by `--help` beside ours and those whose default is ours; the others by `--help-all`
USUAL = {
    "deepspeed", "max_steps", "gradient_accumulation_steps", "lr_scheduler_type", "max_grad_norm", "seed", "eval_steps",
    "metric_for_best_model", "report_to", "activation_checkpointing",
}  # fmt: skip


@dataclass
class FinetuningDataArguments:
    """What is trained on what."""

    model: str = field(
        metadata={
            "help": "model to start from: a folder or a name on the Hugging Face hub; DNAZEN, DNABERT-2 or another "
            "encoder that transformers knows"
        }
    )
    data: str = field(metadata={"help": "folder with train.csv, dev.csv and perhaps test.csv, each plain or .gz"})
    task: str = field(
        default=Classification.kind, metadata={"choices": list(TASKS), "help": "what the column label holds"}
    )
    max_length: int | None = field(default=None, metadata={"help": "tokens of a sequence at most; default: 512"})
    use_ngrams: bool = field(default=True, metadata={"help": "let the model see the G-grams, if it did in pretraining"})
    class_weights: list[str] | None = field(
        default=None, metadata={"help": "`balanced`, or a weight for each class; default: all 1"}
    )
    early_stopping: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better one; default: never"}
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "train LoRA adapters of this rank, and the head, alone; default: all weights"}
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "their scale; default: twice the rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "drop-out before the adapters"})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "layers to adapt, by name; default: the projections of all attentions"}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "attention by name; default: the best"})

    def __post_init__(self):
        for name in ("early_stopping", "lora_rank", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        for name in ("lora_alpha", "lora_target_modules"):
            if self.lora_rank is None and getattr(self, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} needs --lora-rank")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora-dropout must lie in [0, 1), got {self.lora_dropout}")
        if self.class_weights is not None and not TASKS[self.task].has_classes:
            raise InputError(f"--class-weights does not go with --task {self.task}, which has no classes")

    def weights_of_classes(self, num_labels: int) -> list[float] | None:
        """The weights that were given as numbers, if any.

        Raises:
            InputError: they are not `num_labels` numbers above 0.
        """
        if self.class_weights in (None, ["balanced"]):
            return None
        try:
            weights = [float(text) for text in self.class_weights]
        except ValueError:
            weights = []
        if len(weights) != num_labels or not all(0 < weight < float("inf") for weight in weights):
            found = " ".join(self.class_weights)
            raise InputError(f"--class-weights: expected `balanced` or {num_labels} numbers above 0, found {found}")
        return weights


@dataclass
class FinetuningArguments(TrainingArguments):
    """Hugging Face's arguments; defaults after DNABERT-2's fine-tuning scripts."""

    output_dir: str | None = described(None, "where the results go")
    learning_rate: float = described(3e-5, "highest rate")
    weight_decay: float = described(0.01, "of all weights but biases and norms")
    num_train_epochs: float = described(3.0, "times that the training sequences are seen")
    per_device_train_batch_size: int = described(32, "sequences of a micro-batch")
    warmup_steps: float = described(50, "steps, or below 1 their share, over which the rate rises")
    bf16: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "train in bf16; default: if there is a GPU"}
    )
    logging_steps: float = described(50, "steps from log to log")
    eval_strategy: str = described("epoch", "evaluate after each epoch, or after so many `steps`")
    remove_unused_columns: bool = described(False, "drop columns that the model does not take; here it takes all")
    logging_nan_inf_filter: bool = described(False, "pass over a loss that is not finite")

    def __post_init__(self):
        refuse_flags(self, REFUSED)
        require_reporters(self.report_to)
        self.deepspeed = find_configuration(self.deepspeed)
        if self.output_dir is None:
            raise InputError("--output-dir is needed: where the results go")
        if self.eval_strategy not in ("epoch", "steps"):
            raise InputError(f"--eval-strategy must be epoch or steps, to find the best, got {self.eval_strategy}")
        self.save_strategy = "best"
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        super().__post_init__()
        require_one_device(self)
