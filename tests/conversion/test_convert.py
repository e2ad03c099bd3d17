"""Whole runs of the command on tiny stand-ins: what is written, what goes on from what, and what each checkpoint then answers."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import yaml
from helpers import QUIET, metrics, weights_of
from tiny_runs import record, short_records, stage, succeed, tree, write_data, write_gguf, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffvl.config.recipe import Recipe
from diffvl.config.resolve import dump, find_recipe, read_yaml, recipe_names, resolve
from diffvl.decode.answer import answer, load_for_decoding
from diffvl.demo import standins
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.prepare.run import prepare
from diffvl.prepare.source import Source
from diffvl.store.checkpoint import HUB_FILES

CHECKPOINT = {
    *("config.json", "generation_config.json", "model.safetensors", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No run of the checkout is found, and none is left in it."""
    monkeypatch.chdir(tmp_path)


def state_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "diffvl.json").read_text(encoding="utf-8"))


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def recipe_of(directory: Path) -> Recipe:
    return resolve(read_yaml(directory / "run.yaml"), [], "run.yaml")


# --- both stages in one command --------------------------------------------------------------------------------------------


def test_what_one_command_writes(run: tiny_runs.Run):
    names = {path.name: {file.name for file in path.iterdir()} for path in run.root.iterdir()}
    prepared = CHECKPOINT | set(HUB_FILES) | {"diffvl.json", "run.yaml"}
    trained = prepared | {"metrics.jsonl", "samples.jsonl", "report.html"}
    assert names == {"prepared": prepared, "align": trained, "diffuse": trained}
    assert "AR parity: largest difference" in run.output
    assert f"next: diffvl generate {run.diffuse} --image " in run.output


def test_every_directory_says_where_it_came_from(run: tiny_runs.Run, source: Callable[[str], Path], tower: Path):
    parents = {"prepared": [str(source("llama")), str(tower)], "align": [str(run.root / "prepared")], "diffuse": [str(run.align)]}
    for kind, expected in parents.items():
        state = state_of(run.root / kind)
        assert state["kind"] == kind and state["parents"] == expected
        assert state["versions"]["torch"] == torch.__version__ and {"diffvl", "transformers"} <= state["versions"].keys()
        assert state["created"] and state["machine"]
    assert max(state_of(run.root / "prepared")["proofs"].values()) < 1e-3
    assert state_of(run.diffuse)["state"] == {"steps": 2, "rows_per_step": 2, "seed": 0, "curriculum": {}}


def test_run_yaml_is_the_recipe_resolved(run: tiny_runs.Run, source: Callable[[str], Path]):
    given = {**yaml.safe_load(run.recipe.read_text(encoding="utf-8")), "model": str(source("llama"))}
    for kind in ("prepared", "align", "diffuse"):
        text = (run.root / kind / "run.yaml").read_text(encoding="utf-8")
        recipe = recipe_of(run.root / kind)
        assert recipe == resolve(given, [], "given")
        assert dump(recipe) == text


def test_what_a_stage_leaves_to_read(run: tiny_runs.Run):
    for kind, figure, decoding in (("align", "next_token", "ar"), ("diffuse", "masked", "blocks")):
        directory = run.root / kind
        lines = metrics(directory)
        assert {line["stage"] for line in lines} == {kind}
        assert [line["step"] for line in lines if "loss" in line] == [1, 2]
        measured = [line for line in lines if f"eval_{figure}_loss" in line]
        assert [line["step"] for line in measured] == [0, 2]
        assert all(math.isfinite(line[f"eval_{figure}_loss"]) for line in measured)
        samples = [json.loads(line) for line in (directory / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [set(sample) for sample in samples] == [{"image", "question", "truth", "before", "after"}]
        assert Path(samples[0]["image"]).is_file() and samples[0]["truth"]
        assert config_of(directory)["decoding"] == decoding
    settings = {key: config_of(run.diffuse)[key] for key in ("block_size", "context", "grid", "target")}
    assert settings == {"block_size": 4, "context": "block", "grid": "absolute", "target": "same"}
    # What answered before the diffuse stage is what answered after the align stage: the same checkpoint.
    assert config_of(run.diffuse)["text_config"]["block_size"] == 4


def test_align_trains_the_connector_and_diffuse_what_it_names(run: tiny_runs.Run):
    start, aligned, diffused = (weights_of(run.root / kind) for kind in ("prepared", "align", "diffuse"))
    moved = {name for name in start if not torch.equal(start[name], aligned[name])}
    assert moved == {name for name in start if name.startswith("connector.")}
    still = {name for name in start if torch.equal(aligned[name], diffused[name])}
    assert still == {name for name in start if name.startswith("vision_tower.")}


# --- planning --------------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    run: tiny_runs.Run, source: Callable[[str], Path], tower: Path, tmp_path: Path
):
    out = tmp_path / "out"
    printed = succeed("convert", source("llama"), "--recipe", run.recipe, "--out", out, "--dry-run").out
    lines = printed.splitlines()  # a path longer than the terminal is not broken
    assert lines[0] == f"prepare {source('llama')} + {tower} -> {out}/prepared"
    assert lines[1].startswith("align ar; trains connector 0.001; 2 steps of 2 x 1")
    trains = "diffuse block_diffusion (block 4, block context, uniform noise); trains connector 0.001, mask_row 0.001, trunk"
    assert lines[2].startswith(trains) and lines[2].endswith(f"-> {out}/diffuse")
    assert lines[-1] == "dry run: nothing was written"
    assert not list(tmp_path.iterdir())


def newer(directory: Path, created: str) -> None:
    state = state_of(directory)
    (directory / "diffvl.json").write_text(json.dumps({**state, "created": created}), encoding="utf-8")


def test_diffuse_alone_goes_on_from_the_newest_align_run(run: tiny_runs.Run, shapes: dict[str, Path], tmp_path: Path):
    """And by the recipe that this run began with."""
    for name, created in (("old", "2031-01-01T00:00:00+00:00"), ("new", "2031-01-02T00:00:00+00:00")):
        shutil.copytree(run.align, tmp_path / "runs" / name / "align")
        newer(tmp_path / "runs" / name / "align", created)
    shutil.copytree(run.align, tmp_path / "runs" / "unfinished" / "align.partial")
    printed = succeed("convert", "--stage", "diffuse", "--data", shapes["train"], "--set", "stages.diffuse.steps=1").out
    assert printed.startswith("going on from the newest align run: runs/new/align\n")
    assert not (tmp_path / "runs" / "old" / "diffuse").exists()
    written = tmp_path / "runs" / "new" / "diffuse"
    assert state_of(written)["parents"] == ["runs/new/align"]
    theirs, ours = recipe_of(run.align).stages["diffuse"], recipe_of(written).stages["diffuse"]
    assert ours == theirs.model_copy(update={"steps": 1, "data": ours.data}) and ours.data.train == str(shapes["train"])


def test_from_another_run_by_another_recipe(run: tiny_runs.Run, shapes: dict[str, Path], tmp_path: Path):
    """The stage is the named recipe's; model and prepare settings stay those of the start."""
    objective = {"kind": "block_diffusion", "block_size": 2, "context": "causal", "grid": "response"}
    recipe = write_recipe(tmp_path / "r.yaml", Path("no-tower"), diffuse=stage("diffuse", shapes["train"], objective=objective))
    succeed("convert", "--from", run.align, "--recipe", recipe, "--out", tmp_path / "out")
    written = tmp_path / "out" / "diffuse"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["diffuse"]
    assert state_of(written)["parents"] == [str(run.align)]
    assert recipe_of(written).prepare == recipe_of(run.align).prepare and recipe_of(written).model == recipe_of(run.align).model
    assert config_of(written)["block_size"] == 2 and config_of(written)["grid"] == "response"


def test_the_same_command_again_with_resume_keeps_what_is_finished(run: tiny_runs.Run, source: Callable[[str], Path]):
    before = tree(run.root)
    printed = succeed("convert", source("llama"), "--recipe", run.recipe, "--out", run.root, "--resume").out
    assert [line.split(":")[:2] for line in printed.splitlines() if "finished already, kept" in line] == [
        ["align", " finished already, kept"],
        ["diffuse", " finished already, kept"],
    ]
    assert tree(run.root) == before


def test_one_stage_after_the_other_gives_what_both_at_once_give(
    run: tiny_runs.Run, source: Callable[[str], Path], tmp_path: Path
):
    """MODEL and --out name the run; its align stage is what the diffuse stage goes on from."""
    words = ("convert", source("llama"), "--recipe", run.recipe, "--out", tmp_path / "out")
    succeed(*words, "--stage", "align")
    succeed("convert", source("llama"), "--out", tmp_path / "out", "--stage", "diffuse")
    for kind in ("align", "diffuse"):
        mine, theirs = tmp_path / "out" / kind, run.root / kind
        assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
        assert metrics(mine) == metrics(theirs)


# --- adapters, precisions, sources -----------------------------------------------------------------------------------------


def test_adapters_are_merged(run: tiny_runs.Run, tmp_path: Path):
    succeed("convert", "--from", run.align, "--stage", "diffuse", "--lora", "--out", tmp_path / "out")
    written = tmp_path / "out" / "diffuse"
    assert recipe_of(written).stages["diffuse"].lora is not None
    before, after = weights_of(run.align), weights_of(written)
    assert after.keys() == before.keys()
    assert not [name for name in after if "lora" in name] and not list(written.glob("adapter_*.safetensors"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    projections = {name for name in before if name.startswith("language_model.") and name.endswith("_proj.weight")}
    table = "language_model.model.embed_tokens.weight"
    assert moved == projections | {name for name in before if name.startswith("connector.")} | {table}
    rows = [row for row in range(len(before[table])) if not torch.equal(before[table][row], after[table][row])]
    assert rows == [config_of(written)["mask_token_id"]]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bf16_checkpoint_stays_one(
    precision: str, source: Callable[[str], Path], tower: Path, shapes: dict[str, Path], tmp_path: Path
):
    model = tmp_path / "model"
    shutil.copytree(source("qwen2"), model)
    half = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    half.save_pretrained(model)
    recipe = write_recipe(tmp_path / "r.yaml", tower, align=stage("align", shapes["align"], precision=precision))
    succeed("convert", model, "--recipe", recipe, "--out", tmp_path / "out")
    start, aligned = (weights_of(tmp_path / "out" / kind) for kind in ("prepared", "align"))
    for directory, weights in ((tmp_path / "out" / "prepared", start), (tmp_path / "out" / "align", aligned)):
        assert config_of(directory)["dtype"] == "bfloat16"
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    trained = {name for name in start if name.startswith("connector.")}
    assert trained == {name for name in start if not torch.equal(start[name], aligned[name])}
    known = len(AutoTokenizer.from_pretrained(model))
    for name, tensor in half.state_dict().items():
        theirs = aligned[f"language_model.{name}"]
        rows = known if theirs.shape != tensor.shape or "embed" in name or "lm_head" in name else len(tensor)
        assert torch.equal(theirs[:rows], tensor[:rows]), name


def test_a_gguf_file(source: Callable[[str], Path], tower: Path, shapes: dict[str, Path], tmp_path: Path):
    write_gguf(source("llama"), tmp_path / "tiny.gguf")
    recipe = write_recipe(tmp_path / "r.yaml", tower, align=stage("align", shapes["align"]))
    succeed("convert", tmp_path / "tiny.gguf", "--recipe", recipe)
    written = tmp_path / "runs" / "tiny" / "align"
    weights = weights_of(written)
    for name, tensor in AutoModelForCausalLM.from_pretrained(source("llama")).state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(weights[f"language_model.{name}"][: len(tensor)], tensor), name
    assert json.loads(succeed("generate", written, "--prompt", "Hi", "--max-new-tokens", 4, "--json").out)["tokens"] <= 4


# --- towers and connectors -------------------------------------------------------------------------------------------------


def prepared_with(tower: Path, trunk: Path, directory: Path, **settings: Any) -> Path:
    stages = {"align": {"objective": {"kind": "ar"}, "trainable": {"connector": 1e-3}, "steps": 1}}
    recipe = resolve({"stages": stages, "prepare": settings}, [], "test")
    return prepare(Source(str(trunk), None, str(tower)), recipe, directory, QUIET)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {}) for kind in (*standins.TOWERS, standins.FULL_CLIP)),
        ("siglip", {"connector": {"kind": "linear"}}),
        ("dinov2", {"connector": {"kind": "pixel_shuffle", "factor": 2}, "vision_layer": -1, "image_size": 48}),
    ],
)
def test_towers_and_connectors(kind: str, settings: dict[str, Any], source: Callable[[str], Path], tmp_path: Path):
    """Each prepares, looks at the image, and answers; two images of different content give different answers."""
    directory = prepared_with(standins.make_tower(tmp_path / "tower", kind), source("qwen3"), tmp_path / "prepared", **settings)
    decoder = load_for_decoding(directory)
    side = settings.get("image_size", standins.IMAGE_SIZE) // standins.PATCH_SIZE // (2 if "image_size" in settings else 1)
    assert decoder.processor.image_tokens == side * side
    write_data(tmp_path, record())
    size = decoder.model.config.image_size
    pixels = torch.stack([torch.full((3, size, size), value) for value in (-1.0, 1.0)])
    with torch.no_grad():
        features = decoder.model.image_features(pixels)
    assert features.shape == (2, side * side, standins.HIDDEN)
    assert (features[0] - features[1]).abs().max() > 0.01
    reply = answer(decoder, [tmp_path / "good.png"], "What is it?", DecodeSettings(max_new_tokens=6))
    assert 1 <= reply.tokens <= 6 and reply.forwards >= reply.tokens


# --- what a checkpoint is used for -----------------------------------------------------------------------------------------


def generated(directory: Path, *words: object) -> dict[str, Any]:
    return json.loads(succeed("generate", directory, "--prompt", "How many shapes are there?", "--json", *words).out)


def test_generate(run: tiny_runs.Run, shapes: dict[str, Path]):
    image = shapes["test"].parent / "images" / "test" / "00000.png"
    for directory in (run.align, run.diffuse):
        replies = [generated(directory, "--image", image, "--max-new-tokens", 8) for _ in range(2)]
        for reply in replies:
            assert 1 <= reply["tokens"] <= 8
            assert reply["seconds"] > 0
        assert replies[0]["text"] == replies[1]["text"]
    one_step = generated(run.diffuse, "--image", image, "--max-new-tokens", 8, "--steps", 1)
    sure = generated(run.diffuse, "--max-new-tokens", 8, "--strategy", "low_confidence_dynamic", "--threshold", 0)
    assert one_step["forwards"] < replies[0]["forwards"] and sure["forwards"] < replies[0]["forwards"]
    plain = succeed("generate", run.diffuse, "--prompt", "How many shapes are there?", "--max-new-tokens", 8, "--image", image)
    assert plain.out == replies[0]["text"] + "\n" and not plain.err


@pytest.mark.parametrize(("kind", "figure", "decoding"), [("align", "next_token", "ar"), ("diffuse", "masked", "blocks")])
def test_evaluate(kind: str, figure: str, decoding: str, run: tiny_runs.Run, shapes: dict[str, Path]):
    words = ("evaluate", run.root / kind, "--data", shapes["test"], "--limit", 1, "--json")
    figures = json.loads(succeed(*words).out)
    assert set(figures) == {
        *("checkpoint", "data", "records", f"{figure}_loss", f"{figure}_accuracy", "tokens"),
        *("answers", "exact_match", "edit_similarity", "answer_tokens", "forwards", "decoding"),
    }
    assert (figures["records"], figures["answers"], figures["decoding"]) == (1, 1, decoding)
    assert figures["checkpoint"] == str(run.root / kind) and figures["data"] == str(shapes["test"])
    assert math.isfinite(figures[f"{figure}_loss"]) and 0 <= figures[f"{figure}_accuracy"] <= 1
    assert figures["tokens"] > 0 and 0 <= figures["edit_similarity"] <= 1 and 1 <= figures["answer_tokens"] <= 128


def test_answers_end_where_the_context_ends(run: tiny_runs.Run, tmp_path: Path):
    """A held-out record may fill the context; asking for it by `generate` with more tokens than are left is an error."""
    file = write_data(tmp_path, record(image=None, question="Why? " * 80, answer="So."))
    figures = json.loads(succeed("evaluate", run.diffuse, "--data", file, "--json").out)
    assert 1 <= figures["answer_tokens"] < 100


def test_a_sample_may_fill_the_context(source: Callable[[str], Path], tower: Path, tmp_path: Path):
    """GPT-2 has a table of positions and no row beyond it; an answer's last block is padded past the record's end."""
    longest = standins.MAX_POSITIONS - 8 + 1

    def data(answer: int) -> Path:
        return write_data(tmp_path, record(image=None, question="Hi?", answer="A" * answer))

    objective = {"kind": "block_diffusion", "block_size": 8, "grid": "response"}
    section = stage(
        "diffuse", data(600), objective=objective, data={"max_length": longest, "check_lengths": True}, batch_size=1, steps=1
    )
    recipe = write_recipe(tmp_path / "r.yaml", tower, diffuse=section)
    words = ("convert", source("gpt2"), "--recipe", recipe, "--out", tmp_path / "out")
    told = re.search(r"data.json:2: (\d+) tokens", tiny_runs.command(*words).err)
    assert told
    data(600 + longest - int(told[1]))
    succeed(*words)
    data(600 + longest - int(told[1]) + 1)
    assert f"data.json:2: {longest + 1} tokens" in tiny_runs.command(*words[:-1], tmp_path / "other").err


# --- recipes ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(run: tiny_runs.Run, source: Callable[[str], Path], tower: Path, tmp_path: Path) -> "Words":
    """Gives the words that run a recipe with two steps of every stage, and its stages. It keeps its objective, parts, optimiser,
    precision and checkpointing."""

    def make(name: str) -> tuple[list[object], list[str]]:
        tree = read_yaml(find_recipe(name))
        settings = [f"prepare.vision_tower={tower}", "prepare.vision_layer=-2", "prepare.image_size=32"]
        start: list[object] = [source("qwen2")]
        if "prepare" not in tree and "align" not in tree["stages"]:
            settings = []
            start = [source("qwen2_vl")] if name.startswith("vlm") else ["--from", run.align]
        data = short_records(tmp_path, 10)
        for kind, given in tree["stages"].items():
            sizes = {"epochs": "null", "steps": 2, "batch_size": 2, "accumulation": 1, "eval_every": "null"}
            sizes["data"] = f"{{train: {data}, max_length: 400}}"
            if (given.get("lora") or {}).get("bits"):
                sizes["lora.bits"] = "null"  # these need a GPU
            settings += [f"stages.{kind}.{key}={value}" for key, value in sizes.items()]
        words = [word for setting in settings for word in ("--set", setting)]
        return ["convert", *start, "--recipe", name, "--out", tmp_path / "out", *words], list(tree["stages"])

    return make


Words = Callable[[str], tuple[list[object], list[str]]]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_planned(name: str, small: Words, tmp_path: Path):
    """All of its stages, in its order, and nothing is written."""
    words, stages = small(name)
    lines = succeed(*words, "--dry-run").out.splitlines()
    assert [line.partition(" ")[0] for line in lines if f"-> {tmp_path}/out/" in line and line[:7] != "prepare"] == stages
    assert lines[-1] == "dry run: nothing was written" and not (tmp_path / "out").exists()


# Both stages, one bidirectional, adapters, a vision-language model. All of them are planned above.
RECIPES = ("llava", "dllm", "lora", "vlm")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in RECIPES else pytest.mark.slow) for name in recipe_names()]
)
def test_every_recipe_trains(name: str, small: Words, tmp_path: Path):
    words, stages = small(name)
    succeed(*words)
    for kind in stages:
        losses = {line["step"]: line["loss"] for line in metrics(tmp_path / "out" / kind) if "loss" in line}
        assert max(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses.values())
