"""DNAZEN: an encoder over BPE tokens (E4BU) to which each of the first layers adds the states of the covering G-grams.

All three models take either form of input:

- packed, the names and shapes of `dnazen.layers.padding.PackedBatch`: without the G-gram fields no sequence has any;
- padded, as in Hugging Face: `input_ids [B, S]`, `attention_mask [B, S]` (default: all ones) and, all or none of them,
  `ngram_input_ids [B, G]`, `ngram_attention_mask [B, G]`, `ngram_position_matrix [B, S, G]`. It is packed at the door,
  once, and the output is padded back with zeros.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import ModelOutput, can_return_tuple

from dnazen.layers.attention import alibi_bias, packed_attention, padded_attention
from dnazen.layers.encoder import Embeddings, EncoderOutput, FusedEncoder
from dnazen.layers.padding import PackedBatch, PaddedLayout, batch_without_ngrams, dense_matching_matrix, pack_batch
from dnazen.models.configuration_dnazen import DNAZenConfig
from dnazen_kernels.ngram_fusion import ngram_fusion
from dnazen_kernels.ngram_fusion.reference import ngram_fusion_dense

IGNORE_INDEX = -100


# The arguments of each form of input, and those that come with G-grams only.
_PACKED = {"input_ids", "cu_seqlens", "max_seqlen"}
_PADDED = {"input_ids", "attention_mask"}
_PADDED_NGRAMS = {"ngram_input_ids", "ngram_attention_mask", "ngram_position_matrix"}


def _check_shape(name: str, value: Tensor, *shape: int | None) -> None:
    if value.dim() != len(shape) or any(size not in (None, found) for size, found in zip(shape, value.shape)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{expected}], found {list(value.shape)}")


def prepare_batch(**inputs: Any) -> tuple[PackedBatch, PaddedLayout | None]:
    """The door: check a model's input of either form and pack it if it is padded.

    Returns:
        The packed batch, and the layout to pad the output back to, None for packed input.

    Raises:
        ValueError: missing or contradictory arguments, or a wrong shape; the message names the argument.
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}
    is_packed = "cu_seqlens" in inputs
    if not is_packed:
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    expected = _PACKED if is_packed else _PADDED
    with_ngrams = expected | (set(PackedBatch._fields) if is_packed else _PADDED_NGRAMS)
    has_ngrams = not inputs.keys().isdisjoint(with_ngrams - expected)
    expected = with_ngrams if has_ngrams else expected
    form = ("packed" if is_packed else "padded (no cu_seqlens)") + (" batch with G-grams" if has_ngrams else " batch")
    if missing := sorted(expected - inputs.keys()):
        raise ValueError(f"{', '.join(missing)}: expected in a {form}, found None")
    if surplus := sorted(inputs.keys() - expected):
        raise ValueError(f"{', '.join(surplus)}: expected None in a {form}, found a value")

    input_ids = inputs["input_ids"]
    if is_packed:
        _check_shape("input_ids", input_ids, None)
        _check_shape("cu_seqlens", inputs["cu_seqlens"], None)
        if not has_ngrams:
            return batch_without_ngrams(**inputs), None
        _check_shape("ngram_input_ids", inputs["ngram_input_ids"], None)
        _check_shape("ngram_cu_seqlens", inputs["ngram_cu_seqlens"], len(inputs["cu_seqlens"]))
        return PackedBatch(**inputs), None
    _check_shape("input_ids", input_ids, None, None)
    _check_shape("attention_mask", inputs["attention_mask"], *input_ids.shape)
    if not inputs["attention_mask"].any(dim=1).all():
        raise ValueError("attention_mask: expected a token in every sequence, found a sequence of padding only")
    if has_ngrams:
        _check_shape("ngram_input_ids", inputs["ngram_input_ids"], len(input_ids), None)
        num_ngrams = inputs["ngram_input_ids"].shape[1]
        _check_shape("ngram_attention_mask", inputs["ngram_attention_mask"], len(input_ids), num_ngrams)
        _check_shape("ngram_position_matrix", inputs["ngram_position_matrix"], *input_ids.shape, num_ngrams)
    return pack_batch(**inputs)


def _pad_back(states: Any, layout: PaddedLayout | None) -> Any:
    """Pad packed states, or each of a tuple of them, back to `layout`; as they are where there is none."""
    if layout is None or states is None:
        return states
    return tuple(map(layout.pad, states)) if isinstance(states, tuple) else layout.pad(states)


class Pooler(nn.Module):
    """Dense and tanh on the first token's states."""

    def __init__(self, config: DNAZenConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden_states))


class MLMTransform(nn.Module):
    """Dense, GELU, LayerNorm."""

    def __init__(self, config: DNAZenConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(hidden_states)))


class MLMHead(nn.Module):
    """Transform, then a decoder whose weight is the word embedding's."""

    def __init__(self, config: DNAZenConfig) -> None:
        super().__init__()
        self.transform = MLMTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden_states))


class DNAZenPreTrainedModel(PreTrainedModel):
    """Weights (normal with `initializer_range`, zero biases), loading and saving, as in Hugging Face's BERT."""

    config_class = DNAZenConfig
    base_model_prefix = "bert"
    _no_split_modules = ["Embeddings", "TokenLayer", "NgramLayer"]
    _supports_sdpa = True


class DNAZenModel(DNAZenPreTrainedModel):
    """Both encoders, without a head; with a pooler if asked for (classification has one, masked LM has none)."""

    def __init__(self, config: DNAZenConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config, config.vocab_size)
        self.ngram_embeddings = Embeddings(config, config.ngram_vocab_size)
        self.encoder = FusedEncoder(config)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
        ngram_input_ids: Tensor | None = None, ngram_cu_seqlens: Tensor | None = None, max_ngrams: int | None = None,
        token_offsets: Tensor | None = None, token_ngrams: Tensor | None = None,
        ngram_offsets: Tensor | None = None, ngram_tokens: Tensor | None = None,
        attention_mask: Tensor | None = None, ngram_attention_mask: Tensor | None = None,
        ngram_position_matrix: Tensor | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:  # fmt: skip
        """Run both encoders on packed or padded input (see the module's docstring).

        Returns:
            `last_hidden_state` and each of `hidden_states`: `[T, H]`, or `[B, S, H]` for padded input;
            `pooler_output [B, H]` if there is a pooler; `attentions` (E4BU's, eager attention only):
            `[B, heads, max_seqlen, max_seqlen]` per layer, each sequence from its first token on.

        Raises:
            ValueError: the input contradicts itself (`prepare_batch`), or attention weights are asked for of an
                implementation that has none.
        """
        batch, layout = prepare_batch(
            input_ids=input_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, ngram_input_ids=ngram_input_ids,
            ngram_cu_seqlens=ngram_cu_seqlens, max_ngrams=max_ngrams, token_offsets=token_offsets,
            token_ngrams=token_ngrams, ngram_offsets=ngram_offsets, ngram_tokens=ngram_tokens,
            attention_mask=attention_mask, ngram_attention_mask=ngram_attention_mask,
            ngram_position_matrix=ngram_position_matrix,
        )  # fmt: skip
        implementation, is_reference = self.config._attn_implementation, self.config.impl == "reference"
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions and implementation != "eager" and not is_reference:
            raise ValueError(
                f"output_attentions: expected attn_implementation='eager', which alone returns weights, "
                f"found {implementation!r}"
            )
        encode = self._encode_padded if is_reference else self._encode_packed
        output = encode(batch, output_hidden_states)
        hidden_states, first_tokens = output.last_hidden_state, batch.cu_seqlens[:-1].long()
        return BaseModelOutputWithPooling(
            last_hidden_state=_pad_back(hidden_states, layout),
            pooler_output=None if self.pooler is None else self.pooler(hidden_states[first_tokens]),
            hidden_states=_pad_back(output.hidden_states, layout) if output_hidden_states else None,
            attentions=output.attentions if output_attentions else None,
        )

    def _encode_packed(self, batch: PackedBatch, output_hidden_states: bool) -> EncoderOutput:
        implementation, num_tokens = self.config._attn_implementation, len(batch.input_ids)
        bias = alibi_bias(self.config.num_attention_heads, batch.max_seqlen, batch.input_ids.device)
        return self.encoder(
            self.embeddings(batch.input_ids),
            self.ngram_embeddings(batch.ngram_input_ids),
            packed_attention(implementation, batch.cu_seqlens, batch.max_seqlen, num_tokens, bias),
            packed_attention(implementation, batch.ngram_cu_seqlens, batch.max_ngrams, len(batch.ngram_input_ids)),
            partial(
                ngram_fusion,
                token_offsets=batch.token_offsets,
                token_ngrams=batch.token_ngrams,
                ngram_offsets=batch.ngram_offsets,
                ngram_tokens=batch.ngram_tokens,
            ),
            output_hidden_states,
        )

    def _encode_padded(self, batch: PackedBatch, output_hidden_states: bool) -> EncoderOutput:
        """The reference: padded states, dense bias, explicit attention, einsum over a dense matching matrix."""
        tokens = PaddedLayout.from_cu_seqlens(batch.cu_seqlens, batch.max_seqlen, len(batch.input_ids))
        ngrams = PaddedLayout.from_cu_seqlens(batch.ngram_cu_seqlens, batch.max_ngrams, len(batch.ngram_input_ids))
        bias = alibi_bias(self.config.num_attention_heads, batch.max_seqlen, batch.input_ids.device)
        output = self.encoder(
            self.embeddings(tokens.pad(batch.input_ids)),
            self.ngram_embeddings(ngrams.pad(batch.ngram_input_ids)),
            padded_attention(batch.cu_seqlens, batch.max_seqlen, bias),
            padded_attention(batch.ngram_cu_seqlens, batch.max_ngrams, bias=None),
            partial(ngram_fusion_dense, ngram_position_matrix=dense_matching_matrix(batch, tokens, ngrams)),
            output_hidden_states,
        )
        return output._replace(
            last_hidden_state=tokens.unpad(output.last_hidden_state),
            hidden_states=tuple(map(tokens.unpad, output.hidden_states)),
        )


class DNAZenWithHead(DNAZenPreTrainedModel):
    """What the models with a head share: the door, the encoders, the output."""

    output_class: type[ModelOutput]

    def head(
        self, outputs: BaseModelOutputWithPooling, layout: PaddedLayout | None, labels: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        """Loss (None without labels) and logits from the packed output of the encoders."""
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
        ngram_input_ids: Tensor | None = None, ngram_cu_seqlens: Tensor | None = None, max_ngrams: int | None = None,
        token_offsets: Tensor | None = None, token_ngrams: Tensor | None = None,
        ngram_offsets: Tensor | None = None, ngram_tokens: Tensor | None = None,
        attention_mask: Tensor | None = None, ngram_attention_mask: Tensor | None = None,
        ngram_position_matrix: Tensor | None = None, labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> ModelOutput:  # fmt: skip
        """Run encoders and head on packed or padded input (see the module's docstring and the class's)."""
        batch, layout = prepare_batch(
            input_ids=input_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, ngram_input_ids=ngram_input_ids,
            ngram_cu_seqlens=ngram_cu_seqlens, max_ngrams=max_ngrams, token_offsets=token_offsets,
            token_ngrams=token_ngrams, ngram_offsets=ngram_offsets, ngram_tokens=ngram_tokens,
            attention_mask=attention_mask, ngram_attention_mask=ngram_attention_mask,
            ngram_position_matrix=ngram_position_matrix,
        )  # fmt: skip
        outputs = self.bert(
            **batch._asdict(), output_attentions=output_attentions, output_hidden_states=output_hidden_states
        )
        loss, logits = self.head(outputs, layout, labels, num_items_in_batch)
        hidden_states = _pad_back(outputs.hidden_states, layout)
        return self.output_class(loss=loss, logits=logits, hidden_states=hidden_states, attentions=outputs.attentions)


class DNAZenForMaskedLM(DNAZenWithHead):
    """DNAZEN with the masked-language-model head, whose decoder is tied to the word embeddings.

    Without `labels`, `logits` is `[T, V]`, or `[B, S, V]` for padded input. With `labels` (shaped as `input_ids`; the
    original id at masked positions, -100 elsewhere) the head runs at the masked positions alone: `logits` is
    `[number of masked positions, V]`, and `loss` the summed cross-entropy, in fp32, over `num_items_in_batch`
    (default: the masked positions at hand); it is 0 if nothing is masked.
    """

    _tied_weights_keys = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
    accepts_loss_kwargs = True  # tells Trainer that num_items_in_batch is heeded
    output_class = MaskedLMOutput

    def __init__(self, config: DNAZenConfig) -> None:
        super().__init__(config)
        self.bert = DNAZenModel(config)
        self.cls = nn.ModuleDict({"predictions": MLMHead(config)})
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls["predictions"].decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.cls["predictions"].decoder = value

    def head(self, outputs, layout, labels, num_items_in_batch) -> tuple[Tensor | None, Tensor]:
        hidden_states = outputs.last_hidden_state
        if labels is None:
            return None, _pad_back(self.cls["predictions"](hidden_states), layout)
        shape = hidden_states.shape[:1] if layout is None else (layout.batch_size, layout.width)
        _check_shape("labels", labels, *shape)
        labels = labels if layout is None else layout.unpad(labels)
        masked = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        logits = self.cls["predictions"](hidden_states[masked])
        loss = F.cross_entropy(logits.float(), labels[masked], reduction="sum")
        count = len(masked) if num_items_in_batch is None else num_items_in_batch
        return loss / torch.as_tensor(count, device=loss.device).clamp(min=1), logits


class DNAZenForSequenceClassification(DNAZenWithHead):
    """DNAZEN with a pooler on [CLS] and a linear layer to `num_labels` classes, labels or regression targets.

    `logits` is `[B, num_labels]`; `loss`, if `labels` are given, is what `problem_type` means in Hugging Face's models.
    """

    accepts_loss_kwargs = False  # tells Trainer that the loss is a mean over the sequences at hand
    output_class = SequenceClassifierOutput

    def __init__(self, config: DNAZenConfig) -> None:
        super().__init__(config)
        self.bert = DNAZenModel(config, add_pooling_layer=True)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def head(self, outputs, layout, labels, num_items_in_batch) -> tuple[Tensor | None, Tensor]:
        logits = self.classifier(self.dropout(outputs.pooler_output))
        if labels is None:
            return None, logits
        loss = self.loss_function(
            labels=labels, pooled_logits=logits.float(), config=self.config, num_items_in_batch=num_items_in_batch
        )
        return loss, logits
