"""Other people's programs on exported checkpoints: `make test-clients`. Each runs in a process that cannot import diffvl, in an
environment of its own where it needs one, and must give the answers that the model gives in memory.

A client that is not there is skipped, with what to do: `CLIENTS` names the folder with checkouts `SDAR-VL` and `SDAR` (of
JetAstra), and with environments `lmdeploy` and `lm-eval`, as docs/interop.md makes them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from clients.program import NEW, QUESTIONS, chat, picture
from helpers import QUIET
from tiny_runs import stage, succeed, write_recipe

from diffvl.demo import standins
from diffvl.export.run import export
from diffvl.store.checkpoint import load_checkpoint

pytestmark = [pytest.mark.client]

FOLDER = Path(os.environ.get("CLIENTS", "clients"))
PROGRAM = Path(__file__).with_name("program.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tower: Path, shapes: dict[str, Path]) -> Path:
    """A tiny Qwen3 with a SigLIP tower, aligned on squares, then trained on blocks and tiles with LoRA."""
    folder = tmp_path_factory.mktemp("whole")
    trunk = standins.make_trunk(folder / "trunk", "qwen3", published_ids=True)
    diffuse = stage(
        "diffuse", shapes["train"], data={"max_length": 510}, tiling={"kind": "anyres", "grids": ["1x1-2x2"], "max_tiles": 3}
    )
    diffuse["lora"] = {"rank": 4, "alpha": 8}
    recipe = write_recipe(folder / "recipe.yaml", tower, align=stage("align", shapes["align"]), diffuse=diffuse)
    succeed("convert", trunk, "--recipe", recipe, "--set", "prepare.vision_layer=-1", "--out", folder / "run")
    return folder / "run" / "diffuse"


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Layout -> an export of the run; `adapters`: the native one with the adapters apart."""

    @cache
    def make(layout: str) -> Path:
        out = tmp_path_factory.mktemp("exported") / layout
        export(run, "native" if layout == "adapters" else layout, out, QUIET, keep_adapters=layout == "adapters")
        return out

    return make


@pytest.fixture(scope="module")
def answers(run: Path) -> Callable[..., list[list[int]]]:
    """The model's own answers in memory to all questions: without a picture, or without and with one in turn."""
    model, processor = load_checkpoint(run)

    def ask(pictures: bool, **settings: Any) -> list[list[int]]:
        found = []
        for question in QUESTIONS:
            for image in (None, picture()) if pictures else (None,):
                inputs = processor.apply_chat_template(chat(question, image), tokenize=True, add_generation_prompt=True)
                ids: Any = model.eval().generate(**inputs, max_new_tokens=NEW, **settings)
                found.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
        return found

    return ask


def client(name: str, directory: Path, *words: object, python: Path | str = sys.executable) -> Any:
    """What a client of program.py prints, run alone."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    program = [str(python), "-I", str(PROGRAM), name, str(directory), *map(str, words)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env={**environment, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def checkout(name: str) -> Path:
    """A public repository's checkout; the test is skipped without it."""
    if not (FOLDER / name / "generate.py").is_file():
        pytest.skip(f"no {FOLDER / name}/generate.py: check JetAstra/{name} out there, or set CLIENTS")
    return (FOLDER / name).absolute()


def environment(name: str) -> Path:
    """The interpreter of a client's own environment; the test is skipped without it."""
    python = FOLDER / name / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no {python}: make this environment as docs/interop.md says, or set CLIENTS")
    return python.absolute()


def begins(theirs: list[list[int]], ours: list[list[int]]) -> bool:
    """Whether all answers are ours; scripts fill the last block up, where `generate` ends with the stop or the last token."""
    return len(theirs) == len(ours) and all(own and one[: len(own)] == own for one, own in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("layout", ["sdar_v", "native"])
def test_sdar_vl_generate(layout: str, exported: Callable[[str], Path], answers: Callable[..., list[list[int]]]):
    found = client("sdar_vl", exported(layout), checkout("SDAR-VL"))
    assert begins(found["answers"], answers(pictures=True))


@pytest.mark.parametrize("layout", ["sdar", "sdar_v", "native"])
def test_sdar_generate(layout: str, exported: Callable[[str], Path], answers: Callable[..., list[list[int]]]):
    """From left to right: with top_k=1 its confidence is 1 for every token, so that the others of its orders mean nothing."""
    found = client("sdar", exported(layout), checkout("SDAR"))
    assert begins(found["answers"], answers(pictures=False, remasking="sequential"))


@pytest.mark.parametrize("layout", ["native", "sdar_v"])
def test_pipeline(layout: str, run: Path, exported: Callable[[str], Path], answers: Callable[..., list[list[int]]]):
    _, processor = load_checkpoint(run)
    expected = [processor.decode(ids, skip_special_tokens=True) for ids in answers(pictures=True)]
    assert client("pipeline", exported(layout))["texts"] == expected


@pytest.mark.parametrize("layout", ["native", "sdar_v", "sdar"])
def test_auto_model_for_causal_lm(layout: str, exported: Callable[[str], Path], answers: Callable[..., list[list[int]]]):
    assert client("causal", exported(layout))["answers"] == answers(pictures=False)


def test_peft(exported: Callable[[str], Path], answers: Callable[..., list[list[int]]]):
    """The adapters beside the weights, loaded by peft and not merged, answer as the merged weights; without them it is not so."""
    found = client("peft", exported("adapters"))
    assert found["answers"] == answers(pictures=False) and found["without"] != found["answers"]


@pytest.mark.parametrize("engine", ["lmdeploy"])
def test_engines_load_every_weight(engine: str, exported: Callable[[str], Path]):
    """Their own configuration, model class and weight loader on a CPU: every tensor goes to its place, bit for bit."""
    found = client(engine, exported("sdar"), python=environment(engine))
    assert found["mask_token"] == 151669 and found["rope_theta"] == 10000.0
    assert found["missing"] == [] and found["different"] == [] and found["parameters"] > 0


@pytest.mark.parametrize("layout", ["native", "sdar_v"])
def test_lm_eval_multimodal(layout: str, exported: Callable[[str], Path], answers: Callable[..., list[list[int]]], run: Path):
    found = client("lm_eval", exported(layout), python=environment("lm-eval"))
    _, processor = load_checkpoint(run)
    expected = processor.decode(answers(pictures=True)[1], skip_special_tokens=True)
    assert found["texts"] == [expected]


def test_questions_tell_models_apart(answers: Callable[..., list[list[int]]]):
    """Answers that are alike would prove little."""
    found = answers(pictures=True)
    assert len({tuple(ids) for ids in found}) == len(found) and any(len(set(ids)) > 1 for ids in found)
