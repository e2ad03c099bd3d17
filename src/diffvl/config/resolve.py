"""The YAML files that come with diffvl, and recipe file + `--set` -> `Recipe`: resolved once, written out as `run.yaml`, every
mistake named by its key path."""

from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from diffvl.config.recipe import Recipe
from diffvl.config.section import Section
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


SectionT = TypeVar("SectionT", bound=Section)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping from `path`. Raises ConfigError naming the file (and line, where YAML knows it)."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings at the top, got {type(tree).__name__}")
    return tree


def _unshared(node: Any, around: tuple[int, ...] = ()) -> Any:
    """Copies a tree of settings. What YAML names once (`&a`) and uses twice (`*a`) becomes two copies, so that a change of one
    does not reach the other. Raises ConfigError for a section that stands in itself."""
    if not isinstance(node, dict | list):
        return node
    if id(node) in around:
        raise ConfigError("a section of the recipe stands in itself: an alias (*name) inside of what its anchor (&name) names")
    around = (*around, id(node))
    if isinstance(node, list):
        return [_unshared(one, around) for one in node]
    return {key: _unshared(value, around) for key, value in node.items()}


def resolve(tree: dict[str, Any], assignments: list[str], where: str) -> Recipe:
    """Turns a recipe into a `Recipe`; nothing else does.

    Args:
        tree: the recipe as read; it is not changed.
        assignments: `a.b=c` strings in order; values are read as YAML.
        where: what to call the source in an error.
    Raises:
        ConfigError: with every problem at once, each with its key path.
    """
    tree = _unshared(tree)
    known = _stages_of(tree)
    for assignment in assignments:
        _assign(tree, assignment)
    for name, stage in _stages_of(tree).items():
        if name not in known and not (isinstance(stage, dict) and "objective" in stage):
            raise ConfigError(f"--set stages.{name}: {where} has no stage {name!r}, only {', '.join(known) or 'none'}")
    return parse(Recipe, tree, where)


def _stages_of(tree: dict[str, Any]) -> dict[str, Any]:
    stages = tree.get("stages")
    return dict(stages) if isinstance(stages, dict) else {}


def parse(kind: type[SectionT], tree: dict[str, Any], where: str) -> SectionT:
    """Reads the tree as a section of this kind. Raises ConfigError with every problem at once; `where` names the source in it."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_describe(error, tree, where)) from error


def _assign(tree: dict[str, Any], assignment: str) -> None:
    """Sets one dotted key in place, making the sections on the way."""
    key, separator, text = assignment.partition("=")
    names = key.strip().split(".")
    if not separator or not all(names):
        raise ConfigError(f"--set {assignment!r}: expected KEY=VALUE with a dotted key, e.g. --set stages.diffuse.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment!r}: the value is not valid YAML: {error}") from error
    node = tree
    for name in names[:-1]:
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {assignment!r}: {name} is a value, not a section")
        node = child
    node[names[-1]] = value


def _describe(error: ValidationError, tree: dict[str, Any], where: str) -> str:
    """Lists all problems of a validation, one line each: key path as `--set` takes it, what was expected, what was got."""
    lines = [f"  {_problem(details, tree)}" for details in error.errors()]
    return f"{where}: {len(lines)} wrong setting{'s' if len(lines) > 1 else ''}\n" + "\n".join(lines)


def _problem(details: ErrorDetails, tree: dict[str, Any]) -> str:
    """Puts one problem in words."""
    path = _key_path(details["loc"], tree)
    if details["type"] == "extra_forbidden":
        return f"{path}: unknown key"
    if details["type"] in ("union_tag_not_found", "union_tag_invalid"):
        context = details.get("ctx", {})
        key = context["discriminator"].strip("'")
        if "tag" not in context:
            return f"{path}.{key}: missing, it says which kind of {path.rpartition('.')[2]} this is"
        return f"{path}.{key}: expected one of {context['expected_tags']} (got {context['tag']!r})"
    message = details["msg"].removeprefix("Value error, ")
    given = "" if isinstance(details["input"], (dict, BaseModel)) else f" (got {details['input']!r})"
    return f"{path}: {message}{given}"


def _key_path(location: tuple[int | str, ...], tree: dict[str, Any]) -> str:
    """Writes the dotted path of a setting; pydantic's own steps (a variant's name, `[key]`), which no file has, are left out."""
    names: list[str] = []
    node: Any = tree
    for step in location:
        if step == "[key]" or str(step).startswith("("):  # the second: forms of `sources`
            continue
        if isinstance(node, dict) and step not in node and step in (node.get("kind"), node.get("schedule")):
            continue
        names.append(str(step))
        node = (
            node.get(step) if isinstance(node, dict) else node[step] if isinstance(node, list) and isinstance(step, int) else None
        )
    return ".".join(names) or "(top)"


def dump(recipe: Recipe) -> str:
    """Writes the recipe as YAML; reading it back gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
