"""The model card, and what `push` does with it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tiny_runs import Run as WholeRun
from tiny_runs import command, finished_run, refused

from diffvl.export.card import CARD, card, front_matter, source_licence
from diffvl.export.sdar import launches
from diffvl.export.source import Run, read_run
from diffvl.store.evaluation import merge_results

FIGURES = {"prefill": 2e-7, "denoised": 1e-7}


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path], tower: Path, shapes: dict[str, Path]
) -> WholeRun:
    return finished_run(tmp_path_factory, source, tower, shapes)


def test_a_card_says_what_the_run_recorded(whole: WholeRun, tmp_path: Path):
    text = card(read_run(whole.diffuse), "native", False, False, FIGURES, "apache-2.0")
    (tmp_path / CARD).write_text(text, encoding="utf-8")
    head = front_matter(tmp_path / CARD)
    assert head["license"] == "apache-2.0" and head["pipeline_tag"] == "image-text-to-text"
    assert "| prepared | parity with the source" in text and "ar_parity" in text
    assert "| align | ar | connector 0.001 | 2 | align.json (8 records) |" in text
    assert "| diffuse | block_diffusion, blocks of 4 | " in text and "train.json (10 records)" in text
    assert "largest difference 2.0e-07 std" in text and "| eval_loss |" in text or "| loss |" in text
    for place in ("from_pretrained", "pipeline(", "diffvl generate"):
        assert place in text
    assert "## Limits" in text and "made from: " in text


def test_a_card_tells_no_folder_of_this_machine(whole: WholeRun):
    text = card(read_run(whole.diffuse), "native", False, True, FIGURES, None)
    assert str(whole.root.parent) not in text and "/tmp" not in text and "PeftModel" in text
    assert "license:" not in text and "licence of the source: not known here" in text


def test_a_card_shows_the_benchmarks_that_were_run(whole: WholeRun, tmp_path: Path):
    assert "### Benchmarks" not in card(read_run(whole.diffuse), "native", False, False, FIGURES, None)
    run = replace(read_run(whole.diffuse), directory=tmp_path)
    metrics = [{"metric": "acc", "filter": name, "value": value} for name, value in {"none": 0.3125, "flexible": 0.5}.items()]
    result = {"task": "mmstar", "metrics": metrics, "n": 16, "date": "2026-11-29"}
    result |= {"decoding": {"mode": "blocks", "denoising_steps": 4, "seed": 0}, "versions": {"lmms_eval": "0.7.3"}}
    merge_results(tmp_path, [result])
    text = card(run, "native", False, False, FIGURES, None)
    for name in ("acc | 0.3125", "acc (flexible) | 0.5000"):
        assert f"| mmstar | {name} | 16 | mode blocks, denoising_steps 4 | lmms-eval 0.7.3, 2026-11-29 |" in text


def test_the_text_part_s_card_has_every_engine_s_launch(run: Run):
    text = card(run, "sdar", True, False, FIGURES, None)
    commands = launches(Path("REPO"), 4, 151669)
    assert set(commands) == {"LMDeploy", "SGLang", "JetEngine"} and all(one in text for one in commands.values())
    assert "--dllm-block-length 4" in text and "AutoModelForCausalLM" in text and "Images are left out" in text


def test_the_licence_is_that_of_the_source_s_card(run: Run, tmp_path: Path):
    (tmp_path / CARD).write_text("---\nlicense: mit\n---\n# A model\n", encoding="utf-8")
    assert source_licence(replace(run, recipe=run.recipe.model_copy(update={"model": str(tmp_path)}))) == "mit"
    assert source_licence(run) is None


# --- push ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    directory = tmp_path / "exported"
    directory.mkdir()
    (directory / CARD).write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    for name in ("config.json", "run.yaml", "diffvl.json", "model.safetensors"):
        (directory / name).write_text("{}", encoding="utf-8")
    return directory


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What would reach the hub."""
    made: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo, **given: made.append((repo, given)))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **given: made.append(("upload", given)))
    return made


def test_a_push_is_dry_unless_it_is_meant(exported: Path, calls: list[tuple[str, dict[str, Any]]]):
    ended = command("push", exported, "owner/name")
    assert ended.code == 0 and not calls
    assert "dry run: 3 files" in ended.out and "licence apache-2.0, to owner/name" in ended.out
    assert "run.yaml" not in ended.out and "diffvl.json" not in ended.out
    assert command("push", exported, "owner/name", "--yes", "--private").code == 0
    (repo, created), (_, sent) = calls
    assert repo == "owner/name" and created == {"private": True, "exist_ok": True}
    assert sent["folder_path"] == exported and {"run.yaml", "diffvl.json"} <= set(sent["ignore_patterns"])


def test_nothing_is_pushed_without_a_licence(exported: Path, calls: list[tuple[str, dict[str, Any]]]):
    for head in ("# no front matter\n", "---\ntags: [a]\n---\n", "---\nlicense: ''\n---\n"):
        (exported / CARD).write_text(head, encoding="utf-8")
        refused("push", exported, "owner/name", "--yes", says=["no license in its front matter", "license: apache-2.0"])
    (exported / CARD).write_text("---\n{\n---\n", encoding="utf-8")
    refused("push", exported, "owner/name", "--yes", says=["is no YAML"])
    (exported / CARD).unlink()
    refused("push", exported, "owner/name", "--yes", says=[f"no {CARD} there"])
    refused("push", exported.parent, "owner/name", "--yes", says=["no exported checkpoint"])
    assert not calls


def test_a_name_that_is_none_and_a_hub_that_refuses(
    exported: Path, calls: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
):
    refused("push", exported, "a/b/c", says=["is no name of a repository"])

    def refuse(*_: object, **__: object) -> None:
        raise OSError("401 Unauthorized\nmore")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    refused("push", exported, "owner/name", "--yes", says=["the hub took nothing, or not all (401 Unauthorized)"])
