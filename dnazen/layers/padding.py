"""Between the padded and the packed form of a batch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dnazen_kernels.ngram_edges import NgramEdges


class PackedBatch(NamedTuple):
    """A batch of B sequences, T tokens and N G-grams, one sequence after the other; ids are int64, the rest int32.

    Two sequences, of 3 and 5 tokens, with 1 and 2 G-grams: T = 8, N = 3.

        input_ids   [CLS] a [SEP] | [CLS] b c d [SEP]      cu_seqlens = [0, 3, 8]          max_seqlen = 5
        G-grams     aa            | bc cd                  ngram_cu_seqlens = [0, 1, 3]    max_ngrams = 2

    Sequence i has the rows from `cu_seqlens[i]` to `cu_seqlens[i + 1]`. `edges` counts tokens and G-grams over the
    whole batch: G-gram 2, cd, covers tokens 5 and 6.
    """

    input_ids: Tensor  # [T]
    cu_seqlens: Tensor  # [B + 1]
    max_seqlen: int
    ngram_input_ids: Tensor  # [N]
    ngram_cu_seqlens: Tensor  # [B + 1]
    max_ngrams: int
    edges: NgramEdges


class PaddedLayout(NamedTuple):
    """Where packed rows lie in a padded form of `batch_size` by `width` rows.

    Sequences of 2 and 3 rows, padded to a width of 4:

        packed    a b | c d e           positions = [0, 1, 4, 5, 6]
        padded    a b . .
                  c d e .
    """

    positions: Tensor  # [T] int64, into the flattened [batch_size * width]
    batch_size: int
    width: int

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, width: int, total: int) -> "PaddedLayout":
        """Each of the sequences, `total` rows in all, at the start of its line."""
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
        sequence = torch.arange(len(starts), device=starts.device).repeat_interleave(lengths, output_size=total)
        positions = sequence * width + torch.arange(total, device=starts.device) - starts[sequence]
        return cls(positions, len(starts), width)

    def pad(self, packed: Tensor, value: float = 0) -> Tensor:
        """`[T, ...]` to `[batch_size, width, ...]`; `value` fills the rest."""
        padded = packed.new_full((self.batch_size * self.width, *packed.shape[1:]), value)
        return padded.index_copy(0, self.positions, packed).unflatten(0, (self.batch_size, self.width))

    def unpad(self, padded: Tensor) -> Tensor:
        """`[batch_size, width, ...]` to `[T, ...]`."""
        return padded.flatten(0, 1).index_select(0, self.positions)


def offsets_from_lengths(lengths: Tensor) -> Tensor:
    """`[n]` lengths to `[n + 1]` int32 offsets, the first of them 0."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def batch_without_ngrams(input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> PackedBatch:
    """The packed batch of these tokens in which no sequence has a G-gram."""
    edges = NgramEdges.empty(len(input_ids), input_ids.device)
    return PackedBatch(
        input_ids, cu_seqlens, max_seqlen, input_ids.new_zeros(0), torch.zeros_like(cu_seqlens), 0, edges
    )


def pack_batch(
    input_ids: Tensor,
    attention_mask: Tensor,
    ngram_input_ids: Tensor | None = None,
    ngram_attention_mask: Tensor | None = None,
    ngram_position_matrix: Tensor | None = None,
) -> tuple[PackedBatch, PaddedLayout]:
    """Pack a padded batch; the padding may be anywhere.

    Args:
        input_ids, attention_mask: `[B, S]`; the mask is 1 at tokens, 0 at padding.
        ngram_input_ids, ngram_attention_mask: `[B, G]`; with the matrix, all three or none.
        ngram_position_matrix: `[B, S, G]`, 1 where a G-gram covers a token, else 0; entries at padding are ignored.
    """
    token_mask = attention_mask.bool()
    layout = PaddedLayout(token_mask.flatten().nonzero().squeeze(1), *input_ids.shape)
    lengths = token_mask.sum(1)
    batch = batch_without_ngrams(layout.unpad(input_ids), offsets_from_lengths(lengths), int(lengths.max()))
    if ngram_input_ids is None or ngram_attention_mask is None or ngram_position_matrix is None:
        return batch, layout
    if not ngram_attention_mask.any():
        return batch, layout

    ngram_mask = ngram_attention_mask.bool()
    ngram_lengths = ngram_mask.sum(1)
    is_edge = ngram_position_matrix.bool() & token_mask[:, :, None] & ngram_mask[:, None, :]
    sequence, token, ngram = is_edge.nonzero(as_tuple=True)  # ascending by token, then G-gram
    token = (token_mask.flatten().cumsum(0) - 1).view_as(token_mask)[sequence, token]
    ngram = (ngram_mask.flatten().cumsum(0) - 1).view_as(ngram_mask)[sequence, ngram]
    edges = NgramEdges(
        token_offsets=offsets_from_lengths(token.bincount(minlength=len(batch.input_ids))),
        token_ngrams=ngram.to(torch.int32),
        ngram_offsets=offsets_from_lengths(ngram.bincount(minlength=int(ngram_lengths.sum()))),
        ngram_tokens=token[ngram.argsort(stable=True)].to(torch.int32),
    )
    batch = batch._replace(
        ngram_input_ids=ngram_input_ids[ngram_mask],
        ngram_cu_seqlens=offsets_from_lengths(ngram_lengths),
        max_ngrams=int(ngram_lengths.max()),
        edges=edges,
    )
    return batch, layout


def dense_matching_matrix(edges: NgramEdges, tokens: PaddedLayout, ngrams: PaddedLayout) -> Tensor:
    """The matching matrix M of eq. (3), `[B, S, G]` fp32 of 0 and 1, from the CSR view by token."""
    matrix = torch.zeros(tokens.batch_size * tokens.width, ngrams.width, device=tokens.positions.device)
    if len(edges.token_ngrams):
        line = tokens.positions.repeat_interleave(edges.token_offsets.diff(), output_size=len(edges.token_ngrams))
        matrix[line, ngrams.positions[edges.token_ngrams.long()] % ngrams.width] = 1
    return matrix.unflatten(0, (tokens.batch_size, tokens.width))
