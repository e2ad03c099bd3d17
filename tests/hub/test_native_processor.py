"""The processor of a vision-language checkpoint: chats and images are what the checkpoint's own processor makes of them."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from native_processors import CHATS, Native, chat, image, native
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from diffvl.demo.standin_processors import LOOKS, PROCESSORS, processor_tokenizer
from diffvl.hub import source_diffvl
from diffvl.hub.chat_diffvl import ChatEncoding
from diffvl.hub.pixels_diffvl import join_pixels
from diffvl.hub.processing_diffvl import DiffVLProcessor, pixels_in
from diffvl.hub.source_diffvl import ImageRefusedError, build_processor, placeholder_of
from diffvl.store.checkpoint import HUB, HUB_FILES, PROCESSOR_MAP

SIZES = ((56, 56), (64, 64), (60, 100), (200, 60), (333, 500), (20, 31), (112, 112), (57, 113))


# Packed patches with M-RoPE, tiles with newlines, spans, nested pixels, and one that takes questions alone.
DIFFERENT = ("qwen3_vl", "llava_next", "gemma3", "idefics3", "paligemma")


@pytest.fixture(params=[pytest.param(one, marks=() if one in DIFFERENT else pytest.mark.slow) for one in PROCESSORS])
def one(request: pytest.FixtureRequest) -> Native:
    return native(request.param)


def images_in(messages: list[dict[str, Any]]) -> list[Any]:
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]


def asked_natively(one: Native, messages: list[dict[str, Any]]) -> Any:
    """What the checkpoint's own processor makes of a chat, images in one list."""
    if not LOOKS[one.family].template:  # it writes around a question what belongs there
        parts = messages[0]["content"]
        text = "".join(part.get("text", one.processor.image_token) for part in parts)
        return one.inner(text=[text], images=[images_in(messages)], return_tensors="pt")
    text = one.processor.apply_chat_template(messages, add_generation_prompt=True)
    bos = one.inner.tokenizer.bos_token
    special = bos is None or not text.startswith(bos)
    return one.inner(text=[text], images=images_in(messages) or None, add_special_tokens=special, return_tensors="pt")


@pytest.mark.parametrize("name", CHATS)
def test_ids_and_pixels_are_its_own(one: Native, name: str):
    messages = CHATS[name]
    if not LOOKS[one.family].template:
        if name == "none":
            pytest.skip("it takes no text without an image")
        messages = messages[:1]
    found = one.processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    expected = asked_natively(one, messages)
    assert found["input_ids"].tolist() == expected["input_ids"].tolist()
    assert sorted(pixels_in(found)) == (one.facts.image_inputs if images_in(messages) else [])
    for key, value in pixels_in(found).items():
        ours, theirs = value, expected[key]
        if one.family in (
            "idefics2",
            "idefics3",
            "smolvlm",
        ):  # it nests the images of a text; either form is filled up with zeros
            ours, theirs = (torch.stack([tile for tile in form.flatten(0, 1) if tile.any()]) for form in (ours, theirs))
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), key


@pytest.mark.parametrize("name", ["one", "several", "rounds"])
def test_ids_are_those_of_its_chat_template(one: Native, name: str):
    """Asked as its users ask it. LLaVA-OneVision shows several images of one chat smaller than a single one; we do not."""
    if not LOOKS[one.family].template:
        pytest.skip("it has none")
    template = one.processor.encoder.template.source
    expected = one.inner.apply_chat_template(
        CHATS[name], chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    found = one.processor.apply_chat_template(CHATS[name], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert (found.tolist() == expected["input_ids"].tolist()) != (one.family == "llava_onevision" and name == "several")


def test_lengths_follow_from_sizes(one: Native):
    """Whatever is in the image; and the text is the one that the tokens stand for."""
    for number, (height, width) in enumerate(SIZES):
        shown = image(height, width, number)
        messages = chat([shown, "What?"], "This.", ["Again: ", shown])
        bare = chat(["What?"], "This.", "Again: ")
        bare[0]["content"].insert(0, {"type": "image"})
        bare[2]["content"].append({"type": "image"})
        encoding = one.processor.encode_chat(bare, sizes=[(height, width)] * 2)
        found = one.processor.apply_chat_template(messages, tokenize=True)
        assert encoding.ids == found["input_ids"][0].tolist()
        assert one.processor.encode_chat(messages) == encoding, "the images say their sizes themselves"
        said = one.processor.tokenizer.decode(encoding.ids)
        assert said.endswith(encoding.text) and said.removesuffix(encoding.text) in ("", "<s>")


def answers_in(processor: DiffVLProcessor, encoding: ChatEncoding) -> list[str]:
    marks = torch.tensor(encoding.answer)
    return [processor.tokenizer.decode(torch.tensor(encoding.ids)[marks == one]) for one in range(1, max(encoding.answer) + 1)]


@pytest.mark.parametrize("text", ["Red.", "  Red. \n", "Ünï: 90 ° 🙂", "a\n\nb", "12"])
def test_answers_and_prompts(one: Native, text: str):
    """An answer is its text and its stop; its prompt has the same tokens alone as in the whole chat."""
    messages = chat([image(60, 100), "What?"], text, ["And ", image(30, 40, 1), " this?"], text, "Sure?", text)
    whole = one.processor.encode_chat(messages)
    for answer in answers_in(one.processor, whole):
        assert answer.strip() == f"{text.strip()}{one.processor.stop_token}" or answer.strip().startswith(text.strip())
        assert answer.endswith(one.processor.stop_token) and answer.count(one.processor.stop_token) == 1
    for number, turn in enumerate((1, 3, 5), 1):
        prompt = one.processor.encode_chat(messages[:turn], add_generation_prompt=True)
        length = len(prompt.ids)
        assert whole.ids[:length] == prompt.ids and whole.answer[:length] == prompt.answer
        assert whole.answer[length] == number


def test_rendered_text_gives_what_a_chat_gives(one: Native):
    chats = [CHATS["rounds"], CHATS["none"], CHATS["one"]]
    expected = one.processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)
    texts = one.processor.apply_chat_template(chats, add_generation_prompt=True)
    shown = [image for messages in chats for image in images_in(messages)]
    if not one.processor.encoder.generation_prompt:
        with pytest.raises(ValueError, match="this chat template writes nothing before an answer"):
            one.processor(text=texts, images=shown)
        return
    found: Any = one.processor(text=texts, images=shown, padding=True, padding_side="left", return_tensors="pt")
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    alone: Any = one.processor(text=texts[1])
    assert alone["input_ids"][0] == one.processor.encode_chat(CHATS["none"], add_generation_prompt=True).ids


def test_a_saved_one_is_the_same(one: Native, tmp_path: Path):
    one.processor.save_pretrained(tmp_path)
    assert "Absent" not in "".join(path.read_text() for path in tmp_path.glob("*.json*") if path.name != "tokenizer.json")
    saved = json.loads((tmp_path / "processor_config.json").read_text())["source"]
    assert saved == one.processor.source and saved["class"] == LOOKS[one.family].processor and saved["backend"] == "pil"
    for twin in (
        DiffVLProcessor.from_pretrained(tmp_path),
        copy.deepcopy(one.processor),
        pickle.loads(pickle.dumps(one.processor)),
    ):
        assert twin.images is not one.processor.images
        for messages in CHATS.values():
            found, expected = (
                each.apply_chat_template(messages, tokenize=True, add_generation_prompt=True) for each in (twin, one.processor)
            )
            assert all(torch.equal(found[key], expected[key]) for key in expected) and set(found) == set(expected)


CLEAN = """
import json, sys
from PIL import Image
from transformers import AutoProcessor
found = {}
for directory in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    image = Image.linear_gradient("L").resize((120, 70)).convert("RGB")
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=True, add_generation_prompt=True)
    found[directory] = {name: value.flatten().tolist()[:4000] for name, value in inputs.items()}
assert "diffvl" not in sys.modules and "torchvision" not in sys.modules
print(json.dumps(found))
"""


@pytest.mark.slow
def test_it_works_where_diffvl_is_not(tmp_path: Path):
    """In a clean process, from what lies beside an exported checkpoint."""
    families = ("qwen2_vl", "internvl", "gemma3", "smolvlm")  # tokens of the tokenizer by name, line ends, a missing package
    for family in families:
        directory = tmp_path / family
        native(family).processor.save_pretrained(directory)
        file = directory / "processor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": PROCESSOR_MAP}))
        for name in HUB_FILES:
            shutil.copyfile(HUB / name, directory / name)
    directories = [str(tmp_path / family) for family in families]
    environment = {"PATH": "/usr/bin", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", CLEAN, *directories], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    for family, directory in zip(families, directories, strict=True):
        image = Image.linear_gradient("L").resize((120, 70)).convert("RGB")
        expected = native(family).processor.apply_chat_template(chat([image, "What?"]), tokenize=True, add_generation_prompt=True)
        assert found[directory] == {name: value.flatten().tolist()[:4000] for name, value in expected.items()}


# --- what an image is in the text --------------------------------------------------------------------------------------------


def merging(family: str) -> PreTrainedTokenizerFast:
    """The family's tokenizer with tokens for several line ends, as all large vocabularies have them."""
    plain: Any = processor_tokenizer(family)
    state = json.loads(plain.backend_tokenizer.to_str())
    model, special = state["model"], [AddedToken(one["content"], special=True, normalized=False) for one in state["added_tokens"]]
    for left, right in (("Ċ", "Ċ"), ("ĊĊ", "Ċ"), (".", "Ċ")):
        model["vocab"][left + right] = len(model["vocab"])
        model["merges"].append([left, right])
    state |= {"added_tokens": [], "post_processor": None}
    state["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens(special)
    names = {name: getattr(plain, name) for name in ("bos_token", "eos_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=LOOKS[family].named, **names)


@pytest.mark.parametrize("text", ["Look.\n", "\n", "\n\n", "Hm"])
def test_line_ends_beside_an_image(text: str):
    """Gemma's processor writes line ends around an image, which join those of the chat into one token."""
    given = native("gemma3")
    tokenizer = merging("gemma3")
    # Texts as they are: the family's own template would strip them.
    tokenizer.chat_template = given.processor.tokenizer.chat_template.replace("| trim ", "")
    inner = build_processor("Gemma3Processor", LOOKS["gemma3"].settings, given.processor.image_processor, tokenizer)
    processor = DiffVLProcessor(
        given.processor.image_processor,
        tokenizer,
        image_token=given.processor.image_token,
        image_tokens=0,
        stop_token=given.processor.stop_token,
        source=given.processor.source,
    )
    messages = chat([text, image(60, 70), f"{text}What?"], "This.\n", [image(30, 50), "\nAnd this?", image(30, 50)])
    encoding = processor.encode_chat(messages, add_generation_prompt=True)
    expected = asked_natively(given._replace(processor=processor, inner=inner), messages)["input_ids"][0].tolist()
    assert encoding.ids == expected
    assert answers_in(processor, encoding) == ["This.\n<end_of_turn>"]
    if text != "Hm":
        assert tokenizer.convert_tokens_to_ids("ĊĊĊ") in encoding.ids, "a token that reaches from the text into the image's"


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch):
    given = native("qwen2_vl")
    images = copy.deepcopy(given.processor).images
    assert isinstance(images, source_diffvl.SourceImages)
    asked = []
    monkeypatch.setattr(images, "inputs", lambda *_, call=images.inputs, **more: asked.append(1) or call(*_, **more))
    texts = [images.of((56, 56)), images.of((57, 56)), images.of((56, 57)), images.of((56, 56))]
    assert len(asked) == 3 and all(text is texts[0] for text in texts), "equal texts are one object"
    monkeypatch.setattr(source_diffvl, "MAX_SIZES", 4)
    for height in range(60, 80):
        images.of((height, 60))
    assert len(images._by_size) <= 4


def test_refused_images():
    processor = native("qwen2_vl").processor
    says = r"Qwen2VLProcessor refuses an image of 2000x5 pixels: absolute aspect ratio must be smaller than 200"
    with pytest.raises(ImageRefusedError, match=says):
        processor.encode_chat(chat([image(5, 2000), "What?"]))
    with pytest.raises(ImageRefusedError, match=says):
        processor.pixels([image(5, 2000)])


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "internvl", "idefics3"])
def test_tokens_of_images_in_a_text_are_refused(family: str):
    processor = native(family).processor
    assert processor.images is not None
    with pytest.raises(ValueError, match="which stands for an image: give images as parts"):
        processor.encode_chat(chat(f"What is {processor.image_token}?"))
    for token in processor.images.tokens & set(processor.tokenizer.get_added_vocab()):
        with pytest.raises(ValueError, match="a control token of the model"):
            processor.encode_chat(chat(f"What is {token}?"))


def test_a_placeholder_may_be_another_token_than_the_rows():
    assert placeholder_of(native("internvl").inner) == "<IMG_CONTEXT>"
    assert placeholder_of(SimpleNamespace(image_token="<row>", image_placeholder_token="<image>")) == "<image>"
    assert placeholder_of(SimpleNamespace()) is None


def test_sizes_and_images_must_match():
    processor = native("llava").processor
    bare = chat("What?")
    bare[0]["content"].insert(0, {"type": "image"})
    with pytest.raises(ValueError, match="0 images are given beside the messages, but 1 of their 1 image parts carry none"):
        processor.encode_chat(bare)
    with pytest.raises(ValueError, match="the sizes of 2 images are given for the 1 images of the chat"):
        processor.encode_chat(bare, sizes=[(5, 5), (6, 6)])
    text = processor.apply_chat_template(bare, add_generation_prompt=True)
    with pytest.raises(ValueError, match="1 images more than '<image>' in the texts"):
        processor(text=text, images=[image(9, 9), image(9, 9)])
    with pytest.raises(ValueError, match="the sizes of 0 images are given for the 1 images"):
        processor(text=text)
    with pytest.raises(ValueError, match="truncation is not taken here: texts are tokenised as they are in training"):
        processor(text=text, images=[image(9, 9)], truncation=True)
    with pytest.raises(ValueError, match="an answer holds an image"):
        processor.encode_chat(chat("What?", [image(9, 9)]))
    assert set(processor(images=[image(9, 9)])) == {"pixel_values"}


def test_empty_texts_say_nothing():
    """One template writes a space for an empty text, another looks at which part is the first."""
    for family in ("llava", "idefics3"):
        processor = native(family).processor
        shown = image(50, 60)
        expected = processor.encode_chat(chat([shown, "What?"]))
        assert processor.encode_chat(chat(["", shown, "", "What?"])) == expected
        assert processor.encode_chat(chat("")).ids == processor.encode_chat([{"role": "user", "content": []}]).ids


# --- pixels ------------------------------------------------------------------------------------------------------------------


def test_pixels_are_joined_and_filled_up():
    one = {"pixel_values": torch.ones(1, 2, 3, 4), "grid": torch.tensor([[1, 2, 3]])}
    other = {"pixel_values": torch.full((2, 5, 1, 4), 2.0), "grid": torch.tensor([[4, 5, 6], [7, 8, 9]])}
    joined = join_pixels([one, {}, other])
    assert joined["grid"].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert joined["pixel_values"].shape == (3, 5, 3, 4) and joined["pixel_values"].sum() == 24 + 2 * 40
    assert torch.equal(joined["pixel_values"][:1, :2, :3], one["pixel_values"])
    assert torch.equal(joined["pixel_values"][1:, :, :1], other["pixel_values"])
    assert join_pixels([]) == join_pixels([{}]) == {}
    tiles = {"pixel_values": torch.ones(1, 2, 3, 4), "grid": torch.tensor([[3, 3, 3]]), "tiles": torch.ones(4, 3)}
    some = join_pixels([one, tiles, other, tiles])
    assert [len(some[name]) for name in ("pixel_values", "grid", "tiles")] == [5, 5, 8], "small images have none"
