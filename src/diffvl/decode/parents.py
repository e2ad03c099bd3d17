"""MODEL -> who answers token by token: a language model or a vision-language model as it was published, or a DiffVL directory.

The first two are put into a DiffVL model in memory, whose mode "ar" is transformers' own `generate` on the stock model. So texts
and images are read as the converted model will read them, whatever the parent is.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import ImageProcessingMixin, PretrainedConfig

from diffvl.config.families import diffusion_source, family_of, named_checkpoint, require_known
from diffvl.config.recipe import Recipe
from diffvl.config.resolve import resolve
from diffvl.config.supported import check_supported, is_vlm
from diffvl.decode.answer import Decoder, load_for_decoding
from diffvl.errors import UsageError
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.generation_diffvl import BlockGeneration
from diffvl.hub.images_diffvl import OwnImages
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.machine import has_bf16
from diffvl.prepare.assemble import add_tokens, grow_table, stop_ids
from diffvl.prepare.native import read_native_parts
from diffvl.prepare.released import is_released
from diffvl.prepare.source import Source
from diffvl.prepare.templates import check_template, load_tokenizer, stop_token
from diffvl.store import checkpoint, weights
from diffvl.store.files import read_json
from diffvl.store.published import load_config
from diffvl.terminal.bars import spinner_or_line


class LanguageModel(torch.nn.Module, BlockGeneration):
    """A stock language model alone, with the `generate` of a DiffVL model; it sees no images."""

    generation_config = None
    is_native = False

    def __init__(self, trunk: Any, config: DiffVLConfig) -> None:
        super().__init__()
        self.trunk, self.config = trunk, config

    @property
    def images(self) -> OwnImages:
        return OwnImages(self)

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    def get_input_embeddings(self) -> Any:
        return self.trunk.get_input_embeddings()

    def pixels_of(self, given: Any) -> dict[str, torch.Tensor]:
        """None: a record with images is refused before it comes here."""
        return {}


def load_parent(model: str, trust_remote_code: bool, console: Console) -> Decoder:
    """Loads MODEL, onto a GPU where there is one; in its own dtype, or in fp32 where this machine has no bf16.

    Raises:
        CheckpointError, UnsupportedModelError: as `diffvl convert` does.
        UsageError: for a diffusion language model, which has no answers of its own token by token.
    """
    path = Path(model)
    if (path / "config.json").is_file() and read_json(path / "config.json").get("model_type") == DiffVLConfig.model_type:
        with spinner_or_line(console, f"loading {model}"):
            return load_for_decoding(path)
    require_known(model)
    named = named_checkpoint(model)
    source = Source(model, None, None, trust_remote_code)
    if named is not None:
        source = Source(named[1].repo, named[1].revision, None, trust_remote_code)
    config = load_config(source.model, trust_remote_code, source.revision)
    if diffusion_source(config) is not None or is_released(path):
        raise UsageError(
            f"{model}: a diffusion language model, which answers in blocks; expected an AR model, or a DiffVL directory"
        )
    check_supported(config)
    with spinner_or_line(console, f"loading {model}"):
        decoder = _native(source, config) if is_vlm(config) else _language_model(source, config)
    if not has_bf16() and decoder.model.trunk.dtype == torch.bfloat16:
        checkpoint.cast_weights(decoder.model, torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Decoder(torch.nn.Module.to(decoder.model.eval(), device), decoder.processor)


def _native(source: Source, config: PretrainedConfig) -> Decoder:
    recipe = _recipe()
    parts = read_native_parts(source, recipe, config)
    model, _ = parts.load(recipe)
    return Decoder(model, parts.processor)


def _recipe() -> Recipe:
    """The defaults of how a source is prepared."""
    stage = {"objective": {"kind": "ar"}, "trainable": {"trunk": 1e-5}, "steps": 1}
    return resolve({"stages": {"align": stage}}, [], "defaults")


def _language_model(source: Source, config: PretrainedConfig) -> Decoder:
    weights.check_trunk(source.model, config, source.revision)
    family = family_of(config.model_type)
    tokenizer = load_tokenizer(source.model, family.model_type, source.trust_remote_code, source.revision)
    size = config.get_text_config(decoder=True).vocab_size
    stop, known = stop_token(tokenizer), min(len(tokenizer), size)
    mask_id, image_id = add_tokens(tokenizer, family, size)
    processor = DiffVLProcessor(
        ImageProcessingMixin(), tokenizer, image_token=family.image_token, image_tokens=1, stop_token=stop
    )
    check_template(processor.encoder)
    trunk = weights.load_trunk(source.model, config, source.revision)
    grow_table(trunk, known, len(tokenizer), [mask_id, image_id])
    settings = DiffVLConfig(
        text_config=copy.deepcopy(trunk.config),  # it is given a fresh choice of attention
        image_token_id=image_id,
        mask_token_id=mask_id,
        vocabulary_size=len(tokenizer),
        stop_token_ids=stop_ids(trunk, tokenizer, stop),
    )
    settings.text_config = trunk.config
    return Decoder(LanguageModel(trunk, settings), processor)
