"""Fine-tune DNAZEN: `deepspeed dnazen/finetune.py --model DIR --data DIR --output-dir DIR [...]`.

The work is done in the package of the same name.
"""

import sys
from pathlib import Path

# the launcher puts this folder first on the path, where `data`, `models`, ... would shadow other packages
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from dnazen.environment import grow_memory_segments, let_idle_threads_sleep, report_interrupt  # noqa: E402

grow_memory_segments()
let_idle_threads_sleep()

try:
    from dnazen.finetuning.run import main
    from dnazen.training.script import exit_process
except KeyboardInterrupt:  # it takes seconds
    sys.exit(report_interrupt())

if __name__ == "__main__":
    exit_process(main())
