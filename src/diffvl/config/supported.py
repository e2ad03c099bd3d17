"""Which architectures block diffusion can be put on, as far as the configuration and the class it leads to tell.

Invariant: every architecture whose layers no attention mask can steer is refused before any weight is read; the numeric proofs
are those of `prepare` and `doctor`. transformers loads its names on first use; the quoted annotations keep it so, as `diffvl
models` needs neither them nor torch.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import transformers

from diffvl.errors import UnsupportedModelError

MASKABLE_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
SPARSE_LAYERS = frozenset(
    {"indexed_attention", "compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse"}
)
OWN_CODE = "code of its own"


@dataclass(frozen=True)
class Refusal:
    """Why an architecture cannot be converted. kind: the reason in a few words, the same for all that it applies to."""

    kind: str
    message: str


def check_supported(config: "transformers.PreTrainedConfig") -> None:
    """Raises UnsupportedModelError naming the reason where block diffusion cannot be put on the model.

    A static check of the configuration and of the class it leads to; the numeric proofs are those of `prepare` and `doctor`.
    """
    if refused := refusal(config):
        raise UnsupportedModelError(refused.message)


def refusal(config: "transformers.PreTrainedConfig") -> Refusal | None:
    """Tells what `check_supported` raises, or None."""
    if is_vlm(config):
        return vlm_refusal(config)
    name, text_config = config.model_type or type(config).__name__, config.get_text_config(decoder=True)
    found = _refused_layers(name, text_config) or _refused_embeddings(name, text_config) or _refused_parts(name, config)
    if found is not None:
        return found
    brings_class = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if is_remote(type(config)) or (brings_class and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING):
        return Refusal(OWN_CODE, own_code(name, config.to_dict()))
    return _refused_class(name, config)


def vlm_refusal(config: "transformers.PreTrainedConfig") -> Refusal | None:
    """Tells the same of a whole vision-language model, which `AutoModelForImageTextToText` knows.

    Images must stand in the text as tokens, of which the model's own forward takes the rows; who sees whom must follow masks, and
    where a token stands the position ids.
    """
    name = config.model_type or type(config).__name__
    model_class: Any = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    parameters = inspect.signature(model_class.forward).parameters
    if getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in parameters:
        return Refusal(
            "encoder-decoder",
            f"{name} is an encoder-decoder: answers come from a decoder of their own, and do not stand behind the prompt",
        )
    if apart := [given for given in parameters if given.startswith("cross_attention_") or given in SEEN_APART]:
        return Refusal(
            "images not by placeholders",
            f"{name} does not show images as tokens of the text (its forward takes {apart[0]}), so no mask steers who sees them",
        )
    if missing := [needed for needed in NEEDED_INPUTS if needed not in parameters]:
        return Refusal("forward lacks inputs", f"{name}: the forward of {model_class.__name__} takes no {', '.join(missing)}")
    if found := _refused_layers(name, config.get_text_config(decoder=True)):
        return found
    if getattr(model_class, "_is_stateful", False):
        return Refusal("recurrent or convolutional layers", f"{name} is recurrent, which no mask can steer")
    if image_token_id(config) is None:
        return Refusal("no image token", f"{name}: its config names no token that shows an image ({', '.join(IMAGE_IDS)})")
    numbering = getattr(model_class, "get_rope_index", None)
    if numbering is not None and "mm_token_type_ids" not in inspect.signature(numbering).parameters:
        return Refusal(
            "positions that text and images alone do not tell",
            f"{name} numbers its tokens with sounds in mind, and cannot be asked for the position ids of text and images",
        )
    return None


IMAGE_IDS = ("image_token_id", "image_token_index", "image_patch_id")
NEEDED_INPUTS = ("position_ids", "past_key_values", "pixel_values", "mm_encoder_outputs")
# By these a forward takes images, or where they are, beside the text.
SEEN_APART = ("image_encoder_embeddings", "perceiver_embeddings", "image_embeds_position_mask")
VISION_PARTS = ("vision_config", "vq_config", *IMAGE_IDS)


def is_vlm(config: "transformers.PreTrainedConfig") -> bool:
    """Tells whether a configuration is that of a whole vision-language model which transformers knows. A few types stand among
    the causal language models as well; theirs is one if it names a token for images."""
    known = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return known and (type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or image_token_id(config) is not None)


def is_vlm_type(settings: dict[str, Any]) -> bool:
    """Tells the same of what a config.json says, before it is read as a configuration."""
    kind = str(settings.get("model_type"))
    names = transformers.models.auto.modeling_auto
    known = kind in names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    is_text = kind in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not any(settings.get(part) for part in VISION_PARTS)
    return known and not is_text


def own_code(name: str, settings: dict[str, Any]) -> str:
    """Gives the message about an architecture that only code in the checkpoint knows."""
    classes = settings.get("auto_map") or {}
    given = classes.get("AutoModelForCausalLM") or classes.get("AutoModel") or classes.get("AutoConfig")
    return (
        f"{name}: transformers has no class of its own for model_type {settings.get('model_type')!r}; the checkpoint brings one "
        f"along ({given}). A DiffVL checkpoint loads without such code, so it cannot be converted, with "
        "--trust-remote-code neither; take a checkpoint of an architecture that transformers knows (`diffvl doctor MODEL "
        "--trust-remote-code` runs the code to tell whether its attention would allow it)"
    )


def image_token_id(config: "transformers.PreTrainedConfig") -> int | None:
    """Gives the id of the token that shows a row of an image, under whatever name the configuration has it; None without one."""
    found = (getattr(config, name, None) for name in IMAGE_IDS)
    return next((value for value in found if isinstance(value, int)), None)


def is_remote(config_class: type) -> bool:
    """Tells whether a class was read from a checkpoint's own code."""
    return config_class.__module__.startswith("transformers_modules")


def _refused_parts(name: str, config: "transformers.PreTrainedConfig") -> Refusal | None:
    """Refuses models that are more than a language model."""
    if getattr(config, "vision_config", None) is not None:
        return Refusal(
            "vision-language model of another kind",
            f"{name} sees images (its config has vision_config), but is none of the vision-language models that "
            "AutoModelForImageTextToText knows by a token for images; it cannot be converted",
        )
    for part in ("audio_config", "audio_encoder_config", "audio_encoder"):
        if getattr(config, part, None) is not None:
            return Refusal("audio model", f"{name} is a model of sound (its config has {part}); a text language model is needed")
    return None


def _refused_layers(name: str, text_config: "transformers.PreTrainedConfig") -> Refusal | None:
    """Refuses layers that do not follow masks and positions alone."""
    layers = set(getattr(text_config, "layer_types", None) or ())
    if unknown := sorted(layers - MASKABLE_LAYERS - SPARSE_LAYERS):
        attends = all(kind.endswith("_attention") and kind != "linear_attention" for kind in unknown)
        return Refusal(
            "attention of another kind" if attends else "recurrent or convolutional layers",
            f"{name} has layers of type {', '.join(unknown)}: only attention layers that take a mask "
            f"({', '.join(sorted(MASKABLE_LAYERS))}) can be made block-causal; recurrent and convolutional ones cannot",
        )
    if sparse := sorted(layers & SPARSE_LAYERS):
        limit = getattr(text_config, "index_topk", None)
        exact = (
            f"; masks would hold only while clean and noisy tokens together are at most {limit:,} (index_topk)" if limit else ""
        )
        return Refusal(
            "sparse attention: not in yet",
            f"{name} has sparse attention layers ({', '.join(sparse)}), which choose by themselves what a token sees and keep "
            f"more in their cache than keys and values{exact}. Not in yet",
        )
    return None


def _refused_embeddings(name: str, text_config: "transformers.PreTrainedConfig") -> Refusal | None:
    """Refuses language models that no image of ours can be shown to."""
    if size := getattr(text_config, "hidden_size_per_layer_input", None):
        return Refusal(
            "per-layer embeddings: not in yet",
            f"{name} looks every token up by its id a second time, in per-layer embeddings (hidden_size_per_layer_input is "
            f"{size}); an image has no token ids, so it cannot be shown to this model. Not in yet",
        )
    return None


def _refused_class(name: str, config: "transformers.PreTrainedConfig") -> Refusal | None:
    """Judges the model class; only this function loads modelling code."""
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        return Refusal("unknown", f"{name} is no causal language model that transformers {transformers.__version__} knows")
    model_class: Any = mapping[type(config)]
    trained_as = config.architectures or [model_class.__name__]
    if not any(head.endswith(("ForCausalLM", "LMHeadModel")) or head == model_class.__name__ for head in trained_as):
        return Refusal(
            "no language-model head",
            f"{name}: this checkpoint holds a {', '.join(trained_as)}, which has no causal language-model head; "
            f"a {model_class.__name__} is needed",
        )
    parameters = inspect.signature(model_class.forward).parameters
    if model_class._is_stateful:
        return Refusal(
            "recurrent or convolutional layers",
            f"{name} is recurrent: its state goes from token to token, which no mask can steer",
        )
    if "shared_kv_states" in parameters:
        return Refusal(
            "draft model", f"{name} is the draft model of another one, whose keys and values it reads; it cannot stand alone"
        )
    if "position_ids" not in parameters:
        return Refusal(
            "no position_ids",
            f"{name} takes no position_ids (it counts positions by itself, as ALiBi models do), but a noised block must stand at "
            "the positions of its clean copy",
        )
    return None
