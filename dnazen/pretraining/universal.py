"""DeepSpeed's converter of checkpoints to their universal form, also for an optimizer without second moments.

    python -m dnazen.pretraining.universal --input_folder DIR --output_folder DIR

It looks for Adam's two moments in every group of parameters (its issue 8608); Muon's groups have the first one alone.
"""

import multiprocessing
from typing import Any


def main() -> None:
    """Run the converter's command line."""
    from deepspeed.checkpoint import ds_to_universal as converter
    from deepspeed.checkpoint.constants import BASE_OPTIMIZER_STATE, OPTIMIZER_STATE_DICT

    read, dump = converter.DeepSpeedCheckpoint.get_zero_checkpoint_state, converter.dump_param_fragment

    def read_with_missing(*args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = read(*args, **kwargs)
        for state in checkpoint[OPTIMIZER_STATE_DICT][BASE_OPTIMIZER_STATE]["state"].values():
            state.setdefault("exp_avg_sq", None)
        return checkpoint

    def dump_unless_missing(dir: str, tp_index: int, dp_index: int, name: str, value: Any, *args: Any) -> None:
        if value is not None:
            dump(dir, tp_index, dp_index, name, value, *args)

    converter.DeepSpeedCheckpoint.get_zero_checkpoint_state = read_with_missing
    converter.dump_param_fragment = dump_unless_missing
    multiprocessing.set_start_method("fork")  # its workers must have these functions too
    converter.main(converter.parse_arguments())


if __name__ == "__main__":
    main()
