"""The Python API: what `import diffvl` loads, what each function answers, and how it refuses."""

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from block_checkpoints import block_checkpoint
from helpers import random_image
from tiny_runs import record, stage, succeed, write_data, write_recipe

import diffvl
from diffvl.conversion import run as conversion
from diffvl.conversion.run import ConvertRequest
from diffvl.decode.answer import DecodeSettings
from diffvl.errors import CheckpointError, ConfigError, DataError, DiffvlError, UsageError
from diffvl.evaluation import evaluate as evaluation

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = [block for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "diffvl." in block]


@pytest.fixture(scope="module")
def checkpoint(prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return block_checkpoint(prepared("llama"), tmp_path_factory.mktemp("api") / "llama", context="causal")


@pytest.fixture(scope="module")
def loaded_model(checkpoint: Path) -> Any:
    return diffvl.load(checkpoint)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    random_image(3).save(tmp_path / "seen.png")
    return tmp_path / "seen.png"


# --- import ----------------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy():
    program = (
        "import sys, diffvl\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'PIL', 'pydantic', 'rich', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert all(hasattr(diffvl, name) for name in diffvl.__all__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT / "src")}
    )
    assert done.returncode == 0, done.stderr


# --- the README ------------------------------------------------------------------------------------------------------------


def test_the_first_snippet_of_the_readme_goes_from_import_to_an_answer(
    checkpoint: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As it stands, where the demo's files lie."""
    snippet = SNIPPETS[0]
    assert len([line for line in snippet.splitlines() if line]) <= 5
    directory, shown = re.findall(r'"([^"]+/[^"]+)"', snippet)
    for place, target in ((tmp_path / directory, checkpoint), (tmp_path / shown, image)):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert capsys.readouterr().out == f"{names['answer'].text}\n" and names["answer"].tokens > 0


def test_every_call_in_the_readme_fits_its_function():
    calls = [node for snippet in SNIPPETS for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    ours = [call for call in calls if isinstance(call.func, ast.Attribute) and ast.unparse(call.func).startswith("diffvl.")]
    assert {call.func.attr for call in ours if isinstance(call.func, ast.Attribute)} == set(diffvl.__all__) - {"DiffvlError"}
    for call in ours:
        assert isinstance(call.func, ast.Attribute)
        function = getattr(diffvl, call.func.attr)
        inspect.signature(function).bind(*call.args, **{str(word.arg): word.value for word in call.keywords})


# --- convert ---------------------------------------------------------------------------------------------------------------


def test_convert_takes_every_word_of_the_command(monkeypatch: pytest.MonkeyPatch):
    seen: list[ConvertRequest] = []
    monkeypatch.setattr(conversion, "convert", lambda request: seen.append(request) or Path("done"))
    words: dict[str, Any] = {
        **{"model": Path("dir"), "stage": "align", "recipe": "llava", "data": "a.json", "start": "s", "out": "o"},
        **dict.fromkeys(("lora", "resume", "accept_changed_data", "dry_run", "measure", "trust_remote_code"), True),
        "machine": "8x80GB",
        "speed": False,
    }
    given = {"seed": 1, "stages.align.data.eval": Path("held out.json"), "stages.align.trainable": {"connector": 1e-5}}
    assert diffvl.convert(**words, settings=given) == Path("done")
    (request,) = seen
    assert {field.name for field in fields(ConvertRequest)} == words.keys() | {"assignments", "control"}
    paths = {name: Path(words[name]) for name in ("data", "start", "out")}
    expected = {**words, **paths, "model": "dir"}
    assert {name: getattr(request, name) for name in words} == expected
    assert request.assignments == (
        "seed=1",
        'stages.align.data.eval="held out.json"',
        'stages.align.trainable={"connector": 1e-05}',
    )


def test_convert_without_words_asks_for_what_the_command_asks_for():
    with pytest.raises(UsageError, match="name a MODEL"):
        diffvl.convert()
    with pytest.raises(UsageError, match="name a MODEL"):
        diffvl.convert(control=True)
    with pytest.raises(UsageError, match="--no-speed has no effect without --control"):
        diffvl.convert("llama", speed=False)


def test_settings_reach_the_recipe_and_any_file_name_does(source: Callable[[str], Path], tower: Path, tmp_path: Path):
    """A name outside the basic plane too, which JSON spells as two halves of a character."""
    data = write_data(tmp_path, *[record()] * 3).rename(tmp_path / "\N{GRINNING FACE}.json")
    recipe = write_recipe(tmp_path / "recipe.yaml", tower, align=stage("align", tmp_path / "none.json"))
    out = tmp_path / "out"
    words: dict[str, Any] = {"recipe": recipe, "out": out, "dry_run": True}
    assert diffvl.convert(source("llama"), data=data, **words) == out and not out.exists()
    assert diffvl.convert(source("llama"), settings={"stages.align.data.train": data}, **words) == out
    with pytest.raises(ConfigError, match=r"stages\.align\.stepps: unknown key"):
        diffvl.convert(source("llama"), data=data, settings={"stages.align.stepps": 3}, **words)
    with pytest.raises(ConfigError, match=r"stages\.align\.steps: a recipe cannot hold .*complex"):
        diffvl.convert(source("llama"), data=data, settings={"stages.align.steps": 3j}, **words)


# --- load, generate, evaluate ------------------------------------------------------------------------------------------------


def test_generate_answers_what_the_command_answers(checkpoint: Path, loaded_model: Any, image: Path):
    words = ("--prompt", "What is it?", "--image", image, "--max-new-tokens", 12, "--json")
    told = json.loads(succeed("generate", checkpoint, *words).out)
    for images in (image, str(image), [image], random_image(3)):
        answer = diffvl.generate(loaded_model, "What is it?", images=images, max_new_tokens=12)
        assert (answer.text, answer.tokens, answer.forwards) == tuple(told[name] for name in ("text", "tokens", "forwards"))


def test_generate_without_an_image(loaded_model: Any):
    assert diffvl.generate(loaded_model, "Hi", max_new_tokens=4).tokens <= 4


@pytest.mark.parametrize(
    ("words", "kind", "says"),
    [
        ({"max_new_token": 3}, UsageError, "no setting of decoding is called max_new_token; there are: .*max_new_tokens"),
        ({"mode": "beam"}, UsageError, "beam"),
        ({"max_new_tokens": 0}, UsageError, "max.new.tokens"),
        ({"images": "none.png"}, DataError, "images: .*none.png does not exist"),
        ({"images": ["none.png"]}, DataError, "images: .*none.png does not exist"),
        ({"max_new_tokens": 10**9}, UsageError, "do not fit the context"),
    ],
)
def test_a_mistake_is_a_diffvl_error(words: dict[str, Any], kind: type[DiffvlError], says: str, loaded_model: Any):
    with pytest.raises(kind, match=says):
        diffvl.generate(loaded_model, "Hi", **words)


def test_generate_asks_for_a_loaded_checkpoint(checkpoint: Path):
    with pytest.raises(UsageError, match="what diffvl.load gives"):
        diffvl.generate(str(checkpoint), "Hi")  # type: ignore[arg-type]


def test_load_refuses_what_is_no_checkpoint(tmp_path: Path, source: Callable[[str], Path]):
    for directory in (tmp_path / "none", tmp_path, source("llama")):
        with pytest.raises(CheckpointError):
            diffvl.load(directory)


def test_evaluate_asks_for_what_the_command_asks_for(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(evaluation, "evaluate_directory", lambda *given: asked.append(given) or {"exact_match": 1.0})
    assert diffvl.evaluate("dir", "test.json", limit=1) == {"exact_match": 1.0}
    assert succeed("evaluate", "dir", "--data", "test.json", "--limit", 1, "--json").out == '{"exact_match": 1.0}\n'
    assert asked[0] == asked[1] == (Path("dir"), Path("test.json"), 1, DecodeSettings())
    diffvl.evaluate("dir", "test.json", denoising_steps=2)
    assert asked[2] == (Path("dir"), Path("test.json"), None, DecodeSettings(denoising_steps=2))
    with pytest.raises(UsageError, match="no setting of decoding is called step"):
        diffvl.evaluate("dir", "test.json", step=2)
