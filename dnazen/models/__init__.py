"""The DNAZEN models, registered with the Auto classes of transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from dnazen.models.configuration_dnazen import SIZES, DNAZenConfig
from dnazen.models.modeling_dnazen import (
    DNAZenForMaskedLM,
    DNAZenForSequenceClassification,
    DNAZenForTokenClassification,
    DNAZenModel,
)

AutoConfig.register("dnazen", DNAZenConfig, exist_ok=True)
AutoModel.register(DNAZenConfig, DNAZenModel, exist_ok=True)
AutoModelForMaskedLM.register(DNAZenConfig, DNAZenForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(DNAZenConfig, DNAZenForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(DNAZenConfig, DNAZenForTokenClassification, exist_ok=True)

__all__ = [
    "SIZES", "DNAZenConfig", "DNAZenForMaskedLM", "DNAZenForSequenceClassification", "DNAZenForTokenClassification",
    "DNAZenModel",
]  # fmt: skip
