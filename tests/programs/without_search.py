"""Run an entry point in this process, and fail where DeepSpeed looks at the gradient tensor by tensor.

Arguments: `--entry SCRIPT` (in `dnazen/`), then the script's.
"""

import runpy
import sys
from pathlib import Path

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


def refuse(*args, **kwargs):
    raise AssertionError("the gradient's tensors are looked at one by one")


for zero in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
    zero.get_grad_norm_direct = zero.has_overflow = refuse
arguments = sys.argv[1:]
entry = arguments.pop(arguments.index("--entry") + 1)
arguments.remove("--entry")
script = str(Path(__file__).resolve().parents[2] / "dnazen" / entry)
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
