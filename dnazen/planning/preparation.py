"""What corpus and G-grams of many bases take on a CPU: extrapolated from a measurement, not measured.

Work is taken to grow with the bases, and to be shared by all cores but for what the first process does. For G-grams
and distinct runs of linked pairs that is more than it will be: new ones become rarer, the more has been seen. What is
not in it: disks slower than the cores, and memory bandwidth, which many cores share.
"""

from typing import Any, NamedTuple

PIECE_BYTES = 16  # of memory, to tell duplicates
PIECE_BASES = 2040
RUN_BYTES = 70  # of memory, while runs are merged: in the workers, each its share, and in the first process
NGRAM_BYTES = 500  # of memory in the first process: 494 and 491 a G-gram to list and write 200,000 and 600,000 of them

# what `extrapolate` reads of benchmarks/results/scale-x86_64-2-cores.json
MEASURED: dict[str, Any] = {
    "device": "AMD EPYC, 2 cores",
    "start": {"processor_seconds": 2.3},
    "corpus": {
        "2 workers": {
            "bases": 516705200, "tokens": 105006659, "processor_seconds": 93.1, "processor_seconds_of_the_first": 6.9,
            "peak_mib": 285, "peak_mib_of_a_child": 225, "disk_bytes": 216708611,
        }
    },
    "ngrams": {
        "2 workers": {
            "num_runs": 658172, "num_ngrams": 364740, "processor_seconds": 10.0, "processor_seconds_of_the_first": 6.4,
            "peak_mib": 553, "peak_mib_of_a_child": 478, "disk_bytes": 29240492,
        }
    },
}  # fmt: skip


class Job(NamedTuple):
    """What a job takes."""

    seconds: float
    first: float  # GiB of memory of the first process
    all: float  # GiB of memory of all processes
    disk: float  # GB


def extrapolate(measured: dict[str, Any], cores: int, bases: float) -> dict[str, Job]:
    """Both jobs, `corpus` and `ngrams`, on `cores` cores, from a record of `benchmarks.scale`."""
    workers = max(measured["corpus"], key=lambda name: int(name.split()[0]))
    corpus, ngrams = measured["corpus"][workers], measured["ngrams"][workers]
    times = bases / corpus["bases"]
    start = measured["start"]["processor_seconds"]
    found = {}
    for name, job in (("corpus", corpus), ("ngrams", ngrams)):
        first = times * max(0, job["processor_seconds_of_the_first"] - start)
        shared = times * (job["processor_seconds"] - job["processor_seconds_of_the_first"]) / cores
        if name == "corpus":
            more, shared_bytes = PIECE_BYTES * bases / PIECE_BASES, 0.0
            seconds = start + max(first, shared)  # the first process reads and writes while others tokenize
        else:
            shared_bytes = RUN_BYTES * times * ngrams["num_runs"]
            more = shared_bytes + NGRAM_BYTES * times * ngrams["num_ngrams"]
            seconds = start + first + shared
        memory = job["peak_mib"] / 2**10 + more / 2**30
        everything = memory + cores * job["peak_mib_of_a_child"] / 2**10 + shared_bytes / 2**30
        found[name] = Job(seconds, memory, everything, times * job["disk_bytes"] / 1e9)
    return found
