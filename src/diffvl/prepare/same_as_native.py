"""The proof that chats are read as the checkpoint's own processor reads them: the same tokens, the same pixels.

Asked of it are chats with one image, with several and with none. It gets them as its users give them, through its own
`apply_chat_template`; we expand images one by one.
"""

import logging
from typing import Any

import torch
from PIL import Image

from diffvl.errors import UnsupportedModelError, first_line
from diffvl.hub.clips_diffvl import Clip, ClipSize
from diffvl.hub.pixels_diffvl import VIDEO_FRAMES
from diffvl.hub.processing_diffvl import TEXT_INPUTS, DiffVLProcessor
from diffvl.hub.source_diffvl import FAULTS

log = logging.getLogger(__name__)

SIZES = ((90, 120), (140, 64), (56, 56))  # height and width of the images
CLIPS = (ClipSize(60, 84, tuple(range(0, 48, 6)), 48, 12.0), ClipSize(56, 48, (0, 2, 5, 7, 9, 11, 13, 17), 20, 8.0))


def require_same(model: str, processor: DiffVLProcessor, inner: Any, is_plain: bool = False) -> list[str]:
    """Compares chats.

    Args:
        inner: the checkpoint's own processor.
        is_plain: it has no chat template, and writes around a question by itself what one would write.
    Returns:
        what could not be compared, or differs for several images in one chat, in words.
    Raises:
        UnsupportedModelError: if a chat with one image or none has other tokens or other pixels.
    """
    advice = []
    for name, whole in chats().items():
        chat = whole[:1] if is_plain else whole
        try:
            native = _plain(inner, processor, chat) if is_plain else _native(inner, processor, chat)
        except (ImportError, *FAULTS) as error:
            advice.append(f"its own processor could not be asked about a chat with {name} ({first_line(error)})")
            continue
        ours = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
        if name == "several images" and not _same_ids(ours, native):
            if not _same_ids(ours, _flat(inner, processor, chat)):
                raise _differs(model, name, "tokens")
            advice.append(
                "its own processor shows several images of one chat smaller than a single one; here each is shown as a single one"
            )
        elif not _same_ids(ours, native):
            raise _differs(model, name, "tokens")
        elif name == "one image" and (wrong := _other_pixels(ours, native)):
            raise _differs(model, name, wrong)
        elif name == "several images" and (wrong := _other_numbers(ours, native)):
            raise UnsupportedModelError(
                f"{model}: {wrong} of several images is not what those of single ones give side by side, so images cannot be "
                "joined into batches",
                "processor",
            )
    return advice


def require_same_videos(processor: DiffVLProcessor) -> None:
    """Compares chats with videos: the checkpoint's own processor gets the same frames and the rendered text.

    Raises:
        UnsupportedModelError: if a chat has other tokens or other pixels.
    """
    assert processor.images is not None
    clips = [_ramp(size) for size in CLIPS]
    image = {"type": "image", "image": Image.linear_gradient("L").resize((48, 40)).convert("RGB")}
    first, second = ({"type": "video", "video": clip} for clip in clips)
    asked = {"type": "text", "text": "What happens? Say 3 words."}
    compared = {"a video": [first, asked], "several videos": [first, {"type": "text", "text": "and "}, second, asked]}
    for name, parts in {**compared, "a video and an image": [second, image, asked]}.items():
        chat = [{"role": "user", "content": parts}]
        ours = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        shown = [part["video"] for part in parts if part["type"] == "video"]
        native = processor.images.processor(
            text=[text],
            images=[part["image"] for part in parts if part["type"] == "image"] or None,
            videos=[clip.frames for clip in shown],
            video_metadata=[clip.size.metadata for clip in shown],
            do_sample_frames=False,
            add_special_tokens=not text.startswith(processor.images.first_text),
            verbose=False,
            return_tensors="pt",
        )
        if not _same_ids(ours, native):
            raise _differs("its processor", name, "tokens")
        # Some of them give an image and a video in one chat the same name, of which one is lost.
        if name == "a video" and (wrong := _other_pixels(ours, native)):
            raise _differs("its processor", name, wrong)


def _ramp(size: ClipSize) -> Clip:
    """A video in which every frame is another, and every patch."""
    values = torch.arange(len(size.indices) * size.height * size.width).view(-1, 1, size.height, size.width) * 7 % 251
    return Clip(values.expand(-1, 3, -1, -1).to(torch.uint8).contiguous(), size)


def chats() -> dict[str, list[dict[str, Any]]]:
    """Gives the chats that are compared."""
    first, second, third = (
        {"type": "image", "image": Image.linear_gradient("L").resize((width, height)).convert("RGB")} for height, width in SIZES
    )
    asked = {"type": "text", "text": "What is this? Say 3 words."}
    answered = {"role": "assistant", "content": [{"type": "text", "text": "A grey ramp."}]}
    return {
        "one image": [{"role": "user", "content": [first, asked]}],
        "no image": [{"role": "user", "content": [asked]}],
        "several images": [
            {"role": "user", "content": [first, {"type": "text", "text": "and "}, second, asked]},
            answered,
            {"role": "user", "content": [{"type": "text", "text": "And these?"}, third, first]},
        ],
    }


def _native(inner: Any, processor: DiffVLProcessor, chat: list[dict[str, Any]]) -> Any:
    return inner.apply_chat_template(
        chat,
        chat_template=processor.encoder.template.source,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def _plain(inner: Any, processor: DiffVLProcessor, chat: list[dict[str, Any]]) -> Any:
    """Asks it with the text of a question, an image's token in its place."""
    parts = chat[0]["content"]
    text = "".join(part.get("text", processor.image_token) for part in parts)
    images = [part["image"] for part in parts if part["type"] == "image"]
    return inner(text=[text], images=[images] if images else None, return_tensors="pt")


def _flat(inner: Any, processor: DiffVLProcessor, chat: list[dict[str, Any]]) -> Any:
    """Asks it with the images in one list, each by itself."""
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    images = [part["image"] for message in chat for part in message["content"] if part["type"] == "image"]
    bos = inner.tokenizer.bos_token
    add = bos is None or not text.startswith(bos)
    return inner(text=[text], images=images, add_special_tokens=add, return_tensors="pt")


def _same_ids(ours: Any, native: Any) -> bool:
    return ours["input_ids"].tolist() == torch.as_tensor(native["input_ids"]).tolist()


def _other_pixels(ours: Any, native: Any) -> str:
    """Names the first pixel tensor that is not the same; empty if all are."""
    for name, value in ours.items():
        if name in ("input_ids", "attention_mask", "answer_index", VIDEO_FRAMES):
            continue
        if name not in native or not torch.equal(value, torch.as_tensor(native[name])):
            return name
    return ""


def _other_numbers(ours: Any, native: Any) -> str:
    """Names the first tensor of whole numbers that is of the same form but says something else; empty if none does. It may count
    across images, as places among the patches of all."""
    for name, value in ours.items():
        theirs = native.get(name)
        if name in TEXT_INPUTS or theirs is None or value.is_floating_point():
            continue
        theirs = torch.as_tensor(theirs)
        if theirs.shape == value.shape and not torch.equal(value, theirs):
            return name
    return ""


def _differs(model: str, name: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{model}: a chat with {name} has other {what} than the checkpoint's own processor gives it: what it writes around an "
        "image depends on more than the image",
        "processor",
    )
