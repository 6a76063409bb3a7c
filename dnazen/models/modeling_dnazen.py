"""DNAZEN: an encoder over BPE tokens (E4BU in the paper, here the token encoder), to which each of the first layers
adds the states of the covering G-grams.

The models take either form of input:

- packed, as `PackedBatch` in `dnazen.layers.padding`, each tensor by its name;
- padded, as in Hugging Face. It is packed at the door, once, and the encoders' output is padded back with zeros.

`ModelInputs` lists the names of both. They come one by one, and not as `PackedBatch`, because that is what Trainer,
DeepSpeed and peft can move, cast and hand on.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput, can_return_tuple
from typing_extensions import Unpack

from dnazen.files import InputError
from dnazen.layers.attention import (
    BACKENDS,
    Selection,
    alibi_slopes,
    packed_attention,
    padded_attention,
    select_attention,
)
from dnazen.layers.compilation import compile_dynamic
from dnazen.layers.encoder import Embeddings, FusedEncoder, GatedMLP, ResidualOutput
from dnazen.layers.fusion import packed_add_norm, padded_add_norm
from dnazen.layers.linear import Linear
from dnazen.layers.padding import PackedBatch, PaddedLayout, dense_matching_matrix
from dnazen.models.configuration_dnazen import DNAZenConfig
from dnazen.models.inputs import ModelInputs, check_shape, prepare_batch, takes_model_inputs
from dnazen.models.loading import CLASSIFIER, MLM_HEAD, NGRAM_PART, POOLER, StrictLoading
from dnazen.models.ngram_file import KeptNgrams
from dnazen_kernels.ngram_masking import IGNORE_INDEX


def _mlm_head(config: DNAZenConfig) -> nn.Sequential:
    """Dense, GELU, LayerNorm, and a decoder whose weight is that of the word embeddings."""
    dense = Linear(config.hidden_size, config.hidden_size)
    norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    transform = nn.Sequential(OrderedDict(dense=dense, activation=nn.GELU(), LayerNorm=norm))
    decoder = Linear(config.hidden_size, config.vocab_size)
    return nn.Sequential(OrderedDict(transform=transform, decoder=decoder))


def _pooler(config: DNAZenConfig) -> nn.Sequential:
    """Dense and tanh, for the first token's states."""
    dense = Linear(config.hidden_size, config.hidden_size)
    return nn.Sequential(OrderedDict(dense=dense, activation=nn.Tanh()))


class DNAZenPreTrainedModel(StrictLoading, KeptNgrams, PreTrainedModel):
    """Weights (normal with `initializer_range`, zero biases) as in Hugging Face's BERT; loading and saving are ours."""

    config_class = DNAZenConfig
    base_model_prefix = "bert"
    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True

    def _check_and_adjust_attn_implementation(  # type: ignore[override]
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str | None:
        """Hugging Face's hook for `attn_implementation`: here the names are ours, and None lets `select_attention`
        choose.

        Hugging Face's own would take "sdpa" for None, and ask the hub for a package that is not installed. What runs
        depends on device and type, which are not settled before the first forward.

        Raises:
            InputError: the name is unknown, or contradicts `impl="reference"`, which has an attention of its own.
        """
        if attn_implementation in (None, "auto"):
            return None
        if attn_implementation not in BACKENDS:
            expected = ", ".join(["auto", *BACKENDS])
            raise InputError(f"attn_implementation: expected one of {expected}, found {attn_implementation!r}")
        if self.config.impl == "reference" and attn_implementation != "eager":
            raise InputError(
                f"attn_implementation: expected 'eager' or none with impl 'reference', found {attn_implementation!r}"
            )
        return attn_implementation

    def compile_layers(self, **options: Any) -> None:
        """Compile the feed-forward blocks and the ways out of attention, in place; `options` are `torch.compile`'s.

        The attention itself is left out: its kernels are compiled already, and not every package's can be traced. Sizes
        are dynamic, because they differ from batch to batch, so that one compilation serves all; PyTorch compiles once
        more for batches of no G-gram, for those of one, and for evaluation.
        """
        for module in self.modules():
            if isinstance(module, (GatedMLP, ResidualOutput)):
                # what `Module.compile` does, which takes no limit of versions in torch 2.11
                module._compiled_call_impl = compile_dynamic(module._call_impl, **options)

    def select_attention(self, device: torch.device, dtype: torch.dtype, training: bool = True) -> Selection:
        """The attention that both encoders run on such a device in such a type; see `select_attention` in the layers.

        Raises:
            InputError: the one asked for cannot run, or contradicts `impl="reference"`.
        """
        config = self.config
        requested = self._check_and_adjust_attn_implementation(config._attn_implementation)
        if config.impl == "reference":
            return Selection("eager", {})
        head_dim = config.hidden_size // config.num_attention_heads
        try:
            return select_attention(requested, device, dtype, config.num_attention_heads, head_dim, training)
        except ValueError as error:
            raise InputError(str(error)) from error


@dataclass
class DNAZenOutput(BaseModelOutputWithPooling):
    """Hugging Face's, the attention weights of the G-gram encoder, and which rows the last states are, if not all."""

    ngram_attentions: tuple[Tensor, ...] | None = None
    masked_positions: Tensor | None = None


class DNAZenModel(DNAZenPreTrainedModel):
    """Both encoders, without a head; with a pooler if asked for (classification has one, masked LM has none)."""

    unused_parts = (POOLER, MLM_HEAD, CLASSIFIER)

    def __init__(self, config: DNAZenConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config, config.vocab_size, config.neighbor_window)
        self.ngram_embeddings = Embeddings(config, config.ngram_vocab_size)
        self.encoder = FusedEncoder(config)
        self.pooler = _pooler(config) if add_pooling_layer else None
        self.post_init()

    @can_return_tuple
    @takes_model_inputs
    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        masked_positions: Tensor | None = None,
        **inputs: Unpack[ModelInputs],
    ) -> DNAZenOutput:
        """Run both encoders on packed or padded input (see the module's docstring).

        With `labels` (see `DNAZenForMaskedLM`) the last states are those of the masked positions alone, and as little
        of the last layer as they need is computed.

        Returns:
            `last_hidden_state` and each of `hidden_states`: `[T, H]`, or `[B, S, H]` for padded input; with `labels`,
            `masked_positions` and `last_hidden_state [number of them, H]`;
            `pooler_output [B, H]` if there is a pooler; `attentions` (the token encoder's, eager attention only):
            `[B, heads, max_seqlen, max_seqlen]` per layer, each sequence from its first token on; `ngram_attentions`,
            likewise `[B, heads, max_ngrams, max_ngrams]` per layer of the G-gram encoder.

        Raises:
            ValueError: the input contradicts itself (`prepare_batch`), or attention weights are asked for of an
                implementation that has none.
        """
        output_attentions = inputs.pop("output_attentions", None)
        output_hidden_states = inputs.pop("output_hidden_states", None)
        batch, layout = prepare_batch(input_ids=input_ids, **inputs)
        implementation = self._attention_of_this_pass(batch.input_ids.device)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions and implementation != "eager":
            raise ValueError(
                f"output_attentions: expected attn_implementation='eager', which alone returns weights, "
                f"found {implementation!r}"
            )
        if labels is None:
            masked_positions = None
        else:
            check_shape("labels", labels, tuple(input_ids.shape))
            if masked_positions is None:
                masked_positions = (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        reads_all = layout is not None or output_hidden_states or self.pooler is not None
        last_rows = masked_positions if self.config.skips_unmasked_rows and not reads_all else None
        if self.config.impl == "reference":
            found = self._encode_padded(batch, bool(output_hidden_states))
        else:
            found = self._encode_packed(batch, implementation, bool(output_hidden_states), last_rows)
        all_hidden_states, attentions, ngram_attentions = found
        pooler_output = None
        if self.pooler is not None:
            pooler_output = self.pooler(all_hidden_states[-1].index_select(0, batch.cu_seqlens[:-1]))
        if layout is not None:
            all_hidden_states = [layout.pad(states) for states in all_hidden_states]
        last_hidden_state = all_hidden_states[-1]
        if masked_positions is not None and last_rows is None:
            last_hidden_state = last_hidden_state.flatten(0, -2).index_select(0, masked_positions)
        return DNAZenOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=pooler_output,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            ngram_attentions=tuple(ngram_attentions) if output_attentions else None,
            masked_positions=masked_positions,
        )

    def _attention_of_this_pass(self, device: torch.device) -> str:
        is_autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_autocast else self.embeddings.LayerNorm.weight.dtype
        return self.select_attention(device, dtype, torch.is_grad_enabled()).name

    def _encode_packed(
        self, batch: PackedBatch, attention: str, keep_all: bool, last_rows: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        slopes = alibi_slopes(self.config.num_attention_heads, batch.input_ids.device)
        return self.encoder(
            self.embeddings(batch.input_ids, batch.cu_seqlens),
            self.ngram_embeddings(batch.ngram_input_ids, batch.ngram_cu_seqlens),
            packed_attention(attention, batch.cu_seqlens, batch.max_seqlen, len(batch.input_ids), slopes),
            packed_attention(attention, batch.ngram_cu_seqlens, batch.max_ngrams, len(batch.ngram_input_ids)),
            packed_add_norm(batch.edges, self.config.impl),
            keep_all,
            last_rows,
        )

    def _encode_padded(self, batch: PackedBatch, keep_all: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The reference: padded states, dense bias, explicit attention, einsum over a dense matching matrix."""
        tokens = PaddedLayout.from_cu_seqlens(batch.cu_seqlens, batch.max_seqlen, len(batch.input_ids))
        ngrams = PaddedLayout.from_cu_seqlens(batch.ngram_cu_seqlens, batch.max_ngrams, len(batch.ngram_input_ids))
        slopes = alibi_slopes(self.config.num_attention_heads, batch.input_ids.device)
        all_hidden_states, attentions, ngram_attentions = self.encoder(
            tokens.pad(self.embeddings(batch.input_ids, batch.cu_seqlens)),
            ngrams.pad(self.ngram_embeddings(batch.ngram_input_ids, batch.ngram_cu_seqlens)),
            padded_attention(batch.cu_seqlens, batch.max_seqlen, slopes),
            padded_attention(batch.ngram_cu_seqlens, batch.max_ngrams),
            padded_add_norm(dense_matching_matrix(batch.edges, tokens, ngrams)),
            keep_all,
        )
        return [tokens.unpad(states) for states in all_hidden_states], attentions, ngram_attentions


class DNAZenWithHead(DNAZenPreTrainedModel):
    """What the models with a head share: the encoders, then `head`."""

    bert: DNAZenModel
    output_class: type[ModelOutput]
    reads_masked_positions_alone = False  # with labels

    def head(
        self, outputs: DNAZenOutput, labels: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor | None, Tensor]:
        """The loss, or None without labels, and the logits."""
        raise NotImplementedError

    def add_classifier(self, config: DNAZenConfig) -> None:
        """Drop-out, and a linear layer to `num_labels`."""
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]

    @can_return_tuple
    @takes_model_inputs
    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        masked_positions: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Unpack[ModelInputs],
    ) -> ModelOutput:
        """Run encoders and head on packed or padded input (see the module's docstring and the class's)."""
        masked = {"labels": labels, "masked_positions": masked_positions} if self.reads_masked_positions_alone else {}
        outputs = self.bert(input_ids, **masked, **inputs, return_dict=True)
        loss, logits = self.head(outputs, labels, num_items_in_batch)
        return self.output_class(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class DNAZenForMaskedLM(DNAZenWithHead):
    """DNAZEN with the masked-language-model head, whose decoder is tied to the word embeddings.

    Without `labels`, `logits` is `[T, V]`, or `[B, S, V]` for padded input, without meaning at padding. With `labels`
    (shaped as `input_ids`; the original id at masked positions, -100 elsewhere) the head runs at the masked positions
    alone, and so does the last layer after its attention, unless more of its states are asked for: `logits` is
    `[number of masked positions, V]`, and `loss` the summed cross-entropy, in fp32, over `num_items_in_batch` (default:
    the masked positions at hand); it is 0 if nothing is masked. `masked_positions`, the indices of those positions in
    the flattened labels, ascending, spares a GPU the wait to find them.
    """

    unused_parts = (POOLER,)
    _tied_weights_keys = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
    accepts_loss_kwargs = True  # tells Trainer that num_items_in_batch is heeded
    output_class = MaskedLMOutput
    reads_masked_positions_alone = True

    def __init__(self, config: DNAZenConfig) -> None:
        super().__init__(config)
        self.bert = DNAZenModel(config)
        self.cls = nn.ModuleDict({"predictions": _mlm_head(config)})
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.get_submodule("cls.predictions.decoder")  # type: ignore[return-value]

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.cls["predictions"].decoder = value

    def head(self, outputs, labels, num_items_in_batch) -> tuple[Tensor | None, Tensor]:
        logits = self.cls["predictions"](outputs.last_hidden_state)
        if labels is None:
            return None, logits
        targets = labels.flatten().index_select(0, outputs.masked_positions)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        count = len(targets) if num_items_in_batch is None else num_items_in_batch
        return loss / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)), logits


class DNAZenForSequenceClassification(DNAZenWithHead):
    """DNAZEN with a pooler on [CLS] and a linear layer to `num_labels` classes, labels or regression targets.

    `logits` is `[B, num_labels]`; `loss`, if `labels` are given, is what `problem_type` means in Hugging Face's models.
    """

    new_parts = (NGRAM_PART, CLASSIFIER + POOLER, CLASSIFIER)  # DNABERT-2 may come with a pooler
    unused_parts = (MLM_HEAD,)
    accepts_loss_kwargs = False  # tells Trainer that the loss is a mean over the sequences at hand
    output_class = SequenceClassifierOutput

    def __init__(self, config: DNAZenConfig) -> None:
        super().__init__(config)
        self.bert = DNAZenModel(config, add_pooling_layer=True)
        self.add_classifier(config)
        self.post_init()

    def head(self, outputs, labels, num_items_in_batch) -> tuple[Tensor | None, Tensor]:
        logits = self.classifier(self.dropout(outputs.pooler_output))
        if labels is None:
            return None, logits
        return self.loss_function(labels=labels, pooled_logits=logits.float(), config=self.config), logits


class DNAZenForTokenClassification(DNAZenWithHead):
    """DNAZEN with a linear layer to `num_labels` classes on the states of each token.

    `logits` is `[T, num_labels]`, or `[B, S, num_labels]` for padded input, without meaning at padding. With `labels`
    (shaped as `input_ids`, -100 where none counts) `loss` is the mean cross-entropy.
    """

    new_parts = (NGRAM_PART, CLASSIFIER)
    unused_parts = (MLM_HEAD, POOLER)
    accepts_loss_kwargs = False  # tells Trainer that the loss is a mean over the labels at hand
    output_class = TokenClassifierOutput

    def __init__(self, config: DNAZenConfig) -> None:
        super().__init__(config)
        self.bert = DNAZenModel(config)
        self.add_classifier(config)
        self.post_init()

    def head(self, outputs, labels, num_items_in_batch) -> tuple[Tensor | None, Tensor]:
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        if labels is None:
            return None, logits
        check_shape("labels", labels, tuple(logits.shape[:-1]))
        return self.loss_function(logits=logits, labels=labels, config=self.config), logits
