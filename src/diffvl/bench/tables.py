"""A report of `diffvl bench train` as tables: headings and rows of words, for whoever prints them."""

from collections.abc import Iterator, Sequence
from typing import Any

from diffvl.bench.bars import Verdict

Table = tuple[list[str], list[tuple[str, ...]]]
NOT_MEASURED = "-"


def tables(machine: dict[str, Any], rows: Sequence[dict[str, Any]], fits: dict[str, Any], bars: Sequence[Verdict]) -> list[Table]:
    """What is printed, in order: the machine, the forms, kernels, fits, bars."""
    found = [machine_table(machine), forms_table(rows)]
    found += [kernels_table(row) for row in rows if "top_kernels" in row]
    if fits:
        found.append(fits_table(fits))
    return [*found, bars_table(bars)]


def machine_table(machine: dict[str, Any]) -> Table:
    """One line per fact."""
    rounds = machine["settings"]["repeats"]
    words = {
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['accelerator'] or 'no GPU'}",
        "software": f"torch {machine['torch']}, transformers {machine['transformers']}; {machine['date']}",
        "trunk": ", ".join(f"{name} {value}" for name, value in machine["trunk"].items()),
        "run": f"{machine['device']}, {machine['dtype']}, {machine['threads']} threads, batch 1, medians of {rounds} "
        f"interleaved rounds, load before {machine['load_before']}",
        "step": "forward and backward; the optimiser's step is not in it",
        "memory": machine["memory_method"],
        "matmul peak": f"{machine['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s; MFU counts {machine['model_flops']}",
        "ours = published": "relative difference "
        + ", ".join(f"{name} {value:.1e}" for name, value in machine["relative_difference_to_published"].items()),
    }
    if machine["settings"]["quick"]:
        words["quick"] = "tiny sizes: these figures mean nothing"
    return ["", ""], list(words.items())


def forms_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The comparison itself; ratios are of step times."""
    others = list(rows[0]["ratio_to"])
    headings = [
        "shape",
        "form",
        "attention",
        "step s",
        "spread",
        "tokens/s (L)",
        "peak GB",
        "MFU",
        *(f"/ {other}" for other in others),
    ]
    lines = []
    for row in rows:
        lines.append(
            (
                row["shape"],
                row["form"],
                row["attention"],
                f"{row['step_seconds']:.4g}",
                f"{row['spread']:.0%}",
                f"{row['tokens_per_second']:.4g}",
                NOT_MEASURED if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.3f}",
                f"{row['mfu']:.1%}",
                *(f"{row['ratio_to'][other]:.3f}" for other in others),
            )
        )
    return headings, lines


def kernels_table(row: dict[str, Any]) -> Table:
    """What a step of ours goes to."""
    lines = [
        (entry["name"][:90], str(entry["calls"]), f"{entry['seconds'] * 1e3:.2f}", f"{entry['share']:.1%}")
        for entry in row["top_kernels"]
    ]
    return [f"{row['form']}, {row['shape']}: kernel", "calls", "ms", "share"], lines


def fits_table(fits: dict[str, Any]) -> Table:
    """The fitted growth of the time, with its points."""
    return ["time grows with", "form", "fit", "points"], list(_fit_lines(fits))


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


def bars_table(bars: Sequence[Verdict]) -> Table:
    """Each bar, its limit, and how this run stands to it."""
    return ["bar", "limit", "here", ""], [_bar_words(bar) for bar in bars]


def bar_lines(bars: Sequence[Verdict]) -> list[str]:
    """The same, as plain lines."""
    return ["  ".join(_bar_words(bar)) for bar in bars]


def _bar_words(bar: Verdict) -> tuple[str, str, str, str]:
    met = {True: "met", False: "NOT met", None: "not measured"}[bar.met]
    return bar.text, f"<= {bar.limit:.2f}", NOT_MEASURED if bar.value is None else f"{bar.value:.3f}", met
