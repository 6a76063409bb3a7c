"""What a pretraining run says of itself: at its start, and of the model at its end."""

import time
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dnazen.batches.collator import Masking
from dnazen.data.corpus import Corpus
from dnazen.evaluation.held_out import evaluate_split, evaluation_record
from dnazen.evaluation.metrics import plot_loss_curve
from dnazen.files import write_json
from dnazen.models import DNAZenForMaskedLM
from dnazen.models.modeling_dnazen import Selection
from dnazen.ngram.vocab import NgramVocabulary
from dnazen.pretraining.arguments import DataArguments
from dnazen.pretraining.checkpoint import Checkpoint, list_differences
from dnazen.pretraining.trainer import PretrainingTrainer


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
    args, config, manifest = trainer.args, trainer.model.config, checkpoint and checkpoint.manifest
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    precision, engine = (trainer.run_fingerprint[name] for name in ("precision", "engine"))
    if data_args.init_from is not None:
        weights = f"weights of {data_args.init_from}"
    else:
        weights = "weights begin " + ("as functions of the data" if data_args.start == "data" else "at random")
    lines = [
        f"DNAZEN {data_args.model_name}: {parameters / 1e6:.1f} M parameters, {precision}, {engine}, "
        f"{args.world_size} process(es) on {device}, operators {config.impl}; {weights}",
        f"attention {attention.name}" + _describe_others(attention),
        f"data: {corpus.train.num_tokens:,} tokens in {len(corpus.train):,} sequences, "
        f"{len(corpus.validation):,} held out; {len(vocabulary.ngrams):,} G-grams",
        f"training: {args.max_steps:,} steps of {trainer.micro_batches_per_step} micro-batch(es) of up to "
        f"{data_args.max_batch_tokens:,} tokens; {'whole G-grams' if masking.whole_ngram else 'single tokens'} masked, "
        f"{_describe_rate(masking)} of tokens drawn, {100 * masking.mask_share:.0f} % of the masked hidden",
        f"output: {args.output_dir}" + (f", resuming from {checkpoint.path.name}" if checkpoint else ""),
    ]
    if manifest is not None:
        lines += [f"changed: {text}" for text in list_differences(manifest["schedule"], trainer.schedule())]
        lines += ["nothing is left to train"] * (manifest["step"] >= args.max_steps)
    return "\n".join(lines)


def _describe_rate(masking: Masking) -> str:
    start, end = masking.mlm_probability, masking.mlm_probability_end
    return f"{100 * start:.1f} %" + (f" at first and {100 * end:.1f} % at last" if end is not None else "")


def _describe_others(attention: Selection) -> str:
    """In parentheses, the back-ends that were not taken, by reason."""
    names: dict[str, list[str]] = {}
    for name, reason in attention.reasons.items():
        names.setdefault(reason, []).append(name)
    text = "; ".join(f"{', '.join(group)}: {reason}" for reason, group in names.items())
    return f" ({text})" if text else ""


def report(trainer: PretrainingTrainer, corpus: Corpus, vocabulary: NgramVocabulary, model_name: str) -> str:
    """Evaluate `final/`, and write and return what came out: scores beside baselines, speed, mask rate."""
    output_dir = Path(trainer.args.output_dir)
    started = time.perf_counter()
    unset_hf_deepspeed_config()  # the model stays whole under ZeRO-3: this process is alone here
    model = DNAZenForMaskedLM.from_pretrained(output_dir / "final", dtype=torch.float32).to(trainer.args.device).eval()
    name, text = f"DNAZEN {model_name}", "held-out sequences"
    evaluation = evaluate_split(name, model, corpus.tokenizer, vocabulary, corpus.train, corpus.validation)
    plot_loss_curve(output_dir / "loss_curve.png", trainer.state.log_history, evaluation.comparison)
    tokens, maskable, masked, cut = trainer.meter.totals.tolist()
    seconds = trainer.meter.train_seconds
    summary: dict[str, Any] = {
        "step": trainer.state.global_step,
        "held_out": evaluation_record(evaluation, text),
        "trained_tokens": tokens,
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "effective_mask_rate": masked / maskable,
        "ngrams_cut": cut,
    }
    write_json(output_dir / "report.json", summary)
    lines = [
        evaluation.describe(text),
        f"trained on {tokens:,} tokens in {seconds:.0f} s: {tokens / seconds:,.0f} tokens/s",
        f"effective mask rate {100 * masked / maskable:.1f} %" + (f", {cut:,} G-grams cut" if cut else ""),
        f"evaluated in {time.perf_counter() - started:.0f} s",
    ]
    return "\n".join(lines)
