"""Whole-G-gram masking in plain PyTorch, the definition; paper section 2.4."""

import torch
import torch.nn.functional as F

from dnazen_kernels.ngram_edges import NgramEdges


def mask_ngrams(
    drawn: torch.Tensor,
    ngram_input_ids: torch.Tensor,
    ngram_cu_seqlens: torch.Tensor,
    edges: NgramEdges,
    whole_ngram: bool,
) -> list[torch.Tensor]:
    """From drawn tokens `[T]` to masked tokens `[T]`, the survivors (the other inputs, compacted) and `counts [2]`."""
    capacities = len(ngram_input_ids), len(edges.token_ngrams)
    num_ngrams, num_edges = int(ngram_cu_seqlens[-1]), int(edges.token_offsets[-1])
    ngram_input_ids = ngram_input_ids[:num_ngrams]
    token_offsets, token_ngrams, ngram_offsets, ngram_tokens = edges.trimmed(num_ngrams, num_edges)

    masked, ngram_sizes = drawn.clone(), ngram_offsets.diff()
    if whole_ngram:
        hit = _any_in_row(drawn[ngram_tokens], ngram_offsets)
        masked[ngram_tokens[hit.repeat_interleave(ngram_sizes, output_size=num_edges)]] = True
    kept = ~_any_in_row(masked[ngram_tokens], ngram_offsets)

    new_number = _running_count(kept)  # [N + 1]
    token_edge_kept = kept[token_ngrams]
    ngram_edge_kept = kept.repeat_interleave(ngram_sizes, output_size=num_edges)
    new_offsets = _running_count(ngram_sizes[kept])
    num_kept, num_kept_edges = len(new_offsets) - 1, int(new_offsets[-1])
    more_ngrams, more_edges = capacities[0] - num_kept, capacities[1] - num_kept_edges
    int_type = token_ngrams.dtype
    return [
        masked,
        F.pad(ngram_input_ids[kept], (0, more_ngrams)),
        new_number[ngram_cu_seqlens].to(ngram_cu_seqlens.dtype),
        _running_count(token_edge_kept)[token_offsets].to(int_type),
        F.pad(new_number[token_ngrams[token_edge_kept]].to(int_type), (0, more_edges)),
        F.pad(new_offsets.to(int_type), (0, more_ngrams), value=num_kept_edges),
        F.pad(ngram_tokens[ngram_edge_kept], (0, more_edges)),
        torch.tensor([num_kept, num_kept_edges], dtype=torch.int32, device=drawn.device),
    ]


def _running_count(values: torch.Tensor) -> torch.Tensor:
    """Sums of the first 0, 1, ..., n values."""
    return F.pad(values.cumsum(0), (1, 0))


def _any_in_row(edge_values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Per CSR row, whether any of its edges is True."""
    return _running_count(edge_values)[offsets].diff() > 0
