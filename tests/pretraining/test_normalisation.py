"""One step means the same on any number of processes, accumulation steps and ZeRO stages."""

import numpy as np
import pytest
import torch
from transformers import set_seed

from dnazen.batches.collator import Masking, PackedCollator, PackedDataset
from dnazen.batches.sampler import MicroBatchSampler
from dnazen.data.corpus import Corpus
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.ngram.vocab import load_ngrams
from tests.helpers.launch import PROGRAMS, log_history, run, steps

# fp32 sums in another order: about 1e-7 relative per operation, over a few thousand terms of like size
TOLERANCE = {"rtol": 2e-5, "atol": 1e-6}
LAYOUTS = {
    "torchrun-2": {"processes": 2, "launcher": "torchrun"},
    "zero1-2": {"processes": 2, "zero": 1},
    "zero2-2": {"processes": 2, "zero": 2},
    "zero3-2": {"processes": 2, "zero": 3},
    "zero2-1": {"processes": 1, "zero": 2, "gradient_accumulation_steps": 2},
}


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory):
    """The same global batch on one plain process, by accumulation."""
    output_dir = tmp_path_factory.mktemp("alone")
    run(**prepared.arguments(), output_dir=output_dir, gradient_accumulation_steps=2)
    return output_dir / "checkpoint-4"


@pytest.mark.slow
def test_first_step_is_the_mean_over_all_masked_tokens(prepared, alone):
    """Against one batch that holds both micro-batches, without a Trainer."""
    corpus = Corpus.open(prepared.corpus)
    vocabulary = load_ngrams(prepared.ngrams, corpus)
    collator = PackedCollator(corpus.tokenizer, vocabulary, Masking(0.15, True, 42))
    stream = iter(MicroBatchSampler(corpus.train.lengths, 640, 42, start=0, rank=0, world_size=1))
    micro_batches = [next(stream), next(stream)]
    masked = [(PackedDataset(corpus.train, collator)[m][0]["labels"] != -100).sum() for m in micro_batches]
    assert masked[0] != masked[1], "the test needs unequal micro-batches"
    union = np.concatenate([m.sequences for m in micro_batches])
    batch = collator([corpus.train[i] for i in union], union, epoch=0)
    set_seed(42)
    sizes = {"vocab_size": len(corpus.tokenizer), "ngram_vocab_size": vocabulary.vocab_size}
    model = DNAZenForMaskedLM(DNAZenConfig.from_size(prepared.model, **sizes)).train()
    loss = model(**batch).loss
    loss.backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    ((logged_loss, logged_norm), *_) = steps(alone, "loss", "grad_norm")
    np.testing.assert_allclose([logged_loss, logged_norm], [loss.item(), norm.item()], **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_loss_and_gradient_norm_equal_one_process(prepared, alone, tmp_path, layout):
    run(**prepared.arguments(), **layout, output_dir=tmp_path)
    expected, found = (steps(path, "loss", "grad_norm") for path in (alone, tmp_path / "checkpoint-4"))
    assert len(expected) == 4
    np.testing.assert_allclose(found, expected, **TOLERANCE)
    expected, found = (
        [entry for entry in log_history(path) if "eval_loss" in entry] for path in (alone, tmp_path / "checkpoint-4")
    )
    np.testing.assert_allclose(found[0]["eval_loss"], expected[0]["eval_loss"], **TOLERANCE)
    for key in ("eval_accuracy", "eval_masked_tokens", "epoch"):
        assert found[0][key] == expected[0][key]
    assert expected[0]["eval_masked_tokens"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_zero_stage_trains_in_bf16_on_two_processes(prepared, tmp_path, zero):
    """And takes the gradient's norm at once."""
    arguments = {**prepared.arguments(), "bf16": True, "max_steps": 2, "save_steps": 2, "entry": "pretrain.py"}
    script = PROGRAMS / "without_search.py"
    output = run(script=script, **arguments, processes=2, zero=zero, output_dir=tmp_path).stdout
    assert "2 process(es)" in output and "bf16" in output and "unigram" in output
    model = DNAZenForMaskedLM.from_pretrained(tmp_path / "final")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
