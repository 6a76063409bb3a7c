"""Arguments of pretraining that are ours, and what depends on the model's size; reads without PyTorch."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from dnazen.files import InputError
from dnazen.sizes import RECIPES
from dnazen.training.script import flag


@dataclass
class DataArguments:
    """What is trained, on what, and how it is masked."""

    fasta: list[str] | None = field(
        default=None,
        metadata={"help": "FASTA files to prepare and train on in one go; default: the packaged E. coli 536 genome"},
    )
    corpus: str | None = field(default=None, metadata={"help": "folder written by `dnazen corpus`"})
    ngrams: str | None = field(default=None, metadata={"help": "folder written by `dnazen ngrams`"})
    work_dir: str = field(default="runs", metadata={"help": "where --fasta is prepared and runs write"})
    model: str | None = field(
        default=None,
        metadata={"help": "size of a new model: tiny, base, large, xlarge, or a JSON file of sizes; default: tiny"},
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
    mlm_probability_end: float | None = field(
        default=None,
        metadata={"help": "what --mlm-probability has become at the run's end, step by step; default: the same"},
    )
    mask_share: float | None = field(
        default=None,
        metadata={
            "help": "share of the masked tokens that becomes [MASK]; half of the others become random tokens, half "
            "stay; default: 0.8, 1 for tiny"
        },
    )
    mask_target: str = field(
        default="drawn",
        metadata={
            "choices": ["drawn", "effective"],
            "help": "what --mlm-probability is the rate of: tokens drawn, as in the paper, or tokens masked in the end",
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
            "tokens by their bases, of G-grams by their tokens, the decoder's bias by frequency); default: random, "
            "data for tiny",
        },
    )
    residual_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "rate of the ways out of attention and feed-forward, as a share of --learning-rate; default: 1, "
            "0.1 for tiny"
        },
    )
    use_ngrams: bool = field(default=True, metadata={"help": "let the model see the G-grams"})
    max_ngrams: int | None = field(default=None, metadata={"help": "most G-grams of a sequence; default: no limit"})
    impl: str = field(
        default="auto",
        metadata={
            "choices": ["auto", "triton", "reference"],
            "help": "operators: kernels on a GPU and PyTorch elsewhere; kernels; the padded, dense path as published",
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
                raise InputError("--init-from brings the model's configuration; it does not go with --model")
            if self.corpus is None:
                raise InputError("--init-from needs --corpus, made with that model's tokenizer, and --ngrams")
            if self.start is not None:
                raise InputError("--init-from brings the model's weights; it does not go with --start")
            self.start = "random"
        elif self.model is None:
            self.model = "tiny"
        for name, default in RECIPES.get(self.model, RECIPES["base"])._asdict().items():
            if getattr(self, name, default) is None:
                setattr(self, name, default)
        for name in ("mlm_probability", "mlm_probability_end"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise InputError(f"{flag(name)} must lie between 0 and 1, got {value}")
        if not 0 < self.mask_share <= 1:
            raise InputError(f"--mask-share must be above 0 and at most 1, got {self.mask_share}")
        if not 0 < self.residual_learning_rate < math.inf:
            raise InputError(f"--residual-learning-rate must be above 0, got {self.residual_learning_rate}")
        for name in ("max_batch_tokens", "max_ngrams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{flag(name)} must be at least 1, got {value}")

    @property
    def model_name(self) -> str:
        """What the model is called in output and in the default output folder."""
        return Path(self.model).stem if self.init_from is None else Path(self.init_from).name
