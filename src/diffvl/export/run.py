"""`diffvl export`: a finished directory -> a checkpoint in a layout that others load, whole and proven or not at all."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from diffvl import machine
from diffvl.errors import MACHINE_CODE, DiskError, UnsupportedModelError, UsageError
from diffvl.export import adapters, native, parity, sdar, sdar_v
from diffvl.export.card import CARD, card, source_licence
from diffvl.export.files import write_json
from diffvl.export.source import Run, read_run
from diffvl.export.text_part import text_faults
from diffvl.store import checkpoint
from diffvl.store.files import read_json, replace_text
from diffvl.terminal.bars import spinner_or_line
from diffvl.terminal.console import say, shell_line

MARK = "export.unfinished"  # in a directory that an export is writing; nothing else may be removed under that name


@dataclass(frozen=True)
class Layout:
    """A way to write a checkpoint. faults: what it cannot express of a run, in words. write: the files into an empty directory.
    text_only: whether it holds the text part alone."""

    faults: Callable[[Run], list[str]]
    write: Callable[[Run, Path], None]
    text_only: bool = False


LAYOUTS: dict[str, Layout] = {
    "native": Layout(lambda run: [], native.write),
    "sdar_v": Layout(sdar_v.faults, sdar_v.write),
    "sdar": Layout(text_faults, sdar.write, text_only=True),
}


def export(
    directory: Path, layout: str, out: Path, console: Console, keep_adapters: bool = False, licence: str | None = None
) -> dict[str, float]:
    """Writes a finished directory in a layout, and proves it in a clean process.

    Args:
        keep_adapters: True writes the weights from before the adapters were merged, and the adapters beside them.
        licence: for the card; default: that of the source's card, where it is here.
    Returns:
        the largest difference of each kind of logits, in std of the logits.
    Raises:
        UsageError, CheckpointError, UnsupportedModelError: with nothing written.
        ProofError, DiskError: the same; their exit code says that it is the machine's fault.
    """
    run = read_run(directory)
    if keep_adapters:
        adapters.require_adapters(run, layout)
    _require_layout(run, layout, out)
    _require_free(out)
    chosen = LAYOUTS[layout]
    write = adapters.write if keep_adapters else chosen.write
    try:
        with tempfile.TemporaryDirectory() as scratch, _written_whole(out) as partial:
            with spinner_or_line(console, f"running {directory} in memory"):
                expected = parity.reference(run, Path(scratch), chosen.text_only)
            with spinner_or_line(console, f"writing {out}"):
                write(run, partial)
            with spinner_or_line(console, "proving parity in a clean process"):
                figures = parity.prove(partial, expected, partial / checkpoint.ADAPTER if keep_adapters else None)
            _write_provenance(run, layout, partial, figures)
            text = card(run, layout, chosen.text_only, keep_adapters, figures, licence or source_licence(run))
            replace_text(partial / CARD, text)
    except DiskError as error:
        error.exit_code = MACHINE_CODE
        raise
    say(console, f"parity: largest difference {max(figures.values()):.1e} std of the logits")
    say(console, "wrote ", (str(out), "bold"), f" (layout {layout})")
    if chosen.text_only:
        for name, command in sdar.launches(out, run.config.block_size, run.config.mask_token_id).items():
            say(console, f"{name}: {command}")
    return figures


def _write_provenance(run: Run, layout: str, directory: Path, figures: dict[str, float]) -> None:
    """Says in `diffvl.json` what was exported and proven; a native checkpoint keeps what it says already. Raises DiskError."""
    file = directory / checkpoint.STATE_FILE
    facts = read_json(file) if file.is_file() else {"kind": "export", "parents": [str(run.directory)]}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    exported = {"layout": layout, "from": str(run.directory), "created": now, "versions": machine.versions(), "parity": figures}
    write_json(file, {**facts, "export": exported})


def _require_layout(run: Run, layout: str, out: Path) -> None:
    """Raises UnsupportedModelError if the layout cannot express the model; names those that can."""
    if faults := _faults(run, layout):
        fitting = [name for name in LAYOUTS if not _faults(run, name)]
        raise UnsupportedModelError(
            f"{run.directory}: the layout {layout} cannot express this model: {'; '.join(faults)}. "
            f"{' and '.join(fitting)} can: {shell_line('diffvl', 'export', run.directory, '--layout', fitting[0], '-o', out)}"
        )


def _faults(run: Run, layout: str) -> list[str]:
    """Lists what a layout cannot express of a run; of gated adapters only the native one knows anything."""
    if run.is_lossless and layout != "native":
        return ["its adapters act on drafts only, so they cannot be merged into its weights"]
    return LAYOUTS[layout].faults(run)


def _require_free(out: Path) -> None:
    """Raises UsageError if writing `out` would touch something that is there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty; nothing was written. Choose another -o, or remove it")
    partial = checkpoint.partial(out)
    if partial.exists() and not (partial / MARK).is_file():
        raise UsageError(f"{partial} is there, and no export left it; nothing was written. Choose another -o, or remove it")
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir():
        raise UsageError(f"{out} cannot be made: {parent} is not a directory. Choose another -o")


@contextmanager
def _written_whole(out: Path) -> Iterator[Path]:
    """Gives a directory to write into, which takes its name when it is whole; after an error nothing of it stays."""
    made = [path for path in out.absolute().parents if not path.exists()]
    partial = checkpoint.partial(out)
    if partial.exists():  # left by an export that was killed
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    (partial / MARK).touch()
    try:
        yield partial
        (partial / MARK).unlink()
        checkpoint.finish(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for path in made:
            path.rmdir()
        raise
