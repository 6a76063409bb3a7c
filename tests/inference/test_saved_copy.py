"""A model that is loaded and saved again serves every command, as the folder it came from does."""

import json

import pytest
import torch
from transformers import modeling_utils
from transformers.utils import hub

from dnazen.inference.loading import load_for_inference
from dnazen.models import DNAZenForMaskedLM, DNAZenForSequenceClassification, DNAZenModel


@pytest.mark.parametrize("model_class", [DNAZenModel, DNAZenForMaskedLM, DNAZenForSequenceClassification])
def test_a_saved_copy_gives_the_same_embeddings(model_class, model_folder, genome, tmp_path):
    loaded = load_for_inference(str(model_folder), model_class)
    loaded.model.save_pretrained(tmp_path / "copy")
    loaded.tokenizer.save_pretrained(tmp_path / "copy")
    again = load_for_inference(str(tmp_path / "copy"), model_class)
    batches = [each.collator(each.tokenize([genome[:500], genome[500:700]])) for each in (loaded, again)]
    assert len(batches[0]["ngram_input_ids"]) > 10
    states = [
        each.model.base_model(**batch).last_hidden_state for each, batch in zip((loaded, again), batches, strict=True)
    ]
    assert torch.equal(*states)
    contents = [json.loads((folder / "ngram.json").read_text()) for folder in (model_folder, tmp_path / "copy")]
    assert contents[0] == contents[1]


def test_one_process_alone_writes(model_folder, tmp_path):
    model = DNAZenModel.from_pretrained(model_folder)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "ngram.json").exists()


def test_a_model_without_ngrams_saves_none(dnabert2_folder, tmp_path):
    DNAZenForMaskedLM.from_pretrained(dnabert2_folder, ngram_vocab_size=1).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "ngram.json").exists()


@pytest.mark.parametrize("way", ["save_pretrained", "push_to_hub"])
def test_ngrams_are_uploaded(way, model_folder, tmp_path, monkeypatch):
    """With a stand-in for the hub, which is elsewhere."""
    uploaded = set()

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            self.repo_id = repo_id
            return self

        def create_commit(self, repo_id, operations, **kwargs):
            uploaded.update(operation.path_in_repo for operation in operations)

    class Card:
        def save(self, path):
            pass

    for module in (modeling_utils, hub):
        monkeypatch.setattr(module, "hf_api", Hub)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *args, **kwargs: Card())
    model = DNAZenModel.from_pretrained(model_folder)
    if way == "push_to_hub":
        model.push_to_hub("owner/name")
    else:
        model.save_pretrained(tmp_path / "copy", push_to_hub=True, repo_id="owner/name")
    assert {"config.json", "model.safetensors", "ngram.json"} <= uploaded
