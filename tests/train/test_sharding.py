"""A sharded run is the run of one process: gradients, losses, evaluation, what is written. All on a CPU, two processes over gloo,
through the code that runs on GPUs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from helpers import metrics, stage_recipe
from processes import on_processes
from safetensors.torch import load_file, save_file
from tiny_runs import record, write_data

from diffvl.config.resolve import dump
from diffvl.errors import ConfigError, UsageError
from diffvl.store.checkpoint import partial, saved_dtype
from diffvl.store.files import read_json
from diffvl.train import launch
from diffvl.train.launch import is_to_shard, process_state

PARTS = {"trunk": 1e-3, "connector": 1e-3, "mask_row": 1e-3}
NATIVE = {"trunk": 1e-3, "mask_row": 1e-3}
TINY_CHUNKS = 4000  # values of a chunk's logits: some fourteen rows
# Name -> model, settings of the stage. Of the first, every pitfall at once.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "all parts, checkpointing": ("llama", {"trainable": {**PARTS, "tower": 1e-4}, "gradient_checkpointing": True}),
    "connector alone": ("llama", {"trainable": {"connector": 1e-3}}),
    "windows, eager": ("gemma2", {"gradient_checkpointing": True}),
    "lora": ("qwen3", {"lora": {"rank": 4, "alpha": 8}}),
    "packed, untied": ("qwen2", {"row_length": 400}),
    "experts": ("qwen3_moe", {}),
    "learnt positions": ("gpt2", {}),
    "native, packed": ("qwen2_5_vl", {"trainable": NATIVE, "row_length": 400}),
    "native, its tower": ("qwen3_vl", {"trainable": {**NATIVE, "tower": 1e-3}}),
    "native, all parts": ("internvl", {"trainable": {**PARTS, "tower": 1e-3}}),
    "native, lora": ("gemma3", {"lora": {"rank": 4}}),
}
DEFAULT, FEW = "all parts, checkpointing", 4


@dataclass(frozen=True)
class Done:
    """What a run left. facts: of each process."""

    lines: list[dict[str, Any]]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    config: dict[str, Any]
    facts: list[dict[str, Any]]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with and without an image, of many lengths: processes differ in images and in masked tokens."""
    folder = tmp_path_factory.mktemp("mixed")
    images = [number % 3 != 1 for number in range(11)]
    texts = ["Red. " * (1 + 3 * number % 7) for number in range(11)]
    plain = "What is it?"
    pairs = zip(images, texts, strict=True)
    return write_data(folder, *(record(answer=text) if image else record(None, plain, text) for image, text in pairs))


def run(forks: Forks, start: Path, data: Path, folder: Path, processes: int, options: dict[str, Any], **stage: Any) -> Done:
    """Steps of four rows, by one process or by two; three records are held out, of which one process has two."""
    cut = {"batch_size": 2 // processes, "accumulation": 2, "sharding": "full" if processes > 1 else "none"}
    recipe = stage_recipe(data, holdout=3, **{**cut, **stage})
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump(recipe))
    words = (start, folder / "recipe.yaml", folder / "run", json.dumps(options))
    ended = on_processes(forks, folder, "sharded", words, processes)
    assert [one.code for one in ended] == [0] * processes, "\n".join(one.err for one in ended)
    work = partial(folder / "run")
    facts = [read_json(folder / f"run.{rank}.json") for rank in range(processes)]
    config = read_json(work / "config.json")
    return Done(metrics(work), torch.load(folder / "run.grads"), weights_in(work), config, facts)


def differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Each tensor's largest difference by its largest value. A bias of keys shifts all scores of a query alike, so its gradient
    is nothing but rounding; a parameter that nobody uses has no gradient, or a zero."""
    of_keys = ("k_proj.bias", "k_proj.base_layer.bias")
    names = [name for name in theirs if not name.endswith(of_keys)]
    assert not [name for name in ours.keys() ^ theirs.keys() if (ours | theirs)[name].any()]
    return {name: float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp_min(1e-12)) for name in names}


@pytest.fixture(scope="module")
def runs(
    forks: Forks, prepared: Callable[[str], Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Done]:
    """(name, processes, steps) -> the run, made once."""
    made: dict[tuple[str, int, int], Done] = {}

    def make(name: str, processes: int, steps: int = FEW) -> Done:
        if (name, processes, steps) not in made:
            model, settings = RUNS[name]
            folder = tmp_path_factory.mktemp("run") / str(processes)
            settings = {"steps": steps, "eval_every": steps, "save_every": 100, **settings}
            made[name, processes, steps] = run(
                forks, prepared(model), data, folder, processes, {"chunk": TINY_CHUNKS}, **settings
            )
        return made[name, processes, steps]

    return make


@pytest.mark.parametrize(("name", "steps"), [(DEFAULT, FEW), *(pytest.param(name, 20, marks=pytest.mark.slow) for name in RUNS)])
def test_two_processes_with_parts_of_a_model_are_one_with_it_whole(name: str, steps: int, runs: Callable[..., Done]):
    one, two = runs(name, 1, steps), runs(name, 2, steps)
    found = differences(two.gradients, one.gradients)
    assert max(found.values()) <= 1e-5, max(found, key=found.__getitem__)
    assert [line["step"] for line in two.lines] == [line["step"] for line in one.lines]
    losses = [[line["loss"] for line in done.lines if "loss" in line] for done in (two, one)]
    assert len(losses[0]) == steps and losses[0] == pytest.approx(losses[1], rel=1e-5)
    held_out = [[line["eval_masked_loss"] for line in done.lines if "eval_masked_loss" in line] for done in (two, one)]
    assert len(held_out[0]) == 2 and held_out[0] == pytest.approx(held_out[1], rel=1e-5)
    assert two.config == one.config
    assert {key: tensor.shape for key, tensor in two.weights.items()} == {key: w.shape for key, w in one.weights.items()}


def test_processes_differ_in_the_chunks_of_their_heads(runs: Callable[..., Done]):
    """Else the run above would not show that the head's runs are no collective."""
    first, second = (facts["heads"] for facts in runs(DEFAULT, 2).facts)
    assert first > 2 and second > 2 and first != second


def test_accumulation_keeps_parts_of_gradients_only(runs: Callable[..., Done]):
    """After the first micro-step of two: every gradient is there, and a process holds about half of their numbers."""
    for facts in runs(DEFAULT, 2).facts:
        assert 0.45 * facts["whole"] < facts["held"] < 0.55 * facts["whole"]
    (alone,) = runs(DEFAULT, 1).facts
    assert alone["held"] > 0.8 * alone["whole"]


def test_a_unit_of_embedding_and_head_is_caught(
    forks: Forks, runs: Callable[..., Done], prepared: Callable[[str], Path], data: Path, tmp_path: Path
):
    """Tied tables in a unit of their own, with a head that runs several times: no error, and a wrong gradient."""
    model, settings = RUNS[DEFAULT]
    options = {"chunk": TINY_CHUNKS, "tied_unit": True}
    wrong = run(forks, prepared(model), data, tmp_path / "run", 2, options, steps=1, save_every=100, **settings)
    found = differences(wrong.gradients, runs(DEFAULT, 1).gradients)
    table = "language_model.model.embed_tokens.weight"
    assert found.pop(table) > 0.1 and max(found.values()) <= 1e-5


@pytest.mark.slow
def test_under_bf16_parts_compute_as_copies_do(forks: Forks, prepared: Callable[[str], Path], data: Path, tmp_path: Path):
    """Adapters in fp32 on frozen weights in bf16, in one unit. Gathering in bf16 is other arithmetic, and near."""
    settings = {"steps": 4, "save_every": 100, "precision": "bf16"}
    kinds = {"copies": ("none", {"rank": 4}), "parts": ("full", {"rank": 4}), "fp32": ("full", None), "bf16": ("full_bf16", None)}
    start, losses = in_bf16(prepared("llama"), tmp_path / "start"), {}
    for name, (sharding, lora) in kinds.items():
        done = run(forks, start, data, tmp_path / name, 2, {}, **settings, sharding=sharding, lora=lora)
        losses[name] = [line["loss"] for line in done.lines if "loss" in line]
    assert losses["parts"] == pytest.approx(losses["copies"], rel=1e-5)
    assert losses["bf16"] != losses["fp32"] and losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


# --- what is written -------------------------------------------------------------------------------------------------------

WRITTEN = {
    "lora": (("llama", "qwen2"), {"lora": {"rank": 4, "alpha": 8}}),
    "full": (("qwen3_moe", "gpt2", "qwen2_5_vl"), {"trainable": NATIVE}),
    "lora on others": (("gpt2", "gemma3", "qwen3_moe"), {"lora": {"rank": 4}}),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "lora" else pytest.mark.slow) for name in WRITTEN])
def test_what_is_gathered_is_what_a_whole_model_writes(name: str, forks: Forks, prepared: Callable[[str], Path], tmp_path: Path):
    """To the bit, from a bf16 checkpoint: adapters merged, the mask row folded in, tied tables once, several files."""
    models, settings = WRITTEN[name]
    starts = [in_bf16(prepared(model), tmp_path / "starts" / model) for model in models]
    (tmp_path / "recipe.yaml").write_text(dump(stage_recipe(tmp_path, **{"precision": "bf16", **settings})))
    ended = on_processes(forks, tmp_path, "gather", (tmp_path / "recipe.yaml", tmp_path / "out", *starts))
    assert [one.code for one in ended] == [0, 0], ended[0].err + ended[1].err
    for start in starts:
        whole, parts = (tmp_path / "out" / start.name / kind for kind in ("whole", "parts"))
        ours, theirs, before = weights_in(parts), weights_in(whole), weights_in(start)
        assert ours.keys() == theirs.keys() == before.keys() and saved_dtype(parts) == torch.bfloat16
        assert not [key for key in ours if ours[key].dtype != theirs[key].dtype or not torch.equal(ours[key], theirs[key])]
        assert any(not torch.equal(before[key], ours[key]) for key in ours)
        files = sorted(file.name for file in parts.glob("model-*.safetensors"))
        assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        assert set(read_json(parts / "model.safetensors.index.json")["weight_map"].values()) == set(files)
        names = {path.name for path in whole.iterdir() if not path.name.startswith("model")}
        assert names == {path.name for path in parts.iterdir() if not path.name.startswith("model")}
        assert (parts / "config.json").read_bytes() == (whole / "config.json").read_bytes()


def in_bf16(start: Path, copy: Path) -> Path:
    """A copy of a checkpoint directory with its weights in bf16."""
    shutil.copytree(start, copy)
    config = copy / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"float32"', '"bfloat16"'), encoding="utf-8")
    save_file(
        {name: tensor.bfloat16() for name, tensor in weights_in(start).items()}, copy / "model.safetensors", {"format": "pt"}
    )
    return copy


# --- what is refused -------------------------------------------------------------------------------------------------------

REFUSED = ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"]


@pytest.mark.parametrize("variable", REFUSED)
def test_another_engine_is_refused_in_words(variable: str, monkeypatch: pytest.MonkeyPatch):
    """On a CPU accelerate drops its own FSDP without a word."""
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UsageError, match="DeepSpeed|FSDP|Megatron|parallelism") as refused:
        process_state()
    assert "`sharding`" in str(refused.value) and "recipes/accelerate/" in str(refused.value)
    assert not refused.value.told_elsewhere
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError) as refused:
        process_state()
    assert refused.value.told_elsewhere


def test_sharding_without_effect_is_refused(monkeypatch: pytest.MonkeyPatch):
    def stage(sharding: str, precision: str = "fp32") -> Any:
        return stage_recipe(Path("x"), sharding=sharding, precision=precision).stages["diffuse"]

    assert not is_to_shard(stage("auto")) and not is_to_shard(stage("none"))
    with pytest.raises(ConfigError, match="sharding: full has no effect in one process: start several with `accelerate launch"):
        is_to_shard(stage("full"))
    several = type("State", (), {"num_processes": 2})
    monkeypatch.setattr(launch, "process_state", lambda: several)
    assert is_to_shard(stage("full")) and is_to_shard(stage("full_bf16", "bf16")) and not is_to_shard(stage("auto"))
    with pytest.raises(ConfigError, match="full_bf16 gathers weights in bf16, but trains in fp32"):
        is_to_shard(stage("full_bf16"))
