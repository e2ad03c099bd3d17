"""A program on two processes that find each other (gloo)."""

import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffvl.cli.main as cli


@dataclass(frozen=True)
class Ended:
    """How one of the processes ended."""

    code: int
    out: str
    err: str


def on_two_processes(program: Sequence[object], patience: float = 400) -> list[Ended]:
    """Runs a program twice, as ranks 0 and 1 of one run; both are gone at the end, whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    meeting |= {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    processes = [
        subprocess.Popen(
            list(map(str, program)),
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        texts = [process.communicate(timeout=patience) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [Ended(process.returncode, *pair) for process, pair in zip(processes, texts, strict=True)]
