"""The configuration tree: recipe file + `--set` -> one frozen `Recipe`, resolved once and written out as `run.yaml`.

Unknown keys are errors at every level. Settings that only make sense together live in one variant (a noise schedule, an
objective, a connector), so that a setting without effect is an unknown key, never silently ignored.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from diffvl.errors import ConfigError

VERSION = "0.1.0"  # of diffvl; pyproject.toml reads it here

Part = Literal["tower", "connector", "trunk", "mask_row"]
StageName = Literal["align", "diffuse"]
STAGES: tuple[StageName, ...] = ("align", "diffuse")


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SectionT = TypeVar("SectionT", bound=Section)


# --- noise: the law of t, the mask ratio of a block --------------------------------------------------------------------


class UniformNoise(Section):
    """t ~ U(t_min, t_max), independent per block."""

    schedule: Literal["uniform"] = "uniform"
    t_min: float = Field(default=1e-3, gt=0, le=1, description="lowest mask ratio")
    t_max: float = Field(default=1.0, gt=0, le=1, description="highest mask ratio")
    stratified: bool = Field(
        default=False, description="spread the draws of one sample evenly, then permute them over its blocks"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "UniformNoise":
        if self.t_min > self.t_max:
            raise ValueError(f"t_min ({self.t_min}) must not be above t_max ({self.t_max})")
        return self


class BetaNoise(Section):
    """t ~ Beta(mean * C, (1 - mean) * C); mean and concentration C move linearly with the stage's progress (SDAR-VL, PBNC)."""

    schedule: Literal["beta"] = "beta"
    mean_start: float = Field(default=0.5, gt=0, lt=1)
    mean_end: float = Field(default=0.7, gt=0, lt=1)
    concentration_start: float = Field(default=4.0, gt=0)
    concentration_end: float = Field(default=25.0, gt=0)
    t_min: float = Field(default=1e-3, gt=0, lt=1, description="draws below are raised to it, so that 1/t stays bounded")
    stratified: bool = False


class FullNoise(Section):
    """t = 1: every eligible token is masked."""

    schedule: Literal["full"] = "full"


Noise = Annotated[UniformNoise | BetaNoise | FullNoise, Field(discriminator="schedule")]

# --- objectives --------------------------------------------------------------------------------------------------------


class ArObjective(Section):
    """Next-token cross-entropy on the answers."""

    kind: Literal["ar"] = "ar"


class BlockDiffusionObjective(Section):
    """Masked-token cross-entropy on noised answer blocks (BD3-LM, SDAR-VL, DiffusionVL)."""

    kind: Literal["block_diffusion"] = "block_diffusion"
    block_size: int = Field(default=8, ge=1, le=1024, description="tokens per block")
    context: Literal["block", "causal"] = Field(default="block", description="attention among clean tokens")
    grid: Literal["absolute", "response"] = Field(default="absolute", description="where the block grid has its origin")
    target: Literal["same", "shift"] = Field(default="same", description="position i predicts token i, or i-1 predicts i")
    weight: Literal["1/t", "effective", "none"] = "1/t"
    pad_weight: float = Field(default=1.0, ge=0, description="loss weight of the stop tokens that fill an answer's last block")
    ar_weight: float = Field(default=0.0, ge=0, description="weight of a next-token loss on the clean stream")
    noise: Noise = UniformNoise()

    @model_validator(mode="after")
    def _ar_needs_causal(self) -> "BlockDiffusionObjective":
        if self.ar_weight > 0 and self.context != "causal":
            raise ValueError("ar_weight needs context: causal (a block-causal clean stream sees the tokens it would predict)")
        return self


Objective = Annotated[ArObjective | BlockDiffusionObjective, Field(discriminator="kind")]

# --- model ---------------------------------------------------------------------------------------------------------------


class MlpConnector(Section):
    """Linear, GELU, Linear: the connector of both papers."""

    kind: Literal["mlp2x_gelu"] = "mlp2x_gelu"


class LinearConnector(Section):
    kind: Literal["linear"] = "linear"


class PixelShuffleConnector(Section):
    """Joins `factor` x `factor` neighbouring patches into one image token, then Linear, GELU, Linear."""

    kind: Literal["pixel_shuffle"] = "pixel_shuffle"
    factor: int = Field(default=2, ge=2, le=16)


Connector = Annotated[MlpConnector | LinearConnector | PixelShuffleConnector, Field(discriminator="kind")]


class Prepare(Section):
    """How the AR checkpoint gets its eyes."""

    vision_tower: str | None = Field(
        default=None, description="hub id or directory; default: the named checkpoint's or the family's"
    )
    vision_layer: int = Field(default=-2, description="index into the tower's hidden states, as in LLaVA; -1 is the last layer")
    image_size: int | None = Field(default=None, ge=14, description="pixels per side; default: the tower's own")
    connector: Connector = MlpConnector()


# --- training ------------------------------------------------------------------------------------------------------------


class Lora(Section):
    """Low-rank adapters on the trunk (peft); connector and mask row are still trained in full."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | None = Field(default=None, description="regular expression over module names; default: the family's")


class Optim(Section):
    weight_decay: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)


class Data(Section):
    train: str | None = Field(default=None, description="LLaVA-format .json or .jsonl; `--data` sets it")
    eval: str | None = Field(default=None, description="held-out file of the same format")
    holdout: int = Field(default=0, ge=0, description="without `eval`: this many records are set apart from `train`")
    max_length: int = Field(default=2048, ge=8, description="tokens per sample, images included; a longer record is an error")
    too_long: Literal["error", "drop"] = Field(default="error", description="`drop` leaves longer records out and says how many")
    workers: int = Field(default=0, ge=0)
    check_images: int = Field(
        default=5000, ge=0, description="every picture of a set of up to this many records is decoded once before training"
    )

    @model_validator(mode="after")
    def _one_holdout(self) -> "Data":
        if self.eval is not None and self.holdout:
            raise ValueError("holdout has no effect when eval names a file: remove one of them")
        return self


class Stage(Section):
    """One run of the trainer. No code asks which stage it is in: stages differ by these values alone."""

    objective: Objective
    trainable: dict[Part, Annotated[float, Field(gt=0, lt=1)]] = Field(description="part -> learning rate; others are frozen")
    lora: Lora | None = None
    data: Data = Data()
    optim: Optim = Optim()
    steps: int | None = Field(default=None, ge=1, description="optimiser steps")
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=1, ge=1, description="samples per device and micro-step")
    accumulation: int = Field(default=1, ge=1)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    gradient_checkpointing: bool = False
    log_every: int = Field(default=1, ge=1)
    save_every: int = Field(default=500, ge=1, description="optimiser steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1)
    eval_every: int | None = Field(default=None, ge=1)
    eval_limit: int = Field(default=64, ge=1, description="held-out records used in an evaluation during training")

    @model_validator(mode="after")
    def _consistent(self) -> "Stage":
        if not self.trainable:
            raise ValueError("trainable is empty: name at least one part, e.g. {connector: 1.0e-3}")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.lora is not None and "trunk" not in self.trainable:
            raise ValueError("lora has no effect unless trunk is in trainable")
        if "mask_row" in self.trainable and self.objective.kind == "ar":
            raise ValueError("mask_row has no effect under the ar objective: no token is masked")
        if self.eval_every is not None and self.data.eval is None and self.data.holdout == 0:
            raise ValueError("eval_every has no effect without data.eval or data.holdout")
        return self


class Recipe(Section):
    """A whole run. `run.yaml` beside every output is one of these, resolved."""

    model: str | None = Field(default=None, description="a name from `diffvl models`, a hub id, a directory or a .gguf file")
    seed: int = Field(default=0, ge=0, lt=2**31)
    prepare: Prepare = Prepare()
    stages: dict[StageName, Stage]

    @model_validator(mode="after")
    def _has_stage(self) -> "Recipe":
        if not self.stages:
            raise ValueError("a recipe needs at least one of the stages align, diffuse")
        return self


# --- reading and writing -------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from `path`. Raises ConfigError naming the file (and line, where YAML knows it)."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings at the top, got {type(tree).__name__}")
    return tree


def resolve(tree: dict[str, Any], assignments: list[str], where: str) -> Recipe:
    """The one place where a recipe becomes a `Recipe`.

    Args:
        tree: the recipe as read; it is not changed.
        assignments: `a.b=c` strings in order; values are read as YAML.
        where: what to call the source in an error.
    Raises:
        ConfigError: with every problem at once, each with its key path.
    """
    tree = yaml.safe_load(yaml.safe_dump(tree))
    for assignment in assignments:
        _assign(tree, assignment)
    return parse(Recipe, tree, where)


def parse(kind: type[SectionT], tree: dict[str, Any], where: str) -> SectionT:
    """The tree as a section of this kind. Raises ConfigError with every problem at once; `where` names the source in it."""
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
    """All problems of a validation, one line each: key path as `--set` takes it, what was expected, what was got."""
    lines = [f"  {_problem(details, tree)}" for details in error.errors()]
    return f"{where}: {len(lines)} wrong setting{'s' if len(lines) > 1 else ''}\n" + "\n".join(lines)


def _problem(details: ErrorDetails, tree: dict[str, Any]) -> str:
    """One problem in words."""
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
    """The dotted path of a setting; pydantic's own steps (a variant's name, `[key]`), which no file has, are left out."""
    names: list[str] = []
    node: Any = tree
    for step in location:
        if step == "[key]":
            continue
        if isinstance(node, dict) and step not in node and step in (node.get("kind"), node.get("schedule")):
            continue
        names.append(str(step))
        node = node.get(step) if isinstance(node, dict) else None
    return ".".join(names) or "(top)"


def dump(recipe: Recipe) -> str:
    """The recipe as YAML; reading it back gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
