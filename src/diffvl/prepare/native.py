"""AR vision-language checkpoint -> DiffVL directory: a mask token is added, and nothing else changes.

The model stays whole and stock: its own vision part, connector, placeholders, processor and position ids. The directory that was
written is loaded again, and with explicit causal masks it must give the source's logits, with no image, one, and several. Some
models let the tokens of an image see each other; which rule theirs is, is found by the same comparison.

Shapes: B batch, L tokens, V vocabulary.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from transformers import PretrainedConfig

from diffvl.config.families import family_of
from diffvl.config.recipe import Recipe
from diffvl.errors import CheckpointError, UnsupportedModelError
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.images_diffvl import token_types, vision_parameters
from diffvl.hub.layout_diffvl import IMAGE_ATTENTION
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.hub.pixels_diffvl import VIDEO_FRAMES
from diffvl.hub.processing_diffvl import DiffVLProcessor, pixels_in
from diffvl.prepare.assemble import add_tokens, grow_table, stop_ids
from diffvl.prepare.attention_proof import TOLERANCE, check_block_attention, largest, spread
from diffvl.prepare.processor import read_native_processor
from diffvl.prepare.source import Source
from diffvl.prepare.source_traits import source_traits
from diffvl.prepare.upcasting import in_fp32
from diffvl.store import checkpoint, weights

log = logging.getLogger(__name__)
T = TypeVar("T")

PLACEHOLDERS = ("video_token_id", "video_token_index", "audio_token_id", "audio_token_index")
SIZES = ((64, 48), (40, 72))  # pixels (width, height) of the images that parity is proven on


@dataclass(frozen=True)
class NativeParts:
    """A vision-language model: all of a conversion but its weights. known: tokens of the source's tokenizer that have a row in
    its table."""

    source: Source
    config: PretrainedConfig
    processor: DiffVLProcessor
    known: int
    mask_id: int
    image_id: int
    image_inputs: tuple[str, ...]
    token_types: str
    video_id: int | None = None
    video_inputs: tuple[str, ...] = ()

    @property
    def parents(self) -> list[str]:
        return [self.source.model]

    @property
    def facts(self) -> dict[str, str]:
        return {}

    def load(self, recipe: Recipe) -> "tuple[DiffVLForConditionalGeneration, list[ProbePrompt]]":
        """Loads the weights; returns the DiffVL model and the source's logits on some prompts."""
        source = weights.load_vlm(self.source.model, self.config, self.source.revision)
        with_images, with_videos = probe_images(), probe_videos(self.processor)

        def answers(probes: Any) -> "list[ProbePrompt]":
            return _in_fp32(source, lambda: [answered(source, self, shown) for shown in probes])  # whatever the weights are in

        source.eval()
        prompts, moving = answers(with_images), answers(with_videos)
        model = assemble_native(source, self).eval()
        _in_fp32(source, lambda: find_image_attention(model, prompts, self.known))
        _in_fp32(source, lambda: self._require_videos(model, moving))
        checkpoint.cast_weights(model, source.dtype)
        return model, [*prompts, *moving]

    def _require_videos(self, model: DiffVLForConditionalGeneration, prompts: "list[ProbePrompt]") -> None:
        """Raises UnsupportedModelError if videos are not seen as the source sees them."""
        difference = largest([parity(model, prompt, self.known) for prompt in prompts]) if prompts else 0.0
        if not difference <= TOLERANCE:
            raise UnsupportedModelError(
                f"{self.source.model}: with a video the logits differ from the source's by {difference:.2g} standard deviations "
                "under explicit masks; --set prepare.video.enabled=false converts it without videos"
            )

    def prove(self, directory: Path, prompts: "list[ProbePrompt]") -> tuple[dict[str, float], str]:
        """Holds what was written against the source; returns the figures, and what is said of them.

        Raises:
            CheckpointError: if it differs.
        """
        model, processor = checkpoint.load_checkpoint(directory)
        model.eval()
        difference = _in_fp32(model.source, lambda: largest(parity(model, prompt, self.known) for prompt in prompts))
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"{directory}: AR parity fails, logits differ from the source's by {difference:.2g} std; nothing kept"
            )
        again = [encoded(processor, shown) for shown in (*probe_images(), *probe_videos(processor))]
        same = [
            torch.equal(prompt.ids, ids) and _same(prompt.images, pixels)
            for prompt, (ids, pixels) in zip(prompts, again, strict=True)
        ]
        if not all(same):
            raise CheckpointError(f"{directory}: the written processor reads text or images differently; nothing kept")
        block = _in_fp32(
            model.source, lambda: check_block_attention(model.trunk, self.known, self.mask_id, model.config.masks_at)
        )
        shown = "no image, one, two and a video" if processor.sampler else "no image, one and two"
        told = (
            f"AR parity with {shown}: largest difference {difference:.1e} std of the logits; block attention {block:.1e}; "
            f"attention among image tokens: {model.config.image_attention}"
        )
        return {"ar_parity": difference, "block": block}, told


def _in_fp32(source: Any, work: Callable[[], T]) -> T:
    """Gives what `work` gives when a stock model computes in fp32. Pixels are given in the dtype that its embedding and what
    surrounds the layers of its vision part show."""
    vision = {id(parameter) for parameter in vision_parameters(source).values()}
    table = source.get_input_embeddings()

    def is_seen(module: Any) -> bool:
        return module is table or any(id(parameter) in vision for parameter in module._parameters.values())

    return in_fp32(source, work, throughout=is_seen)


def read_native_parts(source: Source, recipe: Recipe, config: PretrainedConfig) -> NativeParts:
    """Reads and checks whatever can be known of a vision-language model without reading weights; writes nothing.

    Raises:
        CheckpointError, UnsupportedModelError, ConfigError.
    """
    weights.check_vlm(source.model, config, source.revision)
    settings = recipe.prepare
    processor, facts = read_native_processor(
        source.model,
        source.revision,
        source.trust_remote_code,
        settings.min_pixels,
        settings.max_pixels,
        settings.system_turn,
        config,
        settings.video,
    )
    for advice in facts.advice:
        log.info("%s: %s", source.model, advice)
    family, tokenizer = family_of(config.model_type), processor.tokenizer
    table_size = config.get_text_config(decoder=True).vocab_size
    known = min(len(tokenizer), table_size)
    shown_as = {"image_token": processor.image_token}  # which the tokenizer has
    mask_id, _ = add_tokens(tokenizer, family.model_copy(update=shown_as), table_size)
    images = (facts.image_token_id, tuple(facts.image_inputs), facts.token_types)
    return NativeParts(source, config, processor, known, mask_id, *images, facts.video_token_id, tuple(facts.video_inputs))


def assemble_native(source: Any, parts: NativeParts) -> DiffVLForConditionalGeneration:
    """Puts the loaded source into a DiffVL model. Its table grows in place.

    Raises:
        UnsupportedModelError: if the mask token finds no row in its table.
    """
    tokenizer = parts.processor.tokenizer
    grow_table(source, parts.known, len(tokenizer), [parts.mask_id])
    for table in (source.get_input_embeddings(), source.get_output_embeddings()):
        if table.weight.shape[0] <= parts.mask_id:
            raise UnsupportedModelError(
                f"{parts.config.model_type}: the mask token would be row {parts.mask_id} of its tables, but one of them has only "
                f"{table.weight.shape[0]} and does not grow; a tokenizer with a free id below would do"
            )
    config = native_config(source, parts, stop_ids(source, tokenizer, parts.processor.stop_token))
    with torch.device("meta"):
        model = DiffVLForConditionalGeneration(config)
    model.set_source(source)
    return model


def native_config(source: Any, parts: NativeParts, stops: list[int]) -> DiffVLConfig:
    """Describes the model that a stock one becomes; it runs, to show what its configuration does not say. stops: see
    `assemble.stop_ids`."""
    return DiffVLConfig(
        source_config=source.config,
        image_token_id=parts.image_id,
        mask_token_id=parts.mask_id,
        vocabulary_size=len(parts.processor.tokenizer),
        stop_token_ids=stops,
        image_inputs=list(parts.image_inputs),
        token_types=parts.token_types,
        **source_traits(source),
        video_token_id=parts.video_id,
        video_inputs=list(parts.video_inputs),
        placeholder_ids=[id for name in PLACEHOLDERS if (id := getattr(parts.config, name, None)) is not None],
    )


# --- proof ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbePrompt:
    """A prompt [1, L] with what says which images it shows, and the source's own logits [1, L, V]."""

    ids: torch.Tensor
    images: dict[str, Any]
    logits: torch.Tensor


def probe_images() -> list[list[Image.Image]]:
    """The images of three prompts: none, one, and several."""
    images = [_striped(*size, number) for number, size in enumerate(SIZES)]
    return [[], images[:1], images]


def _striped(width: int, height: int, number: int) -> Image.Image:
    """An image whose patches all differ."""
    image = Image.new("RGB", (width, height))
    image.putdata([((x * 5 + number * 40) % 256, (y * 7) % 256, (x * y) % 256) for y in range(height) for x in range(width)])
    return image


def probe_videos(processor: DiffVLProcessor) -> list[list[Any]]:
    """The videos of further prompts, one of them beside an image; none where the processor takes none."""
    if processor.sampler is None:
        return []
    frames = [_striped(*SIZES[0], number) for number in range(6)]
    return [[frames], [_striped(*SIZES[1], 7), frames[:4]]]


def encoded(processor: DiffVLProcessor, images: list[Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Encodes a chat with these images, or videos as lists of frames: ids [1, L] and pixels."""
    shown = [part for image in images for part in (_part(image), {"type": "text", "text": "This is one."})]
    chat = [{"role": "user", "content": [*shown, {"type": "text", "text": "What is 12 and what is here?"}]}]
    inputs: Mapping[str, Any] = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    return inputs["input_ids"], pixels_in(inputs)


def _part(image: Any) -> dict[str, Any]:
    kind = "video" if isinstance(image, list) else "image"
    return {"type": kind, kind: image}


@torch.no_grad()
def answered(source: Any, parts: NativeParts, images: list[Any]) -> ProbePrompt:
    """Gives the source's own logits of what the checkpoint's processor makes of a chat with these images."""
    ids, pixels = encoded(parts.processor, images)
    # Some processors give pixels in the dtype that the checkpoint was made for.
    given = {
        name: value.to(source.dtype) if value.is_floating_point() else value
        for name, value in pixels.items()
        if name != VIDEO_FRAMES
    }
    types = token_types(source, ids, parts.image_id, parts.video_id, parts.token_types)
    logits = source(input_ids=ids, **given, **types, use_cache=False).logits
    return ProbePrompt(ids, pixels, logits.float())


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def find_image_attention(model: DiffVLForConditionalGeneration, prompts: Sequence[ProbePrompt], known: int) -> float:
    """Finds out how the model's image tokens see each other, and records it in its configuration.

    Returns:
        the largest difference to the source's logits, in their standard deviations.
    Raises:
        UnsupportedModelError: if no rule gives the source's logits.
    """
    differences = {"causal": _difference(model, "causal", prompts, known)}
    if not differences["causal"] <= TOLERANCE:  # no other rule gives the same as this one
        differences |= {rule: _difference(model, rule, prompts, known) for rule in IMAGE_ATTENTION if rule != "causal"}
    fitting = [rule for rule, difference in differences.items() if difference <= TOLERANCE]
    if fitting and fitting[0] != "causal" and (long := _long_span(model, prompts[1])) is not None:
        differences = {rule: _difference(model, rule, [*prompts, long], known) for rule in fitting}
        fitting = [rule for rule in fitting if differences[rule] <= TOLERANCE]
    if not fitting:
        told = ", ".join(f"{rule} {difference:.2g}" for rule, difference in differences.items())
        raise UnsupportedModelError(
            f"{model.config.source_config.model_type}: no rule of attention among image tokens gives the source's logits under "
            f"explicit masks (differences in standard deviations: {told})"
        )
    model.config.image_attention = fitting[0]
    return differences[fitting[0]]


def _difference(model: DiffVLForConditionalGeneration, rule: str, prompts: Sequence[ProbePrompt], known: int) -> float:
    """Measures the largest difference of logits to the source's, with explicit masks of a rule."""
    model.config.image_attention = rule
    return largest(parity(model, prompt, known) for prompt in prompts)


@torch.no_grad()
def parity(model: DiffVLForConditionalGeneration, prompt: ProbePrompt, known: int) -> float:
    """Measures the difference of the model's logits to the source's. A 2-D mask that hides nothing is never left to the trunk:
    it goes in as explicit masks and positions."""
    logits = model(prompt.ids, **prompt.images, attention_mask=torch.ones_like(prompt.ids)).logits.float()
    expected = prompt.logits[..., :known]
    return spread(logits[..., :known] - expected, expected)


def _long_span(model: DiffVLForConditionalGeneration, prompt: ProbePrompt) -> ProbePrompt | None:
    """A prompt with one run of image tokens longer than the window, which shows how span and window meet; None where there
    is no window to be longer than."""
    text_config, source = model.config.text_config, model.source
    reach = getattr(text_config, "sliding_window", None) or getattr(text_config, "attention_chunk_size", None)
    if reach is None or model.images.has_axes:
        return None
    rows = model.images.encode(prompt.images)
    shown = torch.arange(reach + 8) % rows.total
    text = prompt.ids[0, prompt.ids[0] != model.config.image_token_id][None, :4]
    ids = torch.cat([text, torch.full((1, len(shown)), model.config.image_token_id), text], 1)
    index = torch.full_like(ids, -1)
    index[0, 4 : 4 + len(shown)] = shown
    types = token_types(source, ids, model.config.image_token_id, None, model.config.token_types)
    native = source(input_ids=ids, mm_encoder_outputs={"image": rows.gathered(shown)}, **types, use_cache=False)
    return ProbePrompt(ids, {"rows": rows, "image_index": index}, native.logits.float())
