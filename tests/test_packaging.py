"""The installed package: import names, what may import what, and the folder called `kernels`."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"triton", "flash_attn", "deepspeed"}
# from the lowest room up: what each imports, and nothing else; each names rooms above it alone, so no arrow runs back
ARROWS = {
    "dnazen_kernels": "",
    "dnazen": "",  # the modules beside the rooms: files, dna, processes, environment; and the version
    "dnazen.planning": "dnazen",
    "dnazen.layers": "dnazen_kernels",
    "dnazen.data": "dnazen",
    "dnazen.ngram": "dnazen dnazen.data dnazen_kernels",
    "dnazen.analysis": "dnazen dnazen.data dnazen.ngram dnazen_kernels",
    "dnazen.models": "dnazen dnazen.data dnazen.ngram dnazen.layers dnazen_kernels",
    "dnazen.batches": "dnazen dnazen.data dnazen.ngram dnazen_kernels",
    "dnazen.evaluation": "dnazen dnazen.data dnazen.ngram dnazen.models dnazen.batches dnazen_kernels",
    "dnazen.inference": "dnazen dnazen.data dnazen.ngram dnazen.models dnazen.batches dnazen.evaluation",
    "dnazen.training": "dnazen dnazen.models",
    "dnazen.pretraining": "dnazen dnazen.data dnazen.ngram dnazen.models dnazen.batches dnazen.evaluation "
    "dnazen.training dnazen_kernels",
    "dnazen.finetuning": "dnazen dnazen.data dnazen.ngram dnazen.models dnazen.batches dnazen.training",
    "dnazen.gue": "dnazen dnazen.models dnazen.finetuning",
    "dnazen.cli": None,  # all
}


def room(module: str, folders: set[str]) -> str:
    """The package of a module, or `dnazen` for what lies beside the packages."""
    parts = module.split(".")
    return ".".join(parts[: 2 if ".".join(parts[:2]) in folders else 1])


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


def test_imports_run_one_way_through_the_rooms(root):
    """Exactly the arrows that are listed: none more, none that is no longer needed."""
    scripts = {"dnazen.pretrain", "dnazen.finetune"}  # above all rooms but `cli`
    folders = {f"dnazen.{path.parent.name}" for path in (root / "dnazen").glob("*/__init__.py")}
    found = {name: set() for name in folders | {"dnazen", "dnazen_kernels"}}
    for name, path in modules(root):
        if name in scripts:
            continue
        for imported, _ in imports(path):
            package = imported.split(".")[0]
            assert package not in ("benchmarks", "tests", "kernels"), f"{path} imports {imported}"
            assert imported not in scripts, f"{path} imports {imported}"
            if package in ("dnazen", "dnazen_kernels"):
                found[room(name, folders)].add(room(imported, folders))
    rooms = list(ARROWS)
    for index, (name, below) in enumerate(ARROWS.items()):
        if below is not None:
            assert set(below.split()) <= set(rooms[:index]), f"{name}: an arrow that runs back up"
    allowed = {name: set(rooms if below is None else below.split()) for name, below in ARROWS.items()}
    assert found.keys() == allowed.keys()
    surplus = {name: found[name] - allowed[name] - {name} for name in rooms}
    missing = {name: allowed[name] - found[name] for name in rooms if ARROWS[name] is not None}
    assert not any(surplus.values()), surplus
    assert not any(missing.values()), missing


def test_layers_and_kernels_do_not_import_transformers(root):
    for name, path in modules(root):
        if name.startswith(("dnazen_kernels", "dnazen.layers")):
            assert not [imported for imported, _ in imports(path) if imported.split(".")[0] == "transformers"], path


def test_optional_packages_are_not_imported_at_module_top(root):
    for _, path in modules(root):
        top = {imported.split(".")[0] for imported, at_top in imports(path) if at_top}
        assert path.name in ("triton_impl.py", "_triton_utils.py") or not top & HEAVY, path


@pytest.mark.slow
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
    for folder in ("dnazen", "kernels", "ds_configs"):
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
    assert "dnazen_ds_configs/zero2.json" in names
    assert "\nkernels/" not in names and "\nds_configs/" not in names
