"""`evaluation.json`: what is kept, what is replaced, and what happens to a damaged one."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffvl.errors import CheckpointError
from diffvl.store.evaluation import EVALUATION_FILE, merge_results, read_results


def result(task: str, value: float, n: int = 10, **decoding: Any) -> dict[str, Any]:
    return {"task": task, "metrics": [{"metric": "acc", "value": value}], "n": n, "decoding": decoding}


def test_a_measurement_repeated_takes_the_place_of_the_older_one_and_others_stay(tmp_path: Path):
    assert read_results(tmp_path) == []
    merge_results(tmp_path, [result("a", 0.1, denoising_steps=4), result("b", 0.2)])
    merge_results(tmp_path, [result("a", 0.3, denoising_steps=4), result("a", 0.4, denoising_steps=2), result("a", 0.5, n=5)])
    expected = [result("b", 0.2), result("a", 0.3, denoising_steps=4), result("a", 0.4, denoising_steps=2), result("a", 0.5, n=5)]
    assert read_results(tmp_path) == expected
    assert json.loads((tmp_path / EVALUATION_FILE).read_text(encoding="utf-8")) == {"results": expected}
    assert [path.name for path in tmp_path.iterdir()] == [EVALUATION_FILE]


def test_a_damaged_file_is_told_and_left_alone(tmp_path: Path):
    (tmp_path / EVALUATION_FILE).write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=EVALUATION_FILE):
        merge_results(tmp_path, [result("a", 0.1)])
    assert (tmp_path / EVALUATION_FILE).read_text(encoding="utf-8") == "{"
