"""What a picture costs beside the tokens of the AR twin, for results whose times begin once it is encoded.

So do all that were made before the clock of `generate` was put in front of the encoding, on 2026-11-30. The twin and the blocks
pay it alike, so without it every ratio of their speeds is too high. It is measured as a ratio of two times of one process, which
depends on the machine far less than either, and added to the results when they are read.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from diffvl.bench.machine import describe_machine
from diffvl.compare.compare import spread_out
from diffvl.compare.settings import ways_to_decode
from diffvl.data.records import iterate_records
from diffvl.decode.answer import Decoder, load_for_decoding
from diffvl.demo.shapes import write_shapes
from diffvl.errors import UsageError
from diffvl.evaluation.questions import questions
from diffvl.evaluation.scored import answer_questions_of
from diffvl.store.files import read_json, replace_text
from diffvl.terminal.bars import track
from tools.study.runs import Study, twin_of
from tools.study.variants import TWIN

PICTURE_FILE = "picture.json"
ROUNDS = 4


@dataclass(frozen=True)
class Picture:
    """tokens: of the AR twin that take as long as encoding a picture. answer: tokens of an answer, on average."""

    tokens: float
    answer: float
    machine: dict[str, Any]

    def included(self, speeds: Mapping[str, float]) -> dict[str, float]:
        """Turns tokens per second from the encoded picture on into those of whole calls."""
        if not speeds:
            return {}
        of_a_token = self.tokens / speeds[TWIN] / self.answer
        return {name: 1 / (1 / speed + of_a_token) for name, speed in speeds.items()}


def read_picture(folder: Path) -> Picture | None:
    file = folder / PICTURE_FILE
    return Picture(**read_json(file)) if file.is_file() else None


def write_picture(picture: Picture, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / PICTURE_FILE, json.dumps(asdict(picture), indent=1) + "\n")


def measure_picture(study: Study, console: Console) -> Picture:
    """Lets the twin of the first seed answer the timed questions. Raises UsageError where there is none."""
    align, train, test = study.size.scenes
    write_shapes(study.data, align=align, train=train, test=test)
    seed = study.seeds[0]
    directory = twin_of(study, seed)
    if directory is None:
        raise UsageError(f"({TWIN}) of seed {seed} is not there, whose tokens a picture is held against: run it first")
    decoder = load_for_decoding(directory)
    ((_, settings),) = ways_to_decode(decoder.model.config, study.size.new_tokens).values()
    asked = spread_out(list(questions(list(iterate_records(study.data / "test.json"))[: study.size.test])), study.size.timed)
    answer_questions_of(decoder, asked[:1], settings)  # warms up
    plan, tokens, whole = asked * ROUNDS, 0, 0.0
    with _timed_encoding(decoder) as encoding:
        for question in track(console, plan, len(plan), "timing pictures"):
            (answer,), _ = answer_questions_of(decoder, [question], settings)
            tokens += answer.tokens
            whole += answer.prefill_seconds + answer.decode_seconds
    of_a_token = (whole - sum(encoding)) / tokens
    machine = describe_machine() | {"threads": torch.get_num_threads(), "dtype": str(decoder.model.trunk.dtype)}
    return Picture(sum(encoding) / len(plan) / of_a_token, tokens / len(plan), machine)


@contextmanager
def _timed_encoding(decoder: Decoder) -> Iterator[list[float]]:
    """Collects the seconds of each picture's encoding in the block."""
    kind: Any = type(decoder.model.images)
    whole, seconds = kind.encode, []

    def encode(self: Any, pixels: Any) -> Any:
        began = time.perf_counter()
        rows = whole(self, pixels)
        seconds.append(time.perf_counter() - began)
        return rows

    with patch.object(kind, "encode", encode):
        yield seconds
