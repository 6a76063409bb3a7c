"""The matching of tokens and G-grams as every operator takes it: a sparse 0/1 matrix, in two views."""

from typing import NamedTuple

import torch
from torch import Tensor

from dnazen_kernels._runtime import INTEGERS, check_tensor


class NgramEdges(NamedTuple):
    """Which G-gram covers which token of a batch: paper, eq. (3), as edges (token, G-gram), sorted in both ways.

    Each view is in CSR form: the values of row i are `values[offsets[i]:offsets[i + 1]]`. With a view for either
    direction, forward and backward of the fusion both gather: no atomics, and the same bits on every run.

    Five tokens and two G-grams, of which the first, 0, covers tokens 1 and 2 and the other, 1, tokens 2 to 4:

        token            0   1   2   3   4
        G-gram 0             x   x
        G-gram 1                 x   x   x

        token_offsets = [0, 0, 1, 3, 4, 5]    token_ngrams = [0,  0, 1,  1,  1]      token 2 is under both
        ngram_offsets = [0, 2, 5]             ngram_tokens = [1, 2,  2, 3, 4]

    Both views describe the same E edges; no operator checks that, for it would cost a device synchronisation. What is
    behind the last offset is padding, which operators ignore: where an operator has a `capacity`, its tensors are as
    long as that, whatever is in them. G-grams of the padding have no edges.
    """

    token_offsets: Tensor  # [T + 1] int32 or int64, as all four
    token_ngrams: Tensor  # [E] the G-grams over each token, ascending
    ngram_offsets: Tensor  # [N + 1]
    ngram_tokens: Tensor  # [E] the tokens under each G-gram, ascending

    @classmethod
    def empty(cls, num_tokens: int, device: torch.device | str) -> "NgramEdges":
        """No G-gram, and so no edge."""

        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        return cls(zeros(num_tokens + 1), zeros(0), zeros(1), zeros(0))

    def swapped(self) -> "NgramEdges":
        """Tokens and G-grams in each other's place: what sums over G-grams forward sums over tokens in the backward."""
        return NgramEdges(self.ngram_offsets, self.ngram_tokens, self.token_offsets, self.token_ngrams)

    def trimmed(self, num_ngrams: int, num_edges: int) -> "NgramEdges":
        """Without what is behind the first so many G-grams and their edges."""
        return self._replace(
            token_ngrams=self.token_ngrams[:num_edges],
            ngram_offsets=self.ngram_offsets[: num_ngrams + 1],
            ngram_tokens=self.ngram_tokens[:num_edges],
        )

    def to(self, device: torch.device | str) -> "NgramEdges":
        """The same on another device."""
        return NgramEdges(*(tensor.to(device) for tensor in self))

    def check(self, num_tokens: int, num_ngrams: int, device: torch.device) -> None:
        """Check dtypes, shapes and devices, which cost no synchronisation.

        Raises:
            TypeError: a tensor is not int32 or int64, or not like the others.
            ValueError: a wrong shape, or another device than the batch's.
        """
        sizes = num_tokens + 1, self.token_ngrams.numel(), num_ngrams + 1, self.token_ngrams.numel()
        for name, tensor, size in zip(self._fields, self, sizes, strict=True):
            dtypes = INTEGERS if tensor is self.token_offsets else (self.token_offsets.dtype,)
            check_tensor(name, tensor, (size,), dtypes, device)
