"""The forward pass written once more: padded, dense, plain loops, from the specification; imports torch alone."""

import math

import torch
from torch import Tensor

# ALiBi for 12 heads: the 8 slopes of 8 heads, then every second one of the 16 slopes of 16 heads.
SLOPES_12 = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x: Tensor, weights: dict, name: str) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-12) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: dict, name: str) -> Tensor:
    bias = weights.get(f"{name}.bias")
    product = x @ weights[f"{name}.weight"].T
    return product if bias is None else product + bias


def embed(ids: Tensor, weights: dict, name: str) -> Tensor:
    states = weights[f"{name}.word_embeddings.weight"][ids] + weights[f"{name}.token_type_embeddings.weight"][0]
    return layer_norm(states, weights, f"{name}.LayerNorm")


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: int, bias: list[Tensor] | None) -> Tensor:
    """`[B, S, H]` each; `mask [B, S]` is 1 at what may be looked at; `bias` is one `[S, S]` for each head."""
    size = query.shape[-1] // heads
    contexts = []
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        scores = query[..., columns] @ key[..., columns].transpose(1, 2) / math.sqrt(size)
        if bias is not None:
            scores = scores + bias[head]
        scores = scores.masked_fill(mask[:, None, :] == 0, -1e9)
        contexts.append(torch.softmax(scores, -1) @ value[..., columns])
    return torch.cat(contexts, -1)


def encode(
    weights: dict, heads: int, input_ids: Tensor, attention_mask: Tensor, ngram_input_ids: Tensor | None = None,
    ngram_attention_mask: Tensor | None = None, ngram_position_matrix: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Last token states `[B, S, H]` for padded input `[B, S]`, G-grams `[B, G]` and their matrix `[B, S, G]`."""
    assert heads == 12
    position = torch.arange(input_ids.shape[1])
    distance = (position[:, None] - position[None, :]).abs()
    bias = [-slope * distance for slope in SLOPES_12]
    states = embed(input_ids, weights, "bert.embeddings")
    hidden = states.shape[-1]
    if ngram_input_ids is not None:
        ngram_states = embed(ngram_input_ids, weights, "bert.ngram_embeddings")
    layer = 0
    while f"bert.encoder.layer.{layer}.mlp.wo.weight" in weights:
        name = f"bert.encoder.layer.{layer}"
        qkv = linear(states, weights, f"{name}.attention.self.Wqkv")
        query, key, value = qkv[..., :hidden], qkv[..., hidden : 2 * hidden], qkv[..., 2 * hidden :]
        context = attend(query, key, value, attention_mask, heads, bias)
        output = linear(context, weights, f"{name}.attention.output.dense")
        states = layer_norm(output + states, weights, f"{name}.attention.output.LayerNorm")
        both = linear(states, weights, f"{name}.mlp.gated_layers")
        half = both.shape[-1] // 2
        output = linear(gelu(both[..., :half]) * both[..., half:], weights, f"{name}.mlp.wo")
        states = layer_norm(output + states, weights, f"{name}.mlp.layernorm")

        name = f"bert.encoder.ngram_layers.{layer}"
        if ngram_input_ids is not None and f"{name}.output.dense.weight" in weights:
            query, key, value = (
                linear(ngram_states, weights, f"{name}.attention.self.{part}") for part in ("query", "key", "value")
            )
            context = attend(query, key, value, ngram_attention_mask, heads, None)
            output = linear(context, weights, f"{name}.attention.output.dense")
            ngram_states = layer_norm(output + ngram_states, weights, f"{name}.attention.output.LayerNorm")
            output = gelu(linear(ngram_states, weights, f"{name}.intermediate.dense"))
            output = linear(output, weights, f"{name}.output.dense")
            ngram_states = layer_norm(output + ngram_states, weights, f"{name}.output.LayerNorm")
            states = states + torch.einsum("bsg,bgh->bsh", ngram_position_matrix, ngram_states)
        layer += 1
    return states


def masked_lm_logits(weights: dict, heads: int, **batch: Tensor) -> Tensor:
    """`[B, S, V]`."""
    states = gelu(linear(encode(weights, heads, **batch), weights, "cls.predictions.transform.dense"))
    states = layer_norm(states, weights, "cls.predictions.transform.LayerNorm")
    return states @ weights["bert.embeddings.word_embeddings.weight"].T + weights["cls.predictions.decoder.bias"]


def classifier_logits(weights: dict, heads: int, **batch: Tensor) -> Tensor:
    """`[B, labels]`."""
    first = encode(weights, heads, **batch)[:, 0]
    return linear(torch.tanh(linear(first, weights, "bert.pooler.dense")), weights, "classifier")
