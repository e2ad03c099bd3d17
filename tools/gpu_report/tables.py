"""A report's figures -> the tables for docs/, in Markdown. Standard library alone."""

from collections.abc import Iterable, Sequence
from typing import Any

from tools.gpu_report.run import Outcome

Figures = dict[str, Any]


def page(report: Figures, outcomes: Sequence[Outcome]) -> str:
    """The whole page: the machine, what was done, and a section for each kind of part that has figures."""
    found = {outcome.name: outcome.figures for outcome in outcomes if outcome.figures is not None}
    decoding = [figures for name, figures in found.items() if name.startswith("decode-")]
    training = [figures for name, figures in found.items() if name.startswith("train-")]
    sections = [
        _head(report),
        _parts(outcomes),
        *([_decoding(decoding), _floor(decoding)] if decoding else []),
        *([_training(training)] if training else []),
        *([_sharding(found["sharding"])] if "sharding" in found else []),
        *([_memory(found["memory"])] if "memory" in found else []),
        *([_tests(found["tests"])] if "tests" in found else []),
    ]
    return "\n".join(sections)


def machines_of(outcomes: Iterable[Outcome]) -> list[str]:
    """What the parts say of the machine that they ran on: one line, unless a report was gone on with elsewhere."""
    found = []
    for outcome in outcomes:
        machine = (outcome.figures or {}).get("machine")
        if machine is not None:
            where = f"{machine['accelerator']}, {machine['dtype']}" if machine["device"] == "cuda" else machine["cpu"]
            found.append(f"{where}, torch {machine['torch']}, transformers {machine['transformers']}")
    return list(dict.fromkeys(found))


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; `|` and line breaks inside a cell are written so that they stay in it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '/').replace(chr(10), ' ') for cell in line)} |\n" for line in lines)


def _head(report: Figures) -> str:
    machines = "; and ".join(report["machines"]) or "nothing was measured"
    quick = "\nTiny sizes (`--quick`): these figures mean nothing.\n" if report["quick"] else ""
    return f"# GPU report, {report['date']}\n\nMachine: {machines}. Command: `{report['command']}`.\n{quick}"


def _parts(outcomes: Sequence[Outcome]) -> str:
    rows = [(one.name, one.state, _number(one.seconds, ".0f"), one.why or "") for one in outcomes]
    return "## Parts\n\n" + table(["part", "state", "seconds", "why"], rows)


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
    return f"## Decoding\n\n{about}" + table(heads, rows)


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
    return f"## The weight-streaming floor\n\n{about}" + table(
        ["batch", "decoder", "steps", "ms/forward", "floor ms", "ratio"], rows
    )


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
    return f"## A training step\n\nTrunk: {trunk}; forward and backward, batch 1; ratios are of step times.\n\n" + table(
        heads, rows
    )


def _sharding(figures: Figures) -> str:
    rows = [
        (name, _number(one["step_seconds"], ".4g"), _number(one["peak_bytes"], ".2f", 1e-9), f"{one['losses'][-1]:.5f}")
        for name, one in (("whole", figures["whole"]), ("fully_shard, one process", figures["sharded"]))
    ]
    told = "agree" if figures["agrees"] else "DO NOT AGREE"
    apart = figures["largest_difference"]
    how = "not all are finite" if apart is None else f"largest difference {apart:.1e} (allowed {figures['tolerance']:.0e})"
    about = f"Losses of {len(figures['whole']['losses'])} steps {told}: {how}.\n\n"
    return f"## FSDP2 in one process\n\n{about}" + table(["model", "step s", "peak GB", "last loss"], rows)


def _memory(figures: Figures) -> str:
    lines = "\n".join(figures["lines"])
    return f"## Memory: the plan and the peak\n\nRandom model, {figures['widths']}.\n\n```\n{lines}\n```\n"


def _tests(figures: Figures) -> str:
    rows = [*((name, message) for name, message in figures["failed"].items())]
    about = f"{figures['passed']} passed, {len(rows)} failed, {figures['skipped']} skipped, {figures['seconds']} s.\n"
    return f"## Tests\n\n{about}" + ("\n" + table(["failed", "message"], rows) if rows else "")
