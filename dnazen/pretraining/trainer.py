"""Hugging Face's Trainer on packed batches, with exact normalisation and exact resume."""

import copy
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import SchedulerType

from dnazen.batches.collator import PackedDataset, move_batch
from dnazen.batches.sampler import MicroBatchSampler
from dnazen.evaluation.held_out import choose_sequences, evaluation_batches, score_logits
from dnazen.evaluation.targets import Spelling
from dnazen.files import InputError
from dnazen.ngram.vocab import NgramVocabulary
from dnazen.pretraining.checkpoint import (
    FINGERPRINT_KEY,
    FORMAT,
    Checkpoint,
    check_fingerprint,
    rotate_checkpoints,
    seal_checkpoint,
)
from dnazen.pretraining.deepspeed import (
    convert_to_universal,
    group_settings,
    load_universal,
    pickle_stages_by_value,
    restore_groups,
    separate_steps,
)
from dnazen.pretraining.meter import Meter, sum_over_processes
from dnazen.pretraining.muon import MuonAdamW, count_parts
from dnazen.pretraining.prefetch import Prefetcher
from dnazen.pretraining.start import is_residual_output
from dnazen.pretraining.training_arguments import ADAMW, MUON, PretrainingArguments
from dnazen.training.dropout import DropoutOfItsOwn
from dnazen.training.gradients import NormAtOnce
from dnazen_kernels._runtime import resolve_impl

Batch = dict[str, torch.Tensor | int]
DECAY_SHARE = 0.2  # of the steps, in the schedule `warmup_stable_decay`
# what a checkpoint says of a run, before its first step
_BEGINNING = {"step": 0, "position": 0, "totals": (0, 0, 0, 0), "train_seconds": 0.0}


def _set_apart(
    optimizer: torch.optim.Optimizer, chosen: set[int], rate: float, parts: dict[int, int] | None = None
) -> None:
    """Move the parameters with these ids from each group to one of its own, with a share of its rate.

    Args:
        parts: by id, the number of matrices in a parameter, which makes the new groups Muon's.
    """
    for group in list(optimizer.param_groups):
        apart = [parameter for parameter in group["params"] if id(parameter) in chosen]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        if apart:
            muons = {"parts": [parts[id(parameter)] for parameter in apart]} if parts else {}
            optimizer.add_param_group({**group, **muons, "params": apart, "lr": group["lr"] * rate})
    # DeepSpeed would leave them out, and then there would be fewer than were made
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _add_decay(args: PretrainingArguments) -> dict[str, Any]:
    """The arguments of the schedule `warmup_stable_decay`, with the steps of its decay if they are not given.

    Raises:
        InputError: warm-up and decay together take more steps than there are.
    """
    given = {"num_decay_steps": math.ceil(DECAY_SHARE * args.max_steps)} | (args.lr_scheduler_kwargs or {})
    warmup, decay = args.get_warmup_steps(args.max_steps), given["num_decay_steps"]
    if warmup + decay > args.max_steps:
        raise InputError(
            f"--lr-scheduler-type {args.lr_scheduler_type.value}: expected at most {args.max_steps} steps, found "
            f"{warmup} of warm-up and {decay} of decay"
        )
    return given


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
        args: copied; in the copy `max_steps`, if not set, is computed from `num_train_epochs`.
        train_dataset, eval_dataset: packed splits; the evaluation's masking never changes.
        vocabulary: saved with the model.
        max_batch_tokens: token budget of a micro-batch.
        run_fingerprint: what a run and the checkpoint it resumes from must have in common; JSON values.
        residual_learning_rate: of the ways out of the sub-layers, as a share of `args.learning_rate`.
        checkpoint: the one to resume from, or None.
        **kwargs: Trainer's own arguments.

    Raises:
        InputError: the checkpoint belongs to another run, or the schedule has more steps than the run.
    """

    def __init__(
        self,
        *,
        args: PretrainingArguments,
        train_dataset: PackedDataset,
        eval_dataset: PackedDataset,
        vocabulary: NgramVocabulary,
        max_batch_tokens: int,
        run_fingerprint: dict[str, Any],
        residual_learning_rate: float = 1.0,
        checkpoint: Checkpoint | None = None,
        **kwargs,
    ):
        if checkpoint is not None:
            check_fingerprint(checkpoint, run_fingerprint)
        resumed = checkpoint.manifest if checkpoint else _BEGINNING
        self.vocabulary, self.run_fingerprint = vocabulary, run_fingerprint
        self.residual_learning_rate = residual_learning_rate
        self.resumed_step, self.resumed_position = resumed["step"], resumed["position"]
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
        args = copy.copy(args)
        if args.max_steps <= 0:
            args.max_steps = self._steps_of(args.num_train_epochs)
        self.sampler.set_steps(self.resumed_step, self.micro_batches_per_step, args.max_steps)
        if args.optim == MUON:
            adamw = copy.copy(args)
            adamw.optim = ADAMW
            kwargs["optimizer_cls_and_kwargs"] = MuonAdamW, Trainer.get_optimizer_cls_and_kwargs(adamw)[1]
        if args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
            args.lr_scheduler_kwargs = _add_decay(args)
        # our sampler starts at the checkpoint's position, so Trainer must not skip batches by itself
        args.ignore_data_skip = True
        super().__init__(args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.add_callback(FinishWhole())
        self.add_callback(NormAtOnce())
        self.add_callback(DropoutOfItsOwn())
        self.meter = Meter(args.device, args.world_size, resumed["totals"], resumed["train_seconds"])
        self.model.ngram_json = vocabulary.to_dict(self.processing_class)  # saved beside the weights
        sample = choose_sequences(eval_dataset.split)._replace(num_maskings=1)
        self.eval_micro_batches = evaluation_batches(eval_dataset.split, [sample], max_batch_tokens)
        self._token_bases = torch.from_numpy(Spelling(self.processing_class).lengths).to(args.device)
        self._staging: Path | None = None
        if args.torch_compile:
            self._compile_layers()
        self._prepare_deepspeed(checkpoint)
        # where the kernels run, training batches are matched and masked there, a step ahead
        impl = self.model.config.impl
        makes_batches = resolve_impl(impl, args.device) == "triton"
        self.prefetcher = Prefetcher(train_dataset, self.sampler, args.device, impl) if makes_batches else None

    def _compile_layers(self) -> None:
        """By parts; Trainer would compile the whole model, whose shapes depend on the data."""
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        self.model.compile_layers(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)

    def _prepare_deepspeed(self, checkpoint: Checkpoint | None) -> None:
        """Plain pickles in its checkpoints; and one that other processes wrote is loaded in its universal form."""
        self._loads_universal = (
            self.is_deepspeed_enabled
            and checkpoint is not None
            and checkpoint.manifest["world_size"] != self.args.world_size
            and self.resumed_step < self.args.max_steps
        )
        if self.is_deepspeed_enabled:
            pickle_stages_by_value()
        if self._loads_universal:
            if self.is_world_process_zero():
                convert_to_universal(checkpoint.path)
            self.accelerator.wait_for_everyone()
            load_universal(self.accelerator.state.deepspeed_plugin.deepspeed_config)

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
        return self._loader(self.prefetcher.unmatched if self.prefetcher else self.train_dataset, self.sampler)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """The micro-batches of one step on this process, and the number of masked tokens over all processes."""
        self.meter.start()
        take = self.prefetcher.take if self.prefetcher else itertools.islice
        batches, masked = [], 0
        for batch, num_ngrams_cut in take(epoch_iterator, num_batches):
            masked += self.meter.count_batch(batch, num_ngrams_cut)
            batches.append(move_batch(batch, self.args.device))
        masked = torch.full((), masked, dtype=torch.int64, device=self.args.device)
        return batches, sum_over_processes(masked, self.args.world_size)

    # -- one step -----------------------------------------------------------------------------------------------------

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns `world_size` times its share of the step's loss."""
        model.train()
        outputs = model(**self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        self.meter.count_hidden(inputs, outputs.logits, self.processing_class.mask_token_id)
        # gradients and logged losses are averaged over processes, but the shares must be summed
        loss = loss * self.args.world_size
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
        return loss.detach()

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
                f"{self.args.output_dir} is good. A lower --learning-rate or more --warmup-steps may help."
            )
        return norm

    # -- evaluation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss (nats), accuracy and bits per base of held-out tokens, all of them hidden; the same ones every time."""
        with self.meter.pause():
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._score_held_out().items()}
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _score_held_out(self) -> dict[str, float]:
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
        loss, correct, masked, bases = sum_over_processes(totals, world_size).tolist()
        return {
            "loss": loss / max(masked, 1),
            "accuracy": correct / max(masked, 1),
            "bits_per_base": loss / math.log(2) / max(bases, 1),
            "masked_tokens": int(masked),
        }

    # -- logs ---------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the data epoch and, to training logs, what the meter says."""
        self.state.epoch = self.sampler.epoch_at(self.position())
        if "loss" in logs:
            logs |= self.meter.read()
            if self.vocabulary.max_ngrams is None:
                del logs["ngrams_cut"]
        super().log(logs, start_time)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Hugging Face's groups, with weight decay and without; of each, apart, what has another rate or optimizer."""
        is_new = self.optimizer is None  # Trainer calls this twice under DeepSpeed
        optimizer = super().create_optimizer(model)
        if is_new:
            named = dict(self.model.named_parameters())
            residual = {id(parameter) for name, parameter in named.items() if is_residual_output(name)}
            parts = {id(parameter): count_parts(name, parameter) for name, parameter in named.items()}
            if self.residual_learning_rate != 1:
                _set_apart(optimizer, residual, self.residual_learning_rate)
            if self.args.optim == MUON:
                own = self.args.muon_learning_rate
                rate = 1.0 if own is None else own / self.args.learning_rate
                _set_apart(optimizer, {key for key, count in parts.items() if count}, rate, parts)
        self._group_settings = group_settings(optimizer)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._loads_universal:
            restore_groups(self.optimizer, self._group_settings, self.lr_scheduler.get_last_lr())
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
        with self.meter.pause():
            self._write_checkpoint(model, trial, Path(self.args.output_dir), f"checkpoint-{self.state.global_step}")

    def _write_checkpoint(self, model: torch.nn.Module, trial: Any, output_dir: Path, name: str) -> None:
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
                "totals": self.meter.totals.tolist(),
                "train_seconds": self.meter.train_seconds,
                FINGERPRINT_KEY: self.run_fingerprint,
            }
            seal_checkpoint(staging / name, output_dir / name, state)
            staging.rmdir()
            rotate_checkpoints(output_dir, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()
