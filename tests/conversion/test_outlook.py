"""`diffvl convert --dry-run`: the plan in figures, for what is here and for what is not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

RunCli = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("offline", "whole_plans")


def test_a_plan_says_what_each_stage_takes(
    run_cli: RunCli, source: Callable[[str], Path], tower: Path, shapes: dict[str, Path], tmp_path: Path
) -> None:
    """And --measure takes real steps; nothing is written by either."""
    words = ("--recipe", "llava", "--data", str(shapes["train"]), "--out", str(tmp_path / "run"))
    settings = [f"prepare.vision_tower={tower}"]
    for stage in ("align", "diffuse"):
        settings += [
            f"stages.{stage}.{one}"
            for one in ("batch_size=2", "accumulation=1", "precision=fp32", "data.max_length=256", "data.workers=0")
        ]
    changed = [word for setting in settings for word in ("--set", setting)]
    code, out, err = run_cli("convert", str(source("qwen2")), *words, *changed, "--dry-run", "--measure")
    assert code == 0, err
    for told in ("align 10 records; 5 steps of 2 rows", "diffuse 10 records", "tokens of a step:", "as it is", "it fits"):
        assert told in out, told
    assert out.count("measured:") == 2 and "dry run: nothing was written" in out
    assert not (tmp_path / "run").exists()


def test_a_plan_needs_neither_checkpoint_nor_data(run_cli: RunCli, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No hub is reached in tests. A trunk of 0.5 B for GPUs that are not here; the recipe says how many records there are."""
    settings = ["data.records=558128", "data.max_length=1024", "data.row_length=1024", "batch_size=2", "epochs=1"]
    words = [word for setting in settings for word in ("--set", f"stages.align.{setting}")]
    code, out, err = run_cli(
        "convert", "qwen2.5-0.5b", "--stage", "align", *words, "--dry-run", "--for", "8x80GB", "--out", str(tmp_path / "run")
    )
    assert code == 0, err
    assert "planning by the sizes that diffvl knows of it" in caplog.text
    assert "for 8 GPUs with 80 GB each" in out
    assert "558,128 records (as the recipe says: the data is not here)" in out and "it fits" in out
    assert "at most 34,883 steps (fewer where records share a row) of 16 rows" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("qwen2.5-0.5b", "--for", "8x80GB"), "--for has no effect without --dry-run"),
        (("qwen2.5-0.5b", "--measure"), "--measure has no effect without --dry-run"),
        (("qwen2.5-0.5b", "--dry-run", "--measure", "--for", "24GB"), "leave one of them out"),
        (("qwen2.5-0.5b", "--dry-run", "--for", "80"), "expected GPUs and the memory of each"),
        (("no-such-model", "--dry-run"), "no such model name or directory"),
        (("someone/no-such-model", "--dry-run"), "could not be fetched from the model hub"),
    ],
)
def test_a_plan_that_cannot_be_made(words: tuple[str, ...], told: str, run_cli: RunCli, tmp_path: Path) -> None:
    code, _, err = run_cli("convert", *words, "--out", str(tmp_path / "run"))
    assert code == 2 and told in err and "Traceback" not in err


def test_real_steps_need_what_they_are_taken_with(run_cli: RunCli, prepared: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    stage = {
        "objective": {"kind": "block_diffusion"},
        "trainable": {"connector": 1e-3},
        "steps": 2,
        "data": {"train": str(tmp_path / "not-here.json"), "records": 1000, "max_length": 128},
        "precision": "fp32",
    }
    recipe.write_text(json.dumps({"stages": {"diffuse": stage}}))
    words = ("--from", str(prepared("llama")), "--recipe", str(recipe), "--out", str(tmp_path / "run"), "--dry-run")
    code, out, err = run_cli("convert", *words)
    assert code == 0 and "1,000 records (as the recipe says" in out, err
    code, _, err = run_cli("convert", *words, "--measure")
    assert code == 2 and "--measure takes real steps" in err
