"""AR checkpoint -> DiffVL directory: mask token, image token, vision tower, connector, and the proof of AR parity.

The trunk is the stock model with its own weights; only rows are added to its table. The directory that was written is loaded
again, and under a causal mask it must give the source checkpoint's logits. If it does not, nothing is left behind.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from rich.console import Console
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from diffvl import checkpoint, proof, weights
from diffvl.config import Prepare, Recipe
from diffvl.errors import CheckpointError, ConfigError, UnsupportedModelError
from diffvl.families import Family, check_supported, family_of
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.modeling_diffvl import Connector, DiffVLForConditionalGeneration
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.progress import spinner_or_line


@dataclass(frozen=True)
class Source:
    """Where the AR checkpoint and the vision tower come from."""

    model: str
    revision: str | None
    vision_tower: str
    trust_remote_code: bool = False


def prepare(source: Source, recipe: Recipe, directory: Path, console: Console) -> Path:
    """Writes the DiffVL directory.

    Raises:
        CheckpointError, UnsupportedModelError, ConfigError: with nothing written.
    """
    config = weights.load_config(source.model, source.trust_remote_code, source.revision)
    check_supported(config)
    family = family_of(config.model_type)
    tokenizer = load_tokenizer(source)
    tower_config, image_processor = load_tower_parts(source)
    image_size = square_processor(image_processor, tower_config, recipe.prepare)
    partial = checkpoint.partial(directory)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        with spinner_or_line(console, f"loading {source.model} and {source.vision_tower}"):
            trunk = weights.load_trunk(source.model, config, source.trust_remote_code, source.revision)
            tower = weights.load_tower(source.vision_tower, source.trust_remote_code)
        known = len(tokenizer)
        reference = _reference_logits(trunk, known)
        model, processor = assemble(trunk, tower, tokenizer, image_processor, image_size, family, recipe)
        with spinner_or_line(console, f"writing {directory}"):
            checkpoint.write_checkpoint(model, processor, partial)
        del trunk, tower, model
        with spinner_or_line(console, "proving AR parity on the written files"):
            proofs = _prove(partial, reference, known, tokenizer)
        state = {"kind": "prepared", "parents": [source.model, source.vision_tower], "proofs": proofs}
        checkpoint.write_state(partial, recipe, state)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    checkpoint.finish(directory)
    console.print(f"AR parity: largest difference {proofs['ar_parity']:.1e} std of the logits; block attention {proofs['block']:.1e}")
    return directory


# --- tokenizer and chat template -----------------------------------------------------------------------------------------


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; it must be a fast one and have a chat template."""
    path = Path(source.model)
    try:
        if path.suffix == ".gguf" and path.is_file():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                source.model, trust_remote_code=source.trust_remote_code, revision=source.revision or "main"
            )
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{source.model}: its tokenizer cannot be loaded ({str(error).strip().splitlines()[0]})") from error
    if not tokenizer.is_fast:
        raise UnsupportedModelError(f"{source.model}: a slow tokenizer; character offsets need a fast one (tokenizer.json)")
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"{source.model}: its tokenizer has no chat template, so prompts and answers cannot be told apart; use an instruct "
            "checkpoint, or put a chat_template.jinja beside the tokenizer"
        )
    return tokenizer


def stop_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token that the chat template writes behind an answer.

    Raises:
        UnsupportedModelError: if there is none, so that a decoder could never stop.
    """
    question, answer = "question", "answer"
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except TemplateError as error:
        raise UnsupportedModelError(f"the chat template refuses a question with an answer: {error}") from error
    rest = tokenizer(text[text.rindex(answer) + len(answer) :], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    for token in rest:
        if token in special:
            return str(tokenizer.convert_ids_to_tokens(token))
    raise UnsupportedModelError("the chat template writes no special token behind an answer, so decoding could not stop")


def add_tokens(tokenizer: PreTrainedTokenizerBase, family: Family, table_rows: int) -> tuple[int, int]:
    """Gives the tokenizer a mask token and an image token; returns their ids.

    A token that is there already is used. The mask token takes the family's agreed row where that row is a spare one (the
    rows up to it are named as reserved, so that ids and names stay one to one); otherwise it is appended.
    """
    if tokenizer.mask_token is None:
        agreed = family.mask_token.id
        if agreed is not None and len(tokenizer) <= agreed < table_rows:
            reserved = [f"<|reserved_{number}|>" for number in range(len(tokenizer), agreed)]
            tokenizer.add_tokens(reserved, special_tokens=True)
        tokenizer.add_special_tokens({"mask_token": family.mask_token.text})
    vocabulary = tokenizer.get_vocab()
    if family.image_token not in vocabulary:
        tokenizer.add_tokens([family.image_token], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids([tokenizer.mask_token, family.image_token])
    taken = list(tokenizer.get_vocab().values())
    for token in ids:
        if taken.count(token) != 1:
            raise UnsupportedModelError(f"the tokenizer's ids have holes: id {token} belongs to two tokens")
    return ids[0], ids[1]


# --- vision --------------------------------------------------------------------------------------------------------------


def load_tower_parts(source: Source) -> tuple[PretrainedConfig, Any]:
    """Configuration and image processor of the vision tower."""
    config = weights.load_config(source.vision_tower, source.trust_remote_code)
    try:
        processor = AutoImageProcessor.from_pretrained(source.vision_tower, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"{source.vision_tower}: no image processor ({str(error).strip().splitlines()[0]}); expected preprocessor_config.json"
        ) from error
    return getattr(config, "vision_config", None) or config, processor


def square_processor(processor: Any, tower: PretrainedConfig, settings: Prepare) -> int:
    """Sets the image processor to resize every picture to one square; returns its side in pixels.

    Raises:
        ConfigError: if the size, the layer or the connector do not fit the tower.
    """
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    sizes = [size["height"] for size in (crop, processor.size) if size and "height" in size]
    side = settings.image_size or (sizes[0] if sizes else tower.image_size)
    patches = side // tower.patch_size
    factor = settings.connector.factor if settings.connector.kind == "pixel_shuffle" else 1
    if patches == 0 or patches % factor:
        raise ConfigError(
            f"prepare.image_size {side} gives {patches} x {patches} patches of {tower.patch_size} px, which pixel_shuffle by {factor} "
            f"does not divide: choose a multiple of {tower.patch_size * factor}"
        )
    layers = tower.num_hidden_layers
    if not -layers - 1 <= settings.vision_layer <= layers:
        raise ConfigError(f"prepare.vision_layer is {settings.vision_layer}; this tower has hidden states {-layers - 1} to {layers}")
    processor.size = {"height": side, "width": side}
    processor.do_resize, processor.do_center_crop, processor.do_convert_rgb = True, False, True
    return side


# --- assembling ----------------------------------------------------------------------------------------------------------


def assemble(
    trunk: PreTrainedModel,
    tower: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: Any,
    image_size: int,
    family: Family,
    recipe: Recipe,
) -> tuple[DiffVLForConditionalGeneration, DiffVLProcessor]:
    """Joins the parts into one model in the trunk's dtype, and one processor. The trunk's table grows in place."""
    known = len(tokenizer)
    table_rows = trunk.get_input_embeddings().weight.shape[0]
    mask_id, image_id = add_tokens(tokenizer, family, table_rows)
    grow_table(trunk, known, [mask_id, image_id])
    stop = stop_token(tokenizer)
    connector = recipe.prepare.connector
    config = DiffVLConfig(
        text_config=trunk.config,
        vision_config=tower.config,
        connector=connector.kind,
        shuffle_factor=connector.factor if connector.kind == "pixel_shuffle" else 1,
        vision_layer=recipe.prepare.vision_layer,
        image_size=image_size,
        image_token_id=image_id,
        mask_token_id=mask_id,
        vocabulary_size=len(tokenizer),
        stop_token_ids=_stop_ids(trunk, tokenizer, stop),
    )
    with torch.device("meta"):
        model = DiffVLForConditionalGeneration(config)
    model.language_model, model.vision_tower = trunk, tower
    config.text_config, config.vision_config = trunk.config, tower.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        fresh = Connector(config.connector, config.shuffle_factor, tower.config.hidden_size, trunk.config.hidden_size)
        for module in fresh.modules():
            model._init_weights(module)
    model.connector = fresh
    model.to(trunk.dtype)
    processor = DiffVLProcessor(
        image_processor, tokenizer, image_token=family.image_token, image_tokens=config.image_tokens, stop_token=stop
    )
    return model, processor


def _stop_ids(trunk: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: str) -> list[int]:
    """The template's stop token first, then whatever else ends a text for this checkpoint."""
    generation = trunk.generation_config.eos_token_id if trunk.generation_config is not None else None
    others = generation if isinstance(generation, list) else [generation]
    ids = [tokenizer.convert_tokens_to_ids(stop), *others, tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in ids if token is not None))


def grow_table(trunk: PreTrainedModel, known: int, new_ids: list[int]) -> None:
    """Makes room for new tokens and starts their rows at the mean of the known ones. A table is never shrunk: many
    checkpoints have more rows than tokens."""
    embedding = trunk.get_input_embeddings()
    if max(new_ids) >= embedding.weight.shape[0]:
        trunk.resize_token_embeddings(max(new_ids) + 1, mean_resizing=False)
    fresh = [token for token in new_ids if token >= known]
    tables: list[nn.Module] = [trunk.get_input_embeddings(), trunk.get_output_embeddings()]
    with torch.no_grad():
        for table in tables:
            for token in fresh:
                table.weight[token] = table.weight[:known].float().mean(0).to(table.weight.dtype)


# --- proof ---------------------------------------------------------------------------------------------------------------


def _reference_logits(trunk: PreTrainedModel, vocabulary: int) -> torch.Tensor:
    """The source's own logits on the probe, in fp32 arithmetic."""
    dtype = trunk.dtype
    trunk.float().eval()
    logits = proof.native_logits(trunk, proof.probe_ids(vocabulary))
    trunk.to(dtype)
    return logits


def _prove(directory: Path, reference: torch.Tensor, known: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Loads what was written and holds it against the source; `known` is the source tokenizer's size.

    Raises:
        CheckpointError: if logits or tokens differ.
    """
    model, processor = checkpoint.load_checkpoint(directory, dtype=torch.float32)
    model.eval()
    text = "A sentence with 12 words, a line\nbreak, and naïve façade ✓."
    if processor.tokenizer(text)["input_ids"] != tokenizer(text)["input_ids"]:
        raise CheckpointError(f"{directory}: the written tokenizer splits text differently from the source's; nothing kept")
    with torch.no_grad():
        logits = model(proof.probe_ids(known)).logits[..., :known]
    # Beyond `known` stand the rows that were spare or new: the mask token's and the image token's.
    difference = proof.spread(logits - reference[..., :known], reference)
    if difference > proof.TOLERANCE:
        raise CheckpointError(f"{directory}: AR parity fails, logits differ from the source's by {difference:.2g} std; nothing kept")
    block = proof.check_block_attention(model.language_model, known, model.config.mask_token_id)
    return {"ar_parity": difference, "block": block}
