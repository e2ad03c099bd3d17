"""Mistakes that a user can correct. The command line prints the message alone and exits with `EXIT_CODE`.

A message says what is wrong, where (file and line, or key path), what was expected, and what to do.
"""

from collections.abc import Sequence

EXIT_CODE = 2
MACHINE_CODE = 1


class DiffvlError(Exception):
    """Base of all user-facing errors.

    exit_code: with which the command ends; `MACHINE_CODE` where the machine is at fault, not the user's words. told_elsewhere: in
    a run of several processes, whether another one that raises the same prints the message.
    """

    exit_code = EXIT_CODE
    told_elsewhere = False


class ConfigError(DiffvlError):
    """A recipe, a family file or a `--set` value is wrong."""


class DataError(DiffvlError):
    """A record or an image is wrong; the message names file and line or record.

    Args:
        kind: a few words for counting such errors; the same for all records that they apply to.
        ends: whether nothing after it in the file can be read, so that leaving out one record would leave out all the others.
    """

    def __init__(self, message: str, kind: str = "other", ends: bool = False) -> None:
        super().__init__(message)
        self.kind, self.ends = kind, ends


class CheckpointError(DiffvlError):
    """A model directory is missing, incomplete or not of the kind asked for."""


class UnreachableError(CheckpointError):
    """Neither a directory here nor a checkpoint that could be fetched now."""


class UnsupportedModelError(DiffvlError):
    """The model cannot be converted: its architecture cannot take block diffusion through masks, or its weights no training.

    Args:
        kind: the reason in a few words, the same for all models that it applies to.
    """

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class DiskError(DiffvlError):
    """A file cannot be written: no room, a limit, or a file system that can only be read."""


class ProofError(DiffvlError):
    """What was written does not give what the model in memory gives: a fault of this program or this machine."""

    exit_code = MACHINE_CODE


class UsageError(DiffvlError):
    """The command's words do not fit together."""


class ScoringError(DiffvlError):
    """A benchmark's answers cannot be scored: its own code fails, or something that it needs, a judge say, is not there."""

    exit_code = MACHINE_CODE


class TrainingError(DiffvlError):
    """A run cannot go on; the last good checkpoint stays."""


# --- words for messages ----------------------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    """What a library's error says, without what it adds in further lines; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_few(texts: Sequence[str], limit: int) -> list[str]:
    """The first texts, and how many more there are where there are more than `limit`."""
    return [*texts[:limit], *([f"and {len(texts) - limit} more"] if len(texts) > limit else [])]
