"""The work that speed is measured by, and the benchmark from command to picture."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dnazen.cli.main import main
from dnazen.data.shards import Corpus, build_corpus
from dnazen.data.tokenizer import train_tokenizer
from dnazen.models import DNAZenForMaskedLM
from dnazen.ngram.extract import build_ngrams
from dnazen.train.bench import training_flops


def test_flops_are_those_that_pytorch_counts(config, make_batch):
    """Sequences of equal length, so that nothing is padded; embeddings get no gradient of their own by a product."""
    batch = make_batch([16, 16], [5, 5])
    config._attn_implementation = "eager"
    model = DNAZenForMaskedLM(config)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    num_masked = int((batch["labels"] != -100).sum())
    assert num_masked > 2
    assert training_flops(config, np.array([16, 16]), np.array([5, 5]), num_masked) == counter.get_total_flops()


@pytest.mark.slow
def test_bench_measures_both_paths_and_survives_a_third(config, tmp_path, capfd, root, monkeypatch):
    rng = np.random.default_rng(0)
    motif = "".join(rng.choice(list("ACGT"), 12))
    pieces = [motif if rng.random() < 0.3 else "".join(rng.choice(list("ACGT"), 12)) for _ in range(2000)]
    fasta = tmp_path / "random.fa"
    fasta.write_text(">x\n" + "".join(pieces) + "\n")
    tokenizer = train_tokenizer(["".join(pieces)], vocab_size=64)
    build_corpus([fasta], tokenizer, tmp_path / "corpus", max_tokens=62, validation_fraction=0.05)
    build_ngrams(Corpus.open(tmp_path / "corpus"), tmp_path / "ngrams", min_pmi=0.5)
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_hidden_ngram_layers")
    (tmp_path / "small.json").write_text(json.dumps({name: getattr(config, name) for name in sizes}))
    line = f"bench --corpus {tmp_path / 'corpus'} --ngrams {tmp_path / 'ngrams'} --model {tmp_path / 'small.json'}"
    line += f" --impl reference triton --seconds 0.5 --max-batch-tokens 256 --output-dir {tmp_path / 'bench'}"
    line += f" --precision bf16 --deepspeed {root / 'ds_configs' / 'zero2.json'}"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # without it and a GPU, the kernels cannot run
    assert main(line.split()) == 0
    output = capfd.readouterr().out
    assert "times as fast as reference" in output and "on CPU" in output or torch.cuda.is_available()
    result = json.loads((tmp_path / "bench" / "bench.json").read_text())
    packed, reference, *kernels = result["rows"]
    assert (packed["impl"], reference["impl"]) == ("auto", "reference")
    if not torch.cuda.is_available():
        assert kernels == [] and "triton failed: RuntimeError: impl='triton' needs CUDA tensors" in output
        assert result["failed"].keys() == {"triton"}
    assert packed["padding_share"] == 0 < reference["padding_share"] < 1
    for row in result["rows"]:
        assert row["steps"] >= 1 and row["seconds"] >= 0.5 and 0 < row["loader_wait"] < 1
        assert 64 < row["tokens_per_step"] <= 256 and row["ngrams_per_token"] > 0
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(row["tokens_per_step"] * row["steps"])
        assert (row["mfu"] is None) == (row["device"] == "CPU")
    assert (tmp_path / "bench" / "bench.png").read_bytes().startswith(b"\x89PNG")
