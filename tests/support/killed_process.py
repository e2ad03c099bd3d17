"""Runs of the command that are killed, each in a process of its own: `Killer` asks, fork_server.py answers with `answer`.

A run ends by SIGKILL at the moment asked for: a named place in the code (`MOMENTS`), the n-th file operation, or a time after
training began, which the server waits for outside the run. What runs do comes back through a pipe, so that it is known up to
the very moment of the kill.
"""

import itertools
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypedDict

from forks import Forks
from torch.distributed.checkpoint import state_dict_saver
from transformers import modeling_utils

from diffvl.cli import main as cli
from diffvl.conversion import run as convert
from diffvl.store import checkpoint
from diffvl.train import checkpoints, loop

Tell = Callable[[str, object], None]


class Moment(TypedDict, total=False):
    """When to kill: one of the first three. saving: count operations of saves only. part: how much of the file stays when the
    n-th operation writes tensors."""

    place: str
    seconds: float
    operation: int
    saving: bool
    part: float


@dataclass
class Story:
    """What is known of a run. steps: begun, by the number of optimiser steps done before. saved: steps of the checkpoints whose
    saving ended. operations: file operations since training began, of_saves: those of saves among them; last: the one before
    which, or in which, it was killed. seconds: since training began. saving: whether a checkpoint was being saved at the end."""

    signal: int = 0
    code: int = 0
    steps: list[int] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    operations: int = 0
    of_saves: int = 0
    last: str = ""
    seconds: float = 0.0
    saving: bool = False


class Killer:
    """What asks for one run after the other."""

    def __init__(self, forks: Forks) -> None:
        self._forks = forks

    def run(self, words: list[str], folder: Path, moment: Moment | None = None) -> Story:
        """Runs the command; file operations under `folder` count."""
        return Story(**self._forks.ask("killed", words=words, folder=str(folder), moment=moment or {}))

    def said(self) -> str:
        return self._forks.said()


# --- named places ----------------------------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_step() -> None:
    """In the fourth step, the last of which a checkpoint knows being the second."""
    whole = loop.loss_of

    def loss_of(*arguments: Any) -> Any:
        if arguments[-1].step == 3:
            die()
        return whole(*arguments)

    loop.loss_of = loss_of


def while_a_checkpoint_is_written() -> None:
    """The second checkpoint has its tensors, and neither state nor name."""
    whole, saves = state_dict_saver.save, itertools.count(1)

    def save(*arguments: Any, **named: Any) -> Any:
        whole(*arguments, **named)
        if next(saves) == 2:
            die()

    state_dict_saver.save = save  # type: ignore[assignment]


def at_a_rename(name: str, before: bool) -> Callable[[], None]:
    """When a file or folder is about to get this name, or has just got it."""

    def install() -> None:
        whole = Path.rename

        def rename(self: Path, target: Path) -> Path:
            if before and Path(target).name == name:
                die()
            new = whole(self, target)
            if Path(target).name == name:
                die()
            return new

        Path.rename = rename  # type: ignore[method-assign]

    return install


def while_the_result_is_written() -> None:
    """All steps are done; the result has its weights and no recipe, report or name."""
    whole = checkpoint.write_checkpoint

    def write_checkpoint(*arguments: Any) -> None:
        whole(*arguments)
        die()

    checkpoint.write_checkpoint = write_checkpoint


def before_the_report() -> None:
    convert.write_report = lambda directory: die()  # type: ignore[assignment]


MOMENTS: dict[str, Callable[[], None]] = {
    "step": in_a_step,
    "checkpoint written": while_a_checkpoint_is_written,
    "checkpoint renamed": at_a_rename("checkpoint-4", before=True),
    "last checkpoint renamed": at_a_rename("checkpoint-6", before=False),
    "result written": while_the_result_is_written,
    "report": before_the_report,
    "finish": at_a_rename("diffuse", before=True),
    "finished": at_a_rename("diffuse", before=False),
}


# --- file operations -------------------------------------------------------------------------------------------------------

RENAMING = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")  # `replace` and `unlink` are told under these names too
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Operations:
    """Counts whatever changes files under a folder once training has begun, and dies at one of them: before a file is opened,
    renamed or removed, or with a part of a file of tensors written."""

    def __init__(self, folder: str, tell: Tell, moment: Moment) -> None:
        self._folder, self._tell = folder, tell
        self._deadly, self._part = moment.get("operation", 0), moment.get("part", 0.0)
        self._of_saves_only = moment.get("saving", False)
        self._count = 0
        self.training = self.saving = False

    def install(self) -> None:
        sys.addaudithook(self._hear)
        # This one writes without Python's knowing.
        modules: Any = modeling_utils
        modules.safe_save_file = self._writing_tensors(modules.safe_save_file, lambda given: Path(given[1]))
        state_dict_saver.save = self._writing_tensors(state_dict_saver.save, lambda _: self._tensors_of_a_checkpoint())

    def _tensors_of_a_checkpoint(self) -> Path:
        (file,) = Path(self._folder).glob(f"*/checkpoints/{checkpoints.STAGING}/*.distcp")
        return file

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.training or (event not in RENAMING and not (event == "open" and arguments[2] & WRITING)):
            return
        # A tree is removed name by name, from inside its open folder.
        inside = self._folder in str(arguments[0]) or (event in ("os.remove", "os.rmdir") and arguments[1] != -1)
        names = arguments[:2] if event == "os.rename" else arguments[:1]  # of a rename the new one, too
        if inside and self._counted(" ".join(map(str, (event, *names)))):
            die()

    def _writing_tensors(self, write: Callable[..., Any], written_file: Callable[[tuple[Any, ...]], Path]) -> Callable[..., Any]:
        def written(*arguments: Any, **named: Any) -> None:
            write(*arguments, **named)
            file = written_file(arguments)
            if self.training and self._counted(f"tensors {file}"):
                os.truncate(file, int(file.stat().st_size * self._part))
                die()

        return written

    def _counted(self, what: str) -> bool:
        """Counts an operation; whether it is the deadly one."""
        self._tell("operation", what)
        counts = self.saving or not self._of_saves_only
        self._count += counts
        return counts and self._count == self._deadly


# --- a run -----------------------------------------------------------------------------------------------------------------


def tell_what_happens(tell: Tell, operations: Operations) -> None:
    """Lets the run tell when training and each step begin, and when a checkpoint is begun and done."""
    whole_run, whole_loss, whole_save = loop.Loop.run, loop.loss_of, checkpoints.save

    def run_and_tell(self: Any, *arguments: Any) -> None:
        tell("training", "")
        operations.training = True
        whole_run(self, *arguments)

    def loss_of(*arguments: Any) -> Any:
        tell("step", arguments[-1].step)
        return whole_loss(*arguments)

    def save(*arguments: Any) -> None:
        tell("saving", "")
        operations.saving = True
        whole_save(*arguments)
        operations.saving = False
        tell("saved", arguments[3]["step"])

    loop.Loop.run = run_and_tell  # type: ignore[method-assign]
    loop.loss_of = loss_of
    checkpoints.save = save


def run(words: list[str], folder: str, moment: Moment, pipe: int) -> None:
    """Ends this process, one way or another."""

    def tell(kind: str, what: object) -> None:
        os.write(pipe, f"{kind} {what}\n".encode())

    with open(os.devnull, "w", encoding="utf-8") as nowhere, open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin, sys.stdout = nothing, nowhere
        os.fsync = lambda _: None  # a kill loses nothing that was written, only a power cut does: no need to wait for a disk
        operations = Operations(folder, tell, moment)
        operations.install()
        if "place" in moment:
            MOMENTS[moment["place"]]()
        tell_what_happens(tell, operations)
        sys.argv = ["diffvl", *words]
        cli.main()


def follow(child: int, pipe: IO[bytes], seconds: float | None) -> Story:
    """Reads what a run tells until it ends, and kills it so many seconds after its training began."""
    story, began, heard, open_end = Story(), 0.0, b"", True
    while open_end:
        wait = None if seconds is None or not began else max(began + seconds - time.monotonic(), 0.0)
        ready, _, _ = select.select([pipe], [], [], wait)
        if not ready:
            os.kill(child, signal.SIGKILL)  # still unwaited for, so the number is its own
            seconds = None
            continue
        new = os.read(pipe.fileno(), 65536)
        open_end = bool(new)
        *lines, heard = (heard + new).split(b"\n")
        for line in lines:
            began = began or (time.monotonic() if line.startswith(b"training") else 0.0)
            hear(story, line.decode())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    story.signal, story.code = (-code, 0) if code < 0 else (0, code)
    story.seconds = time.monotonic() - began if began else 0.0
    return story


def hear(story: Story, line: str) -> None:
    """Adds one line of a run to its story."""
    kind, _, what = line.partition(" ")
    if kind == "operation":
        story.operations, story.of_saves, story.last = story.operations + 1, story.of_saves + story.saving, what
    elif kind == "step" and story.steps[-1:] != [int(what)]:
        story.steps.append(int(what))
    elif kind == "saved":
        story.saved.append(int(what))
    story.saving = kind == "saving" or (story.saving and kind != "saved")


def answer(words: list[str], folder: str, moment: Moment) -> dict[str, Any]:
    """The story of a run in a new process, as `Killer` reads it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        run(words, folder, moment, writing)
    os.close(writing)
    with open(reading, "rb", buffering=0) as pipe:
        return vars(follow(child, pipe, moment.get("seconds")))
