"""Yeast from FASTA to a report: seconds of each stage, and what G-grams and whole-G-gram masking change.

    python -m benchmarks.yeast --fasta sacCer3.fa.gz --tokenizer DIR --output-dir DIR

Runs the four commands as a user would (200 steps of `tiny` on 2 processes), then 900 steps of each of four variants
with three seeds, on a corpus with 5 % held out, with the same share of tokens masked, all evaluated on the same hidden
tokens. Writes `benchmarks/results/yeast-<device>.json` and prints the tables. For two CPU cores: about 35 minutes.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
VARIANTS = {
    f"{'G-grams' if shown else 'no G-grams'}, {'whole-G-gram' if whole else 'token'} masking": {
        "use_ngrams": shown, "whole_ngram_masking": whole, "mlm_probability": 0.3, "mask_target": "effective",
    }
    for shown in (True, False)
    for whole in (True, False)
}  # fmt: skip
SEEDS = (1, 2, 3)


def call(*line: object) -> float:
    """Run a command to its end and return its seconds; its output goes to ours."""
    started = time.perf_counter()
    subprocess.run([str(word) for word in line], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return round(time.perf_counter() - started, 1)


def pretrain(
    launcher: list[object],
    corpus: Path,
    ngrams: Path,
    output_dir: Path,
    script: str = "dnazen/pretrain.py",
    **arguments: object,
) -> float:
    """One run of the entry point under ZeRO-2; returns its seconds."""
    flags = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    line = [*launcher, ROOT / script, "--deepspeed", ROOT / "ds_configs/zero2.json"]
    return call(
        *line, "--corpus", corpus, "--ngrams", ngrams, "--output_dir", output_dir, "--disable_tqdm", True, *flags
    )


def commit() -> str:
    """Of this checkout, or of the one that `benchmarks.carry` packed; "unknown" if there is no git."""
    if (ROOT / "COMMIT").exists():
        return (ROOT / "COMMIT").read_text().strip()
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return "unknown"
    return found or "unknown"


def is_changed() -> bool:
    """Whether files of this checkout differ from its commit; what is packed or has no git cannot tell, and says no."""
    if commit() == "unknown" or (ROOT / "COMMIT").exists():
        return False
    line = ["git", "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results"]
    return bool(subprocess.run(line, cwd=ROOT, capture_output=True, text=True).stdout.strip())


def processor() -> str:
    """The processor's name, where Linux gives it, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--output-dir", required=True, type=Path)
    args = parser.parse_args()
    out, dnazen = args.output_dir, BIN / "dnazen"
    own, corpus, ngrams, held = (out / name for name in ("tokenizer", "corpus", "ngrams", "ablation"))
    seconds = {
        "tokenizer": call(dnazen, "tokenizer", "--fasta", args.fasta, "--output-dir", own),
        "corpus": call(dnazen, "corpus", "--fasta", args.fasta, "--tokenizer", args.tokenizer, "--output-dir", corpus),
        "ngrams": call(dnazen, "ngrams", "--corpus", corpus, "--output-dir", ngrams),
    }
    two = [BIN / "deepspeed", "--num_gpus", 2]
    seconds["pretrain"] = pretrain(two, corpus, ngrams, out / "200-steps", max_steps=200, max_batch_tokens=8192)

    call(dnazen, "corpus", "--fasta", args.fasta, "--tokenizer", args.tokenizer, "--output-dir", held / "corpus",
         "--validation-fraction", 0.05)  # fmt: skip
    call(dnazen, "ngrams", "--corpus", held / "corpus", "--output-dir", held / "ngrams")

    def ablate(job: tuple[int, str, int]) -> None:
        port, variant, seed = job
        launcher = [BIN / "deepspeed", "--num_gpus", 1, "--master_port", 29700 + port]
        folder = held / f"{variant}-{seed}"
        pretrain(
            launcher,
            held / "corpus",
            held / "ngrams",
            folder,
            seed=seed,
            max_steps=900,
            eval_steps=300,
            **VARIANTS[variant],
        )

    jobs = [(port, *job) for port, job in enumerate((variant, seed) for seed in SEEDS for variant in VARIANTS)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ablate, jobs))

    rows = {}
    for variant in VARIANTS:
        reports = [json.loads((held / f"{variant}-{seed}" / "report.json").read_text()) for seed in SEEDS]
        held_out = [report["held_out"] for report in reports]
        rows[variant] = {
            "scores": [scored["scores"]["DNAZEN tiny"] for scored in held_out],
            "advantage": [scored["advantage"] for scored in held_out],
            "ngram_advantage": [scored["ngram_advantage"] for scored in held_out],
            "effective_mask_rate": [report["effective_mask_rate"] for report in reports],
        }
    extraction = json.loads((ngrams / "manifest.json").read_text())
    result = {
        "device": f"{processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed", "numpy")},
        "commit": commit(),
        "seconds": seconds,
        "ngrams": extraction["statistics"],
        "extraction_tokens_per_second": extraction["statistics"]["num_tokens"] / extraction["seconds"],
        "report": json.loads((out / "200-steps" / "report.json").read_text()),
        "ablation": rows,
        "ablation_baselines": {
            name: score for name, score in reports[-1]["held_out"]["scores"].items() if "DNAZEN" not in name
        },
        "ablation_hidden_tokens": reports[-1]["held_out"]["num_targets"],
    }
    path = ROOT / "benchmarks" / "results" / f"yeast-{platform.machine()}-{os.cpu_count()}-cores.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("seconds", "report")}, indent=1))
    for variant, row in rows.items():
        bits = [score["bits_per_base"]["mean"] for score in row["scores"]]
        accuracy = [score["accuracy"]["mean"] for score in row["scores"]]
        print(f"{variant:34} bits per base {statistics.mean(bits):.4f} ± {statistics.stdev(bits):.4f}   "
              f"accuracy {100 * statistics.mean(accuracy):.2f} ± {100 * statistics.stdev(accuracy):.2f} %")  # fmt: skip
    print(f"written to {path}")


if __name__ == "__main__":
    main()
