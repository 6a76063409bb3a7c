"""FlashAttention-4 with our ALiBi compiles for a GPU that is not here."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from tests.helpers.launch import PROGRAMS

SCRIPT = PROGRAMS / "compile_flash_4.py"
HOPPER = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "head_dim"), [(12, 64), (12, 128), (4, 32)], ids="base xlarge tiny".split())
def test_forward_and_backward_compile_for_hopper(heads, head_dim, root, tmp_path):
    """Few long sequences and many short ones, with ALiBi and without, to instructions for sm_90a; nothing is run."""
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package flash-attn-4, which is not installed")
    kept = {"CUTE_DSL_KEEP": "ptx", "CUTE_DSL_DUMP_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, SCRIPT, str(heads), str(head_dim)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, **HOPPER, **kept, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:]
    assert result.stdout.splitlines()[-2:] == ["_flash_attn_fwd 4", "_flash_attn_bwd 4"]
    targets = {line for path in tmp_path.glob("*.ptx") for line in path.read_text().splitlines() if ".target" in line}
    assert targets == {".target sm_90a"}
