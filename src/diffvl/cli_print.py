"""What commands print on stdout: a JSON object, a table, a line. Nothing in a text is taken for markup."""

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

UNLIMITED = 10_000  # columns


def print_json(figures: dict[str, Any]) -> None:
    """One object on one line."""
    print(json.dumps(figures, ensure_ascii=False))


def print_table(headings: list[str], rows: list[tuple[str, ...]]) -> None:
    """A table on stdout; in a file or a pipe, which have no width, every row stands on one line."""
    table = Table(*headings)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = console.measure(table, options=console.options.update(max_width=UNLIMITED)).maximum
    console.print(table)


def print_line(text: str, style: str | None = None) -> None:
    """One line on stdout, taken as it is and not broken."""

    Console().print(text, style=style, markup=False, highlight=False, soft_wrap=True)
