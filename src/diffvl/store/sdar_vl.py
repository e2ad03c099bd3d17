"""SDAR-VL's layout by its names: which tensor is which of ours, and what its config.json says of its parts.

Place in the flow: `export` writes by it, `prepare` reads by it a checkpoint that somebody released. Invariant: one table for both
ways.
"""

import re
from typing import Any

from diffvl.errors import CheckpointError, UnsupportedModelError

MODEL_TYPE = "sdar_v"
TOWER_TYPE, CONNECTOR = "siglip_vision_model", "mlp2x_gelu"
ANYRES = "anyres_max_"
# Beginnings of our tensors' names -> theirs; those of the language model are the same, and the tower's head, which pools patches,
# has no place there.
TENSORS = {
    "connector.layers.0.": "multi_modal_projector.linear_1.",
    "connector.layers.2.": "multi_modal_projector.linear_2.",
    "vision_tower.": "vision_tower.vision_model.",
    "language_model.": "language_model.",
    "image_newline": "image_newline",
}
UNUSED = "vision_tower.head."
# Settings of the layout -> the only values that the model code knows.
FIXED: dict[str, Any] = {
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "use_image_newline_parameter": True,
    "vision_feature_select_strategy": "full",
}


def their_name(name: str) -> str | None:
    """Gives the layout's name of one of our tensors; None for one that it has no place for."""
    if name.startswith(UNUSED):
        return None
    return next((theirs + name.removeprefix(ours) for ours, theirs in TENSORS.items() if name.startswith(ours)), None)


def key_mapping() -> dict[str, str]:
    """Gives what `from_pretrained` takes as `key_mapping` to find the layout's tensors by our names."""
    return {f"^{re.escape(theirs)}": ours for ours, theirs in TENSORS.items() if ours != theirs}


def is_sdar_vl(settings: dict[str, Any]) -> bool:
    """Tells whether a config.json is one of this layout."""
    return settings.get("model_type") == MODEL_TYPE


def text_settings(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Gives the trunk's settings as the config.json of a language model would have them.

    Raises:
        CheckpointError: if there are none.
    """
    text = settings.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(f"{name}: no text_config in its config.json; fetch the checkpoint again")
    return {key: value for key, value in text.items() if key != "architectures"}  # a name of no class


def part_settings(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Gives the settings of our configuration that this layout's say: tower, connector, tiles, image token.

    Raises:
        UnsupportedModelError: naming every setting that our model code has no meaning for.
        CheckpointError: if the tower's are missing.
    """
    vision = settings.get("vision_config")
    if not isinstance(vision, dict) or not isinstance(vision.get("image_size"), int):
        raise CheckpointError(f"{name}: no vision_config with an image_size in its config.json; fetch the checkpoint again")
    ratio = str(settings.get("vision_aspect_ratio", f"{ANYRES}9"))
    faults = [f"{key} {settings[key]!r}" for key, value in FIXED.items() if settings.get(key, value) != value]
    faults += [f"vision_aspect_ratio {ratio!r}"] if not re.fullmatch(rf"{ANYRES}\d+", ratio) else []
    layer = settings.get("vision_feature_layer", -1)
    faults += [f"vision_feature_layer {layer!r}"] if type(layer) is not int else []
    if vision.get("model_type", TOWER_TYPE) != TOWER_TYPE:
        faults.append(f"a vision tower of the type {vision['model_type']!r}")
    if faults:
        raise UnsupportedModelError(f"{name}: its config.json has {', '.join(faults)}, which is not SDAR-VL as it was released")
    side = vision["image_size"]
    pinpoints = settings.get("image_grid_pinpoints") or [[row * side, column * side] for row in GRIDS for column in GRIDS]
    return {
        "connector": CONNECTOR,
        "vision_layer": layer,
        "image_size": side,
        "tiling": {
            "grids": [[height // side, width // side] for height, width in pinpoints],
            "max_tiles": int(ratio.removeprefix(ANYRES)),
        },
        "image_token_id": settings.get("image_token_index"),
    }


GRIDS = range(1, 7)
