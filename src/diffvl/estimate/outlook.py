"""What one stage will take: records, steps and tokens; memory as the recipe is, and as it would be with one thing changed; disk.

Place in the flow: `conversion` asks for it in a dry run. Nothing is loaded: the model is one without numbers (`empty`).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Any

import torch

from diffvl.config.objectives import DraftObjective
from diffvl.config.recipe import Lora, Stage
from diffvl.data.loader import StageData
from diffvl.data.samples import collate
from diffvl.errors import ConfigError
from diffvl.estimate.batches import Tokens, count_tokens, first_batches, longest, made_up
from diffvl.estimate.empty import empty_model
from diffvl.estimate.machine import Machine
from diffvl.estimate.memory import MOMENTS, Memory, memory_of
from diffvl.estimate.step import UncountableError, count_step
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.train.feed import feed_of
from diffvl.train.gated import wanted_forwards
from diffvl.train.launch import precision

MOST_PROCESSES = 64  # that a plan looks for


@dataclass(frozen=True)
class Start:
    """What a stage starts from. dtype: of the checkpoint's weights. processor: None where it cannot be read."""

    config: DiffVLConfig
    dtype: torch.dtype
    processor: DiffVLProcessor | None
    seed: int


@dataclass(frozen=True)
class Variant:
    """The stage with something changed. told: what, as one would say it. settings: as one would type it."""

    told: str
    stage: Stage
    processes: int
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outlook:
    """What a stage will take. records, steps: None where nobody knows. looked_at: rows that were read for the figures, 0 where
    the data is not here. tokens, flops: of one step in all processes. memory: of one process by variant, the recipe's own first;
    with the longest rows that may come. why_uncounted: why there is none. checkpoint, written: bytes of a checkpoint on the way
    and of what is written at the end."""

    stage: Stage
    records: int | None
    steps: int | None
    rows_per_step: int
    looked_at: int
    tokens: Tokens
    flops: int
    memory: list[tuple[Variant, Memory]] = field(default_factory=list)
    remedy: tuple[Variant, Memory] | None = None
    why_uncounted: str = ""
    checkpoint: int = 0
    written: int = 0

    def fits(self, machine: Machine) -> bool:
        """Tells whether the recipe's own variant fits, with the margin on top."""
        return bool(self.memory) and self.memory[0][1].most <= machine.memory


def look_ahead(start: Start, stage: Stage, data: StageData | None, machine: Machine) -> Outlook:
    """Makes the outlook of a stage. data: None where it is not here.

    Raises:
        ConfigError: the stage asks for something that the model does not have.
    """
    own = _on(machine, stage)
    model = _model(start, own, machine)
    if data is None or start.processor is None:
        seen, looked_at = made_up(model.config, own), 0
        rows, records = own.data.records, own.data.records
        rows_per_step = own.batch_size * own.accumulation * machine.processes
        steps = own.steps or (None if rows is None else ceil(own.epochs * ceil(rows / rows_per_step)))  # type: ignore[operator]
        worst = seen[0]
    else:
        collator = partial(collate, pad_token_id=start.processor.pad_token_id)
        packed = data
        if own.data.row_length is not None:
            packed = StageData(data.train.packed(own.data.row_length, start.seed), data.held_out)
        seen = first_batches(packed, own, start.seed, collator, machine.processes)
        looked_at = sum(len(set(batch["row"].tolist())) for batch in seen)
        feed = feed_of(packed.train, own, start.seed, collator, machine.processes, 0)
        rows_per_step = feed.rows_per_step
        steps = own.steps or ceil((own.epochs or 1.0) * feed.steps_per_epoch)
        records = None if own.data.streaming else sum(len(part.indices) for part in data.train.parts)  # type: ignore[union-attr]
        if not seen:
            raise ConfigError(f"none of the first {own.batch_size} records can be used: see what is wrong with them")
        worst = longest(seen, own)
    counts = [count_tokens(model, own, batch) for batch in seen]
    mean = Tokens(*(sum(values) / len(counts) for values in zip(*(vars(one).values() for one in counts), strict=True)))
    micro_steps = own.accumulation * machine.processes
    sizes = {id(parameter): parameter for parameter in model.parameters()}.values()
    trained = sum(parameter.numel() for parameter in sizes if parameter.requires_grad)
    written = trained if isinstance(own.objective, DraftObjective) else parameters_of(start)
    outlook = partial(
        Outlook,
        stage=own,
        records=records,
        steps=steps,
        rows_per_step=rows_per_step,
        looked_at=looked_at,
        tokens=mean.times(micro_steps),
        checkpoint=(4 + MOMENTS) * trained,
        written=written * start.dtype.itemsize,
    )
    look = _Lookout(start, machine, worst)
    try:
        table = [(variant, look.at(variant)) for variant in _variants(own, machine)]
        remedy = None
        if table[0][1].most > machine.memory:
            remedy = next(((one, memory) for one, memory in look.over(_remedies(own, machine)) if _fits(memory, machine)), None)
        share = mean.total / max(count_tokens(model, own, worst).total, 1)
        return outlook(flops=int(look.flops * share * micro_steps), memory=table, remedy=remedy)
    except UncountableError as error:
        return outlook(flops=0, why_uncounted=str(error))


def _fits(memory: Memory, machine: Machine) -> bool:
    return memory.most <= machine.memory


@dataclass
class _Lookout:
    """Counts steps of variants on one batch, each form of the model once. flops: of the first micro-step that was counted."""

    start: Start
    machine: Machine
    batch: dict[str, Any]
    flops: int = 0

    def at(self, variant: Variant) -> Memory:
        stage = variant.stage
        batch = (
            self.batch if stage.batch_size == len(set(self.batch["row"].tolist())) else first_rows(self.batch, stage.batch_size)
        )
        model = _model(self.start, stage, self.machine)
        predicted = count_tokens(model, stage, batch).predicted
        if isinstance(stage.objective, DraftObjective):
            predicted *= 2  # the head is also asked what the parent says there
        count = count_step(model, stage, batch, stage.precision == "bf16", predicted)
        self.flops = self.flops or count.flops
        return memory_of(model, stage, count, variant.processes)

    def over(self, variants: Iterator[Variant]) -> Iterator[tuple[Variant, Memory]]:
        for variant in variants:
            yield variant, self.at(variant)


def first_rows(batch: dict[str, Any], rows: int) -> dict[str, Any]:
    """Gives the first rows of a batch, and their images."""
    kept = batch["row"] < rows
    number = int(kept.sum())
    part: dict[str, Any] = {name: value[:number] for name, value in batch.items() if isinstance(value, torch.Tensor)}
    if "pixels" in batch:
        images = int(batch["images"][:number].sum())
        total = int(batch["images"].sum())
        # Of packed patches nobody here knows whose they are: the same share of them.
        pixels = batch["pixels"].items()
        if images:
            part["pixels"] = {name: value[: -(-len(value) * images // total)] for name, value in pixels}
    return part


def _on(machine: Machine, stage: Stage) -> Stage:
    """Gives the stage with what it leaves to the machine decided: precision, and whether the model is in parts."""
    sharding = stage.sharding
    if sharding == "auto":
        packed = stage.lora is not None and stage.lora.bits is not None
        sharding = "full" if machine.is_gpu and machine.processes > 1 and not packed else "none"
    chosen = stage.precision if stage.precision != "auto" else "bf16" if machine.is_gpu else precision(stage)
    settled: dict[str, Any] = {"precision": chosen, "sharding": sharding}
    if isinstance(stage.objective, DraftObjective):
        forwards = wanted_forwards(stage, stage.objective)
        settled["objective"] = stage.objective.model_copy(update={"forwards": forwards})
    return stage.model_copy(update=settled)


def _model(start: Start, stage: Stage, machine: Machine) -> Any:
    return empty_model(copy.deepcopy(start.config), stage, start.seed, start.dtype, machine.device)


def parameters_of(start: Start) -> int:
    """Counts the parameters of the model that a start describes."""
    with torch.device("meta"):
        model = DiffVLForConditionalGeneration(copy.deepcopy(start.config))
    return sum(parameter.numel() for parameter in model.parameters())


# --- what else would do ------------------------------------------------------------------------------------------------------


def _checkpointing(stage: Stage) -> Stage:
    return stage.model_copy(update={"gradient_checkpointing": True})


def _variants(own: Stage, machine: Machine) -> Iterator[Variant]:
    """The recipe's own, and each of the great switches the other way."""
    yield Variant("as it is", own, machine.processes)
    other = own.model_copy(update={"gradient_checkpointing": not own.gradient_checkpointing})
    yield Variant(f"{'without' if own.gradient_checkpointing else 'with'} checkpointing", other, machine.processes)
    if "trunk" in own.trainable and own.lora is None:
        unsharded = own.model_copy(update={"lora": Lora()})
        yield Variant("with LoRA", unsharded, machine.processes)
    if own.sharding == "none" and own.lora is None:
        yield Variant("in parts over 8", own.model_copy(update={"sharding": "full"}), 8)
    elif own.sharding != "none":
        yield Variant("not in parts", own.model_copy(update={"sharding": "none"}), machine.processes)


def _remedies(own: Stage, machine: Machine) -> Iterator[Variant]:
    """Changes from the smallest on: what costs nothing but time first, then what trains something else, then other machines."""
    settings: list[str] = []
    stage, told = own, []

    def then(words: str, setting: str, **update: Any) -> Variant:
        nonlocal stage
        stage = stage.model_copy(update=update)
        told.append(words)
        settings.append(setting)
        return Variant(" and ".join(told), stage, machine.processes, tuple(settings))

    if not own.gradient_checkpointing:
        yield then("gradient checkpointing", "gradient_checkpointing=true", gradient_checkpointing=True)
    if own.sharding == "none" and machine.processes > 1 and own.lora is None:
        yield then("the model in parts", "sharding=full", sharding="full")
    if own.batch_size > 1:
        rows = own.batch_size * own.accumulation
        yield then("one row at a time", f"batch_size=1 accumulation={rows}", batch_size=1, accumulation=rows)
    before = stage, list(told), list(settings)
    if own.lora is None and "trunk" in own.trainable:
        yield then("LoRA", "lora={rank: 16}", lora=Lora())
    if "trunk" in own.trainable and machine.is_gpu and (stage.lora is None or stage.lora.bits is None) and stage.lora:
        packed = stage.lora.model_copy(update={"bits": 4})
        yield then("a trunk in 4 bits", "lora.bits=4", lora=packed, sharding="none")
    stage, told, settings = before
    processes = machine.processes
    while own.lora is None and (processes := processes * 2) <= MOST_PROCESSES:
        more = stage.model_copy(update={"sharding": "full"})
        yield Variant(" and ".join([*told, f"{processes} devices"]), more, processes, tuple(settings))
