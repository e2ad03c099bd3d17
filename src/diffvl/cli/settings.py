"""The flags of decoding, made of the fields of `DecodeSettings`, and what was typed -> checked settings.

Which flags were given is asked of Typer, so that a default shown in `--help` is not taken for something that was typed.
"""

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from inspect import Parameter
from typing import Annotated, Any, Literal, TypeVar, cast, get_type_hints

import typer

from diffvl.decode.flags import SETTINGS, flag
from diffvl.errors import UsageError
from diffvl.hub.settings_diffvl import DecodeSettings

Command = TypeVar("Command", bound=Callable[..., None])

# Bounds that the command line alone has: what lies outside of them would do nothing, or is a matter of the checkpoint.
LEAST = {"denoising_steps": 1, "temperature": 0, "top_k": 1, "seed": 0}
MOST = {"seed": 2**63 - 1}
METAVARS = {"stop_strings": "TEXT", "repetition_stop": "N"}
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the trunk first (CUDA graphs on a GPU): about a minute, then faster.")
]


def with_settings(command: Command) -> Command:
    """Gives a command a flag for each setting, in front of its own keyword-only flags; it gets them in its `**flags`."""
    own = list(inspect.signature(command).parameters.values())
    kinds = [parameter.kind for parameter in own]
    first = next(place for place, kind in enumerate(kinds) if kind in (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD))
    parameters = [*own[:first], *flags(), *(parameter for parameter in own[first:] if parameter.kind != Parameter.VAR_KEYWORD)]
    described: Any = command
    described.__signature__ = inspect.Signature(parameters)
    described.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def flags() -> list[Parameter]:
    """The parameters that Typer makes the flags of."""
    types, described = get_type_hints(DecodeSettings), {one.name: one for one in fields(DecodeSettings)}
    found = [_parameter(described[name], types[name]) for name in SETTINGS]
    return [*found, Parameter("compile", Parameter.KEYWORD_ONLY, default=False, annotation=Compile)]


def _parameter(setting: Field[Any], kind: Any) -> Parameter:
    about, default, literal = setting.metadata, setting.default, cast(Any, Literal)
    if about["choices"]:
        kind = literal[about["choices"]] if default is not None else literal[about["choices"]] | None
    elif isinstance(default, tuple):  # a repeatable flag
        kind, default = list[str] | None, None
    option = typer.Option(
        flag(setting.name),
        help=about["about"],
        min=LEAST.get(setting.name, about["least"]),
        max=MOST.get(setting.name, about["most"]),
        metavar=METAVARS.get(setting.name),
    )
    return Parameter(setting.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def typed(context: typer.Context) -> dict[str, Any]:
    """The parameters that were typed, with their values."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    names = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    return {name: value for name, value in context.params.items() if name in names}


def settings_of(context: typer.Context) -> DecodeSettings:
    """What the flags of a command ask for. Raises UsageError if one of them would have no effect."""
    values = {name: context.params[name] for name in SETTINGS}
    cache = "static" if context.params["compile"] else "dynamic"
    settings = DecodeSettings(**values | {"stop_strings": tuple(values["stop_strings"] or ()), "cache_implementation": cache})
    try:
        settings.check(given=typed(context).keys() & set(SETTINGS), spell=flag)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return settings
