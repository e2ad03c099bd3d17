"""The command itself, run whole on tiny stand-ins: what the tests of bad input, of whole runs and of kills share."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from diffvl import cli

BLOCK = 4
MAX_LENGTH = 400  # tokens; the built-in pictures' questions take up to 300 in the stand-ins' bytes


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def command(*words: object) -> Ended:
    """Runs `diffvl WORDS` in this process, from its entry point."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["diffvl", *map(str, words)])
        patch.setattr(sys, "excepthook", sys.excepthook)  # Typer replaces it
        with pytest.raises(SystemExit) as stop:
            cli.main()
    code = stop.value.code
    assert isinstance(code, int)
    return Ended(code, out.getvalue(), err.getvalue())


def process(*words: object, **environment: str) -> Ended:
    """Runs `diffvl WORDS` in a process of its own."""
    program = [sys.executable, "-c", "from diffvl.cli import main; main()", *map(str, words)]
    variables = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=variables)
    return Ended(done.returncode, done.stdout, done.stderr)


def succeed(*words: object) -> Ended:
    """Runs a command that must end well."""
    ended = command(*words)
    assert ended.code == 0, ended.err
    return ended


def stage(kind: str, train: Path, **settings: Any) -> dict[str, Any]:
    """A stage's section: two steps of two samples in fp32, nothing held out, unless `settings` say otherwise."""
    objective: dict[str, Any] = {"kind": "ar"}
    rates = {"connector": 1e-3}
    if kind == "diffuse":
        objective = {"kind": "block_diffusion", "block_size": BLOCK}
        rates = {"trunk": 1e-3, "connector": 1e-3, "mask_row": 1e-3}
    common = {"objective": objective, "trainable": rates, "steps": 2, "batch_size": 2, "precision": "fp32"}
    return {**common, **settings, "data": {"train": str(train), "max_length": MAX_LENGTH, **settings.get("data", {})}}


def write_recipe(file: Path, tower: Path, **stages: dict[str, Any]) -> Path:
    """A recipe file with these stages."""
    file.write_text(yaml.safe_dump({"prepare": {"vision_tower": str(tower)}, "stages": stages}), encoding="utf-8")
    return file


@dataclass(frozen=True)
class Run:
    """A finished run of both stages. output: what the command printed."""

    root: Path
    recipe: Path
    output: str

    @property
    def align(self) -> Path:
        return self.root / "align"

    @property
    def diffuse(self) -> Path:
        return self.root / "diffuse"


_MADE: dict[str, Run] = {}


def finished_run(factory: pytest.TempPathFactory, source: Callable[[str], Path], tower: Path, shapes: dict[str, Path]) -> Run:
    """Both stages on the llama stand-in, with a held-out record each, made once a session; not to be written into."""
    if not _MADE:
        folder = factory.mktemp("finished")
        shown = {"data": {"holdout": 1}, "eval_every": 2, "eval_limit": 1}
        stages = {"align": stage("align", shapes["align"], **shown), "diffuse": stage("diffuse", shapes["train"], **shown)}
        recipe = write_recipe(folder / "recipe.yaml", tower, **stages)
        ended = succeed("convert", source("llama"), "--recipe", recipe, "--out", folder / "run")
        _MADE["llama"] = Run(folder / "run", recipe, ended.out)
    return _MADE["llama"]


def tree(directory: Path) -> dict[str, tuple[int, int]]:
    """Everything under a directory: path -> (size, modification time in ns), to see that nothing was touched."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.stat()
        found[str(path.relative_to(directory))] = (status.st_size if path.is_file() else 0, status.st_mtime_ns)
    return found


def record(image: str | None = "good.png", question: str = "<image>\nWhat is it?", answer: str = "A red dot.") -> dict[str, Any]:
    """One record of LLaVA's form; its picture, if any, must lie beside the data file."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} if image is None else {"image": image, "conversations": turns}


def write_data(folder: Path, *records: dict[str, Any], name: str = "data.json") -> Path:
    """A data file with these records, one a line (record i from 0 starts in line i + 2), and `good.png` beside it."""
    Image.new("RGB", (20, 30), "red").save(folder / "good.png")
    file = folder / name
    file.write_text("[\n" + ",\n".join(json.dumps(value) for value in records) + "\n]\n", encoding="utf-8")
    return file
