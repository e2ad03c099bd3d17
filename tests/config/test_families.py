"""Every YAML in convert/ and recipes/ is a test case; names are found; unsupported architectures are refused in words."""

import re
from pathlib import Path

import pytest
import transformers

from diffvl.config.families import ALL_LINEAR, Family, all_families, family_of, named_checkpoint, recipe_of_name, suggest
from diffvl.config.objectives import BlockDiffusionObjective
from diffvl.config.recipe import Recipe
from diffvl.config.resolve import find_recipe, parse, presets, read_yaml, recipe_names, resolve
from diffvl.config.supported import check_supported
from diffvl.errors import ConfigError, UnsupportedModelError

FAMILY_FILES = sorted(presets("convert").iterdir())
STOCK, VISION, TRANSLATED = (
    [file.stem for file in FAMILY_FILES if family_of(file.stem).route == route]
    for route in ("language model", "vision-language model", "diffusion language model")
)
RECIPE_FILES = sorted(presets("recipes").glob("*.yaml"))
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}


def recipe(name: str) -> Recipe:
    return resolve(read_yaml(find_recipe(name)), [], name)


def diffusion(name: str) -> BlockDiffusionObjective:
    objective = recipe(name).stages["diffuse"].objective
    assert isinstance(objective, BlockDiffusionObjective)
    return objective


# --- families ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FAMILY_FILES, ids=lambda file: file.name)
def test_family_file(file: Path):
    family = parse(Family, read_yaml(file), str(file))
    assert file.name == f"{family.model_type}.yaml"
    stock = family.model_type if family.loads_as is None else family.loads_as.model_type
    assert stock in transformers.CONFIG_MAPPING
    assert (family.loads_as is not None) == (family.model_type in TRANSLATED)
    assert (family.recipe == "vlm") == (family.model_type in VISION)
    assert "\n" not in family.note and 0 < len(family.note) <= 110
    assert {family.recipe, *(entry.recipe or family.recipe for entry in family.checkpoints.values())} <= set(recipe_names())
    assert all(re.fullmatch(r"[\w-]+/[\w.-]+", entry.repo) for entry in family.checkpoints.values())


@pytest.mark.parametrize("model_type", STOCK)
def test_lora_targets_are_the_linear_layers_of_the_trunk(model_type: str):
    """All projections of attention and MLP, and nothing else: checked against the modules of a tiny model."""
    family = family_of(model_type)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64} if model_type == "gpt2" else TINY | {"head_dim": 8}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **sizes, pad_token_id=0))
    projections = {
        name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"
    }
    matched = {name for name, _ in model.named_modules() if re.fullmatch(family.lora_targets, name)}
    assert matched == projections and len(matched) >= 8


def test_families_and_their_agreed_tokens():
    names = sorted([*STOCK, *TRANSLATED, *VISION])
    assert sorted(family.model_type for family in all_families()) == names
    assert len(STOCK) == 7 and len(TRANSLATED) == 4 and len(VISION) == 10
    for model_type in ("qwen2", "qwen3", "qwen3_moe"):
        family = family_of(model_type)
        assert (family.mask_token.text, family.mask_token.id, family.image_token) == ("<|MASK|>", 151669, "<|image_pad|>")


def test_an_unknown_model_type_gets_the_generic_family():
    family = family_of("olmo2")
    assert (family.model_type, family.lora_targets, family.checkpoints) == ("olmo2", ALL_LINEAR, {})
    assert family.mask_token.id is None


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"model_type": "x", "mask": "m"}, "mask: unknown key"),
        ({"model_type": "x", "checkpoints": {"x-1b": {"hub": "a/b"}}}, "checkpoints.x-1b.repo: Field required"),
        ({}, "model_type: Field required"),
    ],
)
def test_a_wrong_family_file_is_explained(tree: dict, words: str):
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse(Family, tree, "x.yaml")


@pytest.mark.parametrize("model_type", TRANSLATED)
def test_a_diffusion_language_model_is_told_whole(model_type: str):
    """Every condition has a default that the published code takes, and no setting is spoken of twice."""
    family, rules = family_of(model_type), family_of(model_type).loads_as
    assert rules is not None and family.mask_token.id is not None
    assert set(rules.conditions) <= set(rules.defaults)
    groups = (set(rules.renames), set(rules.keeps), set(rules.ignores))
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert not set(rules.ignores) & {*rules.conditions, *rules.requires, *rules.defaults}
    assert issubclass(getattr(transformers, rules.tokenizer), transformers.PreTrainedTokenizerBase)
    stock = transformers.CONFIG_MAPPING[rules.model_type]().to_dict()
    assert {*rules.keeps, *rules.renames.values(), *rules.settings} <= {*stock, "rope_theta", "head_dim", "num_experts"}


# --- names ---------------------------------------------------------------------------------------------------------------

QWEN25 = {name: f"Qwen/Qwen2.5-{name.upper()}-Instruct" for name in ("0.5b", "1.5b", "3b", "7b")}
QWEN3 = {name: f"Qwen/Qwen3-{name.upper()}" for name in ("0.6b", "1.7b", "4b", "8b")}
NAMED = {
    **{f"qwen2.5-{name}": ("qwen2", repo) for name, repo in QWEN25.items()},
    **{f"qwen3-{name}": ("qwen3", repo) for name, repo in QWEN3.items()},
    "qwen3-30b-a3b": ("qwen3_moe", "Qwen/Qwen3-30B-A3B"),
    "smollm2-135m": ("llama", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "llada-8b": ("llada", "GSAI-ML/LLaDA-8B-Instruct"),
    "dream-7b": ("Dream", "Dream-org/Dream-v0-Instruct-7B"),
    **{f"qwen2-vl-{name}": ("qwen2_vl", f"Qwen/Qwen2-VL-{name.upper()}-Instruct") for name in ("2b", "7b")},
    **{f"qwen2.5-vl-{name}": ("qwen2_5_vl", f"Qwen/Qwen2.5-VL-{name.upper()}-Instruct") for name in ("3b", "7b")},
    **{f"qwen3-vl-{name}": ("qwen3_vl", f"Qwen/Qwen3-VL-{name.upper()}-Instruct") for name in ("2b", "4b", "8b")},
    "llava-1.5-7b": ("llava", "llava-hf/llava-1.5-7b-hf"),
    "pixtral-12b": ("llava", "mistral-community/pixtral-12b"),
    "llava-next-7b": ("llava_next", "llava-hf/llava-v1.6-mistral-7b-hf"),
    **{f"llava-onevision-{name}": ("llava_onevision", f"llava-hf/llava-onevision-qwen2-{name}-ov-hf") for name in ("0.5b", "7b")},
    **{f"smolvlm-{name}": ("smolvlm", f"HuggingFaceTB/SmolVLM2-{name.upper()}-Video-Instruct") for name in ("256m", "500m")},
    "smolvlm-2.2b": ("smolvlm", "HuggingFaceTB/SmolVLM2-2.2B-Instruct"),
    "gemma3-4b": ("gemma3", "google/gemma-3-4b-it"),
    "paligemma2-3b": ("paligemma", "google/paligemma2-3b-mix-448"),
    **{f"internvl3-{name}": ("internvl", f"OpenGVLab/InternVL3-{name.upper()}-hf") for name in ("1b", "2b", "8b")},
    **{f"sdar-{name}": ("sdar", f"JetLM/SDAR-{name.upper()}-Chat") for name in ("1.7b", "4b", "8b")},
}
DEFAULT_RECIPES = {"smollm2-135m": "demo", "llada-8b": "dllm", "dream-7b": "dllm"}
DEFAULT_RECIPES |= dict.fromkeys(("sdar-1.7b", "sdar-4b", "sdar-8b"), "sdar")


def test_the_named_checkpoints():
    listed = [name for family in all_families() for name in family.checkpoints]
    assert sorted(listed) == sorted(NAMED), "a name may stand in one family only"
    for name, (model_type, repo) in NAMED.items():
        found = named_checkpoint(name)
        assert found is not None and (found[0], found[1].repo, found[1].revision) == (model_type, repo, "main")
        tower = "facebook/dinov2-small" if name == "smollm2-135m" else "google/siglip2-so400m-patch14-384"
        recipe = "vlm" if model_type in VISION else DEFAULT_RECIPES.get(name, "llava")
        assert (found[1].vision_tower, recipe_of_name(name)) == (tower, recipe)
        assert found[1].parameters is not None and 0 < found[1].parameters < 100
    assert recipe_of_name("no-such-name") is None


def test_names_ignore_case_and_a_near_miss_is_suggested():
    assert named_checkpoint("Qwen2.5-7B") == named_checkpoint("qwen2.5-7b") is not None
    assert named_checkpoint("qwen25-7b") is None
    assert suggest("qwen25-7b")[0] == "qwen2.5-7b"
    assert suggest("completely-else") == []


# --- recipes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", RECIPE_FILES, ids=lambda file: file.name)
def test_recipe_file(file: Path):
    resolve(read_yaml(file), [], str(file))
    lines = file.read_text(encoding="utf-8").splitlines()
    assert file.suffix == ".yaml" and len(lines) <= 60
    assert re.fullmatch(r"# \S.*\.", lines[0]), "the first line says what the recipe does: `diffvl recipes` prints it"
    head = [line for line in lines if line.startswith("# ")]
    assert [key for key in ("command", "hardware", "expected") if any(line.startswith(f"# {key}:") for line in head)] == [
        "command",
        "hardware",
        "expected",
    ]


@pytest.mark.parametrize("name", [name for name in recipe_names() if "demo" not in name])
def test_a_recipe_names_no_data(name: str):
    """Demos alone run on data that diffvl draws itself."""
    assert all(stage.data.train is None and stage.data.eval is None for stage in recipe(name).stages.values())


def test_recipe_names_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known = ["ar-control", "demo", "dllm", "emoji", "fast", "llava", "llava-parity", "lora", "lossless"]
    known += ["sdar", "sdar-vl", "vlm", "vlm-demo", "vlm-lora"]
    assert recipe_names() == known
    own = tmp_path / "own.yaml"
    own.write_text("stages: {}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert find_recipe("own.yaml") == Path("own.yaml")
    assert find_recipe("demo").name == "demo.yaml"
    with pytest.raises(
        ConfigError,
        match=r"--recipe 'dmo': neither a file nor a known recipe\. Known: ar-control, demo, dllm, emoji, fast, llava",
    ):
        find_recipe("dmo")


def test_the_ar_control_differs_from_the_emoji_recipe_by_its_objective_alone():
    emoji, control = recipe("emoji"), recipe("ar-control")
    assert control.seed == emoji.seed
    trainable = {part: rate for part, rate in emoji.stages["diffuse"].trainable.items() if part != "mask_row"}
    expected = emoji.stages["diffuse"].model_copy(
        update={"objective": control.stages["diffuse"].objective, "trainable": trainable}
    )
    assert control.stages["diffuse"] == expected
    assert control.stages["diffuse"].objective.kind == "ar"


# --- unsupported architectures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [*STOCK, *VISION])
def test_every_listed_family_is_supported(model_type: str):
    check_supported(transformers.AutoConfig.for_model(model_type))


def test_an_unlisted_family_and_all_maskable_layer_types_are_supported():
    check_supported(transformers.AutoConfig.for_model("olmo2"))
    check_supported(transformers.AutoConfig.for_model("qwen3", **TINY, layer_types=["full_attention", "sliding_attention"]))


REFUSED = {
    "mamba": ("mamba", {"hidden_size": 16, "num_hidden_layers": 2}, "mamba has layers of type linear_attention"),
    "qwen3_next": ("qwen3_next", TINY, "qwen3_next has layers of type linear_attention"),
    "recurrent": ("rwkv", {"hidden_size": 16, "num_hidden_layers": 2}, "rwkv is recurrent: its state goes from token to token"),
    "conv layer": ("lfm2", TINY | {"layer_types": ["conv", "full_attention"]}, "lfm2 has layers of type conv"),
    "alibi": ("bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2}, "bloom takes no position_ids"),
    "no decoder": ("t5", {"d_model": 16, "num_layers": 2}, "t5 is no causal language model that transformers"),
    "vision": ("vit", {"hidden_size": 16}, "vit is no causal language model"),
    "no head": ("qwen2", TINY | {"architectures": ["Qwen2Model"]}, "holds a Qwen2Model, which has no causal language-model head"),
    "masked lm": ("bert", {"architectures": ["BertForMaskedLM"]}, "holds a BertForMaskedLM, which has no causal"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_masks_cannot_steer_is_refused_with_its_reason(case: str):
    model_type, settings, words = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=words):
        check_supported(transformers.AutoConfig.for_model(model_type, **settings))
