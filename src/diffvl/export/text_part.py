"""A trunk in SDAR's terms: whether the layouts `sdar` and `sdar_v` can express it, under which settings, with which tensors.

What SDAR is stands in its family's file (`convert/sdar.yaml`): a stock model under another name, conditions under which it is
that, its mask token. It is read from there, the other way round.
"""

from typing import Any

from diffvl.config.families import Family, family_of
from diffvl.export.source import Run
from diffvl.store.tensorfiles import Header, some

TEXT_TYPES = ("sdar", "sdar_moe")  # of a text_config in these layouts; serving engines know no others
TRUNK = "language_model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FIXED: dict[str, Any] = {"rope_scaling": None, "sliding_window": None, "fuse_cross_entropy": True, "use_cache": False}


def text_family(run: Run) -> Family | None:
    """Finds the family of these layouts that is read as the run's trunk; None where there is none."""
    kind = run.config.text_config.model_type
    families = [family_of(name) for name in TEXT_TYPES]
    return next((family for family in families if family.loads_as and family.loads_as.model_type == kind), None)


# --- what cannot be expressed --------------------------------------------------------------------------------------------


def text_faults(run: Run) -> list[str]:
    """Lists what these layouts cannot say of a model's text part and of its decoding."""
    if run.config.source_config is not None:
        kind = run.config.source_config.model_type
        return [f"it is a whole {kind} model with its own vision part, image tokens and position ids"]
    return [*_trunk_faults(run), *_decoding_faults(run)]


def _trunk_faults(run: Run) -> list[str]:
    """Differences from Qwen3's attention and layers, which are the only ones there."""
    text, names = run.config.text_config, list(run.headers)
    faults = []
    if not any(name.endswith("self_attn.q_norm.weight") for name in names):
        faults.append("its attention has no norms of queries and keys, and one with weights of 1 would not be none")
    if biased := [name for name in names if name.startswith(TRUNK) and name.endswith(".bias")]:
        faults.append(f"its trunk has biases ({some(biased)})")
    if getattr(text, "sliding_window", None) or set(getattr(text, "layer_types", None) or ()) - {"full_attention"}:
        faults.append("its attention has windows")
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or "mrope_section" in rope:
        faults.append(f"its rotation is scaled or has several axes ({rope})")
    if getattr(text, "hidden_act", "silu") != "silu":
        faults.append(f"its activation is {text.hidden_act}")
    if not faults and text_family(run) is None:
        stocks = " or ".join(family.loads_as.model_type for name in TEXT_TYPES if (family := family_of(name)).loads_as)
        faults.append(f"its trunk is a {text.model_type}; this layout holds a {stocks}")
    return faults


def _decoding_faults(run: Run) -> list[str]:
    """What callers of these layouts take for granted."""
    config, family = run.config, text_family(run) or family_of(TEXT_TYPES[0])
    if config.decoding != "blocks":
        return ["it has not been trained on blocks: export the diffuse stage"]
    faults = []
    if config.context != "block":
        faults.append(f"it was trained with context {config.context}, and the callers let a token see its whole block")
    if config.grid != "absolute":
        faults.append(f"its blocks begin with the answer (grid {config.grid}), and the engines count them from token 0")
    if config.target != "same":
        faults.append("a position predicts the next token (target shift), and the callers expect its own")
    if config.mask_token_id != family.mask_token.id:
        faults.append(
            f"its mask token is {config.mask_token_id}, and the engines have {family.mask_token.id} in their code: another one "
            "gives garbage without a word"
        )
    return faults


# --- settings and tensors --------------------------------------------------------------------------------------------------


def text_settings(run: Run) -> dict[str, Any]:
    """Gives the settings of the trunk by the layout's names, with what decoding needs."""
    family, config = text_family(run), run.config
    assert family is not None and family.loads_as is not None
    text = config.text_config
    kept = {name: getattr(text, name) for name in family.loads_as.keeps if hasattr(text, name) and name != "rope_theta"}
    special = {f"{name}_token_id": getattr(text, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    return {
        **kept,
        **FIXED,
        **special,
        "initializer_range": text.initializer_range,
        "max_window_layers": text.num_hidden_layers,
        "rope_theta": text.rope_parameters["rope_theta"],
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "image_token_id": config.image_token_id,
        "placeholder_ids": config.placeholder_ids,
        "stop_token_ids": config.stop_token_ids,
        "vocabulary_size": config.vocabulary_size,
        "torch_dtype": run.dtype,
    }


def text_tensors(run: Run, prefix: str = "") -> dict[str, Header]:
    """Gives the trunk's tensors under the layout's names; a head that shares the embedding gets a copy of its own.

    Args:
        prefix: of the trunk's names in the layout.
    """
    found = {name.removeprefix(TRUNK): header for name, header in run.headers.items() if name.startswith(TRUNK)}
    found.setdefault(HEAD, found[EMBEDDING])
    return {prefix + name: found[name] for name in sorted(found)}
