"""The DNAZEN models, which `import dnazen` registers with the Auto classes of transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dnazen.models.configuration_dnazen import DNAZenConfig
from dnazen.sizes import SIZES

if TYPE_CHECKING:
    from dnazen.models.modeling_dnazen import (
        DNAZenForMaskedLM,
        DNAZenForSequenceClassification,
        DNAZenForTokenClassification,
        DNAZenModel,
    )

__all__ = [
    "SIZES", "DNAZenConfig", "DNAZenForMaskedLM", "DNAZenForSequenceClassification", "DNAZenForTokenClassification",
    "DNAZenModel",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The model classes, on first use: transformers needs the configuration at a time when they cannot be imported."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("dnazen.models.modeling_dnazen"), name)
