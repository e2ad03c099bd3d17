"""Checkpoint of a language model -> DiffVL directory: mask token, image token, vision tower, connector, and the proof of parity.

The trunk is the stock model with its own weights; only rows are added to its table. The directory that was written is loaded
again, and under the attention of its source (causal; of a diffusion language model bidirectional, or by block) it must give the
source checkpoint's logits. If it does not, nothing stays.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from diffvl.config.families import Family, diffusion_source, family_of_trunk
from diffvl.config.recipe import Prepare, Recipe, Video
from diffvl.errors import CheckpointError, ConfigError, UnsupportedModelError, first_line
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.connector_diffvl import Connector, fresh_newline
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.hub.processing_diffvl import BACKEND, DiffVLProcessor
from diffvl.prepare import attention_proof as proof
from diffvl.prepare.mask_token import with_own_mask_token
from diffvl.prepare.parity import Parity
from diffvl.prepare.source import Source
from diffvl.prepare.templates import check_template, load_tokenizer, stop_token, system_advice
from diffvl.prepare.tiling import with_tiling
from diffvl.prepare.upcasting import in_fp32
from diffvl.store import checkpoint, weights

log = logging.getLogger(__name__)

BLOCK_SIZE = 32  # in which a bidirectional model decodes before it is trained on blocks; those of LLaDA's own examples


@dataclass(frozen=True)
class OwnParts:
    """A language model and a vision tower: all of a conversion but their weights. config: of the trunk; known: tokens of the
    source's tokenizer that have a row in its table."""

    source: Source
    config: PretrainedConfig
    tower_config: PretrainedConfig
    processor: DiffVLProcessor
    known: int
    mask_id: int
    image_id: int
    image_size: int

    @property
    def parity(self) -> Parity:
        return Parity(diffusion_source(self.config))

    @property
    def parents(self) -> list[str]:
        return [self.source.model, _tower_of(self.source)]

    @property
    def facts(self) -> dict[str, str]:
        return self.parity.facts(self.config)

    def load(self, recipe: Recipe) -> tuple[DiffVLForConditionalGeneration, torch.Tensor]:
        """Loads the weights; returns the DiffVL model and the source's logits on the probe."""
        trunk = weights.load_trunk(self.source.model, self.config, self.source.revision)
        tower = weights.load_tower(_tower_of(self.source), self.tower_config)
        reference = _reference_logits(trunk, self.parity, self.known)
        return assemble(trunk, tower, self, recipe), reference

    def prove(self, directory: Path, reference: torch.Tensor) -> tuple[dict[str, float], str]:
        """Holds what was written against the source; returns the figures, and what is said of them.

        Raises:
            CheckpointError, UnsupportedModelError: if it differs.
        """
        proofs = _prove(directory, reference, self.parity, self)
        difference, block = proofs[self.parity.key], proofs["block"]
        told = f"{self.parity.name} parity: largest difference {difference:.1e} std of the logits; block attention {block:.1e}"
        return proofs, told


def _tower_of(source: Source) -> str:
    assert source.vision_tower is not None
    return source.vision_tower


def read_own_parts(source: Source, recipe: Recipe, config: PretrainedConfig) -> OwnParts:
    """Reads and checks whatever can be known of a language model and a tower without reading weights; writes nothing.

    Raises:
        CheckpointError, UnsupportedModelError, ConfigError.
    """
    weights.check_trunk(source.model, config, source.revision)
    family = family_of_trunk(config)
    tokenizer = load_tokenizer(source.model, family.model_type, source.trust_remote_code, source.revision)
    tower_config, image_processor = load_tower_parts(source)
    weights.check_tower(_tower_of(source), tower_config)
    image_size = square_processor(image_processor, tower_config, recipe.prepare)
    table_size = config.get_text_config(decoder=True).vocab_size
    stop, known = stop_token(tokenizer), min(len(tokenizer), table_size)
    if len(tokenizer) > table_size:
        missing = f"the {len(tokenizer) - table_size:,} missing rows are added and start at the mean of the others"
        log.warning(
            "%s: its tokenizer has %s tokens, its table %s rows; %s",
            source.model,
            f"{len(tokenizer):,}",
            f"{table_size:,}",
            missing,
        )
    if (own := diffusion_source(config)) is not None:
        family = with_own_mask_token(source.model, tokenizer, family, own, table_size)
    mask_id, image_id = add_tokens(tokenizer, family, table_size)
    side = image_size // tower_config.patch_size // shuffle_factor(recipe.prepare)
    processor = DiffVLProcessor(
        image_processor,
        tokenizer,
        image_token=family.image_token,
        image_tokens=side * side,
        stop_token=stop,
        system_turn=recipe.prepare.system_turn,
    )
    processor = with_tiling(processor, recipe.prepare.tiling.settings)
    check_template(processor.encoder)
    if advice := system_advice(processor.encoder):
        log.info("%s: %s", source.model, advice)
    return OwnParts(source, config, tower_config, processor, known, mask_id, image_id, image_size)


# --- tokenizer ----------------------------------------------------------------------------------------------------------


def add_tokens(tokenizer: Any, family: Family, table_size: int) -> tuple[int, int]:
    """Gives the tokenizer a mask token and an image token; returns their ids.

    A token that is there already is used. The mask token takes the family's agreed row where that row is a spare one (the
    rows up to it are named as reserved, so that ids and names stay one to one); otherwise it is appended.
    """
    if tokenizer.mask_token is None:
        agreed = family.mask_token.id
        if agreed is not None and len(tokenizer) <= agreed < table_size:
            reserved = [f"<|reserved_{number}|>" for number in range(len(tokenizer), agreed)]
            tokenizer.add_tokens(reserved, special_tokens=True)
        tokenizer.add_special_tokens({"mask_token": family.mask_token.text})
    if family.image_token not in tokenizer.get_added_vocab():  # a piece of the vocabulary alone would not be found in a text
        tokenizer.add_tokens([family.image_token], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids([tokenizer.mask_token, family.image_token])
    taken = list(tokenizer.get_vocab().values())
    for token in ids:
        if taken.count(token) != 1:
            raise UnsupportedModelError(f"the tokenizer's ids have holes: id {token} belongs to two tokens")
    return ids[0], ids[1]


# --- vision --------------------------------------------------------------------------------------------------------------


def load_tower_parts(source: Source) -> tuple[PretrainedConfig, Any]:
    """Reads configuration and image processor of the vision tower."""
    name = _tower_of(source)
    config = weights.tower_config(name, source.trust_remote_code)
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend=BACKEND, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"{name}: it has no image processor that can be read; expected a preprocessor_config.json beside the "
            f"weights, as vision checkpoints are published ({first_line(error)})"
        ) from error
    return config, processor


def shuffle_factor(settings: Prepare) -> int:
    """Patches per side that the connector joins."""
    return settings.connector.factor if settings.connector.kind == "pixel_shuffle" else 1


def square_processor(processor: Any, tower: PretrainedConfig, settings: Prepare) -> int:
    """Sets the image processor to resize every image to one square; returns its side in pixels.

    Raises:
        ConfigError: if the size, the layer or the connector do not fit the tower.
    """
    if settings.video != Video():
        raise ConfigError("prepare.video is for vision-language models that take videos; this model takes none: leave it out")
    if settings.min_pixels is not None or settings.max_pixels is not None:
        raise ConfigError(
            "prepare.min_pixels and max_pixels are for vision-language models; here every image is made a square: set "
            "prepare.image_size"
        )
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    sizes = [size["height"] for size in (crop, processor.size) if size and "height" in size]
    side = settings.image_size or (sizes[0] if sizes else tower.image_size)
    patches = side // tower.patch_size
    factor = shuffle_factor(settings)
    if patches == 0 or patches % factor:
        raise ConfigError(
            f"prepare.image_size {side} gives {patches} x {patches} patches of {tower.patch_size} px, which pixel_shuffle by "
            f"{factor} does not divide: choose a multiple of {tower.patch_size * factor}"
        )
    layers = tower.num_hidden_layers
    if not -layers - 1 <= settings.vision_layer <= layers:
        raise ConfigError(
            f"prepare.vision_layer is {settings.vision_layer}; this tower has hidden states {-layers - 1} to {layers}"
        )
    processor.size = {"height": side, "width": side}
    processor.do_resize, processor.do_center_crop, processor.do_convert_rgb = True, False, True
    return side


# --- assembling ----------------------------------------------------------------------------------------------------------


def assemble(trunk: Any, tower: Any, parts: OwnParts, recipe: Recipe) -> DiffVLForConditionalGeneration:
    """Joins the parts into one model in the trunk's dtype. The trunk's table grows in place."""
    processor = parts.processor
    is_diffusion = diffusion_source(parts.config) is not None
    fresh_ids = [parts.image_id] if is_diffusion else [parts.mask_id, parts.image_id]  # a mask row that was trained stays
    grow_table(trunk, parts.known, len(processor.tokenizer), fresh_ids)
    config = own_config(trunk.config, tower.config, parts, recipe, stop_ids(trunk, processor.tokenizer, processor.stop_token))
    with torch.device("meta"):
        model = DiffVLForConditionalGeneration(config)
    model.language_model, model.vision_tower = trunk, tower
    config.text_config, config.vision_config = trunk.config, tower.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        fresh = Connector(config.connector, config.shuffle_factor, tower.config.hidden_size, trunk.config.hidden_size)
        for module in fresh.modules():
            model._init_weights(module)
        if config.tiling is not None:
            model.image_newline = fresh_newline(trunk.config.hidden_size)
    with torch.no_grad():
        fresh.layers[-1].get_parameter("weight").mul_(recipe.prepare.connector.gain)
    model.connector = fresh
    checkpoint.cast_weights(model, trunk.dtype)
    return model


def own_config(
    trunk: PretrainedConfig, tower: PretrainedConfig, parts: OwnParts, recipe: Recipe, stops: list[int]
) -> DiffVLConfig:
    """Describes the model that the parts make, of which the trunk's table has grown. stops: see `stop_ids`."""
    processor, own = parts.processor, diffusion_source(parts.config)
    config = DiffVLConfig(
        text_config=trunk,
        vision_config=tower,
        connector=recipe.prepare.connector.kind,
        shuffle_factor=shuffle_factor(recipe.prepare),
        vision_layer=recipe.prepare.vision_layer,
        image_size=parts.image_size,
        tiling=processor.tiling,
        image_token_id=parts.image_id,
        mask_token_id=parts.mask_id,
        vocabulary_size=len(processor.tokenizer),
        stop_token_ids=stops,
    )
    assert config.image_tokens == processor.image_tokens and config.tiles == processor.tiles
    if own is not None:
        config.set_decoding("blocks", own.block_size or BLOCK_SIZE, "block", own.grid, own.target)
    return config


def stop_ids(trunk: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: str) -> list[int]:
    """Gives the template's stop token first, then whatever else ends a text for this checkpoint."""
    generation = trunk.generation_config.eos_token_id if trunk.generation_config is not None else None
    others = generation if isinstance(generation, list) else [generation]
    ids = [tokenizer.convert_tokens_to_ids(stop), *others, tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in ids if token is not None))


def grow_table(trunk: Any, known: int, tokens: int, new_ids: list[int]) -> None:
    """Makes room for new tokens, and for tokens that the source's tokenizer has beyond the table, and starts their rows at the
    mean of the known ones. A table is never shrunk: many checkpoints have more rows than tokens.

    Args:
        known: tokens that have a row.
        tokens: tokens of the tokenizer now.
    """
    old_size = trunk.get_input_embeddings().weight.shape[0]
    size = max(tokens, max(new_ids) + 1)
    if size > old_size:
        trunk.resize_token_embeddings(size, mean_resizing=False)
    fresh = sorted({*range(old_size, size), *(token for token in new_ids if token >= known)})
    with torch.no_grad():
        for table in (trunk.get_input_embeddings(), trunk.get_output_embeddings()):
            for values in (table.weight, getattr(table, "bias", None)):
                if values is not None:
                    values[fresh] = _mean(values[:known]).to(values.dtype)


def _mean(rows: torch.Tensor) -> torch.Tensor:
    """The mean over dim 0, in fp32; of a table some columns at a time, because a copy of it in fp32 is large."""
    return torch.cat([columns.float().mean(0) for columns in rows.split(256, dim=1)]) if rows.dim() > 1 else rows.float().mean(0)


# --- proof ---------------------------------------------------------------------------------------------------------------


def _reference_logits(trunk: PreTrainedModel, parity: Parity, known: int) -> torch.Tensor:
    """Computes the source's logits on the probe, in fp32 arithmetic."""
    return in_fp32(trunk.eval(), lambda: parity.source_logits(trunk, parity.probe(known)))


def _prove(directory: Path, reference: torch.Tensor, parity: Parity, parts: OwnParts) -> dict[str, float]:
    """Loads what was written and holds it against the source.

    Raises:
        CheckpointError: if logits or tokens differ.
        UnsupportedModelError: if the tower does not give the patches that its configuration promises.
    """
    known = parts.known
    model, processor = checkpoint.load_checkpoint(directory)
    model.eval()
    require_patches(model)
    _require_same_processor(directory, processor, parts.processor)
    logits = in_fp32(model.trunk, lambda: parity.prepared_logits(model, parity.probe(known)))[..., :known]
    # Beyond `known` stand the rows that were spare or new: the image token's, and the mask token's unless the source had one.
    difference = proof.spread(logits - reference[..., :known], reference)
    if not difference <= proof.TOLERANCE:
        raise CheckpointError(
            f"{directory}: {parity.name} parity fails, logits differ from the source's by {difference:.2g} std; nothing kept"
        )
    block = in_fp32(model.trunk, lambda: proof.check_block_attention(model.trunk, known, model.config.mask_token_id))
    return {parity.key: difference, "block": block}


def _require_same_processor(directory: Path, written: DiffVLProcessor, source: DiffVLProcessor) -> None:
    """Raises CheckpointError unless what was written reads text and images as the source's parts, with which training goes on."""
    text = "A sentence with 12 words, a line\nbreak, and naïve façade ✓."
    if written.tokenizer(text)["input_ids"] != source.tokenizer(text)["input_ids"]:
        raise CheckpointError(f"{directory}: the written tokenizer splits text differently from the source's; nothing kept")
    image = Image.radial_gradient("L").convert("RGB").crop((0, 0, 200, 120))
    seen, expected = (one.pixels([image]) for one in (written, source))
    if seen.keys() != expected.keys() or not all(torch.equal(seen[name], expected[name]) for name in seen):
        raise CheckpointError(f"{directory}: the written image processor sees images differently from the source's; nothing kept")


@torch.no_grad()
def require_patches(model: DiffVLForConditionalGeneration) -> None:
    """Shows the tower one black image. Towers that pool their patches, or cannot take another size, end here."""
    config = model.config
    kind, side = config.vision_config.model_type, config.image_size
    try:
        tokens = model.image_features(torch.zeros(1, 3, side, side)).shape[1]
    except (RuntimeError, ValueError, IndexError) as error:
        reason = first_line(error)
        raise UnsupportedModelError(
            f"{kind}: this vision tower gives no patch tokens for images of {side} x {side} ({reason}); leave "
            "prepare.image_size at the tower's own, or take a plain vision transformer such as SigLIP, CLIP, DINOv2 or ViT"
        ) from error
    if tokens != config.image_tokens:
        raise UnsupportedModelError(
            f"{kind}: this vision tower gives {tokens} image tokens for an image where {config.image_tokens} patches are "
            "expected; take a plain vision transformer such as SigLIP, CLIP, DINOv2 or ViT"
        )
