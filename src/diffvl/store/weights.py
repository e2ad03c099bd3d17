"""Loading weights strictly: safetensors only, every key accounted for, every number finite, and one clear message when something
is wrong.

`check_trunk` and `check_tower` know beforehand what loading would find: transformers' own loader is run on the headers of the
files, with tensors that have a shape and no content, so that renamed and merged keys are judged as it will judge them.
"""

import copy
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import GgufConfig

from diffvl.config.supported import OWN_CODE, is_remote, own_code
from diffvl.errors import CheckpointError, UnsupportedModelError, first_line
from diffvl.store.published import QUANTIZED, explain_failures, is_gguf, load_config, quantized, quiet_report
from diffvl.store.renamed import key_mapping, published_name, under_stock_names
from diffvl.store.tensorfiles import FLOATS, Header, read_headers, read_tensor, some

Headers = dict[str, Header]

QUANTIZED_NAMES = re.compile(r"\.(qweight|qzeros|absmax|SCB|weight_packed|weight_scale(_inv)?)$|_proj_blocks$|\.quant_state\.")
# Of whichever HTTP client the hub's library uses.
NO_CONNECTION = hub_errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]  (its base class for the client's own errors)
# What the code of a model class may raise where config.json does not fit it.
CONFIG_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


# --- known from the headers ----------------------------------------------------------------------------------------------


def check_trunk(name: str, config: PretrainedConfig, revision: str | None = None) -> None:
    """Raises what `load_trunk` would find in the files of a checkpoint, without reading weights.

    Raises:
        CheckpointError: if files are missing or damaged, names or shapes differ from what config.json asks for, or a head that
            config.json calls tied differs from the embedding.
        UnsupportedModelError: if the weights are not floating-point numbers.
    """
    if not is_gguf(Path(name)):
        _check(AutoModelForCausalLM, name, config, revision)


def check_vlm(name: str, config: PretrainedConfig, revision: str | None = None) -> None:
    """Gives the same for `load_vlm`."""
    _check(AutoModelForImageTextToText, name, config, revision)


def check_tower(name: str, config: PretrainedConfig) -> None:
    """Gives the same for `load_tower`."""
    _check(AutoModel, name, config, None)


def check_renamed(
    model_class: Any, name: str, config: PretrainedConfig, names: dict[str, str], revision: str | None = None
) -> None:
    """Gives the same for `load_renamed`: names and shapes, from the headers."""
    headers = read_headers(Path(name), model_class.__name__) if Path(name).is_dir() else _hub_headers(name, revision)
    if headers is None:
        return
    _refuse_odd_types(name, headers)
    model, info = _load_empty(model_class, name, config, headers, key_mapping=names)
    _require_fit(name, model, info, headers, half=False)


def _check(auto_class: Any, name: str, config: PretrainedConfig, revision: str | None) -> None:
    if Path(name).is_dir():
        headers = read_headers(Path(name), auto_class.__name__)
    else:
        headers = _hub_headers(name, revision)
        if headers is None:
            return
    _refuse_odd_types(name, headers)
    headers = under_stock_names(name, config, headers)
    model, info = _load_empty(auto_class, name, config, headers)
    _require_fit(name, model, info, headers, half=auto_class is AutoModel)
    integers = {key: header for key, header in headers.items() if header.dtype not in FLOATS}
    for key, _ in model.named_parameters() if integers else ():
        if (file_key := _file_key(key, integers)) is not None:
            raise UnsupportedModelError(quantized(name, f"{file_key} is {integers[file_key].dtype}"), QUANTIZED)
    _require_tied(name, model, headers)


def _hub_headers(name: str, revision: str | None) -> Headers | None:
    """Reads the headers of a hub checkpoint, of which the beginning of each file is fetched; None where the hub does not give
    them."""
    try:
        found = huggingface_hub.get_safetensors_metadata(name, revision=revision)
    except (OSError, NO_CONNECTION, NotASafetensorsRepoError, SafetensorsParsingError):
        return None  # in the cache already, a mirror without ranges, or files that transformers has converted: loading will tell
    return {
        key: Header(Path(file), key, tuple(tensor.shape), tensor.dtype)
        for file, content in found.files_metadata.items()
        for key, tensor in content.tensors.items()
    }


def _refuse_odd_types(name: str, headers: Headers) -> None:
    """Tensors that only quantized checkpoints have."""
    for key, header in headers.items():
        if header.dtype.startswith(("F8", "F4", "F6")) or QUANTIZED_NAMES.search(key):
            raise UnsupportedModelError(quantized(name, f"{header.file.name} holds {key} as {header.dtype}"), QUANTIZED)


def _load_empty(
    auto_class: Any, name: str, config: PretrainedConfig, headers: Headers, **arguments: Any
) -> tuple[Any, dict[str, Any]]:
    """Runs transformers' loader on tensors without content; the model, and what it found."""
    try:
        with torch.device("meta"):
            # (a class of ours stands for itself, and one of transformers' for the class of this configuration)
            own = hasattr(auto_class, "config_class")
            model_class = auto_class if own else type(auto_class.from_config(copy.deepcopy(config)))
            tensors = {key: torch.empty(header.shape) for key, header in headers.items()}
        with quiet_report():
            return model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                device_map={"": "meta"},
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **arguments,
            )
    except CONFIG_FAULTS as error:
        fault = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{name}: its config.json and its weights make no model ({fault}); fetch them again") from error


# --- what the loader found -----------------------------------------------------------------------------------------------


def _require_fit(name: str, model: PreTrainedModel, info: dict[str, Any], headers: Headers, half: bool) -> None:
    """Raises CheckpointError unless every tensor has its place, every place its tensor, and both one shape.

    Args:
        half: a vision half rightly leaves the text half of its file unread, and its pooler unused; layers left over are a fault.
    """
    kinds = {_kind(key) for key in model.state_dict()}
    missing = sorted(key for key in info["missing_keys"] if not (half and key.startswith("pooler.")))
    unexpected = sorted(key for key in info["unexpected_keys"] if not half or _kind(key) in kinds)
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        raise CheckpointError(_other_shape(name, model.config, mismatched, headers))
    if missing or unexpected:
        faults = [f"lacks {some(missing)}"] if missing else []
        faults += [f"has {some(unexpected)} besides"] if unexpected else []
        head = any(key.endswith(("lm_head.weight", "embed_out.weight")) for key in missing) and len(missing) == 1
        tied = published_name(model.config, "tie_word_embeddings")
        hint = f'. If the embedding is the head, set "{tied}": true in its config.json' if head else ""
        renamed = f" (names of the stock {type(model).__name__}, as which it is read)" if key_mapping(model.config) else ""
        raise CheckpointError(
            f"{name}: the weights do not fit the architecture of its config.json: the checkpoint {' and '.join(faults)}{renamed}"
            f"{hint}"
        )


def _kind(key: str) -> str:
    """Gives a tensor's name without the numbers of layers."""
    return re.sub(r"\.\d+(?=\.|$)", ".#", key)


def _other_shape(name: str, config: PretrainedConfig, mismatched: list[tuple[str, Any, Any]], headers: Headers) -> str:
    tables = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
    key, given, expected = min(mismatched, key=lambda found: not found[0].endswith(tables))
    file_key = _file_key(key, headers)
    where, there = (headers[file_key].file, headers[file_key].name) if file_key is not None else (name, key)
    named = {"vocab_size": 0, "hidden_size": 1} if key.endswith(tables) and len(given) == len(expected) == 2 else {}
    differs = [name for name, side in named.items() if given[side] != expected[side] == getattr(config, name, None)]
    asks = f" ({' and '.join(f'{name} {getattr(config, name)}' for name in differs)})" if differs else ""
    others = f"; {len(mismatched) - 1} more tensors differ too" if len(mismatched) > 1 else ""
    return (
        f"{where}: {there} has the shape {_shape(given)}, but config.json asks for {_shape(expected)}{asks}{others}. "
        "Set config.json right, or fetch the checkpoint again"
    )


def _shape(sizes: Any) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _file_key(key: str, file_keys: Headers) -> str | None:
    """Gives the name in the files of a parameter of the model, which may have a prefix more or less there; None where it has no
    own."""
    if key in file_keys:
        return key
    found = [other for other in file_keys if other.endswith(f".{key}") or key.endswith(f".{other}")]
    return found[0] if len(found) == 1 else None


def _require_tied(name: str, model: Any, headers: Headers | None = None) -> None:
    """Raises CheckpointError if a head that config.json calls tied has weights of its own in the files, and other ones.

    Args:
        headers: of the files, where the model is empty: a head that the files have is left untied in it, whatever it holds.
    """
    for head, embedding in model.all_tied_weights_keys.items():
        if model.get_parameter(head) is model.get_parameter(embedding):
            continue
        file = name
        if headers is not None:
            own, shared = _file_key(head, headers), _file_key(embedding, headers)
            if own is None or shared is None or not headers[own].file.is_file():
                continue
            if torch.equal(read_tensor(headers[own]), read_tensor(headers[shared])):
                continue
            file = str(headers[own].file)
        tied = published_name(model.config, "tie_word_embeddings")
        raise CheckpointError(
            f'{file}: {head} differs from {embedding}, but config.json says "{tied}": true. If the checkpoint has a '
            f"head of its own, set it to false there; if not, remove {head} from the file"
        )


# --- loading -------------------------------------------------------------------------------------------------------------


def load_trunk(name: str, config: PretrainedConfig, revision: str | None = None) -> PreTrainedModel:
    """Loads the checkpoint as a stock causal LM in its own dtype; a .gguf file is dequantised, tensors under other names find
    their places."""
    path = Path(name)
    if is_gguf(path):
        model = _load_gguf(path)
    else:
        names = key_mapping(config)
        arguments = {"key_mapping": names} if names else {}
        model = _load(AutoModelForCausalLM, name, config=config, revision=revision, **arguments)
        if names:
            del model._weight_conversions  # by which transformers would give the old names back when it saves
    require_finite(name, model)
    return model


def load_vlm(name: str, config: PretrainedConfig, revision: str | None = None) -> PreTrainedModel:
    """Loads an AR vision-language checkpoint as a stock model in its own dtype."""
    model = _load(AutoModelForImageTextToText, name, config=config, revision=revision)
    require_finite(name, model)
    return model


def tower_config(name: str, trust_remote_code: bool) -> PretrainedConfig:
    """Reads the configuration of a vision model with patch tokens; of a two-tower model (CLIP, SigLIP) that of the vision half.

    Raises:
        CheckpointError, UnsupportedModelError.
    """
    config = load_config(name, trust_remote_code)
    vision_config = getattr(config, "vision_config", None) or config
    sizes = ("patch_size", "image_size", "hidden_size", "num_hidden_layers")
    if lacking := [size for size in sizes if not isinstance(getattr(vision_config, size, None), int)]:
        raise UnsupportedModelError(
            f"{name}: a {config.model_type!r} model gives no patch tokens (its config has no {', '.join(lacking)}); expected a "
            "vision transformer such as SigLIP, CLIP, DINOv2 or ViT"
        )
    if type(vision_config) not in transformers.MODEL_MAPPING or is_remote(type(vision_config)):
        raise UnsupportedModelError(own_code(name, config.to_dict()), OWN_CODE)
    return vision_config


def load_tower(name: str, config: PretrainedConfig) -> PreTrainedModel:
    """Loads the vision model of `tower_config` with its weights."""
    model = _load(AutoModel, name, config=config)
    require_finite(name, model)
    return model


def load_renamed(
    model_class: Any, name: str, config: PretrainedConfig, names: dict[str, str], revision: str | None = None
) -> Any:
    """Loads a checkpoint whose tensors have other names into a model class of ours, in its own dtype.

    Args:
        names: as transformers' `key_mapping`.
    """
    model = _load(model_class, name, config=config, revision=revision, key_mapping=names)
    del model._weight_conversions  # by which transformers would give the old names back when it saves
    require_finite(name, model)
    return model


def _load(auto_class: Any, name: str, **arguments: Any) -> PreTrainedModel:
    def load() -> tuple[PreTrainedModel, dict[str, Any]]:
        with quiet_report():
            return auto_class.from_pretrained(
                name, use_safetensors=True, dtype="auto", ignore_mismatched_sizes=True, output_loading_info=True, **arguments
            )

    model, info = explain_failures(name, load)
    _require_fit(name, model, info, {}, half=auto_class is AutoModel)
    _require_tied(name, model)
    return model


def _load_gguf(path: Path) -> PreTrainedModel:
    model = explain_failures(
        str(path),
        lambda: AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        ),
    )
    # The dequantised model still calls itself quantised and then refuses to be saved: move its weights to a plain one.
    config = model.config
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


@torch.no_grad()
def not_finite(model: torch.nn.Module) -> str | None:
    """Gives the first parameter or buffer with a value that is no finite number, with its place; None where all are."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        least, greatest = torch.aminmax(tensor)  # nan goes before every number in both; no copy of the tensor is made
        if not bool(least.isfinite() & greatest.isfinite()):
            place = (~tensor.isfinite()).nonzero()
            return f"{name} has {len(place):,} values that are nan or infinite, the first at {place[0].tolist()}"
    return None


def require_finite(name: str, model: torch.nn.Module) -> None:
    """Raises CheckpointError naming the first tensor with a value that is no finite number."""
    if found := not_finite(model):
        raise CheckpointError(f"{name}: {found}; every weight must be a finite number. Fetch the checkpoint again")
