"""Tokens of every record of a table: what packing and a check of all lengths need. Measured once and remembered by content."""

import hashlib
import json
from functools import partial

import numpy
from rich.console import Console

from diffvl.data.chat import encode_record
from diffvl.data.parallel import map_places
from diffvl.data.table import RecordTable, cache_error, cache_folder
from diffvl.errors import DataError
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.store.files import replacing
from diffvl.terminal import console as terminal

REFUSED = -1  # stands for the length of a record that does not fit the chat template
_FORMAT = 1  # of the remembered lengths: raise it when encoding gives other tokens
_PAYS_FROM = 4000  # records from which several processes measure faster than one
_BAR_FROM = 2000  # records


def lengths_of(table: RecordTable, processor: DiffVLProcessor, console: Console) -> numpy.ndarray:
    """Measures the tokens, images included, of each of `table.usable`, int32; REFUSED where there are none."""
    file = cache_folder() / f"{_name(table, processor)}.npy"
    if file.exists():
        return numpy.load(file)
    bar_console = console if len(table.usable) >= _BAR_FROM else terminal.console(quiet=True)
    indices = table.usable
    measured = map_places(
        partial(_measure, table, indices, processor), len(indices), _PAYS_FROM, bar_console, f"measuring {table.path.name}"
    )
    lengths = numpy.fromiter(measured, dtype=numpy.int32, count=len(indices))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, shared=True) as beside, beside.open("wb") as opened:
            numpy.save(opened, lengths)
    except OSError as error:
        raise cache_error(table.path, error) from error
    return lengths


def _measure(table: RecordTable, indices: numpy.ndarray, processor: DiffVLProcessor, place: int) -> int:
    try:
        return len(encode_record(table[int(indices[place])], processor).ids)
    except DataError:
        return REFUSED


def _name(table: RecordTable, processor: DiffVLProcessor) -> str:
    """Names the file by all that the tokens of a record follow from."""
    tokenizer = processor.tokenizer
    facts = [_FORMAT, table.content, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    facts += [processor.image_tokens, processor.image_token, processor.stop_token, processor.system_turn]
    return f"lengths-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}"
