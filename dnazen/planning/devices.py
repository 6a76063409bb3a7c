"""GPUs, and how fast they do what a training step consists of: published measurements, and what follows from them.

A rate that depends on a size n (the summed dimension of a matrix product, the rows of a sequence) is `limit * n /
(n + half)`; two published figures fix it, and the others of the same series then agree to 5 %.
"""

from typing import NamedTuple


class Rate(NamedTuple):
    """FLOP/s that depend on a size: `limit` for the largest, half of it at `half`."""

    limit: float
    half: float = 0.0

    def seconds(self, flops: float, size: float) -> float:
        return flops / self.limit * (1 + self.half / size)

    def times(self, factor: float) -> "Rate":
        return Rate(self.limit * factor, self.half)


class AttentionRates(NamedTuple):
    """Of one back-end: forward and backward, at head dimensions of 64 and of 128, in TFLOP/s on Hopper."""

    forward: dict[int, Rate]
    backward: dict[int, Rate]
    alibi: float = 1.0  # how many times as long it takes with the bias; assumed


# H100 SXM5, no causal mask, 512 to 16,384 rows: the figures of FlashAttention-3's paper (arXiv 2407.08608, figures 5
# and 6), which has FlashAttention-2 beside it; FlashAttention-3 forward at 128 as measured in pytorch/benchmark#2391,
# where it is 430 to 621 and not 467 to 648.
_FLASH_2 = AttentionRates(
    {64: Rate(326e12, 80), 128: Rate(374e12, 107)}, {64: Rate(296e12, 253), 128: Rate(330e12, 278)}, alibi=1.05
)
# FlashAttention-4 on Hopper is as fast as 3 (head dimension 128, forward and backward: 74.09 and 74.26 ms, PR 959 of
# ecmwf/anemoi-core); at 64 nothing is published, so 3's stands for it.
_FLASH_4 = AttentionRates(
    {64: Rate(500e12, 257), 128: Rate(630e12, 236)}, {64: Rate(487e12, 405), 128: Rate(590e12, 445)}, alibi=1.08
)
# FlexAttention's makers: 0.9 of FlashAttention-2's forward, 0.85 of its backward, the bias included.
_FLEX = AttentionRates(
    {dim: rate.times(0.9) for dim, rate in _FLASH_2.forward.items()},
    {dim: rate.times(0.85) for dim, rate in _FLASH_2.backward.items()},
)
_HOPPER = {"flash_attention_4": _FLASH_4, "flash_attention_2": _FLASH_2, "flex_attention": _FLEX}
# An A100 has 0.6 of an H100's; assumed, by what FlashAttention-2's authors say of both (225 and 335 TFLOP/s at best).
_AMPERE = {
    name: AttentionRates(
        *({dim: rate.times(0.6) for dim, rate in rates.items()} for rates in (back_end.forward, back_end.backward)),
        alibi=back_end.alibi,
    )
    for name, back_end in _HOPPER.items()
    if name != "flash_attention_4"  # which cannot train there
}
TILE = 128  # rows that attention's kernels compute at a time; a sequence's last tile is computed whole

ALU_LANES = 64  # of 32-bit integers, for each multiprocessor and clock, as multiply-add beside as many logical ones
PHILOX_OPERATIONS = 40  # of each kind for four words: 10 rounds of 2 wide products, 2 three-way xors and 2 sums


class Prices(NamedTuple):
    """What a kernel's work costs on a GPU."""

    matmul: Rate
    forward: Rate  # of attention
    backward: Rate
    bandwidth: float  # bytes/s of memory
    philox: float  # blocks of four random words a second
    floor: float  # seconds of the smallest kernel, with the gap to the next
    launch: float  # seconds of the host for each kernel
    gap: float  # seconds of an idle GPU after a synchronisation, till the host has launched ahead again
    link: float  # bytes/s of a collective, each way and for each GPU
    beside: float  # share of a collective's time that what runs beside it loses


class Gpu(NamedTuple):
    """A GPU, of the kind that stands eight to a machine with NVLink among them."""

    name: str
    peak: float  # dense bf16 FLOP/s of the data sheet, which an MFU divides by
    best_matmul: float  # FLOP/s of the best shape measured
    matmul: Rate  # by the summed dimension
    copy: float  # bytes/s of a measured copy
    memory: float  # bytes
    multiprocessors: int
    clock: float  # Hz
    link: float  # bytes/s of NVLink, each way
    attention: dict[str, AttentionRates]

    def prices(self, attention: str, head_dim: int, expected: bool, bus: float | None = None) -> Prices:
        """Expected, or optimistic: every kernel at the best that was measured of its kind, and nothing between them.

        Args:
            attention: one of `self.attention`.
            head_dim: of a head; at most 64 is as 64, above as 128.
            expected: else optimistic.
            bus: bytes/s of a collective where it is less than NVLink's.
        """
        rates, dim = self.attention[attention], 64 if head_dim <= 64 else 128
        slower = 1 / rates.alibi if expected else 1.0
        philox = self.multiprocessors * ALU_LANES * self.clock / PHILOX_OPERATIONS
        return Prices(
            self.matmul if expected else Rate(self.best_matmul),
            rates.forward[dim].times(slower),
            rates.backward[dim].times(slower),
            COPY_SHARE * self.copy if expected else self.copy,
            philox,
            FLOOR if expected else 0.0,
            LAUNCH if expected else FASTEST_LAUNCH,
            GAP if expected else 0.0,
            LINK_SHARE * min(self.link, bus or self.link) if expected else min(self.link, bus or self.link),
            BESIDE if expected else 0.0,
        )


COPY_SHARE = 0.9  # of a copy's speed that kernels with sums and uneven rows reach; assumed
FLOOR = 4e-6  # a kernel that does nothing takes 2 us, and as much passes until the next one begins; assumed
# Python, autograd and DeepSpeed's hooks between kernels: a step of `base` takes the host some 40 ms, by what its
# operators take on a CPU (one of ours 180 us forward and backward, PyTorch's 50); a bare launch 5 us.
LAUNCH, FASTEST_LAUNCH = 40e-6, 5e-6
HOOK_LAUNCH = 10e-6  # of DeepSpeed's, a hook's Python included; assumed
GAP = 1e-3  # of the host's Python, until kernels are queued again; assumed
LINK_SHARE = 0.8  # 370 of NVLink's 450 GB/s (NCCL's maintainer, nccl-tests#212), 160 of an H800's 200 (DeepSeek-V3#28)
BESIDE = 0.15  # NCCL's kernels hold some 20 of 132 multiprocessors; assumed
NETWORK = 50e9  # bytes/s between machines for each GPU: 400 Gbit/s, as such machines have; assumed

# Matrix products: 700 TFLOP/s x K / (K + 64), what cuBLAS reaches of the 790 of CUTLASS's best shape, tuned; an A100's
# in proportion, to 275 of 312. Copies: measured on an H100 and an H200; an H800's as an H100's; an A100's is nine
# tenths of its data sheet's 2.04 TB/s.
_H100 = Gpu("H100", 990e12, 790e12, Rate(700e12, 64), 3.3e12, 80e9, 132, 1.755e9, 450e9, _HOPPER)
GPUS = {
    gpu.name: gpu
    for gpu in (
        _H100,
        _H100._replace(name="H200", copy=4.3e12, memory=141e9),
        _H100._replace(name="H800", link=200e9),
        Gpu("A100", 312e12, 275e12, Rate(245e12, 64), 1.85e12, 80e9, 108, 1.41e9, 300e9, _AMPERE),
    )
}
