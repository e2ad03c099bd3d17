"""From SDAR-VL's layout back to a DiffVL directory, and adapters beside the weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUIET, weights_of
from safetensors.torch import load_file, save_file
from tiny_runs import command, copy, refused, stage, succeed, write_recipe

from diffvl.demo import standins
from diffvl.export import adapters, sdar_v
from diffvl.export.run import export
from diffvl.export.source import Run, read_run
from diffvl.store.checkpoint import load_description, read_state
from diffvl.store.sdar_vl import TENSORS, key_mapping, their_name


@pytest.fixture(scope="module")
def released(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in SDAR-VL's layout."""
    directory = tmp_path_factory.mktemp("released") / "sdar-vl"
    directory.mkdir()
    sdar_v.write(run, directory)
    return directory


def words(start: Path, out: Path, shapes: dict[str, Path], *more: object) -> tuple[object, ...]:
    sets = {"steps": 1, "epochs": "null", "batch_size": 1, "precision": "fp32", "data.max_length": 510, "data.workers": 0}
    given = [word for key, value in sets.items() for word in ("--set", f"stages.diffuse.{key}={value}")]
    return ("convert", "--from", start, "--stage", "diffuse", "--data", shapes["train"], "--out", out, *given, *more)


def test_names_go_both_ways():
    for ours in [*(f"{name}x" for name in TENSORS if name.endswith(".")), "image_newline"]:
        theirs = their_name(ours)
        assert theirs is not None
        back = theirs
        for pattern, to in key_mapping().items():
            back = re.sub(pattern, to, back)
        assert back == ours
    assert their_name("vision_tower.head.probe") is None


@pytest.mark.slow
def test_finetuning_goes_on_from_it(released: Path, run: Run, shapes: dict[str, Path], tmp_path: Path):
    """Every tensor is the run's own again, and the stage starts from blocks, tiles and the mask token that are there."""
    ended = succeed(*words(released, tmp_path / "on", shapes))
    assert "block parity: largest difference 0.0e+00" in ended.out
    back, own = weights_of(tmp_path / "on" / "prepared"), weights_of(run.directory)
    head = "language_model.lm_head.weight"  # tied in the run, a copy there
    kept = {name for name in own if not name.startswith("vision_tower.head.")}
    assert back.keys() == kept | {head} and all(torch.equal(back[name], own[name]) for name in kept)
    assert torch.equal(back[head], own["language_model.model.embed_tokens.weight"])
    config, processor = load_description(tmp_path / "on" / "diffuse")
    assert (config.block_size, config.grid, config.target, config.tiling) == (4, "absolute", "same", run.config.tiling)
    assert config.stop_token_ids == run.config.stop_token_ids and config.vocabulary_size == run.config.vocabulary_size
    assert processor.tokenizer.mask_token_id == 151669 and read_state(tmp_path / "on" / "prepared")["kind"] == "prepared"


def edited(released: Path, to: Path, **settings: Any) -> Path:
    made = copy(released, to)
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    (made / "config.json").write_text(json.dumps({**config, **settings}), encoding="utf-8")
    return made


def test_what_is_not_sdar_vl_is_refused(released: Path, shapes: dict[str, Path], tmp_path: Path):
    out = tmp_path / "out"
    made = edited(released, tmp_path / "a", projector_hidden_act="relu", vision_aspect_ratio="square")
    refused(*words(made, out, shapes), says=["projector_hidden_act 'relu', vision_aspect_ratio 'square'"])
    made = edited(released, tmp_path / "b", image_token_index=7)
    refused(*words(made, out, shapes), says=["image_token_index 7 in its config.json is no special token"])
    made = copy(released, tmp_path / "c")
    tensors = load_file(made / "model.safetensors")
    del tensors["multi_modal_projector.linear_2.bias"]
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    refused(*words(made, out, shapes), says=["lacks connector.layers.2.bias"])
    refused(*words(released, out, shapes, "--set", "prepare.image_size=64"), says=["--set prepare.* has no effect"])
    assert not out.exists()


def test_the_released_template_gives_way_to_that_of_training(
    released: Path, shapes: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    made = copy(released, tmp_path / "made")
    template = (made / "chat_template.jinja").read_text(encoding="utf-8")
    (made / "chat_template.jinja").write_text(template.replace("<|im_end|>", "\\n<|im_end|>"), encoding="utf-8")
    ended = command(*words(made, tmp_path / "out", shapes, "--dry-run"))
    assert ended.code == 0, ended.err
    assert "puts text between an answer and <|im_end|>, as it did not in training" in caplog.text + ended.err


# --- adapters --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tower: Path, shapes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose second stage trained LoRA."""
    folder = tmp_path_factory.mktemp("adapted")
    trunk = standins.make_trunk(folder / "trunk", "qwen3")
    diffuse = {**stage("diffuse", shapes["train"]), "lora": {"rank": 4, "alpha": 8}}
    recipe = write_recipe(folder / "recipe.yaml", tower, align=stage("align", shapes["align"]), diffuse=diffuse)
    succeed("convert", trunk, "--recipe", recipe, "--out", folder / "run")
    return folder / "run" / "diffuse"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks by the old name
def test_adapters_are_kept_apart(adapted: Path, in_this_process: None, tmp_path: Path):
    """The weights are those from before, merged by peft they are the run's; what trained beside the adapters is kept."""
    export(adapted, "native", tmp_path / "out", QUIET, keep_adapters=True)
    written, own, before = (weights_of(path) for path in (tmp_path / "out", adapted, adapted.parent / "align"))
    linears = {name for name in own if re.search(r"language_model.*_proj\.weight", name)}
    assert linears and all(torch.equal(written[name], before[name]) for name in linears)
    assert not any(torch.equal(written[name], own[name]) for name in linears)
    assert all(torch.equal(written[name], own[name]) for name in own.keys() - linears)
    loras = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.language_model.model.layers.") for name in loras)


def test_the_weights_from_before_must_be_there(adapted: Path, tmp_path: Path):
    run = read_run(adapted)
    run.state["parents"] = [str(tmp_path / "gone")]
    with pytest.raises(adapters.CheckpointError, match="the weights from before the adapters lie in .*gone"):
        adapters.base_tensors(run)
