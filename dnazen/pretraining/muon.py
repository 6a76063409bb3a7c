"""Muon for the matrices of the layers, and AdamW for all other weights, in one optimizer that ZeRO-1 and 2 can share.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), with the size of the update of Liu et al. 2025
(arXiv 2502.16982). DeepSpeed 0.19 has a Muon of its own, which cannot be used here: it clips the orthogonal update in
place of the gradient, so that every step is divided by a number that grows with the model (its issue 8439), and its
checkpoints do not load on another number of processes (8608).
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

MOMENTUM = 0.95
# of the Newton-Schulz iteration: five steps bring singular values into 0.7 to 1.2
_COEFFICIENTS, _STEPS = (3.4445, -4.7750, 2.0315), 5
# root mean square of an update, as AdamW's usually is, so that one learning rate suits both
_UPDATE_SIZE = 0.2
_PARTS = {"Wqkv": 3, "gated_layers": 2}  # matrices that lie one below the other in one parameter
_BATCH_NUMEL = 2**26  # of matrices that are orthogonalized at once


def count_parts(name: str, parameter: Tensor) -> int:
    """How many matrices a model's parameter holds that Muon is for: those of the layers; 0 for all others."""
    words = name.split(".")
    return _PARTS.get(words[-2], 1) if "encoder" in words and parameter.dim() == 2 else 0


def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices `[n, rows, columns]` with all singular values near 1 and the same singular vectors."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    if x.is_cuda:
        x = x.bfloat16()
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class _Piece(NamedTuple):
    """What this process updates of a matrix."""

    update: Tensor  # flat; a view
    start: int  # in the matrix


class MuonAdamW(torch.optim.AdamW):
    """AdamW, with Muon for the groups that `add_param_group` is given with `parts`.

    `parts` has for each of the group's parameters the number of matrices in it. The momentum is called `exp_avg`, as
    AdamW's is; beside it there is the counter that AdamW expects in every state.

    ZeRO-1 and 2 replace a group's parameters by one flat tensor, this process' share of them all. A matrix that lies
    on several processes is then orthogonalized on each of them, after they have exchanged their pieces of it.
    """

    def __init__(self, params: Iterable, **kwargs: Any):
        self._matrices: list[list[Parameter]] = []  # of each group, as it was given
        self._shared: dict[int, list[int]] = {}  # of each of Muon's, those that lie on several processes
        super().__init__(params, **kwargs)
        self._step_supports_amp_scaling = False  # what fused AdamW does by itself, Muon does not

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; with `parts` one of Muon's."""
        param_group.setdefault("parts", None)
        param_group["number"] = len(self._matrices)
        self._matrices.append(list(param_group["params"]))
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all groups."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["parts"] is None]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["parts"] is not None:
                self._step_orthogonally(group)
        return loss

    def _step_orthogonally(self, group: dict[str, Any]) -> None:
        parameters, updates = group["params"], []
        for parameter in parameters:
            state = self.state[parameter]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
                state["exp_avg"] = torch.zeros_like(parameter)
            state["step"] += 1
            state["exp_avg"].lerp_(parameter.grad, 1 - MOMENTUM)
            updates.append(parameter.grad.lerp_(state["exp_avg"], MOMENTUM))  # Nesterov's, in the gradient's place
        matrices = self._matrices[group["number"]]
        if parameters[0] is matrices[0]:
            pieces = {index: _Piece(update.view(-1), 0) for index, update in enumerate(updates)}
            wholes = dict(enumerate(updates))
        else:
            pieces = _find_pieces(matrices, updates[0])
            wholes = self._assemble(group["number"], matrices, pieces)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index in pieces:
            rows, columns = matrices[index].shape
            shape = group["parts"][index], rows // group["parts"][index], columns
            by_shape.setdefault(shape, []).append(index)
        for shape, indices in by_shape.items():
            scale = _UPDATE_SIZE * math.sqrt(max(shape[1:]))
            count = max(1, _BATCH_NUMEL // math.prod(shape))
            for first in range(0, len(indices), count):
                chosen = indices[first : first + count]
                stacked = torch.cat([wholes[index].view(shape) for index in chosen])
                orthogonal = orthogonalize(stacked).float().mul(scale).reshape(len(chosen), -1)
                for index, whole in zip(chosen, orthogonal):
                    piece = pieces[index]
                    piece.update.copy_(whole[piece.start : piece.start + len(piece.update)])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _assemble(self, number: int, matrices: list[Parameter], pieces: dict[int, _Piece]) -> dict[int, Tensor]:
        """The whole update of each matrix of which this process has a piece; all processes must call this."""
        device = next(iter(pieces.values())).update.device if pieces else matrices[0].device
        if number not in self._shared:
            owners = torch.tensor([index in pieces for index in range(len(matrices))], dtype=torch.int32, device=device)
            torch.distributed.all_reduce(owners)
            self._shared[number] = (owners > 1).nonzero().flatten().tolist()
        shared = self._shared[number]
        wholes = {index: piece.update for index, piece in pieces.items() if index not in shared}
        if shared:
            sizes = [matrices[index].numel() for index in shared]
            together = torch.zeros(sum(sizes), device=device)
            for index, whole in zip(shared, together.split(sizes)):
                if index in pieces:
                    piece = pieces[index]
                    whole[piece.start : piece.start + len(piece.update)] = piece.update
                    wholes[index] = whole
            torch.distributed.all_reduce(together)
        return wholes


def _find_pieces(matrices: list[Parameter], update: Tensor) -> dict[int, _Piece]:
    """Of each matrix that this process has a piece of in ZeRO's flat tensor, that piece."""
    mappings = ((index, matrix._hp_mapping) for index, matrix in enumerate(matrices))
    return {
        index: _Piece(
            update.narrow(0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel),
            mapping.lp_fragment_address.start,
        )
        for index, mapping in mappings
        if mapping is not None
    }
