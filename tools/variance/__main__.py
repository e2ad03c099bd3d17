"""Variance and bias of the gradient under every noise schedule, way to draw noise, and loss weight.

    python -m tools.variance [--samples 384] [--seed 0] [--json]

From the repository's folder. It takes two minutes on one core; docs/objective.md has the figures and what they mean. With --json
it prints one object, {"machine", "settings", "exact", "sampled"}.
"""

import argparse
from dataclasses import asdict

from diffvl.cli.output import print_json, print_table
from diffvl.terminal.bars import quiet_libraries
from diffvl.terminal.console import console, streams
from tools.variance.study import measure_objectives
from tools.variance.tables import tables

FEWEST = 128  # two batches, without which there is no standard error


def num_samples(text: str) -> int:
    """Reads --samples."""
    if not text.isdecimal() or int(text) < FEWEST:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {FEWEST} on")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.variance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=num_samples, default=384, help="gradients drawn for each sampled figure")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    quiet_libraries()
    with streams():
        study = measure_objectives(given.samples, given.seed, console(stderr=True))
        if given.json:
            print_json(asdict(study))
        else:
            for headings, lines in tables(study):
                print_table(headings, lines)


if __name__ == "__main__":
    main()
