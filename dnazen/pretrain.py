"""Pretrain DNAZEN: `deepspeed dnazen/pretrain.py --deepspeed ds_configs/zero2.json [...]`.

With no other argument it prepares the packaged *E. coli* 536 genome and trains the `tiny` size on it. With `--fasta` it
does the same on other genomes; with `--corpus` and `--ngrams` it trains on what `dnazen corpus` and `dnazen ngrams`
wrote. `--help` lists the arguments.
"""

import sys
from pathlib import Path

# the launcher puts this folder first on the path, where `data`, `models`, ... would shadow other packages
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from dnazen.environment import grow_memory_segments, let_idle_threads_sleep, report_interrupt  # noqa: E402

grow_memory_segments()
let_idle_threads_sleep()

try:
    from dnazen.pretraining.command import main
    from dnazen.training.script import exit_process
except KeyboardInterrupt:  # it takes seconds
    sys.exit(report_interrupt())

if __name__ == "__main__":
    exit_process(main())
