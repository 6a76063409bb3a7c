"""Loading for inference, and results in the order of the input whatever the batches."""

import numpy as np
import pytest
import torch

from dnazen.batches.streaming import run_batches
from dnazen.files import InputError
from dnazen.inference.loading import load_for_inference
from dnazen.models import DNAZenForMaskedLM, DNAZenModel


def test_groups_and_results_in_order_within_the_budget(model_folder):
    loaded = load_for_inference(str(model_folder), DNAZenModel)
    rng = np.random.default_rng(0)
    groups = [(n, [rng.integers(5, 256, rng.integers(1, 90)) for _ in range(n % 4)]) for n in range(60)]
    groups.append(("long", [rng.integers(5, 256, 300)]))  # longer than the budget: a batch of its own
    seen, read = [], 0

    def compute(batch):
        assert not torch.is_grad_enabled() and not loaded.model.training
        sizes = batch["cu_seqlens"].diff().tolist()
        assert batch["cu_seqlens"][-1] <= 128 or len(sizes) == 1
        seen.append(len(sizes))
        return [ids[1:-1].tolist() for ids in batch["input_ids"].split(sizes)]

    def reading():
        nonlocal read
        for group in groups:
            read += 1
            yield group

    found = run_batches(reading(), loaded.collator, compute, loaded.model.device, max_batch_tokens=128)
    key, results = next(found)
    assert key == 0 and results == [] and read < len(groups)  # only some of the input is held
    for (key, results), (expected, sequences) in zip(found, groups[1:], strict=True):
        assert key == expected and results == [sequence.tolist() for sequence in sequences]
    assert max(seen) > 1 and sum(seen) == sum(len(sequences) for _, sequences in groups)


def test_a_model_without_ngrams_sees_none(dnabert2_folder, genome):
    loaded = load_for_inference(str(dnabert2_folder), DNAZenForMaskedLM)
    assert loaded.model.config.ngram_vocab_size == 1 and loaded.model.dtype == torch.float32
    batch = loaded.collator(loaded.tokenize([genome[:500], genome[500:600]]))
    assert len(batch["ngram_input_ids"]) == 0
    assert loaded.model.bert(**batch).last_hidden_state.isfinite().all()
    # saved again by us it has a configuration with G-grams, of which none but the padding
    loaded.model.save_pretrained(dnabert2_folder / "again")
    loaded.tokenizer.save_pretrained(dnabert2_folder / "again")
    again = load_for_inference(str(dnabert2_folder / "again"), DNAZenForMaskedLM)
    assert torch.equal(again.model.bert(**batch).last_hidden_state, loaded.model.bert(**batch).last_hidden_state)


def test_what_cannot_be_loaded(model_folder, tmp_path):
    with pytest.raises(InputError, match="absent: expected a folder, or a model's name on the Hugging Face hub"):
        load_for_inference(str(tmp_path / "absent"), DNAZenModel)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    with pytest.raises(InputError, match="expected ngram.json, because config.json has G-grams, found none"):
        load_for_inference(str(tmp_path), DNAZenModel)


def test_letters_that_the_tokenizer_does_not_spell(model_folder):
    loaded = load_for_inference(str(model_folder), DNAZenModel)
    with pytest.raises(InputError, match="does not spell every sequence of A, C, G, T: ACGTN"):
        loaded.tokenize(["ACGT", "ACGTN"])
