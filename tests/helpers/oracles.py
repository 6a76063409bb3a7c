"""Matching and masking as one would first write them in Python: dictionaries, sets and loops, from the definitions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dnazen_kernels.ngram_masking import MaskedBatch
from dnazen_kernels.ngram_matching import NgramMatches

Fields = dict[str, list[int]]


def as_lists(fields: NgramMatches | MaskedBatch | Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a result, or the arguments of `ngram_masking`, as lists, those of the edges among them."""
    flat = dict(fields if isinstance(fields, Mapping) else fields._asdict())
    flat |= flat.pop("edges")._asdict()
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in flat.items()}


def match_slowly(
    sequences: Sequence[Sequence[int]],
    vocabulary: dict[tuple[int, ...], int],
    max_ngrams: int | None = None,
    capacity: tuple[int, int] | None = None,
) -> Fields:
    """The fields of `NgramMatches` as `as_lists` gives them."""
    ngram_ids, covers, cu_seqlens, num_found, start = [], [], [0], 0, 0
    for sequence in sequences:
        positions: dict[int, set[int]] = {}  # insertion order is the order of first position, then length
        for i in range(len(sequence)):
            for length in range(2, 6):
                ngram = tuple(sequence[i : i + length])
                if len(ngram) == length and ngram in vocabulary:
                    positions.setdefault(vocabulary[ngram], set()).update(range(start + i, start + i + length))
        num_found += len(positions)
        for ngram_id in list(positions)[:max_ngrams]:
            ngram_ids.append(ngram_id)
            covers.append(sorted(positions[ngram_id]))
        cu_seqlens.append(len(covers))
        start += len(sequence)

    num_wanted = len(covers)
    if capacity is not None:
        while len(covers) > capacity[0] or sum(map(len, covers)) > capacity[1]:
            covers.pop()
    counts = [len(covers), sum(map(len, covers)), num_found - num_wanted, num_wanted - len(covers)]
    cu_seqlens = [min(bound, len(covers)) for bound in cu_seqlens]
    fields = _matching(ngram_ids[: len(covers)], cu_seqlens, covers, start)
    return _pad({**fields, "counts": counts}, capacity)


def mask_slowly(inputs: dict[str, Any], whole_ngram: bool, capacity: tuple[int, int] | None = None) -> Fields:
    """The same of `MaskedBatch`; `inputs` are the other arguments of `ngram_masking`, as lists."""
    ids, random = list(inputs["input_ids"]), inputs["random"]
    num_ngrams = inputs["ngram_cu_seqlens"][-1]
    offsets, tokens = inputs["ngram_offsets"], inputs["ngram_tokens"]
    covers = [tokens[offsets[j] : offsets[j + 1]] for j in range(num_ngrams)]
    drawn = {t for t in range(len(ids)) if inputs["maskable"][t] and random[t][0] < inputs["mlm_probability"]}
    masked = set(drawn)
    if whole_ngram:
        for cover in covers:
            if drawn.intersection(cover):
                masked.update(cover)
    labels = [ids[t] if t in masked else -100 for t in range(len(ids))]
    for t in masked:
        if random[t][1] < 0.8:
            ids[t] = inputs["mask_token_id"]
        elif random[t][1] < 0.9:
            ids[t] = inputs["maskable_ids"][math.floor(random[t][2] * len(inputs["maskable_ids"]))]

    survivors = [j for j in range(num_ngrams) if not masked.intersection(covers[j])]
    alive = set(survivors)
    number = [0]  # survivors before G-gram j
    for j in range(num_ngrams):
        number.append(number[-1] + (j in alive))
    fields = _matching(
        [inputs["ngram_input_ids"][j] for j in survivors],
        [number[bound] for bound in inputs["ngram_cu_seqlens"]],
        [covers[j] for j in survivors],
        len(ids),
    )
    counts = [len(survivors), len(fields["ngram_tokens"])]
    return _pad({"input_ids": ids, "labels": labels, **fields, "counts": counts}, capacity)


def _matching(ngram_ids: list[int], cu_seqlens: list[int], covers: list[list[int]], num_tokens: int) -> Fields:
    """G-grams and both views of their edges from the tokens that each G-gram covers."""
    by_token: list[list[int]] = [[] for _ in range(num_tokens)]
    for j, cover in enumerate(covers):
        for t in cover:
            by_token[t].append(j)
    token_offsets, token_ngrams = _csr(by_token)
    ngram_offsets, ngram_tokens = _csr(covers)
    return {
        "ngram_input_ids": ngram_ids,
        "ngram_cu_seqlens": cu_seqlens,
        "token_offsets": token_offsets,
        "token_ngrams": token_ngrams,
        "ngram_offsets": ngram_offsets,
        "ngram_tokens": ngram_tokens,
    }


def _csr(rows: list[list[int]]) -> tuple[list[int], list[int]]:
    offsets, values = [0], []
    for row in rows:
        values += row
        offsets.append(len(values))
    return offsets, values


def _pad(fields: Fields, capacity: tuple[int, int] | None) -> Fields:
    """The defined tail up to a capacity of (G-grams, edges)."""
    if capacity is None:
        return fields
    num_ngrams, num_edges = capacity
    more_ngrams = num_ngrams - len(fields["ngram_input_ids"])
    more_edges = [0] * (num_edges - len(fields["ngram_tokens"]))
    offsets = fields["ngram_offsets"]
    return {
        **fields,
        "ngram_input_ids": fields["ngram_input_ids"] + [0] * more_ngrams,
        "ngram_offsets": offsets + offsets[-1:] * more_ngrams,
        "token_ngrams": fields["token_ngrams"] + more_edges,
        "ngram_tokens": fields["ngram_tokens"] + more_edges,
    }
