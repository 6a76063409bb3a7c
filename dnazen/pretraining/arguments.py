"""Arguments of pretraining: ours, and Hugging Face's `TrainingArguments` with defaults that suit it."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import TrainingArguments

from dnazen.files import InputError
from dnazen.training.configurations import find_configuration
from dnazen.training.script import refuse_flags, require_one_device
from dnazen_kernels.ngram_masking import MASK_SHARE


class Recipe(NamedTuple):
    """How a model of some size is trained unless its flags say otherwise; the defaults are the paper's."""

    max_batch_tokens: int  # what fits 80 GB
    learning_rate: float  # DNABERT-2's at its size
    mlm_probability: float = 0.15
    mask_share: float = MASK_SHARE
    whole_ngram_masking: bool = True
    start: str = "random"
    residual_learning_rate: float = 1.0


RECIPES = {
    # for minutes on a CPU, on a genome; measured in benchmarks/learning.md
    "tiny": Recipe(2048, 3e-3, 0.4, 1.0, False, "data", 0.1),
    "base": Recipe(65536, 5e-4),
    "large": Recipe(32768, 4e-4),
    "xlarge": Recipe(8192, 2e-4),  # with half of it the host would keep a GPU waiting (estimated, not measured)
}

_PACKED = "has no effect: batches are packed by tokens; use --max_batch_tokens"
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


@dataclass
class DataArguments:
    """What is trained, on what, and how it is masked."""

    fasta: list[str] | None = field(
        default=None,
        metadata={"help": "FASTA files to prepare and train on in one go; default: the packaged E. coli 536 genome"},
    )
    corpus: str | None = field(default=None, metadata={"help": "folder written by `dnazen corpus`"})
    ngrams: str | None = field(default=None, metadata={"help": "folder written by `dnazen ngrams`"})
    work_dir: str = field(default="runs", metadata={"help": "where --fasta is prepared and default outputs go"})
    model: str | None = field(
        default=None, metadata={"help": "tiny, base, large, xlarge, or a config.json; default: tiny"}
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "model to start from: a folder, or a name on the Hugging Face hub, such as "
            "zhihan1996/DNABERT-2-117M; the corpus must be made with its tokenizer"
        },
    )
    max_batch_tokens: int | None = field(
        default=None, metadata={"help": "tokens of a micro-batch on one device; default: by model size"}
    )
    mlm_probability: float | None = field(
        default=None, metadata={"help": "chance of a token to be drawn for masking; default: 0.15, 0.4 for tiny"}
    )
    mask_share: float | None = field(
        default=None,
        metadata={
            "help": "of the masked tokens, how many are hidden; half of the others become random tokens, half stay as they "
            "are; default: 0.8, 1 for tiny"
        },
    )
    mask_target: str = field(
        default="drawn",
        metadata={
            "choices": ["drawn", "effective"],
            "help": "what --mlm_probability is the rate of: tokens drawn (as in the paper), or tokens masked in the end",
        },
    )
    whole_ngram_masking: bool | None = field(
        default=None, metadata={"help": "mask whole G-grams, not tokens alone; default: True, False for tiny"}
    )
    start: str | None = field(
        default=None,
        metadata={
            "choices": ["random", "data"],
            "help": "what the weights of a new model begin as: random numbers, or functions of the data (embeddings of "
            "tokens by their bases, of G-grams by their tokens, the decoder's bias by frequency); default: random, data "
            "for tiny",
        },
    )
    residual_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "rate of the ways out of attention and feed-forward, as a share of --learning_rate; default: 1, 0.1 "
            "for tiny"
        },
    )
    use_ngrams: bool = field(default=True, metadata={"help": "let the model see the G-grams"})
    max_ngrams: int | None = field(default=None, metadata={"help": "most G-grams of a sequence; default: no limit"})
    impl: str = field(
        default="auto",
        metadata={
            "choices": ["auto", "triton", "reference"],
            "help": "operators: kernels on a GPU and PyTorch elsewhere; kernels; or the padded, dense path as published",
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "attention by name; default: the best"})

    def __post_init__(self):
        if (self.corpus is None) != (self.ngrams is None):
            raise InputError("--corpus and --ngrams belong together: give both, or neither and --fasta")
        if self.corpus is not None and self.fasta is not None:
            raise InputError("--fasta prepares a corpus of its own; it does not go with --corpus and --ngrams")
        if self.init_from is not None:
            if self.model is not None:
                raise InputError("--init_from brings the model's configuration; it does not go with --model")
            if self.corpus is None:
                raise InputError("--init_from needs --corpus, made with that model's tokenizer, and --ngrams")
            if self.start is not None:
                raise InputError("--init_from brings the model's weights; it does not go with --start")
            self.start = "random"
        elif self.model is None:
            self.model = "tiny"
        for name, default in RECIPES.get(self.model, RECIPES["base"])._asdict().items():
            if getattr(self, name, default) is None:
                setattr(self, name, default)
        if not 0 < self.mlm_probability < 1:
            raise InputError(f"--mlm_probability must lie between 0 and 1, got {self.mlm_probability}")
        if not 0 < self.mask_share <= 1:
            raise InputError(f"--mask_share must be above 0 and at most 1, got {self.mask_share}")
        if not 0 < self.residual_learning_rate < math.inf:
            raise InputError(f"--residual_learning_rate must be above 0, got {self.residual_learning_rate}")
        for name in ("max_batch_tokens", "max_ngrams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, got {value}")

    @property
    def model_name(self) -> str:
        """What the model is called in output and in the default output folder."""
        return Path(self.model).stem if self.init_from is None else Path(self.init_from).name


@dataclass
class PretrainingArguments(TrainingArguments):
    """Hugging Face's arguments; defaults after DNABERT-2's pretraining where the paper is silent."""

    output_dir: str | None = field(default=None, metadata={"help": "default: <work_dir>/<name>/<model>"})
    learning_rate: float = field(default=5e-4, metadata={"help": "default: by model size"})
    weight_decay: float = 0.01
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-6
    warmup_steps: float = 0.06
    bf16: bool = True
    logging_steps: float = 25
    eval_strategy: str = "steps"
    eval_steps: float | None = 250
    save_steps: float = 500
    save_total_limit: int | None = 3
    # a loss that is not finite must stop the run, not be averaged away
    logging_nan_inf_filter: bool = False
    # every parameter has a gradient in every step, also where there are no G-grams
    ddp_find_unused_parameters: bool = False
    # a GPU must not wait while the next batch is read
    dataloader_num_workers: int = field(
        default_factory=lambda: 2 if torch.cuda.is_available() else 0,
        metadata={"help": "processes that read ahead; default: 2 with a GPU, else 0"},
    )

    def __post_init__(self):
        refuse_flags(self, REFUSED)
        self.deepspeed = find_configuration(self.deepspeed)
        for name in ("logging_strategy", "eval_strategy", "save_strategy"):
            if getattr(self, name) not in ("no", "steps"):
                raise InputError(f"--{name} must be no or steps, for the data has no end, got {getattr(self, name)}")
        if self.seed < 0:
            raise InputError(f"--seed must be at least 0, got {self.seed}")
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        super().__post_init__()
        if self.torch_compile and self.deepspeed and self.hf_deepspeed_config.is_zero3():
            raise InputError(
                "--torch_compile does not go with ZeRO-3, whose hooks around every layer cannot be compiled: use ZeRO-2"
            )
        require_one_device(self)
