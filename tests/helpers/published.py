"""Folders as DNABERT-2 and DNAZEN-1.0 are published, with random weights; written from the specification alone."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

BASE = dict(
    vocab_size=4096, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    num_hidden_ngram_layers=6, ngram_vocab_size=162708,
)  # fmt: skip
# base's pattern, narrower: 12 heads (so that the slopes interleave), half as many G-gram layers as token layers
SMALL = dict(
    vocab_size=64, hidden_size=48, num_hidden_layers=4, num_attention_heads=12, intermediate_size=80,
    num_hidden_ngram_layers=2, ngram_vocab_size=30,
)  # fmt: skip
NGRAM_FIELDS = ("num_hidden_ngram_layers", "ngram_vocab_size", "max_ngram_count")


def shapes(
    vocab_size: int, hidden_size: int, num_hidden_layers: int, intermediate_size: int,
    num_hidden_ngram_layers: int = 0, ngram_vocab_size: int = 0, head: str = "mlm", pooler: bool = False,
    num_labels: int = 2, **_,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Names and shapes of a published checkpoint; DNABERT-2's without G-grams; `head` is "mlm" or "classifier"."""
    table = {}

    def linear(name, rows, columns, bias=True):
        table[f"{name}.weight"] = (rows, columns)
        if bias:
            table[f"{name}.bias"] = (rows,)

    def norm(name):
        table[f"{name}.weight"] = table[f"{name}.bias"] = (hidden_size,)

    for name, rows in {"embeddings": vocab_size, "ngram_embeddings": ngram_vocab_size}.items():
        if rows:
            table[f"bert.{name}.word_embeddings.weight"] = (rows, hidden_size)
            table[f"bert.{name}.token_type_embeddings.weight"] = (2, hidden_size)
            norm(f"bert.{name}.LayerNorm")
    for i in range(num_hidden_layers):
        layer = f"bert.encoder.layer.{i}"
        linear(f"{layer}.attention.self.Wqkv", 3 * hidden_size, hidden_size)
        linear(f"{layer}.attention.output.dense", hidden_size, hidden_size)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.mlp.gated_layers", 2 * intermediate_size, hidden_size, bias=False)
        linear(f"{layer}.mlp.wo", hidden_size, intermediate_size)
        norm(f"{layer}.mlp.layernorm")
    for i in range(num_hidden_ngram_layers if ngram_vocab_size else 0):
        layer = f"bert.encoder.ngram_layers.{i}"
        for name in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{name}", hidden_size, hidden_size)
        linear(f"{layer}.attention.output.dense", hidden_size, hidden_size)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", intermediate_size, hidden_size)
        linear(f"{layer}.output.dense", hidden_size, intermediate_size)
        norm(f"{layer}.output.LayerNorm")
    if head == "mlm":
        linear("cls.predictions.transform.dense", hidden_size, hidden_size)
        norm("cls.predictions.transform.LayerNorm")
        linear("cls.predictions.decoder", vocab_size, hidden_size)
    else:
        linear("classifier", num_labels, hidden_size)
    if pooler or head == "classifier":
        linear("bert.pooler.dense", hidden_size, hidden_size)
    return table


def random_weights(table: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights that leave every part its say: no bias is 0, no LayerNorm is the identity, no attention is uniform."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in table.items():
        weights[name] = 0.15 * torch.randn(shape, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            weights[name] += 1
    if "cls.predictions.decoder.weight" in weights:
        weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    return weights


def write_dnabert2(folder: Path, weights: dict[str, torch.Tensor] | None = None, seed: int = 0, **sizes) -> dict:
    """`zhihan1996/DNABERT-2-117M`: weights as `pytorch_model.bin`, no G-grams, code of its own; returns the weights."""
    sizes = {name: value for name, value in {**SMALL, **sizes}.items() if name not in NGRAM_FIELDS}
    weights = random_weights(shapes(**sizes, pooler=True), seed) if weights is None else weights
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(folder, {**sizes, "auto_map": {"AutoModelForMaskedLM": "bert_layers.BertForMaskedLM"}})
    (folder / "bert_layers.py").write_text("raise RuntimeError('code of the folder was run')\n")
    torch.save(weights, folder / "pytorch_model.bin")
    return weights


def write_dnazen(folder: Path, weights: dict[str, torch.Tensor] | None = None, seed: int = 0, **sizes) -> dict:
    """`oomics/DNAZEN-1.0-base`: weights as safetensors, without the tied decoder; returns the weights."""
    sizes = {**SMALL, **sizes}
    weights = random_weights(shapes(**sizes), seed) if weights is None else weights
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(folder, {"max_ngram_count": 30, **sizes})
    stored = {name: tensor for name, tensor in weights.items() if name != "cls.predictions.decoder.weight"}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def write_ngrams(folder: Path, ngrams: dict[str, int], older: bool = False) -> None:
    """`ngram.json`: `ngrams` maps tokens joined by spaces, or in the older form ids joined by colons, to ids."""
    cap = {"max_ngrams": 30} if older else {"max_ngram_count": 30, "pad_ngram_id": 0}
    content = {"min_ngram_len": 2, "max_ngram_len": 5, **cap, "vocab": ngrams}
    (folder / "ngram.json").write_text(json.dumps(content))


def _write_config(folder: Path, fields: dict) -> None:
    config = {
        "_name_or_path": "", "alibi_starting_size": 512, "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.0, "classifier_dropout": None, "gradient_checkpointing": False,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512, "model_type": "bert", "pad_token_id": 0,
        "position_embedding_type": "absolute", "torch_dtype": "float32", "transformers_version": "4.28.0",
        "type_vocab_size": 2, "use_cache": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, **fields}, indent=2))
