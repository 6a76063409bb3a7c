"""`import dnazen` makes the models known to transformers' Auto classes: in any order, and without a wait."""

import subprocess
import sys

import pytest

BUILD = """
config = AutoConfig.for_model(
    "dnazen", vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
    num_hidden_ngram_layers=1, ngram_vocab_size=9,
)
names = "Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"
for name in names:
    model = getattr(transformers, "AutoModel" + name.removeprefix("Model")).from_config(config)
    assert type(model).__name__ == "DNAZen" + name, type(model)
    assert type(model).__module__ == "dnazen.models.modeling_dnazen"
"""


def run(code: str, root) -> None:
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import dnazen, transformers\nfrom transformers import AutoConfig",
        "import transformers, dnazen\nfrom transformers import AutoConfig",
        "from transformers import AutoConfig\nimport dnazen, transformers",
        "from transformers import AutoConfig, AutoModelForMaskedLM, Trainer\nimport dnazen, transformers",
        # those that import the Auto modules on their own way
        "import dnazen, transformers\nfrom transformers import PreTrainedModel, AutoConfig",
        "import dnazen, transformers\nfrom transformers import Trainer, BertModel, pipeline, AutoTokenizer, AutoConfig",
        "import transformers\nfrom dnazen.models import DNAZenModel\nfrom transformers import AutoConfig",
        "import transformers\nimport dnazen.models.modeling_dnazen\nfrom transformers import AutoConfig",
    ],
)
def test_models_are_known_whichever_is_imported_first(imports, root):
    run(imports + BUILD, root)


def test_import_dnazen_imports_neither_torch_nor_transformers(root):
    run("import sys, dnazen\nassert not {'torch', 'transformers', 'numpy'} & set(sys.modules)", root)
