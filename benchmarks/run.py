"""Times of every operator's implementations on real batches, in one run and on one device.

    python -m benchmarks.run [--op OP] [--impl NAME] [--mode fwd|bwd|fwdbwd] [--fasta FILE --tokenizer DIR]

Runs an operator's tests first (`--skip-tests`: not) and times nothing that fails them. `--set WARPS_PER_SM=12` tries
another value of a constant of the fusion's kernels, to tune it. Appends one row per measurement to `<device>.csv` in
`--output-dir`: what runs on the GPU to the GPU's file, what runs on one CPU core to the CPU's.
Without a GPU the operators that need one are left out, and no row is written for them. Columns: README.md here.
"""

import argparse
import csv
import datetime
import functools
import gc
import itertools
import os
import re
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

from benchmarks.batches import Batch, add_genome_arguments, load_genomes, make_batch
from benchmarks.registry import MODES, OPERATORS, Case, Operator
from benchmarks.yeast import ROOT, commit, is_changed, processor

QUANTILES = (0.2, 0.5, 0.8)
SEQUENCE_LENGTHS = (128, 512)  # tokens at most
BATCH_TOKENS = (32_768, 262_144)
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}  # far beyond any cache
CPU_SECONDS = 2.0  # of repetitions of one measurement
COLUMNS = (
    "op", "impl", "mode", "dtype", "shape", "p20_ms", "p50_ms", "p80_ms", "peak_mib", "gb_per_s", "share_of_copy",
    "ratio_to_baseline", "device", "driver", "torch", "triton", "commit", "dirty", "date",
)  # fmt: skip


def constant(text: str) -> tuple[str, int]:
    """`NAME=INT` of the command line."""
    name, _, value = text.partition("=")
    return name, int(value)


def set_constant(name: str, value: int) -> None:
    """Give a constant of the fusion's kernels another value; only before any of them is compiled.

    Raises:
        ValueError: there is no such constant.
    """
    from dnazen_kernels.ngram_fusion import triton_impl

    old = getattr(triton_impl, name, None)
    if not isinstance(old, (int, triton_impl.tl.constexpr)):
        raise ValueError(f"--set: expected a constant of {triton_impl.__name__}, found {name!r}")
    setattr(triton_impl, name, value if isinstance(old, int) else triton_impl.tl.constexpr(value))


def tests_pass(path: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", path]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def quantiles_ms(function: Callable[[], Any], device: torch.device, leaves: list[torch.Tensor]) -> list[float]:
    """Times of one call at QUANTILES, without the gradients of the call before."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(function, quantiles=list(QUANTILES), grad_to_none=leaves)
    function()
    times, started = [], time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - started < CPU_SECONDS and len(times) < 1000):
        times.append(1e3 * timeit.timeit(function, number=1))  # without garbage collection
    return torch.quantile(torch.tensor(times), torch.tensor(QUANTILES)).tolist()


def timed_function(case: Case, mode: str) -> Callable[[], Any]:
    """What a mode times; the backward alone goes over one graph again and again."""
    if mode == "fwd":
        return case.run
    if mode == "bwd":
        output = case.run()
        return lambda: output.backward(case.grad, retain_graph=True)
    return lambda: case.run().backward(case.grad)


def peak_mib(function: Callable[[], Any], leaves: list[torch.Tensor]) -> float:
    """MiB allocated at most during one call, beyond what was there before."""
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_gb_per_s(device: torch.device) -> float:
    """Measured bandwidth of a copy, bytes read and written."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / 1e6 / quantiles_ms(lambda: target.copy_(source), device, [])[1]


def describe_machine() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
        "dirty": is_changed(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


@functools.cache
def describe_device(kind: str) -> dict[str, str]:
    if kind == "cpu":
        return {"device": f"{processor()}, 1 core", "driver": ""}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return {"device": torch.cuda.get_device_name(), "driver": driver}


def devices_of(operator: Operator) -> set[str]:
    """Kinds of devices, of those here, that some implementation runs on."""
    here = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    return here & {kind for kind, _ in operator.implementations.values()}


def measure_case(case: Case, mode: str, device: torch.device) -> tuple[list[float], float | None]:
    """Quantiles in ms, and the peak in MiB where the device counts it."""
    with torch._functorch.config.patch(donated_buffer=False):  # a graph that is gone over again keeps its buffers
        function = timed_function(case, mode)
        times = quantiles_ms(function, device, case.leaves)
    return times, peak_mib(function, case.leaves) if device.type == "cuda" else None


def measure(
    name: str,
    batch: Batch,
    shape: str,
    modes: list[str],
    copy_speed: dict[str, float],
    only: str | None = None,
    hidden_sizes: tuple[int, ...] = (),
) -> Iterator[dict]:
    """Rows of one operator on one batch, the baseline's first, since the others are compared with it.

    `only` one implementation, without a baseline then, and other `hidden_sizes` than the operator's own, if given.
    """
    operator = OPERATORS[name]
    here = devices_of(operator)
    implementations = sorted(operator.implementations.items(), key=lambda item: item[0] != operator.baseline)
    implementations = [item for item in implementations if only in (None, item[0])]
    sizes_to_try = hidden_sizes if hidden_sizes and operator.hidden_sizes != (0,) else operator.hidden_sizes
    for hidden_size, dtype in itertools.product(sizes_to_try, operator.dtypes):
        inputs = {kind: operator.make_inputs(batch, hidden_size, dtype, torch.device(kind)) for kind in here}
        baseline: dict[str, float] = {}
        for impl, (kind, prepare) in implementations:
            if kind not in here:
                continue
            torch.compiler.reset()  # else compiled code of other shapes counts towards its limit of versions
            sizes, case = inputs[kind].sizes, prepare(inputs[kind])
            for mode in modes:
                gc.collect()
                try:
                    (p20, p50, p80), peak = measure_case(case, mode, torch.device(kind))
                except torch.OutOfMemoryError:
                    print(f"{name}, {impl}, {mode}, {shape}: does not fit the memory; no row")
                    continue
                if impl == operator.baseline:
                    baseline[mode] = p50
                speed = operator.num_bytes[mode](sizes) / 1e6 / p50
                yield {
                    "op": name, "impl": impl, "mode": mode, "dtype": str(dtype).removeprefix("torch."),
                    "shape": f"{shape} T={sizes.num_tokens} B={sizes.num_sequences} N={sizes.num_ngrams} "
                    f"E={sizes.num_edges}" + f" H={hidden_size}" * bool(hidden_size),
                    "p20_ms": f"{p20:.4g}", "p50_ms": f"{p50:.4g}", "p80_ms": f"{p80:.4g}",
                    "peak_mib": None if peak is None else f"{peak:.1f}", "gb_per_s": f"{speed:.4g}",
                    "share_of_copy": f"{speed / copy_speed[kind]:.4g}",
                    "ratio_to_baseline": f"{baseline[mode] / p50:.4g}" if mode in baseline else None,
                    **describe_device(kind),
                }  # fmt: skip


def write_row(row: dict[str, Any], folder: Path) -> None:
    """Append to the file of the row's device."""
    slug = re.sub(r"[^a-z0-9]+", "-", row["device"].lower()).strip("-")
    path = folder / f"{slug}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPERATORS, help="one operator (all)")
    parser.add_argument("--impl", help="one implementation, by its name in registry.py (all)")
    parser.add_argument("--mode", choices=MODES, help="one direction (all that the operator has)")
    parser.add_argument("--hidden-size", type=int, help="of the fusion's states (768 and 1536)")
    parser.add_argument("--skip-tests", action="store_true", help="time what was not tested in this run")
    parser.add_argument("--set", type=constant, metavar="NAME=INT", help="a constant of the fusion's kernels")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "benchmarks" / "results", help="(%(default)s)")
    add_genome_arguments(parser)
    args = parser.parse_args()
    known = {impl for name in ([args.op] if args.op else OPERATORS) for impl in OPERATORS[name].implementations}
    if args.impl is not None and args.impl not in known:
        parser.error(f"--impl: expected one of {', '.join(sorted(known))}, found {args.impl!r}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: the times of an interpreter say nothing")

    if args.set:
        set_constant(*args.set)
    torch.set_num_threads(1)
    names, verdicts = [args.op] if args.op else list(OPERATORS), {}
    for name in list(names):
        operator = OPERATORS[name]
        if not devices_of(operator):
            print(f"{name}: not measured and nothing recorded, for it needs a CUDA device")
            names.remove(name)
            continue
        if operator.tests not in verdicts:
            verdicts[operator.tests] = args.skip_tests or tests_pass(operator.tests)
        if not verdicts[operator.tests]:
            print(f"{name}: {operator.tests} fails, so there is no speed to report")
            names.remove(name)

    if names:
        machine = describe_machine()
        kinds = set().union(*(devices_of(OPERATORS[name]) for name in names))
        copy_speed = {kind: copy_gb_per_s(torch.device(kind)) for kind in sorted(kinds)}
        for kind, speed in copy_speed.items():
            print(f"copy on {describe_device(kind)['device']}: {speed:.1f} GB/s")
        for length, genome in load_genomes(args.fasta, args.tokenizer, SEQUENCE_LENGTHS).items():
            for num_tokens in BATCH_TOKENS:
                batch = make_batch(genome, num_tokens)
                for name in names:
                    modes = [mode for mode in OPERATORS[name].num_bytes if args.mode in (None, mode)]
                    shape = f"{genome.name} S={length}"
                    sizes = (args.hidden_size,) if args.hidden_size else ()
                    for row in measure(name, batch, shape, modes, copy_speed, args.impl, sizes):
                        if args.set:
                            row["impl"] += ", {}={}".format(*args.set)
                        write_row({**row, **machine}, args.output_dir)
                        print(*(f"{row[column]:>12}" for column in COLUMNS if row.get(column)), flush=True)
    sys.exit(not all(verdicts.values()))


if __name__ == "__main__":
    main()
