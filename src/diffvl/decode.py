"""DiffVL directory + pictures + prompt -> answer, in blocks (or token by token, where the weights know only that)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffvl.checkpoint import load_checkpoint
from diffvl.data.chat import IMAGE_MARKER
from diffvl.data.images import open_picture
from diffvl.data.loader import longest_sample
from diffvl.errors import UsageError
from diffvl.hub.generation_diffvl import BlockGenerationOutput
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.hub.sampling_diffvl import remasking_of


@dataclass(frozen=True)
class DecodeSettings:
    """steps: denoising steps per block, default the block size. threshold: of low_confidence_dynamic. temperature: 0 is
    greedy."""

    max_new_tokens: int = 128
    steps: int | None = None
    threshold: float | None = None
    strategy: str = "low_confidence_static"
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """tokens: up to and including the stop. forwards: passes of the trunk. seconds: pictures and prefill included."""

    text: str
    tokens: int
    forwards: int
    seconds: float


@dataclass(frozen=True)
class Decoder:
    model: Any  # DiffVLForConditionalGeneration; transformers' own annotations hide its methods
    processor: DiffVLProcessor


def load_for_decoding(directory: Path) -> Decoder:
    """Reads a DiffVL directory, onto a GPU where there is one."""
    model, processor = load_checkpoint(directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Decoder(torch.nn.Module.to(model.eval(), device), processor)


def answer(decoder: Decoder, images: Sequence[Path], prompt: str, settings: DecodeSettings) -> Answer:
    """Answers one prompt. Pictures stand where the prompt says `<image>`; without the marker, before its text, each on a line
    of its own, as in training data.

    Raises:
        DataError: if a picture cannot be read.
        UsageError: if settings, pictures and prompt do not fit.
    """
    marked = prompt if IMAGE_MARKER in prompt else f"{IMAGE_MARKER}\n" * len(images) + prompt
    if marked.count(IMAGE_MARKER) != len(images):
        raise UsageError(f"the prompt has {marked.count(IMAGE_MARKER)} {IMAGE_MARKER} markers, {len(images)} pictures were given")
    pictures = [open_picture(str(path), "--image") for path in images]
    content: list[dict[str, Any]] = []
    for number, text in enumerate(marked.split(IMAGE_MARKER)):
        if number:
            content.append({"type": "image", "image": pictures[number - 1]})
        content.append({"type": "text", "text": text})
    return answer_chats(decoder, [[{"role": "user", "content": content}]], settings)[0]


@torch.no_grad()
def answer_chats(
    decoder: Decoder, chats: list[list[dict[str, Any]]], settings: DecodeSettings, shorten: bool = False
) -> list[Answer]:
    """Answers several conversations in one batch; picture parts carry their pictures. `forwards` and `seconds` of an answer
    are those of the batch.

    Args:
        shorten: True lets the answers end where the context ends, before `max_new_tokens`.
    Raises:
        UsageError: if the settings do not fit the checkpoint, or a prompt does not fit its context.
    """
    began = time.monotonic()
    model, processor = decoder.model, decoder.processor
    size = model.config.block_size
    try:
        remasking_of(settings.strategy, settings.steps, size, settings.threshold, None)
        inputs = processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)
    except ValueError as error:
        raise UsageError(str(error)) from error
    length = inputs["input_ids"].shape[1]
    limit = context_length(decoder)
    if limit is not None and length + settings.max_new_tokens > limit:
        if not shorten or length >= limit:
            raise UsageError(
                f"a prompt of {length} tokens and {settings.max_new_tokens} new ones do not fit the context of {limit}: shorten "
                "the prompt or lower --max-new-tokens"
            )
        settings = replace(settings, max_new_tokens=limit - length)
    output = model.generate(**inputs.to(model.device), return_dict_in_generate=True, **_generate_arguments(settings))
    assert isinstance(output, BlockGenerationOutput) and output.sequences is not None and output.forwards is not None
    seconds = time.monotonic() - began
    answers = []
    for row in output.sequences[:, length:].tolist():
        stop = next((place for place, token in enumerate(row) if token in model.config.stop_token_ids), len(row) - 1)
        text = processor.tokenizer.decode(row[: stop + 1], skip_special_tokens=True).strip()
        answers.append(Answer(text, stop + 1, output.forwards, seconds))
    return answers


def context_length(decoder: Decoder) -> int | None:
    """Tokens of prompt and answer that the checkpoint can take in whole blocks; None without a limit."""
    config = decoder.model.config
    context = getattr(config.text_config, "max_position_embeddings", None)
    return longest_sample(context, config.block_size, config.grid)


def _generate_arguments(settings: DecodeSettings) -> dict[str, Any]:
    return {
        "max_new_tokens": settings.max_new_tokens,
        "denoising_steps": settings.steps,
        "remasking": settings.strategy,
        "threshold": settings.threshold,
        "temperature": settings.temperature,
        "seed": settings.seed,
    }
