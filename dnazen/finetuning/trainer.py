"""Hugging Face's Trainer for fine-tuning: our batches and loss, and the best model on dev kept."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from dnazen.finetuning.logits import compute_logits
from dnazen.finetuning.preprocessing import Encoded, Preprocessor
from dnazen.finetuning.tasks import Task
from dnazen.training.dropout import DropoutOfItsOwn
from dnazen.training.gradients import NormAtOnce


class FinetuningTrainer(Trainer):
    """Trains on batches of `per_device_train_batch_size` sequences, packed; keeps the model that is best on dev.

    The best model so far lies in `best_dir`, whole, replaced by a better one; there are no other checkpoints.

    Args:
        preprocessor: makes the batches.
        task: for loss and metrics.
        train, dev: the encoded rows and their labels.
        class_weights: one for each class, or None.
    """

    def __init__(
        self, *, preprocessor: Preprocessor, task: Task, train: tuple[Encoded, list[np.ndarray]],
        dev: tuple[Encoded, list[np.ndarray]], class_weights: list[float] | None, **kwargs: Any,
    ):  # fmt: skip
        collate = preprocessor.make_collator()

        def collate_rows(rows: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
            input_ids, labels = zip(*rows)
            return {**collate(list(input_ids)), "labels": task.stack(labels)}

        dataset = list(zip(train[0].input_ids, task.align(train[1], train[0].bases), strict=True))
        super().__init__(train_dataset=dataset, eval_dataset=dev[0].input_ids, data_collator=collate_rows, **kwargs)
        self.add_callback(NormAtOnce())
        self.add_callback(DropoutOfItsOwn())
        self.preprocessor, self.task = preprocessor, task
        self.dev_labels = task.stack(task.align(dev[1], dev[0].bases))
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, device=self.args.device)
        self.loss_is_scaled_for_ga = False  # ours is a mean over the batch
        self.best_dir = Path(self.args.output_dir) / ".best.tmp"

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The task's loss, weighted by class."""
        labels = inputs.pop("labels")
        return self.task.loss(model(**inputs).logits, labels, self.class_weights)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Loss and metrics on dev; every process runs all of it, and the first one's figures count.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        model = self.model_wrapped
        model.eval()
        logits = compute_logits(model, self.preprocessor, self.task, self.eval_dataset)
        stacked = self.task.stack_logits(logits)
        loss = float(self.task.loss(torch.from_numpy(stacked), self.dev_labels))
        if not math.isfinite(loss):
            step = self.state.global_step
            raise FloatingPointError(f"step {step}: the loss on dev is {loss}; try a lower --learning-rate")
        metrics = {**self.task.metrics(stacked, self.dev_labels.numpy()), "loss": loss}
        (metrics,) = broadcast_object_list([{f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}])
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.preprocessor.save(output_dir)
            # a pickle that nothing here reads, and peft's empty model card
            for name in (TRAINING_ARGS_NAME, "README.md"):
                (Path(output_dir) / name).unlink(missing_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Called when dev has never been better: the model alone, in place of the last best one."""
        if self.is_world_process_zero():
            shutil.rmtree(self.best_dir, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.save_model(str(self.best_dir), _internal_call=True)
