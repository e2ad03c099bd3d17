"""One stage: a DiffVL directory in, a trained DiffVL directory out.

A model is fitted to its stage (objective recorded, attention chosen, adapters and mask row attached, the rest frozen), trained by
`trainer.StageTrainer`, and unfitted for saving. No code here asks which stage it is in.
"""

import gc
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback

from diffvl import checkpoint
from diffvl.attention import choose
from diffvl.config import Objective, Recipe, Stage, StageName
from diffvl.data.collate import collate
from diffvl.data.loader import StageData, load_data, longest_sample
from diffvl.errors import ConfigError, UsageError
from diffvl.families import family_of
from diffvl.files import Writing
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.lora import add_adapters, merge_adapters
from diffvl.objective import curriculum_state
from diffvl.optim import attach_mask_row, fold_mask_row, freeze_others
from diffvl.progress import MetricsLog, TrainingProgress
from diffvl.settings import dump
from diffvl.trainer import (
    CHECKPOINTS,
    LogAtCheckpoints,
    StageTrainer,
    newest_checkpoint,
    precision,
    process_state,
    rows_per_step,
    training_arguments,
)


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
    if stage.data.row_length is not None:
        data = replace(data, train=data.train.packed(stage.data.row_length, recipe.seed))
    work.mkdir(parents=True, exist_ok=True)
    if process_state().is_main_process:
        checkpoint.replace_text(work / checkpoint.RECIPE_FILE, dump(recipe))
    fit_to_stage(model, stage, recipe.seed)
    trainer = build_trainer(model, processor, data, recipe, stage_name, work)
    last = newest_checkpoint(work) if resume else None
    trainer.args.eval_on_start = stage.eval_every is not None and last is None
    with TrainingProgress(console, stage_name) as progress_bar, Writing(work):
        trainer.add_callback(progress_bar)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    unfit(model, stage, own_dtype)
    if trainer.is_world_process_zero():
        checkpoint.write_checkpoint(model, processor, work)
        progress = {
            "steps": trainer.state.global_step,
            "rows_per_step": rows_per_step(trainer.args),
            "seed": recipe.seed,
            "curriculum": curriculum_state(stage.objective, progress=1.0),
        }
        checkpoint.write_state(work, recipe, {"kind": stage_name, "parents": [str(start)], "state": progress})
    # The optimiser's state is as large as two models, and the trainer's objects hold each other.
    trainer.accelerator.free_memory()
    del trainer, model
    gc.collect()
    return work


# --- fitting a model to a stage and back ---------------------------------------------------------------------------------


def fit_to_stage(model: DiffVLForConditionalGeneration, stage: Stage, seed: int) -> None:
    """Records the objective in the configuration, chooses the attention implementation, wraps adapters, attaches the mask row,
    freezes the rest. In place.

    Args:
        seed: of fresh adapters, which must be the same in every process and in every run of a recipe.
    """
    objective = stage.objective
    if objective.kind == "ar":
        model.config.set_decoding("ar", block_size=1, context="causal", grid="response", target="shift")
    else:
        model.config.set_decoding("blocks", objective.block_size, objective.context, objective.grid, objective.target)
    choose(model.language_model, stage.attention, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
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


def longest_trainable(text_config: Any, objective: Objective) -> int | None:
    """Tokens that a sample may have under an objective; None where the trunk's configuration names no limit.

    Raises:
        ConfigError: if a block is longer than the trunk's context.
    """
    context = getattr(text_config, "max_position_embeddings", None)
    if objective.kind == "ar":
        return context
    largest = objective.largest_block
    if context is not None and largest > context:
        name = "block_size" if largest == objective.block_size else "block_curriculum"
        told = f"objective.{name} has blocks of {largest} tokens, but this trunk's context has {context} positions: set it lower"
        raise ConfigError(told)
    sizes = {objective.block_size, *objective.block_curriculum.values()}
    limits = [longest_sample(context, size, objective.grid) for size in sizes]
    return None if context is None else min(limit for limit in limits if limit is not None)


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
