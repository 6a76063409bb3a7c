"""Tokens, and minutes, to the loss that `tiny`'s recipe reaches at its end: each lever at its own best learning rate.

    python -m benchmarks.recipe --fasta GENOME... --output-dir DIR

One corpus of both strands of all genomes. First each lever is run at several learning rates, for a quarter of the
tokens; then at the rate of its lowest loss, for all of them, with three seeds. The target is the mean of what the
recipe as it is reaches at its end. Where a run first falls to it is interpolated between its evaluations. Prints a
table and writes `benchmarks/results/recipe-<machine>.json`. What is done is not done again: started anew, it goes on.
"""

import argparse
import json
import math
import os
import platform
import re
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.yeast import BIN, ROOT, call, commit, pretrain, processor
from dnazen.environment import free_port
from dnazen.pretraining.arguments import RECIPES

RECIPE = RECIPES["tiny"]
PRESENT = "the recipe as it is"
MUON = {"optim": "muon"}
STABLE = {"lr_scheduler_type": "warmup_stable_decay"}
FALLING = {"mlm_probability_end": 0.15}
# name: flags that differ from the recipe's
LEVERS: dict[str, dict[str, Any]] = {
    "the recipe, at its best rate": {},
    "Muon": MUON,
    "warm-up, stable, decay": STABLE,
    "mask rate from 40 to 15 %": FALLING,
    "mask rate from 30 to 15 %": {"mlm_probability": 0.3} | FALLING,
    "Muon, stable, falling": MUON | STABLE | FALLING,
}
RATE_FACTORS = (1.0, 2.0, 4.0)  # times the recipe's
EVALUATIONS = 12  # of a run


def fall_to(target: float, evaluations: Sequence[tuple[int, float]]) -> float | None:
    """The step at which the loss first is at most `target`, between (step, loss) in order; None: it never is."""
    before = None
    for step, loss in evaluations:
        if loss <= target:
            if before is None or before[1] == loss:
                return float(step)
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = step, loss
    return None


def prepare(folder: Path, fasta: list[str], vocab_size: int | None) -> tuple[Path, Path]:
    """Tokenizer, corpus and G-grams, once; a folder of other data is refused."""
    wanted, record = {"fasta": fasta, "vocab_size": vocab_size}, folder / "data.json"
    if record.exists() and json.loads(record.read_text()) != wanted:
        raise SystemExit(f"{record}: expected {wanted}, found {record.read_text()}")
    record.write_text(json.dumps(wanted))
    tokenizer, corpus, ngrams = (folder / name for name in ("tokenizer", "corpus", "ngrams"))
    dnazen = BIN / "dnazen"
    if not tokenizer.exists():
        size = [] if vocab_size is None else ["--vocab-size", vocab_size]
        call(dnazen, "tokenizer", "--fasta", *fasta, "--output-dir", tokenizer, *size)
    if not corpus.exists():
        call(dnazen, "corpus", "--fasta", *fasta, "--tokenizer", tokenizer, "--output-dir", corpus,
             "--validation-fraction", 0.004, "--reverse-complement")  # fmt: skip
    if not ngrams.exists():
        call(dnazen, "ngrams", "--corpus", corpus, "--output-dir", ngrams)
    return corpus, ngrams


def run(out: Path, data: tuple[Path, Path], lever: str, rate: float, tokens: int, seed: int) -> dict[str, Any]:
    """One run, or what it left if it was done before."""
    steps = max(1, tokens // RECIPE.max_batch_tokens)
    name = re.sub(r"\W+", "-", lever)
    folder = out / f"{name}-{rate:g}-{steps}-{seed}"
    if not (folder / "report.json").exists():
        flags = {**RECIPE._asdict(), **LEVERS.get(lever, {}), "learning_rate": rate, "max_steps": steps, "seed": seed}
        launcher = [BIN / "deepspeed", "--num_gpus", 1, "--master_port", free_port()]
        pretrain(launcher, *data, folder, model="tiny", eval_steps=math.ceil(steps / EVALUATIONS), **flags)
    report = json.loads((folder / "report.json").read_text())
    history = json.loads((folder / f"checkpoint-{steps}" / "trainer_state.json").read_text())["log_history"]
    return {
        "lever": lever, "rate": rate, "seed": seed, "steps": steps, "tokens": report["trained_tokens"],
        "seconds": report["train_seconds"],
        "evaluations": [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry],
    }  # fmt: skip


def compare(rows: list[dict[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
    """The target, and for each lever what its runs took to reach it; None where one of them did not."""
    target = statistics.mean(row["evaluations"][-1][1] for row in rows if row["lever"] == PRESENT)
    compared = []
    for lever in dict.fromkeys(row["lever"] for row in rows):
        runs = [row for row in rows if row["lever"] == lever]
        shares = [
            step / row["steps"] if (step := fall_to(target, row["evaluations"])) is not None else None for row in runs
        ]
        has_all = None not in shares
        losses = [row["evaluations"][-1][1] for row in runs]
        compared.append(
            {
                "lever": lever,
                "rate": runs[0]["rate"],
                "loss": statistics.mean(losses),
                "spread": max(losses) - min(losses),
                "tokens_to_target": statistics.mean(s * row["tokens"] for s, row in zip(shares, runs))
                if has_all
                else None,
                "minutes_to_target": statistics.mean(s * row["seconds"] / 60 for s, row in zip(shares, runs))
                if has_all
                else None,
            }
        )
    return target, compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", required=True, nargs="+")
    parser.add_argument("--output-dir", required=True, type=Path)
    parser.add_argument("--vocab-size", type=int, help="default: by the length of the text, as `dnazen tokenizer`'s")
    parser.add_argument("--tokens", type=lambda text: int(float(text)), default=10_000_000, help="of a run")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    data = prepare(args.output_dir, args.fasta, args.vocab_size)
    rates = [factor * RECIPE.learning_rate for factor in RATE_FACTORS]
    with ThreadPoolExecutor(2) as pool:
        sweep = list(
            pool.map(
                lambda job: run(args.output_dir, data, *job, args.tokens // 4, 1),
                [(lever, rate) for lever in LEVERS for rate in rates],
            )
        )
        best = {PRESENT: RECIPE.learning_rate}
        for lever in LEVERS:
            of_lever = [row for row in sweep if row["lever"] == lever]
            best[lever] = min(of_lever, key=lambda row: row["evaluations"][-1][1])["rate"]
        jobs = [(lever, rate, args.tokens, seed) for lever, rate in best.items() for seed in range(1, args.seeds + 1)]
        rows = list(pool.map(lambda job: run(args.output_dir, data, *job), jobs))
    target, compared = compare(rows)
    result = {
        "device": f"{processor()}, {os.cpu_count()} cores, one for each run",
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed", "numpy")},
        "commit": commit(), "target": target, "compared": compared, "sweep": sweep, "rows": rows,
    }  # fmt: skip
    path = ROOT / "benchmarks" / "results" / f"recipe-{platform.machine()}-{os.cpu_count()}-cores.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"target: {target:.4f} nats on hidden tokens\n")
    print("| lever | rate | loss at the end | tokens to the target | minutes |\n|---|---|---|---|---|")
    for row in compared:
        reached = row["tokens_to_target"] is not None
        took = f"{row['tokens_to_target']:,.0f} | {row['minutes_to_target']:.1f}" if reached else "not reached | "
        print(f"| {row['lever']} | {row['rate']:g} | {row['loss']:.4f} (spread {row['spread']:.4f}) | {took} |")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
