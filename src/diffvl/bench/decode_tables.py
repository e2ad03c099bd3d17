"""A report of `diffvl bench decode` as tables: headings and rows of words, for whoever prints them."""

from collections.abc import Sequence
from typing import Any

from diffvl.bench.decode_bars import DecodeVerdict
from diffvl.bench.tables import NOT_MEASURED, Table


def decode_tables(machine: dict[str, Any], rows: Sequence[dict[str, Any]], bars: Sequence[DecodeVerdict]) -> list[Table]:
    """What is printed, in order: the machine, the decoders, the bars."""
    return [machine_table(machine, rows), rows_table(rows), (["bar", "limit", "here", ""], [_bar_words(bar) for bar in bars])]


def machine_table(machine: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Table:
    """One line per fact."""
    settings = machine["settings"]
    repeats = ", ".join(
        f"{count} of {machine['prompts'][batch]} prompts at batch {batch}" for batch, count in machine["repeats"].items()
    )
    words = {
        **_machine_words(machine),
        "model": machine["model"],
        "run": f"{machine['device']}, {machine['dtype']}, {machine['threads']} threads; medians of interleaved repeats "
        f"({repeats}); load before {machine['load_before']}",
        "answers": f"{_range(machine['prompt_tokens'])} prompt tokens at batch 1, up to {machine['new_tokens']} new ones, "
        f"context {machine['context']}, grid {machine['grid']}, low_confidence_static, greedy",
        "tokens/s": "whole calls, prompt included; published is single-sample: at every batch its tokens/s is that of batch 1",
        "weight streaming": f"{machine['weight_bytes'] / 1e9:.3g} GB at {machine['bytes_per_second'] / 1e9:.3g} GB/s: "
        f"{machine['floor_seconds'] * 1e3:.3g} ms a forward",
        "ours = published": f"same {machine['equal_tokens']} tokens at "
        + ", ".join(f"{steps}" for steps in machine["steps"])
        + f" steps, {machine['different_tokens']} different ones among them",
    }
    if any(row["compiled"] for row in rows):
        words["compiled"] = "the same tokens as the plain form, place by place: " + ", ".join(
            f"{row['decoder']} {row['steps']} {row['equal_to_plain']:.0%}" for row in rows if row["compiled"]
        )
    if settings["quick"]:
        words["quick"] = "tiny sizes: these figures mean nothing"
    return ["", ""], list(words.items())


def rows_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The comparison itself; ratios are of tokens per second."""
    headings = ["decoder", "steps", "block", "batch", "forwards/token", "tokens/s", "spread", "first token s", "ms/forward"]
    lines = []
    for row in rows:
        lines.append(
            (
                row["decoder"] + (" compiled" if row["compiled"] else ""),
                str(row["steps"]),
                str(row["block_size"]),
                str(row["batch"]),
                f"{row['forwards_per_token']:.3f}",
                f"{row['tokens_per_second']:.4g}",
                f"{row['spread']:.0%}",
                f"{row['first_token_seconds']:.3g}",
                _maybe(row["forward_seconds"], 1e3, ".3g"),
                _maybe(row["ratio_to_ar"]),
                _maybe(row["ratio_to_published"]),
            )
        )
    return [*headings, "/ ar_generate", "/ published"], lines


def sweep_tables(machine: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[Table]:
    """What `--sweep` prints."""
    words = {
        **_machine_words(machine),
        "model": machine["model"],
        "run": f"{machine['device']}, {machine['dtype']}, {machine['threads']} threads, batch 1, "
        f"load before {machine['load_before']}",
        "answers": f"{machine['questions']} questions of {machine['settings']['data']}, low_confidence_dynamic, "
        f"{machine['steps']} steps for blocks of {machine['block_size']}, greedy",
    }
    headings = ["threshold", "tokens/forward", "tokens/s", "exact match", "edit similarity", "tokens", "forwards"]
    lines = [
        (
            f"{row['threshold']:g}",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['tokens_per_second']:.4g}",
            f"{row['exact_match']:.3f}",
            f"{row['edit_similarity']:.3f}",
            str(row["tokens"]),
            str(row["forwards"]),
        )
        for row in rows
    ]
    return [(["", ""], list(words.items())), (headings, lines)]


def decode_bar_lines(bars: Sequence[DecodeVerdict]) -> list[str]:
    """The bars as plain lines."""
    return ["  ".join(_bar_words(bar)) for bar in bars]


def _machine_words(machine: dict[str, Any]) -> dict[str, str]:
    return {
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['accelerator'] or 'no GPU'}",
        "software": f"torch {machine['torch']}, transformers {machine['transformers']}; {machine['date']}",
    }


def _bar_words(bar: DecodeVerdict) -> tuple[str, str, str, str]:
    met = {True: "met", False: "NOT met", None: "not measured"}[bar.met]
    number = ".0f" if bar.relation == "=" else ".2f"
    return bar.text, f"{bar.relation} {bar.limit:{number}}", _maybe(bar.value, 1.0, number), met


def _range(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _maybe(value: float | None, factor: float = 1.0, form: str = ".2f") -> str:
    return NOT_MEASURED if value is None else f"{value * factor:{form}}"
