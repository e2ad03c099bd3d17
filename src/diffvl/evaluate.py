"""DiffVL directory + data file -> figures: masked-token loss and accuracy, and how well generated answers match.

Padding stops are left out of every figure. The masked-token measure draws its noise by one fixed law and seed
(`objective.measure`); generated answers are given the true history of their conversation.
"""

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from diffvl import terminal
from diffvl.answer_turns import answer_turns, chat_before, questions
from diffvl.config import ArObjective, BlockDiffusionObjective, Data, Objective
from diffvl.data.collate import collate
from diffvl.data.loader import SampleDataset, batches_of, load_data, open_samples
from diffvl.data.markers import pieces_between
from diffvl.decode import Decoder, DecodeSettings, answer_chats, context_length, load_for_decoding
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.objective import measure, scores
from diffvl.progress import track
from diffvl.textscore import edit_similarity, is_exact

BATCH_SIZE = 8
UNLIMITED = 10**9  # tokens
SHOWN_SAMPLES = 12


def evaluate_directory(directory: Path, data: Path, limit: int | None, settings: DecodeSettings) -> dict[str, float | int | str]:
    """All figures of a checkpoint on a file; `limit` is the number of records looked at.

    Raises:
        CheckpointError, DataError, UsageError.
    """
    console = terminal.console(stderr=True)
    decoder = load_for_decoding(directory)
    room = Data(max_length=context_length(decoder) or UNLIMITED)
    samples = open_samples(data, room, decoder.processor, advice="the checkpoint's context holds no more: remove them")
    count = len(samples) if limit is None else min(limit, len(samples))
    figures: dict[str, float | int | str] = {
        "checkpoint": str(directory),
        "data": str(data),
        "records": count,
        **measured(decoder, samples, count, console),
    }
    exact: list[bool] = []
    similar: list[float] = []
    tokens = forwards = 0
    asked = list(questions(samples.record(place) for place in range(count)))
    chunks = [asked[start : start + BATCH_SIZE] for start in range(0, len(asked), BATCH_SIZE)]
    for chunk in track(console, chunks, len(chunks), "answering"):
        answers = answer_chats(decoder, [chat_before(record, turn) for record, turn in chunk], settings, shorten=True)
        for (record, turn), given in zip(chunk, answers, strict=True):
            truth = record.turns[turn].text
            exact.append(is_exact(given.text, truth))
            similar.append(edit_similarity(given.text, truth))
            tokens += given.tokens
        forwards += answers[0].forwards
    figures |= {
        "answers": len(exact),
        "exact_match": sum(exact) / len(exact),
        "edit_similarity": sum(similar) / len(similar),
        "answer_tokens": tokens,
        "forwards": forwards,
        "decoding": decoder.model.config.decoding,
    }
    return figures


def measured(decoder: Decoder, samples: SampleDataset, count: int, console: Console) -> dict[str, float]:
    """The teacher-forced figures of the first `count` records."""
    tokenizer = decoder.processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else decoder.model.config.stop_token_ids[0]
    batches = batches_of(samples, list(range(count)), BATCH_SIZE, partial(collate, pad_token_id=pad))
    on_device = ({key: value.to(decoder.model.device) for key, value in batch.items()} for batch in batches)
    steps = -(-count // BATCH_SIZE)
    sums = measure(
        decoder.model, decoder.model.config, track(console, on_device, steps, "measuring"), own_objective(decoder.model.config)
    )
    return scores({name: float(value) for name, value in sums.items()})


def own_objective(config: DiffVLConfig) -> Objective:
    """The objective that a checkpoint was trained on, as far as measuring needs it."""
    if config.decoding == "ar":
        return ArObjective()
    return BlockDiffusionObjective.model_validate(
        {"block_size": config.block_size, "context": config.context, "grid": config.grid, "target": config.target}
    )


def held_out_answers(directory: Path, data: Data, settings: DecodeSettings, console: Console) -> list[dict[str, Any]]:
    """Answers of a checkpoint on a few held-out records (the first question of each), for the report.

    Returns:
        dicts with image (path or None), question, truth and answer; empty without held-out data.
    """
    decoder = load_for_decoding(directory)
    held_out = load_data(data, decoder.processor, None).held_out
    if held_out is None:
        return []
    shown: list[dict[str, Any]] = []
    count = min(SHOWN_SAMPLES, len(held_out))
    stride = len(held_out) / count
    records = [held_out.record(int(place * stride)) for place in range(count)]
    chunks = [records[start : start + BATCH_SIZE] for start in range(0, count, BATCH_SIZE)]
    for chunk in track(console, chunks, len(chunks), "answering held-out questions"):
        turns = [next(answer_turns(record)) for record in chunk]
        chats = [chat_before(record, turn) for record, turn in zip(chunk, turns, strict=True)]
        answers = answer_chats(decoder, chats, settings, shorten=True)
        for record, turn, given in zip(chunk, turns, answers, strict=True):
            shown.append(
                {
                    "image": record.images[0] if record.images else None,
                    "question": "".join(pieces_between(record.turns[turn - 1].text)).strip(),
                    "truth": record.turns[turn].text,
                    "answer": given.text,
                }
            )
    return shown
