"""A vision-language checkpoint -> its own processor, as `DiffVLProcessor` carries it on; or the reason why it cannot be.

Place in the flow: the native route's `prepare` reads this beside the weights. Invariant: what is accepted here is proven on chats
with one image, several and none: ids and pixels are those of the checkpoint's own processor. torchvision is never needed.
"""

import inspect
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, PretrainedConfig, ProcessorMixin
from transformers.models.auto.auto_mappings import PROCESSOR_MAPPING_NAMES

from diffvl.config.families import family_of
from diffvl.config.recipe import Video
from diffvl.errors import CheckpointError, UnsupportedModelError, first_few, first_line
from diffvl.hub.processing_diffvl import BACKEND, DiffVLProcessor
from diffvl.hub.source_diffvl import FAULTS, SAMPLE, SourceImages, build_processor, placeholder_of, processor_class
from diffvl.hub.template_diffvl import Visual, with_fixed_date
from diffvl.prepare.image_size import limit_pixels
from diffvl.prepare.same_as_native import require_same
from diffvl.prepare.templates import check_template, load_tokenizer, stop_token, system_advice
from diffvl.prepare.videos import read_video_part, with_videos
from diffvl.store.published import explain_failures, load_config, settings_in

log = logging.getLogger(__name__)

PROCESSOR = "processor"  # the kind of the reasons found here
_SHOWS_IMAGES = ("image_token_id", "image_token_index", "image_patch_id")  # in a model's configuration
_DESCRIPTIONS = ("preprocessor_config.json", "tokenizer_config.json", "config.json")  # where its class may stand too


@dataclass(frozen=True)
class NativeFacts:
    """What a model is told of its processor. image_token_id: the token that shows a row of an image. image_inputs: names of the
    pixel tensors. video_token_id, video_inputs: the same of videos, where they have a token of their own. advice: what there is
    to know, in words. token_types: what its token types mark, "images" or "answers"."""

    image_token_id: int
    image_inputs: list[str]
    video_token_id: int | None
    video_inputs: list[str]
    advice: list[str]
    token_types: str = "images"


def read_native_processor(
    model: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    system_turn: str = "template",
    config: PretrainedConfig | None = None,
    video: Video | None = None,
) -> tuple[DiffVLProcessor, NativeFacts]:
    """Reads and proves the processor of a checkpoint; no weights are looked at.

    Args:
        min_pixels, max_pixels: between which images are resized; default: the checkpoint's.
        system_turn: see `DiffVLProcessor`.
        config: the checkpoint's configuration, if it has been read already.
        video: how videos are shown, where it takes them.
    Raises:
        CheckpointError, UnsupportedModelError: with the reason, if there is none that can be used.
        ConfigError: if the image processor does not count pixels, or `video` sets what the checkpoint does not do.
    """
    config = config or load_config(model, trust_remote_code, revision)
    class_name, settings, template = _described(model, revision, config.model_type)
    image_processor = _image_processor(model, revision)
    limit_pixels(image_processor, min_pixels, max_pixels)
    tokenizer = load_tokenizer(model, config.model_type, trust_remote_code, revision, template)
    with _refusals(model, class_name):
        inner = _inner(class_name, settings, image_processor, tokenizer)
    source = {"class": class_name, "settings": settings, "first_tokens": _first_tokens(tokenizer)}
    source["backend"] = backend = getattr(image_processor, "backend", BACKEND)

    def proven(template: str) -> tuple[DiffVLProcessor, list[str]]:
        tokenizer.chat_template = template
        stop = stop_token(tokenizer, structured=True)
        processor = DiffVLProcessor(
            image_processor, tokenizer, str(placeholder_of(inner)), 0, stop, system_turn=system_turn, source=source
        )
        _require_images_in_text(model, processor)
        check_template(processor.encoder)
        return processor, require_same(model, processor, inner, is_plain)

    own, family = tokenizer.get_chat_template(), family_of(config.model_type)
    is_plain = family.prompt_template is not None and own == with_fixed_date(family.prompt_template)
    with _refusals(model, class_name):
        try:
            processor, advice = proven(own)
        except UnsupportedModelError as error:
            if family.chat_template is None or with_fixed_date(family.chat_template) == own:
                raise
            log.warning("%s; the family's chat template takes its place", error)
            processor, advice = proven(with_fixed_date(family.chat_template))
        blank = Image.new("RGB", SAMPLE)
        image_id, image_inputs = _row_token(model, config, processor), sorted(processor.pixels([blank]))
        token_types = _marked(processor, image_id)
    if told := system_advice(processor.encoder):
        advice.append(told)
    if backend != BACKEND:
        advice.append("its images are resized by torchvision, which must be installed wherever the checkpoint is used")
    part = read_video_part(model, revision, processor_class(class_name), video or Video())
    taken = with_videos(processor, part, config, image_id, image_inputs)
    if taken.reason:
        advice.append(f"it is converted without videos: {taken.reason}")
    return taken.processor, NativeFacts(image_id, image_inputs, taken.token_id, taken.inputs, advice, token_types)


@contextmanager
def _refusals(model: str, class_name: str) -> Iterator[None]:
    """Turns what a processor raises in the block into one message."""
    try:
        yield
    except (ImportError, *FAULTS) as error:
        raise UnsupportedModelError(f"{model}: its {class_name} cannot be used: {first_line(error)}", PROCESSOR) from error


# --- what was published ----------------------------------------------------------------------------------------------------


def _described(model: str, revision: str | None, model_type: str) -> tuple[str, dict[str, Any], Any]:
    """Reads the processor's class, its settings and its chat template (None where the tokenizer has it).

    Raises:
        UnsupportedModelError: if the class is not one of transformers here.
    """
    described, _ = explain_failures(model, lambda: ProcessorMixin.get_processor_dict(model, revision=revision or "main"))
    template = described.pop("chat_template", None)
    name = described.get("processor_class")
    for file in _DESCRIPTIONS:
        name = name or (settings_in(model, file, revision) or {}).get("processor_class")
    name = str(name or PROCESSOR_MAPPING_NAMES.get(model_type) or model_type)
    found: Any = processor_class(name)
    is_dummy = getattr(found, "is_dummy", False)
    if not is_dummy and not (isinstance(found, type) and issubclass(found, ProcessorMixin)):
        raise UnsupportedModelError(
            f"{model}: transformers has no processor for it ({name}): images could not be shown as the checkpoint "
            "shows them; one that runs code of the checkpoint is not taken",
            PROCESSOR,
        )
    if is_dummy:
        raise UnsupportedModelError(f"{model}: its {name} needs torchvision, even for still images", PROCESSOR)
    taken = set(inspect.signature(found.__init__).parameters) - {"self", "kwargs", "chat_template", *found.get_attributes()}
    return name, {key: value for key, value in described.items() if key in taken}, template


def _image_processor(model: str, revision: str | None) -> Any:
    """Loads the image processor that resizes with Pillow; with torchvision only where it has no such form."""
    try:
        found: Any = AutoImageProcessor.from_pretrained(model, backend=BACKEND, revision=revision or "main")
    except (OSError, ValueError, ImportError) as error:
        if "torchvision" in str(error):
            raise UnsupportedModelError(
                f"{model}: its image processor needs torchvision: transformers has no form of it that works with Pillow; install "
                "torchvision, here and wherever the checkpoint will be used",
                PROCESSOR,
            ) from error
        raise CheckpointError(
            f"{model}: it has no image processor that can be read; expected a preprocessor_config.json beside the weights "
            f"({first_line(error)})"
        ) from error
    return found


def _inner(class_name: str, settings: dict[str, Any], image_processor: Any, tokenizer: Any) -> Any:
    """Builds the processor.

    Raises:
        ValueError: if the tokenizer lacks a token that it writes.
    """
    count = len(tokenizer)
    inner = build_processor(class_name, settings, image_processor, tokenizer)
    if len(tokenizer) != count:
        missing = first_few(tokenizer.convert_ids_to_tokens(list(range(count, len(tokenizer)))), 3)
        raise ValueError(f"its tokenizer lacks {', '.join(missing)}, which it writes for images; take the one published with it")
    token = placeholder_of(inner)
    if not token:
        raise ValueError("it has no token that stands for an image in a text")
    if token not in tokenizer.get_added_vocab():
        raise ValueError(f"its tokenizer lacks {token}, which stands for an image; take the one published with it")
    return inner


def _first_tokens(tokenizer: Any) -> list[str]:
    """Gives the special tokens that the tokenizer puts before a text."""
    special, first = set(tokenizer.all_special_ids), []
    for token in tokenizer("x")["input_ids"]:
        if token not in special:
            break
        first.append(token)
    return tokenizer.convert_ids_to_tokens(first)


# --- what is asked of it -----------------------------------------------------------------------------------------------------


def _require_images_in_text(model: str, processor: DiffVLProcessor) -> None:
    """Raises UnsupportedModelError for a chat template that does not write an image's placeholder."""
    rendered = processor.encoder.template.render([("user", (Visual.IMAGE, "question 0"))], add_generation_prompt=True)
    if processor.image_token not in rendered:
        raise UnsupportedModelError(
            f"{model}: its chat template writes no {processor.image_token} for an image, so it was made for text alone; put the "
            "one of the published processor beside it as chat_template.jinja",
            PROCESSOR,
        )


def _row_token(model: str, config: PretrainedConfig, processor: DiffVLProcessor) -> int:
    """Finds the token that shows a row of an image: the model's configuration names it."""
    assert processor.images is not None
    ids = processor.images.of(SAMPLE).ids
    named = [token for name in _SHOWS_IMAGES if isinstance(token := getattr(config, name, None), int)]
    token = next((token for token in named if token in ids), None)
    if named and token is None:
        raise UnsupportedModelError(
            f"{model}: its processor does not write the token {named[0]}, by which the model finds images", PROCESSOR
        )
    token = Counter(ids).most_common(1)[0][0] if token is None else token
    if ids.count(token) < 2:
        raise UnsupportedModelError(
            f"{model}: an image is one token in the text, so it is shown to the model in another way than by tokens", PROCESSOR
        )
    return token


def _marked(processor: DiffVLProcessor, row_token: int) -> str:
    """Tells what the processor's token types mark, as `DiffVLConfig` names it."""
    assert isinstance(processor.images, SourceImages)
    inputs = processor.images.inputs(Image.new("RGB", SAMPLE))
    types = [value for name, value in inputs.items() if name.endswith("token_type_ids")]
    shows_image = inputs["input_ids"] == row_token
    return "answers" if any(not bool(value[shows_image].any()) for value in types) else "images"
