"""VQDNA's first stage: bases to codes and back, by convolutions on packed sequences.

Every module takes `[T, ...]`, the sequences one after the other; nothing passes from one to the next. Sizes and losses
follow secondary notes of VQDNA (arXiv 2405.10812), whose text is not to be had; what they leave open is said where it
is decided.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnazen.layers.codebook import Codebook
from dnazen.layers.neighbors import Neighbors

NUM_BASES = 4
_STEM_SIZE, _STEM_WIDTH, _BLOCK_WIDTH, _EXPANSION = 256, 5, 7, 4


class Convolution(nn.Module):
    """Of `width` neighboring rows, all channels to all, with zeros beyond a sequence's ends."""

    def __init__(self, in_features: int, out_features: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width * in_features, out_features)
        self.distances = range(-(width // 2), width // 2 + 1)

    def forward(self, states: Tensor, neighbors: Neighbors) -> Tensor:
        return self.linear(torch.cat([neighbors.at(states, distance) for distance in self.distances], dim=1))


class ConvNeXtBlock(nn.Module):
    """Depth-wise convolution, LayerNorm, two linear layers with GELU, and the residual (Liu et al. 2022)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(_BLOCK_WIDTH, size) * _BLOCK_WIDTH**-0.5)
        self.bias = nn.Parameter(torch.zeros(size))
        self.norm = nn.LayerNorm(size)
        self.expand = nn.Linear(size, _EXPANSION * size)
        self.contract = nn.Linear(_EXPANSION * size, size)

    def forward(self, states: Tensor, neighbors: Neighbors) -> Tensor:
        mixed = self.bias
        for index, weight in enumerate(self.weight):
            mixed = mixed + neighbors.at(states, index - _BLOCK_WIDTH // 2) * weight
        return states + self.contract(F.gelu(self.expand(self.norm(mixed))))


class Encoded(NamedTuple):
    """What the codes of T bases are, and what the codebooks of L levels need to be trained."""

    output: Tensor  # [T, D], the mean of all levels' codes; its gradient passes straight through
    indices: list[Tensor]  # of each level, [T] int64
    states: list[Tensor]  # of each level, what was looked up, [T, D]
    commitment: Tensor  # the mean over levels


class VocabularyAutoencoder(nn.Module):
    """A vocabulary of bases in their context: an encoder, a codebook a level, and a decoder back to bases.

    One level is VQ: the encoder's last states are looked up. L levels are HRQ: level l looks up l * Z_l less the codes
    of the levels before it, where Z_l are the states after l / L of the encoder's blocks, and the output is the mean of
    all codes. (That a level's states pass no gradient to the codes before them is ours.)

    Args:
        size: D, of states and codes.
        num_blocks: of the encoder, and of the decoder; a multiple of L.
        num_codes: of each level.
        seed: of the codebooks.

    Raises:
        ValueError: `num_blocks` is no multiple of the number of levels.
    """

    def __init__(self, size: int = 384, num_blocks: int = 6, num_codes: Sequence[int] = (512,), seed: int = 0) -> None:
        super().__init__()
        if not num_codes or num_blocks % len(num_codes):
            raise ValueError(
                f"num_blocks must be a multiple of the number of levels, got {num_blocks} for {len(num_codes)}"
            )
        self.stem = Convolution(NUM_BASES, _STEM_SIZE, _STEM_WIDTH)
        self.stem_norm = nn.LayerNorm(_STEM_SIZE)
        self.project = nn.Linear(_STEM_SIZE, size)
        self.encoder = nn.ModuleList(ConvNeXtBlock(size) for _ in range(num_blocks))
        codebooks = (Codebook(count, size, seed=seed + level) for level, count in enumerate(num_codes))
        self.codebooks = cast(Sequence[Codebook], nn.ModuleList(codebooks))
        self.decoder = nn.ModuleList(ConvNeXtBlock(size) for _ in range(num_blocks))
        self.head_project = nn.Linear(size, _STEM_SIZE)
        self.head_norm = nn.LayerNorm(_STEM_SIZE)
        self.head = Convolution(_STEM_SIZE, NUM_BASES, _STEM_WIDTH)

    @property
    def receptive_field(self) -> int:
        """How many bases a code depends on: itself and as many on either side."""
        return 1 + (_STEM_WIDTH - 1) + len(self.encoder) * (_BLOCK_WIDTH - 1)

    def encode(self, inputs: Tensor, neighbors: Neighbors) -> Encoded:
        """Codes of `inputs [T, 4]`: a base is one-hot; a row of zeros is none."""
        states = self.project(F.gelu(self.stem_norm(self.stem(inputs, neighbors))))
        blocks_of_level = len(self.encoder) // len(self.codebooks)
        outputs, indices, looked_up, losses = [], [], [], []
        before: Tensor | float = 0.0
        for number, block in enumerate(self.encoder, start=1):
            states = block(states, neighbors)
            level, rest = divmod(number, blocks_of_level)
            if rest == 0:
                residual = level * states - before
                output, index, loss = self.codebooks[level - 1](residual)
                before = before + output.detach()
                outputs.append(output)
                indices.append(index)
                looked_up.append(residual.detach())
                losses.append(loss)
        return Encoded(torch.stack(outputs).mean(0), indices, looked_up, torch.stack(losses).mean())

    def decode(self, codes: Tensor, neighbors: Neighbors) -> Tensor:
        """Logits of the bases, `[T, 4]`, of `codes [T, D]`."""
        for block in self.decoder:
            codes = block(codes, neighbors)
        return self.head(F.gelu(self.head_norm(self.head_project(codes))), neighbors)

    def forward(self, inputs: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Encoded]:
        """Logits of the bases of `inputs [T, 4]`, whose sequences `cu_seqlens [B + 1]` delimits, and their codes."""
        neighbors = Neighbors(cu_seqlens, len(inputs), _BLOCK_WIDTH // 2)
        encoded = self.encode(inputs, neighbors)
        return self.decode(encoded.output, neighbors), encoded

    @torch.no_grad()
    def start(self, inputs: Tensor, cu_seqlens: Tensor) -> None:
        """Place the codes of every level by k-means on a first batch, the lowest level's first."""
        neighbors = Neighbors(cu_seqlens, len(inputs), _BLOCK_WIDTH // 2)
        for level, codebook in enumerate(self.codebooks):
            codebook.start(self.encode(inputs, neighbors).states[level])

    def update(self, encoded: Encoded) -> None:
        """Move the codes toward what was looked up in a step; once, and after the step's last use of the old ones."""
        for codebook, states, indices in zip(self.codebooks, encoded.states, encoded.indices):
            codebook.update(states, indices)


def vocabulary_loss(logits: Tensor, bases: Tensor, encoded: Encoded, commitment: float = 0.5) -> Tensor:
    """Cross-entropy of the `bases [T]` (0 to 3) that `logits [T, 4]` say, and so much of the commitment loss."""
    return F.cross_entropy(logits.float(), bases) + commitment * encoded.commitment
