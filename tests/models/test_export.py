"""`dnazen export`: the published names and layout, and the way back."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dnazen.cli.main import main
from dnazen.data.corpus import Corpus
from dnazen.data.tokenizer import load_tokenizer
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM, DNAZenForSequenceClassification
from dnazen.ngram.vocab import load_ngrams
from tests.helpers.published import shapes

SIZES = dict(
    vocab_size=256, hidden_size=48, num_hidden_layers=2, num_attention_heads=12, intermediate_size=64,
    num_hidden_ngram_layers=1,
)  # fmt: skip


@pytest.fixture(params=["mlm", "classifier"])
def trained(request, prepared, tmp_path):
    """A checkpoint in bf16, as a run under DeepSpeed leaves it, with files that only training reads."""
    corpus = Corpus.open(prepared.corpus)
    vocabulary = load_ngrams(prepared.ngrams, corpus)
    model_class = DNAZenForMaskedLM if request.param == "mlm" else DNAZenForSequenceClassification
    config = DNAZenConfig(**SIZES, ngram_vocab_size=vocabulary.vocab_size, num_labels=3, hidden_dropout_prob=0.0)
    model = model_class(config).to(torch.bfloat16)
    folder = tmp_path / "checkpoint-5"
    model.save_pretrained(folder)
    corpus.tokenizer.save_pretrained(folder)
    vocabulary.save_pretrained(folder, corpus.tokenizer)
    (folder / "optimizer.pt").write_bytes(b"state of training")
    (folder / "checkpoint.json").write_text("{}")
    return request.param, model, folder


@pytest.mark.slow
def test_names_shapes_files_and_the_way_back(trained, tmp_path, capsys, caplog):
    head, model, folder = trained
    assert main(["export", "--model", str(folder), "--output-dir", str(tmp_path / "out")]) == 0
    assert f"parameters  {model.num_parameters():,}, in fp32" in capsys.readouterr().out
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "model.safetensors", "ngram.json", "tokenizer.json", "tokenizer_config.json"}

    weights = load_file(tmp_path / "out" / "model.safetensors")
    expected = shapes(**SIZES, ngram_vocab_size=model.config.ngram_vocab_size, head=head, num_labels=3)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}

    assert "no limit of G-grams per sequence" in caplog.text

    caplog.clear()
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert caplog.messages == []  # nothing missing, nothing unused
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.float()), name
    first, second = (json.loads((path / "ngram.json").read_text()) for path in (folder, tmp_path / "out"))
    assert first == second


@pytest.mark.slow
def test_configuration_has_every_published_field(trained, tmp_path):
    head, model, folder = trained
    main(["export", "--model", str(folder), "--output-dir", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    published = {
        "alibi_starting_size": 512, "attention_probs_dropout_prob": 0.0, "classifier_dropout": None,
        "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "initializer_range": 0.02,
        "layer_norm_eps": 1e-12, "max_ngram_count": None, "max_position_embeddings": 512, "model_type": "bert",
        "position_embedding_type": "absolute", "torch_dtype": "float32", "type_vocab_size": 2, "use_cache": True,
        "ngram_vocab_size": model.config.ngram_vocab_size, "tie_word_embeddings": True, **SIZES,
    }  # fmt: skip
    assert {name: config.get(name, "absent") for name in published} == published
    assert config["architectures"] == ["BertForMaskedLM" if head == "mlm" else "BertForSequenceClassification"]
    assert len(config["id2label"]) == 3 and "impl" not in config


def test_an_export_can_be_exported(trained, tmp_path):
    _, _, folder = trained
    for source, target in ((folder, tmp_path / "once"), (tmp_path / "once", tmp_path / "twice")):
        assert main(["export", "--model", str(source), "--output-dir", str(target)]) == 0
    for file in (tmp_path / "once").iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes(), file.name


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory):
    """Folder with transformers 4, before what is installed on the path of a program's own."""
    folder = tmp_path_factory.mktemp("transformers-4")
    wanted = ["transformers==4.51.3", "tokenizers>=0.21,<0.22", "huggingface-hub>=0.30,<1"]
    line = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary", ":all:", "--target", folder]
    result = subprocess.run([*line, *wanted], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"needs the wheels of {', '.join(wanted)}, which cannot be had: {result.stderr[-200:]}")
    return folder


TRANSFORMERS_4 = """\
import json, sys
import transformers
from transformers import AutoConfig, AutoTokenizer
assert transformers.__version__ == "4.51.3", transformers.__version__
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
config = AutoConfig.from_pretrained(sys.argv[1])
print(json.dumps([tokenizer(sys.argv[2])["input_ids"], tokenizer.all_special_tokens, tokenizer.mask_token_id,
                  tokenizer.model_max_length, config.model_type]))
"""


@pytest.mark.slow
def test_transformers_4_reads_tokenizer_and_configuration(trained, transformers_4, tmp_path):
    _, _, folder = trained
    assert main(["export", "--model", str(folder), "--output-dir", str(tmp_path / "out")]) == 0
    ours = load_tokenizer(folder)
    sequence = "ACGTTGCATATAAAGGCGCGNNTTGACA"
    result = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS_4, tmp_path / "out", sequence], cwd=tmp_path, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(transformers_4)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = [ours(sequence)["input_ids"], ours.all_special_tokens, ours.mask_token_id, ours.model_max_length, "bert"]
    assert json.loads(result.stdout) == expected


def test_tokenizer_has_the_form_of_transformers_4(trained, tmp_path):
    """And transformers 5 reads it as it reads its own."""
    _, _, folder = trained
    main(["export", "--model", str(folder), "--output-dir", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": int(1e30), "unk_token": "[UNK]",
        "clean_up_tokenization_spaces": False, "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]",
        "mask_token": "[MASK]",
    }  # fmt: skip
    found, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(folder)
    sequence = "ACGTTGCATATAAAGGCGCGNNTTGACA"
    assert found(sequence)["input_ids"] == ours(sequence)["input_ids"]
    assert (found.all_special_tokens, found.pad_token_id) == (ours.all_special_tokens, ours.pad_token_id)


def refused(capsys, *words) -> str:
    assert main(["export", *map(str, words)]) == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_is_no_model(trained, tmp_path, capsys):
    _, _, folder = trained
    out = tmp_path / "out"
    assert "absent: no such folder; expected a model" in refused(
        capsys, "--model", tmp_path / "absent", "--output-dir", out
    )
    shutil.copytree(folder, tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({**config, "architectures": ["DNAZenModel"]}))
    line = refused(capsys, "--model", tmp_path / "encoder", "--output-dir", out)
    assert "expected DNAZenForMaskedLM or DNAZenForSequenceClassification, found ['DNAZenModel']" in line
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights}: expected weights, found a damaged file" in refused(
        capsys, "--model", folder, "--output-dir", out
    )
    assert not out.exists()
