"""A fine-tuning run from its arguments to its report."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, HfArgumentParser, set_seed
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from dnazen import __version__
from dnazen.files import InputError, atomic_file, lock_run, publish_folder, sha256_file, write_json
from dnazen.finetuning.adapters import add_adapters
from dnazen.finetuning.arguments import REFUSED, USUAL, FinetuningArguments, FinetuningDataArguments
from dnazen.finetuning.data import (
    PREDICTIONS_FILE,
    REPORT_FILE,
    Overlap,
    count_overlaps,
    describe_overlap,
    read_splits,
)
from dnazen.finetuning.finetuned import open_finetuned, write_record
from dnazen.finetuning.loading import load_model
from dnazen.finetuning.predict import predict_table
from dnazen.finetuning.preprocessing import Encoded, PackedPreprocessor, Preprocessor, open_preprocessor
from dnazen.finetuning.tasks import TASKS, Task
from dnazen.finetuning.trainer import FinetuningTrainer
from dnazen.training.attention import agree_on_attention
from dnazen.training.command_line import HELP_ALL, asks_for_help, describe_flags
from dnazen.training.script import parse_arguments, quieten, run_script

_RECORDED = ("learning_rate", "num_train_epochs", "max_steps", "warmup_steps", "weight_decay", "seed")
_LOWER_IS_BETTER = ("loss", "mse")


_USAGE = "deepspeed dnazen/finetune.py --model MODEL --data DIR --output-dir DIR [arguments]"
_DESCRIPTION = "Fine-tune a model on labelled sequences, keep what is best on dev, and test it."


def main() -> int:
    """Run `dnazen/finetune.py`'s command line; see `run_script`."""
    return run_script(lambda: _run(sys.argv[1:]))


def _run(words: list[str]) -> None:
    if asks_for_help(words):
        ours, training = FinetuningDataArguments, FinetuningArguments
        everything, title = HELP_ALL in words, "model, data and adapters"
        print(describe_flags(_USAGE, _DESCRIPTION, title, ours, training, USUAL, REFUSED.keys(), everything))
        return
    parser = HfArgumentParser((FinetuningDataArguments, FinetuningArguments), allow_abbrev=False)
    finetune(*parse_arguments(parser, words))


def finetune(data_args: FinetuningDataArguments, args: FinetuningArguments) -> None:
    """Train, keep the model that is best on dev as `final/`, test it, and write `report.json`, last.

    Raises:
        InputError: model, data and arguments cannot be used together, or `args.output_dir` has a result already.
        FloatingPointError: the loss on dev is no longer finite.
    """
    main_process, output_dir = args.process_index == 0, Path(args.output_dir)
    quieten(main_process)
    set_seed(args.seed)
    tables = read_splits(data_args.data)
    task = TASKS[data_args.task].from_table(tables["train"])
    labels = {split: task.labels_of(table) for split, table in tables.items()}
    weights = data_args.weights_of_classes(task.num_labels)
    if data_args.class_weights == ["balanced"]:
        weights = task.balanced_weights(labels["train"])
    metric = args.metric_for_best_model = (args.metric_for_best_model or task.metric_names[0]).removeprefix("eval_")
    args.greater_is_better = metric not in _LOWER_IS_BETTER
    if metric not in (expected := sorted({"loss", *task.metric_names})):
        raise InputError(f"--metric-for-best-model: expected {', '.join(expected)}, found {metric}")

    preprocessor = open_preprocessor(data_args.model, data_args.max_length, data_args.use_ngrams)
    if (output_dir / "final").exists():
        raise InputError(f"{output_dir / 'final'}: already exists; choose another --output-dir or remove it")
    _lock = lock_run(output_dir) if main_process else None  # held until this function returns
    model = build_model(preprocessor, task, data_args, args)
    encoded = {split: preprocessor.encode(tables[split], task) for split in ("train", "dev")}
    trainer = FinetuningTrainer(
        preprocessor=preprocessor,
        task=task,
        train=(encoded["train"], labels["train"]),
        dev=(encoded["dev"], labels["dev"]),
        class_weights=weights,
        model=model,
        args=args,
        callbacks=[EarlyStoppingCallback(data_args.early_stopping)] if data_args.early_stopping else [],
    )
    attention = str(agree_on_attention(model, args)) if isinstance(preprocessor, PackedPreprocessor) else None
    overlaps = count_overlaps(tables)
    if main_process:
        print(describe(data_args, task, overlaps, encoded, weights, model, attention), flush=True)
    started = time.perf_counter()
    trainer.train()
    train_seconds = time.perf_counter() - started
    if not main_process:
        return
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(trainer.accelerator.mixed_precision)
    autocast = {args.device.type: dtype} if dtype else {}
    has_adapters = data_args.lora_rank is not None
    write_record(trainer.best_dir, preprocessor, task, has_adapters, tables["train"].is_pair, autocast)
    best = [entry for entry in trainer.state.log_history if entry.get("step") == trainer.state.best_global_step]
    dev = {
        name.removeprefix("eval_"): value for entry in best for name, value in entry.items() if name.startswith("eval_")
    }
    report: dict[str, Any] = {
        "dnazen_version": __version__, "model": data_args.model, "task": task.record(), "arguments": {
            **dataclasses.asdict(data_args),
            **{name: getattr(args, name) for name in _RECORDED},
            "sequences_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        },
        "data": {str(table.path): sha256_file(table.path) for table in tables.values()},
        "overlaps": {split: overlap._asdict() for split, overlap in overlaps.items()},
        "num_truncated": {split: rows.num_truncated for split, rows in encoded.items()},
        "steps": trainer.state.global_step, "best_step": trainer.state.best_global_step, "dev": dev,
        "train_seconds": train_seconds, "log": trainer.state.log_history,
    }  # fmt: skip
    publish_folder(trainer.best_dir, output_dir / "final")
    del trainer, model
    if "test" in tables:
        # what is tested is what was written, whole, by this process alone
        unset_hf_deepspeed_config()
        finetuned = open_finetuned(output_dir / "final", attn_implementation=data_args.attn_implementation)
        with atomic_file(output_dir / PREDICTIONS_FILE, may_exist=True) as path:
            report["test"], report["num_truncated"]["test"] = predict_table(finetuned, tables["test"], path)
    write_json(output_dir / REPORT_FILE, report)
    for split in ("dev", "test"):
        if split in report:
            print(f"{split:8}" + "  ".join(f"{name} {value:.4f}" for name, value in report[split].items()))
    print(f"best on dev at step {report['best_step']:,} of {report['steps']:,}, {train_seconds:.0f} s of training")
    print(f"model: {output_dir / 'final'}")


def build_model(
    preprocessor: Preprocessor, task: Task, data_args: FinetuningDataArguments, args: FinetuningArguments
) -> torch.nn.Module:
    """The model to train, with adapters if asked for, whole on every process (DeepSpeed partitions it later)."""
    unset_hf_deepspeed_config()
    model = load_model(preprocessor, task, data_args.attn_implementation)
    if args.deepspeed:
        set_hf_deepspeed_config(args.hf_deepspeed_config)
    if data_args.lora_rank is not None:
        alpha = data_args.lora_alpha or 2 * data_args.lora_rank
        model = add_adapters(model, data_args.lora_rank, alpha, data_args.lora_dropout, data_args.lora_target_modules)
    return model


def describe(
    data_args: FinetuningDataArguments, task: Task, overlaps: dict[str, Overlap], encoded: dict[str, Encoded],
    weights: list[float] | None, model: torch.nn.Module, attention: str | None,
) -> str:  # fmt: skip
    """What is about to be trained, for people."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    lines = [
        f"model   {data_args.model}: {total:,} parameters, {trained:,} of them trained"
        + ("" if getattr(model.config, "use_ngrams", True) else ", without G-grams"),
        f"task    {task.kind}, {task.num_labels} outputs"
        + (f", weights {', '.join(f'{weight:.3g}' for weight in weights)}" if weights else ""),
    ]
    if attention is not None:
        lines.append(f"attends {attention}")
    for split, overlap in overlaps.items():
        lines.append("data    " + describe_overlap(split, overlap))
        if split in encoded:
            tokens = sum(map(len, encoded[split].input_ids))
            lines[-1] += f"; {tokens / overlap.rows:.1f} tokens a row, {encoded[split].num_truncated:,} rows cut short"
    return "\n".join(lines)
