"""Bad models, recipes and words, through the command's own entry point: one clear message, exit code 2, no traceback, nothing
half written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from forks import Forks
from processes import on_processes
from tiny_runs import Run, Workshop, copy, cut, refused, the_message, tree
from transformers import AutoConfig, ResNetConfig, ResNetModel, SwinConfig, SwinModel
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from diffvl.demo import standins

pytestmark = pytest.mark.usefixtures("offline")


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


def test_no_hub_in_a_process_of_its_own(forks: Forks, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """The environment variable as a user sets it, which the tests' own environment has; no line but the message, and nothing is
    left where the command ran."""
    told = tmp_path_factory.mktemp("told")
    (ended,) = on_processes(forks, told, "diffvl", ["convert", "smollm2-135m", "--out", tmp_path / "out"], 1)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f"error: {the_message(ended.err)}"
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


def test_settings_of_a_tower_for_a_model_that_has_its_own(source: Callable[[str], Path], tmp_path: Path):
    """Also those of another recipe: nothing is left out in silence."""
    useless = "has no effect: MODEL is a vision-language model and keeps its own vision part"
    words = ("convert", source("qwen2_vl"), "--out", tmp_path / "out")
    refused(*words, "--set", "prepare.image_size=64", says=[f"prepare.image_size {useless}"])
    refused(*words, "--recipe", "llava", says=[f"prepare.vision_layer {useless}", "--recipe vlm or vlm-lora"])
    assert not (tmp_path / "out").exists()


def test_a_vision_language_model_needs_no_align_stage(source: Callable[[str], Path], tmp_path: Path):
    says = ["--stage align: the recipe has no such stage, only diffuse", "A vision-language model has an aligned connector"]
    refused("convert", source("llava"), "--out", tmp_path / "out", "--stage", "align", says=says)


def test_a_diffvl_directory_as_model(run: Run, convert: Workshop):
    says = [f"{run.align} is a DiffVL directory already; to go on from it: diffvl convert --from {run.align} --stage diffuse"]
    convert.refuses(model=run.align, says=says)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "its tokenizer has no chat template, so prompts and answers cannot be told apart; use an instruct checkpoint"),
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
            "its chat template writes no special token after an answer, so decoding could not stop",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>{% endif %}",
            "the chat template is not prefix-stable: the prompt of an answer is not the beginning of the whole chat",
        ),
        ("{% for m in messages %}{{ m['content'] }}<|im_end|>", "refuses a question and an answer (Unexpected end of template"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "refuses a question and an answer (can only concatenate"),
        ("<|im_start|>{{ messages[0]['content'] }}<|im_end|>", "its chat template leaves the answer out"),
        (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
            "{% if loop.last or m['role'] == 'user' %}<|im_end|>{% endif %}\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "does not write '<|im_end|>' after answer 1, 'answer 1': it writes",
        ),
    ],
    ids=["none", "no stop", "not prefix-stable", "broken", "wrong type", "no answer", "no stop before a question"],
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
        ("stages.diffuse.data.row_length=399", "stages.diffuse.data: row_length (399) must be at least max_length (400)"),
        ("stages.diffuse.data.row_length=7", "data.row_length: Input should be greater than or equal to 8 (got 7)"),
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


# --- the objective ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        # t outside its range
        ({"noise": "{schedule: uniform, t_min: 0}"}, "noise.t_min: Input should be greater than 0 (got 0)"),
        ({"noise": "{schedule: uniform, t_max: 1.5}"}, "noise.t_max: Input should be less than or equal to 1 (got 1.5)"),
        ({"noise": "{schedule: ramp, t_min: -0.1}"}, "noise.t_min: Input should be greater than 0 (got -0.1)"),
        ({"noise": "{schedule: clamp, t_min: 0.8, t_max: 0.2}"}, "noise: t_min (0.8) must not be above t_max (0.2)"),
        ({"noise": "{schedule: beta, t_min: 1.0}"}, "noise.t_min: Input should be less than 1 (got 1.0)"),
        # the Beta law
        ({"noise": "{schedule: beta, mean_start: 0}"}, "noise.mean_start: Input should be greater than 0 (got 0)"),
        ({"noise": "{schedule: beta, mean_end: 1.0}"}, "noise.mean_end: Input should be less than 1 (got 1.0)"),
        ({"noise": "{schedule: beta, mean_end: 1.2}"}, "noise.mean_end: Input should be less than 1 (got 1.2)"),
        ({"noise": "{schedule: beta, concentration_end: 0}"}, "noise.concentration_end: Input should be greater than 0 (got 0)"),
        # block sizes
        ({"block_size": "0"}, "block_size: Input should be greater than or equal to 1 (got 0)"),
        ({"block_curriculum": "{0.0: 0, 0.5: 4}"}, "block_curriculum.0.0: Input should be greater than or equal to 1 (got 0)"),
        ({"block_curriculum": "{0.0: 2, 1.0: 4}"}, "block_curriculum.1.0: Input should be less than 1 (got 1.0)"),
        ({"block_curriculum": "{0.1: 2, 0.5: 4}"}, "block_curriculum must begin at share 0.0 (it begins at 0.1)"),
        ({"block_curriculum": "{0.0: 4, 0.5: 8}"}, "ends with 8, but block_size, with which the checkpoint decodes, is 4"),
        # what would have no effect
        ({"block_curriculum": "{0.0: 2, 0.3: 4, 0.6: 4}"}, "has an entry without effect: neighbouring block sizes must differ"),
        ({"block_curriculum": "{0.0: 4}"}, "block_curriculum has an entry without effect: neighbouring block sizes must differ"),
        ({"noise": "{schedule: uniform, mean_start: 0.3}"}, "noise.mean_start: unknown key"),
        ({"noise": "{schedule: beta, t_max: 0.9}"}, "noise.t_max: unknown key"),
        ({"noise": "{schedule: full, t_min: 0.1}"}, "noise.t_min: unknown key"),
        ({"noise": "{schedule: ramp, draws: stratified}"}, "noise.draws: unknown key"),
        (
            {"noise": "{schedule: beta, mean_end: 0.5, concentration_end: 4, until: 0.5}"},
            "noise: curve and until have no effect when mean and concentration end where they start",
        ),
        (
            {"noise": "{schedule: full}", "position_bias": "1"},
            "position_bias has no effect with noise.schedule: full, which masks every token",
        ),
        (
            {"block_size": "1", "position_bias": "1"},
            "position_bias has no effect with block_size: 1, where a block has one token",
        ),
        ({"noise": "{schedule: full}", "complementary": "true"}, "complementary has no effect with the schedule full: its"),
    ],
)
def test_objectives(changes: dict[str, str], says: str, convert: Workshop):
    """Each is one problem, and is told before anything is looked at."""
    settings = (word for key, value in changes.items() for word in ("--set", f"stages.diffuse.objective.{key}={value}"))
    convert.refuses(*settings, says=[f"recipe {convert.recipe}: 1 wrong setting\n", "  stages.diffuse.objective", says])


# --- the words of the command ----------------------------------------------------------------------------------------------


def test_words_that_exclude_each_other(run: Run, convert: Workshop):
    convert.refuses("--from", run.align, says=["MODEL and --from exclude each other"])
    convert.refuses("--stage", "align", "--lora", says=["--lora has no effect: no stage that is run trains the trunk"])


@pytest.mark.parametrize("setting", ["prepare.image_size=64", "prepare={image_size: 64}"])
def test_prepare_settings_for_what_is_prepared(setting: str, run: Run, convert: Workshop, tmp_path: Path):
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
    says = [f"--stage diffuse goes on from align, and {convert.out}/align is not there. Type: diffvl convert"]
    convert.refuses("--stage", "diffuse", says=says)
    convert.refuses("--stage", "pretrain", says=["--stage pretrain: the recipe has no such stage, only align, diffuse"])
    refused("convert", says=["name a MODEL (see `diffvl models`), or a DiffVL directory with --from"])


def test_a_run_of_another_model_is_not_gone_on_from(run: Run, source: Callable[[str], Path]):
    before = tree(run.root)
    says = [f"{run.align} was made from {source('llama')}, not from {source('qwen2')}: choose another --out"]
    refused("convert", source("qwen2"), "--stage", "diffuse", "--out", run.root, says=says)
    assert tree(run.root) == before


def test_a_start_that_is_none(convert: Workshop, run: Run, tmp_path: Path):
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


def test_an_output_directory_that_is_taken(run: Run, convert: Workshop, tmp_path: Path):
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
