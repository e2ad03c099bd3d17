"""The tool that times few rows, on a tiny checkpoint: both ways run, and each is what it says."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffvl.hub import few_rows_diffvl
from tools import few_rows


def test_it_times_both_ways(prepared: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    linear, seen = few_rows_diffvl.linear, list[int]()

    def noted(layer: torch.nn.Linear, rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.shape[:-1].numel())
        return linear(layer, rows)

    monkeypatch.setattr(few_rows_diffvl, "linear", noted)
    monkeypatch.setattr(sys, "argv", ["few_rows", str(prepared("llama")), "--tokens", "1,4", "--cached", "7", "--rounds", "3"])
    few_rows.main()
    told = capsys.readouterr().out.splitlines()
    assert "threads" in told[0] and [line.split()[0] for line in told[1:]] == ["1", "4"]
    for line in told[1:]:
        assert all(float(part) > 0 for part in (line.split()[3], line.split()[5], line.split()[6]))
    assert seen.count(4) == seen.count(1) > 0, "the cache is as long as before, and half of the rounds are stock"
