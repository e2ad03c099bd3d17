"""A released block-diffusion vision-language model (SDAR-VL) -> DiffVL directory, so that it can be finetuned on.

Its parts are stock ones under other names, so nothing is added and none of its code runs: the tensors get our names, and the
tokenizer's mask token, the tiles and the blocks are those that it has. Invariant: what was written gives the logits of the
tensors that were read, block by block, of text and of an image.
"""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, PretrainedConfig

from diffvl.config.families import diffusion_source, family_of_trunk
from diffvl.config.recipe import Recipe
from diffvl.errors import CheckpointError, first_line
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.hub.processing_diffvl import BACKEND, DiffVLProcessor
from diffvl.prepare import attention_proof as proof
from diffvl.prepare.mask_token import with_own_mask_token
from diffvl.prepare.parity import Parity
from diffvl.prepare.source import Source
from diffvl.prepare.templates import check_template, load_tokenizer, stop_token
from diffvl.store import checkpoint, sdar_vl, weights
from diffvl.store.files import read_json
from diffvl.store.published import settings_in
from diffvl.store.renamed import diffusion_family

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReleasedParts:
    """All of a conversion but the weights. config: of the trunk; whole: of the model; known: tokens of the tokenizer."""

    source: Source
    config: PretrainedConfig
    whole: DiffVLConfig
    processor: DiffVLProcessor
    known: int

    @property
    def parity(self) -> Parity:
        return Parity(diffusion_source(self.config))

    @property
    def parents(self) -> list[str]:
        return [self.source.model]

    @property
    def facts(self) -> dict[str, str]:
        told = "the checkpoint's tensors in the stock parts that they are named after; its own code was not run"
        return {"parity_with": told}

    def load(self, recipe: Recipe) -> tuple[DiffVLForConditionalGeneration, torch.Tensor]:
        """Loads the weights; returns the DiffVL model and its logits on the probe."""
        model = weights.load_renamed(
            DiffVLForConditionalGeneration, self.source.model, self.whole, sdar_vl.key_mapping(), self.source.revision
        )
        dtype = model.dtype
        reference = self._logits(model.float().eval())
        checkpoint.cast_weights(model, dtype)
        return model, reference

    def prove(self, directory: Path, reference: torch.Tensor) -> tuple[dict[str, float], str]:
        """Holds what was written against what was read; returns the figures, and what is said of them.

        Raises:
            CheckpointError, UnsupportedModelError: if it differs.
        """
        model, _ = checkpoint.load_checkpoint(directory, dtype=torch.float32)
        difference = proof.spread(self._logits(model.eval()) - reference, reference)
        if not difference <= proof.TOLERANCE:
            raise CheckpointError(
                f"{directory}: block parity fails, logits differ from the source's by {difference:.2g} std; nothing kept"
            )
        block = proof.check_block_attention(model.trunk, self.known, model.config.mask_token_id)
        told = f"block parity: largest difference {difference:.1e} std of the logits; block attention {block:.1e}"
        return {self.parity.key: difference, "block": block}, told

    @torch.no_grad()
    def _logits(self, model: DiffVLForConditionalGeneration) -> torch.Tensor:
        """Runs the model block by block on text, and on an image: rows of logits, [rows, V]."""
        text = self.parity.prepared_logits(model, self.parity.probe(self.known)).flatten(0, 1)
        image = Image.radial_gradient("L").convert("RGB").crop((0, 0, 200, 120))
        chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]}]
        inputs = self.processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
        block = self.parity.block(inputs["input_ids"])
        mask = block[:, :, None] >= block[:, None, :]
        seen = model(**{**inputs, "attention_mask": mask}, logits_rows=torch.arange(block.shape[1])[-text.shape[0] :]).logits
        return torch.cat([text, seen])


def is_released(directory: Path) -> bool:
    """Tells whether a directory holds a diffusion model as somebody released it, of language or of vision and language."""
    file = directory / "config.json"
    settings = read_json(file) if file.is_file() else {}
    return sdar_vl.is_sdar_vl(settings) or diffusion_family(settings) is not None


def is_whole(model: str) -> bool:
    """Tells whether MODEL, a directory or a hub id, brings its own tower and an aligned connector in a layout known here."""
    is_hub_id = not Path(model).exists() and len(Path(model).parts) == 2
    return (Path(model).is_dir() or is_hub_id) and released_settings(Source(model, None)) is not None


def released_settings(source: Source) -> dict[str, Any] | None:
    """Reads the config.json of a released model of this layout; None for every other MODEL."""
    if Path(source.model).is_file():
        return None
    settings = settings_in(source.model, "config.json", source.revision)
    return settings if settings is not None and sdar_vl.is_sdar_vl(settings) else None


def read_released_parts(source: Source, config: PretrainedConfig, settings: dict[str, Any]) -> ReleasedParts:
    """Reads and checks whatever can be known without reading weights; writes nothing.

    Args:
        config: of the trunk. settings: config.json.
    Raises:
        CheckpointError, UnsupportedModelError.
    """
    name = source.model
    parts = sdar_vl.part_settings(name, settings)
    family, own = family_of_trunk(config), diffusion_source(config)
    assert own is not None and own.block_size is not None
    tokenizer = load_tokenizer(name, family.model_type, source.trust_remote_code, source.revision)
    with_own_mask_token(name, tokenizer, family, own, config.get_text_config().vocab_size)
    tokens = {row: text for text, row in tokenizer.get_added_vocab().items()}
    image_token = tokens.get(parts["image_token_id"])
    if image_token is None:
        raise CheckpointError(
            f"{name}: image_token_index {parts['image_token_id']} in its config.json is no special token of its tokenizer; fetch "
            "the checkpoint again"
        )
    tokenizer.chat_template = _trained_template(name, tokenizer, family.chat_template)
    vision = AutoConfig.for_model(sdar_vl.TOWER_TYPE, **{k: v for k, v in settings["vision_config"].items() if k != "model_type"})
    stop = stop_token(tokenizer)
    whole = DiffVLConfig(
        text_config=copy.deepcopy(config),
        vision_config=vision,
        mask_token_id=own.mask_token_id,
        vocabulary_size=len(tokenizer),
        stop_token_ids=_stop_ids(source, tokenizer, stop),
        dtype=config.dtype,
        **parts,
    )
    whole.set_decoding("blocks", own.block_size, "block", own.grid, own.target)
    processor = DiffVLProcessor(
        _image_processor(source),
        tokenizer,
        image_token=image_token,
        image_tokens=whole.image_tokens,
        stop_token=stop,
        tiling=whole.tiling,
    )
    check_template(processor.encoder)
    weights.check_renamed(DiffVLForConditionalGeneration, name, whole, sdar_vl.key_mapping(), source.revision)
    return ReleasedParts(source, config, whole, processor, len(tokenizer))


def _trained_template(name: str, tokenizer: Any, family_template: str | None) -> str:
    """Gives the chat template that the model was trained on. The released checkpoints bring another one, which writes a newline
    between an answer and its stop token."""
    own = str(tokenizer.get_chat_template())
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    if f"answer{stop_token(tokenizer)}" in rendered or family_template is None:
        return own
    log.warning(
        "%s: its chat template puts text between an answer and %s, as it did not in training; the family's takes its place",
        name,
        stop_token(tokenizer),
    )
    return family_template


def _stop_ids(source: Source, tokenizer: Any, stop: str) -> list[int]:
    """Gives the template's stop token first, then those of generation_config.json and of the tokenizer."""
    generation = settings_in(source.model, "generation_config.json", source.revision) or {}
    named = generation.get("eos_token_id")
    others = named if isinstance(named, list) else [named]
    ids = [tokenizer.convert_tokens_to_ids(stop), *others, tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in ids if token is not None))


def _image_processor(source: Source) -> Any:
    """Loads the image processor, in the form that works with Pillow."""
    try:
        return AutoImageProcessor.from_pretrained(source.model, backend=BACKEND, revision=source.revision or "main")
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"{source.model}: it has no image processor that can be read; expected a preprocessor_config.json beside the weights "
            f"({first_line(error)})"
        ) from error
