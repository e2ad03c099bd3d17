"""Checkpoint -> DiffVL directory, whole and proven or not at all. Three kinds of source: a language model with a vision tower
(`assemble`), a whole vision-language model (`native`), and a block-diffusion one that somebody released (`released`).

Invariant: what was written is loaded again and held against the source's logits; if it differs, nothing stays.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from transformers import PretrainedConfig

from diffvl.config.recipe import PREPARED, Recipe
from diffvl.config.supported import check_supported, is_vlm
from diffvl.prepare.assemble import OwnParts, read_own_parts
from diffvl.prepare.native import NativeParts, read_native_parts
from diffvl.prepare.released import ReleasedParts, read_released_parts, released_settings
from diffvl.prepare.source import Source
from diffvl.store import checkpoint
from diffvl.store.published import load_config
from diffvl.terminal.bars import spinner_or_line
from diffvl.terminal.console import say

Parts = OwnParts | NativeParts | ReleasedParts


def read_parts(source: Source, recipe: Recipe, config: PretrainedConfig | None = None) -> Parts:
    """Reads and checks whatever can be known without reading weights; writes nothing.

    Args:
        config: the source's configuration, if it has been read already.
    Raises:
        CheckpointError, UnsupportedModelError, ConfigError.
    """
    config = config or load_config(source.model, source.trust_remote_code, source.revision)
    check_supported(config)
    if (settings := released_settings(source)) is not None:
        return read_released_parts(source, config, settings)
    return read_native_parts(source, recipe, config) if is_vlm(config) else read_own_parts(source, recipe, config)


def prepare(source: Source, recipe: Recipe, directory: Path, console: Console, parts: Parts | None = None) -> Path:
    """Writes the DiffVL directory.

    Args:
        parts: what `read_parts` gave; default: read here.
    Raises:
        CheckpointError, UnsupportedModelError, ConfigError: with nothing written.
    """
    parts = parts or read_parts(source, recipe)
    with _written_whole(directory) as partial:
        with spinner_or_line(console, f"loading {' and '.join(parts.parents)}"):
            model, reference = parts.load(recipe)
        with spinner_or_line(console, f"writing {directory}"):
            checkpoint.write_checkpoint(model, parts.processor, partial)
        del model
        with spinner_or_line(console, "proving parity on the written files"):
            proofs, told = parts.prove(partial, reference)  # type: ignore[arg-type]
        state = {"kind": PREPARED, "parents": parts.parents, "proofs": proofs, **parts.facts}
        checkpoint.write_state(partial, recipe, state)
    say(console, told)
    return directory


@contextmanager
def _written_whole(directory: Path) -> Iterator[Path]:
    """Gives a directory to write into, which takes its name when it is whole; after an error nothing of it stays."""
    makes_parent = not directory.parent.exists()
    partial = checkpoint.partial(directory)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if makes_parent:
            directory.parent.rmdir()
        raise
    checkpoint.finish(directory)
