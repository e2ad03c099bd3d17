"""transformers' Trainer with our loss, parameter groups, sampling order and form of checkpoints; nothing else is replaced.

A checkpoint during a stage holds only what trains, is written beside and renamed, and records where its curricula stood.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import is_tensorboard_available
from transformers.trainer_utils import rotate_checkpoints

from diffvl.config.recipe import Recipe, Stage
from diffvl.data.collate import NO_SAMPLE, PROBLEMS, is_filler
from diffvl.data.left_out import LeftOut
from diffvl.data.loader import SampleDataset, batches_of, num_workers
from diffvl.data.problems import Problem
from diffvl.dtypes import has_bf16
from diffvl.errors import CheckpointError, DiskError, TrainingError
from diffvl.objective.losses import Draw, LossOutput, curriculum_state, loss_of, measure, measured_sums, rates, scores
from diffvl.seeding import sample_generator
from diffvl.store import checkpoint
from diffvl.store.files import Writing, share
from diffvl.store.weights import not_finite
from diffvl.train.launch import PATIENCE, agreed, gathered, local_processes
from diffvl.train.parts import parameter_groups

CHECKPOINTS = "checkpoints"
TRAINABLE_FILE = "model.safetensors"
CURRICULUM_FILE = "curriculum.json"
STAGING = "saving"  # under CHECKPOINTS: a checkpoint that has no name yet
SHOWN_RECORDS = 5  # of a step that went wrong


class StepSampler(Sampler[int]):
    """Epochs as permutations seeded by (seed, epoch). An epoch's last step is filled from its beginning: every step has the
    same rows, however it is cut into micro-steps and processes (left alone, each process count fills it differently)."""

    def __init__(self, rows: int, per_step: int, seed: int, steps_done: Callable[[], int]) -> None:
        """`steps_done` gives the optimiser steps done, from which the epoch follows. (The loader's `set_epoch` does not reach a
        sampler inside a shard of a resumed epoch.)"""
        self.rows, self.per_step, self.seed, self.steps_done = rows, per_step, seed, steps_done
        self.length = -(-rows // per_step) * per_step

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        epoch = self.steps_done() // (self.length // self.per_step)
        order = torch.randperm(self.rows, generator=sample_generator(self.seed, epoch, sample=-1)).tolist()
        return (order[place % self.rows] for place in range(self.length))


class StageTrainer(Trainer):
    """transformers' Trainer with our loss, parameter groups and checkpoint form."""

    model: Any
    data_collator: Any

    def __init__(self, recipe: Recipe, stage: Stage, left_out: LeftOut, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.recipe, self.stage, self.left_out = recipe, stage, left_out
        self.same_data = True  # as the run began with
        # `num_items_in_batch` then counts the labels (answer tokens) of the whole optimiser step, over all processes.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens = 0
        self._since = time.monotonic()
        self._step_samples: list[torch.Tensor] = []
        self._bad_loss: TrainingError | None = None
        self._resumed_from: Path | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        rows: SampleDataset = self.train_dataset  # type: ignore[assignment]
        return StepSampler(len(rows), rows_per_step(self.args), self.recipe.seed, lambda: self.state.global_step)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        problems = [problem for batch in samples for problem in batch.pop(PROBLEMS, ())]
        self._step_samples = [batch["sample"] for batch in samples]
        self._leave_out(problems, sum(not is_filler(batch) for batch in samples), self.state.global_step + 1)
        return samples, count

    def _leave_out(self, problems: list[Problem], used: int, step: int) -> None:
        """Takes note of the records that could not be used. All processes learn of all of them, so that they stop together.

        Args:
            used: batches in which a record could.
        """
        of_all = self._over_processes([float(len(problems)), float(used)]) if self.args.world_size > 1 else [len(problems), used]
        if of_all[0]:
            self.left_out.add(gathered(problems), int(of_all[1]), step)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> torch.Tensor:
        """The stage's objective on one micro-batch, over the answer tokens of the whole step."""
        step = self.state.global_step
        draw = Draw(self.recipe.seed, step, self._progress())
        # The wrapped model's forward runs under autocast by itself; here too, so that masks are made in its type.
        with self.accelerator.autocast():
            output = loss_of(model, self.model.config, inputs, self.stage.objective, draw)
        if is_filler(inputs):
            return 0.0 * output.loss
        if not torch.isfinite(output.loss):
            self._bad_loss = self._bad_loss or self._not_finite("loss", output.loss, [inputs["sample"]])
            if self.args.world_size == 1:  # others would wait for this process's gradients: it stops with them, before the step
                raise self._bad_loss
        self._count(output)
        return output.loss * self.accelerator.num_processes / num_items_in_batch

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm; one that is not finite stops the run before the step spoils every weight, and a checkpoint with them."""
        norm = torch.as_tensor(super()._get_grad_norm(model, grad_norm))
        bad = self._bad_loss
        if bad is None and not torch.isfinite(norm):
            bad = self._not_finite("norm of the gradient", norm, self._step_samples)
        # Any process's bad loss has reached the norm of all; an infinite one with finite gradients is its own affair.
        if self.args.world_size > 1 and not self._over_processes([float(bad is not None)])[0]:
            return norm
        agreed(partial(_raise, bad))
        return norm

    def _not_finite(self, what: str, value: torch.Tensor, samples: list[torch.Tensor]) -> TrainingError:
        """Names the step as metrics.jsonl counts it, and the weight that is to blame; where none is, the samples by their index,
        and some of them by file and line."""
        if spoilt := not_finite(self.model):
            return TrainingError(
                f"step {self.state.global_step + 1}: the {what} is {value.item()}, and so is a weight: {spoilt}. The records are "
                "not to blame: begin again from a sound checkpoint under another --out"
            )
        rows: SampleDataset = self.train_dataset  # type: ignore[assignment]
        ids = [index for index in torch.cat(samples).tolist() if index != NO_SAMPLE]
        places = [rows.records[index].source for index in ids[:SHOWN_RECORDS]]
        return TrainingError(
            f"step {self.state.global_step + 1}: the {what} is {value.item()} on samples {ids} ({', '.join(places)}"
            f"{' ...' if len(ids) > len(places) else ''}); the last good checkpoint is kept, and --resume goes on from it. If it "
            "happens again, look at these records, or begin again with a lower learning rate under another --out"
        )

    def _progress(self, before: int = 0) -> float:
        """Optimiser steps done / steps of the stage, what curricula go by; so many steps before now."""
        return (self.state.global_step - before) / max(self.state.max_steps, 1)

    def _count(self, output: LossOutput) -> None:
        for name, value in output.sums.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._tokens += output.tokens

    def _over_processes(self, values: list[float]) -> list[float]:
        """Sums each value over all processes."""
        summed: Any = self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.args.device), reduction="sum")
        return summed.tolist()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            settings = self.stage.optim
            # Fused: one kernel per tensor, and no temporaries as large as the model.
            self.optimizer = torch.optim.AdamW(
                parameter_groups(model or self.model, self.stage),
                betas=(settings.beta1, settings.beta2),
                eps=settings.epsilon,
                fused=True,
            )
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was counted since the last line: mask ratio, accuracy, tokens per second."""
        if "loss" in logs:
            # By the objective's names: a process of which every record was left out has counted nothing.
            names = measured_sums(self.stage.objective)
            totals = self._over_processes([*(float(self._sums.get(name, 0.0)) for name in names), float(self._tokens)])
            logs.update(rates(dict(zip(names, totals[:-1], strict=True))))
            logs["tokens_per_second"] = totals[-1] / max(time.monotonic() - self._since, 1e-9)
            # Where the curricula stood in the step that is reported, which is counted already.
            logs.update(curriculum_state(self.stage.objective, self._progress(before=1)))
            logs["learning_rate"] = max(group["lr"] for group in self.optimizer.param_groups)
            if self.left_out:
                logs["left_out"] = len(self.left_out)
            # Not by an evaluation's line, which comes in between.
            self._sums, self._tokens, self._since = {}, 0, time.monotonic()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The fixed held-out measure (`objective.measure`), shared among processes."""
        held_out: SampleDataset = self.eval_dataset  # type: ignore[assignment]
        count = min(len(held_out), self.stage.eval_limit)
        places = range(self.args.process_index, count, self.args.world_size)
        problems: list[Problem] = []
        batches = batches_of(held_out, list(places), self.args.per_device_train_batch_size, self.data_collator, problems)
        self.model.eval()
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            sums = measure(self.model, self.model.config, map(self._prepare_inputs, batches), self.stage.objective)
        self._leave_out(problems, 0, self.state.global_step)
        # A process without a share of the records adds zeros: all of them must join in the sum.
        names = measured_sums(self.stage.objective)
        totals = self._over_processes([float(sums.get(name, 0.0)) for name in names])
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in scores(dict(zip(names, totals, strict=True))).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _init_training_state(self, *arguments: Any, **named: Any) -> tuple[int, int]:
        """The epoch to go on with; behind the last one where all steps are done already (the run was killed after its last
        checkpoint), because the loop would take one step more."""
        epoch, batches = super()._init_training_state(*arguments, **named)
        if self._resumed_from is not None and self.same_data:
            self._require_same_curriculum(self._resumed_from / CURRICULUM_FILE)
        self.left_out.begin(self.state.global_step)
        return (sys.maxsize, 0) if self.state.global_step >= self.state.max_steps else (epoch, batches)

    # Checkpoints hold what trains; the rest is bit-identical in the directory that the stage started from.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            values = state_dict or {name: parameter.detach() for name, parameter in self.model.named_parameters()}
            trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            kept = {name: value.contiguous() for name, value in values.items() if name in trainable}
            with Writing(folder):
                save_file(kept, folder / TRAINABLE_FILE, metadata={"format": "pt"})
                share(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._resumed_from = Path(resume_from_checkpoint)
        saved = load_file(self._resumed_from / TRAINABLE_FILE)
        trainable = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if saved.keys() != trainable.keys():
            odd = sorted(saved.keys() ^ trainable.keys())
            raise CheckpointError(f"{resume_from_checkpoint}: holds other parameters than this stage trains: {odd[:5]}")
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(saved[name])

    def _curriculum(self) -> dict[str, float]:
        state = curriculum_state(self.stage.objective, self._progress())
        return {"step": self.state.global_step, "steps": self.state.max_steps, **state}

    def _require_same_curriculum(self, file: Path) -> None:
        """Raises CheckpointError unless the curricula go on where the checkpoint left them: with another number of steps, or
        other data, they would jump."""
        saved = checkpoint.read_json(file)
        if saved != self._curriculum():
            raise CheckpointError(
                f"{file}: the curriculum stood at {saved}, this run would go on at {self._curriculum()}; resume with the "
                "settings and the data that the run began with"
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes into a staging folder and renames, so that every folder named checkpoint-N is whole."""
        run_dir = Path(str(self.args.output_dir))
        staging = run_dir / STAGING
        if self.args.should_save and staging.exists():
            shutil.rmtree(staging)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            with Writing(run_dir):
                super()._save_checkpoint(model, trial)
        except DiskError:
            shutil.rmtree(staging, ignore_errors=True)  # the room that it takes may be what is needed to go on
            raise
        finally:
            del self._staging
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            checkpoint.replace_text(staging / name / CURRICULUM_FILE, json.dumps(self._curriculum()))
            checkpoint.sync(staging / name)
            if not (run_dir / name).exists():
                (staging / name).rename(run_dir / name)
            shutil.rmtree(staging)
            rotate_checkpoints(output_dir=str(run_dir), save_total_limit=self.stage.keep_checkpoints, use_mtime=False)

    def _get_output_dir(self, trial: Any) -> str:
        return str(getattr(self, "_staging", None) or super()._get_output_dir(trial))


def _raise(error: TrainingError | None) -> None:
    if error is not None:
        raise error


class LogAtCheckpoints(TrainerCallback):
    """A log line at every checkpoint, that of the last step among them. So no average of a log line reaches over a checkpoint
    (those of a resumed run are those of an uninterrupted one), and a run shorter than `log_every` has a line too."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            control.should_log = True


def training_arguments(stage: Stage, seed: int, output_dir: Path, samples: int) -> TrainingArguments:
    """A stage's settings in the Trainer's words, for so many samples."""
    optim = stage.optim
    return TrainingArguments(
        output_dir=str(output_dir),
        # max_steps, where it is positive, goes before the epochs.
        max_steps=stage.steps or -1,
        num_train_epochs=stage.epochs or 1.0,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.accumulation,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(optim.schedule, optim.schedule),
        warmup_steps=optim.warmup_ratio,
        max_grad_norm=optim.max_grad_norm,
        bf16=precision(stage) == "bf16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=stage.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=stage.save_every,
        eval_strategy="no" if stage.eval_every is None else "steps",
        eval_steps=stage.eval_every,
        seed=seed,
        data_seed=seed,
        dataloader_num_workers=num_workers(stage.data, samples, local_processes()),
        ddp_timeout=int(PATIENCE.total_seconds()),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=["tensorboard"] if is_tensorboard_available() else [],
        ddp_find_unused_parameters=True,
    )


def precision(stage: Stage) -> str:
    """`auto` resolved: bf16 where the machine computes it fast, fp32 elsewhere."""
    if stage.precision != "auto":
        return stage.precision
    return "bf16" if has_bf16() else "fp32"


def rows_per_step(arguments: TrainingArguments) -> int:
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def newest_checkpoint(work: Path) -> Path | None:
    """The checkpoint with the highest step; every one that has its name is whole, unless something else damaged it."""
    found = (work / CHECKPOINTS).glob("checkpoint-*")
    newest = max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
    if newest is not None:
        checkpoint.require_whole(newest)
    return newest
