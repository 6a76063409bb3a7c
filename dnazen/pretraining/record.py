"""What is written down of a pretraining run: its fingerprint, and all that repeating it takes."""

import json
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from dnazen.batches.collator import Masking
from dnazen.data.corpus import Corpus
from dnazen.models import DNAZenConfig
from dnazen.ngram.vocab import NgramVocabulary
from dnazen.pretraining.arguments import DataArguments
from dnazen.pretraining.checkpoint import FINGERPRINT_KEY
from dnazen.pretraining.initial_model import InitialModel
from dnazen.pretraining.trainer import PretrainingTrainer
from dnazen.pretraining.training_arguments import REFUSED, PretrainingArguments

# what a checkpoint's configuration may differ in from the run that resumes it
RUNTIME_KEYS = ("impl", "attn_implementation", "transformers_version", "dtype", "architectures", "_name_or_path")
# a resumed optimizer keeps the values it was saved with, so others are refused rather than ignored
OPTIMIZER_KEYS = (
    "optim", "learning_rate", "muon_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
)  # fmt: skip


def build_fingerprint(
    data_args: DataArguments,
    args: PretrainingArguments,
    corpus: Corpus,
    vocabulary: NgramVocabulary,
    masking: Masking,
    config: DNAZenConfig,
    initial: InitialModel | None,
) -> dict[str, Any]:
    """What a run and the checkpoint it resumes from must have in common, as it reads back from JSON."""
    training, deepspeed = args.to_dict(), args.deepspeed and args.hf_deepspeed_config
    fingerprint = {
        "corpus": corpus.checksum,
        "ngrams": vocabulary.checksum,
        "max_ngrams": vocabulary.max_ngrams,
        "use_ngrams": data_args.use_ngrams,
        "masking": masking[:-1],
        "mlm_probability_end": masking.mlm_probability_end,
        "max_batch_tokens": data_args.max_batch_tokens,
        "seed": args.seed,
        "init_from": initial and initial.checksum,
        "start": data_args.start,
        "residual_learning_rate": data_args.residual_learning_rate,
        "model": {key: value for key, value in config.to_diff_dict().items() if key not in RUNTIME_KEYS},
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "engine": f"DeepSpeed ZeRO-{deepspeed.get_value('zero_optimization.stage', 0)}" if deepspeed else "PyTorch",
        **{key: training[key] for key in OPTIMIZER_KEYS},
    }
    return json.loads(json.dumps(fingerprint))


def run_record(data_args: DataArguments, trainer: PretrainingTrainer) -> dict[str, Any]:
    """What `run.json` holds: all that is needed to repeat the run."""
    packages = ("dnazen", "torch", "triton", "deepspeed", "transformers", "tokenizers", "accelerate", "numpy")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    return {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
        "versions": {package.name: package.version for package in distributions() if package.name in packages},
        "command": sys.argv,
        "data": vars(data_args),
        "training": {name: value for name, value in trainer.args.to_dict().items() if name not in REFUSED},
        "model": trainer.model.config.to_diff_dict(),
        FINGERPRINT_KEY: trainer.run_fingerprint,
        "world_size": trainer.args.world_size,
    }
