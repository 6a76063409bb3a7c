"""DNAZEN's entries in the Auto classes of transformers, made when those are imported and not before.

So `import dnazen` alone costs some milliseconds, and yet `AutoModel.from_pretrained` knows the models after it. The
module of AutoConfig is imported while transformers is still busy with what our models need, but not our configuration:
that is why each of the two modules is waited for on its own.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_CONFIGURATION = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"
_CLASSES = {
    "AutoModel": "DNAZenModel",
    "AutoModelForMaskedLM": "DNAZenForMaskedLM",
    "AutoModelForSequenceClassification": "DNAZenForSequenceClassification",
    "AutoModelForTokenClassification": "DNAZenForTokenClassification",
}


def register_on_import() -> None:
    """Register now what is imported already, and the rest as soon as it is."""
    sys.meta_path.insert(0, _AutoModules())  # type: ignore[arg-type]
    for name in (_CONFIGURATION, _MODELS):
        if name in sys.modules:
            _register(sys.modules[name])


def _register(auto: ModuleType) -> None:
    """`auto` is one of the two Auto modules."""
    ours = import_module("dnazen.models")  # a name, for this room imports none of the others
    if auto.__name__ == _CONFIGURATION:
        auto.AutoConfig.register(ours.DNAZenConfig.model_type, ours.DNAZenConfig, exist_ok=True)
        return
    for auto_class, model_class in _CLASSES.items():
        getattr(auto, auto_class).register(ours.DNAZenConfig, getattr(ours, model_class), exist_ok=True)


class _AutoModules:
    """An entry of `sys.meta_path`: finds the two modules as Python does, and registers once they have run."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in (_CONFIGURATION, _MODELS):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
