"""Measured training steps of one implementation, in the process that calls."""

import resource
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed

from dnazen.batches.collator import Masking, PackedCollator, PackedDataset
from dnazen.batches.sampler import SPECIAL_TOKENS_PER_SEQUENCE, MicroBatch
from dnazen.data.corpus import Corpus
from dnazen.environment import stand_alone
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.ngram.vocab import load_ngrams
from dnazen.pretraining.bench.compilations import Compilations
from dnazen.pretraining.bench.flops import PEAK_TFLOPS, skipped_flops, training_flops
from dnazen.pretraining.bench.profile import PROFILED_STEPS, write_profile
from dnazen.pretraining.trainer import Batch, PretrainingTrainer
from dnazen.pretraining.training_arguments import PretrainingArguments

# of the warm-up; see `Stopwatch`
QUIET_STEPS, MAX_WARM_UP_STEPS = 5, 100
WARM_UP_SECONDS, MAX_WARM_UP_SECONDS = 20.0, 120.0


class FixedLength(Dataset):
    """Batches whose sequences the reference path pads to one length, as the published code does."""

    def __init__(self, dataset: PackedDataset, length: int):
        self.dataset, self.split, self.length = dataset, dataset.split, length

    def __getitem__(self, micro_batch: MicroBatch) -> tuple[Batch, int]:
        batch, dropped = self.dataset[micro_batch]
        return {**batch, "max_seqlen": self.length}, dropped


class Stopwatch(TrainerCallback):
    """Waits until nothing compiles any more, measures until `seconds` have passed, and stops the run.

    The warm-up ends after `QUIET_STEPS` steps in a row that compile nothing; from `WARM_UP_SECONDS` on one is enough;
    and what compiles for ever is cut after `MAX_WARM_UP_SECONDS` or `MAX_WARM_UP_STEPS`. With a folder to write to,
    some further steps are profiled.
    """

    def __init__(self, trainer: "BenchTrainer", seconds: float, profile_folder: str | None):
        self.trainer, self.seconds, self.profile_folder = trainer, seconds, profile_folder
        self.compilations, self.compiled, self.quiet_steps = Compilations(), 0, 0
        self.is_measuring, self.profiler = False, None
        self.began = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        is_cuda = args.device.type == "cuda"
        if self.profiler is not None:
            # before the first profiled step and after the last: in between, the host goes ahead as in training
            if is_cuda and self.profiler.step_num in (0, PROFILED_STEPS):
                torch.cuda.synchronize()
            self.profiler.step()
            if self.profiler.step_num > PROFILED_STEPS:
                self.profiler.stop()
                write_profile(self.profiler, self.profile_folder)
                control.should_training_stop = True
        elif self.is_measuring:
            if time.perf_counter() - self.trainer.started < self.seconds:
                return
            if is_cuda:  # as seldom as it takes to be sure that the time is up
                torch.cuda.synchronize()
            self.trainer.stop(time.perf_counter(), self.compilations.total() - self.compiled)
            if self.profile_folder is None:
                control.should_training_stop = True
                return
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_cuda
            schedule = torch.profiler.schedule(wait=0, warmup=1, active=PROFILED_STEPS, repeat=1)
            self.profiler = torch.profiler.profile(activities=activities, schedule=schedule)
            self.profiler.start()
        else:
            compiled = self.compilations.total()
            self.quiet_steps = self.quiet_steps + 1 if compiled == self.compiled else 0
            self.compiled = compiled
            elapsed = time.perf_counter() - self.began
            is_cut = state.global_step >= MAX_WARM_UP_STEPS or elapsed >= MAX_WARM_UP_SECONDS
            if self.quiet_steps < (QUIET_STEPS if elapsed < WARM_UP_SECONDS else 1) and not is_cut:
                return
            if is_cuda:
                torch.cuda.synchronize()
            self.is_measuring = True
            warm_up = {"steps": state.global_step, "seconds": elapsed, "compilations": compiled}
            warm_up["ended"] = self.quiet_steps > 0
            self.trainer.start(time.perf_counter(), warm_up)


class BenchTrainer(PretrainingTrainer):
    """The trainer, counting what goes through it."""

    def start(self, now: float, warm_up: dict[str, Any]) -> None:
        """Begin to measure."""
        self.started, self.loader_seconds, self.measured_steps = now, 0.0, 0
        self.warm_up = warm_up
        self.work: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def stop(self, now: float, compilations: int) -> None:
        """Keep what was measured; `compilations` happened meanwhile."""
        is_cuda = self.args.device.type == "cuda"
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.measured = {
            "steps": self.measured_steps,
            "seconds": now - self.started,
            "loader_seconds": self.loader_seconds,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if is_cuda else resident,
            "compilations": compilations,
            **self.sum_work(),
        }

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
        """What went through since `start`: `flops` (owed), `skipped_flops`, `tokens`, `sequences` and `ngrams`."""
        total = dict.fromkeys(("flops", "skipped_flops", "tokens", "sequences", "ngrams"), 0.0)
        for *offsets, num_masked in self.work:
            lengths, ngram_lengths = (tensor.cpu().numpy() for tensor in offsets)
            total["flops"] += training_flops(self.model.config, lengths, ngram_lengths, num_masked)
            total["skipped_flops"] += skipped_flops(self.model.config, int(lengths.sum()), num_masked)
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
    attn_implementation: str | None,
    profile_folder: str | None,
) -> dict[str, Any]:
    """Train for `seconds` after a warm-up, in this process; returns what came out.

    With `impl="reference"` sequences are padded to the corpus' longest possible one, the matching matrix is dense, the
    fusion an einsum and attention explicit; nothing is compiled. To `profile_folder`, unless it is None, goes a profile
    of some further steps.
    """
    if deepspeed is not None:
        stand_alone()
    set_seed(42)
    corpus = Corpus.open(corpus_dir)
    vocabulary = load_ngrams(ngrams_dir, corpus)
    config = DNAZenConfig.from_size(
        model, vocab_size=len(corpus.tokenizer), ngram_vocab_size=vocabulary.vocab_size, impl=impl
    )
    if attn_implementation is not None and impl != "reference":
        config._attn_implementation = attn_implementation
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
            run_fingerprint={},
        )
        trainer.start(0.0, {})
        trainer.remove_callback(PrinterCallback)
        stopwatch = Stopwatch(trainer, seconds, profile_folder)
        trainer.add_callback(stopwatch)
        trainer.train()
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    attention = "padded" if impl == "reference" else trainer.model.select_attention(args.device, dtype).name
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in device), None)
    measured, elapsed = trainer.measured, trainer.measured["seconds"]
    rows = measured["sequences"] * longest if impl == "reference" else measured["tokens"]
    return {
        "impl": impl,
        "attention": attention,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": measured["steps"],
        "seconds": elapsed,
        "tokens_per_second": measured["tokens"] / elapsed,
        "tflops_per_second": measured["flops"] / elapsed / 1e12,
        "work_done": 1 - measured["skipped_flops"] / measured["flops"],
        "mfu": measured["flops"] / elapsed / 1e12 / peak if peak else None,
        "tokens_per_step": measured["tokens"] / measured["steps"],
        "sequences_per_step": measured["sequences"] / measured["steps"],
        "padding_share": 1 - measured["tokens"] / rows,
        "loader_wait": measured["loader_seconds"] / elapsed,
        "peak_memory_bytes": measured["peak_memory_bytes"],
        "ngrams_per_token": measured["ngrams"] / measured["tokens"],
        "warm_up": trainer.warm_up,
        "compilations": measured["compilations"],
        "counts_attention": stopwatch.compilations.counts(attention),
        "device": device,
    }
