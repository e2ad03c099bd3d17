"""Which processors of vision-language checkpoints are taken, what is refused with which words, and how large images are shown."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from native_processors import chat, image, native, read
from transformers import AutoTokenizer

from diffvl.config.recipe import Prepare
from diffvl.demo import standin_processors as standins
from diffvl.demo.standin_processors import PROCESSORS, make_processor_files
from diffvl.errors import CheckpointError, ConfigError, UnsupportedModelError
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.prepare import processor as reading
from diffvl.prepare.assemble import square_processor

# LLaVA-1.5 as it is published: nothing stands behind an answer.
WITHOUT_STOP = standins.VICUNA.replace("{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}", "{{ ' ' }}")
TEXT_ONLY = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def changed(file: Path, **changes: Any) -> None:
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**known, **changes}), encoding="utf-8")


@pytest.mark.parametrize("family", PROCESSORS)
def test_what_the_model_is_told(family: str):
    given = native(family)
    assert given.processor.images is not None
    row = given.facts.image_token_id
    assert given.processor.images.of((56, 56)).ids.count(row) >= 4
    assert (row == given.processor.image_token_id) != (family == "gemma3"), "its placeholder is another token than its rows"
    assert "pixel_values" in given.facts.image_inputs
    assert given.processor.stop_token in ("<|im_end|>", "</s>", "<end_of_turn>", "<end_of_utterance>")
    bos = {"llava": ["<s>"], "llava_next": ["<s>"], "gemma3": ["<bos>"]}
    assert given.processor.source is not None and given.processor.source["first_tokens"] == bos.get(family, [])
    ids = given.processor.encode_chat(chat("Hi"), add_generation_prompt=True).ids
    if family in bos:
        assert ids.count(ids[0]) == 1 and [given.processor.tokenizer.convert_ids_to_tokens(ids[0])] == bos[family]
    told = " ".join(given.facts.advice)
    assert ("takes no system turn" in told) == (family in ("llava_next", "paligemma"))
    assert ("could not be asked about a chat with no image" in told) == (family == "paligemma")
    assert given.facts.token_types == ("answers" if family == "paligemma" else "images")
    assert ("several images of one chat smaller" in told) == (family == "llava_onevision")


def test_older_files(tmp_path: Path):
    """A template in chat_template.json, the class beside the image processor's settings, those in the processor's file."""
    tokenizer = make_processor_files(tmp_path, "llava")
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": standins.VICUNA}), encoding="utf-8")
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    changed(tmp_path / "preprocessor_config.json", processor_class=settings.pop("processor_class"))
    (tmp_path / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    expected = native("llava").processor
    messages = chat([image(60, 70), "What?"], "This.")
    assert read(tmp_path, "llava", tokenizer)[0].encode_chat(messages) == expected.encode_chat(messages)
    image_processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(
        json.dumps({**settings, "processor_class": "LlavaProcessor", "image_processor": image_processor}), encoding="utf-8"
    )
    (tmp_path / "chat_template.json").unlink()
    changed(tmp_path / "tokenizer_config.json", chat_template=standins.VICUNA)
    assert read(tmp_path, "llava", tokenizer)[0].encode_chat(messages) == expected.encode_chat(messages)


# --- refusals ----------------------------------------------------------------------------------------------------------------


def template(text: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / "chat_template.jinja").write_text(text, encoding="utf-8")


def described(**changes: Any) -> Callable[[Path], Any]:
    return lambda directory: changed(directory / "processor_config.json", **changes)


def unnamed(name: str) -> Callable[[Path], Any]:
    def change(directory: Path) -> None:
        file = directory / "tokenizer_config.json"
        known = json.loads(file.read_text(encoding="utf-8"))
        del known[name]
        file.write_text(json.dumps(known), encoding="utf-8")

    return change


def without_tokens(*tokens: str) -> Callable[[Path], Any]:
    def change(directory: Path) -> None:
        look = standins.LOOKS["idefics3"]
        kept = tuple(token for token in look.tokens if token not in tokens)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(standins.LOOKS, "idefics3", standins.Look(look.processor, look.image_processor, look.template, kept))
            standins.processor_tokenizer("idefics3").save_pretrained(directory)

    return change


REFUSED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no template": (
        "llava",
        lambda directory: (directory / "chat_template.jinja").unlink(),
        "its tokenizer has no chat template, so prompts and answers cannot be told apart",
    ),
    "template of a text model": (
        "qwen2_vl",
        template(TEXT_ONLY),
        r"its chat template writes no <\|image_pad\|> for an image, so it was made for text alone; put the one of the published",
    ),
    "template for texts": (
        "qwen2_vl",
        template(
            TEXT_ONLY.replace(
                "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}",
                "{{ message['content'] + '' }}",
            )
        ),
        r"the chat template refuses this chat \(it takes no images in a turn of the role user\)",
    ),
    "template without a stop": (
        "llava_next",
        template(standins.INST.replace(" + eos_token", "")),
        "writes no special token after an answer, so decoding could not",
    ),
    "not prefix-stable": (
        "llava_onevision",
        template(standins.ONEVISION.replace("message['role'] + '\n'", "message['role'] + ' \n'")),
        "the chat template is not prefix-stable",
    ),
    "two placeholders for one image": (
        "qwen2_vl",
        template(standins.QWEN.replace("<|image_pad|>", "<|image_pad|><|image_pad|>")),
        "writes one of its own: 2 of them for 1 images",
    ),
    "torchvision for images": (
        "llava",
        lambda directory: changed(directory / "preprocessor_config.json", image_processor_type="Llama4ImageProcessor"),
        "its image processor needs torchvision: transformers has no form of it that works with Pillow",
    ),
    "torchvision for the processor": (
        "llava",
        described(processor_class="PixtralProcessor"),
        "its PixtralProcessor needs torchvision, even for still images",
    ),
    "own code": (
        "llava",
        described(processor_class="MyProcessor", auto_map={"AutoProcessor": "processing.MyProcessor"}),
        r"transformers has no processor for it \(MyProcessor\).*one that runs code of the checkpoint is not taken",
    ),
    "no processor": (
        "llava",
        described(processor_class="LlavaConfig"),
        r"transformers has no processor for it \(LlavaConfig\)",
    ),
    "special tokens are missing": (
        "idefics3",
        without_tokens("<fake_token_around_image>"),
        "its tokenizer lacks <fake_token_around_image>, which it writes for images; take the one published with it",
    ),
    "the placeholder is missing": (
        "llava",
        described(image_token="<picture>"),
        "LlavaProcessor cannot be used: ",
    ),
    "named tokens are missing": (
        "internvl",
        unnamed("start_image_token"),
        "its InternVLProcessor cannot be used: .*start_image_token",
    ),
    "no image processor": (
        "llava",
        lambda directory: (directory / "preprocessor_config.json").unlink(),
        "it has no image processor that can be read",
    ),
    "a setting is missing": (
        "llava",
        lambda directory: (directory / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}'),
        "its LlavaProcessor cannot be used: LlavaProcessor refuses an image of 64x64 pixels",
    ),
    "an image is one token": (
        "llava",
        described(patch_size=56, num_additional_image_tokens=1),
        "an image is one token in the text, so it is shown to the model in another way than by tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken(name: str, tmp_path: Path):
    family, change, says = REFUSED[name]
    tokenizer = make_processor_files(tmp_path, family)
    change(tmp_path)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=says) as caught:
        read(tmp_path, family, tokenizer)
    assert str(tmp_path) in str(caught.value) and "\n\n" not in str(caught.value)


def test_a_model_that_finds_images_by_another_token(tmp_path: Path):
    make_processor_files(tmp_path, "llava")

    class Other:
        @staticmethod
        def convert_tokens_to_ids(_: str) -> int:
            return 5

    with pytest.raises(UnsupportedModelError, match="its processor does not write the token 5, by which the model finds images"):
        read(tmp_path, "llava", Other())


def test_other_tokens_than_its_own_processor_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The proof notices a begin-of-text token that is lost, and pixels that differ."""
    tokenizer = make_processor_files(tmp_path, "llava")
    with monkeypatch.context() as patch:
        patch.setattr(reading, "_first_tokens", lambda _: [])
        with pytest.raises(UnsupportedModelError, match="a chat with one image has other tokens than the checkpoint's own"):
            read(tmp_path, "llava", tokenizer)
    kept = DiffVLProcessor.pixels
    monkeypatch.setattr(DiffVLProcessor, "pixels", lambda *given: {name: one + 1 for name, one in kept(*given).items()})
    with pytest.raises(UnsupportedModelError, match="a chat with one image has other pixel_values than the checkpoint's own"):
        read(tmp_path, "llava", tokenizer)


def test_the_family_has_a_template_instead(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """As LLaVA-1.5 needs one: its own writes no stop."""
    tokenizer = make_processor_files(tmp_path, "llava")
    template(WITHOUT_STOP)(tmp_path)
    with caplog.at_level(logging.WARNING):
        found, _ = read(tmp_path, "llava", tokenizer)
    assert "so decoding could not stop; let it write one; the family's chat template takes its place" in caplog.text
    messages = chat([image(60, 70), "What?"], "This.")
    assert found.encode_chat(messages) == native("llava").processor.encode_chat(messages)


def test_a_system_turn_in_the_first_question(tmp_path: Path):
    tokenizer = make_processor_files(tmp_path, "llava_next")
    found, facts = read(tmp_path, "llava_next", tokenizer, system_turn="first_question")
    assert not facts.advice
    shown = image(60, 70)
    system = {"role": "system", "content": "Be brief."}
    plain = found.encode_chat(chat([shown, "Be brief.\n\nWhat?"], "This."))
    assert found.encode_chat([system, *chat(["What?", shown], "This.")]).ids == plain.ids
    assert "[INST] <image>\nBe brief.\n\n What? [/INST]" in found.encode_chat([system, *chat([shown, "What?"])]).rendered
    assert found.encode_chat([{"role": "system", "content": ""}, *chat([shown, "What?"])]).ids == (
        found.encode_chat(chat([shown, "What?"])).ids
    )


# --- how large images are shown ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_pixels_are_limited(family: str, tmp_path: Path):
    """In training and decoding: what is written has the limits."""
    tokenizer = make_processor_files(tmp_path / "source", family)
    low, high = 56 * 56, 112 * 112
    found, _ = read(tmp_path / "source", family, tokenizer, min_pixels=low, max_pixels=high)
    found.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "processor_config.json").read_text())["image_processor"]["size"]
    assert written == {"shortest_edge": low, "longest_edge": high}
    for processor in (found, DiffVLProcessor.from_pretrained(tmp_path / "saved")):
        for size in ((20, 30), (60, 60), (500, 700), (90, 30)):
            pixels = processor.pixels([image(*size)])
            patches = int(pixels["image_grid_thw"].prod())
            assert low <= patches * 14 * 14 <= high
            assert len(processor.images.of(size).ids) == patches // 4  # type: ignore[union-attr]
    only, _ = read(tmp_path / "source", family, tokenizer, max_pixels=high)
    assert dict(only.image_processor.size) == {"shortest_edge": standins.MIN_PIXELS, "longest_edge": high}
    with pytest.raises(ConfigError, match="prepare.min_pixels: 3136 pixels at least, but 100 at most; the one that is not set"):
        read(tmp_path / "source", family, tokenizer, max_pixels=100)


@pytest.mark.parametrize("family", [family for family in PROCESSORS if not family.startswith("qwen")])
def test_processors_that_do_not_count_pixels(family: str, tmp_path: Path):
    tokenizer = make_processor_files(tmp_path, family)
    with pytest.raises(ConfigError, match=r"does not resize images to a number of pixels, but by .*size: .*: leave them out"):
        read(tmp_path, family, tokenizer, max_pixels=10000)


def test_limits_of_the_recipe():
    assert Prepare(min_pixels=5, max_pixels=5).max_pixels == 5
    with pytest.raises(ValueError, match="min_pixels .6. must not be above max_pixels .5."):
        Prepare(min_pixels=6, max_pixels=5)
    nothing: Any = None
    with pytest.raises(ConfigError, match="are for vision-language models; here every image is made a square"):
        square_processor(nothing, nothing, Prepare(max_pixels=5))


def test_the_mask_token_may_come_later(tmp_path: Path):
    """`prepare` adds it to the tokenizer that the processor has already."""
    tokenizer = make_processor_files(tmp_path / "source", "idefics3")
    found, _ = read(tmp_path / "source", "idefics3", tokenizer)
    messages = chat([image(60, 70), "What?"], "This.")
    before = found.encode_chat(messages)
    found.tokenizer.add_special_tokens({"mask_token": "<|MASK|>"})
    assert found.encode_chat(messages) == before
    with pytest.raises(ValueError, match="which stands for a token not known yet"):
        found.encode_chat(chat("<|MASK|>"))
    found.save_pretrained(tmp_path / "saved")
    again = DiffVLProcessor.from_pretrained(tmp_path / "saved")
    assert again.encode_chat(messages) == before and again.tokenizer.mask_token == "<|MASK|>"
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").mask_token_id == found.tokenizer.mask_token_id
