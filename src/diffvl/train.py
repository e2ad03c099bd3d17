"""One stage: a DiffVL directory in, a trained DiffVL directory out.

The loop is `transformers.Trainer`. What is ours: the loss (a pure function of model, batch and place in the run), the
parameter groups, and the form of its checkpoints (only what trains, written beside and renamed). No code here asks which
stage it is in.
"""

import gc
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import is_tensorboard_available
from transformers.trainer_utils import rotate_checkpoints

from diffvl import checkpoint
from diffvl.config import Objective, Recipe, Stage, StageName
from diffvl.data.collate import collate, raise_bad_record
from diffvl.data.loader import SampleDataset, StageData, batches_of, load_data, longest_sample
from diffvl.errors import CheckpointError, TrainingError, UsageError
from diffvl.families import family_of
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.lora import add_adapters, merge_adapters
from diffvl.noise import sample_generator
from diffvl.objective import Draw, LossOutput, loss_of, measure, measured_sums, rates, scores
from diffvl.optim import attach_mask_row, fold_mask_row, freeze_others, parameter_groups
from diffvl.progress import MetricsLog, TrainingProgress

CHECKPOINTS = "checkpoints"
TRAINABLE_FILE = "model.safetensors"
STAGING = "saving"  # under CHECKPOINTS: a checkpoint that has no name yet


def train(start: Path, recipe: Recipe, stage_name: StageName, directory: Path, resume: bool, console: Console) -> Path:
    """Trains one stage from the checkpoint in `start` and leaves the unfinished directory, complete but for its name.

    The caller adds what it wants (samples, a report) and calls `checkpoint.finish`.

    Returns:
        the partial directory.
    Raises:
        DiffvlError: on bad settings or data, before any step; the last checkpoint stays.
    """
    stage = recipe.stages[stage_name]
    work = checkpoint.partial(directory)
    own_dtype = checkpoint.saved_dtype(start)
    # Frozen parts stay in their own dtype under bf16 autocast; fp16 does not mix with it.
    keeps_dtype = precision(stage) == "bf16" and own_dtype != torch.float16
    model, processor = checkpoint.load_checkpoint(start, dtype=None if keeps_dtype else torch.float32)
    data = load_data(stage.data, processor, longest_trainable(model.config.text_config, stage.objective))
    work.mkdir(parents=True, exist_ok=True)
    if process_state().is_main_process:
        checkpoint.replace_text(work / checkpoint.RECIPE_FILE, checkpoint.dump(recipe))
    fit_to_stage(model, stage, recipe.seed)
    trainer = build_trainer(model, processor, data, recipe, stage_name, work)
    last = newest_checkpoint(work) if resume else None
    trainer.args.eval_on_start = stage.eval_every is not None and last is None
    with TrainingProgress(console, stage_name) as progress_bar:
        trainer.add_callback(progress_bar)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    unfit(model, stage, own_dtype)
    if trainer.is_world_process_zero():
        checkpoint.write_checkpoint(model, processor, work)
        progress = {"steps": trainer.state.global_step, "samples_per_step": samples_per_step(trainer.args), "seed": recipe.seed}
        checkpoint.write_state(work, recipe, {"kind": stage_name, "parents": [str(start)], "state": progress})
    # The optimiser's state is as large as two models, and the trainer's objects hold each other.
    trainer.accelerator.free_memory()
    del trainer, model
    gc.collect()
    return work


# --- fitting a model to a stage and back ---------------------------------------------------------------------------------


def fit_to_stage(model: DiffVLForConditionalGeneration, stage: Stage, seed: int) -> None:
    """Records the objective in the configuration, wraps adapters, attaches the mask row, freezes the rest. In place.

    Args:
        seed: of fresh adapters, which must be the same in every process and in every run of a recipe.
    """
    objective = stage.objective
    if objective.kind == "ar":
        model.config.set_decoding("ar", block_size=1, context="causal", grid="response", target="shift")
    else:
        model.config.set_decoding("blocks", objective.block_size, objective.context, objective.grid, objective.target)
    if stage.lora is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_adapters(model, stage.lora, family_of(model.config.text_config.model_type).lora_targets)
    if "mask_row" in stage.trainable:
        attach_mask_row(model)
    freeze_others(model, stage)
    if stage.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})


def unfit(model: DiffVLForConditionalGeneration, stage: Stage, dtype: torch.dtype) -> None:
    """Undoes `fit_to_stage` for saving: adapters merged, mask row folded in, the checkpoint's dtype again. In place."""
    if "mask_row" in stage.trainable:
        fold_mask_row(model)
    merge_adapters(model)
    torch.nn.Module.to(model, dtype=dtype)
    model.config.dtype = dtype


def precision(stage: Stage) -> str:
    """`auto` resolved: bf16 on a GPU that has it and on CPUs with matrix instructions for it, fp32 elsewhere."""
    if stage.precision != "auto":
        return stage.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_amx_tile_supported() else "fp32"


def longest_trainable(text_config: Any, objective: Objective) -> int | None:
    """Tokens that a sample may have under an objective; None where the trunk's configuration names no limit."""
    context = getattr(text_config, "max_position_embeddings", None)
    if objective.kind == "ar":
        return context
    return longest_sample(context, objective.block_size, objective.grid)


# --- the trainer ---------------------------------------------------------------------------------------------------------


class StepSampler(Sampler[int]):
    """Epochs as permutations seeded by (seed, epoch). An epoch's last step is filled from its beginning: every step has the
    same samples, however it is cut into micro-steps and processes (left alone, each process count fills it differently)."""

    def __init__(self, samples: int, per_step: int, seed: int, steps_done: Callable[[], int]) -> None:
        """`steps_done` gives the optimiser steps done, from which the epoch follows. (The loader's `set_epoch` does not reach a
        sampler inside a shard of a resumed epoch.)"""
        self.samples, self.per_step, self.seed, self.steps_done = samples, per_step, seed, steps_done
        self.length = -(-samples // per_step) * per_step

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        epoch = self.steps_done() // (self.length // self.per_step)
        order = torch.randperm(self.samples, generator=sample_generator(self.seed, epoch, sample=-1)).tolist()
        return (order[place % self.samples] for place in range(self.length))


class StageTrainer(Trainer):
    """transformers' Trainer with our loss, parameter groups and checkpoint form."""

    model: Any
    data_collator: Any

    def __init__(self, recipe: Recipe, stage: Stage, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.recipe, self.stage = recipe, stage
        # `num_items_in_batch` then counts the labels (answer tokens) of the whole optimiser step, over all processes.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens = 0
        self._since = time.monotonic()

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        samples: SampleDataset = self.train_dataset  # type: ignore[assignment]
        return StepSampler(len(samples), samples_per_step(self.args), self.recipe.seed, lambda: self.state.global_step)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in samples:
            raise_bad_record(batch)
        return samples, count

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> torch.Tensor:
        """The stage's objective on one micro-batch, over the answer tokens of the whole step."""
        step = self.state.global_step
        draw = Draw(self.recipe.seed, step, step / max(self.state.max_steps, 1))
        output = loss_of(model, self.model.config, inputs, self.stage.objective, draw)
        if not torch.isfinite(output.loss):
            raise TrainingError(
                f"step {step}: the loss is {output.loss.item()} on samples {inputs['sample'].tolist()}; the last good checkpoint "
                "is kept. Lower the learning rate, or look at these records"
            )
        self._count(output)
        loss = output.loss * self.accelerator.num_processes / num_items_in_batch
        if not loss.requires_grad:
            # A batch without pictures in a stage that trains the connector alone: nothing to learn, but a step like any other.
            loss = loss + 0.0 * torch.stack([p.sum() for p in self.model.parameters() if p.requires_grad]).sum()
        return loss

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
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            totals = self._over_processes([*(float(self._sums[name]) for name in names), float(self._tokens)])
            logs.update(rates(dict(zip(names, totals[:-1], strict=True))))
            logs["tokens_per_second"] = totals[-1] / max(time.monotonic() - self._since, 1e-9)
            logs["learning_rate"] = max(group["lr"] for group in self.optimizer.param_groups)
        self._sums, self._tokens, self._since = {}, 0, time.monotonic()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The fixed held-out measure (`objective.measure`), shared among processes."""
        held_out: SampleDataset = self.eval_dataset  # type: ignore[assignment]
        count = min(len(held_out), self.stage.eval_limit)
        places = range(self.args.process_index, count, self.args.world_size)
        batches = batches_of(held_out, list(places), self.args.per_device_train_batch_size, self.data_collator)
        self.model.eval()
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            sums = measure(self.model, self.model.config, map(self._prepare_inputs, batches), self.stage.objective)
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
        return (sys.maxsize, 0) if self.state.global_step >= self.state.max_steps else (epoch, batches)

    # Checkpoints hold what trains; the rest is bit-identical in the directory that the stage started from.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            values = state_dict or {name: parameter.detach() for name, parameter in self.model.named_parameters()}
            trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            kept = {name: value.contiguous() for name, value in values.items() if name in trainable}
            save_file(kept, folder / TRAINABLE_FILE, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / TRAINABLE_FILE)
        trainable = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if saved.keys() != trainable.keys():
            odd = sorted(saved.keys() ^ trainable.keys())
            raise CheckpointError(f"{resume_from_checkpoint}: holds other parameters than this stage trains: {odd[:5]}")
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(saved[name])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes into a staging folder and renames, so that every folder named checkpoint-N is whole."""
        run_dir = Path(str(self.args.output_dir))
        staging = run_dir / STAGING
        if self.args.should_save and staging.exists():
            shutil.rmtree(staging)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            del self._staging
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            checkpoint.sync(staging / name)
            if not (run_dir / name).exists():
                (staging / name).rename(run_dir / name)
            shutil.rmtree(staging)
            rotate_checkpoints(output_dir=str(run_dir), save_total_limit=self.stage.keep_checkpoints, use_mtime=False)

    def _get_output_dir(self, trial: Any) -> str:
        return str(getattr(self, "_staging", None) or super()._get_output_dir(trial))


class LogAtCheckpoints(TrainerCallback):
    """A log line at every checkpoint, that of the last step among them. So no average of a log line reaches over a checkpoint
    (those of a resumed run are those of an uninterrupted one), and a run shorter than `log_every` has a line too."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            control.should_log = True


def build_trainer(
    model: DiffVLForConditionalGeneration,
    processor: DiffVLProcessor,
    data: StageData,
    recipe: Recipe,
    stage_name: StageName,
    work: Path,
) -> StageTrainer:
    """The trainer of a stage, writing its checkpoints under `work`."""
    stage = recipe.stages[stage_name]
    pad = processor.tokenizer.pad_token_id
    trainer = StageTrainer(
        recipe,
        stage,
        model=model,
        args=training_arguments(stage, recipe.seed, work / CHECKPOINTS),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        data_collator=partial(collate, pad_token_id=pad if pad is not None else model.config.stop_token_ids[0]),
        callbacks=[LogAtCheckpoints(), MetricsLog(work / "metrics.jsonl", stage_name)],
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        # Folding the mask row and merging adapters need whole parameters; sharded ones are not gathered yet.
        raise UsageError("sharded training (FSDP, DeepSpeed) is not supported yet: launch with plain data parallelism")
    return trainer


def training_arguments(stage: Stage, seed: int, output_dir: Path) -> TrainingArguments:
    """A stage's settings in the Trainer's words."""
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
        dataloader_num_workers=stage.data.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=["tensorboard"] if is_tensorboard_available() else [],
        ddp_find_unused_parameters=True,
    )


def process_state() -> PartialState:
    """This process among its launcher's; without a GPU accelerate must be told, or every process takes itself for the only one.

    Raises:
        UsageError: if one process has several GPUs, which transformers would drive by replicas that know nothing of our batches.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes == 1 and torch.cuda.device_count() > 1:
        raise UsageError(
            f"{torch.cuda.device_count()} GPUs, one process: start with `accelerate launch -m diffvl.cli ...`, one for each GPU, "
            "or choose one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    return state


def samples_per_step(arguments: TrainingArguments) -> int:
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def newest_checkpoint(work: Path) -> Path | None:
    """The checkpoint with the highest step; every one that has its name is whole, unless something else damaged it."""
    found = (work / CHECKPOINTS).glob("checkpoint-*")
    newest = max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
    if newest is not None:
        checkpoint.require_whole(newest)
    return newest
