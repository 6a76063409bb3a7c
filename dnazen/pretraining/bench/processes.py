"""The benchmark of training: each implementation in a process of its own, then files that hold and show the result."""

import importlib.metadata
import multiprocessing
import platform
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from dnazen.data.corpus import Corpus
from dnazen.defaults import BENCH_SECONDS, MODEL_SIZE
from dnazen.environment import grow_memory_segments, let_idle_threads_sleep
from dnazen.files import InputError, atomic_directory, read_json, write_json
from dnazen.models import DNAZenConfig
from dnazen.models.modeling_dnazen import BACKENDS
from dnazen.ngram.vocab import load_ngrams
from dnazen.pretraining.bench.measure import measure
from dnazen.sizes import RECIPES

VERSIONS_OF = ("dnazen", "torch", "transformers", "numpy")


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
        seconds: how long each is measured, to the end of a step, after a warm-up of 5 steps that compile nothing; of at
            most 20 s and a step, or 120 s if something still compiles.
        max_batch_tokens: tokens of a micro-batch; default: that of pretraining.
        precision: "bf16" or "fp32"; default: bf16, as pretraining.
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
    precision = precision or "bf16"
    # of the processes that are measured, which inherit it
    grow_memory_segments()
    let_idle_threads_sleep()
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
