"""The door of the models: what their `forward` takes, checked and, where it is padded, packed."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from dnazen.layers.padding import PackedBatch, PaddedLayout, batch_without_ngrams, pack_batch
from dnazen_kernels.ngram_edges import NgramEdges


class ModelInputs(TypedDict, total=False):
    """What a model takes beside `input_ids`, in either form; B sequences, T tokens, N G-grams, E edges.

    Packed, `input_ids` is `[T]` and the first two are needed; with G-grams the seven that follow, too. Padded,
    `input_ids` is `[B, S]` and none is needed; with at most G G-grams of a sequence the three of them, and
    `ngram_input_ids`.
    """

    cu_seqlens: Tensor | None  # [B + 1] int32
    max_seqlen: int | None

    ngram_input_ids: Tensor | None  # [N], or padded [B, G]
    ngram_cu_seqlens: Tensor | None  # [B + 1] int32
    max_ngrams: int | None
    token_offsets: Tensor | None  # these four: `NgramEdges`
    token_ngrams: Tensor | None
    ngram_offsets: Tensor | None
    ngram_tokens: Tensor | None

    attention_mask: Tensor | None  # [B, S], 1 at tokens, 0 at padding; default: all ones
    ngram_attention_mask: Tensor | None  # [B, G], likewise
    ngram_position_matrix: Tensor | None  # [B, S, G], 1 where a G-gram covers a token

    output_attentions: bool | None  # default: the configuration's
    output_hidden_states: bool | None


# The arguments of each form of input, without and with G-grams.
_PACKED = {"input_ids", "cu_seqlens", "max_seqlen"}
_PADDED = {"input_ids", "attention_mask"}
_PACKED_NGRAMS = {"ngram_input_ids", "ngram_cu_seqlens", "max_ngrams", *NgramEdges._fields}
_PADDED_NGRAMS = {"ngram_input_ids", "ngram_attention_mask", "ngram_position_matrix"}


def takes_model_inputs(forward: Callable) -> Callable:
    """Let the signature of a `forward(..., **inputs: Unpack[ModelInputs])` say all names, and refuse any other.

    Trainer reads there which columns of a data set the model takes, and drops the rest.
    """
    signature = inspect.signature(forward)
    *named, _ = signature.parameters.values()
    keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in ModelInputs.__annotations__.items()
    ]
    _, *names = (parameter.name for parameter in (*named, *keywords))

    @functools.wraps(forward)
    def checked(self: nn.Module, *args: Any, **inputs: Any) -> Any:
        if unknown := sorted(inputs.keys() - set(names)):
            raise TypeError(
                f"{type(self).__name__}: expected arguments of {', '.join(names)}, found {', '.join(unknown)}"
            )
        return forward(self, *args, **inputs)

    checked.__signature__ = signature.replace(parameters=[*named, *keywords])  # type: ignore[attr-defined]
    return checked


def check_shape(name: str, value: Tensor, shape: tuple[int | None, ...]) -> None:
    if value.dim() != len(shape) or any(size not in (None, found) for size, found in zip(shape, value.shape)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{expected}], found {list(value.shape)}")


def prepare_batch(**inputs: Any) -> tuple[PackedBatch, PaddedLayout | None]:
    """The door: check a model's input of either form, and pack it if it is padded (else the layout is None).

    Raises:
        ValueError: missing or contradictory arguments, or a wrong shape; the message names the argument.
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}
    is_packed = "cu_seqlens" in inputs
    if not is_packed:
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    expected, ngrams = (_PACKED, _PACKED_NGRAMS) if is_packed else (_PADDED, _PADDED_NGRAMS)
    has_ngrams = not inputs.keys().isdisjoint(ngrams)
    expected = expected | ngrams if has_ngrams else expected
    form = ("packed" if is_packed else "padded (no cu_seqlens)") + (" batch with G-grams" if has_ngrams else " batch")
    if missing := sorted(expected - inputs.keys()):
        raise ValueError(f"{', '.join(missing)}: expected in a {form}, found None")
    if surplus := sorted(inputs.keys() - expected):
        raise ValueError(f"{', '.join(surplus)}: expected None in a {form}, found a value")

    shapes: dict[str, tuple[int | None, ...]]  # those of the CSR views are the fusion's to check
    if is_packed:
        shapes = {"input_ids": (None,), "cu_seqlens": (None,), "ngram_input_ids": (None,)}
        shapes["ngram_cu_seqlens"] = tuple(inputs["cu_seqlens"].shape)
    else:
        tokens, num_ngrams = tuple(inputs["input_ids"].shape), inputs["ngram_input_ids"].shape[-1] if has_ngrams else 0
        shapes = {"input_ids": (None, None), "attention_mask": tokens, "ngram_input_ids": (tokens[0], None)}
        shapes["ngram_attention_mask"], shapes["ngram_position_matrix"] = (tokens[0], num_ngrams), (*tokens, num_ngrams)
    for name, shape in shapes.items():
        if name in inputs:
            check_shape(name, inputs[name], shape)
    if is_packed:
        if not has_ngrams:
            return batch_without_ngrams(**inputs), None
        edges = NgramEdges(*map(inputs.pop, NgramEdges._fields))
        return PackedBatch(**inputs, edges=edges), None
    if not inputs["attention_mask"].any(dim=1).all():
        raise ValueError("attention_mask: expected a token in every sequence, found a sequence of padding only")
    return pack_batch(**inputs)
