"""`diffvl bench decode DIR --data FILE --sweep`: what a lower confidence threshold buys, and what it costs in answers.

`low_confidence_dynamic` with a step for every token of a block, so that the threshold alone decides how many settle at once. At
1.0 no confidence is above it and they settle one by one.
"""

from typing import Any

from rich.console import Console

from diffvl.bench import machine
from diffvl.bench.answered import AnswersBench, Scored, answer_all, described, load_questions, totals
from diffvl.hub.settings_diffvl import DecodeSettings

THRESHOLDS = (1.0, 0.95, 0.9, 0.8, 0.6)


def sweep(request: AnswersBench, console: Console) -> dict[str, Any]:
    """{"machine", "rows"}, one row for each threshold. Raises as `load_questions`."""
    load_before = round(machine.load(), 2)
    decoder, asked = load_questions(request)
    ways = {
        str(threshold): DecodeSettings(max_new_tokens=request.new_tokens, remasking="low_confidence_dynamic", threshold=threshold)
        for threshold in THRESHOLDS
    }
    scored = answer_all(decoder, asked, ways, console)
    head = described(request, decoder, len(asked), load_before)
    return {"machine": head, "rows": [sweep_row(float(name), found) for name, found in scored.items()]}


def sweep_row(threshold: float, found: list[Scored]) -> dict[str, Any]:
    """A threshold with the sums over all its answers."""
    return {"threshold": threshold, **totals(found)}
