"""A corpus of 100 million tokens and its G-grams: rates and peak memory of every process.

    python -m benchmarks.scale --genomes sacCer3.fa.gz hg38_1m.fa.gz ... --tokenizer DIR

Repeats the genomes, each time with a tenth of their bases drawn anew, as one-line FASTA files in a temporary folder (6
bytes a token in all), and runs `dnazen corpus` and `dnazen ngrams` on them, with 1 and with all cores, and `dnazen
ngrams count` and `merge` on two shards. Also builds a corpus from one record of 250 million bases on one line. Writes
`benchmarks/results/scale-<machine>-<cores>-cores.json`.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.yeast import ROOT, processor
from dnazen.data.fasta import read_fasta

BASES = np.frombuffer(b"ACGT", np.uint8)


def mutate(bases: np.ndarray, seed: int, rate: float = 0.1) -> np.ndarray:
    """A copy with a share `rate` of its letters drawn anew."""
    rng = np.random.default_rng(seed)
    places = np.flatnonzero(rng.random(len(bases)) < rate)
    bases = bases.copy()
    bases[places] = rng.choice(BASES, len(places))
    return bases


def measure(*arguments: object) -> dict[str, float]:
    """Run `dnazen`; seconds, processor seconds (also of it without children), and the most memory (MiB, RSS)
    of it and of a child."""
    command = [sys.executable, "-m", "dnazen.cli.main", *map(str, arguments)]
    process = psutil.Popen(command, stdout=sys.stderr, cwd=ROOT)
    started, peaks, busy = time.perf_counter(), {}, {}
    while process.poll() is None:
        for member in (process, *process.children(recursive=True)):
            try:
                peaks[member.pid] = max(peaks.get(member.pid, 0), member.memory_info().rss)
                busy[member.pid] = sum(member.cpu_times()[:2])
            except psutil.Error:  # it ended meanwhile
                continue
        time.sleep(0.1)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    children = [peak for pid, peak in peaks.items() if pid != process.pid]
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(sum(busy.values()), 1),
        "processor_seconds_of_the_first": round(busy[process.pid], 1),
        "peak_mib": peaks[process.pid] >> 20,
        "peak_mib_of_a_child": max(children, default=0) >> 20,
    }


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genomes", nargs="+", required=True)
    parser.add_argument("--tokenizer", required=True, type=Path)
    parser.add_argument("--tokens", type=float, default=1e8)
    args = parser.parse_args()
    bases = np.frombuffer("N".join(r.sequence for path in args.genomes for r in read_fasta(path)).encode(), np.uint8)
    cores = os.cpu_count()
    device = {"device": f"{processor()}, {cores} cores", "python": platform.python_version()}
    result = {**device, "start": measure("--version"), "corpus": {}, "ngrams": {}, "ngrams_of_shards": {}}
    with tempfile.TemporaryDirectory() as folder:
        files = []
        while 4.9 * args.tokens > len(files) * len(bases):
            files.append(Path(folder) / f"{len(files):05d}.fa")
            files[-1].write_bytes(f">r{len(files)}\n".encode() + mutate(bases, len(files)).tobytes() + b"\n")
        tokenizer = args.tokenizer.resolve()
        common = ["--tokenizer", tokenizer, "--output-dir"]
        manifests, ngrams = set(), set()
        for workers in sorted({cores, 1}, reverse=True):
            out = Path(folder) / f"corpus-{workers}"
            cost = measure("corpus", "--fasta", *files, *common, out, "--num-workers", workers)
            totals = json.loads((out / "manifest.json").read_text())["totals"]
            tokens = totals["train"]["tokens"] + totals["validation"]["tokens"]
            rates = {"bases_per_second": totals["length"] / cost["seconds"], "tokens": tokens}
            rates["bases_per_processor_second"] = totals["length"] / cost["processor_seconds"]
            rates["disk_bytes"] = size_of(out)
            result["corpus"][f"{workers} workers"] = cost | {"bases": totals["length"]} | rates
            manifests.add((out / "manifest.json").read_bytes())
        shutil.rmtree(out)
        corpus = Path(folder) / f"corpus-{cores}"
        for workers in sorted({cores, 1}):
            out = Path(folder) / f"ngrams-{workers}"
            cost = measure("ngrams", "--corpus", corpus, "--output-dir", out, "--num-workers", workers)
            manifest = json.loads((out / "manifest.json").read_text())
            statistics = manifest["statistics"]
            rate = statistics["num_tokens"] / manifest["seconds"]
            rates = {"extraction_seconds": manifest["seconds"], "tokens_per_second_and_core": rate / workers}
            rates |= {"tokens": statistics["num_tokens"], "disk_bytes": size_of(out)}
            rates |= {name: statistics[name] for name in ("num_runs", "num_ngrams")}
            busy = cost["processor_seconds"] - result["start"]["processor_seconds"]  # with reading and writing
            rates["tokens_per_processor_second"] = statistics["num_tokens"] / busy
            result["ngrams"][f"{workers} workers"] = cost | rates
            ngrams.add((out / "ngram.json").read_bytes())
        for kind, options in (("pairs", []), ("runs", ["--pairs", Path(folder) / "pairs-1", Path(folder) / "pairs-2"])):
            for i in (1, 2):
                out = Path(folder) / f"{kind}-{i}"
                words = ["--corpus", corpus, "--shard", f"{i}/2", "--output-dir", out, *options]
                cost = measure("ngrams", "count", *words)
                result["ngrams_of_shards"][f"{kind} of shard {i} of 2"] = cost | {"disk_bytes": size_of(out)}
        out = Path(folder) / "merged"
        cost = measure("ngrams", "merge", "--counts", *Path(folder).glob("runs-*"), "--output-dir", out)
        result["ngrams_of_shards"]["merge"] = cost
        ngrams.add((out / "ngram.json").read_bytes())
        if len(manifests) != 1 or len(ngrams) != 1:
            raise RuntimeError("the number of workers or shards made a difference")
        shutil.rmtree(corpus)
        for file in files:
            file.unlink()
        line = np.resize(mutate(bases, 0), 250_000_000)
        (Path(folder) / "long.fa").write_bytes(b">long\n" + line.tobytes())
        out = Path(folder) / "long"
        result["one_line_of_250_million_bases"] = measure("corpus", "--fasta", f"{folder}/long.fa", *common, out)
    path = ROOT / "benchmarks" / "results" / f"scale-{platform.machine()}-{cores}-cores.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
