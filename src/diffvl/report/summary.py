"""A finished stage in a few lines on the terminal."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffvl.data.textscore import is_exact
from diffvl.report.stage_run import REPORT_FILE, answers_of, read_stage, score_of, summary_rows, title_of, warnings_of
from diffvl.terminal.console import say, visible

TERMINAL_SAMPLES = 4


def print_summary(directory: Path, console: Console) -> None:
    """Prints the run in a few lines: loss and evaluation first, last and best, some answers, where the report is.

    Raises:
        CheckpointError: as `write_report`.
    """
    run = read_stage(directory)
    table = Table("", "first", "last", "best", title=Text(visible(title_of(run))), title_justify="left")
    for row in summary_rows(run):
        table.add_row(*(Text(visible(cell)) for cell in row))
    console.print(table)
    for warning in warnings_of(run):
        say(console, (warning, "red"))
    for sample in run.samples[:TERMINAL_SAMPLES]:
        say(console, (f"\n{sample['question']}", "bold"), f"\n  truth   {sample['truth']}")
        for name, answer in answers_of(sample):
            mark, style = ("right", "green") if is_exact(answer, sample["truth"]) else ("wrong", "red")
            say(console, f"  {name:<7} ", (answer or "(empty)", style), f"  [{mark}]")
    if run.samples:
        score, meaning = score_of(run.samples)
        say(console, f"\n{meaning}: {score}")
    if (directory / REPORT_FILE).exists():
        say(console, f"report: {directory / REPORT_FILE}")
