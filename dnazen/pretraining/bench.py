"""Speed of real training steps, loader to optimizer, and how much of the device's arithmetic they use."""

import importlib.metadata
import importlib.util
import multiprocessing
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed

from dnazen.batches.collator import Masking, PackedCollator, PackedDataset
from dnazen.batches.sampler import SPECIAL_TOKENS_PER_SEQUENCE, MicroBatch
from dnazen.data.corpus import Corpus
from dnazen.defaults import BENCH_SECONDS, MODEL_SIZE
from dnazen.environment import grow_memory_segments, stand_alone
from dnazen.files import InputError, atomic_directory, read_json, write_json
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.models.modeling_dnazen import BACKENDS
from dnazen.ngram.vocab import load_ngrams
from dnazen.pretraining.arguments import RECIPES, PretrainingArguments
from dnazen.pretraining.trainer import Batch, PretrainingTrainer

# dense bf16 TFLOP/s on the data sheets, by a part of the device's name
PEAK_TFLOPS = {"H200": 990, "H100": 990, "H800": 990, "GH200": 990, "A100": 312, "A800": 312, "B200": 2250}
VERSIONS_OF = ("dnazen", "torch", "transformers", "numpy")
QUIET_STEPS = 5  # in a row that compile nothing end the warm-up
MAX_WARM_UP_STEPS = 100
PROFILED_STEPS = 3
LARGEST_TRACE = 16 * 2**20  # bytes, compressed; a larger one is not kept


def training_flops(config: DNAZenConfig, lengths: np.ndarray, ngram_lengths: np.ndarray, num_masked: int) -> float:
    """Floating-point operations that one forward and backward owe to these sequences: matrix products and attention.

    A multiply-add counts 2, the backward twice the forward. Per token the token encoder owes `4 H^2 + 3 H F` multiply-adds in a
    layer and, in attention, `2 H n` where n is the length of its sequence; the G-gram encoder `4 H^2 + 2 H F` per
    G-gram and as much attention; the embeddings `2 w H^2` per token if w neighbors on either side enter; the head
    `H^2 + H V` per masked token. Nothing is owed to padding, nor for looking up, norms, the fusion or what is computed
    twice.

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


class Compilations:
    """Counts what this process compiles, or loads compiled: Dynamo's graphs, Triton's kernels (those that a graph
    brings belong to the graph), FlashAttention-4's kernels.
    """

    def __init__(self) -> None:
        self._triton_kernels = 0
        if importlib.util.find_spec("triton"):
            import triton

            triton.knobs.runtime.jit_post_compile_hook = self._count_kernel

    def _count_kernel(self, **_: Any) -> None:
        self._triton_kernels += 1

    def total(self) -> int:
        """So far."""
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return graphs + self._triton_kernels + sum(len(cache.cache) for cache in self._flash_attention_4_caches())

    def counts(self, attention: str) -> bool:
        """Whether kernels of that back-end are among the total: FlashAttention-4's are only where its caches are found,
        by the name that they have in 4.0.0b36.
        """
        return attention != "flash_attention_4" or len(self._flash_attention_4_caches()) > 0

    def _flash_attention_4_caches(self) -> list[Any]:
        interface = vars(sys.modules.get("flash_attn.cute.interface", object)).values()
        caches = (getattr(item, "compile_cache", None) for item in interface)
        # functions may share one
        return list({id(cache): cache for cache in caches if hasattr(cache, "cache")}.values())


class Stopwatch(TrainerCallback):
    """Waits until nothing compiles any more, measures until `seconds` have passed, profiles some steps if a folder is
    given to write to, and stops the run.
    """

    def __init__(self, trainer: "BenchTrainer", seconds: float, profile_folder: str | None):
        self.trainer, self.seconds, self.profile_folder = trainer, seconds, profile_folder
        self.compilations, self.compiled, self.quiet_steps = Compilations(), 0, 0
        self.is_measuring, self.profiler = False, None

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
            if self.quiet_steps < QUIET_STEPS and state.global_step < MAX_WARM_UP_STEPS:
                return
            if is_cuda:
                torch.cuda.synchronize()
            self.is_measuring = True
            warm_up = {"steps": state.global_step, "compilations": compiled, "ended": self.quiet_steps >= QUIET_STEPS}
            self.trainer.start(time.perf_counter(), warm_up)


def idle_gaps(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Times between the first start and the last end that no `(start, end)` covers, in order."""
    gaps, covered = [], None
    for start, end in sorted(spans):
        if covered is not None and start > covered:
            gaps.append((covered, start))
        covered = end if covered is None else max(covered, end)
    return gaps


def summarize_profile(events: Iterable[Any], num_steps: int) -> dict[str, Any]:
    """What a profiler's events come to, for one of `num_steps` steps.

    Returns:
        `expensive`: the ten kernels (without a GPU: operators, without what they call) that take longest together, with
        `calls` and `ms`. `busy_ms`, `idle_ms` of the GPU, and `gaps`: the ten operators of the host in whose course, or
        in Python between operators, the GPU was idle longest. The last three are None without a GPU.
    """
    # a step's own mark covers everything
    host = [e for e in events if e.device_type == DeviceType.CPU and not e.name.startswith("ProfilerStep")]
    device = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    costs: dict[str, list[float]] = {}
    for event in device or host:
        cost = costs.setdefault(event.name, [0, 0.0])
        cost[0] += 1
        cost[1] += event.time_range.elapsed_us() if device else event.self_cpu_time_total
    summary = {"steps": num_steps, "unit": "kernel" if device else "operator", "expensive": _largest(costs, num_steps)}
    if not device:
        return {**summary, "busy_ms": None, "idle_ms": None, "gaps": None}
    spans = [(event.time_range.start, event.time_range.end) for event in device]
    gaps = idle_gaps(spans)
    idle = sum(end - start for start, end in gaps)
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    # the outermost operator says more than the launch in its depth
    starts, ends = (np.array([getattr(event.time_range, name) for event in host]) for name in ("start", "end"))
    waits: dict[str, list[float]] = {}
    for start, end in gaps:
        middle = (start + end) / 2
        covering = np.flatnonzero((starts <= middle) & (middle <= ends))
        outermost = max(covering, key=lambda index: ends[index] - starts[index], default=None)
        wait = waits.setdefault("Python" if outermost is None else host[outermost].name, [0, 0.0])
        wait[0] += 1
        wait[1] += end - start
    times = {"busy_ms": (whole - idle) / 1e3 / num_steps, "idle_ms": idle / 1e3 / num_steps}
    return {**summary, **times, "gaps": _largest(waits, num_steps)}


def _largest(costs: dict[str, list[float]], num_steps: int) -> list[dict[str, Any]]:
    """The ten names with most microseconds, per step."""
    ordered = sorted(costs.items(), key=lambda item: -item[1][1])[:10]
    return [{"name": name, "calls": calls / num_steps, "ms": us / 1e3 / num_steps} for name, (calls, us) in ordered]


def write_profile(profiler: torch.profiler.profile, folder: str) -> None:
    """`profile.json` (`summarize_profile`) and, unless it is large, `trace.json.gz` for Chrome's viewer or Perfetto."""
    trace = Path(folder) / "trace.json.gz"
    profiler.export_chrome_trace(str(trace))
    if trace.stat().st_size > LARGEST_TRACE:
        trace.unlink()
    summary = {**summarize_profile(profiler.events(), PROFILED_STEPS), "trace": trace.name if trace.exists() else None}
    write_json(Path(folder) / "profile.json", summary)


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
    if attn_implementation is not None:
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
            agreement={},
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


def bench(
    corpus: str,
    ngrams: str,
    output_dir: str,
    *,
    model: str = MODEL_SIZE,
    impl: list[str] | None = None,
    seconds: float = BENCH_SECONDS,
    max_batch_tokens: int | None = None,
    precision: str | None = None,
    deepspeed: str | None = None,
    torch_compile: bool = False,
    attn_implementation: str | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Measure the trainer as it runs by default, and each of `impl` beside it, each in a process of its own.

    Writes `bench.json` and `bench.png` to `output_dir` and returns what the former holds.

    Args:
        corpus, ngrams: folders written by `dnazen corpus` and `dnazen ngrams`.
        output_dir: where to write; must not exist yet.
        model: a size or a configuration.
        impl: "reference" for the padded, dense path, "triton" to insist on the kernels.
        seconds: how long each is measured, after a warm-up that lasts until some steps in a row compile nothing.
        max_batch_tokens: tokens of a micro-batch; default: that of pretraining.
        precision: "bf16" or "fp32"; default: bf16 on a GPU, fp32 on a CPU.
        deepspeed: a configuration of DeepSpeed's, as for pretraining, whose bf16 is that of weights and all states;
            without, bf16 is autocast's.
        torch_compile: compile layers, but not those of the reference.
        attn_implementation: a key of `BACKENDS`; default: the best that runs. The reference has its own.
        profile: profile some further steps of the first, into `profile.json` and `trace.json.gz` (`write_profile`).

    Raises:
        RuntimeError: the trainer itself failed; where one of `impl` does, `failed` says why.
        InputError: `attn_implementation` is unknown or cannot run here; see `Corpus.open`, `load_ngrams` and
            `DNAZenConfig.from_size`.
    """
    if attn_implementation is not None and attn_implementation not in BACKENDS:
        expected = ", ".join(BACKENDS)
        raise InputError(f"attn_implementation: expected one of {expected}, found {attn_implementation!r}")
    DNAZenConfig.from_size(model)
    load_ngrams(ngrams, Corpus.open(corpus))
    max_batch_tokens = max_batch_tokens or RECIPES.get(model, RECIPES["base"]).max_batch_tokens
    precision = precision or ("bf16" if torch.cuda.is_available() else "fp32")
    grow_memory_segments()  # of the processes that are measured, which inherit it
    rows, failed = [], {}
    with atomic_directory(output_dir) as folder:
        for name in ["auto", *(impl or [])]:
            # a process of its own: peak memory and compiled code of one must not be the other's
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                profile_folder = str(folder) if profile and name == "auto" else None
                job = pool.submit(
                    measure, name, corpus, ngrams, model, seconds, max_batch_tokens, precision, deepspeed,
                    torch_compile, attn_implementation, profile_folder,
                )  # fmt: skip
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
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS_OF},
            "rows": rows,
            "failed": failed,
            "speed_up": [rows[0]["tokens_per_second"] / row["tokens_per_second"] for row in rows],
            "profile": read_json(folder / "profile.json", "a profile") if profile else None,
        }
        write_json(folder / "bench.json", result)
        _plot(folder / "bench.png", result)
    return result


def format_bench(result: dict[str, Any]) -> str:
    """A table with a column for each implementation."""
    size = f"up to {result['max_batch_tokens']:,} tokens a step"
    lines = [f"{result['model']}, {result['precision']}, {size}, on {result['machine']}"]
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
    for row in result["rows"]:
        if not row["warm_up"]["ended"]:
            lines.append(f"{row['impl']}: still compiling after {row['warm_up']['steps']} steps, when measuring began")
        if not row["counts_attention"]:
            kernels = f"{row['attention']}'s kernels are not counted among what compiles"
            lines.append(f"{row['impl']}: {kernels}, so the warm-up may have ended early: its caches were not found")
        if row["compilations"]:
            lines.append(f"{row['impl']}: {row['compilations']} compilations while it was measured")
    return "\n".join(lines + format_profile(result["profile"]) if result["profile"] else lines)


def format_profile(profile: dict[str, Any]) -> list[str]:
    """Lines that say what `summarize_profile` found."""

    def table(rows: list[dict[str, Any]]) -> list[str]:
        return [f"{row['ms']:10.3f} ms {row['calls']:8.1f} x  {row['name'][:90]}" for row in rows]

    lines = [f"in a step, the {profile['unit']}s that take longest (mean of {profile['steps']} steps):"]
    lines += table(profile["expensive"])
    if profile["gaps"] is None:
        return [*lines, "no GPU, so no gaps"]
    busy, idle = profile["busy_ms"], profile["idle_ms"]
    lines.append(f"in a step, GPU busy {busy:.2f} ms, idle {idle:.2f} ms, the host being in:")
    return lines + table(profile["gaps"])


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
