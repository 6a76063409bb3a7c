"""LoRA adapters: a few weights that are trained in place of the model's own."""

from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from dnazen.files import InputError
from dnazen.finetuning.damage import refuse_damage
from dnazen.finetuning.loading import HEADS
from dnazen.models.modeling_dnazen import DNAZenPreTrainedModel

# the projections of both attentions; in other models every linear layer but the head
TARGETS = ("Wqkv", "query", "key", "value")


def add_adapters(model: nn.Module, rank: int, alpha: int, dropout: float, targets: Sequence[str] | None) -> PeftModel:
    """`model` with LoRA adapters (Hu et al. 2021) of `rank`; they and the head alone are trained.

    Args:
        model: with its head.
        rank: of the adapters' matrices.
        alpha: their scale, times the rank.
        dropout: before the adapters.
        targets: names of the linear layers to adapt; None: the projections of DNAZEN's attentions, and in other models
            every linear layer but the head.

    Raises:
        InputError: the model has no layer of such a name.
    """
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if targets is None:
        targets = list(TARGETS) if isinstance(model, DNAZenPreTrainedModel) else "all-linear"
    elif unknown := sorted(set(targets) - names):
        raise InputError(f"--lora-target-modules: expected names of layers, found {', '.join(unknown)}")
    heads = [name for name in HEADS if name in names]
    options = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, modules_to_save=heads)
    return get_peft_model(model, options)


def load_adapters(model: nn.Module, folder: Path) -> PeftModel:
    """`model` with the adapters, and the head, of a folder.

    Raises:
        InputError: there are none that can be read.
    """
    with refuse_damage(f"{folder}: expected LoRA adapters, found none that can be read"):
        return PeftModel.from_pretrained(model, folder)
