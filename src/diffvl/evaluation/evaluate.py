"""DiffVL directory + data file -> figures: masked-token loss and accuracy, and how well generated answers match.

Padding stops are left out of every figure. The masked-token measure draws its noise by one fixed law and seed
(`objective.measure`); generated answers are given the true history of their conversation.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
from rich.console import Console

from diffvl.config.objectives import ArObjective, BlockDiffusionObjective, DraftObjective, Objective
from diffvl.config.recipe import Data
from diffvl.config.sources import DataSource
from diffvl.data.loader import batches_of
from diffvl.data.mixture import Mixture
from diffvl.data.problems import Problem, advice_on, as_error, is_forgiven
from diffvl.data.records import Record, Unpaired
from diffvl.data.sample_dataset import SampleDataset
from diffvl.data.samples import Sample, chat_before, collate, on_device
from diffvl.data.source_records import iterate_source, source_at
from diffvl.data.sources import eval_settings, own_settings
from diffvl.data.table import open_records
from diffvl.data.textscore import edit_similarity, is_exact
from diffvl.decode.answer import Decoder, answer_within_context, check_settings, context_length, load_for_decoding
from diffvl.evaluation.questions import answer_turns, asked
from diffvl.evaluation.scored import BATCH_SIZE, answer_records
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.settings_diffvl import DecodeSettings, keyword
from diffvl.objective.losses import measure, scores
from diffvl.store import checkpoint
from diffvl.store.checkpoint import recipe_of
from diffvl.terminal import console as terminal
from diffvl.terminal.bars import track


def reading_of(directory: Path, data: Path) -> Data:
    """Tells how a checkpoint's own recipe reads a data set: as the source of a stage that has this path, or else lies in the same
    folder; the defaults where there is none."""
    if not (directory / checkpoint.RECIPE_FILE).is_file():
        return Data()
    known: list[tuple[DataSource, Unpaired]] = [
        (source, stage.data.unpaired_turns)
        for stage in recipe_of(directory).stages.values()
        for source in (*own_settings(stage.data), *filter(None, [eval_settings(stage.data)]))
    ]
    same = [one for one in known if Path(one[0].path).absolute() == data.absolute()]
    beside = [one for one in known if Path(one[0].path).absolute().parent == data.absolute().parent]
    for source, unpaired_turns in (same or beside)[:1]:
        columns = source.columns if Path(source.path).suffix == data.suffix else None
        split, subset = (source.split, source.subset) if same else (None, None)
        folder = source.image_folder
        return Data(image_folder=folder, columns=columns, unpaired_turns=unpaired_turns, split=split, subset=subset)
    return Data()


NUM_SAMPLES = 12


def evaluate_directory(directory: Path, data: Path, limit: int | None, settings: DecodeSettings) -> dict[str, float | int | str]:
    """Measures a checkpoint on a file; `limit` is the number of records looked at, and no others are read.

    Raises:
        CheckpointError, DataError, UsageError.
    """
    console = terminal.console(stderr=True)
    decoder = load_for_decoding(directory)
    config, filled = decoder.model.config, check_settings(settings, decoder.model.config)
    samples = _open(data, reading_of(directory, data), limit, decoder, console)
    count = len(samples)
    figures: dict[str, float | int | str] = {
        "checkpoint": str(directory),
        "data": str(data),
        "records": count,
        **measured(decoder, samples, count, console),
    }
    answered = answer_records(decoder, [samples.record(place) for place in range(count)], settings, console)
    scored = answered.scored
    figures |= {
        "answers": len(scored),
        "exact_match": sum(one.exact for one in scored) / len(scored),
        "edit_similarity": sum(one.similarity for one in scored) / len(scored),
        "answer_tokens": sum(one.answer.tokens for one in scored),
        "forwards": answered.forwards,
        "decoding": config.decoding if config.gated_adapter is None else str(filled.mode),
    }
    chosen = [keyword(*pair) for pair in settings.chosen().items()]
    return figures | ({"settings": ", ".join(chosen)} if chosen else {})


def _open(path: Path, reading: Data, limit: int | None, decoder: Decoder, console: Console) -> SampleDataset:
    """Opens the records to look at. Raises DataError with all that do not fit the checkpoint."""
    source, longest = source_at(path, reading), context_length(decoder)
    if limit is None:
        table = open_records(source, reading, console, advise=False)
        samples = SampleDataset(table, path, table.usable, decoder.processor, longest, names=source.names)
    else:
        records = list(islice(iterate_source(source, reading.unpaired_turns), limit))
        samples = SampleDataset(records, path, numpy.arange(len(records)), decoder.processor, longest, names=source.names)
    require_fitting(samples)
    return samples


def require_fitting(samples: SampleDataset) -> None:
    """Raises DataError with all records that do not fit the checkpoint."""
    problems = samples.problems()
    if problems:
        raise as_error(problems, samples.path, "the checkpoint takes no others: remove these records")


def measured(decoder: Decoder, samples: SampleDataset, count: int, console: Console) -> dict[str, float]:
    """Measures the teacher-forced figures of the first `count` records."""
    pad_samples = partial(collate, pad_token_id=decoder.processor.pad_token_id)
    problems: list[Problem] = []

    def batches() -> Iterator[dict[str, Any]]:
        for batch in batches_of(samples, list(range(count)), BATCH_SIZE, pad_samples, problems):
            if problems:
                raise as_error(problems, samples.path)
            yield on_device(batch, decoder.model.device)
        if problems:
            raise as_error(problems, samples.path)

    steps = -(-count // BATCH_SIZE)
    sums = measure(
        decoder.model, decoder.model.config, track(console, batches(), steps, "measuring"), own_objective(decoder.model.config)
    )
    return scores({name: float(value) for name, value in sums.items()})


def own_objective(config: DiffVLConfig) -> Objective:
    """Gives the objective that a checkpoint was trained on, as far as measuring needs it."""
    if config.decoding == "ar":
        return ArObjective()
    if config.gated_adapter is not None:
        return DraftObjective(block_size=config.block_size, forwards="one")
    return BlockDiffusionObjective.model_validate(
        {"block_size": config.block_size, "context": config.context, "grid": config.grid, "target": config.target}
    )


def held_out_answers(
    decoder: Decoder,
    held_out: SampleDataset | Mixture,
    data: Data,
    settings: DecodeSettings,
    console: Console,
    count: int = NUM_SAMPLES,
) -> list[dict[str, Any]]:
    """Answers of a model on up to `count` held-out records from all over the set, the first question of each.

    Returns:
        dicts with image (path or None), question, truth and answer.
    Raises:
        DataError: if one of the records cannot be used and is not to be left out.
    """
    answered: list[dict[str, Any]] = []
    count = min(count, len(held_out))
    places = [int(number * len(held_out) / count) for number in range(count)]
    records = list(usable_records(held_out, data, places))
    chunks = [records[start : start + BATCH_SIZE] for start in range(0, len(records), BATCH_SIZE)]
    for chunk in track(console, chunks, len(chunks), "answering held-out questions"):
        turns = [next(answer_turns(record)) for record in chunk]
        sampler = decoder.processor.sampler
        chats = [chat_before(record, turn, sampler) for record, turn in zip(chunk, turns, strict=True)]
        answers, _ = answer_within_context(decoder, chats, settings)
        for record, turn, given in zip(chunk, turns, answers, strict=True):
            answered.append(
                {
                    "image": record.images[0] if record.images else None,
                    **({"video": record.videos[0]} if record.videos else {}),
                    "question": asked(record, turn),
                    "truth": record.turns[turn].text,
                    "answer": given.text,
                }
            )
    return answered


def held_out_scores(answered: list[dict[str, Any]]) -> dict[str, float]:
    """Scores what `held_out_answers` gave."""
    pairs = [(one["answer"], one["truth"]) for one in answered]
    return {
        "exact_match": sum(is_exact(*pair) for pair in pairs) / len(pairs),
        "edit_similarity": sum(edit_similarity(*pair) for pair in pairs) / len(pairs),
    }


def usable_records(held_out: SampleDataset | Mixture, data: Data, places: Iterable[int]) -> Iterator[Record]:
    """Gives the records at some places of a set; those that cannot be used are left out, by the rules by which training leaves
    records out. Raises DataError for one that is not to be left out."""
    for place in places:
        (found,) = held_out[place]
        if isinstance(found, Sample):
            yield held_out.record(place)
        elif data.on_error == "stop" and not is_forgiven(found, data):
            raise as_error([found], held_out.path, advice_on([found]))
