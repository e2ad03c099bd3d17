"""One stage: a DiffVL directory in, a trained DiffVL directory out.

A model is fitted to its stage (objective recorded, attention chosen, adapters and mask row attached, the rest frozen), trained by
`loop.Loop`, and unfitted for saving. No code here asks which stage it is in.
"""

import gc
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from diffvl.attention.choose import choose, set_attention
from diffvl.config.families import family_of
from diffvl.config.objectives import ArObjective, DraftObjective, FullDiffusionObjective, Objective
from diffvl.config.recipe import Recipe, Stage, StageName
from diffvl.config.resolve import dump
from diffvl.data.fingerprint import FileRecord, data_record, facts_of, is_same_data, write_data_record
from diffvl.data.left_out import LEFT_OUT_FILE, LeftOut
from diffvl.data.loader import StageData, load_data
from diffvl.data.mixture import Mixture
from diffvl.data.sample_dataset import SampleDataset
from diffvl.data.samples import collate
from diffvl.errors import ConfigError, DiffvlError
from diffvl.hub.gate_diffvl import attach_mask_row
from diffvl.hub.images_diffvl import Pixels
from diffvl.hub.layout_diffvl import longest_sample
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.objective.losses import curriculum_state
from diffvl.prepare.tiling import processor_of_stage
from diffvl.store import checkpoint
from diffvl.store.files import Writing
from diffvl.store.metrics import METRICS_FILE
from diffvl.train import checkpoints
from diffvl.train.adapters import write_adapters, write_gated
from diffvl.train.checkpoints import CHECKPOINTS
from diffvl.train.four_bits import is_in_four_bits, load_in_four_bits, require_four_bits, take_over
from diffvl.train.gated import fit_to_drafts
from diffvl.train.gathering import write_gathered
from diffvl.train.launch import agreed, is_to_shard, main_first, main_only, make_accelerator, precision, process_state
from diffvl.train.loop import Loop
from diffvl.train.parts import add_adapters, fold_mask_row, freeze_others, merge_adapters, upcast
from diffvl.train.progress import MetricsLog, TrainingProgress, Watchers
from diffvl.train.sharding import is_sharded, learns_to_see, shard

log = logging.getLogger(__name__)

BLANK = (64, 64)  # pixels of an image that no token shows

Look = Callable[[DiffVLForConditionalGeneration, DiffVLProcessor, SampleDataset | Mixture | None], None]
Measurement = Callable[[DiffVLForConditionalGeneration, DiffVLProcessor, SampleDataset | Mixture | None], dict[str, float]]


@dataclass(frozen=True)
class Onlooker:
    """Who looks, in the main process, at the model in memory before it is fitted to the stage and after training, with the
    held-out records. during: who looks at each evaluation, where the stage wants answers, and says what it found."""

    before: Look
    after: Look
    during: Measurement | None = None


def train(
    start: Path,
    recipe: Recipe,
    stage_name: StageName,
    directory: Path,
    resume: bool,
    console: Console,
    onlooker: Onlooker | None = None,
    data: StageData | None = None,
) -> Path:
    """Trains one stage from the checkpoint in `start` and leaves the unfinished directory, complete but for its name.

    The caller adds what it wants (samples, a report) and calls `checkpoint.finish`. All processes call this.

    Args:
        data: of the stage, opened with the start's own processor; default: opened here.
    Returns:
        the partial directory.
    Raises:
        DiffvlError: on bad settings or data, before any step; the last checkpoint stays.
    """
    stage = recipe.stages[stage_name]
    work = checkpoint.partial(directory)
    process_state()  # before anything else makes one, with less patience
    sharded = agreed(lambda: require_machine(stage))
    data = data or main_first(lambda: _open_data(start, stage, console))
    processor, held_out = data.train.processor, data.held_out
    record = data_record(data)
    same_data = agreed(lambda: is_same_data(work, record))
    model, own_dtype = load_to_train(start, stage, recipe.seed, sharded)
    # Who answers needs a whole model: of one in parts a copy, in the main process, which is gone before training begins.
    whole = (lambda: load_to_train(start, stage, recipe.seed)[0]) if sharded else partial(_itself, model)
    main_only(lambda: _begin(work, recipe, record, lambda: onlooker and onlooker.before(whole(), processor, held_out)))
    del whole
    if stage.data.row_length is not None:
        data = replace(data, train=data.train.packed(stage.data.row_length, recipe.seed))
    attention = str(model.config.text_config._attn_implementation)
    with _taken_back(work):
        stage = fit_to_stage(model, stage, recipe.seed)
        place(model, stage, own_dtype, sharded)
    last = agreed(lambda: checkpoints.newest(work)) if resume else None
    accelerator = make_accelerator(stage, recipe.trackers, work)
    left_out = LeftOut(work / LEFT_OUT_FILE, stage.data, data.parts(), accelerator.is_main_process)
    with TrainingProgress(console, stage_name) as progress_bar, Writing(work):
        metrics = MetricsLog(work / METRICS_FILE, stage_name)
        watchers = Watchers(progress_bar, metrics, accelerator.is_main_process)
        loop = Loop(model, stage, recipe.seed, data, collator(model, processor), left_out, accelerator, watchers)
        if stage.eval_answers and onlooker is not None and onlooker.during is not None:
            loop.answer = partial(_answers_during, onlooker.during, model, processor, held_out, attention)
        loop.run(work / CHECKPOINTS, last, same_data)
    for tracker in accelerator.trackers:  # `end_training` would also end the process group, which a later stage needs
        tracker.finish()
    state = {"parents": [str(start)], **_state_of(loop, stage_name, record)}
    accelerator.unwrap_model(loop.wrapped, keep_fp32_wrapper=False)  # no autocast around its forward
    accelerator.free_memory()
    del loop  # the optimiser's state is as large as two models
    gc.collect()
    if model.gate is None:
        model = as_stored(model, start, stage, recipe.seed)
        _write(model, processor, stage, own_dtype, attention, work)
    else:
        _write_lossless(model, processor, start, own_dtype, attention, work)
    main_only(lambda: checkpoint.write_state(work, recipe, state))
    if accelerator.is_main_process:
        _tell_left_out(stage_name, left_out.kinds(), directory)
    whole = (lambda: checkpoint.load_model(work)) if sharded else partial(_itself, model)
    del model
    main_only(lambda: onlooker and onlooker.after(whole(), processor, held_out))
    return work


@contextmanager
def _taken_back(work: Path) -> Iterator[None]:
    """Removes what an unfinished stage began, if its settings turn out wrong in the block before a step of it was saved: those
    that are right may be given next. Every process comes to the same error, of the same settings."""
    try:
        yield
    except DiffvlError:
        if process_state().is_main_process and checkpoints.newest(work) is None:
            shutil.rmtree(work, ignore_errors=True)
        raise


def _itself(model: DiffVLForConditionalGeneration) -> DiffVLForConditionalGeneration:
    return model


def _answers_during(
    during: Measurement, model: DiffVLForConditionalGeneration, processor: DiffVLProcessor, held_out: Any, attention: str
) -> dict[str, float]:
    """Looks at a model while it trains, with the attention that decoding knows. Its weights and the draws of the run stay."""
    trained_with = str(model.config.text_config._attn_implementation)
    set_attention(model.trunk, attention)
    try:
        return during(model, processor, held_out)
    finally:
        set_attention(model.trunk, trained_with)


def place(model: DiffVLForConditionalGeneration, stage: Stage, own_dtype: torch.dtype, sharded: bool) -> None:
    """Puts what trains in fp32: of a model in parts unit by unit, as they are cut."""
    if sharded:
        shard(model, stage, everything=not keeps_dtype(stage, own_dtype))
    else:
        upcast(model)


def _write(
    model: DiffVLForConditionalGeneration,
    processor: DiffVLProcessor,
    stage: Stage,
    dtype: torch.dtype,
    attention: str,
    work: Path,
) -> None:
    """Writes the trained model, in the dtype of the checkpoint that it was read from. All processes call it; of a model in parts
    nothing is left. `attention`: as decoding knows it."""
    sharded = is_sharded(model)
    write_adapters(model, work)
    if sharded:
        write_gathered(model, stage, dtype, work)
    else:
        unfit(model, stage, dtype)
    if model.config.text_config._attn_implementation != attention:
        set_attention(model.trunk, attention)
    main_only(lambda: checkpoint.write_checkpoint(model, processor, work, not sharded))


def _write_lossless(
    model: DiffVLForConditionalGeneration, processor: DiffVLProcessor, base: Path, dtype: torch.dtype, attention: str, work: Path
) -> None:
    """Writes what drafts over an unchanged base, as `_write` does for a model that has changed."""
    write_gated(model, base, dtype, work)
    model.config.dtype = dtype
    if not is_sharded(model):
        checkpoint.cast_weights(model, dtype)
    if model.config.text_config._attn_implementation != attention:
        set_attention(model.trunk, attention)
    main_only(lambda: checkpoint.write_checkpoint(model, processor, work, weights=False))


def require_machine(stage: Stage) -> bool:
    """Tells whether the stage's model is to be sharded. Raises ConfigError where it asks for what this run's processes or their
    devices cannot do."""
    require_four_bits(stage)
    sharded = is_to_shard(stage)
    if sharded and stage.eval_answers:
        raise ConfigError(
            "eval_answers asks a whole model, and here each process has a part of it: leave it out, or sharding: none"
        )
    return sharded


def _open_data(start: Path, stage: Stage, console: Console) -> StageData:
    config, processor = checkpoint.load_description(start)
    processor = processor_of_stage(processor, stage)
    return load_data(stage.data, processor, longest_trainable(config.text_config, stage.objective), console)


def _begin(work: Path, recipe: Recipe, record: dict[str, FileRecord], look: Callable[[], None]) -> None:
    """What an unfinished stage's directory holds before its first step; the recipe comes last, by which it is known."""
    work.mkdir(parents=True, exist_ok=True)
    write_data_record(work, record)
    look()
    checkpoint.replace_text(work / checkpoint.RECIPE_FILE, dump(recipe))


def _state_of(loop: Loop, stage_name: StageName, record: dict[str, FileRecord]) -> dict[str, Any]:
    """What `diffvl.json` says of a finished stage."""
    progress = {
        "steps": loop.step,
        "rows_per_step": loop.feed.rows_per_step,
        "seed": loop.seed,
        "curriculum": curriculum_state(loop.stage.objective, progress=1.0),
    }
    return {"kind": stage_name, "state": progress, "data": facts_of(record), "left_out": loop.left_out.kinds()}


def load_to_train(
    start: Path, stage: Stage, seed: int, sharded: bool = False
) -> tuple[DiffVLForConditionalGeneration, torch.dtype]:
    """The model in the dtypes that training wants, cutting images as the stage says, and the dtype that its checkpoint has.

    Args:
        seed: of what is fresh, which must be the same in every process and in every run of a recipe.
        sharded: it stays as it lies in its files, which the processes of a machine share in memory, and `shard` upcasts it.
    """
    own_dtype = checkpoint.saved_dtype(start)
    if is_in_four_bits(stage):
        model = load_in_four_bits(start)
    else:
        unchanged = sharded or keeps_dtype(stage, own_dtype)
        model = checkpoint.load_model(start, None if unchanged else torch.float32)
    if stage.tiling is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.set_tiling(stage.tiling.settings)
    return model, own_dtype


def as_stored(model: DiffVLForConditionalGeneration, start: Path, stage: Stage, seed: int) -> DiffVLForConditionalGeneration:
    """Gives a trained model with weights as its files hold them: another one where they are in 4 bits now."""
    if stage.lora is None or not is_in_four_bits(stage):
        return model
    unpacked = stage.model_copy(update={"lora": stage.lora.model_copy(update={"bits": None})})
    plain = load_to_train(start, unpacked, seed)[0]
    fit_to_stage(plain, unpacked, seed)
    take_over(model, plain)
    return plain


def keeps_dtype(stage: Stage, stored: torch.dtype) -> bool:
    """Tells whether frozen parts stay in the dtype of their checkpoint: under bf16 autocast, with which fp16 does not mix."""
    return precision(stage) == "bf16" and stored != torch.float16


def collator(model: DiffVLForConditionalGeneration, processor: DiffVLProcessor) -> Callable[..., dict[str, Any]]:
    """Makes what turns rows of samples into a batch."""
    plain = partial(collate, pad_token_id=processor.pad_token_id)
    if not (is_sharded(model) and learns_to_see(model)):
        return plain
    return WithImage(plain, processor.pixels([Image.new("RGB", BLANK)]))


@dataclass(frozen=True)
class WithImage:
    """Gives a batch without images a blank one, which no token shows. See `sharding.learns_to_see`."""

    collate: Callable[..., dict[str, Any]]
    blank: Pixels

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch = self.collate(rows)
        if "pixels" not in batch:
            batch |= {"pixels": self.blank, "images": torch.zeros(len(batch["input_ids"]), dtype=torch.long)}
        return batch


def _tell_left_out(stage_name: StageName, left_out: dict[str, int], directory: Path) -> None:
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.items())
        listed = directory / LEFT_OUT_FILE
        log.warning("%s: records left out: %s; listed in %s", stage_name, kinds, listed)


# --- fitting a model to a stage and back ---------------------------------------------------------------------------------


def fit_to_stage(model: DiffVLForConditionalGeneration, stage: Stage, seed: int, device: torch.device | None = None) -> Stage:
    """Records the objective in the configuration, chooses the attention implementation, wraps adapters, attaches the mask row,
    freezes the rest. In place.

    Args:
        seed: of fresh adapters, which must be the same in every process and in every run of a recipe.
        device: that it will train on; default: this machine's GPU, or its CPU where there is none.
    Returns:
        the stage, with what it left to the model to decide.
    """
    _record(model, stage.objective)
    family_targets = family_of(model.config.text_config.model_type).lora_targets
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(stage.objective, DraftObjective) and stage.lora is not None:
        stage = fit_to_drafts(model, stage, seed, family_targets, device)
    else:
        choose(model.trunk, stage.attention, device)
        if stage.lora is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                add_adapters(model, stage.lora, family_targets)
    if "mask_row" in stage.trainable:
        attach_mask_row(model)
    freeze_others(model, stage)
    if stage.gradient_checkpointing:
        around = {} if model.gate is None else {"context_fn": model.gate.contexts}
        model.activation_checkpointing_enable({"use_reentrant": False, **around})
    return stage


def _record(model: DiffVLForConditionalGeneration, objective: Objective) -> None:
    """Says in the configuration how the weights are trained."""
    if objective.kind == "ar":
        model.config.set_decoding("ar", block_size=1, context="causal", grid="response", target="shift")
    elif objective.kind == "full_diffusion":
        model.config.set_decoding("blocks", objective.block_size, "block", "response", objective.target)
    elif objective.kind == "draft":
        model.config.set_decoding("blocks", objective.block_size, "causal", "response", "shift")
    else:
        model.config.set_decoding("blocks", objective.block_size, objective.context, objective.grid, objective.target)


def unfit(model: DiffVLForConditionalGeneration, stage: Stage, dtype: torch.dtype) -> None:
    """Undoes `fit_to_stage` for saving: adapters merged, mask row folded in, the checkpoint's dtype again. In place."""
    if "mask_row" in stage.trainable:
        fold_mask_row(model)
    merge_adapters(model)
    checkpoint.cast_weights(model, dtype)
    model.config.dtype = dtype


def longest_trainable(text_config: Any, objective: Objective) -> int | None:
    """Tokens that a sample may have under an objective; None where the trunk's configuration names no limit.

    Raises:
        ConfigError: if a block is longer than the trunk's context.
    """
    context = getattr(text_config, "max_position_embeddings", None)
    if isinstance(objective, ArObjective | FullDiffusionObjective):
        return context
    largest = objective.largest_block
    if context is not None and largest > context:
        name = "block_size" if largest == objective.block_size else "block_curriculum"
        told = f"objective.{name} has blocks of {largest} tokens, but this trunk's context has {context} positions: set it lower"
        raise ConfigError(told)
    sizes = {objective.block_size, *objective.block_curriculum.values()}
    grid = "response" if isinstance(objective, DraftObjective) else objective.grid
    limits = [longest_sample(context, size, grid) for size in sizes]
    return None if context is None else min(limit for limit in limits if limit is not None)
