"""The layout `sdar_v`: SDAR-VL's, whose scripts and finetuning code load it; remote code of ours stands beside the weights.

Config keys, tensor names, processor files and classes are SDAR-VL's. The chat template is the run's own, for training and for
decoding alike, and also takes content in parts, as transformers' own processor hands it over.
"""

from pathlib import Path
from typing import Any

from diffvl.export.code import write_code
from diffvl.export.files import write_generation_config, write_json, write_tokenizer
from diffvl.export.sdar import CODE, auto_map, text_kind
from diffvl.export.shards import write_tensors
from diffvl.export.source import Run
from diffvl.export.text_part import text_faults, text_settings, text_tensors
from diffvl.store.sdar_vl import ANYRES, CONNECTOR, FIXED, MODEL_TYPE, TOWER_TYPE, their_name
from diffvl.store.tensorfiles import Header

VIDEO_TOKEN = "<|video_pad|>"
MODEL_CLASS = "modeling_llava_onevision.LlavaOnevisionForConditionalGeneration"
MODEL_CODE = ("configuration_llava_onevision.py", "modeling_llava_onevision.py", "processing_llava_onevision.py")
OF_TOWER = (
    *("attention_dropout", "hidden_act", "hidden_size", "image_size", "intermediate_size", "layer_norm_eps", "model_type"),
    *("num_attention_heads", "num_channels", "num_hidden_layers", "patch_size"),
)
OF_IMAGES = ("do_convert_rgb", "do_normalize", "do_pad", "do_rescale", "do_resize", "image_mean", "image_std", "resample")
# What turns content in parts into the one text that the run's template takes: a placeholder for each image.
PARTS = """
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set whole = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- set whole.text = whole.text + ('IMAGE' if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=whole.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def faults(run: Run) -> list[str]:
    """Lists what this layout cannot say of a model."""
    config, found = run.config, text_faults(run)
    if config.source_config is not None:
        return found
    tower = config.vision_config
    if tower.model_type != TOWER_TYPE:
        found.append(f"its vision tower is a {tower.model_type}, and this layout holds a {TOWER_TYPE}")
    if config.connector != CONNECTOR:
        found.append(f"its connector is {config.connector}, and this layout holds {CONNECTOR}")
    if config.tiling is None:
        found.append("it sees one square an image, and this layout cuts images into tiles (train a stage with tiling: anyres)")
    if config.image_size != tower.image_size:
        found.append(f"its tower sees {config.image_size} pixels a side, and in this layout its own {tower.image_size}")
    return found


def write(run: Run, directory: Path) -> None:
    """Writes the whole layout into an empty directory. Raises DiskError."""
    write_tensors(tensors(run), directory)
    write_json(directory / "config.json", config_settings(run))
    write_generation_config(run, directory)
    write_tokenizer(run, directory, PARTS.strip().replace("IMAGE", run.processor.image_token) + str(run.processor.chat_template))
    for name, settings in processor_settings(run).items():
        write_json(directory / name, settings)
    write_code(directory, (*MODEL_CODE, *CODE["sdar_moe"]))  # its configuration knows both kinds of trunk


def tensors(run: Run) -> dict[str, Header]:
    """Gives all tensors under the layout's names."""
    found = text_tensors(run, "language_model.")
    found |= {theirs: header for name, header in run.headers.items() if (theirs := their_name(name)) is not None}
    return dict(sorted(found.items()))


def config_settings(run: Run) -> dict[str, Any]:
    """Gives config.json."""
    config, kind = run.config, text_kind(run)
    tower = {name: getattr(config.vision_config, name) for name in OF_TOWER}
    return {
        "architectures": [MODEL_CLASS.partition(".")[2]],
        "auto_map": {
            "AutoConfig": "configuration_llava_onevision.LlavaOnevisionConfig",
            "AutoModel": MODEL_CLASS,
            "AutoModelForCausalLM": MODEL_CLASS,
            "AutoModelForImageTextToText": MODEL_CLASS,
        },
        "hidden_size": config.text_config.hidden_size,
        "ignore_index": -100,
        "image_grid_pinpoints": _pinpoints(run),
        "image_token_index": config.image_token_id,
        "model_type": MODEL_TYPE,
        "text_config": {
            **text_settings(run),
            "architectures": ["SDAR"],
            "auto_map": auto_map(kind),
            "model_type": kind,
        },
        "tie_word_embeddings": False,
        "torch_dtype": run.dtype,
        "use_cache": False,
        "video_token_index": run.processor.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
        "vision_aspect_ratio": _aspect_ratio(run),
        "vision_config": {**tower, "torch_dtype": run.dtype, "vision_use_head": False},
        "vision_feature_layer": config.vision_layer,
        **FIXED,
    }


def _pinpoints(run: Run) -> list[list[int]]:
    assert run.config.tiling is not None
    return [[side * run.config.image_size for side in grid] for grid in run.config.tiling["grids"]]


def _aspect_ratio(run: Run) -> str:
    assert run.config.tiling is not None
    return f"{ANYRES}{run.config.tiling['max_tiles']}"


def processor_settings(run: Run) -> dict[str, dict[str, Any]]:
    """Gives the processor's files by name: of images, of videos (which the layout has, and this model was not trained on), and of
    both with the text."""
    processor, name = run.processor, "LlavaOnevisionProcessor"
    images = run.processor.image_processor
    common = {
        **{key: getattr(images, key) for key in OF_IMAGES if hasattr(images, key)},
        "data_format": "channels_first",
        "default_to_square": False,
        "processor_class": name,
        "rescale_factor": images.rescale_factor,
        "size": {"height": run.config.image_size, "width": run.config.image_size},
    }
    return {
        "preprocessor_config.json": {
            **common,
            "image_grid_pinpoints": _pinpoints(run),
            "image_processor_type": "LlavaOnevisionImageProcessorFast",
        },
        "video_preprocessor_config.json": {
            **common,
            "do_sample_frames": False,
            "video_processor_type": "LlavaOnevisionVideoProcessor",
        },
        "processor_config.json": {
            "auto_map": {"AutoProcessor": f"processing_llava_onevision.{name}"},
            "image_token": processor.image_token,
            "num_image_tokens": processor.image_tokens,
            "processor_class": name,
            "stop_token": processor.stop_token,
            "system_turn": processor.system_turn,
            "video_token": VIDEO_TOKEN,
            "vision_aspect_ratio": _aspect_ratio(run),
            "vision_feature_select_strategy": "full",
        },
    }
