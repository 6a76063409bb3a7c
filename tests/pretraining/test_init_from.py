"""Starting from a published model: what is taken over, what is refused, and what a resumed run needs."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dnazen.data.corpus import Corpus
from dnazen.files import InputError
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM, hub
from dnazen.models.hub import fetch_model
from dnazen.ngram.vocab import NgramVocabulary, load_ngrams
from dnazen.pretraining.initial_model import InitialModel
from tests.helpers.launch import run
from tests.helpers.published import random_weights, shapes, write_dnabert2, write_dnazen, write_ngrams

EMBEDDINGS = "bert.ngram_embeddings.word_embeddings.weight"
SIZES = dict(
    vocab_size=256, hidden_size=48, num_hidden_layers=2, num_attention_heads=12, intermediate_size=64,
    num_hidden_ngram_layers=1,
)  # fmt: skip


@pytest.fixture
def corpus(prepared) -> Corpus:
    return Corpus.open(prepared.corpus)


@pytest.fixture
def vocabulary(prepared, corpus) -> NgramVocabulary:
    return load_ngrams(prepared.ngrams, corpus)


@pytest.fixture
def dnazen(prepared, corpus, vocabulary, tmp_path):
    """A folder like DNAZEN-1.0-base: the corpus's tokenizer; half of the run's G-grams, and ten others."""
    folder = tmp_path / "DNAZEN-1.0-base"
    ngrams = vocabulary.ngrams[::2] + [(5, 6, 7, 8, 9 + i) for i in range(10)]
    write_dnazen(folder, **SIZES, ngram_vocab_size=len(ngrams) + 1)
    shutil.copy(prepared.corpus / "tokenizer" / "tokenizer.json", folder)
    tokens = [" ".join(corpus.tokenizer.convert_ids_to_tokens(ngram)) for ngram in ngrams]
    # the ids run the other way round
    write_ngrams(folder, {ngram: len(tokens) - i for i, ngram in enumerate(tokens)})
    return folder


@pytest.fixture
def dnabert2(prepared, tmp_path):
    folder = tmp_path / "DNABERT-2-117M"
    write_dnabert2(folder, **{**SIZES, "num_hidden_layers": 6})
    shutil.copy(prepared.corpus / "tokenizer" / "tokenizer.json", folder)
    return folder


def started_model(folder, corpus, vocabulary) -> tuple[DNAZenForMaskedLM, str]:
    initial = InitialModel.open(str(folder), corpus)
    config = DNAZenConfig.from_pretrained(folder, ngram_vocab_size=vocabulary.vocab_size)
    model = DNAZenForMaskedLM(config)
    return model, initial.load_weights(model, vocabulary)


# -- what is taken over -----------------------------------------------------------------------------------------------


def test_embeddings_of_ngrams_follow_their_tokens(dnazen, corpus, vocabulary):
    weights = load_file(dnazen / "model.safetensors")
    model, said = started_model(dnazen, corpus, vocabulary)
    count, shared = len(vocabulary.ngrams), len(vocabulary.ngrams[::2])
    assert said == (
        f"started from {dnazen}; of {count:,} G-grams {shared} keep their embedding, {count - shared} start at "
        "random; 10 of its G-grams are not used"
    )
    theirs = NgramVocabulary.from_pretrained(dnazen, corpus.tokenizer)
    rows = dict(zip(theirs.ngrams, theirs.ids))
    table = model.state_dict()[EMBEDDINGS]
    assert table.shape == (vocabulary.vocab_size, 48)
    for ngram, ngram_id in zip(vocabulary.ngrams, vocabulary.ids):
        if ngram in rows:
            assert torch.equal(table[ngram_id], weights[EMBEDDINGS][rows[ngram]])
        else:  # 48 draws with a standard deviation of 0.02: 0.03 is 5 sigma above; theirs have 0.15
            assert 0 < table[ngram_id].std() < 0.03
    assert torch.equal(table[0], weights[EMBEDDINGS][0])
    for name in weights.keys() - {EMBEDDINGS}:
        assert torch.equal(model.state_dict()[name], weights[name]), name


def test_with_its_own_ngrams_the_model_is_the_same(dnazen, corpus):
    vocabulary = load_ngrams(dnazen, corpus)
    model, said = started_model(dnazen, corpus, vocabulary)
    assert f"of {len(vocabulary.ngrams)} G-grams {len(vocabulary.ngrams)} keep their embedding, 0 start" in said
    expected = DNAZenForMaskedLM.from_pretrained(dnazen).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_the_older_form_of_ngrams(dnazen, corpus, vocabulary):
    theirs = NgramVocabulary.from_pretrained(dnazen, corpus.tokenizer)
    entries = {":".join(map(str, ngram)): ngram_id for ngram, ngram_id in zip(theirs.ngrams, theirs.ids)}
    expected, _ = started_model(dnazen, corpus, theirs)
    write_ngrams(dnazen, entries, older=True)
    model, _ = started_model(dnazen, corpus, theirs)
    assert torch.equal(model.state_dict()[EMBEDDINGS], expected.state_dict()[EMBEDDINGS])
    # with ids from 0 they are raised by one, and then the weights have a row too few
    write_ngrams(dnazen, {ngram: ngram_id - 1 for ngram, ngram_id in entries.items()}, older=True)
    config = json.loads((dnazen / "config.json").read_text())
    (dnazen / "config.json").write_text(json.dumps({**config, "ngram_vocab_size": len(entries)}))
    message = f"ngram_vocab_size: expected at least {len(entries) + 1}, found {len(entries)}"
    with pytest.raises(InputError, match=message):
        InitialModel.open(str(dnazen), corpus)


def test_dnabert2_gives_all_but_the_ngrams(dnabert2, corpus, vocabulary):
    weights = torch.load(dnabert2 / "pytorch_model.bin", weights_only=True)
    model, said = started_model(dnabert2, corpus, vocabulary)
    assert f"which has no G-grams: {len(vocabulary.ngrams):,} start at random, and their encoder" in said
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items() if "pooler" not in name)
    assert found[EMBEDDINGS].shape == (vocabulary.vocab_size, 48)


@pytest.mark.slow
def test_a_run_starts_from_its_model_and_resumes_from_its_checkpoint(prepared, dnazen, tmp_path, refused):
    """Learning rate 0: the first checkpoint is the model; then the model's weights are not wanted any more."""
    arguments = {name: value for name, value in prepared.arguments().items() if name != "model"}
    arguments |= {"init_from": dnazen, "output_dir": tmp_path / "out", "save_steps": 2}
    arguments |= {"learning_rate": 0.0, "weight_decay": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0}
    output = run(**{**arguments, "max_steps": 2}).stdout
    assert "keep their embedding" in output and "DNAZEN DNAZEN-1.0-base:" in output
    weights, saved = (load_file(folder / "model.safetensors") for folder in (dnazen, tmp_path / "out" / "checkpoint-2"))
    for name in weights.keys() - {EMBEDDINGS}:
        assert torch.equal(saved[name], weights[name]), name
    output = run(**{**arguments, "max_steps": 4}).stdout
    assert "resuming from checkpoint-2" in output and "keep their embedding" not in output
    resumed = load_file(tmp_path / "out" / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in saved.items())
    # another model of the same shape is another run
    write_dnazen(dnazen, seed=1, **SIZES, ngram_vocab_size=len(weights[EMBEDDINGS]))
    line = refused(**{**arguments, "max_steps": 6})
    assert "belongs to another run (init_from: the checkpoint has" in line


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_a_run_from_dnabert2_under_zero_learns(prepared, dnabert2, tmp_path, zero):
    arguments = {name: value for name, value in prepared.arguments().items() if name != "model"}
    arguments |= {"init_from": dnabert2, "output_dir": tmp_path / "out", "max_steps": 2, "eval_steps": 2}
    output = run(zero=zero, processes=2, **arguments, learning_rate=1e-9).stdout
    assert "code of the folder was run" not in output
    # two processes, one message
    assert len(re.findall(r"newly initialised, because not in its weights: 100 tensors", output)) == 1
    assert len(re.findall(r"not used: 2 tensors of its weights \(pooler", output)) == 1
    weights = torch.load(dnabert2 / "pytorch_model.bin", weights_only=True)
    model = DNAZenForMaskedLM.from_pretrained(tmp_path / "out" / "final", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        if "ngram_" not in name:  # two steps of 1e-9
            assert torch.allclose(tensor, weights[name], atol=1e-7, rtol=0), name


# -- what is refused --------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_go_together(prepared, dnabert2, refused):
    line = refused(init_from=dnabert2, **prepared.arguments())
    assert "--init-from brings the model's configuration; it does not go with --model" in line
    assert "--init-from needs --corpus" in refused(init_from=dnabert2, fasta=prepared.fasta)


def test_another_tokenizer(dnabert2, corpus):
    file = dnabert2 / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        InitialModel.open(str(dnabert2), corpus)
    message = str(error.value)
    assert f"{corpus.path}: expected a corpus made with the tokenizer of {dnabert2} (256 tokens, SHA-256 " in message
    assert len(set(re.findall(r"SHA-256 (\w{64})", message))) == 2


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors", "ngram.json"])
def test_a_file_that_is_missing(name, dnazen, corpus):
    (dnazen / name).unlink()
    with pytest.raises(InputError, match=re.escape(str(dnazen))) as error:
        InitialModel.open(str(dnazen), corpus)
    assert (name if name != "model.safetensors" else "*.safetensors") in str(error.value)


def test_ngrams_without_their_weights(dnazen, corpus, vocabulary):
    weights = load_file(dnazen / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "ngram_" not in name}
    save_file(kept, dnazen / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="found missing: bert.encoder.ngram_layers.0"):
        started_model(dnazen, corpus, vocabulary)


def test_a_checksum_for_all_that_is_read(dnazen, corpus):
    checksum = InitialModel.open(str(dnazen), corpus).checksum
    for name, content in {"config.json": None, "ngram.json": None, "model.safetensors": random_weights}.items():
        file = dnazen / name
        before = file.read_bytes()
        if content is None:
            file.write_bytes(before + b"\n")
        else:
            table = shapes(**SIZES, ngram_vocab_size=len(load_file(file)[EMBEDDINGS]))
            write_dnazen(dnazen, content(table, seed=1), **SIZES, ngram_vocab_size=table[EMBEDDINGS][0])
        assert InitialModel.open(str(dnazen), corpus).checksum != checksum, name
        file.write_bytes(before)


# -- the hub, without a network ---------------------------------------------------------------------------------------


def test_a_model_of_the_hub(dnabert2, tmp_path, monkeypatch):
    """Only data is asked for, and the pickle only where there is no safetensors file."""
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        target = tmp_path / "snapshot"
        target.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in dnabert2.glob(pattern):
                shutil.copy(file, target)
        return str(target)

    monkeypatch.setattr(hub, "snapshot_download", download)
    folder = fetch_model("zhihan1996/DNABERT-2-117M")
    assert asked == [
        ("zhihan1996/DNABERT-2-117M", ["*.json", "*.txt", "*.model", "*.safetensors"]),
        ("zhihan1996/DNABERT-2-117M", ["*.json", "*.txt", "*.model", "pytorch_model*.bin"]),
    ]
    assert {file.name for file in folder.iterdir()} == {"config.json", "tokenizer.json", "pytorch_model.bin"}


def test_neither_folder_nor_name(tmp_path):
    with pytest.raises(InputError, match="expected a folder, or a model's name on the Hugging Face hub"):
        fetch_model(str(tmp_path / "absent"))


def test_a_hub_that_does_not_answer(monkeypatch):
    def download(name, allow_patterns):
        raise OSError("no network\nand more")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(InputError, match="owner/name: no such folder, and the Hugging Face hub .*: no network$"):
        fetch_model("owner/name")
