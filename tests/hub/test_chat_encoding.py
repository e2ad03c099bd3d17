"""Chats -> ids and answer marks: what the slow way gives, in one rendering and one tokenisation."""

import copy
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_zoo import BACKENDS, STOPS, TEMPLATES, chat_processor, random_chat, zoo_tokenizer
from shared_fixtures import Loaded
from slow_encoding import encode_slowly, untrimmed

from diffvl.demo.standins import CHATML, GEMMA, make_tokenizer
from diffvl.hub.chat_diffvl import ChatEncoder
from diffvl.hub.processing_diffvl import DiffVLProcessor

SYSTEMLESS = ("mistral", "gemma")  # templates that drop or refuse a system turn


def compared(name: str, tokenizer: Any, template: str, stop: str, chats: int, system: bool) -> int:
    """Compares random chats with the slow way. Returns how many seams were cut."""
    processor, source, cuts = chat_processor(tokenizer, template, stop), random.Random(name), 0
    reference = untrimmed(tokenizer)
    for _ in range(chats):
        chat = random_chat(source, system)
        prompt = chat[-1]["role"] == "user" or source.random() < 0.2
        encoding = processor.encode_chat(chat, prompt)
        expected = encode_slowly(processor, reference, chat, prompt)
        assert (encoding.ids, encoding.answer, encoding.text) == expected, (name, chat)
        whole = reference(encoding.text, add_special_tokens=False, verbose=False)["input_ids"]
        cuts += encoding.ids != whole
    return cuts


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_the_slow_way(backend: str):
    cuts = {
        name: compared(
            f"{backend} {name}", zoo_tokenizer(backend), template, STOPS.get(name, "<|eot|>"), 8, name not in SYSTEMLESS
        )
        for name, template in TEMPLATES.items()
    }
    assert any(cuts.values()) or backend == "words", "random chats must meet bad seams, or nothing is shown about them"


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
def test_stand_ins_as_the_slow_way(model_type: str):
    template, stop = (GEMMA, "<end_of_turn>") if model_type == "gemma2" else (CHATML, "<|im_end|>")
    compared(model_type, make_tokenizer(model_type), template, stop, 60, system=model_type != "gemma2")


@pytest.mark.parametrize(
    "flags",
    [{"rstrip": True}, {"lstrip": True}, {"single_word": True}, {"normalized": True, "special": False}],
    ids="+".join,
)
def test_added_tokens_that_look_at_their_neighbours(flags: dict[str, bool]):
    for backend in ("byte level, NFC", "metaspace first", "prepend"):
        for name in ("llama3", "vicuna space", "llama2"):
            tokenizer = zoo_tokenizer(backend, flags)
            compared(f"{backend} {name}", tokenizer, TEMPLATES[name], STOPS.get(name, "<|eot|>"), 6, system=True)


# --- linear --------------------------------------------------------------------------------------------------------------------


def rounds(number: int) -> list[dict[str, Any]]:
    question: list[Any] = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    return [
        message
        for at in range(number)
        for message in (
            {"role": "user", "content": question if at == 0 else f"And the {at}th one in the picture?"},
            {"role": "assistant", "content": f"It is a red dot, number {at}."},
        )
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_work_grows_with_the_tokens(name: str, monkeypatch: pytest.MonkeyPatch):
    """One rendering, each character tokenised at most three times (whole, the ends of prompts, the pieces of a cut text)."""
    processor = chat_processor(zoo_tokenizer("byte level"), TEMPLATES[name], STOPS.get(name, "<|eot|>"), image_tokens=500)
    tokenizer, rendered, tokenised = processor.tokenizer, list[int](), list[int]()
    render, tokenise = tokenizer.apply_chat_template, ChatEncoder._tokenise

    def counted_render(*arguments: Any, **settings: Any) -> str:
        rendered.append(len(text := render(*arguments, **settings)))
        return text

    def counted_tokenise(encoder: ChatEncoder, text: str) -> tuple[list[int], list[int]]:
        tokenised.append(len(text))
        return tokenise(encoder, text)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted_render)
    monkeypatch.setattr(tokenizer, "_encode_plus", None)  # the only other door to the tokens
    monkeypatch.setattr(ChatEncoder, "_tokenise", counted_tokenise)
    for number in (1, 8, 40):
        processor.encode_chat(rounds(number))
        assert len(rendered) <= 2 * number + 20, "stand-ins for the prompts of a new shape of chat"
        rendered.clear()
        tokenised.clear()
        encoding = processor.encode_chat(rounds(number))
        assert rendered == [len(encoding.rendered)]
        assert sum(tokenised) <= 3 * len(encoding.rendered), "images at one token each"
        assert len(tokenised) <= 2 * number + 2
        assert len(encoding.text) == len(encoding.rendered) + 499 * len("<image>")


# --- offsets, and what is left behind by other calls ---------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", ", prefix"])
def test_trimmed_offsets_do_not_move_an_answer(prefix: str):
    """Where a prompt ends with a space that is a token of its own, that token is the prompt's."""
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It."}]
    plain, trimmed = (
        chat_processor(zoo_tokenizer(f"byte level{prefix}{trim}"), TEMPLATES["vicuna space"], "</s>")
        for trim in ("", ", trimmed")
    )
    expected, encoding = plain.encode_chat(chat), trimmed.encode_chat(chat)
    assert (encoding.ids, encoding.answer) == (expected.ids, expected.answer)
    prompt = trimmed.encode_chat(chat[:1], add_generation_prompt=True).ids
    assert encoding.ids[: len(prompt)] == prompt and encoding.answer.index(1) == len(prompt)
    assert trimmed.tokenizer.convert_ids_to_tokens(prompt[-1]).endswith("Ġ")


def test_truncation_and_padding_of_other_calls_are_not_kept():
    processor = chat_processor(zoo_tokenizer("byte level"), TEMPLATES["llama3"], "<|eot|>")
    expected = processor.encode_chat(rounds(3)).ids
    tokenizer = processor.tokenizer
    tokenizer("a b c", truncation=True, max_length=2, padding="max_length", split_special_tokens=True)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert processor.encode_chat(rounds(3)).ids == expected
    fresh = processor.encoder.__class__(tokenizer, "<image>", 3, "<|eot|>")
    tokenizer("a b c", truncation=True, max_length=2, padding="max_length", split_special_tokens=True)
    assert fresh.encode(rounds(3)).ids == expected


def test_settings_and_templates_may_change():
    processor = chat_processor(zoo_tokenizer("byte level"), TEMPLATES["llama3"], "<|eot|>")
    before = processor.encode_chat(rounds(1))
    processor.image_tokens = 5
    assert len(processor.encode_chat(rounds(1)).ids) == len(before.ids) + 2
    processor.tokenizer.chat_template = TEMPLATES["generation"]
    assert processor.encode_chat(rounds(1)).rendered != before.rendered


def test_what_is_remembered_is_not_written_or_sent(loaded: Callable[[str], Loaded], tmp_path: Path):
    _, processor = loaded("llama")
    expected = processor.encode_chat(rounds(2)).ids
    for twin in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert twin.encode_chat(rounds(2)).ids == expected and twin.encoder is not processor.encoder
    processor.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "processor_config.json").read_text())
    own = {"image_token", "image_tokens", "stop_token", "system_turn", "image_processor", "processor_class", "auto_map"}
    assert set(written) - own == set()
    assert DiffVLProcessor.from_pretrained(tmp_path).encode_chat(rounds(2)).ids == expected


# --- texts that cannot be -------------------------------------------------------------------------------------------------------


def said(role: str, text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It."}, {"role": role, "content": text}]


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_a_control_token_in_a_text(role: str, token: str):
    processor = chat_processor(make_tokenizer(), CHATML, "<|im_end|>")
    for text in (f"a {token}b", [{"type": "text", "text": token[:4]}, {"type": "text", "text": token[4:]}]):
        with pytest.raises(ValueError, match=f"the text holds '{token}', a control token of the model".replace("|", r"\|")):
            processor.encode_chat(said(role, text))


def test_which_added_tokens_a_text_may_hold():
    """Those of a text, wherever the template writes them around answers; not those by which turns are told apart."""
    template = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>{% endif").replace(
        "{{ message['content'] }}", "{{ '<think>' if message['role'] == 'assistant' }}{{ message['content'] }}"
    )
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", "\n\n", "<turn>"])
    processor = chat_processor(tokenizer, template.replace("<|im_start|>", "<turn>"), "<|im_end|>")
    ids = processor.encode_chat(said("assistant", "so</think>\n\n<think>Yes."))
    assert max(ids.answer) == 2 and "</think>" in ids.text
    with pytest.raises(ValueError, match="the text holds '<turn>', a control token"):
        processor.encode_chat(said("user", "a <turn>"))


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "user", "content": "an <image>"}, "holds '<image>', which stands for an image: give images as parts"),
        ({"role": "user", "content": [{"type": "text", "text": "<im"}, {"type": "text", "text": "age>"}]}, "holds '<image>'"),
        ({"role": "user", "content": "\udcff"}, "not valid Unicode"),
        ({"role": "user", "content": None}, "has NoneType as its content; expected text or parts"),
        ({"content": "Hi"}, "role None; expected system, user or assistant"),
        ({"role": "user", "content": "Hi", "tool_calls": [{"id": 1}]}, "has 'tool_calls', which would be left out"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "a part of the type 'image_url'; expected",
        ),
        (
            {"role": "user", "content": [{"type": "video", "video": "x.mp4"}]},
            "shows a video, which this model does not take; expected",
        ),
        ({"role": "user", "content": [{"type": "input_image"}]}, "a part of the type 'input_image'; expected"),
        ({"role": "user", "content": ["Hi"]}, r"a part of the type '\(str\)'; expected"),
        ({"role": "user", "content": [{"text": "Hi"}]}, "a part of the type None; expected"),
        ({"role": "user", "content": [{"type": "text"}]}, "a text part has NoneType as its text"),
        ({"role": "user", "content": [{"type": "text", "text": "Hi", "image": "a.png"}]}, "a text part has 'image'"),
        ({"role": "user", "content": [{"type": "image", "image": "a", "path": "b"}]}, "carries 'image' and 'path'; expected one"),
        ({"role": "user", "content": [{"type": "image", "img": "a"}]}, "an image part has 'img', which would be left out"),
    ],
)
def test_messages_that_say_more_than_is_used(message: dict[str, Any], says: str):
    processor = chat_processor(make_tokenizer(), CHATML, "<|im_end|>")
    with pytest.raises(ValueError, match=says):
        processor.encode_chat([message], add_generation_prompt=True)
    nothing = {"role": "user", "content": [{"type": "text", "text": "Hi", "image": None}], "tool_calls": None, "name": ""}
    assert processor.encode_chat([nothing]).ids == processor.encode_chat([{"role": "user", "content": "Hi"}]).ids
