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


ORDERS = [
    "import dnazen, transformers\nfrom transformers import AutoConfig",
    "import transformers, dnazen\nfrom transformers import AutoConfig",
    "from transformers import AutoConfig\nimport dnazen, transformers",
    "from transformers import AutoConfig, AutoModelForMaskedLM, Trainer\nimport dnazen, transformers",
    # those that import the Auto modules on their own way
    "import dnazen, transformers\nfrom transformers import PreTrainedModel, AutoConfig",
    "import dnazen, transformers\nfrom transformers import Trainer, BertModel, pipeline, AutoTokenizer, AutoConfig",
    "import transformers\nfrom dnazen.models import DNAZenModel\nfrom transformers import AutoConfig",
    "import transformers\nimport dnazen.models.modeling_dnazen\nfrom transformers import AutoConfig",
]
OTHERS = {"torch", "numpy", "scipy", "triton", "huggingface_hub"}  # import neither of the two
# each program in a fork of its own, of a process that has imported what takes longest and has no say in the order
FORKS = """
import importlib, os, sys, traceback
for module in sys.stdin.read().split():
    importlib.import_module(module)
assert not {"transformers", "dnazen"} & sys.modules.keys()
for program in sys.argv[1:]:
    if not (child := os.fork()):
        try:
            exec(program, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, program
    print("as it should be")
"""


def run(code: str, root, *arguments: str, standard_input: str = "") -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=root, check=True, stdout=subprocess.PIPE, text=True,
        input=standard_input,
    ).stdout  # fmt: skip


@pytest.mark.slow
def test_models_are_known_whichever_is_imported_first(root):
    # first as by a user, in a process of its own; what it imports of others, the forks find imported
    imported = run(ORDERS[5] + BUILD + "import sys\nprint(*sys.modules)", root).split()
    others = [name for name in imported if name.split(".")[0] in OTHERS]
    assert {name.split(".")[0] for name in others} == OTHERS
    output = run(FORKS, root, *(imports + BUILD for imports in ORDERS), standard_input=" ".join(others))
    assert output.count("as it should be") == len(ORDERS)


def test_import_dnazen_imports_neither_torch_nor_transformers(root):
    run("import sys, dnazen\nassert not {'torch', 'transformers', 'numpy'} & set(sys.modules)", root)
