"""The projections around attention, one kind for each encoder."""

from torch import Tensor, nn

from dnazen.layers.attention.dense import Attention, attend_packed
from dnazen.layers.linear import Linear, SharedInputLinear, project


class FusedSelfAttention(nn.Module):
    """The token encoder's attention: one projection whose rows are q, k, v, each split into heads."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.Wqkv = SharedInputLinear(hidden_size, 3 * hidden_size)

    def forward(self, hidden_states: Tensor, attention: Attention) -> tuple[Tensor, Tensor, Tensor | None]:
        """Context, `hidden_states` as the residual, and the weights if the attention has them."""
        qkv, residual = project(self.Wqkv, hidden_states)
        context, weights = attend_packed(attention, qkv.unflatten(-1, (3, self.num_heads, -1)))
        return context.flatten(-2), residual, weights


class SelfAttention(nn.Module):
    """The G-gram encoder's attention: three projections, as in BERT."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(hidden_size, hidden_size)
        self.key = Linear(hidden_size, hidden_size)
        self.value = Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, attention: Attention) -> tuple[Tensor, Tensor, Tensor | None]:
        """As of `FusedSelfAttention`."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1))
            for projection in (self.query, self.key, self.value)
        )
        context, weights = attention(query, key, value)
        return context.flatten(-2), hidden_states, weights
