"""A program in a process of its own, or in several that find each other (gloo): `on_processes` asks, fork_server.py answers with
`answer`."""

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measured_process
import sharded_process
import train_process
from forks import Forks

from diffvl.cli import main as cli


def fresh() -> None:
    """An interpreter of its own, as a launcher starts it."""
    os.execv(sys.executable, [sys.executable, "-m", "diffvl.cli", *sys.argv[1:]])


PROGRAMS: dict[str, Any] = {
    "diffvl": cli.main,
    "fresh diffvl": fresh,
    "train": train_process.main,
    "sharded": sharded_process.main,
    "killed": sharded_process.killed,
    "gather": sharded_process.gather,
    "measured": measured_process.main,
}
PATIENCE = 400  # seconds


@dataclass(frozen=True)
class Ended:
    """How one of the processes ended."""

    code: int
    out: str
    err: str


def on_processes(forks: Forks, folder: Path, program: str, words: Sequence[object], number: int = 2) -> list[Ended]:
    """Runs one of PROGRAMS so often, as ranks 0, 1 ... of one run; all are gone at the end, whatever happens. What they print
    goes through files in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(number)}
    environments = [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)] if number > 1 else [{}]
    files = [[folder / f"{rank}.{stream}" for stream in ("out", "err")] for rank in range(number)]
    told = [list(map(str, pair)) for pair in files]
    codes = forks.ask("together", program=program, words=list(map(str, words)), environments=environments, files=told)
    texts = [[file.read_text(encoding="utf-8") for file in pair] for pair in files]
    return [Ended(code, *pair) for code, pair in zip(codes, texts, strict=True)]


# --- in the server ---------------------------------------------------------------------------------------------------------


def answer(program: str, words: list[str], environments: list[dict[str, str]], files: list[list[str]]) -> list[int]:
    """The exit codes of the processes, one for each environment; a number below zero is the signal that ended it."""
    running = [start(program, words, *given) for given in zip(environments, files, strict=True)]
    children, codes, until = list(running), dict[int, int](), time.monotonic() + PATIENCE
    while running:
        if time.monotonic() > until:
            for child in running:
                os.kill(child, signal.SIGKILL)  # still unwaited for, so the number is its own
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
                running.remove(child)
        time.sleep(0.02)
    return [codes[child] for child in children]


def start(program: str, words: list[str], environment: dict[str, str], files: list[str]) -> int:
    """The number of a new process; there, it runs the program and ends."""
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        for number, file in enumerate([os.devnull, *files]):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.argv = [program, *words]
        with open(os.devnull, encoding="utf-8") as sys.stdin:  # one that nothing has been read from
            PROGRAMS[program]()
        sys.exit()
    return child
