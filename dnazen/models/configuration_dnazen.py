"""Configuration of the DNAZEN models."""

import os
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from dnazen.files import InputError, read_json
from dnazen.sizes import SIZE_FIELDS, SIZES

# Keys that published configurations and `save_pretrained` write beside the fields.
_TOLERATED_KEYS = {
    "_name_or_path", "alibi_starting_size", "attn_implementation", "auto_map", "gradient_checkpointing", "hidden_act",
    "max_position_embeddings", "model_type", "name_or_path", "num_labels", "output_attentions",
    "position_embedding_type", "torch_dtype", "use_cache",
}  # fmt: skip


class DNAZenConfig(PreTrainedConfig):
    """Shape and constants of a DNAZEN model; the defaults are the base size.

    `hidden_size`, `num_attention_heads` and `intermediate_size` hold for both encoders. The token encoder has
    `num_hidden_layers` layers; the G-gram encoder has `num_hidden_ngram_layers`, whose outputs are added after the
    token encoder's first as many layers. `neighbor_window` is how many tokens on either side enter a token's embedding
    (0, as published: none). `max_ngram_count` is the cap of G-grams per sequence the model was trained with (None: no
    cap); `use_ngrams` is False if it was trained without any, and then whatever prepares its input leaves them out.
    `impl` is not saved: "auto" runs packed, with Triton kernels on a GPU; "triton" demands them (on a CPU they need
    TRITON_INTERPRET=1); "reference" runs padded, with a dense matching matrix and eager attention.

    Raises:
        InputError: a field is out of its range; the message names it, what was expected and what was found.
    """

    model_type = "dnazen"

    vocab_size: int = 4096
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_hidden_ngram_layers: int = 6
    neighbor_window: int = 0
    ngram_vocab_size: int = 162708
    max_ngram_count: int | None = None
    use_ngrams: bool = True
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout: float | None = None
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    unk_token_id: int | None = 0
    cls_token_id: int | None = 1
    sep_token_id: int | None = 2
    pad_token_id: int | None = 3
    mask_token_id: int | None = 4
    tie_word_embeddings: bool = True
    impl: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)  # "bert" in published configurations
        kwargs.pop("auto_map", None)  # code that published folders carry and nothing here runs
        super().__post_init__(**kwargs)
        self._validate()
        if kwargs.get("hidden_act", "gelu") != "gelu":
            raise InputError(f"configuration: hidden_act: expected 'gelu', found {kwargs['hidden_act']!r}")

    def _validate(self) -> None:
        def check(is_valid: bool, name: str, expected: str) -> None:
            if not is_valid:
                raise InputError(f"configuration: {name}: expected {expected}, found {getattr(self, name)!r}")

        def is_number(name: str, kinds: tuple[type, ...] = (int, float)) -> bool:
            return isinstance(getattr(self, name), kinds) and not isinstance(getattr(self, name), bool)

        for name in ("vocab_size", "ngram_vocab_size", "type_vocab_size", *SIZE_FIELDS):
            check(is_number(name, (int,)) and getattr(self, name) >= 1, name, "an integer of at least 1")
        is_window = is_number("neighbor_window", (int,)) and self.neighbor_window >= 0
        check(is_window, "neighbor_window", "an integer of at least 0")
        heads, layers, cap = self.num_attention_heads, self.num_hidden_layers, self.max_ngram_count
        check(self.hidden_size % heads == 0, "hidden_size", f"a multiple of num_attention_heads {heads}")
        check(self.num_hidden_ngram_layers <= layers, "num_hidden_ngram_layers", f"at most num_hidden_layers {layers}")
        is_cap = cap is None or (is_number("max_ngram_count", (int,)) and cap >= 1)
        check(is_cap, "max_ngram_count", "None or an integer of at least 1")
        check(self.attention_probs_dropout_prob == 0, "attention_probs_dropout_prob", "0 (no attention dropout)")
        for name in ("hidden_dropout_prob", "classifier_dropout"):
            is_absent = name == "classifier_dropout" and self.classifier_dropout is None
            check(is_absent or (is_number(name) and 0 <= getattr(self, name) < 1), name, "a number in [0, 1)")
        for name in ("layer_norm_eps", "initializer_range"):
            check(is_number(name) and getattr(self, name) > 0, name, "a number above 0")
        for name in ("unk_token_id", "cls_token_id", "sep_token_id", "pad_token_id", "mask_token_id"):
            is_id = is_number(name, (int,)) and 0 <= getattr(self, name) < self.vocab_size
            check(getattr(self, name) is None or is_id, name, f"None or an id below vocab_size {self.vocab_size}")
        for name in ("tie_word_embeddings", "use_ngrams"):
            check(isinstance(getattr(self, name), bool), name, "true or false")
        check(self.impl in ("auto", "triton", "reference"), "impl", "'auto', 'triton' or 'reference'")

    @property
    def skips_unmasked_rows(self) -> bool:
        """Whether, given labels, the last layer goes on after its attention with the masked rows alone.

        A layer that G-grams are added to does not: their edges are of all rows.
        """
        return self.impl != "reference" and self.num_hidden_ngram_layers < self.num_hidden_layers

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        super()._remove_keys_not_serialized(d)
        d.pop("impl", None)
        d.pop("_in_file", None)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> tuple[dict, dict]:
        """As in Hugging Face; published configurations, whose `model_type` is "bert", are taken for what they are.

        Raises:
            InputError: the configuration is another model's.
        """
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = values.get("model_type", cls.model_type)
        if found not in (cls.model_type, "bert"):
            raise InputError(
                f"{pretrained_model_name_or_path}: model_type: expected {cls.model_type!r}, or 'bert' as in published "
                f"configurations, found {found!r}"
            )
        return {**values, "model_type": cls.model_type}, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Hugging Face, but fields given by name take part in the checks."""
        given = {field.name: kwargs.pop(field.name) for field in fields(cls) if field.name in kwargs}
        result = super().from_dict({**config_dict, **given}, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        # what the file says of itself, for the check of the weights beside it
        config._in_file = {
            name: config_dict[name] for name in ("ngram_vocab_size", "architectures") if name in config_dict
        }
        return result

    @classmethod
    def from_size(cls, size_or_json_path: str | os.PathLike, **overrides: Any) -> "DNAZenConfig":
        """A configuration by size (a key of `SIZES`) or from a JSON file, with fields overridden.

        Raises:
            InputError: neither a size nor a readable JSON object; unknown keys (all are named); an invalid field.
        """
        source = os.fspath(size_or_json_path)
        expected = f"a model size ({', '.join(SIZES)}) or a model configuration"
        values = {**(SIZES[source] if source in SIZES else read_json(source, expected)), **overrides}
        unknown = sorted(values.keys() - {field.name for field in fields(cls)} - _TOLERATED_KEYS)
        if unknown:
            raise InputError(f"{source}: expected fields of {cls.__name__}, found unknown {', '.join(unknown)}")
        return cls(**values)
