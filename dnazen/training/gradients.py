"""The gradient's norm under DeepSpeed in one pass, which also finds what is not finite before the weights change."""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback


class NormAtOnce(TrainerCallback):
    """Spares DeepSpeed its search of the gradient, tensor by tensor, for what is not finite.

    ZeRO-1 and 2 search before they take the norm: some 13 operations for each of a model's tensors, most of what a
    step launches, and nothing hides it. The norm alone says the same, for it is finite only if the whole gradient is;
    DeepSpeed looks at it before it steps, on all stages, and where it is not finite skips the step. Its own way stays
    where the gradient lies elsewhere (an offloaded optimizer) and where its configuration wants no norm.
    """

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        zero = getattr(optimizer, "optimizer", None)  # Accelerate's wrapper around DeepSpeed's optimizer
        is_offloaded = getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False)
        if is_offloaded or not getattr(zero, "compute_grad_norm", True):
            return
        if hasattr(zero, "scaled_global_norm"):  # ZeRO-1 and 2
            zero.scaled_global_norm = lambda norm_type=2: global_grad_norm(zero)
            zero.check_overflow = lambda partition_gradients=True: None
        elif hasattr(zero, "_get_norm_groups"):  # ZeRO-3
            zero._get_norm_groups = lambda: [global_grad_norm(zero)]


@torch.no_grad()
def global_grad_norm(zero: Any) -> Tensor:
    """The L2 norm, `[]` fp32, of the gradient that a ZeRO optimizer is about to apply, over all processes.

    It is inf or NaN on all processes if any entry on any of them is.
    """
    groups = [group for group in zero.averaged_gradients.values() if group is not None]
    gradients = [gradient for group in groups for gradient in group]
    # a small group may lie on other processes altogether
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32) if gradients else []
    total = torch.stack([torch.zeros((), device=zero.device), *norms]).square().sum()
    torch.distributed.all_reduce(total, group=zero.dp_process_group)
    return total.sqrt()
