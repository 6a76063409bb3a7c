"""Hugging Face's Trainer on packed batches, with exact normalisation and exact resume."""

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DynamoBackend
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import MaskedLMOutput
from transformers.trainer import TRAINING_ARGS_NAME

from dnazen.batches.collator import PackedDataset, move_batch
from dnazen.batches.device import DeviceBatch, measure_capacity
from dnazen.batches.sampler import SPECIAL_TOKENS_PER_SEQUENCE, MicroBatch, MicroBatchSampler
from dnazen.evaluation.baselines import Spelling
from dnazen.evaluation.held_out import choose_sequences, evaluation_batches, score_logits
from dnazen.ngram.vocab import NgramVocabulary
from dnazen.pretraining.checkpoint import (
    FORMAT,
    Checkpoint,
    check_agreement,
    convert_to_universal,
    rotate_checkpoints,
    seal_checkpoint,
    separate_steps,
)
from dnazen.pretraining.start import is_residual_output
from dnazen.training.gradients import NormAtOnce
from dnazen_kernels._runtime import resolve_impl

Batch = dict[str, torch.Tensor | int]
CAPACITY_BATCHES = 64  # of the first epoch, on which the room in a batch made on a device is measured


class FinishWhole(TrainerCallback):
    """The last step is evaluated and saved, whatever the strategies; each checkpoint is preceded by a log.

    A logged loss is a mean since the last log, so that a log at each checkpoint makes those of a resumed run exact.
    """

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        if control.should_save:
            control.should_log = True
        return control


class PretrainingTrainer(Trainer):
    """Trains `DNAZenForMaskedLM` on micro-batches packed to a token budget.

    The loss of a step is the sum over the masked tokens of all its micro-batches on all processes, divided by their
    number (not a mean of means). Data order and position do not depend on the number of processes.

    Args:
        args: with `max_steps` not set, it is computed from `num_train_epochs`.
        train_dataset, eval_dataset: packed splits; the evaluation's masking never changes.
        vocabulary: saved with the model.
        max_batch_tokens: token budget of a micro-batch.
        agreement: what a run and the checkpoint it resumes from must have in common; JSON values.
        residual_learning_rate: of the ways out of the sub-layers, as a share of `args.learning_rate`.
        checkpoint: the one to resume from, or None.
        **kwargs: Trainer's own arguments.
    """

    def __init__(
        self,
        *,
        args: TrainingArguments,
        train_dataset: PackedDataset,
        eval_dataset: PackedDataset,
        vocabulary: NgramVocabulary,
        max_batch_tokens: int,
        agreement: dict[str, Any],
        residual_learning_rate: float = 1.0,
        checkpoint: Checkpoint | None = None,
        **kwargs,
    ):
        self.resumed_step = self.resumed_position = 0
        self.residual_learning_rate = residual_learning_rate
        self.totals = np.zeros(4, dtype=np.int64)  # tokens, maskable tokens, masked tokens, G-grams cut by the cap
        self.train_seconds = 0.0
        if checkpoint is not None:
            manifest = checkpoint.manifest
            check_agreement(checkpoint.path, manifest["agreement"], agreement)
            self.resumed_step, self.resumed_position = manifest["step"], manifest["position"]
            self.totals += manifest["totals"]
            self.train_seconds = manifest["train_seconds"]
        self.sampler = MicroBatchSampler(
            train_dataset.split.lengths,
            max_batch_tokens,
            args.seed,
            start=self.resumed_position,
            rank=args.process_index,
            world_size=args.world_size,
        )
        # all processes together take so many in one optimizer step
        self.micro_batches_per_step = args.world_size * args.gradient_accumulation_steps
        if args.max_steps <= 0:
            args.max_steps = self._steps_of(args.num_train_epochs)
        # our sampler starts at the checkpoint's position, so Trainer must not skip batches by itself
        args.ignore_data_skip = True
        super().__init__(args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        if args.torch_compile:
            # by parts; Trainer would compile the whole model, whose shapes depend on the data
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
            self.model.compile_layers(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self.vocabulary, self.agreement = vocabulary, agreement
        self.model.ngram_json = vocabulary.to_dict(self.processing_class)  # saved beside the weights
        sequences, _ = choose_sequences(eval_dataset.split)
        self.eval_micro_batches = evaluation_batches(eval_dataset.split, sequences, max_batch_tokens, num_maskings=1)
        self._token_bases = torch.from_numpy(Spelling(self.processing_class).lengths).to(args.device)
        # loss and number of the hidden targets of this process since the last log
        self._hidden = torch.zeros(2, dtype=torch.float64, device=args.device)
        self.add_callback(FinishWhole())
        self.add_callback(NormAtOnce())
        self._universal = (
            self.is_deepspeed_enabled
            and checkpoint is not None
            and checkpoint.manifest["world_size"] != args.world_size
            and self.resumed_step < args.max_steps
        )
        if self._universal:
            self._prepare_universal(checkpoint.path)
        if self.is_deepspeed_enabled:
            from deepspeed.runtime.zero.config import ZeroStageEnum

            # early versions of Python 3.11 pickle it by a call of `getattr`, which a checkpoint must not hold
            ZeroStageEnum.__reduce_ex__ = lambda stage, protocol: (type(stage), (stage.value,))
        self._staging: Path | None = None
        self._paused_seconds = 0.0  # time of this logging interval that was not training
        self._logged_at: float | None = None
        self._interval = np.zeros_like(self.totals)
        # where the kernels run, training batches are matched and masked there, a step ahead
        self.capacity: tuple[int, int] | None = None
        self._ahead: list[DeviceBatch] | None = None
        if resolve_impl(self.model.config.impl, args.device) == "triton":
            runs = self.sampler.micro_batches(0)
            chosen = np.unique(np.linspace(0, len(runs) - 1, CAPACITY_BATCHES).astype(int))
            self.capacity = measure_capacity(train_dataset, (MicroBatch(0, runs[index]) for index in chosen))
            self._collator = train_dataset.collator.to(args.device)

    # -- data ---------------------------------------------------------------------------------------------------------

    def _steps_of(self, epochs: float) -> int:
        whole = int(epochs)
        end = self.sampler.end_of_epoch(whole - 1) if whole else 0
        end += (epochs - whole) * (self.sampler.end_of_epoch(whole) - end)
        return max(1, int(end) // self.micro_batches_per_step)

    def position(self) -> int:
        """Micro-batches that all processes together have consumed since the beginning of the run."""
        return self.resumed_position + (self.state.global_step - self.resumed_step) * self.micro_batches_per_step

    def schedule(self) -> dict[str, int]:
        """What a resumed run may change, but not in silence."""
        return {"max_steps": self.args.max_steps, "micro-batches of a step": self.micro_batches_per_step}

    def _loader(self, dataset: PackedDataset, sampler: Any) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0 and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            # its own generator: drawing worker seeds must not touch the generator that drop-out uses
            generator=torch.Generator(),
        )

    def get_train_dataloader(self) -> DataLoader:
        dataset = self.train_dataset
        if self.capacity is not None:
            dataset = PackedDataset(dataset.split, dataset.collator, match=False)
        return self._loader(dataset, self.sampler)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """The micro-batches of one step on this process, and the number of masked tokens over all processes."""
        if self._logged_at is None:
            self._logged_at, self._paused_seconds = time.perf_counter(), 0.0
        items = itertools.islice(epoch_iterator, num_batches)
        if self.capacity is not None:
            launched = self._launch(items) if self._ahead is None else self._ahead
            items = [batch.result() for batch in launched]
            self._ahead = self._launch(itertools.islice(epoch_iterator, num_batches))
        batches, masked = [], 0
        for batch, num_dropped in items:
            count = len(batch["masked_positions"])
            tokens = batch["input_ids"].numel()
            special = SPECIAL_TOKENS_PER_SEQUENCE * (batch["cu_seqlens"].numel() - 1)
            self._interval += [tokens, tokens - special, count, num_dropped]
            batches.append(move_batch(batch, self.args.device))
            masked += count
        return batches, self._sum_over_processes(torch.full((), masked, dtype=torch.int64, device=self.args.device))

    def _launch(self, items: Iterable[tuple[Batch, int]]) -> list[DeviceBatch]:
        impl, device = self.model.config.impl, self.args.device
        return [DeviceBatch(self._collator, move_batch(batch, device), self.capacity, impl) for batch, _ in items]

    def _sum_over_processes(self, value: torch.Tensor) -> torch.Tensor:
        if self.args.world_size > 1:
            torch.distributed.all_reduce(value)
        return value

    # -- one step -----------------------------------------------------------------------------------------------------

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns `world_size` times its share of the step's loss."""
        model.train()
        outputs = model(**self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        self._count_hidden(inputs, outputs)
        # gradients and logged losses are averaged over processes, but the shares must be summed
        loss = loss * self.args.world_size
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
        return loss.detach()

    @torch.no_grad()
    def _count_hidden(self, inputs: Batch, outputs: MaskedLMOutput) -> None:
        """Add to the loss of hidden targets: those shown as they are, or as another token, tell nothing of prediction."""
        positions = inputs["masked_positions"]
        hidden = inputs["input_ids"].index_select(0, positions) == self.processing_class.mask_token_id
        labels = inputs["labels"].index_select(0, positions)
        losses = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="none")
        self._hidden += torch.stack([(losses * hidden).sum(), hidden.sum()])

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | float | None = None) -> float:
        """The gradient's norm before clipping.

        Raises:
            FloatingPointError: it is not finite. The optimizer has not stepped: without DeepSpeed it steps after
                this; DeepSpeed skips the step of such a gradient by itself and reports the norm as infinite.
        """
        norm = float(super()._get_grad_norm(model, grad_norm))
        if not math.isfinite(norm) and not self.args.fp16:
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: the gradient norm is {norm} (loss since the last log "
                f"{self._tr_loss.item():g}); stopped before the optimizer step; the last checkpoint in "
                f"{self.args.output_dir} is good. A lower --learning_rate or more --warmup_steps may help."
            )
        return norm

    # -- evaluation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss (nats), accuracy and bits per base of held-out tokens, all of them hidden; the same ones every time."""
        started = time.perf_counter()
        model = self.model_wrapped
        model.eval()
        micro_batches = self.eval_micro_batches
        rank, world_size = self.args.process_index, self.args.world_size
        rounds = math.ceil(len(micro_batches) / world_size)
        # processes without a micro-batch in the last round repeat one and count nothing: ZeRO-3 needs them in step
        mine = [min(index * world_size + rank, len(micro_batches) - 1) for index in range(rounds)]
        totals = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        loader = self._loader(self.eval_dataset, [micro_batches[i] for i in mine])
        self.callback_handler.eval_dataloader = loader  # the progress bar's length
        for index, (batch, _) in enumerate(loader):
            batch = move_batch(batch, self.args.device)
            labels = batch["labels"].index_select(0, batch["masked_positions"])
            losses, correct = score_logits(model(**batch).logits, labels)
            counts = index * world_size + rank < len(micro_batches)
            bases = self._token_bases.index_select(0, labels)
            totals += counts * torch.stack([losses.sum(), correct.sum(), torch.ones_like(labels).sum(), bases.sum()])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss, correct, masked, bases = self._sum_over_processes(totals).tolist()
        metrics = {
            f"{metric_key_prefix}_loss": loss / max(masked, 1),
            f"{metric_key_prefix}_accuracy": correct / max(masked, 1),
            f"{metric_key_prefix}_bits_per_base": loss / math.log(2) / max(bases, 1),
            f"{metric_key_prefix}_masked_tokens": int(masked),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._paused_seconds += time.perf_counter() - started
        return metrics

    # -- logs ---------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the data epoch and, to training logs, the loss of hidden targets, unpadded tokens/s and the mask rate."""
        self.state.epoch = self.sampler.epoch_at(self.position())
        if "loss" in logs:
            now = time.perf_counter()
            seconds = now - self._logged_at - self._paused_seconds
            counts = torch.from_numpy(self._interval).to(self.args.device, copy=True)
            counts = self._sum_over_processes(counts).cpu().numpy()
            tokens, maskable, masked, dropped = counts.tolist()
            hidden_loss, hidden = self._sum_over_processes(self._hidden).tolist()
            self._hidden.zero_()
            logs |= {"hidden_loss": hidden_loss / hidden} if hidden else {}
            logs |= {"tokens_per_second": tokens / seconds, "mask_rate": masked / max(maskable, 1)}
            if self.vocabulary.max_ngrams is not None:
                logs["ngrams_cut"] = dropped
            self.totals += counts
            self.train_seconds += seconds
            self._interval[:] = 0
            self._logged_at, self._paused_seconds = now, 0.0
        super().log(logs, start_time)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _prepare_universal(self, checkpoint: Path) -> None:
        if self.is_world_process_zero():
            convert_to_universal(checkpoint)
        self.accelerator.wait_for_everyone()
        self.accelerator.state.deepspeed_plugin.deepspeed_config.setdefault("checkpoint", {})["load_universal"] = True

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Hugging Face's groups (with weight decay and without), and apart from them the ways out of the sub-layers."""
        is_new = self.optimizer is None  # Trainer calls this twice under DeepSpeed
        optimizer = super().create_optimizer(model)
        if is_new and self.residual_learning_rate != 1:
            residual = {id(p) for name, p in self.model.named_parameters() if is_residual_output(name)}
            for group in list(optimizer.param_groups):
                apart = [parameter for parameter in group["params"] if id(parameter) in residual]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in residual]
                rate = group["lr"] * self.residual_learning_rate
                optimizer.add_param_group({**group, "params": apart, "lr": rate})
        self._weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self._universal:
            return
        # DeepSpeed 0.19 loads the first group's settings into every group, so that biases and norms would decay too, and all
        # learn at one rate ...
        rates = self.lr_scheduler.get_last_lr()
        for group, weight_decay, rate in zip(self.optimizer.param_groups, self._weight_decays, rates, strict=True):
            group["weight_decay"], group["lr"] = weight_decay, rate
        # ... and under ZeRO-3 one step counter, shared by all groups and so advanced by each of them; on the CPU, too
        separate_steps(self.model_wrapped.optimizer.optimizer)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # a pickle that nothing here reads; run.json holds the arguments
            (Path(output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Trainer's checkpoint, written under a temporary name and renamed when it is whole."""
        started = time.perf_counter()
        output_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._staging = output_dir / f".{name}.tmp"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch and safetensors name no file when the disk is full
            raise OSError(f"{output_dir / name}: the checkpoint could not be written: {error}") from error
        finally:
            staging, self._staging = self._staging, None
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            state = {
                "format": FORMAT,
                "step": self.state.global_step,
                "position": self.position(),
                "world_size": self.args.world_size,
                "schedule": self.schedule(),
                "totals": self.totals.tolist(),
                "train_seconds": self.train_seconds,
                "agreement": self.agreement,
            }
            seal_checkpoint(staging / name, output_dir / name, state)
            staging.rmdir()
            rotate_checkpoints(output_dir, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()
        self._paused_seconds += time.perf_counter() - started
