"""The contract of whole-G-gram masking and its registration with PyTorch."""

from typing import NamedTuple

import torch

from dnazen_kernels._runtime import resolve_impl

IGNORE_INDEX = -100
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the masked tokens, in the paper; the rest stay as they are


class MaskedBatch(NamedTuple):
    """A masked batch, in tensors as large as the input's: T tokens, B sequences, N G-grams, E edges.

    The G-grams are those that survive, in their old order. Behind them come G-grams of id 0 that belong to no sequence
    and have no edges (their offsets are the number of edges), and behind the edges zeros.
    """

    input_ids: torch.Tensor  # [T]
    labels: torch.Tensor  # [T] original id where masked, -100 elsewhere
    ngram_input_ids: torch.Tensor  # [N]
    ngram_cu_seqlens: torch.Tensor  # [B + 1]
    token_offsets: torch.Tensor  # [T + 1]
    token_ngrams: torch.Tensor  # [E]
    ngram_offsets: torch.Tensor  # [N + 1]
    ngram_tokens: torch.Tensor  # [E]
    counts: torch.Tensor  # [2] int32: survivors, edges of theirs

    def trimmed(self) -> "MaskedBatch":
        """The same without what is behind the survivors. Reads `counts` on the host, so it waits for the device."""
        num_ngrams, num_edges = self.counts.tolist()
        return self._replace(
            ngram_input_ids=self.ngram_input_ids[:num_ngrams],
            token_ngrams=self.token_ngrams[:num_edges],
            ngram_offsets=self.ngram_offsets[: num_ngrams + 1],
            ngram_tokens=self.ngram_tokens[:num_edges],
        )


def ngram_masking(
    input_ids: torch.Tensor,
    maskable: torch.Tensor,
    random: torch.Tensor,
    ngram_input_ids: torch.Tensor,
    ngram_cu_seqlens: torch.Tensor,
    token_offsets: torch.Tensor,
    token_ngrams: torch.Tensor,
    ngram_offsets: torch.Tensor,
    ngram_tokens: torch.Tensor,
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
    unless `whole_ngram`), and around them 11 elementwise operations that a compiler can fuse. A trainer on a GPU
    hands over token ids and random numbers, matches with a fixed capacity, masks, and trims what is behind the survivors
    (`trimmed`) once their number is known on the host: the model takes no G-gram that is in no sequence.

    Args:
        input_ids: `[T]` integers.
        maskable: `[T]` bool, False at special tokens.
        random: `[T, 3]` float64, uniform in [0, 1).
        ngram_input_ids, ngram_cu_seqlens: `[N]` and `[B + 1]`, the batch's G-grams, sequence by sequence; what is
            behind `ngram_cu_seqlens[-1]` is padding.
        token_offsets, token_ngrams, ngram_offsets, ngram_tokens: both CSR views of the (token, G-gram) edges,
            `[T + 1]`, `[E]`, `[N + 1]`, `[E]`, int32 or int64; what is behind `token_offsets[-1]` is padding. Their
            values are not checked, for that would cost a device synchronisation.
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
    graph = ngram_input_ids, ngram_cu_seqlens, token_offsets, token_ngrams, ngram_offsets, ngram_tokens
    if not torch.compiler.is_compiling():
        _check(input_ids, maskable, random, *graph, maskable_ids, mlm_probability)
        if not 0 <= mask_share <= mask_share + random_share <= 1:
            raise ValueError(
                f"mask_share and random_share must be at least 0 and at most 1 in all, got {mask_share} and {random_share}"
            )
    drawn = maskable & (random[:, 0] < mlm_probability)
    impl = resolve_impl(impl, input_ids.device)
    masked, *survivors = torch.ops.dnazen.ngram_masking(drawn, *graph, whole_ngram, impl)
    replacement = maskable_ids[(random[:, 2] * maskable_ids.shape[0]).long()]
    replacement = torch.where(random[:, 1] < mask_share, mask_token_id, replacement)
    replaced = masked & (random[:, 1] < mask_share + random_share)
    masked_ids = torch.where(replaced, replacement, input_ids)
    return MaskedBatch(masked_ids, torch.where(masked, input_ids, IGNORE_INDEX), *survivors)


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
    graph = ngram_input_ids, ngram_cu_seqlens, token_offsets, token_ngrams, ngram_offsets, ngram_tokens
    with torch.cuda.device_of(drawn):
        return mask_ngrams(drawn, *graph, whole_ngram)


@_ngram_masking.register_fake
def _(drawn, *graph_whole_ngram_impl):
    *graph, _, _ = graph_whole_ngram_impl
    return [*map(torch.empty_like, (drawn, *graph)), drawn.new_empty(2, dtype=torch.int32)]


def _check(
    input_ids, maskable, random, ngram_input_ids, ngram_cu_seqlens, token_offsets, token_ngrams, ngram_offsets,
    ngram_tokens, maskable_ids, mlm_probability,
) -> None:  # fmt: skip
    num_tokens, num_ngrams, num_edges = input_ids.numel(), ngram_input_ids.numel(), token_ngrams.numel()
    indices = (torch.int32, torch.int64)
    for name, tensor, shape, dtypes in (
        ("input_ids", input_ids, (num_tokens,), indices),
        ("maskable", maskable, (num_tokens,), (torch.bool,)),
        ("random", random, (num_tokens, 3), (torch.float64,)),
        ("ngram_input_ids", ngram_input_ids, (num_ngrams,), indices),
        ("ngram_cu_seqlens", ngram_cu_seqlens, (max(1, ngram_cu_seqlens.numel()),), indices),
        ("token_offsets", token_offsets, (num_tokens + 1,), indices),
        ("token_ngrams", token_ngrams, (num_edges,), (token_offsets.dtype,)),
        ("ngram_offsets", ngram_offsets, (num_ngrams + 1,), (token_offsets.dtype,)),
        ("ngram_tokens", ngram_tokens, (num_edges,), (token_offsets.dtype,)),
        ("maskable_ids", maskable_ids, (max(1, maskable_ids.numel()),), (input_ids.dtype,)),
    ):
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != input_ids.device:
            raise ValueError(f"{name} must be on {input_ids.device} like input_ids, got {tensor.device}")
    if num_edges >= 2**31:
        raise ValueError(f"token_ngrams must hold fewer than 2^31 edges, got {num_edges}")
    if not 0 <= mlm_probability <= 1:
        raise ValueError(f"mlm_probability must lie in [0, 1], got {mlm_probability}")
