"""What commands print on stdout: a JSON object, a table, a line. Nothing in a text is taken for markup or acts on a terminal."""

from typing import Any

from rich.table import Table

from diffvl.terminal.console import console, json_text, put, say, visible

UNLIMITED = 10_000  # columns


def print_json(figures: dict[str, Any]) -> None:
    """One object on one line."""
    put(json_text(figures))


def print_table(headings: list[str], rows: list[tuple[str, ...]]) -> None:
    """A table on stdout; in a file or a pipe, which have no width, every row stands on one line."""
    table = Table(*headings)
    for row in rows:
        table.add_row(*(visible(cell) for cell in row))
    out = console()
    if not out.is_terminal:
        out.width = out.measure(table, options=out.options.update(max_width=UNLIMITED)).maximum
    out.print(table)


def print_line(text: str, style: str = "") -> None:
    """One line on stdout, not broken."""
    say(console(), (text, style))
