"""A comparison -> one page: the table, curves on top of each other, quality against speed, and answers side by side where they
differ. It is one file; nothing is fetched.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffvl.compare.compare import BATCHES, Compared, Row
from diffvl.compare.settings import SINGLE, STEPS
from diffvl.config.resolve import dump
from diffvl.evaluation.bootstrap import FEWEST, LEVEL, Interval
from diffvl.evaluation.questions import asked
from diffvl.evaluation.scored import Question, ScoredAnswer
from diffvl.report.chart import Chart, Line, axis_note, escape, ticks_up_to, ticks_with_zero
from diffvl.report.charts import draw_overlaid
from diffvl.report.document import document, table
from diffvl.report.visuals import draw_visual
from diffvl.store.checkpoint import RECIPE_FILE, recipe_of
from diffvl.store.files import replace_text

PAGE_SAMPLES = 40
NO_FIGURE = "–"


def write_page(compared: Compared, path: Path) -> None:
    """Writes the page. Raises DiskError."""
    replace_text(path, _page(compared))


# --- the table -------------------------------------------------------------------------------------------------------------


def headings(compared: Compared) -> list[str]:
    """Names the columns of `cells`."""
    timed = [f"{name}, batch {batch}" for batch in BATCHES for name in ("tokens/s", "first token s")]
    figures = ["exact match", f"against {compared.rows[0].way.run}", "edit similarity", "tokens/forward"]
    return ["run", "decoding", *figures, *(timed if compared.machine["timed"] else [])]


def cells(compared: Compared) -> list[tuple[str, ...]]:
    """Gives a line of text for each run under each way to decode."""
    return [(row.way.run, row.way.name, *_figures(row)) for row in compared.rows]


def _figures(row: Row) -> Iterator[str]:
    yield interval(row.exact)
    yield NO_FIGURE if row.difference is None else interval(row.difference, "+.3f")
    yield f"{row.similarity:.3f}"
    yield f"{row.speeds[1].tokens_per_forward:.2f}" if row.speeds else f"{row.way.tokens_per_forward:.2f}"
    for batch in BATCHES:
        if row.speeds:
            yield f"{row.speeds[batch].tokens_per_second:.4g}"
            yield f"{row.speeds[batch].first_token_seconds:.3g}"


def interval(one: Interval, form: str = ".3f") -> str:
    """Writes a figure with its interval, where it has one."""
    if one.low is None or one.high is None:
        return f"{one.value:{form}}"
    return f"{one.value:{form}} [{one.low:{form}}, {one.high:{form}}]"


def notes(compared: Compared) -> list[str]:
    """Says how the figures were made, line by line."""
    machine = compared.machine
    said = [
        f"{len(compared.questions)} questions of {compared.held_out.told()}; answers of up to {machine['max_new_tokens']} "
        "tokens, greedy; exact match counts an answer if every word of it is right.",
        certainty(machine),
    ]
    if machine["timed"]:
        said.append(
            f"Times: {machine['device']}, {machine['dtype']}, {machine['threads']} threads, {machine['cpu']}, "
            f"{machine['cores']} cores, {machine['accelerator'] or 'no GPU'}; load before {machine['load_before']}; "
            f"{machine['date']}. {machine['timed_questions']} questions, one by one and 8 together, {machine['rounds']} rounds "
            "by turns in one process with all models in memory; medians of rounds. First token: until the first tokens were "
            "predicted. Tokens per forward: at batch 1 on these questions."
        )
    else:
        said.append(f"Nothing was timed: {machine['untimed']}. Tokens per forward are those of batches of 8.")
    said.append("AR runs decode with transformers' own generate. A forward of a block costs more than one of a token.")
    return said


def certainty(machine: Mapping[str, Any]) -> str:
    """Says how sure the figures are."""
    if machine["records"] < FEWEST:
        return f"There are no intervals: they take {FEWEST} records at least. Any difference may be chance."
    return (
        f"In brackets: {LEVEL:.0%} intervals, paired bootstrap over the records ({machine['draws']:,} draws, seed "
        f"{machine['seed']}), and Wilson's bound where all records are alike. A difference whose interval holds 0 may be chance. "
        "Intervals know nothing of other seeds of training."
    )


# --- the page --------------------------------------------------------------------------------------------------------------


def _page(compared: Compared) -> str:
    title = f"{', '.join(one.name for one in compared.entrants)}: compared"
    different = list(_different(compared))
    curves = draw_overlaid({one.name: one.measures for one in compared.entrants})
    sections: dict[str, tuple[str, list[str], str]] = {
        "Figures": ("", [table(headings(compared), _unbroken(cells(compared)))], " ".join(notes(compared))),
        "Quality against speed, and curves of training": ("curves", [_trade(compared).figure(), *curves], ""),
        "Where the answers differ": (
            "samples",
            [_card(compared, number, question) for number, question in different[:PAGE_SAMPLES]],
            f"{len(different):,} of {len(compared.questions):,} questions have different answers"
            + (f"; the first {PAGE_SAMPLES} are shown." if len(different) > PAGE_SAMPLES else "."),
        ),
        "Where they came from": (
            "",
            [table(("", "place", "from", "steps", "seed"), _origins(compared)), *_recipes(compared)],
            "",
        ),
    }
    parts = [f"<h1>{escape(title)}</h1><p>{escape(compared.held_out.told())}</p>", f'<div class="tiles">{_tiles(compared)}</div>']
    for heading, (style, blocks, note) in sections.items():
        if any(blocks) or note:
            told = f"<p>{escape(note)}</p>" if note else ""
            parts.append(f'<h2>{heading}</h2>{told}<div class="{style}">{"".join(blocks)}</div>')
    return document(title, parts)


def _unbroken(lines: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Keeps figures and their intervals on one line."""
    return [tuple(cell.replace(" ", "\N{NO-BREAK SPACE}") if "[" in cell else cell for cell in line) for line in lines]


def _tiles(compared: Compared) -> str:
    """Gives the headline figures of each run in its own way."""
    tiles: list[tuple[str, str]] = []
    for row in compared.own:
        tiles.append((f"{row.exact.value:.3f}", f"exact match, {row.way.run} ({row.way.name})"))
        if row.speeds:
            tiles.append((f"{row.speeds[1].tokens_per_second:.4g}", f"tokens per second, {row.way.run} ({row.way.name})"))
    return "".join(f'<div class="tile"><b>{escape(value)}</b><p>{escape(name)}</p></div>' for value, name in tiles)


def _trade(compared: Compared) -> Chart:
    """Draws every way as a point: to the right is faster, above is better."""
    timed = compared.machine["timed"]
    lines = []
    for hue, entrant in enumerate(compared.entrants):
        rows = [row for row in compared.rows if row.way.run == entrant.name]
        for family in dict.fromkeys(row.way.family for row in rows):
            chosen = [row for row in rows if row.way.family == family]
            # What is a family of its own stands under its own name.
            groups = [[row] for row in chosen] if family == SINGLE else [chosen]
            lines += [_trade_line(hue, family, group, timed) for group in groups]
    values = [value for line in lines for _, value in line.points]
    ticks_y = ticks_with_zero(values)
    last = max(value for line in lines for value, _ in line.points) * 1.05
    x_title = "tokens per second, batch 1" if timed else "tokens per forward, batches of 8"
    return Chart(
        "Exact match and speed",
        lines,
        ticks_y,
        ticks_up_to(last),
        last,
        x_title,
        f"exact match over {x_title}",
        [axis_note(ticks_y)],
    )


def _trade_line(hue: int, family: str, rows: Sequence[Row], timed: bool) -> Line:
    points = [(_speed(row, timed), row.exact.value) for row in rows]
    titles = [f"{row.way.run}, {row.way.name}: {x:.4g}, exact match {y:.3f}" for row, (x, y) in zip(rows, points, strict=True)]
    style = "points" if family == SINGLE else "dots" if family == STEPS else "raw marked"
    return Line(hue, style, f"{rows[0].way.run}: {rows[0].way.name if family == SINGLE else family}", points, titles)


def _speed(row: Row, timed: bool) -> float:
    return row.speeds[1].tokens_per_second if timed else row.way.tokens_per_forward


# --- answers side by side --------------------------------------------------------------------------------------------------


def _different(compared: Compared) -> Iterator[tuple[int, Question]]:
    """Yields (number, question) where the runs' own answers are not all the same; first those of which some are right and some
    wrong."""
    own = [row.way.answered.scored for row in compared.own]
    found = list(enumerate(compared.questions))
    for undecided in (True, False):
        for number, question in found:
            given = [scored[number] for scored in own]
            if (len({one.exact for one in given}) > 1) == undecided and len({one.answer.text for one in given}) > 1:
                yield number, question


def _card(compared: Compared, number: int, question: Question) -> str:
    record, turn = question
    lines = [f"<dt>truth</dt><dd>{escape(record.turns[turn].text)}</dd>"]
    lines += [_answer(row.way.run, row.way.answered.scored[number]) for row in compared.own]
    image = record.images[0] if record.images else None
    visual = draw_visual(image, record.videos[0] if record.videos else None)
    return f"<article>{visual}<h3>{escape(asked(record, turn))}</h3><dl>{''.join(lines)}</dl></article>"


def _answer(run: str, given: ScoredAnswer) -> str:
    style, mark = ("right", "✓") if given.exact else ("wrong", "✗")
    text = escape(given.answer.text) or "<i>(empty)</i>"
    return f'<dt>{escape(run)}</dt><dd class="{style}" title="{style}">{mark} {text}</dd>'


# --- where they came from --------------------------------------------------------------------------------------------------


def _origins(compared: Compared) -> list[tuple[str, ...]]:
    rows = []
    for one in compared.entrants:
        state: dict[str, Any] = one.facts.get("state") or {}
        parents = " + ".join(one.facts.get("parents") or [])
        rows.append((one.name, one.place, parents, str(state.get("steps", NO_FIGURE)), str(state.get("seed", NO_FIGURE))))
    return rows


def _recipes(compared: Compared) -> list[str]:
    directories = [(one.name, one.directory) for one in compared.entrants if one.directory is not None]
    return [
        f"<details><summary>{escape(name)}: run.yaml</summary><pre>{escape(dump(recipe_of(directory)))}</pre></details>"
        for name, directory in directories
        if (directory / RECIPE_FILE).is_file()
    ]
