"""A report's figures -> the tables for docs/, in Markdown. Standard library alone."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tools.gpu_report.origin import Origin
from tools.gpu_report.run import Outcome

Figures = dict[str, Any]
UNEXPECTED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)  # where figures are not what a table needs


def page(command: str, quick: bool, origin: Origin, outcomes: Sequence[Outcome]) -> str:
    """The whole page: the machine, what was done, and a section for each kind of part that has figures.

    Args:
        command, origin: of the last run.
    """
    sections = [_head(command, quick, origin, outcomes), _parts(outcomes)]
    for heading, start, build in SECTIONS:
        parts = [one for one in outcomes if one.figures is not None and one.name.startswith(start)]
        if parts:
            sections.append(_section(heading, parts, build))
    return "\n".join(sections)


def machines_of(outcomes: Iterable[Outcome]) -> list[str]:
    """What the parts say of the machine that they ran on: one line, unless a report was gone on with elsewhere.

    A part whose figures name no machine stands for its accelerator.
    """
    found, names = [], []
    for outcome in outcomes:
        machine = (outcome.figures or {}).get("machine")
        if isinstance(machine, dict):
            told = {name: machine.get(name, "?") for name in ("accelerator", "dtype", "cpu", "torch", "transformers")}
            where = "{accelerator}, {dtype}" if machine.get("device") == "cuda" else "{cpu}"
            found.append((where + ", torch {torch}, transformers {transformers}").format(**told))
        elif outcome.figures is not None and outcome.origin is not None and outcome.origin.accelerator is not None:
            names.append(outcome.origin.accelerator)
    names = [name for name in names if not any(line.startswith(f"{name},") for line in found)]
    return list(dict.fromkeys([*found, *names]))


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; `|` and line breaks inside a cell are written so that they stay in it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '/').replace(chr(10), ' ') for cell in line)} |\n" for line in lines)


def _head(command: str, quick: bool, origin: Origin, outcomes: Sequence[Outcome]) -> str:
    machines = "; and ".join(machines_of(outcomes)) or "nothing was measured"
    last = f"Last run: {origin.date}, {origin.device}, diffvl {origin.code}, `{command}`."
    notes = ["Tiny sizes (`--quick`): these figures mean nothing."] if quick else []
    others = [one.name for one in outcomes if one.figures is not None and _source(one) != (origin.device, origin.code)]
    if others:
        notes.append(f"Kept from another accelerator or other code than the last run's: {', '.join(others)}; see Parts.")
    return f"# GPU report\n\nMachine: {machines}. {last}\n" + "".join(f"\n{note}\n" for note in notes)


def _source(outcome: Outcome) -> tuple[str, str]:
    """The accelerator and the code of a part, as they are told."""
    return ("?", "?") if outcome.origin is None else (outcome.origin.device, outcome.origin.code)


def _parts(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for one in outcomes:
        origin = ("-",) * 3 if one.seconds is None else (one.origin.date if one.origin else "?", *_source(one))
        rows.append((one.name, one.state, _number(one.seconds, ".0f"), *origin, one.why or ""))
    return "## Parts\n\n" + table(["part", "state", "seconds", "date", "accelerator", "diffvl", "why"], rows)


def _section(heading: str, parts: Sequence[Outcome], build: Callable[[list[Figures]], str]) -> str:
    """A section of some parts; a line in its place where their figures are not what it is made of."""
    sources = {one.name: _source(one) for one in parts}
    mixed = "; ".join(f"{name} {device}, diffvl {code}" for name, (device, code) in sources.items())
    about = f"Not all of one accelerator and code: {mixed}.\n\n" if len(set(sources.values())) > 1 else ""
    try:
        told = build([one.figures for one in parts if one.figures is not None])
    except UNEXPECTED as error:
        told = f"This section could not be made ({type(error).__name__}: {error}); its figures are in report.json.\n"
    return f"## {heading}\n\n{about}{told}"


def _number(value: float | None, form: str = ".2f", factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:{form}}"


def _decoding(found: Sequence[Figures]) -> str:
    heads = [
        "batch",
        "decoder",
        "steps",
        "forwards/token",
        "tokens/s",
        "spread",
        "first token s",
        "ms/forward",
        "/ AR",
        "/ published",
    ]
    rows = [
        (
            row["batch"],
            row["decoder"] + (" compiled" if row["compiled"] else ""),
            row["steps"],
            _number(row["forwards_per_token"], ".3f"),
            _number(row["tokens_per_second"], ".4g"),
            _number(row["spread"], ".0%"),
            _number(row["first_token_seconds"], ".3g"),
            _number(row["forward_seconds"], ".3g", 1e3),
            _number(row["ratio_to_ar"]),
            _number(row["ratio_to_published"]),
        )
        for figures in found
        for row in figures["rows"]
    ]
    machine = found[0]["machine"]
    about = (
        f"{machine['model']}; up to {machine['new_tokens']} new tokens, context {machine['context']}; / AR: tokens per second "
    )
    about += (
        "over those of transformers' `generate` without compiling, same batch, same process. Compiled: CUDA graphs on a GPU.\n\n"
    )
    return about + table(heads, rows)


def _floor(found: Sequence[Figures]) -> str:
    """A forward over the time in which the memory delivers the weights."""
    rows = [
        (
            row["batch"],
            row["decoder"] + (" compiled" if row["compiled"] else ""),
            row["steps"],
            _number(row["forward_seconds"], ".3g", 1e3),
            _number(figures["machine"]["floor_seconds"], ".3g", 1e3),
            _number(None if row["forward_seconds"] is None else row["forward_seconds"] / figures["machine"]["floor_seconds"]),
        )
        for figures in found
        for row in figures["rows"]
        if row["decoder"] != "published"
    ]
    machine = found[0]["machine"]
    about = f"{machine['weight_bytes'] / 1e9:.3g} GB of weights at {machine['bytes_per_second'] / 1e9:.4g} GB/s, measured.\n\n"
    return about + table(["batch", "decoder", "steps", "ms/forward", "floor ms", "ratio"], rows)


def _training(found: Sequence[Figures]) -> str:
    ratios = list(found[0]["rows"][0]["ratio_to"])
    heads = ["shape", "form", "attention", "step s", "spread", "tokens/s", "peak GB", "MFU", *(f"/ {name}" for name in ratios)]
    rows = [
        (
            row["shape"],
            row["form"],
            row["attention"],
            _number(row["step_seconds"], ".4g"),
            _number(row["spread"], ".0%"),
            _number(row["tokens_per_second"], ".4g"),
            _number(row["peak_bytes"], ".2f", 1e-9),
            _number(row["mfu"]),
            *(_number(row["ratio_to"][name]) for name in ratios),
        )
        for figures in found
        for row in figures["rows"]
    ]
    trunk = ", ".join(f"{name} {value}" for name, value in found[0]["machine"]["trunk"].items())
    return f"Trunk: {trunk}; forward and backward, batch 1; ratios are of step times.\n\n" + table(heads, rows)


def _sharding(found: Sequence[Figures]) -> str:
    (figures,) = found
    rows = [
        (name, _number(one["step_seconds"], ".4g"), _number(one["peak_bytes"], ".2f", 1e-9), f"{one['losses'][-1]:.5f}")
        for name, one in (("whole", figures["whole"]), ("fully_shard, one process", figures["sharded"]))
    ]
    told = "agree" if figures["agrees"] else "DO NOT AGREE"
    apart = figures["largest_difference"]
    how = "not all are finite" if apart is None else f"largest difference {apart:.1e} (allowed {figures['tolerance']:.0e})"
    about = f"Losses of {len(figures['whole']['losses'])} steps {told}: {how}.\n\n"
    return about + table(["model", "step s", "peak GB", "last loss"], rows)


def _memory(found: Sequence[Figures]) -> str:
    (figures,) = found
    lines = "\n".join(figures["lines"])
    return f"Random model, {figures['widths']}.\n\n```\n{lines}\n```\n"


def _tests(found: Sequence[Figures]) -> str:
    (figures,) = found
    rows = [*((name, message) for name, message in figures["failed"].items())]
    about = f"{figures['passed']} passed, {len(rows)} failed, {figures['skipped']} skipped, {figures['seconds']} s.\n"
    return about + ("\n" + table(["failed", "message"], rows) if rows else "")


SECTIONS: tuple[tuple[str, str, Callable[[list[Figures]], str]], ...] = (  # heading, how the names of its parts begin, its maker
    ("Decoding", "decode-", _decoding),
    ("The weight-streaming floor", "decode-", _floor),
    ("A training step", "train-", _training),
    ("FSDP2 in one process", "sharding", _sharding),
    ("Memory: the plan and the peak", "memory", _memory),
    ("Tests", "tests", _tests),
)
