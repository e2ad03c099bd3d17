"""What a forward of a few tokens costs on this CPU, with tokens as rows of the products and as columns (`few_rows_diffvl`).

    python -m tools.few_rows DIR [--tokens 1,2,4,5,8] [--cached 256] [--rounds 10]

DIR is a checkpoint of diffvl; OMP_NUM_THREADS chooses the threads. Both ways take turns in one process, on the same weights, in
fp32, behind a text of `--cached` tokens; the fastest round counts. On a machine where the last column is above 1, and
`has_slow_rows` says no, decoding could be faster than it is.
"""

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from diffvl.bench.machine import describe_machine
from diffvl.bench.timing import schedule
from diffvl.cli.output import print_line
from diffvl.hub import few_rows_diffvl
from diffvl.store.checkpoint import load_model

ROWS, COLUMNS = "rows", "columns"


def main() -> None:
    """Prints a line for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--tokens", default="1,2,4,5,8", help="of a forward, with commas")
    parser.add_argument("--cached", type=int, default=256, help="tokens of the text before")
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    sizes = [int(part) for part in given.tokens.split(",")]
    seconds = measure(load_model(given.directory, torch.float32).trunk.eval(), sizes, given.cached, given.rounds)
    machine = describe_machine()
    print_line(f"{machine['cpu']}, {torch.get_num_threads()} threads, torch {machine['torch']}, {machine['date']}; milliseconds:")
    for size in sizes:
        rows, columns = seconds[size, ROWS] * 1e3, seconds[size, COLUMNS] * 1e3
        print_line(f"{size:3} tokens  {ROWS} {rows:7.1f}  {COLUMNS} {columns:7.1f}  {rows / columns:.2f}")


@torch.no_grad()
def measure(trunk: Any, sizes: list[int], cached: int, rounds: int) -> dict[tuple[int, str], float]:
    """Times a forward of each size in both ways by turns; the seconds of the fastest."""
    cache = DynamicCache(config=trunk.config)
    trunk(input_ids=torch.full((1, cached), 5), past_key_values=cache, use_cache=True)
    best: dict[tuple[int, str], float] = {}
    for _, way in schedule([ROWS, COLUMNS], rounds):
        for size in sizes:
            with _way(trunk, way):
                start = time.perf_counter()
                trunk(input_ids=torch.full((1, size), 5), past_key_values=cache, use_cache=True)
                best[size, way] = min(best.get((size, way), float("inf")), time.perf_counter() - start)
            cache.crop(-size)
    return best


def _way(trunk: Any, way: str) -> AbstractContextManager[None]:
    return few_rows_diffvl.few_rows(trunk, everywhere=True) if way == COLUMNS else nullcontext()


if __name__ == "__main__":
    main()
