"""What takes a small model off the unigram: one lever at a time, on the packaged genome.

    python -m benchmarks.learning --output-dir DIR

Each row is a run of the entry point under ZeRO-2 in bf16, of the tokens of one epoch: `tiny` by its recipe with three
seeds, then the same with one thing changed. Prints a table of what each predicts of hidden tokens beside the best
baseline, and how far its weights have moved by part, and writes `benchmarks/results/learning-<machine>.json`. For two
CPU cores: half an hour.
"""

import argparse
import json
import os
import platform
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from benchmarks import lever as unflagged
from benchmarks.yeast import BIN, ROOT, call, commit, pretrain, processor
from dnazen.data.corpus import Corpus
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.ngram.vocab import load_ngrams
from dnazen.pretraining.prepare import PACKAGED_GENOME
from dnazen.pretraining.start import start_from_data
from dnazen.sizes import RECIPES, SIZES

TOKENS = 1_090_000
PAPER = {**RECIPES["base"]._asdict(), "max_batch_tokens": 2048}
# name: what differs from the recipe, in the run's flags, in the model's configuration, in the corpus
LEVERS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny's recipe": {},
    "as before: the paper's recipe at 2e-3, 4 layers, vocabulary 4096": {
        "flags": {**PAPER, "learning_rate": 2e-3},
        "model": {
            "num_hidden_layers": 4, "num_hidden_ngram_layers": 2, "neighbor_window": 0, "initializer_range": 0.02,
            "hidden_dropout_prob": 0.1,
        },
        "corpus": {"vocab-size": 4096},
    },
    "no neighbors in the embeddings": {"model": {"neighbor_window": 0}},
    "one neighbor on either side": {"model": {"neighbor_window": 1}},
    "weights begin at random": {"flags": {"start": "random"}},
    "one rate for all weights": {"flags": {"residual_learning_rate": 1}},
    "sub-layers' outputs at a hundredth": {"flags": {"residual_learning_rate": 0.01}},
    "rate 1e-3": {"flags": {"learning_rate": 1e-3}},
    "rate 1e-2": {"flags": {"learning_rate": 1e-2}},
    "no warm-up": {"flags": {"warmup_steps": 0}},
    "warm-up for a fifth of the steps": {"flags": {"warmup_steps": 0.2}},
    "15 % of tokens masked": {"flags": {"mlm_probability": 0.15}},
    "80/10/10": {"flags": {"mask_share": 0.8}},
    "whole G-grams masked": {"flags": {"whole_ngram_masking": True}},
    "drop-out 0.1": {"model": {"hidden_dropout_prob": 0.1}},
    "initial spread 0.02": {"model": {"initializer_range": 0.02}},
    "4 layers": {"model": {"num_hidden_layers": 4, "num_hidden_ngram_layers": 2}},
    "192 wide, 6 heads": {"model": {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 768}},
    "1024 tokens a step": {"flags": {"max_batch_tokens": 1024}},
    "8192 tokens a step": {"flags": {"max_batch_tokens": 8192}},
    "vocabulary 256": {"corpus": {"vocab-size": 256}},
    "vocabulary 4096": {"corpus": {"vocab-size": 4096}},
    "both strands": {"corpus": {"reverse-complement": True}},
    **{name: {} for name in unflagged.LEVERS},
    # as many tokens, half of them in batches half as large, half in batches twice as large
    "growing batches": {"flags": {"max_steps": TOKENS // 2 // 1024 + TOKENS // 2 // 4096}},
}  # fmt: skip
SEEDS = (1, 2, 3)
ONE_AT_A_TIME = threading.Lock()  # torch's random numbers are those of all threads


def prepare(folder: Path, options: dict[str, Any]) -> Path:
    """Tokenizer, corpus and G-grams of the packaged genome, once."""
    vocab_size = ["--vocab-size", options["vocab-size"]] if "vocab-size" in options else []
    strands = ["--reverse-complement"] if "reverse-complement" in options else []
    if not folder.exists():
        dnazen = BIN / "dnazen"
        call(dnazen, "tokenizer", "--fasta", PACKAGED_GENOME, "--output-dir", folder / "tokenizer", *vocab_size)
        call(dnazen, "corpus", "--fasta", PACKAGED_GENOME, "--tokenizer", folder / "tokenizer", "--output-dir",
             folder / "corpus", "--validation-fraction", 0.05, *strands)  # fmt: skip
        call(dnazen, "ngrams", "--corpus", folder / "corpus", "--output-dir", folder / "ngrams")
    return folder


def movement(run: Path, data: Path, start: str) -> dict[str, float]:
    """How far the weights of each part are from where they began, relative to that: `||end - start|| / ||start||`."""
    record = json.loads((run / "run.json").read_text())
    corpus = Corpus.open(data / "corpus", verify=False)
    vocabulary = load_ngrams(data / "ngrams", corpus)
    config = DNAZenConfig.from_pretrained(run / "final")
    with ONE_AT_A_TIME:
        set_seed(record["training"]["seed"])
        begun = DNAZenForMaskedLM(config)
    if start == "data":
        start_from_data(begun, corpus, vocabulary, record["training"]["seed"])
    ended = dict(DNAZenForMaskedLM.from_pretrained(run / "final", dtype=torch.float32).named_parameters())
    parts: dict[str, list[torch.Tensor]] = {}
    for name, parameter in begun.named_parameters():
        if parameter.dim() > 1 and parameter.norm() > 0:
            words = name.removeprefix("bert.").split(".")
            part = ".".join(words[:3]) if words[0] == "encoder" else words[0]
            sums = torch.stack([(ended[name] - parameter).square().sum(), parameter.square().sum()])
            parts.setdefault(part, []).append(sums.detach())
    return {part: float((sum(sums)[0] / sum(sums)[1]).sqrt()) for part, sums in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", required=True, type=Path)
    out = parser.parse_args().output_dir
    out.mkdir(parents=True, exist_ok=True)
    corpora = {
        json.dumps(options): prepare(out / f"data-{'-'.join(map(str, options.values())) or 'own'}", options)
        for options in (lever.get("corpus", {}) for lever in LEVERS.values())
    }

    def run(job: tuple[int, str, int]) -> dict[str, Any]:
        number, name, seed = job
        lever = LEVERS[name]
        folder, data = out / f"run-{number}", corpora[json.dumps(lever.get("corpus", {}))]
        model = out / f"model-{number}.json"
        model.write_text(json.dumps({**SIZES["tiny"], **lever.get("model", {})}))
        flags = {**RECIPES["tiny"]._asdict(), **lever.get("flags", {})}
        flags.setdefault("max_steps", TOKENS // flags["max_batch_tokens"])
        if not (folder / "report.json").exists():
            launcher = [BIN / "deepspeed", "--num_gpus", 1, "--master_port", 29800 + number]
            script = "dnazen/pretrain.py"
            if name in unflagged.LEVERS:
                script, flags["lever"] = "benchmarks/lever.py", name
            pretrain(
                launcher,
                data / "corpus",
                data / "ngrams",
                folder,
                script,
                model=model,
                seed=seed,
                eval_steps=250,
                **flags,
            )
        report = json.loads((folder / "report.json").read_text())
        scores = report["held_out"]["scores"]
        return {
            "lever": name,
            "seed": seed,
            "model": scores[f"DNAZEN {model.stem}"],
            "unigram": scores["unigram"],
            "best_baseline": {report["held_out"]["best_baseline"]: scores[report["held_out"]["best_baseline"]]},
            "advantage": report["held_out"]["advantage"],
            "ngram_advantage": report["held_out"]["ngram_advantage"],
            "tokens": report["trained_tokens"],
            "seconds": report["train_seconds"],
            "movement": movement(folder, data, flags["start"]),
        }

    jobs = [("tiny's recipe", seed) for seed in SEEDS] + [(name, SEEDS[0]) for name in list(LEVERS)[1:]]
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(run, [(number, *job) for number, job in enumerate(jobs)]))
    result = {
        "device": f"{processor()}, {os.cpu_count()} cores, one for each run",
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed", "numpy")},
        "commit": commit(),
        "rows": rows,
    }
    path = ROOT / "benchmarks" / "results" / f"learning-{platform.machine()}-{os.cpu_count()}-cores.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print("| lever | seed | bits per base | best baseline | unigram | advantage | loss | tokens | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        ((_, best),) = row["best_baseline"].items()
        advantage, model = row["advantage"], row["model"]
        print(
            f"| {row['lever']} | {row['seed']} | {model['bits_per_base']['mean']:.4f} | "
            f"{best['bits_per_base']['mean']:.4f} | {row['unigram']['bits_per_base']['mean']:.4f} | "
            f"{advantage['mean']:+.4f} ({advantage['low']:+.4f} to {advantage['high']:+.4f}) | {model['loss']:.3f} | "
            f"{row['tokens']:,} | {row['seconds']:.0f} |"
        )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
