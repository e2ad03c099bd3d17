"""The README tells the truth: its commands parse, its table of families is the one in convert/, its tree is what is written."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from diffvl.cli.main import app
from diffvl.config.families import all_families
from diffvl.store.checkpoint import HUB_FILES, RECIPE_FILE, STATE_FILE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\w*\n(.*?)```", README, flags=re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("diffvl ")]
TARGETS = sorted(set(re.findall(r"`?make ([a-z-]+)", README)))


@pytest.mark.parametrize("line", COMMANDS)
def test_a_diffvl_command_of_the_readme_parses(line: str):
    words = shlex.split(line, comments=True)[1:]
    group = typer.main.get_command(app)
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    context = command.make_context(words[0], words[1:])
    assert context.command.name == words[0] and set(context.params) == {parameter.name for parameter in command.params} - {"help"}


def test_the_readme_shows_every_verb():
    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert {line.split()[1] for line in COMMANDS} >= verbs - {"shapes"}


@pytest.mark.parametrize("target", TARGETS)
def test_a_make_target_of_the_readme_exists(target: str):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def families_table() -> str:
    rows = ["| family | traits | named checkpoints |", "|---|---|---|"]
    rows += [f"| {family.model_type} | {family.note} | {', '.join(family.checkpoints) or '-'} |" for family in all_families()]
    return "\n".join(rows)


def test_the_table_of_families_is_up_to_date():
    assert families_table() in README, f"put this into README.md:\n{families_table()}"


def test_the_tree_names_the_files_that_are_written():
    for name in (RECIPE_FILE, STATE_FILE, "metrics.jsonl", "samples.jsonl", "report.html", "model.safetensors"):
        assert name in README
    assert all(name.endswith("_diffvl.py") for name in HUB_FILES) and "*_diffvl.py" in README
