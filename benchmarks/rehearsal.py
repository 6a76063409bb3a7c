"""What the published pretraining data would take, 35 billion bases: extrapolated from a measurement, not measured.

    python -m benchmarks.rehearsal

Reads `results/scale-*.json` (of `benchmarks.scale`) and prints a table for each, as `dnazen.planning.preparation`
extrapolates it.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.yeast import ROOT
from dnazen.planning.preparation import extrapolate

BASES = 35e9
CORES = (16, 96)


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
            job = extrapolate(measured, cores, BASES)[name]
            memory = f"{job.first:.1f} GiB | {job.all:.0f} GiB"
            lines.append(f"| {text} | {cores} | {job.seconds / 60:.0f} min | {memory} | {job.disk:.1f} GB |")
    return "\n".join(lines)


def main() -> None:
    for path in sorted(Path(ROOT / "benchmarks" / "results").glob("scale-*.json")):
        print(table(json.loads(path.read_text())), end="\n\n")


if __name__ == "__main__":
    main()
