"""The installed package: import names, what may import what, and the folder called `kernels`."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"triton", "flash_attn", "deepspeed"}
# layer of each package: a module may import its own layer and those listed
ALLOWED = {
    "dnazen_kernels": {"dnazen_kernels"},
    "dnazen.layers": {"dnazen.layers", "dnazen_kernels"},
    "dnazen.models": {"dnazen.models", "dnazen.layers", "dnazen.files", "dnazen_kernels"},
    "dnazen.ngram": {"dnazen.ngram", "dnazen.data", "dnazen.files", "dnazen_kernels", "dnazen"},
    "dnazen.data": {"dnazen.data", "dnazen.ngram", "dnazen.files", "dnazen_kernels", "dnazen"},
    "dnazen.train": {
        "dnazen.train", "dnazen.data", "dnazen.models", "dnazen.ngram", "dnazen.files", "dnazen_kernels", "dnazen",
        "dnazen.environment",
    },
    "dnazen.inference": {
        "dnazen.inference", "dnazen.train", "dnazen.data", "dnazen.models", "dnazen.ngram", "dnazen.files", "dnazen"
    },
    "dnazen.finetune": {
        "dnazen.finetune", "dnazen.inference", "dnazen.train", "dnazen.data", "dnazen.models", "dnazen.ngram",
        "dnazen.files", "dnazen", "dnazen.environment",
    },
    "dnazen.gue": {"dnazen.gue", "dnazen.finetune", "dnazen.train", "dnazen.files", "dnazen"},
}  # fmt: skip


def modules(root: Path) -> list[tuple[str, Path]]:
    """(import name, file) of every module of the distribution."""
    found = []
    for folder, prefix in (("dnazen", "dnazen"), ("kernels", "dnazen_kernels")):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found.append((".".join((prefix, *[part for part in parts if part != "__init__"])), path))
    return found


def imports(path: Path) -> list[tuple[str, bool]]:
    """(imported module, at module top) for each import statement of a file."""
    tree = ast.parse(path.read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    inside = {id(node) for function in functions for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
        found += [(name, id(node) not in inside) for name in names]
    return found


def layer(module: str) -> str:
    """`dnazen_kernels`, `dnazen`, or `dnazen.<package>`."""
    parts = module.split(".")
    return parts[0] if parts[0] == "dnazen_kernels" else ".".join(parts[:2])


def test_imports_follow_the_layers(root):
    edges = [(name, imported, path) for name, path in modules(root) for imported, _ in imports(path)]
    assert any(imported.startswith("dnazen_kernels") for _, imported, _ in edges)
    for name, imported, path in edges:
        if imported.split(".")[0] not in ("dnazen", "dnazen_kernels", "benchmarks", "tests", "kernels"):
            continue
        own = layer(name)
        if own in ALLOWED:
            assert layer(imported) in ALLOWED[own], f"{path}: {own} must not import {imported}"
        if own != "dnazen.cli":
            assert layer(imported) not in ("dnazen.cli", "benchmarks", "tests", "kernels"), f"{path} imports {imported}"


def test_layers_and_kernels_do_not_import_transformers(root):
    for name, path in modules(root):
        if layer(name) in ("dnazen_kernels", "dnazen.layers"):
            assert not [imported for imported, _ in imports(path) if imported.split(".")[0] == "transformers"], path


def test_optional_packages_are_not_imported_at_module_top(root):
    for _, path in modules(root):
        top = {imported.split(".")[0] for imported, at_top in imports(path) if at_top}
        assert path.name in ("triton_impl.py", "_triton_utils.py") or not top & HEAVY, path


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_folder_called_kernels_does_not_disturb_transformers(root, tmp_path, where):
    """A folder `kernels` with an `__init__.py` would be taken for the PyPI package of that name."""
    assert not (root / "kernels" / "__init__.py").exists()
    code = (
        "import importlib.util, dnazen_kernels.ngram_fusion\n"
        "from transformers.utils import is_kernels_available\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "assert spec is None or spec.origin is None or 'site-packages' in spec.origin, spec\n"
        "is_kernels_available()\n"
        "from transformers import BertModel\n"
    )
    cwd = root if where == "root" else tmp_path
    subprocess.run([sys.executable, "-c", code], cwd=cwd, check=True)


def test_tests_of_kernels_live_in_ops(root):
    assert not (root / "tests" / "kernels").exists()


@pytest.mark.slow
def test_wheel_holds_all_modules_and_the_genome(root, tmp_path):
    source = tmp_path / "source"  # without what an earlier build left
    for folder in ("dnazen", "kernels"):
        shutil.copytree(root / folder, source / folder)
    for file in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(root / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, source]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True, check=True
    ).stdout
    for name, path in modules(root):
        prefix = name.replace(".", "/")
        assert f"{prefix}/__init__.py" in names or f"{prefix}.py" in names, path
    assert "dnazen/data/genomes/ecoli536_NC_008253.fna.gz" in names
    assert "\nkernels/" not in names
