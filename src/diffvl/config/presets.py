"""The YAML files that come with diffvl: one for each architecture family in `convert/`, one for each method in `recipes/`."""

from pathlib import Path
from typing import Literal

from diffvl.errors import ConfigError


def presets(folder: Literal["convert", "recipes"]) -> Path:
    """Finds the folder inside the installed package or, in a checkout, at the root of the repository."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "presets" / folder, package.parents[1] / folder):
        if candidate.is_dir():
            return candidate
    raise ConfigError(f"the folder {folder}/ is not in {package}: this installation is incomplete, reinstall diffvl")


def recipe_names() -> list[str]:
    """Lists the recipes that come with diffvl, in alphabetical order."""
    return sorted(file.stem for file in presets("recipes").glob("*.yaml"))


def find_recipe(name_or_file: str) -> Path:
    """Finds the file of a recipe given by name or by path; a name goes first. Raises ConfigError listing the known names."""
    if name_or_file in recipe_names():
        return presets("recipes") / f"{name_or_file}.yaml"
    file = Path(name_or_file)
    if file.is_file():
        return file
    raise ConfigError(
        f"--recipe {name_or_file!r}: neither a file nor a known recipe. Known: {', '.join(recipe_names())} (see `diffvl recipes`)"
    )
