"""Comparisons as tables: headings and cells, for the one printer (`diffvl.cli.output.print_table`)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from diffvl.bench.comparison import AnswersRow, Comparison, DecodeRow, TrainRow

Table = tuple[list[str], list[tuple[str, ...]]]
T = TypeVar("T")

NOT_MEASURED = "-"
QUICK = "tiny sizes: these figures mean nothing"


def table(columns: dict[str, Callable[[T], str]], rows: Sequence[T]) -> Table:
    """Makes a table of rows. columns: heading -> the cell of a row."""
    return list(columns), [tuple(cell(row) for cell in columns.values()) for row in rows]


def facts_table(facts: dict[str, str]) -> Table:
    """Makes a table with a line for each fact."""
    return ["", ""], list(facts.items())


def _number(value: float | None, form: str = ".2f", factor: float = 1.0) -> str:
    return NOT_MEASURED if value is None else f"{value * factor:{form}}"


def _machine_facts(machine: dict[str, Any]) -> dict[str, str]:
    return {
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['accelerator'] or 'no GPU'}",
        "software": f"torch {machine['torch']}, transformers {machine['transformers']}; {machine['date']}",
    }


def _device(machine: dict[str, Any]) -> str:
    return f"{machine['device']}, {machine['dtype']}, {machine['threads']} threads"


# --- diffvl bench train ----------------------------------------------------------------------------------------------------


def train_tables(comparison: Comparison[TrainRow]) -> list[Table]:
    """Returns what is printed, in order: the machine, the forms, kernels, fits."""
    rows, fits = comparison.rows, comparison.more["fits"]
    tables = [_train_facts(comparison.machine), forms_table(rows)]
    tables += [_kernels_table(row, row.top_kernels) for row in rows if row.top_kernels is not None]
    if fits:
        tables.append((["time grows with", "form", "fit", "points"], list(_fit_lines(fits))))
    return tables


def _train_facts(machine: dict[str, Any]) -> Table:
    differences = machine["relative_difference_to_published"].items()
    facts = {
        **_machine_facts(machine),
        "trunk": ", ".join(f"{name} {value}" for name, value in machine["trunk"].items()),
        "run": f"{_device(machine)}, batch 1, medians of {machine['settings']['repeats']} interleaved rounds, "
        f"load before {machine['load_before']}",
        "step": "forward and backward; the optimiser's step is not in it",
        "memory": machine["memory_method"],
        "matmul peak": f"{machine['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s; MFU counts {machine['model_flops']}",
        "ours = published": "relative difference " + ", ".join(f"{name} {value:.1e}" for name, value in differences),
    }
    if machine["settings"]["quick"]:
        facts["quick"] = QUICK
    return facts_table(facts)


def forms_table(rows: Sequence[TrainRow]) -> Table:
    """Makes the table of the forms; ratios are of step times."""
    columns: dict[str, Callable[[TrainRow], str]] = {
        "shape": lambda row: row.shape,
        "form": lambda row: row.form,
        "attention": lambda row: row.attention,
        "step s": lambda row: f"{row.step_seconds:.4g}",
        "spread": lambda row: f"{row.spread:.0%}",
        "tokens/s (L)": lambda row: f"{row.tokens_per_second:.4g}",
        "peak GB": lambda row: _number(row.peak_bytes, ".3f", 1e-9),
        "MFU": lambda row: f"{row.mfu:.1%}",
    }
    for other in rows[0].ratio_to:
        columns[f"/ {other}"] = lambda row, other=other: f"{row.ratio_to[other]:.3f}"
    return table(columns, rows)


def _kernels_table(row: TrainRow, kernels: list[dict[str, Any]]) -> Table:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        f"{row.form}, {row.shape}: kernel": lambda entry: entry["name"][:90],
        "calls": lambda entry: str(entry["calls"]),
        "ms": lambda entry: f"{entry['seconds'] * 1e3:.2f}",
        "share": lambda entry: f"{entry['share']:.1%}",
    }
    return table(columns, kernels)


def _fit_lines(fits: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    by_length, by_answer = fits["length"], fits["answer"]
    for form, fit in by_length.items():
        if isinstance(fit, dict):
            points = _points("L", by_length["lengths"], fit["seconds"])
            yield f"L, at R={by_length['answer']}", form, f"L^{fit['exponent']:.2f}", points
    for form, fit in by_answer.items():
        if isinstance(fit, dict):
            line = f"{fit['intercept']:.3g} + {fit['slope']:.3g} R s (R^2 {fit['r_squared']:.3f}); R^{fit['exponent']:.2f}"
            yield f"R, at L={by_answer['length']}", form, line, _points("R", by_answer["answers"], fit["seconds"])


def _points(name: str, sizes: Sequence[int], seconds: Sequence[float]) -> str:
    return f"{name} " + ", ".join(f"{size}: {value:.3g} s" for size, value in zip(sizes, seconds, strict=True))


# --- diffvl bench decode ---------------------------------------------------------------------------------------------------


def decode_tables(comparison: Comparison[DecodeRow]) -> list[Table]:
    """Returns what is printed, in order: the machine, the decoders. Ratios are of tokens per second."""
    columns: dict[str, Callable[[DecodeRow], str]] = {
        "decoder": lambda row: row.name,
        "steps": lambda row: str(row.steps),
        "block": lambda row: str(row.block_size),
        "batch": lambda row: str(row.batch),
        "forwards/token": lambda row: f"{row.forwards_per_token:.3f}",
        "tokens/s": lambda row: f"{row.tokens_per_second:.4g}",
        "spread": lambda row: f"{row.spread:.0%}",
        "first token s": lambda row: f"{row.first_token_seconds:.3g}",
        "ms/forward": lambda row: _number(row.forward_seconds, ".3g", 1e3),
        "/ ar_generate": lambda row: _number(row.ratio_to_ar),
        "/ published": lambda row: _number(row.ratio_to_published),
    }
    return [_decode_facts(comparison.machine, comparison.rows), table(columns, comparison.rows)]


def _decode_facts(machine: dict[str, Any], rows: Sequence[DecodeRow]) -> Table:
    repeats = ", ".join(
        f"{count} of {machine['prompts'][batch]} prompts at batch {batch}" for batch, count in machine["repeats"].items()
    )
    facts = {
        **_machine_facts(machine),
        "model": machine["model"],
        "run": f"{_device(machine)}; medians of interleaved repeats ({repeats}); load before {machine['load_before']}",
        "answers": f"{_range(machine['prompt_tokens'])} prompt tokens at batch 1, up to {machine['new_tokens']} new ones, "
        f"context {machine['context']}, grid {machine['grid']}, low_confidence_static, greedy",
        "tokens/s": "whole calls, prompt included; published is single-sample: at every batch its tokens/s is that of batch 1",
        "weight streaming": f"{machine['weight_bytes'] / 1e9:.3g} GB at {machine['bytes_per_second'] / 1e9:.3g} GB/s: "
        f"{machine['floor_seconds'] * 1e3:.3g} ms a forward",
        "ours = published": f"same {machine['equal_tokens']} tokens at {', '.join(map(str, machine['steps']))} steps, "
        f"{machine['different_tokens']} different ones among them",
    }
    shares = [f"{row.decoder} {row.steps} {row.equal_to_plain:.0%}" for row in rows if row.equal_to_plain is not None]
    if shares:
        facts["compiled"] = "the same tokens as the plain form, place by place: " + ", ".join(shares)
    if machine["settings"]["quick"]:
        facts["quick"] = QUICK
    return facts_table(facts)


def _range(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def sweep_tables(comparison: Comparison[AnswersRow]) -> list[Table]:
    """Returns what `--sweep` prints."""
    machine = comparison.machine
    facts = {
        **_machine_facts(machine),
        "model": machine["model"],
        "run": f"{_device(machine)}, batch 1, load before {machine['load_before']}",
        "answers": f"{machine['questions']} questions of {machine['settings']['data']}, low_confidence_dynamic, "
        f"{machine['steps']} steps for blocks of {machine['block_size']}, greedy",
    }
    columns: dict[str, Callable[[AnswersRow], str]] = {
        "threshold": lambda row: _number(row.threshold, "g"),
        "tokens/forward": lambda row: f"{row.tokens_per_forward:.2f}",
        "tokens/s": lambda row: f"{row.tokens_per_second:.4g}",
        "exact match": lambda row: f"{row.exact_match:.3f}",
        "edit similarity": lambda row: f"{row.edit_similarity:.3f}",
        "tokens": lambda row: str(row.tokens),
        "forwards": lambda row: str(row.forwards),
    }
    return [facts_table(facts), table(columns, comparison.rows)]
