"""Speed of real training steps, loader to optimizer, and how much of the device's arithmetic they use."""

import importlib.metadata
import multiprocessing
import os
import platform
import resource
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed

from dnazen.data.collator import Masking, PackedCollator, PackedDataset
from dnazen.data.sampler import SPECIAL_TOKENS_PER_SEQUENCE, MicroBatch
from dnazen.data.shards import Corpus
from dnazen.files import atomic_directory, write_json
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.ngram.vocab import load_ngrams
from dnazen.train.arguments import RECIPES, PretrainingArguments
from dnazen.train.trainer import Batch, PretrainingTrainer

# dense bf16 TFLOP/s on the data sheets, by a part of the device's name
PEAK_TFLOPS = {"H200": 990, "H100": 990, "H800": 990, "GH200": 990, "A100": 312, "A800": 312, "B200": 2250}
WARM_UP_STEPS = 3


def training_flops(config: DNAZenConfig, lengths: np.ndarray, ngram_lengths: np.ndarray, num_masked: int) -> float:
    """Floating-point operations that one forward and backward owe to these sequences: matrix products and attention.

    A multiply-add counts 2, the backward twice the forward. Per token E4BU owes `4 H^2 + 3 H F` multiply-adds in a layer
    and, in attention, `2 H n` where n is the length of its sequence; the G-gram encoder `4 H^2 + 2 H F` per G-gram and as
    much attention; the embeddings `2 w H^2` per token if w neighbors on either side enter; the head `H^2 + H V` per
    masked token. Nothing is owed to padding, nor for looking up, norms, the fusion or what is computed twice.

    Args:
        config: the model's sizes.
        lengths, ngram_lengths: tokens, and G-grams, of each sequence.
        num_masked: masked tokens in all.
    """
    hidden, feed_forward = config.hidden_size, config.intermediate_size
    lengths, ngram_lengths = lengths.astype(np.float64), ngram_lengths.astype(np.float64)
    token = (4 * hidden**2 + 3 * hidden * feed_forward) * lengths.sum() + 2 * hidden * (lengths**2).sum()
    ngram = (4 * hidden**2 + 2 * hidden * feed_forward) * ngram_lengths.sum() + 2 * hidden * (ngram_lengths**2).sum()
    head = (hidden**2 + hidden * config.vocab_size) * num_masked
    neighbors = 2 * config.neighbor_window * hidden**2 * lengths.sum()
    return float(6 * (neighbors + config.num_hidden_layers * token + config.num_hidden_ngram_layers * ngram + head))


class FixedLength(Dataset):
    """Batches whose sequences the reference path pads to one length, as the published code does."""

    def __init__(self, dataset: PackedDataset, length: int):
        self.dataset, self.split, self.length = dataset, dataset.split, length

    def __getitem__(self, micro_batch: MicroBatch) -> tuple[Batch, int]:
        batch, dropped = self.dataset[micro_batch]
        return {**batch, "max_seqlen": self.length}, dropped


class Stopwatch(TrainerCallback):
    """Measures from the end of the warm-up until `seconds` have passed, then stops the run."""

    def __init__(self, trainer: "BenchTrainer", seconds: float):
        self.trainer, self.seconds = trainer, seconds

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < WARM_UP_STEPS:
            return
        if args.device.type == "cuda":
            # once to start the clock, then as seldom as it takes to be sure that the time is up
            if state.global_step == WARM_UP_STEPS or time.perf_counter() - self.trainer.started >= self.seconds:
                torch.cuda.synchronize()
        now = time.perf_counter()
        if state.global_step == WARM_UP_STEPS:
            self.trainer.start(now)
        elif now - self.trainer.started >= self.seconds:
            self.trainer.elapsed = now - self.trainer.started
            control.should_training_stop = True


class BenchTrainer(PretrainingTrainer):
    """The trainer, counting what goes through it."""

    def start(self, now: float) -> None:
        """Begin to measure."""
        self.started, self.loader_seconds, self.measured_steps = now, 0.0, 0
        self.work: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """The trainer's, with the time that the loader keeps it waiting and the work it brings."""
        batches, masked = super().get_batch_samples(self._timed(epoch_iterator), num_batches, device)
        self.measured_steps += 1
        for batch in batches:  # lengths may lie on a GPU, which must not be waited for
            num_masked = len(batch["masked_positions"])
            self.work.append((batch["cu_seqlens"].diff(), batch["ngram_cu_seqlens"].diff(), num_masked))
        return batches, masked

    def _timed(self, iterator: Iterator) -> Iterator:
        while True:
            began = time.perf_counter()
            item = next(iterator, None)
            self.loader_seconds += time.perf_counter() - began
            if item is None:
                return
            yield item

    def sum_work(self) -> dict[str, float]:
        """What went through since `start`: `flops`, `tokens`, `sequences` and `ngrams`."""
        total = dict.fromkeys(("flops", "tokens", "sequences", "ngrams"), 0.0)
        for *offsets, num_masked in self.work:
            lengths, ngram_lengths = (tensor.cpu().numpy() for tensor in offsets)
            total["flops"] += training_flops(self.model.config, lengths, ngram_lengths, num_masked)
            total["tokens"] += int(lengths.sum())
            total["sequences"] += len(lengths)
            total["ngrams"] += int(ngram_lengths.sum())
        return total


def measure(
    impl: str,
    corpus_dir: str,
    ngrams_dir: str,
    model: str,
    seconds: float,
    max_batch_tokens: int,
    precision: str,
    deepspeed: str | None,
    torch_compile: bool,
) -> dict[str, Any]:
    """Train for `seconds` after a warm-up, in this process; returns what came out.

    With `impl="reference"` sequences are padded to the corpus' longest possible one, the matching matrix is dense, the
    fusion an einsum and attention explicit; nothing is compiled.
    """
    if deepspeed is not None:  # which wants to be told that it is alone
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    set_seed(42)
    corpus = Corpus.open(corpus_dir)
    vocabulary = load_ngrams(ngrams_dir, corpus)
    config = DNAZenConfig.from_size(
        model, vocab_size=len(corpus.tokenizer), ngram_vocab_size=vocabulary.vocab_size, impl=impl
    )
    collator = PackedCollator(corpus.tokenizer, vocabulary, Masking(0.15, True, 42))
    longest = corpus.manifest["parameters"]["max_tokens"] + SPECIAL_TOKENS_PER_SEQUENCE
    dataset: Dataset = PackedDataset(corpus.train, collator)
    if impl == "reference":
        dataset = FixedLength(dataset, longest)
    with tempfile.TemporaryDirectory() as folder:
        args = PretrainingArguments(
            output_dir=folder,
            max_steps=10**9,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=100,
            bf16=precision == "bf16",
            deepspeed=deepspeed,
            torch_compile=torch_compile and impl != "reference",
            logging_strategy="no",
            eval_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
        )
        trainer = BenchTrainer(
            model=DNAZenForMaskedLM(config),
            args=args,
            processing_class=corpus.tokenizer,
            train_dataset=dataset,
            eval_dataset=PackedDataset(corpus.validation, collator),
            vocabulary=vocabulary,
            max_batch_tokens=max_batch_tokens,
            agreement={},
        )
        trainer.start(0.0)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Stopwatch(trainer, seconds))
        trainer.train()
    is_cuda = args.device.type == "cuda"
    device = torch.cuda.get_device_name() if is_cuda else "CPU"
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    attention = trainer.model.select_attention(args.device, dtype)
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in device), None)
    work = trainer.sum_work()
    rows = work["sequences"] * longest if impl == "reference" else work["tokens"]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "impl": impl,
        "attention": "padded" if impl == "reference" else attention.name,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": trainer.measured_steps,
        "seconds": trainer.elapsed,
        "tokens_per_second": work["tokens"] / trainer.elapsed,
        "tflops_per_second": work["flops"] / trainer.elapsed / 1e12,
        "mfu": work["flops"] / trainer.elapsed / 1e12 / peak if peak else None,
        "tokens_per_step": work["tokens"] / trainer.measured_steps,
        "sequences_per_step": work["sequences"] / trainer.measured_steps,
        "padding_share": 1 - work["tokens"] / rows,
        "loader_wait": trainer.loader_seconds / trainer.elapsed,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if is_cuda else resident,
        "ngrams_per_token": work["ngrams"] / work["tokens"],
        "device": device,
    }


def bench(
    corpus: str,
    ngrams: str,
    output_dir: str,
    *,
    model: str = "tiny",
    impl: list[str] | None = None,
    seconds: float = 30.0,
    max_batch_tokens: int | None = None,
    precision: str | None = None,
    deepspeed: str | None = None,
    torch_compile: bool = False,
) -> dict[str, Any]:
    """Measure the trainer as it runs by default, and each of `impl` beside it, each in a process of its own.

    Writes `bench.json` and `bench.png` to `output_dir` and returns what the former holds.

    Args:
        corpus, ngrams: folders written by `dnazen corpus` and `dnazen ngrams`.
        output_dir: where to write; must not exist yet.
        model: a size or a configuration.
        impl: "reference" for the padded, dense path, "triton" to insist on the kernels.
        seconds: how long each is measured, after a warm-up of a few steps.
        max_batch_tokens: tokens of a micro-batch; default: that of pretraining.
        precision: "bf16" or "fp32"; default: bf16 on a GPU, fp32 on a CPU.
        deepspeed: a configuration of DeepSpeed's, as for pretraining, whose bf16 is that of weights and all states;
            without, bf16 is autocast's.
        torch_compile: compile layers, but not those of the reference.

    Raises:
        RuntimeError: the trainer itself failed; where one of `impl` does, `failed` says why.
        InputError: see `Corpus.open`, `load_ngrams` and `DNAZenConfig.from_size`.
    """
    DNAZenConfig.from_size(model)
    load_ngrams(ngrams, Corpus.open(corpus))
    max_batch_tokens = max_batch_tokens or RECIPES.get(model, RECIPES["base"]).max_batch_tokens
    precision = precision or ("bf16" if torch.cuda.is_available() else "fp32")
    rows, failed = [], {}
    with atomic_directory(output_dir) as folder:
        for name in ["auto", *(impl or [])]:
            # a process of its own: peak memory and compiled code of one must not be the other's
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                job = pool.submit(
                    measure, name, corpus, ngrams, model, seconds, max_batch_tokens, precision, deepspeed, torch_compile
                )
                try:
                    rows.append(job.result())
                except RuntimeError as error:  # out of memory, say
                    if not rows:
                        raise
                    failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        result = {
            "model": model,
            "precision": precision,
            "max_batch_tokens": max_batch_tokens,
            "deepspeed": deepspeed,
            "torch_compile": torch_compile,
            "machine": f"{rows[0]['device']}, {psutil.cpu_count()} cores, {platform.machine()}",
            "versions": {name: importlib.metadata.version(name) for name in ("dnazen", "torch", "transformers", "numpy")},
            "rows": rows,
            "failed": failed,
            "speed_up": [rows[0]["tokens_per_second"] / row["tokens_per_second"] for row in rows],
        }
        write_json(folder / "bench.json", result)
        _plot(folder / "bench.png", result)
    return result


def format_bench(result: dict[str, Any]) -> str:
    """A table with a column for each implementation."""
    lines = [
        f"{result['model']}, {result['precision']}, up to {result['max_batch_tokens']:,} tokens a step, on {result['machine']}"
    ]
    table = {
        "tokens/s": "{tokens_per_second:,.0f}",
        "TFLOP/s": "{tflops_per_second:.3f}",
        "tokens a step": "{tokens_per_step:,.0f}",
        "sequences a step": "{sequences_per_step:,.1f}",
        "padding": "{padding_share:.1%}",
        "loader wait": "{loader_wait:.1%}",
        "G-grams a token": "{ngrams_per_token:.3f}",
        "peak memory, MiB": "{memory:,.0f}",
        "attention": "{attention}",
    }
    if result["rows"][0]["mfu"] is not None:
        table["MFU"] = "{mfu:.1%}"
    lines.append(" " * 18 + "".join(f"{row['impl']:>16}" for row in result["rows"]))
    for name, form in table.items():
        cells = [form.format(**row, memory=row["peak_memory_bytes"] / 2**20) for row in result["rows"]]
        lines.append(f"{name:18}" + "".join(f"{cell:>16}" for cell in cells))
    for row, ratio in list(zip(result["rows"], result["speed_up"], strict=True))[1:]:
        lines.append(f"{ratio:.2f} times as fast as {row['impl']}")
    lines += [f"{name} failed: {reason}" for name, reason in result["failed"].items()]
    return "\n".join(lines)


def _plot(path: Path, result: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    names = [row["impl"] for row in result["rows"]]
    bars = {
        "tokens/s (unpadded)": [row["tokens_per_second"] for row in result["rows"]],
        "peak memory (MiB)": [row["peak_memory_bytes"] / 2**20 for row in result["rows"]],
    }
    for axes, (title, values) in zip(figure.subplots(1, 2), bars.items(), strict=True):
        axes.bar_label(axes.bar(names, values), fmt="{:,.0f}")
        axes.set(title=title)
        axes.margins(y=0.15)
    figure.suptitle(f"DNAZEN {result['model']}, {result['precision']}, {result['machine']}", fontsize=9)
    figure.savefig(path, dpi=150, format="png")
