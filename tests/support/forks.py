"""Processes that are there at once: `Forks` asks, and fork_server.py, which has imported the package, forks them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import diffvl.cli.main as cli


class Forks:
    """The program fork_server.py, started when it is first asked, and asked for one thing after the other."""

    def __init__(self, errors: Path) -> None:
        """`errors` gets what it says on stderr."""
        self._errors = errors
        self._process: subprocess.Popen[str] | None = None

    def ask(self, kind: str, **job: Any) -> Any:
        """What the server answers to a job of one of its kinds."""
        self._process = self._process or self._start()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"kind": kind, **job}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self.said()
        return json.loads(answer)

    def said(self) -> str:
        return self._errors.read_text(encoding="utf-8")

    def _start(self) -> subprocess.Popen[str]:
        variables = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        program = [sys.executable, Path(__file__).with_name("fork_server.py")]
        with self._errors.open("wb") as file:
            return subprocess.Popen(program, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True)

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process:
            self._process.communicate()
