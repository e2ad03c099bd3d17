"""Runs of the command that are killed at a chosen moment: started by test_kill.py with a JSON list of [moment, words].

Every run is a process of its own (forked from this one, which has only imported the package) and ends by SIGKILL. For each one
the number of the signal that ended it is printed, or minus its exit code.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffvl import checkpoint, cli, convert, train


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_step() -> None:
    """In the fourth step, the last of which a checkpoint knows being the second."""
    whole = train.StageTrainer.compute_loss

    def compute_loss(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step == 3:
            die()
        return whole(self, *arguments, **named)

    train.StageTrainer.compute_loss = compute_loss


def while_a_checkpoint_is_written() -> None:
    """The second checkpoint has its weights, and neither optimiser nor random state nor name."""
    whole = train.StageTrainer._save

    def save(self: Any, *arguments: Any, **named: Any) -> None:
        whole(self, *arguments, **named)
        if self.state.global_step == 4:
            die()

    train.StageTrainer._save = save


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


def run(moment: str, words: list[str]) -> int:
    """Ends this process, one way or another."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = nowhere
        MOMENTS[moment]()
        sys.argv = ["diffvl", *words]
        cli.main()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    for moment, words in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            run(moment, words)
        print(-os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
