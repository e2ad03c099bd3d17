"""Bad input, through the command's own entry point: one clear message, exit code 2, no traceback, nothing half written."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny_runs
import torch
import yaml
from tiny_runs import command, record, stage, tree, write_data, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM, ResNetConfig, ResNetModel, SwinConfig, SwinModel
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from diffvl import standins
from diffvl.train import StepSampler


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub is not asked (its library has read the environment already), and no run of the checkout is found."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trunk(source: Callable[[str], Path]) -> Path:
    return source("llama")


@pytest.fixture
def recipe(tmp_path: Path, tower: Path, shapes: dict[str, Path]) -> Path:
    """Both stages on good data."""
    stages = {"align": stage("align", shapes["align"]), "diffuse": stage("diffuse", shapes["train"])}
    return write_recipe(tmp_path / "recipe.yaml", tower, **stages)


@pytest.fixture(scope="session")
def run(
    tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path], tower: Path, shapes: dict[str, Path]
) -> tiny_runs.Run:
    return tiny_runs.finished_run(tmp_path_factory, source, tower, shapes)


def refused(*words: object, says: Sequence[str]) -> str:
    """The message of a command that must refuse; every text of `says` must be in it."""
    ended = command(*words)
    assert ended.code == 2, ended
    message = the_message(ended.err)
    for text in says:
        assert text in message, (text, message)
    return message


def the_message(err: str) -> str:
    """What follows the one `error:` on stderr."""
    assert "Traceback" not in err
    before, _, message = err.partition("error: ")
    assert message and "error:" not in before + message, err
    return message


@dataclass(frozen=True)
class Workshop:
    """`convert TRUNK --recipe RECIPE --out OUT` with more words; OUT must not be there afterwards."""

    trunk: Path
    recipe: Path
    out: Path

    def refuses(self, *words: object, says: Sequence[str], model: object = None) -> None:
        refused("convert", model or self.trunk, "--recipe", self.recipe, "--out", self.out, *words, says=says)
        assert not self.out.exists()


@pytest.fixture
def convert(trunk: Path, recipe: Path, tmp_path: Path) -> Workshop:
    return Workshop(trunk, recipe, tmp_path / "out")


def copy(directory: Path, to: Path) -> Path:
    shutil.copytree(directory, to)
    return to


def cut(file: Path) -> None:
    """Leaves the first half of a file."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


# --- MODEL -----------------------------------------------------------------------------------------------------------------


def test_an_unknown_model_name_gets_a_suggestion(convert: Workshop):
    says = ["'qwen25-7b': no such model name or directory; did you mean qwen2.5-7b", "`diffvl models` lists the names"]
    convert.refuses(model="qwen25-7b", says=says)
    convert.refuses(model="zzzzzzzz", says=["'zzzzzzzz': no such model name or directory; `diffvl models`"])


@pytest.mark.parametrize("name", ["qwen2.5-7b", "someone/something"])
def test_a_hub_checkpoint_that_cannot_be_fetched(name: str, convert: Workshop):
    repo = {"qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct"}.get(name, name)
    says = [
        f"{repo}: no such directory here, and it could not be fetched from the model hub",
        "Check the name and the connection",
    ]
    convert.refuses(model=name, says=says)


def test_no_hub_in_a_process_of_its_own(tmp_path: Path):
    """The environment variable as a user sets it; nothing is left where the command ran."""
    ended = tiny_runs.process("convert", "smollm2-135m", "--out", tmp_path / "out", HF_HUB_OFFLINE="1")
    assert (ended.code, ended.out) == (2, "")
    assert the_message(ended.err).startswith("HuggingFaceTB/SmolLM2-135M-Instruct: no such directory here, and it could not be")
    assert not list(tmp_path.iterdir())


def config_alone(folder: Path, model_type: str, **settings: Any) -> Path:
    """A directory with a config.json and nothing else."""
    AutoConfig.for_model(model_type, **settings).save_pretrained(folder)
    return folder


def test_a_directory_without_config(convert: Workshop, tmp_path: Path):
    (tmp_path / "model").mkdir()
    convert.refuses(model=tmp_path / "model", says=["model: no config.json there; expected a Hugging Face checkpoint directory"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"model_type": ', "config.json: damaged, not readable as JSON (Expecting value: line 1 column 16"),
        ("[]", "config.json: expected a JSON object, got list"),
        ('{"model_type": "unheard-of"}', "transformers cannot load it"),
        ("{}", "Should have a `model_type` key in its config.json"),
    ],
)
def test_a_config_that_says_nothing(content: str, says: str, convert: Workshop, tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(content, encoding="utf-8")
    convert.refuses(model=tmp_path / "model", says=[says])


def test_recurrent_architectures(convert: Workshop, tmp_path: Path):
    needs = (
        "only attention layers that take a mask (chunked_attention, full_attention, sliding_attention) can be made block-causal"
    )
    convert.refuses(model=standins.make_recurrent(tmp_path / "mamba"), says=["mamba has layers of type linear_attention", needs])
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 99}
    hybrid = config_alone(tmp_path / "qwen3-next", "qwen3_next", num_experts=2, **sizes)
    convert.refuses(model=hybrid, says=["qwen3_next has layers of type linear_attention", needs])


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
def test_a_vision_language_model(model_type: str, convert: Workshop, tmp_path: Path):
    says = [f"{model_type} is a vision-language model", "Give its language model instead"]
    convert.refuses(model=config_alone(tmp_path / "vlm", model_type), says=says)


def test_a_diffvl_directory_as_model(run: tiny_runs.Run, convert: Workshop):
    says = [f"{run.align} is a DiffVL directory already; to go on from it: diffvl convert --from {run.align} --stage diffuse"]
    convert.refuses(model=run.align, says=says)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "its tokenizer has no chat template, so prompts and answers cannot be told apart; use an instruct checkpoint"),
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
            "its chat template writes no special token behind an answer, so decoding could not stop",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>{% endif %}",
            "the chat template is not prefix-stable: the prompt of an answer is not the beginning of the whole chat",
        ),
        ("{% for m in messages %}{{ m['content'] }}<|im_end|>", "refuses a question with an answer (Unexpected end of template"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "refuses a question with an answer (can only concatenate"),
        ("<|im_start|>{{ messages[0]['content'] }}<|im_end|>", "its chat template leaves the answer out"),
    ],
    ids=["none", "no stop", "not prefix-stable", "broken", "wrong type", "no answer"],
)
def test_chat_templates(template: str | None, says: str, convert: Workshop, tmp_path: Path):
    model = copy(convert.trunk, tmp_path / "model")
    file = model / "chat_template.jinja"
    if template is None:
        file.unlink()
    else:
        file.write_text(template, encoding="utf-8")
    convert.refuses(model=model, says=[f"{model}: ", says])


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json", "config.json"])
def test_a_source_with_a_file_cut_short(file: str, convert: Workshop, tmp_path: Path):
    model = copy(convert.trunk, tmp_path / "model")
    cut(model / file)
    says = "its tokenizer cannot be loaded; expected a whole tokenizer.json" if file == "tokenizer.json" else f"{file}: damaged"
    convert.refuses(model=model, says=[says])


@pytest.mark.parametrize("fault", ["cut", "missing"])
def test_a_source_shard(fault: str, convert: Workshop, tmp_path: Path):
    model = copy(convert.trunk, tmp_path / "model")
    (model / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(convert.trunk).save_pretrained(model, max_shard_size="100KB")
    shard = sorted(model.glob("model-*.safetensors"))[1]
    if fault == "cut":
        cut(shard)
        convert.refuses(model=model, says=[f"{model}: a weight file is damaged or cut short", "fetch the checkpoint again"])
    else:
        shard.unlink()
        convert.refuses(model=model, says=[f"{model}: not a whole checkpoint", "copy or fetch it again"])


# --- the vision tower ------------------------------------------------------------------------------------------------------


def pyramid(folder: Path) -> Path:
    """A Swin tower: it names a patch size, but joins patches on the way."""
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    SwinModel(SwinConfig(**sizes)).save_pretrained(folder)
    standins.make_tower(folder.with_name("vit"), "vit")
    shutil.copy(folder.with_name("vit") / "preprocessor_config.json", folder)
    return folder


def test_towers_without_patch_tokens(convert: Workshop, tmp_path: Path):
    resnet = tmp_path / "resnet"
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])).save_pretrained(resnet)
    ConvNextImageProcessorPil(size={"shortest_edge": 224}).save_pretrained(resnet)
    expected = "SigLIP, CLIP, DINOv2 or ViT"
    says = [f"{resnet}: a 'resnet' model gives no patch tokens", expected]
    convert.refuses("--set", f"prepare.vision_tower={resnet}", says=says)
    says = [f"{convert.trunk}: a 'llama' model gives no patch tokens", expected]
    convert.refuses("--set", f"prepare.vision_tower={convert.trunk}", says=says)
    swin = pyramid(tmp_path / "swin")
    words = ("--set", f"prepare.vision_tower={swin}", "--set", "prepare.vision_layer=-1")
    convert.refuses(*words, says=["swin: this vision tower gives", expected])


def test_a_tower_without_preprocessor_config(convert: Workshop, tower: Path, tmp_path: Path):
    blind = copy(tower, tmp_path / "blind")
    (blind / "preprocessor_config.json").unlink()
    says = [f"{blind}: it has no image processor", "expected a preprocessor_config.json"]
    convert.refuses("--set", f"prepare.vision_tower={blind}", says=says)


def test_a_tower_that_is_nowhere(convert: Workshop, tmp_path: Path):
    for name in (tmp_path / "nowhere", "someone/nothing"):
        convert.refuses("--set", f"prepare.vision_tower={name}", says=[f"{name}: no such directory here, and it could not be"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["prepare.vision_layer=9"], "prepare.vision_layer is 9; this tower has hidden states -4 to 3"),
        (
            ["prepare.connector={kind: pixel_shuffle, factor: 3}"],
            "which pixel_shuffle by 3 does not divide: choose a multiple of 24",
        ),
        (["prepare.image_size=8"], "prepare.image_size: Input should be greater than or equal to 14 (got 8)"),
    ],
)
def test_settings_that_do_not_fit_the_tower(settings: list[str], says: str, convert: Workshop):
    convert.refuses(*(word for setting in settings for word in ("--set", setting)), says=[says])


# --- the recipe ------------------------------------------------------------------------------------------------------------


def test_unknown_keys_in_the_file(convert: Workshop):
    content = yaml.safe_load(convert.recipe.read_text(encoding="utf-8"))
    content["stages"]["align"]["optim"] = {"momentum": 0.9}
    convert.recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    convert.refuses(says=[f"recipe {convert.recipe}: 1 wrong setting", "stages.align.optim.momentum: unknown key"])
    convert.recipe.write_text("stages: [1\n", encoding="utf-8")
    convert.refuses(says=[f"{convert.recipe}: not valid YAML", "line 2"])
    convert.refuses("--recipe", "lava", says=["--recipe 'lava': neither a file nor a known recipe. Known: ar-control, demo"])


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("stages.align.stepz=3", "stages.align.stepz: unknown key"),
        ("stages.align.batch_size=0", "stages.align.batch_size: Input should be greater than or equal to 1 (got 0)"),
        ("stages.align.objective.noise={schedule: beta}", "stages.align.objective.noise: unknown key"),
        ("stages.diffuse.objective.weight=t", "stages.diffuse.objective.weight: Input should be '1/t', 'effective' or 'none'"),
        ("seed", "--set 'seed': expected KEY=VALUE with a dotted key"),
        ("model=other", "--set model=... has no effect: name the checkpoint as MODEL"),
    ],
)
def test_settings_on_the_command_line(setting: str, says: str, convert: Workshop):
    convert.refuses("--set", setting, says=[says])


def test_several_problems_are_told_at_once(convert: Workshop):
    settings = ("stages.align.stepz=3", "stages.align.optim.beta1=2", "stages.diffuse.objective.block_size=x", "seed=-1")
    says = ["4 wrong settings", "stages.align.stepz: unknown key", "stages.align.optim.beta1: ", "seed: "]
    says += ["stages.diffuse.objective.block_size: "]
    convert.refuses(*(word for setting in settings for word in ("--set", setting)), says=says)


# --- the words of the command ----------------------------------------------------------------------------------------------


def test_words_that_exclude_each_other(run: tiny_runs.Run, convert: Workshop):
    convert.refuses("--from", run.align, says=["MODEL and --from exclude each other"])
    convert.refuses("--stage", "align", "--lora", says=["--lora has no effect: the diffuse stage is not run"])


@pytest.mark.parametrize("setting", ["prepare.image_size=64", "prepare={image_size: 64}"])
def test_prepare_settings_for_what_is_prepared(setting: str, run: tiny_runs.Run, convert: Workshop, tmp_path: Path):
    """Also when the aligned run is found by MODEL and --out."""
    says = [f"--set prepare.* has no effect: {run.align} is prepared already"]
    refused("convert", "--from", run.align, "--out", tmp_path / "out", "--set", setting, says=says)
    before = tree(run.root)
    words = ("convert", convert.trunk, "--stage", "diffuse", "--out", run.root, "--set", setting)
    refused(*words, says=says)
    assert tree(run.root) == before and not (tmp_path / "out").exists()


def test_diffuse_with_nothing_to_start_from(convert: Workshop, tmp_path: Path):
    says = ["there is none under runs/. Type: diffvl convert MODEL --stage align"]
    refused("convert", "--stage", "diffuse", "--recipe", convert.recipe, says=says)
    assert not (tmp_path / "runs").exists()
    says = [f"--stage diffuse needs an aligned model, and {convert.out}/align is not there. Type: diffvl convert"]
    convert.refuses("--stage", "diffuse", says=says)
    refused("convert", says=["name a MODEL (see `diffvl models`), or a DiffVL directory with --from"])


def test_a_run_of_another_model_is_not_gone_on_from(run: tiny_runs.Run, source: Callable[[str], Path]):
    before = tree(run.root)
    says = [f"{run.align} was made from {source('llama')}, not from {source('qwen2')}: choose another --out"]
    refused("convert", source("qwen2"), "--stage", "diffuse", "--out", run.root, says=says)
    assert tree(run.root) == before


def test_a_start_that_is_none(convert: Workshop, run: tiny_runs.Run, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for start, says in (
        (tmp_path / "nowhere", "nowhere: no such directory"),
        (tmp_path / "empty", "empty: no config.json there; expected a DiffVL checkpoint"),
        (convert.trunk, "a 'llama' checkpoint; expected one that `diffvl convert` wrote. To convert it: diffvl convert"),
    ):
        refused("convert", "--from", start, "--stage", "diffuse", "--out", convert.out, says=[says])
        assert not convert.out.exists()
    says = [f"{run.diffuse} is a finished diffuse run and the recipe has no later stage: name one with --stage"]
    refused("convert", "--from", run.diffuse, says=says)


# --- the output directory ---------------------------------------------------------------------------------------------------


def test_an_output_directory_that_is_taken(run: tiny_runs.Run, convert: Workshop, tmp_path: Path):
    before = tree(run.root)
    words = ("convert", convert.trunk, "--recipe", run.recipe, "--out")
    refused(
        *words, run.root, says=[f"{run.root / 'prepared'} exists and is not empty; nothing was written. Choose another --out"]
    )
    refused("convert", "--from", run.align, "--stage", "diffuse", says=[f"{run.diffuse} exists and is not empty"])
    assert tree(run.root) == before
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("all my work", encoding="utf-8")
    before = tree(taken)
    refused(*words, taken, says=[f"{taken} is not empty and holds no diffvl run; nothing was written. Choose another --out"])
    file = taken / "thesis.txt"
    for out in (file, file / "deeper"):
        refused(*words, out, says=[f"{out} cannot be made: {file} is not a directory. Choose another --out"])
    assert tree(taken) == before


# --- data ------------------------------------------------------------------------------------------------------------------


def refuse_data(convert: Workshop, file: Path, *words: object, says: Sequence[str]) -> None:
    """Bad data of the last stage is found before any work on the first; a dry run finds it too."""
    convert.refuses("--set", f"stages.diffuse.data.train={file}", *words, says=says)
    convert.refuses("--data", file, "--dry-run", *words, says=says)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (record(image="none.png"), "image file not found: {folder}/none.png (relative paths start at the data file's folder)"),
        (record(question="<image><image> Both?"), "more <image> than images: 2 in the text, 1 in the record"),
        (record(answer=" \n"), "turn 2: empty answer; fill it or remove the record"),
        ({"image": "good.png"}, "no `conversations` (nor `messages`)"),
    ],
    ids=["missing image", "more markers", "empty answer", "no turns"],
)
def test_bad_records(bad: dict[str, Any], says: str, convert: Workshop, tmp_path: Path):
    file = write_data(tmp_path, record(), bad)
    refuse_data(convert, file, says=[f"{file}:3: ", says.format(folder=tmp_path)])


def test_malformed_json_names_its_line(convert: Workshop, tmp_path: Path):
    file = write_data(tmp_path, record(), record(), name="data.jsonl")
    file.write_text(f"{json.dumps(record())}\n{json.dumps(record())[:-1]}\n", encoding="utf-8")
    refuse_data(convert, file, says=[f"{file}:2: malformed JSON at column"])


def test_several_bad_records_are_told_at_once(convert: Workshop, tmp_path: Path):
    file = write_data(tmp_path, record(answer=""), record(), record(image="none.png"))
    refuse_data(convert, file, says=[f"{file}: 2 problems", f"{file}:2: turn 2: empty answer", f"{file}:4: image file not found"])


@pytest.mark.parametrize("content", [b"I am no picture", b"", None], ids=["text", "empty", "cut short"])
def test_a_corrupt_picture_is_found_before_training(content: bytes | None, convert: Workshop, tmp_path: Path):
    file = write_data(tmp_path, record(), record(image="bad.png"))
    if content is None:
        shutil.copy(tmp_path / "good.png", tmp_path / "bad.png")
        cut(tmp_path / "bad.png")
    else:
        (tmp_path / "bad.png").write_bytes(content)
    refuse_data(convert, file, says=[f"data.json:3: picture {tmp_path}/bad.png cannot be read", "replace it or leave it out"])


def test_a_corrupt_held_out_picture(convert: Workshop, tmp_path: Path):
    file = write_data(tmp_path, record(image="bad.png"))
    (tmp_path / "bad.png").write_text("I am no picture", encoding="utf-8")
    convert.refuses("--set", f"stages.diffuse.data.eval={file}", says=[f"data.json:2: picture {tmp_path}/bad.png cannot be read"])


def test_a_record_longer_than_max_length(convert: Workshop, tmp_path: Path):
    file = write_data(tmp_path, record(), record(answer="Yes. " * 200), record(answer="No. " * 200))
    says = [
        f"{file}: 2 of 3 records are longer than 400 tokens (pictures included)",
        "data.json:3: 1047 tokens",
        "data.json:4: 847 tokens",
    ]
    refuse_data(convert, file, says=[*says, "raise data.max_length, or set data.too_long=drop to leave them out"])
    drop = ("--set", "stages.align.data.too_long=drop", "--set", "stages.diffuse.data.too_long=drop")
    all_long = write_data(tmp_path, record(answer="Yes. " * 200), name="long.json")
    refuse_data(convert, all_long, *drop, says=[f"{all_long}: all 1 records are longer than 400 tokens"])


def test_long_records_are_left_out_on_request_and_it_says_so(convert: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = write_data(tmp_path, record(), record(answer="Yes. " * 200), record())
    words = ("--stage", "align", "--data", file, "--set", "stages.align.data.too_long=drop", "--set", "stages.align.epochs=1")
    words += ("--set", "stages.align.steps=null", "--set", "stages.align.batch_size=1")
    tiny_runs.succeed("convert", convert.trunk, "--recipe", convert.recipe, "--out", convert.out, *words)
    assert [entry.getMessage() for entry in caplog.records].count(f"{file}: left out 1 of 3 records longer than 400 tokens") == 1
    assert json.loads((convert.out / "align" / "diffvl.json").read_text(encoding="utf-8"))["state"]["steps"] == 2


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (
            "max_length=513",
            "diffuse: data.max_length is 513, but a sample in whole blocks may have 512 tokens in this trunk's context",
        ),
        ("holdout=10", "diffuse: data.holdout is 10, but {train} has 10 records: nothing is left to train on"),
        ("train=null", "diffuse: no training data: give --data FILE (LLaVA-format .json or .jsonl) or set data.train"),
        ("train=none.json", "none.json: no such data file"),
    ],
)
def test_data_settings(setting: str, says: str, convert: Workshop, shapes: dict[str, Path]):
    convert.refuses("--set", f"stages.diffuse.data.{setting}", says=[says.format(train=shapes["train"])])


def test_the_last_block_must_end_inside_the_context(convert: Workshop):
    """With the response grid an answer may begin anywhere, so that its last block may reach past the record's end."""
    words = ("--set", "stages.diffuse.objective.grid=response", "--set", "stages.diffuse.data.max_length=510")
    convert.refuses(*words, says=["may have 509 tokens in this trunk's context: set it to 509 or less"])


# --- interrupted runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interrupted:
    """An align run stopped at a bad picture. words: the command that began it."""

    words: tuple[object, ...]
    out: Path
    picture: Path
    line: int
    message: str


def interrupt(trunk: Path, recipe: Path, tmp_path: Path, workers: int) -> Interrupted:
    """A set too large to look at beforehand (check_images=0), read by so many loader processes, with a bad
    picture in the fifth of six steps."""
    fifth = list(StepSampler(samples=6, per_step=1, seed=0, steps_done=lambda: 0))[4]
    file = write_data(tmp_path, *(record(image="bad.png" if number == fifth else "good.png") for number in range(6)))
    (tmp_path / "bad.png").write_text("I am no picture", encoding="utf-8")
    settings = {"data.workers": workers, "data.check_images": 0, "save_every": 1, "batch_size": 1, "steps": 6}
    changes = [word for key, value in settings.items() for word in ("--set", f"stages.align.{key}={value}")]
    out = tmp_path / "out"
    words = ("convert", trunk, "--recipe", recipe, "--stage", "align", "--data", file, "--out", out, *changes)
    message = refused(*words, says=[])
    return Interrupted(words, out, tmp_path / "bad.png", fifth + 2, message)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_picture_of_a_large_set_stops_the_run_at_its_step_and_it_can_go_on(
    workers: int, trunk: Path, recipe: Path, tmp_path: Path
):
    interrupted = interrupt(trunk, recipe, tmp_path, workers)
    picture = interrupted.picture
    reason = f"cannot identify image file '{picture}'"
    told = f"data.json:{interrupted.line}: picture {picture} cannot be read ({reason}); replace it or leave it out\n"
    assert interrupted.message == told
    work = interrupted.out / "align.partial"
    assert sorted(path.name for path in interrupted.out.iterdir()) == ["align.partial", "prepared"]
    assert sorted(path.name for path in (work / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-4"]
    shutil.copy(interrupted.picture.with_name("good.png"), interrupted.picture)
    tiny_runs.succeed(*interrupted.words, "--resume")
    lines = [json.loads(line) for line in (interrupted.out / "align" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_training_checkpoint_with_a_file_cut_short(trunk: Path, recipe: Path, tmp_path: Path):
    """And the one before it is still good."""
    interrupted = interrupt(trunk, recipe, tmp_path, workers=0)
    folder = interrupted.out / "align.partial" / "checkpoints"
    last = folder / "checkpoint-4"
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
        spare = (last / name).read_bytes()
        cut(last / name)
        says = [f"{last / name}: damaged or cut short", f"remove {last}, and --resume goes on from the checkpoint before it"]
        refused(*interrupted.words, "--resume", says=says)
        (last / name).write_bytes(spare)
    shutil.rmtree(last)
    shutil.copy(interrupted.picture.with_name("good.png"), interrupted.picture)
    assert "going on after step 3" in tiny_runs.succeed(*interrupted.words, "--resume").out


def test_an_interrupted_run_goes_on_only_as_it_was(
    trunk: Path, recipe: Path, run: tiny_runs.Run, source: Callable[[str], Path], tmp_path: Path
):
    interrupted = interrupt(trunk, recipe, tmp_path, workers=0)
    before = tree(interrupted.out)
    words, out = interrupted.words, interrupted.out
    refused(*words, says=[f"{out / 'prepared'} exists and is not empty", "add --resume"])
    refused(
        "convert", "--from", out / "prepared", *words[2:], says=[f"{out / 'align.partial'} holds an interrupted run", "--resume"]
    )
    changes = ("--set", "stages.align.batch_size=2", "--set", "stages.align.trainable.connector=0.01")
    says = ["align.partial has other settings, so --resume cannot continue it", "batch_size: began with 1, asked for 2"]
    says += ["trainable.connector: began with 0.001, asked for 0.01", "use the same, or another --out"]
    refused(*words, "--resume", *changes, says=says)
    says = ["prepared has other settings", "prepare.image_size: began with None, asked for 16", "seed: began with 0, asked for 7"]
    refused(*words, "--resume", "--set", "prepare.image_size=16", "--set", "seed=7", says=says)
    other = source("qwen2")
    says = ["prepared has other settings", f"model: began with '{source('llama')}', asked for '{other}'"]
    refused(words[0], other, *words[2:], "--resume", says=says)
    says = ["align.partial has other settings", f"start: began with '{out / 'prepared'}', asked for '{run.root / 'prepared'}'"]
    refused("convert", "--from", run.root / "prepared", *words[2:], "--resume", says=says)
    assert tree(out) == before


# --- generate and evaluate -------------------------------------------------------------------------------------------------


@pytest.fixture
def good_picture(tmp_path: Path) -> Path:
    write_data(tmp_path, record())
    return tmp_path / "good.png"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--threshold", "0.5"], "--threshold 0.5 has no effect with --strategy low_confidence_static"),
        (["--steps", "5"], "is 5, expected 1 to the block size, 4"),
        (["--prompt", "Hi " * 400], "tokens and 128 new ones do not fit the context of 512: shorten the prompt or lower"),
        (["--max-new-tokens", "500"], "and 500 new ones do not fit the context of 512: shorten the prompt or lower"),
        (["--image", "none.png"], "--image: picture none.png does not exist"),
        (["--image", "."], "--image: picture . cannot be read"),
        (["--image", "text.png"], "--image: picture text.png cannot be read (cannot identify image file"),
        (["--image", "good.png", "--prompt", "<image><image>"], "the prompt has 2 <image> markers, 1 pictures were given"),
    ],
)
def test_generate(words: list[str], says: str, run: tiny_runs.Run, good_picture: Path):
    good_picture.with_name("text.png").write_text("I am no picture", encoding="utf-8")
    refused("generate", run.diffuse, "--prompt", "What is it?", *words, says=[says])


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_directories_that_are_no_diffvl_checkpoint(verb: str, trunk: Path, run: tiny_runs.Run, tmp_path: Path):
    file = write_data(tmp_path, record())
    rest = ("--prompt", "Hi") if verb == "generate" else ("--data", file)
    for directory, says in (
        (tmp_path / "nowhere", "nowhere: no such directory"),
        (run.root, f"{run.root}: no config.json there; expected a DiffVL checkpoint, as `diffvl convert` writes it"),
        (trunk, f"a 'llama' checkpoint; expected one that `diffvl convert` wrote. To convert it: diffvl convert {trunk}"),
    ):
        refused(verb, directory, *rest, says=[says])


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json", "generation_config.json"]
)
def test_a_diffvl_directory_with_a_file_cut_short(name: str, run: tiny_runs.Run, tmp_path: Path):
    directory = copy(run.align, tmp_path / "align")
    cut(directory / name)
    says = [str(directory), "damaged", "again"]
    refused("generate", directory, "--prompt", "Hi", says=says)
    refused("evaluate", directory, "--data", write_data(tmp_path, record()), says=says)
    refused("convert", "--from", directory, "--stage", "diffuse", "--out", tmp_path / "out", says=says)
    assert not (tmp_path / "out").exists()


def test_a_run_whose_own_records_are_damaged(run: tiny_runs.Run, tmp_path: Path):
    directory = copy(run.align, tmp_path / "align")
    words = ("convert", "--from", directory, "--stage", "diffuse", "--out", tmp_path / "out")
    cut(directory / "diffvl.json")
    refused(*words, says=[f"{directory}/diffvl.json: damaged, not readable as JSON"])
    (directory / "diffvl.json").unlink()
    refused(*words, says=[f"{directory}: no diffvl.json there; expected a directory that `diffvl convert` finished"])
    assert not (tmp_path / "out").exists()


def test_data_to_evaluate_on(run: tiny_runs.Run, tmp_path: Path):
    refused("evaluate", run.diffuse, "--data", tmp_path / "none.json", says=["none.json: no such data file"])
    file = write_data(tmp_path, record(image="bad.png"))
    (tmp_path / "bad.png").write_text("I am no picture", encoding="utf-8")
    refused("evaluate", run.diffuse, "--data", file, says=[f"data.json:2: picture {tmp_path}/bad.png cannot be read"])
    file = write_data(tmp_path, record(answer="Yes. " * 200))
    says = [f"{file}: 1 of 1 records are longer than 512 tokens", "the checkpoint's context holds no more: remove them"]
    refused("evaluate", run.diffuse, "--data", file, says=says)


def test_a_bad_picture_in_a_process_of_its_own(run: tiny_runs.Run, tmp_path: Path):
    """What a user sees: the message is the last thing on the screen; a record left out is told before it, and nothing else."""
    long = record(answer="Yes. " * 200)
    file = write_data(tmp_path, record(image="bad.png"), record(), long)
    (tmp_path / "bad.png").write_text("I am no picture", encoding="utf-8")
    words = ("convert", "--from", run.align, "--stage", "diffuse", "--data", file, "--out", tmp_path / "out")
    ended = tiny_runs.process(*words, "--set", "stages.diffuse.data.too_long=drop")
    assert ended.code == 2
    told = f"{file}: left out 1 of 3 records longer than 400 tokens"
    assert ended.err == f"{told}\nerror: {the_message(ended.err)}"
    assert the_message(ended.err).startswith(f"data.json:2: picture {tmp_path}/bad.png cannot be read")
    assert not (tmp_path / "out").exists()


def test_the_stand_ins_of_these_tests_are_good(convert: Workshop, tmp_path: Path):
    """Every refusal above begins with a command that would pass."""
    printed = tiny_runs.succeed("convert", convert.trunk, "--recipe", convert.recipe, "--out", convert.out, "--dry-run").out
    assert "dry run: nothing was written" in printed and not convert.out.exists()
    assert torch.get_num_threads() == 1
