"""What is installed with the package: every import is declared, the types and the licence travel with it."""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def normal(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[\s\[<>=!~;]", requirement)[0]) for requirement in requirements}


@cache
def imported(folder: Path) -> set[str]:
    """Top-level modules that the files of a folder import, at the top or inside functions, but for the standard library."""
    names: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names)


distributions = cache(packages_distributions)


@cache
def needed(folder: Path) -> set[str]:
    """The distributions that the files of a folder import."""
    providers = distributions()
    return {normal(name) for module in imported(folder) - {"diffvl"} for name in providers.get(module, [module])}


def test_every_import_is_declared_and_every_declaration_is_imported():
    """What the server alone imports is an extra, and so is lmms-eval, which may be absent here."""
    always, server = declared(PROJECT["dependencies"]), declared(PROJECT["optional-dependencies"]["serve"])
    benchmarks = declared(PROJECT["optional-dependencies"]["eval"])
    assert needed(ROOT / "src") == always | server | benchmarks and not (server | benchmarks) & always
    assert server <= needed(ROOT / "src" / "diffvl" / "serve")
    rooms = [room for room in (ROOT / "src" / "diffvl").iterdir() if room.is_dir()]
    for extra, own in ((server, "serve"), (benchmarks, "evaluation")):
        assert not extra & {name for room in rooms if room.name != own for name in needed(room)}


def test_the_pins_hold_every_dependency():
    pinned = declared([line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line])
    optional = [name for names in PROJECT["optional-dependencies"].values() for name in names]
    assert declared([*PROJECT["dependencies"], *optional]) <= pinned


def test_the_licence_and_the_types_travel_with_the_package():
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert (ROOT / "src" / "diffvl" / "py.typed").read_text(encoding="utf-8") == ""
