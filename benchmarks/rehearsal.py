"""What the published pretraining data would take, 35 billion bases: extrapolated from a measurement, not measured.

    python -m benchmarks.rehearsal

Reads `results/scale-*.json` (of `benchmarks.scale`) and prints a table for each. Work is taken to grow with the bases,
and to be shared by all cores but for what the first process does. For G-grams and distinct runs of linked pairs that is
more than it will be: new ones become rarer, the more has been seen. What is not in it: disks slower than the cores, and
memory bandwidth, which 96 cores share.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.yeast import ROOT

BASES = 35e9
CORES = (16, 96)
PIECE_BYTES = 16  # of memory, to tell duplicates
PIECE_BASES = 2040
RUN_BYTES = 70  # of memory, while runs are merged: in the workers, each its share, and in the first process
NGRAM_BYTES = 500  # of memory in the first process: 494 and 491 a G-gram to list and write 200,000 and 600,000 of them


def extrapolate(measured: dict[str, Any], cores: int, bases: float = BASES) -> dict[str, dict[str, float]]:
    """Seconds, GiB of memory of the first process and of all, and GB of disk of both jobs on `cores` cores."""
    workers = max(measured["corpus"], key=lambda name: int(name.split()[0]))
    corpus, ngrams = measured["corpus"][workers], measured["ngrams"][workers]
    times = bases / corpus["bases"]
    found = {}
    for name, job in (("corpus", corpus), ("ngrams", ngrams)):
        start = measured["start"]["processor_seconds"]
        first = times * max(0, job["processor_seconds_of_the_first"] - start)
        shared = times * (job["processor_seconds"] - job["processor_seconds_of_the_first"]) / cores
        if name == "corpus":
            more, shared_bytes = PIECE_BYTES * bases / PIECE_BASES, 0
            seconds = start + max(first, shared)  # the first process reads and writes while others tokenize
        else:
            shared_bytes = RUN_BYTES * times * ngrams["num_runs"]
            more = shared_bytes + NGRAM_BYTES * times * ngrams["num_ngrams"]
            seconds = start + first + shared
        memory = job["peak_mib"] / 2**10 + more / 2**30
        found[name] = {
            "seconds": seconds,
            "first": memory,
            "all": memory + cores * job["peak_mib_of_a_child"] / 2**10 + shared_bytes / 2**30,
            "disk": times * job["disk_bytes"] / 1e9,
        }
    return found


def table(measured: dict[str, Any]) -> str:
    """The extrapolation as Markdown."""
    tokens = BASES / measured["corpus"]["1 workers"]["bases"] * measured["corpus"]["1 workers"]["tokens"]
    lines = [
        f"From {measured['device']}: {BASES / 1e9:.0f} billion bases, {tokens / 1e9:.1f} billion tokens; extrapolated, "
        "not measured",
        "",
        "| job | cores | time | memory of the first process | of all | disk |",
        "|---|---|---|---|---|---|",
    ]
    names = {"corpus": "clean and tokenize", "ngrams": "find G-grams"}
    for name, text in names.items():
        for cores in CORES:
            job = extrapolate(measured, cores)[name]
            memory = f"{job['first']:.1f} GiB | {job['all']:.0f} GiB"
            lines.append(f"| {text} | {cores} | {job['seconds'] / 60:.0f} min | {memory} | {job['disk']:.1f} GB |")
    return "\n".join(lines)


def main() -> None:
    for path in sorted(Path(ROOT / "benchmarks" / "results").glob("scale-*.json")):
        print(table(json.loads(path.read_text())), end="\n\n")


if __name__ == "__main__":
    main()
