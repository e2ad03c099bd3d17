"""DiffVL directory + images + prompt -> answer, in blocks (or token by token, where the weights know only that).

Settings become arguments of the model's own `generate` here and nowhere else; what a checkpoint cannot do with them is refused
before anything is decoded, in the terms of the command line.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import BatchFeature, CompileConfig
from transformers.generation.streamers import BaseStreamer

from diffvl.data.content import IMAGE_MARKER, VIDEO_MARKER, count_markers, count_video_markers, parts_of, with_markers
from diffvl.data.images import open_image
from diffvl.data.questions import Question, summary
from diffvl.decode.flags import flag
from diffvl.errors import CheckpointError, DataError, UsageError
from diffvl.hub.answers_diffvl import BlockGenerationOutput, OnStep
from diffvl.hub.blocks_diffvl import Prefix
from diffvl.hub.cache_diffvl import on_every_device, require_static
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.layout_diffvl import longest_sample
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.hub.template_diffvl import Visual
from diffvl.machine import has_bf16
from diffvl.store.checkpoint import load_checkpoint, read_json, saved_dtype

Message = dict[str, Any]  # one of a conversation: role and content; image parts carry their images

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of a character whose last bytes are not there yet
COMPILED = {"cache_implementation": "static", "compile_config": on_every_device(CompileConfig(fullgraph=True, dynamic=False))}
OTHER_DECODERS = ("sdar", "diffusionvl", "llada", "llava_llada")  # how model types of other block-diffusion projects begin


@dataclass(frozen=True)
class Answer:
    """tokens: up to and including the stop. forwards: passes of the trunk, and tokens_per_forward what this answer got out of
    each. prefill_seconds: until the first tokens were predicted, with encoding the images; decode_seconds: the rest; seconds:
    both and what images take before that. accepted_per_round: drafted tokens that were kept of each draft, in mode
    "speculative". Forwards, seconds and what was accepted of an answer that was decoded in a batch are those of the batch."""

    text: str
    tokens: int
    forwards: int
    tokens_per_forward: float
    prefill_seconds: float
    decode_seconds: float
    seconds: float
    accepted_per_round: float | None = None


@dataclass(frozen=True)
class Decoder:
    model: Any  # DiffVLForConditionalGeneration; transformers' own annotations hide its methods
    processor: DiffVLProcessor


@dataclass(frozen=True)
class Watcher:
    """Who looks on while one prompt is decoded: streamer gets final tokens, on_step every denoising step."""

    streamer: Any = None
    on_step: OnStep | None = None


UNWATCHED = Watcher()


# --- what is asked ---------------------------------------------------------------------------------------------------------


def load_for_decoding(directory: Path) -> Decoder:
    """Reads a DiffVL directory, onto a GPU where there is one; in its own dtype, or in fp32 where this machine has no bf16.

    Raises:
        CheckpointError: saying what else the directory is.
    """
    _refuse_other_decoders(directory)
    slow = not has_bf16() and saved_dtype(directory) == torch.bfloat16
    model, processor = load_checkpoint(directory, dtype=torch.float32 if slow else None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Decoder(torch.nn.Module.to(model.eval(), device), processor)


def _refuse_other_decoders(directory: Path) -> None:
    """A checkpoint that decodes in blocks already must not be told to be converted, as any other would be."""
    if not (directory / "config.json").is_file():
        return
    config = read_json(directory / "config.json")
    kind, classes = str(config.get("model_type")), config.get("architectures") or []
    inner = config.get("text_config")
    kinds = (kind, str(inner.get("model_type")) if isinstance(inner, dict) else "", *map(str, classes))
    if kind != DiffVLConfig.model_type and any(name.lower().startswith(OTHER_DECODERS) for name in kinds):
        named = f"model_type {kind!r}" + (f", {classes[0]}" if classes else "")
        raise CheckpointError(
            f"{directory}: a block-diffusion checkpoint of another project ({named}), which decodes with its own code; expected "
            "one that `diffvl convert` wrote. Decode it with transformers and trust_remote_code=True"
        )


def user_message(text: str, images: Sequence[Image.Image], videos: Sequence[Any] = ()) -> Message:
    """What a user says. Images stand where the text says `<image>`, and videos (paths, folders, lists of frames) where it says
    `<video>`; without a marker, before the text, each on a line of its own, as in training data.

    Raises:
        UsageError: if markers and images differ in number, or the text is not one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt is not valid UTF-8 text (character {error.start + 1}, {text[error.start]!r})") from error
    has_videos = bool(videos)
    marked = text if count_markers(text) else with_markers(text, len(images))
    if has_videos and not count_video_markers(text):
        marked = with_markers(marked, 0, len(videos))
    num_markers = count_markers(marked)
    if num_markers != len(images):
        advice = "" if images else f" (for that text itself write \\{IMAGE_MARKER})"
        raise UsageError(f"the prompt has {num_markers} {IMAGE_MARKER} markers, {len(images)} images were given{advice}")
    if has_videos and count_video_markers(marked) != len(videos):
        raise UsageError(f"the prompt has {count_video_markers(marked)} {VIDEO_MARKER} markers, {len(videos)} videos were given")
    rest = {Visual.IMAGE: iter(images), Visual.VIDEO: iter(videos)}
    content = [
        {"type": part.value, part.value: next(rest[part])} if isinstance(part, Visual) else {"type": "text", "text": part}
        for part in parts_of(marked, has_videos)
    ]
    return {"role": "user", "content": content}


def ask(prompt: str, images: Sequence[Path], videos: Sequence[Path] = ()) -> Message:
    """`user_message` with the images read from files. Raises DataError if one cannot be."""
    for path in videos:
        if not path.exists():
            raise DataError(f"--video: {path} does not exist; expected a video file or a folder of frames")
    return user_message(prompt, [open_image(str(path), "--image") for path in images], [str(path) for path in videos])


def check_settings(settings: DecodeSettings, config: DiffVLConfig) -> DecodeSettings:
    """Gives the settings with everything filled in. Raises UsageError if a checkpoint cannot be decoded like this."""
    try:
        settings.check(spell=flag)
        return settings.for_checkpoint(config, spell=flag)
    except ValueError as error:
        raise UsageError(str(error)) from error


def require_single_questions(settings: DecodeSettings, config: DiffVLConfig) -> None:
    """Raises UsageError where earlier answers in a prompt cannot be read: token by token by a source whose own `generate` knows
    no conversations (PaliGemma)."""
    if config.token_types == "answers" and settings.for_checkpoint(config, spell=flag).mode == "ar":
        raise UsageError(
            "token by token this model answers single questions only, and a prompt has earlier answers in it: ask first "
            "questions only, or decode in blocks"
        )


def context_length(decoder: Decoder) -> int | None:
    """As `context_of` the checkpoint."""
    return context_of(decoder.model.config)


def context_of(config: DiffVLConfig) -> int | None:
    """Tokens of prompt and answer that a checkpoint can take in whole blocks; None without a limit."""
    context = getattr(config.text_config, "max_position_embeddings", None)
    return longest_sample(context, config.block_size, config.grid)


# --- answers ---------------------------------------------------------------------------------------------------------------


def answer(decoder: Decoder, images: Sequence[Path], prompt: str, settings: DecodeSettings) -> Answer:
    """Answers one prompt about images.

    Raises:
        DataError: if an image cannot be read.
        UsageError: if settings, images and prompt do not fit.
    """
    return answer_chats(decoder, [[ask(prompt, images)]], settings)[0]


def answer_chats(
    decoder: Decoder, chats: list[list[Message]], settings: DecodeSettings, watcher: Watcher = UNWATCHED
) -> list[Answer]:
    """Answers several conversations in one batch.

    Args:
        watcher: for one conversation.
    Raises:
        UsageError: if the settings do not fit the checkpoint, or a prompt does not fit its context.
    """
    check_settings(settings, decoder.model.config)
    start = time.monotonic()
    inputs = encode(decoder, chats)
    length, limit = inputs["input_ids"].shape[1], context_length(decoder)
    if limit is not None and length + settings.max_new_tokens > limit:
        raise UsageError(too_long(length, settings, limit))
    return decode(decoder, inputs, settings, watcher, start=start)[0]


def answer_within_context(
    decoder: Decoder, chats: list[list[Message]], settings: DecodeSettings
) -> tuple[list[Answer], list[Answer]]:
    """Answers conversations as `answer_chats` does, but lets an answer end where the context ends, before `max_new_tokens`.

    That is a matter of its own prompt, not of its neighbours': those with less room than others are a batch of their own.

    Returns:
        the answers; and one of each batch, whose forwards and seconds are the batch's.
    Raises:
        UsageError: if the settings do not fit the checkpoint, or a prompt alone fills its context.
    """
    check_settings(settings, decoder.model.config)
    start = time.monotonic()
    inputs = encode(decoder, chats)
    limit, most = context_length(decoder), settings.max_new_tokens
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    rooms = [most if limit is None else min(most, limit - length) for length in lengths]
    if min(rooms) < 1:
        raise UsageError(too_long(max(lengths), settings, max(lengths) + min(rooms)))
    answers: dict[int, Answer] = {}
    batches: list[Answer] = []
    for room in sorted(set(rooms)):
        places = [place for place, own in enumerate(rooms) if own == room]
        if len(places) < len(chats):
            start = time.monotonic()
            inputs = encode(decoder, [chats[place] for place in places])
        found, _ = decode(decoder, inputs, replace(settings, max_new_tokens=room), start=start)
        answers |= dict(zip(places, found, strict=True))
        batches.append(found[0])
    return [answers[place] for place in range(len(chats))], batches


def too_long(length: int, settings: DecodeSettings, limit: int) -> str:
    return (
        f"a prompt of {length} tokens and {settings.max_new_tokens} new ones do not fit the context of {limit}: shorten "
        "the prompt or lower --max-new-tokens"
    )


def encode(decoder: Decoder, chats: list[list[Message]]) -> BatchFeature:
    """Conversations -> tensors on the CPU. Raises UsageError if the checkpoint's processor refuses them."""
    try:
        return decoder.processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)
    except ValueError as error:
        raise UsageError(str(error)) from error


def decode(
    decoder: Decoder,
    inputs: BatchFeature,
    settings: DecodeSettings,
    watcher: Watcher = UNWATCHED,
    prefix: Prefix | None = None,
    start: float | None = None,
) -> tuple[list[Answer], BlockGenerationOutput]:
    """Answers what `encode` gave; checked settings, and a prompt that fits.

    Args:
        prefix: what an earlier turn of the conversation left; used up.
        start: when the seconds start to count, default now.
    Raises:
        UsageError: as `require_single_questions`, and where a trunk cannot be compiled.
    """
    start = time.monotonic() if start is None else start
    model, tokenizer = decoder.model, decoder.processor.tokenizer
    mask = model.config.mask_token_id
    if settings.is_static and settings.mode != "ar":
        _require_static(model.trunk)
    earlier = inputs.get("answer_index")
    if earlier is not None and bool(earlier.any()):
        require_single_questions(settings, model.config)
    arguments = settings.arguments() | {"tokenizer": tokenizer, "return_dict_in_generate": True}
    if settings.is_static and settings.compile_config is None and not settings.disable_compile:
        arguments |= COMPILED
    # The one token that an answer never holds: what is before it is the answer, however it ended.
    arguments["pad_token_id"] = mask
    watched = {"streamer": watcher.streamer, "on_step": watcher.on_step}
    with _compile_errors_in_words(model):
        output = model.generate(**inputs.to(model.device), **arguments, **watched, prefix=prefix)
    assert isinstance(output, BlockGenerationOutput) and output.sequences is not None and output.forwards is not None
    assert output.prefill_seconds is not None and output.decode_seconds is not None
    seconds = time.monotonic() - start
    accepted = None if output.drafts is None else output.drafts.accepted_per_round
    answers = []
    for row in output.sequences[:, inputs["input_ids"].shape[1] :].tolist():
        ids = row[: row.index(mask)] if mask in row else row
        figures = (output.forwards, len(ids) / output.forwards, output.prefill_seconds, output.decode_seconds, seconds)
        answers.append(Answer(text_of(tokenizer, ids, settings.stop_strings), len(ids), *figures, accepted))
    return answers, output


def _require_static(trunk: Any) -> None:
    try:
        require_static(trunk)
    except ValueError as error:
        raise UsageError(f"--compile: {error}; leave --compile out") from error


@contextmanager
def _compile_errors_in_words(model: Any) -> Iterator[None]:
    """In the block a trunk that torch cannot compile, or a machine without a compiler, ends in one message."""
    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        kind = model.config.text_config.model_type
        advice = "leave --compile out"
        raise UsageError(f"--compile: this {kind} trunk cannot be compiled here ({reason}): {advice}") from error


def text_of(tokenizer: Any, ids: Sequence[int], stops: Sequence[str]) -> str:
    """The text of answer tokens, without white space around it. It ends with the stop text, if one is in it: the token that
    completed that text may say more."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends, default=len(text))].strip()


class TextPieces(BaseStreamer):
    """A streamer that writes an answer's text as its tokens become final: in the end exactly what `text_of` gives.

    transformers' own TextStreamer waits for the end of a word, forgets what stands before a line's end, and knows no stop texts.
    Here a piece is held back only while it may still change: white space at the end, and a character with bytes missing.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], write: Callable[[str], None]) -> None:
        self._tokenizer, self._stops, self._write = tokenizer, stops, write
        self._ids: list[int] = []
        self._prompt_is_next = True
        self.text = ""  # what was written

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self._ids.extend(value.flatten().tolist())
        self._go_on(text_of(self._tokenizer, self._ids, self._stops).rstrip(UNFINISHED).rstrip())

    def end(self) -> None:
        self._go_on(text_of(self._tokenizer, self._ids, self._stops))

    def _go_on(self, text: str) -> None:
        if len(text) > len(self.text):
            piece, self.text = text[len(self.text) :], text  # noted first: Ctrl-C may come while it is written
            self._write(piece)


# --- files of questions ------------------------------------------------------------------------------------------------------


def check_questions(decoder: Decoder, questions: Sequence[Question], settings: DecodeSettings) -> None:
    """Looks at every question as `answer_questions` will, so that what cannot be answered is known before the first is.

    Raises:
        UsageError: if the settings do not fit the checkpoint.
        DataError: naming file and line of questions whose images cannot be read or that do not fit the checkpoint.
    """
    check_settings(settings, decoder.model.config)
    limit, problems = context_length(decoder), []
    for question in questions:
        try:
            length = len(decoder.processor.encode_chat([_message(question)], add_generation_prompt=True).ids)
        except DataError as error:  # names its place
            problems.append(error)
        except (UsageError, ValueError) as error:
            problems.append(DataError(f"{question.source}: {error}"))
        else:
            if limit is not None and length + settings.max_new_tokens > limit:
                problems.append(DataError(f"{question.source}: {too_long(length, settings, limit)}"))
    if problems:
        raise summary(problems)


def answer_questions(
    decoder: Decoder, batches: Iterator[Sequence[Question]] | Sequence[Sequence[Question]], settings: DecodeSettings
) -> Iterator[tuple[Question, Answer]]:
    """Answers batch by batch, in order."""
    for batch in batches:
        answers = answer_chats(decoder, [[_message(question)] for question in batch], settings)
        yield from zip(batch, answers, strict=True)


def _message(question: Question) -> Message:
    images = [open_image(path, question.source) for path in question.images]
    return user_message(question.prompt, images, question.videos)
