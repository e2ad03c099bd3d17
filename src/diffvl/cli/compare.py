"""`diffvl compare`: words -> one comparison -> a table, a page, or one JSON object.

As in `main.py`, torch and transformers are imported inside commands only.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffvl.cli.output import print_json, print_line, print_table
from diffvl.terminal.console import console

if TYPE_CHECKING:
    from diffvl.compare.compare import Compared


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Stage directories, or AR checkpoints as MODEL of `convert`; the first is the standard."
        ),
    ],
    data: Annotated[
        Path | None, typer.Option(help="Records to ask. Default: those that all runs have held out.", metavar="FILE")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where to write the page.", metavar="FILE")] = Path("compare.html"),
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N records.", metavar="N")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    speed: Annotated[bool, typer.Option(help="Time them by turns, which holds all models in memory together.")] = True,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that a checkpoint brings along.")
    ] = False,
) -> None:
    """Compare runs on the same questions: answers with intervals, speed by turns, and one page with all of it."""
    from diffvl.compare.compare import CompareRequest
    from diffvl.compare.compare import compare as run_comparison
    from diffvl.compare.page import write_page
    from diffvl.store.files import require_writable
    from diffvl.terminal.bars import quiet_libraries

    quiet_libraries()
    require_writable(out, "--out")
    request = CompareRequest(tuple(runs), data, limit, speed, max_new_tokens, seed, trust_remote_code)
    compared = run_comparison(request, console(stderr=True))
    write_page(compared, out)
    if as_json:
        print_json(compared.json)
    else:
        print_compared(compared, out)


def print_compared(compared: "Compared", page: Path) -> None:
    """Prints the table, how its figures were made, and where the page is."""
    from diffvl.compare.page import cells, headings, notes

    print_table(headings(compared), cells(compared))
    for note in notes(compared):
        print_line(note)
    print_line(f"page: {page}", "bold")
