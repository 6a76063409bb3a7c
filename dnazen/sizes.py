"""The sizes of the models, and how each is trained unless its flags say otherwise; imports nothing heavy."""

from typing import Any, NamedTuple

SIZE_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_hidden_ngram_layers"
)  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    # not the paper's, but what learns within minutes on a CPU: benchmarks/learning.md
    "tiny": {
        **dict(zip(SIZE_FIELDS, (128, 2, 4, 512, 1))),
        "neighbor_window": 2,
        "initializer_range": 0.09,
        "hidden_dropout_prob": 0.0,
    },
    "base": dict(zip(SIZE_FIELDS, (768, 12, 12, 3072, 6))),
    "large": dict(zip(SIZE_FIELDS, (1024, 24, 16, 4096, 6))),
    "xlarge": dict(zip(SIZE_FIELDS, (1536, 28, 12, 8960, 12))),
}


class Recipe(NamedTuple):
    """How a model of some size is trained unless its flags say otherwise; the defaults are the paper's."""

    max_batch_tokens: int  # what fits 80 GB, by our estimate
    learning_rate: float  # of base DNABERT-2's; of others our estimate
    mlm_probability: float = 0.15
    mask_share: float = 0.8
    whole_ngram_masking: bool = True
    start: str = "random"
    residual_learning_rate: float = 1.0


RECIPES = {
    # for minutes on a CPU, on a genome; measured in benchmarks/learning.md
    "tiny": Recipe(2048, 3e-3, 0.4, 1.0, False, "data", 0.1),
    "base": Recipe(65536, 5e-4),
    "large": Recipe(32768, 4e-4),
    "xlarge": Recipe(8192, 2e-4),  # with half of it the host would keep a GPU waiting (estimated, not measured)
}
