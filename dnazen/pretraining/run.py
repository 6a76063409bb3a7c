"""A pretraining run from its arguments to its report."""

import dataclasses
import json
import logging
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from transformers import HfArgumentParser, TrainerState, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dnazen.batches.collator import Masking, PackedCollator, PackedDataset, calibrate_mlm_probability
from dnazen.data.corpus import Corpus
from dnazen.evaluation.held_out import HELD_OUT_MASKING, evaluate_split, evaluation_record
from dnazen.evaluation.metrics import plot_loss_curve
from dnazen.files import InputError, lock_run, publish_folder, write_json
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.models.modeling_dnazen import Selection
from dnazen.ngram.vocab import NgramVocabulary, load_ngrams
from dnazen.pretraining.arguments import RECIPES, DataArguments, PretrainingArguments
from dnazen.pretraining.checkpoint import Checkpoint, choose_checkpoint, copy_model, list_differences
from dnazen.pretraining.prepare import PACKAGED_GENOME, genome_name, prepare_data
from dnazen.pretraining.source import Source
from dnazen.pretraining.start import start_from_data
from dnazen.pretraining.trainer import PretrainingTrainer
from dnazen.training.attention import agree_on_attention
from dnazen.training.script import parse_arguments, run_script
from dnazen_kernels._runtime import resolve_impl

# what a checkpoint's configuration may differ in from the run that resumes it
RUNTIME_KEYS = ("impl", "attn_implementation", "transformers_version", "dtype", "architectures", "_name_or_path")
# a resumed optimizer keeps the values it was saved with, so others are refused rather than ignored
OPTIMIZER_KEYS = (
    "optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm",
)  # fmt: skip


def main() -> int:
    """Run `dnazen/pretrain.py`'s command line; see `run_script`."""
    return run_script(_run_command_line)


def _run_command_line() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        HfArgumentParser((DataArguments, PretrainingArguments)).print_help()
        return
    # Trainer's arguments join the process group, so the data is prepared before they are parsed
    data_args, rest = HfArgumentParser(DataArguments).parse_args_into_dataclasses(return_remaining_strings=True)
    HfArgumentParser(PretrainingArguments).parse_args(rest)
    if data_args.init_from is None:
        DNAZenConfig.from_size(data_args.model)
    name = Path(data_args.corpus).resolve().name if data_args.corpus else None
    if data_args.corpus is None:
        fasta = data_args.fasta or [str(PACKAGED_GENOME)]
        name = genome_name(fasta)
        corpus_dir, ngrams_dir = prepare_data(fasta, Path(data_args.work_dir) / name)
        data_args.corpus, data_args.ngrams = str(corpus_dir), str(ngrams_dir)
    learning_rate = RECIPES.get(data_args.model, RECIPES["base"]).learning_rate
    output_dir = Path(data_args.work_dir) / name / data_args.model_name
    # what stands later on a command line wins
    rest = ["--learning_rate", str(learning_rate), "--output_dir", str(output_dir), *rest]
    (training_args,) = parse_arguments(HfArgumentParser(PretrainingArguments), rest)
    pretrain(data_args, training_args)


def pretrain(data_args: DataArguments, args: PretrainingArguments) -> None:
    """Train, evaluate, save and report, going on from the newest whole checkpoint in `args.output_dir` if there is one.

    Raises:
        InputError: corpus, G-grams, model or checkpoint cannot be used together.
        FloatingPointError: the gradient is no longer finite.
    """
    main_process = args.process_index == 0
    if not main_process:
        logging.getLogger("dnazen").setLevel(logging.ERROR)  # one process says it
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # of file writing; training keeps its own
    set_seed(args.seed)
    corpus = Corpus.open(data_args.corpus, verify=main_process)
    vocabulary = load_ngrams(data_args.ngrams, corpus)
    if data_args.max_ngrams is not None:
        vocabulary = dataclasses.replace(vocabulary, max_ngrams=data_args.max_ngrams)
    train_dataset, eval_dataset, masking = build_datasets(data_args, args.seed, corpus, vocabulary)
    source = Source.open(data_args.init_from, corpus) if data_args.init_from else None
    config = build_config(data_args, corpus, vocabulary, source)
    try:
        resolve_impl(config.impl, args.device)
    except RuntimeError as error:
        raise InputError(str(error)) from error

    output_dir = Path(args.output_dir)
    _lock = lock_run(output_dir) if main_process else None  # held until this function returns
    resume = None if args.resume_from_checkpoint in ("True", "true", "last", "latest") else args.resume_from_checkpoint
    (checkpoint,) = broadcast_object_list([choose_checkpoint(output_dir, resume) if main_process else None])
    model = DNAZenForMaskedLM(config)
    if data_args.start == "data" and checkpoint is None:
        start_from_data(model, corpus, vocabulary, args.seed)
    if source is not None and checkpoint is None:
        started = source.load_weights(model, vocabulary, args.deepspeed and args.hf_deepspeed_config)
        if main_process:
            print(started, flush=True)
    trainer = PretrainingTrainer(
        model=model,
        args=args,
        processing_class=corpus.tokenizer,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        vocabulary=vocabulary,
        max_batch_tokens=data_args.max_batch_tokens,
        residual_learning_rate=data_args.residual_learning_rate,
        checkpoint=checkpoint,
        agreement=build_agreement(data_args, args, corpus, vocabulary, masking, config, source),
    )
    attention = agree_on_attention(trainer.model, args)
    is_finished = checkpoint is not None and checkpoint.manifest["step"] >= args.max_steps
    if main_process:
        if not is_finished:
            write_json(output_dir / "run.json", run_record(data_args, trainer))
        print(describe(data_args, corpus, vocabulary, masking, trainer, checkpoint, attention), flush=True)
    if is_finished:
        trainer.state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
        last = checkpoint.path
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        last = output_dir / f"checkpoint-{trainer.state.global_step}"
    step = trainer.state.global_step
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == step]
    if not evaluated:
        raise InputError(f"{last} is not before --max_steps {args.max_steps} and was not evaluated; train further")
    if main_process:
        copy_model(last, output_dir / ".final.tmp")
        publish_folder(output_dir / ".final.tmp", output_dir / "final")
        report(trainer, corpus, vocabulary, data_args.model_name)
        print(f"model: {output_dir / 'final'}\nnewest checkpoint: {last}\nloss curve: {output_dir / 'loss_curve.png'}")


def build_agreement(
    data_args: DataArguments,
    args: PretrainingArguments,
    corpus: Corpus,
    vocabulary: NgramVocabulary,
    masking: Masking,
    config: DNAZenConfig,
    source: Source | None,
) -> dict[str, Any]:
    """What a run and the checkpoint it resumes from must have in common, as it reads back from JSON."""
    training, deepspeed = args.to_dict(), args.deepspeed and args.hf_deepspeed_config
    agreement = {
        "corpus": corpus.checksum,
        "ngrams": vocabulary.checksum,
        "max_ngrams": vocabulary.max_ngrams,
        "use_ngrams": data_args.use_ngrams,
        "masking": masking,
        "max_batch_tokens": data_args.max_batch_tokens,
        "seed": args.seed,
        "init_from": source and source.checksum,
        "start": data_args.start,
        "residual_learning_rate": data_args.residual_learning_rate,
        "model": {key: value for key, value in config.to_diff_dict().items() if key not in RUNTIME_KEYS},
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "engine": f"DeepSpeed ZeRO-{deepspeed.get_value('zero_optimization.stage', 0)}" if deepspeed else "PyTorch",
        **{key: training[key] for key in OPTIMIZER_KEYS},
    }
    return json.loads(json.dumps(agreement))


def build_datasets(
    data_args: DataArguments, seed: int, corpus: Corpus, vocabulary: NgramVocabulary
) -> tuple[PackedDataset, PackedDataset, Masking]:
    """Training and held-out split, packed and masked, and the masking that training uses."""
    shares = data_args.mask_share, (1 - data_args.mask_share) / 2
    masking = Masking(data_args.mlm_probability, data_args.whole_ngram_masking, seed, *shares)
    collator = PackedCollator(corpus.tokenizer, vocabulary, masking, data_args.use_ngrams)
    train_dataset = PackedDataset(corpus.train, collator)
    if data_args.mask_target == "effective":
        drawn = calibrate_mlm_probability(train_dataset, data_args.mlm_probability)
        collator.masking = masking = masking._replace(mlm_probability=drawn)
    held_out = PackedCollator(corpus.tokenizer, vocabulary, HELD_OUT_MASKING, data_args.use_ngrams)
    return train_dataset, PackedDataset(corpus.validation, held_out), masking


def build_config(
    data_args: DataArguments, corpus: Corpus, vocabulary: NgramVocabulary, source: Source | None
) -> DNAZenConfig:
    """The model's configuration, with sizes and ids that come from the data."""
    tokenizer = corpus.tokenizer
    from_data = {
        "ngram_vocab_size": vocabulary.vocab_size,
        "max_ngram_count": vocabulary.max_ngrams,
        "use_ngrams": data_args.use_ngrams,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "mask", "unk")},
    }
    if source is None:
        config = DNAZenConfig.from_size(data_args.model, vocab_size=len(tokenizer), **from_data)
    else:
        config = DNAZenConfig.from_pretrained(source.folder, **from_data)
    config.impl = data_args.impl
    if data_args.attn_implementation is not None:
        config._attn_implementation = data_args.attn_implementation
    return config


def run_record(data_args: DataArguments, trainer: PretrainingTrainer) -> dict[str, Any]:
    """What `run.json` holds: all that is needed to repeat the run."""
    packages = ("dnazen", "torch", "triton", "deepspeed", "transformers", "tokenizers", "accelerate", "numpy")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    return {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
        "versions": {package.name: package.version for package in distributions() if package.name in packages},
        "command": sys.argv,
        "data": vars(data_args),
        "training": trainer.args.to_dict(),
        "model": trainer.model.config.to_diff_dict(),
        "agreement": trainer.agreement,
        "world_size": trainer.args.world_size,
    }


def describe(
    data_args: DataArguments,
    corpus: Corpus,
    vocabulary: NgramVocabulary,
    masking: Masking,
    trainer: PretrainingTrainer,
    checkpoint: Checkpoint | None,
    attention: Selection,
) -> str:
    """What is about to run, in a few lines."""
    args, config, agreement = trainer.args, trainer.model.config, trainer.agreement
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    lines = [
        f"DNAZEN {data_args.model_name}: {parameters / 1e6:.1f} M parameters, {agreement['precision']}, "
        f"{agreement['engine']}, {args.world_size} process(es) on {device}, "
        f"attention {attention.name}, operators {config.impl}",
        *(f"attention is not {name}: {reason}" for name, reason in attention.reasons.items()),
        f"data: {corpus.train.num_tokens:,} tokens in {len(corpus.train):,} sequences, "
        f"{len(corpus.validation):,} held out; {len(vocabulary.ngrams):,} G-grams",
        f"masking: {'whole G-grams' if masking.whole_ngram else 'single tokens'}, "
        f"{100 * masking.mlm_probability:.1f} % of tokens drawn, {100 * masking.mask_share:.0f} % of the masked hidden",
        f"weights begin {'as functions of the data' if data_args.start == 'data' else 'at random'}"
        if data_args.init_from is None
        else f"weights of {data_args.init_from}",
        f"steps: {args.max_steps:,}, each {trainer.micro_batches_per_step} micro-batch(es) of up to "
        f"{data_args.max_batch_tokens:,} tokens",
        f"output: {args.output_dir}" + (f", resuming from {checkpoint.path.name}" if checkpoint else ""),
    ]
    if checkpoint is not None:
        lines += [f"changed: {text}" for text in list_differences(checkpoint.manifest["schedule"], trainer.schedule())]
        lines += ["nothing is left to train"] * (checkpoint.manifest["step"] >= args.max_steps)
    return "\n".join(lines)


def report(trainer: PretrainingTrainer, corpus: Corpus, vocabulary: NgramVocabulary, model_name: str) -> None:
    """Evaluate `final/`; print and write what came out: scores beside baselines, speed, mask rate, files."""
    output_dir = Path(trainer.args.output_dir)
    started = time.perf_counter()
    unset_hf_deepspeed_config()  # the model stays whole under ZeRO-3: this process is alone here
    model = DNAZenForMaskedLM.from_pretrained(output_dir / "final", dtype=torch.float32).to(trainer.args.device).eval()
    name, text = f"DNAZEN {model_name}", "held-out sequences"
    evaluation = evaluate_split(name, model, corpus.tokenizer, vocabulary, corpus.train, corpus.validation)
    plot_loss_curve(output_dir / "loss_curve.png", trainer.state.log_history, evaluation.comparison)
    tokens, maskable, masked, dropped = trainer.totals.tolist()
    summary: dict[str, Any] = {
        "step": trainer.state.global_step,
        "held_out": evaluation_record(evaluation, text),
        "trained_tokens": tokens,
        "train_seconds": trainer.train_seconds,
        "tokens_per_second": tokens / trainer.train_seconds,
        "effective_mask_rate": masked / maskable,
        "ngrams_cut": dropped,
    }
    write_json(output_dir / "report.json", summary)
    print("\n" + evaluation.describe(text))
    print(
        f"trained on {tokens:,} tokens in {trainer.train_seconds:.0f} s: {tokens / trainer.train_seconds:,.0f} tokens/s"
    )
    print(f"effective mask rate {100 * masked / maskable:.1f} %" + (f", {dropped:,} G-grams cut" if dropped else ""))
    print(f"evaluated in {time.perf_counter() - started:.0f} s")
