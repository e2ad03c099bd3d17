"""An outlook in words and one table."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from diffvl.estimate.machine import GIGABYTE, Machine
from diffvl.estimate.memory import MARGIN, Memory
from diffvl.estimate.outlook import Outlook, Start, parameters_of
from diffvl.terminal.bars import duration
from diffvl.terminal.console import say, visible
from diffvl.train.trial import Trial

WIDE = 120  # columns of a table where there is no terminal
# What a large GPU does of matrix products in bf16 while it trains: 40 % of an H100's peak of 989.
TERAFLOPS = 400
PREFIXES = (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9))
COLUMNS = ("weights", "optimiser", "gradients", "activations", "logits", "casts", "whole")


def tell_prepared(start: Start, directory: Path, console: Console) -> None:
    """Prints what `prepare` writes."""
    size = parameters_of(start) * start.dtype.itemsize
    say(console, ("prepared", "bold"), f" {gigabytes(size)} on disk -> {directory}")


def tell_stage(name: str, outlook: Outlook, machine: Machine, console: Console) -> None:
    """Prints what a stage will take."""
    stage = outlook.stage
    records = "records: nobody knows" if outlook.records is None else f"{outlook.records:,} records"
    if outlook.records is not None and not outlook.looked_at:
        records += " (as the recipe says: the data is not here)"
    steps = "steps: nobody knows" if outlook.steps is None else f"{outlook.steps:,} steps"
    if outlook.steps is not None and not stage.steps and not outlook.looked_at and stage.data.row_length is not None:
        steps = f"at most {steps} (fewer where records share a row)"
    say(console, (name, "bold"), f" {records}; {steps} of {outlook.rows_per_step:,} rows")
    say(console, "  tokens of a step: ", _tokens(outlook))
    if outlook.flops:
        say(console, "  arithmetic: ", _arithmetic(outlook, machine))
    kept = stage.keep_checkpoints + 1  # one more while the newest is written
    if outlook.steps is not None:
        kept = min(kept, max(-(-outlook.steps // stage.save_every), 1))
    say(
        console,
        f"  disk: {kept} checkpoint{'' if kept == 1 else 's'} of {gigabytes(outlook.checkpoint)} on the way, "
        f"{gigabytes(outlook.written)} at the end",
    )
    if outlook.why_uncounted:
        say(console, f"  memory: not known; this architecture asks for numbers on the way ({_short(outlook.why_uncounted)})")
        return
    _tell_memory(name, outlook, machine, console)


def _tokens(outlook: Outlook) -> str:
    tokens = outlook.tokens
    parts = [
        f"{value:,.0f} {name}"
        for name, value in (
            ("clean", tokens.clean),
            ("image", tokens.image),
            ("noisy", tokens.noisy),
            ("padding", tokens.padding),
        )
    ]
    basis = (
        f"mean over the first {outlook.looked_at} rows" if outlook.looked_at else "made-up rows of data.max_length, half answer"
    )
    return f"{', '.join(parts)}; {tokens.predicted:,.0f} predicted ({basis})"


def _arithmetic(outlook: Outlook, machine: Machine) -> str:
    step = outlook.flops
    words = f"{_flops(step)} a step without attention scores"
    if outlook.steps is not None:
        total = step * outlook.steps
        words += f", {_flops(total)} in all"
        if machine.is_gpu:
            hours = total / (TERAFLOPS * 1e12 * machine.processes) / 3600
            words += f": {hours:,.1f} hours if each GPU does {TERAFLOPS} TFLOP/s (assumed; --measure takes real steps)"
    return words


def _tell_memory(name: str, outlook: Outlook, machine: Machine, console: Console) -> None:
    stage = outlook.stage
    length = stage.data.row_length or stage.data.max_length
    say(console, f"  memory of one process, in GB, with {stage.batch_size} x {length:,} clean tokens, the most that may come:")
    used = [name for name in COLUMNS if any(getattr(memory, name) >= GIGABYTE / 200 for _, memory in outlook.memory)]
    table = Table("", *used, "in all", f"+ {MARGIN:.0%}", f"of {machine.memory / GIGABYTE:.0f}", box=None, pad_edge=True)
    for column in table.columns[1:]:
        column.justify = "right"
    for variant, memory in outlook.memory:
        table.add_row(variant.told, *_cells(memory, used), _fits(memory, machine))
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    console.print(table)
    _tell_verdict(name, outlook, machine, console)


def _cells(memory: Memory, used: list[str]) -> list[str]:
    values = [*(getattr(memory, name) for name in used), memory.total, memory.most]
    return [f"{value / GIGABYTE:,.2f}" for value in values]


def _fits(memory: Memory, machine: Machine) -> str:
    return "fits" if memory.most <= machine.memory else "too much"


def _tell_verdict(name: str, outlook: Outlook, machine: Machine, console: Console) -> None:
    if outlook.fits(machine):
        say(console, ("  it fits", "bold green"), f", with {MARGIN:.0%} to spare for kernels and gaps")
        return
    if outlook.remedy is None:
        say(console, ("  it does not fit", "bold red"), ", and no change that is known here makes it fit: take a smaller model")
        return
    variant, memory = outlook.remedy
    typed = " ".join(f"--set stages.{name}.{setting}" for settings in variant.settings for setting in settings.split(" "))
    say(
        console,
        ("  it does not fit", "bold red"),
        f"; the smallest change that makes it fit: {variant.told} ({gigabytes(memory.most)} with the margin)",
        f"; {visible(typed)}" if typed else "",
    )


def tell_trial(name: str, trial: Trial, console: Console) -> None:
    """Prints what a few real steps took."""
    each = ", ".join(f"{second:,.2f}" for second in trial.seconds)
    peak = "" if trial.peak is None else f"; peak {gigabytes(trial.peak)} of this GPU"
    say(
        console,
        (name, "bold"),
        f" measured: {each} seconds a step; {duration(trial.whole)} for {trial.steps:,} steps, evaluations and checkpoints apart",
        peak,
    )


def gigabytes(size: int) -> str:
    """Bytes in words."""
    value = size / GIGABYTE
    return f"{value:,.0f} GB" if value >= 100 else f"{value:,.2g} GB" if value >= 0.01 else f"{size / 10**6:,.2g} MB"


def _flops(operations: int) -> str:
    prefix, size = next((one for one in PREFIXES if operations >= one[1]), PREFIXES[-1])
    return f"{operations / size:,.3g} {prefix}FLOP"


def _short(words: str) -> str:
    return words.strip().partition("\n")[0][:120]
