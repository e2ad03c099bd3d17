"""`evaluation.json`: what benchmarks said of a checkpoint, beside it. It names no folder of the machine.

Place in the flow: written by the evaluation of a finished directory, read by its model card. Invariant: a result takes the place
of an older one of the same task, decoded in the same way, over as many documents; all others stay.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffvl.store.files import read_json, replace_text

EVALUATION_FILE = "evaluation.json"
RESULTS = "results"
SAME = ("task", "decoding", "n")  # what tells two measurements apart

Result = dict[str, Any]


def read_results(directory: Path) -> list[Result]:
    """Reads what was measured before. Raises CheckpointError for a damaged file."""
    file = directory / EVALUATION_FILE
    return list(read_json(file).get(RESULTS, [])) if file.is_file() else []


def merge_results(directory: Path, results: Sequence[Result]) -> None:
    """Adds results to those that are there. Raises CheckpointError, DiskError."""

    def key(result: Result) -> list[Any]:
        return [result.get(name) for name in SAME]

    fresh = [key(result) for result in results]
    kept = [result for result in read_results(directory) if key(result) not in fresh]
    text = json.dumps({RESULTS: [*kept, *results]}, indent=2, ensure_ascii=False)
    replace_text(directory / EVALUATION_FILE, text + "\n")


def metric_name(metric: Mapping[str, Any]) -> str:
    """How a metric of a result is shown: lmms-eval may score one task's answers through several filters."""
    return metric["metric"] + ("" if metric["filter"] == "none" else f" ({metric['filter']})")
