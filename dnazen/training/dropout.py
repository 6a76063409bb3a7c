"""Drop-out in data-parallel training."""

import torch
from transformers import TrainerCallback


class DropoutOfItsOwn(TrainerCallback):
    """Every process draws its own drop-out.

    Trainer seeds all processes alike, and a sub-layer draws one number whatever the batch: all would drop the same. A
    resumed run goes on with the states that each process has saved; Trainer loads them after this.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        torch.manual_seed(args.seed + args.process_index)
