"""Embeddings and layers of the token encoder and of the G-gram encoder, and the two fused layer by layer.

Every module but the embeddings works on the last dimension alone, so it takes packed `[T, H]` and padded `[B, S, H]`
alike; what depends on the layout (attention, and the fusion with the LayerNorm before it) is handed in. `config` has
DNAZenConfig's fields.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dnazen.layers.attention import Attention, FusedSelfAttention, SelfAttention
from dnazen.layers.fusion import AddNorm, ResidualLayerNorm, residual_output
from dnazen.layers.linear import Linear, SharedInputLinear, project
from dnazen.layers.neighbors import Neighbors


class Embeddings(nn.Module):
    """Embeddings of tokens, or of G-grams: word embedding plus row 0 of the token types, LayerNorm, dropout, as in
    BERT.

    With `neighbor_window` w > 0, the word embeddings of the w tokens to the left and to the right are added too, each
    after a linear layer of its own distance: for w = 1, `word[t] + left(word[t - 1]) + right(word[t + 1])`. Without it
    the model could hardly tell left from right, because ALiBi depends on |i - j| alone and there are no other
    positions.
    """

    def __init__(self, config, vocab_size: int, neighbor_window: int = 0) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.distances = [d for d in range(-neighbor_window, neighbor_window + 1) if d]
        if self.distances:
            matrices = (Linear(config.hidden_size, config.hidden_size, bias=False) for _ in self.distances)
            self.neighbor_layers = nn.ModuleList(matrices)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """From `input_ids [T]` of the sequences that `cu_seqlens [B + 1]` delimits to states `[T, H]`."""
        words = self.word_embeddings(input_ids)
        states = words + self.token_type_embeddings(input_ids.new_zeros(1))
        if self.distances:
            neighbors = Neighbors(cu_seqlens, len(input_ids), self.distances[-1])
            for distance, layer in zip(self.distances, self.neighbor_layers):
                states = states + layer(neighbors.at(words, distance))
        return self.dropout(self.LayerNorm(states))


class ResidualOutput(nn.Module):
    """BERT's way out of a sub-layer: projection, dropout, LayerNorm of the sum with the residual (post-LN)."""

    def __init__(self, config, in_features: int) -> None:
        super().__init__()
        self.dense = Linear(in_features, config.hidden_size)
        self.LayerNorm = ResidualLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor, add_norm: AddNorm) -> Tensor:
        return residual_output(self.dense, self.dropout, self.LayerNorm, hidden_states, residual, add_norm)


class AttentionBlock(nn.Module):
    """Self-attention of either kind and its output."""

    def __init__(self, config, self_attention: type[nn.Module]) -> None:
        super().__init__()
        self.self = self_attention(config.hidden_size, config.num_attention_heads)
        self.output = ResidualOutput(config, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, attention: Attention, add_norm: AddNorm, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        context, residual, weights = self.self(hidden_states, attention)
        if rows is not None:
            context, residual = context.index_select(0, rows), residual.index_select(0, rows)
        return self.output(context, residual, add_norm), weights


class GatedMLP(nn.Module):
    """DNABERT-2's feed-forward: the first half through exact GELU, times the second half."""

    def __init__(self, config) -> None:
        super().__init__()
        self.gated_layers = SharedInputLinear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.wo = Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm = ResidualLayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, add_norm: AddNorm, ngram_hidden_states: Tensor | None) -> Tensor:
        gated, residual = project(self.gated_layers, hidden_states)
        gate, value = gated.chunk(2, dim=-1)
        x = F.gelu(gate) * value
        return residual_output(self.wo, self.dropout, self.layernorm, x, residual, add_norm, ngram_hidden_states)


class TokenLayer(nn.Module):
    """A layer of the token encoder; after it, to each token are added the states of the G-grams over it, if given.

    With `rows [M]`, ascending, it returns the states of those rows alone, `[M, H]`: every row has a key and a value,
    but what comes after attention is computed for these.
    """

    def __init__(self, config) -> None:
        super().__init__()
        self.attention = AttentionBlock(config, FusedSelfAttention)
        self.mlp = GatedMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention: Attention,
        add_norm: AddNorm,
        ngram_hidden_states: Tensor | None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        hidden_states, weights = self.attention(hidden_states, attention, add_norm, rows)
        return self.mlp(hidden_states, add_norm, ngram_hidden_states), weights


class NgramLayer(nn.Module):
    """A layer of the G-gram encoder: a standard post-LN BERT layer."""

    def __init__(self, config) -> None:
        super().__init__()
        self.attention = AttentionBlock(config, SelfAttention)
        dense = Linear(config.hidden_size, config.intermediate_size)
        self.intermediate = nn.Sequential(OrderedDict(dense=dense, activation=nn.GELU()))
        self.output = ResidualOutput(config, config.intermediate_size)

    def forward(self, hidden_states: Tensor, attention: Attention, add_norm: AddNorm) -> tuple[Tensor, Tensor | None]:
        hidden_states, weights = self.attention(hidden_states, attention, add_norm)
        return self.output(self.intermediate(hidden_states), hidden_states, add_norm), weights


class FusedEncoder(nn.Module):
    """Both stacks. After the token encoder's layer l the states of the G-gram encoder's layer l are added (paper, eq.
    4).

    Hugging Face's models set the two attributes of gradient checkpointing: whether, and by which function.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable

    def __init__(self, config) -> None:
        super().__init__()
        self.layer = nn.ModuleList(TokenLayer(config) for _ in range(config.num_hidden_layers))
        self.ngram_layers = nn.ModuleList(NgramLayer(config) for _ in range(config.num_hidden_ngram_layers))

    def forward(
        self,
        hidden_states: Tensor,
        ngram_hidden_states: Tensor,
        attention: Attention,
        ngram_attention: Attention,
        add_norm: AddNorm,
        keep_all: bool,
        last_rows: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Run both stacks.

        With `last_rows [M]`, ascending, the last layer returns the states of those rows alone; it must not be one that
        G-grams are added to.

        Returns:
            the token encoder's states after the embeddings and every layer (the last alone unless `keep_all`), and the
            attention weights of every layer of the token encoder and of the G-gram encoder (none where the
            implementation has none).
        """

        def run(layer: nn.Module, *args):
            is_checkpointing = self.gradient_checkpointing and self.training
            return self._gradient_checkpointing_func(layer, *args) if is_checkpointing else layer(*args)

        all_hidden_states = [hidden_states] if keep_all else []
        all_weights: list[Tensor] = []
        all_ngram_weights: list[Tensor] = []
        for index, layer in enumerate(self.layer):
            # The G-gram layers run even on a batch with no G-gram: under ZeRO-3 all ranks must call the same modules.
            # Not on a CUDA stream of their own: DeepSpeed (0.19.8) would fill a bucket of gradients that is still sent.
            if is_fused := index < len(self.ngram_layers):
                ngram_hidden_states, ngram_weights = run(
                    self.ngram_layers[index], ngram_hidden_states, ngram_attention, add_norm
                )
                all_ngram_weights += [] if ngram_weights is None else [ngram_weights]
            is_last = index == len(self.layer) - 1
            hidden_states, weights = run(
                layer, hidden_states, attention, add_norm, ngram_hidden_states if is_fused else None,
                last_rows if is_last else None,
            )  # fmt: skip
            if keep_all or is_last:
                all_hidden_states.append(hidden_states)
            all_weights += [] if weights is None else [weights]
        return all_hidden_states, all_weights, all_ngram_weights
