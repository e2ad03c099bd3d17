"""Tokenizer, image processor and chat template of tiny vision-language checkpoints, as files in the shape of a hub snapshot.

Place in the flow: they lie beside the weights that `standin_vlms` writes, so that the native route runs offline. Each family has
the processor class, the special tokens and the way of writing images that its published checkpoints have; patches and tiles are
of the sizes that the tiny towers take. The tokenizer is that of `standins`, over all bytes.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from diffvl.demo.standins import make_tokenizer
from diffvl.errors import UsageError

PATCH, IMAGE = 14, 56  # pixels of a patch; of an image, or of a tile where images are cut into tiles
PLAIN_TOKENS, TILE_TOKENS = 16, 4  # of IMAGE x IMAGE pixels: a token a patch, or one for 2 x 2 patches
MIN_PIXELS, MAX_PIXELS = IMAGE * IMAGE, 6 * IMAGE * IMAGE  # where an image keeps its shape
SHAPES = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE], [2 * IMAGE, 2 * IMAGE]]  # that tiled images are cut to

_SQUARE = {"height": IMAGE, "width": IMAGE}
_ROWS_AND_COLUMNS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]

# Parts in their order, each image between brackets; a system turn where there is none.
QWEN = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_VIDEOS_FIRST = "{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
_IMAGES_FIRST = "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
_TEXTS = "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
# Images first, each on a line of its own; no bos, which the tokenizer adds. The published template forgets the stop.
VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    + _IMAGES_FIRST
    + _TEXTS
    + "{{ part['text'] }}{% if message['role'] != 'assistant' %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# As Mistral's: nothing stands before an answer.
INST = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    + _IMAGES_FIRST
    + _TEXTS
    + "{{ part['text'] + ' ' }}{% endfor %}{{ '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    + _IMAGES_FIRST
    + _VIDEOS_FIRST
    + _TEXTS
    + "{{ part['text'] }}"
    "{% endfor %}{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INTERNVL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The system turn goes into the first question; texts are stripped; a bos.
GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% if messages[0]['content'] is string %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% else %}{% set first = messages[0]['content'][0]['text'] + '\n\n' %}{% endif %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ first if loop.first else '' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# What stands behind the role depends on whether the turn begins with an image.
IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'video' %}{{ '<video>' }}{% else %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class Look:
    """How a family looks at images. tokens: special tokens beside the tokenizer's own. named: attribute of the tokenizer -> the
    token that a processor asks for by it. bos: whether the tokenizer puts its first token before a text. settings: of the
    processor. video: of its video processor, class included."""

    processor: str
    image_processor: Callable[[], BaseImageProcessor]
    template: str
    tokens: tuple[str, ...]
    named: dict[str, str] = field(default_factory=dict)
    base: str = "llama"
    bos: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    video: dict[str, Any] | None = None


_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
_CLIP = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def _qwen(patch_size: int = PATCH) -> BaseImageProcessor:
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    return Qwen2VLImageProcessorPil(patch_size=patch_size, size=size)


def _next() -> BaseImageProcessor:
    return LlavaNextImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size=_SQUARE, image_grid_pinpoints=SHAPES)


_IDEFICS_TOKENS = ("<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>", *_ROWS_AND_COLUMNS)
_IDEFICS_SIZES: dict[str, Any] = {"size": {"longest_edge": 2 * IMAGE}, "max_image_size": {"longest_edge": IMAGE}}


# The published files of Qwen's older checkpoints name no rate, those of the newer ones one of 2.
_QWEN_VIDEO = {
    "video_processor_type": "Qwen2VLVideoProcessor",
    "patch_size": PATCH,
    "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
}
_QWEN3_VIDEO = {
    "video_processor_type": "Qwen3VLVideoProcessor",
    "patch_size": PATCH,
    "size": {"shortest_edge": MIN_PIXELS, "longest_edge": 4 * MAX_PIXELS},
}
LOOKS: dict[str, Look] = {
    "qwen2_vl": Look("Qwen2VLProcessor", _qwen, QWEN, _QWEN_TOKENS, video=_QWEN_VIDEO),
    "qwen2_5_vl": Look("Qwen2_5_VLProcessor", _qwen, QWEN, _QWEN_TOKENS, video=_QWEN_VIDEO),
    "qwen3_vl": Look("Qwen3VLProcessor", _qwen, QWEN, _QWEN_TOKENS, video=_QWEN3_VIDEO),
    "llava": Look(
        "LlavaProcessor",
        lambda: LlavaImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size=_SQUARE),
        VICUNA,
        ("<image>",),
        base="vicuna",
        bos=True,
        settings=_CLIP,
    ),
    "llava_next": Look("LlavaNextProcessor", _next, INST, ("<image>",), base="vicuna", bos=True, settings=_CLIP),
    "llava_onevision": Look(
        "LlavaOnevisionProcessor",
        lambda: LlavaOnevisionImageProcessorPil(size=_SQUARE, image_grid_pinpoints=SHAPES),
        ONEVISION,
        ("<image>", "<video>"),
        settings={"num_image_tokens": PLAIN_TOKENS, "vision_feature_select_strategy": "full"},
        video={"video_processor_type": "LlavaOnevisionVideoProcessor", "size": _SQUARE, "num_frames": 4},
    ),
    "internvl": Look(
        "InternVLProcessor",
        lambda: GotOcr2ImageProcessorPil(size=_SQUARE, crop_to_patches=True, min_patches=1, max_patches=4),
        INTERNVL,
        ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        settings={"image_seq_length": TILE_TOKENS},
        video={"video_processor_type": "InternVLVideoProcessor", "size": _SQUARE, "num_frames": 4},
    ),
    "gemma3": Look(
        "Gemma3Processor",
        lambda: Gemma3ImageProcessorPil(size=_SQUARE),
        GEMMA3,
        ("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        base="gemma2",
        bos=True,
        settings={"image_seq_length": PLAIN_TOKENS},
    ),
    # No chat template: the processor writes a question by itself, and answers end with the tokenizer's own stop.
    "paligemma": Look(
        "PaliGemmaProcessor",
        lambda: SiglipImageProcessorPil(size=_SQUARE, image_seq_length=PLAIN_TOKENS),
        "",
        ("<image>", *EXTRA_TOKENS),
        base="gemma2",
    ),
    # A space between an image and a word; one token between two images that stand side by side.
    "idefics2": Look(
        "Idefics2Processor",
        lambda: Idefics2ImageProcessorPil(do_image_splitting=False, size={"shortest_edge": IMAGE // 2, "longest_edge": IMAGE}),
        IDEFICS,
        ("<end_of_utterance>", "<fake_token_around_image>", "<image>"),
        settings={"image_seq_len": TILE_TOKENS},
    ),
    "idefics3": Look(
        "Idefics3Processor",
        lambda: Idefics3ImageProcessorPil(**_IDEFICS_SIZES),
        IDEFICS,
        _IDEFICS_TOKENS,
        settings={"image_seq_len": TILE_TOKENS},
    ),
    "smolvlm": Look(
        "SmolVLMProcessor",
        lambda: SmolVLMImageProcessorPil(**_IDEFICS_SIZES),
        IDEFICS,
        (*_IDEFICS_TOKENS, "<video>"),
        settings={"image_seq_len": TILE_TOKENS},
        video={
            "video_processor_type": "SmolVLMVideoProcessor",
            "size": {"longest_edge": IMAGE},
            "max_image_size": {"longest_edge": IMAGE},
            "num_frames": 8,
            "fps": 1,
        },
    ),
}
PROCESSORS: tuple[str, ...] = tuple(LOOKS)


def make_processor_files(directory: Path, family: str) -> PreTrainedTokenizerFast:
    """Writes tokenizer, image processor, processor settings and chat template of a family (one of PROCESSORS); returns the
    tokenizer."""
    if family not in LOOKS:
        raise UsageError(f"no stand-in processor of type {family!r}: expected one of {', '.join(PROCESSORS)}")
    look = LOOKS[family]
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = processor_tokenizer(family)
    tokenizer.save_pretrained(directory)
    look.image_processor().save_pretrained(directory)
    settings = {"processor_class": look.processor, **look.settings}
    (directory / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if look.video is not None:
        (directory / "video_preprocessor_config.json").write_text(json.dumps(look.video, indent=2) + "\n", encoding="utf-8")
    if look.template:
        (directory / "chat_template.jinja").write_text(look.template, encoding="utf-8")
    return tokenizer


def processor_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Makes the tokenizer of a family, without a chat template: that is the processor's."""
    look = LOOKS[family]
    base = make_tokenizer("llama" if look.base == "vicuna" else look.base)
    backend = base.backend_tokenizer
    names: dict[str, Any] = {"pad_token": base.pad_token, "eos_token": base.eos_token}
    special = look.tokens
    if look.base == "vicuna":
        names, special = {"pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, ("<unk>", "<s>", "</s>", *special)
    elif look.base == "gemma2":
        names["bos_token"] = base.bos_token
    elif look.template == IDEFICS:
        names["eos_token"] = "<end_of_utterance>"
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    if look.bos:
        bos = str(names["bos_token"])
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    named = {"extra_special_tokens": look.named} if look.named else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, model_max_length=base.model_max_length, **names, **named
    )
