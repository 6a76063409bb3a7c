"""`dnazen/pretrain.py` with one thing changed that no flag changes, for `benchmarks/learning.py`.

deepspeed benchmarks/lever.py --lever "growing batches" [flags of dnazen/pretrain.py]
"""

import functools
import sys
from pathlib import Path

# the launcher puts this folder first on the path
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402
import torch  # noqa: E402

import dnazen.pretraining.run as run  # noqa: E402
from dnazen.batches.sampler import MicroBatchSampler, epoch_order, pack_by_budget  # noqa: E402
from dnazen.pretraining.command import main  # noqa: E402
from dnazen.pretraining.trainer import PretrainingTrainer  # noqa: E402
from dnazen.training.script import exit_process  # noqa: E402


def grow_batches() -> None:
    """Half of the budget for the first half of an epoch's sequences, twice the budget for the second."""

    def micro_batches(self: MicroBatchSampler, epoch: int) -> list[np.ndarray]:
        halves = np.array_split(epoch_order(len(self.lengths), self.seed, epoch), 2)
        budgets = self.max_batch_tokens // 2, self.max_batch_tokens * 2
        return [part for half, budget in zip(halves, budgets) for part in pack_by_budget(self.lengths, half, budget)]

    MicroBatchSampler.micro_batches = micro_batches


def change_ngram_rate(factor: float) -> None:
    """The G-gram encoder and its embeddings learn at a rate of their own."""
    create = PretrainingTrainer.create_optimizer

    def create_optimizer(self: PretrainingTrainer, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = create(self, model)
        if is_new:
            path = {id(p) for name, p in self.model.named_parameters() if "ngram" in name}
            for group in list(optimizer.param_groups):
                apart = [p for p in group["params"] if id(p) in path]
                group["params"] = [p for p in group["params"] if id(p) not in path]
                optimizer.add_param_group({**group, "params": apart, "lr": group["lr"] * factor})
        return optimizer

    PretrainingTrainer.create_optimizer = create_optimizer


def keep_ngrams_random() -> None:
    """G-gram embeddings stay random, where `start_from_data` makes them of their tokens' embeddings."""
    start = run.start_from_data

    def start_from_data(model: torch.nn.Module, *args: object) -> None:
        weight = model.bert.ngram_embeddings.word_embeddings.weight
        before = weight.detach().clone()
        start(model, *args)
        with torch.no_grad():
            weight.copy_(before)

    run.start_from_data = start_from_data


LEVERS = {
    "growing batches": grow_batches,
    "G-gram path at ten times the rate": functools.partial(change_ngram_rate, 10.0),
    "G-gram path at a tenth of the rate": functools.partial(change_ngram_rate, 0.1),
    "G-gram embeddings begin at random": keep_ngrams_random,
}

if __name__ == "__main__":
    at = sys.argv.index("--lever")
    _, name = sys.argv[at : at + 2]
    del sys.argv[at : at + 2]
    LEVERS[name]()
    exit_process(main())
