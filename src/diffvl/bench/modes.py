"""`diffvl bench modes DIR --data FILE`: the same weights answering the same questions in blocks and token by token.

The question that a converted model has to answer first: is it faster than it was? Blocks settle by confidence, as many tokens at
once as are above `THRESHOLD`.
"""

from typing import Any

from rich.console import Console

from diffvl.bench import machine
from diffvl.bench.answered import AnswersBench, answer_all, described, load_questions, totals
from diffvl.hub.settings_diffvl import DecodeSettings

THRESHOLD = 0.9


def compare_modes(request: AnswersBench, console: Console) -> dict[str, Any]:
    """{"machine", "rows", "speedup"}: a row for each mode; speedup: tokens per second in blocks, in those token by token.

    Raises:
        CheckpointError, DataError, UsageError: as `load_questions`.
    """
    load_before = round(machine.load(), 2)
    decoder, asked = load_questions(request)
    ways = {
        "blocks": DecodeSettings(max_new_tokens=request.new_tokens, remasking="low_confidence_dynamic", threshold=THRESHOLD),
        "ar": DecodeSettings(max_new_tokens=request.new_tokens, mode="ar"),
    }
    rows = [{"mode": name, **totals(found)} for name, found in answer_all(decoder, asked, ways, console).items()]
    blocks, ar = rows
    head = described(request, decoder, len(asked), load_before) | {"threshold": THRESHOLD}
    return {"machine": head, "rows": rows, "speedup": blocks["tokens_per_second"] / ar["tokens_per_second"]}


def modes_line(report: dict[str, Any]) -> str:
    """The comparison in one line."""
    blocks, ar = report["rows"]
    return (
        f"in blocks of {report['machine']['block_size']}: {_speed(blocks)}; token by token: {_speed(ar)}; "
        f"{report['speedup']:.2f} times the speed, {blocks['answers']} answers one at a time"
    )


def _speed(row: dict[str, Any]) -> str:
    return (
        f"{row['tokens_per_forward']:.2f} tokens per forward, {row['tokens_per_second']:.1f} tokens/s, "
        f"exact match {row['exact_match']:.2f}"
    )
