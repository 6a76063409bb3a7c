"""The contract of whole-G-gram masking and its registration with PyTorch."""

from typing import NamedTuple

import torch

from dnazen_kernels._runtime import INTEGERS, check_tensor, resolve_impl
from dnazen_kernels.ngram_edges import NgramEdges

IGNORE_INDEX = -100
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the masked tokens, in the paper; the rest stay as they are


class MaskedBatch(NamedTuple):
    """A masked batch, in tensors as large as the input's: T tokens, B sequences, N G-grams, E edges.

    The G-grams are those that survive, in their old order. Behind them is padding, as behind those of `NgramMatches`.
    """

    input_ids: torch.Tensor  # [T]
    labels: torch.Tensor  # [T] original id where masked, -100 elsewhere
    ngram_input_ids: torch.Tensor  # [N]
    ngram_cu_seqlens: torch.Tensor  # [B + 1]
    edges: NgramEdges
    counts: torch.Tensor  # [2] int32: survivors, edges of theirs

    def trimmed(self) -> "MaskedBatch":
        """The same without what is behind the survivors. Reads `counts` on the host, so it waits for the device."""
        num_ngrams, num_edges = self.counts.tolist()
        return self._replace(
            ngram_input_ids=self.ngram_input_ids[:num_ngrams], edges=self.edges.trimmed(num_ngrams, num_edges)
        )


def ngram_masking(
    input_ids: torch.Tensor,
    maskable: torch.Tensor,
    random: torch.Tensor,
    ngram_input_ids: torch.Tensor,
    ngram_cu_seqlens: torch.Tensor,
    edges: NgramEdges,
    *,
    mlm_probability: float,
    mask_token_id: int,
    maskable_ids: torch.Tensor,
    whole_ngram: bool = True,
    mask_share: float = MASK_SHARE,
    random_share: float = RANDOM_SHARE,
    impl: str = "auto",
) -> MaskedBatch:
    """Mask tokens and the G-grams they belong to; a pure function of its inputs; paper section 2.4.

    A token is drawn where it is maskable and `random[:, 0] < mlm_probability`. A G-gram that covers a drawn token is
    hit, and all tokens of all hit G-grams are masked: one hop. G-grams that cover *any* masked token are removed,
    hit or not, since their states would tell the masked token. Of the masked tokens, those with `random[:, 1]` below
    `mask_share` become [MASK], those below `mask_share + random_share` an entry of `maskable_ids` chosen by
    `random[:, 2]`, and the rest stay.

    All implementations return the same integers. The shapes follow from those of the inputs alone, so "triton" never
    waits for the device and a captured or compiled step can hold it. It launches 6 kernels and 2 scans (4, 2 and a copy
    unless `whole_ngram`), and around them 11 elementwise operations that a compiler can fuse. The model takes no
    G-gram that is in no sequence, so what is behind the survivors must be trimmed; `dnazen.batches.device` does that
    once their number has reached the host, a step later.

    Args:
        input_ids: `[T]` integers.
        maskable: `[T]` bool, False at special tokens.
        random: `[T, 3]` float64, uniform in [0, 1).
        ngram_input_ids, ngram_cu_seqlens: `[N]` and `[B + 1]`, the batch's G-grams, sequence by sequence; what is
            behind `ngram_cu_seqlens[-1]` is padding.
        edges: which G-grams cover which token.
        mlm_probability: chance of a maskable token to be drawn; more are masked, because G-grams are masked whole.
        maskable_ids: `[V']`, the ids a random replacement is taken from, of the type of `input_ids`.
        whole_ngram: False masks the drawn tokens alone (Table 3); G-grams are removed all the same.
        mask_share, random_share: of the masked tokens, how many become [MASK], and a random token.
        impl: "auto", "triton" or "reference".

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit together, tensors on several devices, 2^31 edges or more, a probability or
            share outside [0, 1], shares of more than 1 in all, an unknown `impl`.
        RuntimeError: `impl="triton"` cannot run here.
    """
    if not torch.compiler.is_compiling():
        _check(input_ids, maskable, random, ngram_input_ids, ngram_cu_seqlens, edges, maskable_ids, mlm_probability)
        if not 0 <= mask_share <= mask_share + random_share <= 1:
            raise ValueError(
                "mask_share and random_share must be at least 0 and at most 1 in all, "
                f"got {mask_share} and {random_share}"
            )
    drawn = maskable & (random[:, 0] < mlm_probability)
    impl = resolve_impl(impl, input_ids.device)
    masked, new_ids, new_cu_seqlens, *new_edges, counts = torch.ops.dnazen.ngram_masking(
        drawn, ngram_input_ids, ngram_cu_seqlens, *edges, whole_ngram, impl
    )
    replacement = maskable_ids[(random[:, 2] * maskable_ids.shape[0]).long()]
    replacement = torch.where(random[:, 1] < mask_share, mask_token_id, replacement)
    replaced = masked & (random[:, 1] < mask_share + random_share)
    masked_ids = torch.where(replaced, replacement, input_ids)
    labels = torch.where(masked, input_ids, IGNORE_INDEX)
    return MaskedBatch(masked_ids, labels, new_ids, new_cu_seqlens, NgramEdges(*new_edges), counts)


@torch.library.custom_op("dnazen::ngram_masking", mutates_args=())
def _ngram_masking(
    drawn: torch.Tensor,
    ngram_input_ids: torch.Tensor,
    ngram_cu_seqlens: torch.Tensor,
    token_offsets: torch.Tensor,
    token_ngrams: torch.Tensor,
    ngram_offsets: torch.Tensor,
    ngram_tokens: torch.Tensor,
    whole_ngram: bool,
    impl: str,
) -> list[torch.Tensor]:
    if impl == "triton":
        from dnazen_kernels.ngram_masking.triton_impl import mask_ngrams
    else:
        from dnazen_kernels.ngram_masking.reference import mask_ngrams
    edges = NgramEdges(token_offsets, token_ngrams, ngram_offsets, ngram_tokens)
    with torch.cuda.device_of(drawn):
        return mask_ngrams(drawn, ngram_input_ids, ngram_cu_seqlens, edges, whole_ngram)


@_ngram_masking.register_fake
def _(drawn, *ngrams_whole_ngram_impl):
    *ngrams, _, _ = ngrams_whole_ngram_impl
    return [*map(torch.empty_like, (drawn, *ngrams)), drawn.new_empty(2, dtype=torch.int32)]


def _check(
    input_ids: torch.Tensor,
    maskable: torch.Tensor,
    random: torch.Tensor,
    ngram_input_ids: torch.Tensor,
    ngram_cu_seqlens: torch.Tensor,
    edges: NgramEdges,
    maskable_ids: torch.Tensor,
    mlm_probability: float,
) -> None:
    num_tokens, num_ngrams, num_edges = input_ids.numel(), ngram_input_ids.numel(), edges.token_ngrams.numel()
    for name, tensor, shape, dtypes in (
        ("input_ids", input_ids, (num_tokens,), INTEGERS),
        ("maskable", maskable, (num_tokens,), (torch.bool,)),
        ("random", random, (num_tokens, 3), (torch.float64,)),
        ("ngram_input_ids", ngram_input_ids, (num_ngrams,), INTEGERS),
        ("ngram_cu_seqlens", ngram_cu_seqlens, (max(1, ngram_cu_seqlens.numel()),), INTEGERS),
        ("maskable_ids", maskable_ids, (max(1, maskable_ids.numel()),), (input_ids.dtype,)),
    ):
        check_tensor(name, tensor, shape, dtypes, input_ids.device)
    edges.check(num_tokens, num_ngrams, input_ids.device)
    if num_edges >= 2**31:
        raise ValueError(f"token_ngrams must hold fewer than 2^31 edges, got {num_edges}")
    if not 0 <= mlm_probability <= 1:
        raise ValueError(f"mlm_probability must lie in [0, 1], got {mlm_probability}")
