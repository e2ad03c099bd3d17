"""The processor called as that of any vision-language model: rendered text and images in, what `generate` needs out."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_chats import CHATS
from helpers import random_image
from shared_fixtures import Loaded

from diffvl.demo.standins import TRUNKS

IMAGES = [random_image(), random_image(1)]  # those of CHATS, in their order


@pytest.mark.parametrize("model_type", TRUNKS)
def test_rendered_text_gives_what_a_chat_gives(model_type: str, loaded: Callable[[str], Loaded]):
    """Ids, images and the marks of earlier answers, without which blocks would be cut elsewhere than in training."""
    model, processor = loaded(model_type)
    model.config.set_decoding("blocks", 4, "block", "response", "same")
    expected = processor.apply_chat_template(CHATS, tokenize=True, add_generation_prompt=True)
    texts = processor.apply_chat_template(CHATS, add_generation_prompt=True)
    processor.tokenizer.padding_side = "left"
    try:
        inputs = processor(text=texts, images=IMAGES, padding=True, return_tensors="pt")
    finally:
        processor.tokenizer.padding_side = "right"
    for name in ("input_ids", "attention_mask", "answer_index"):
        assert torch.equal(inputs[name], expected[name]), name
    torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"])
    found = model.generate(**inputs, max_new_tokens=6)
    assert torch.equal(found, model.generate(**expected, max_new_tokens=6))  # type: ignore[arg-type]
    right = processor(text=texts, images=IMAGES, padding=True, return_tensors="pt")
    if processor.tokenizer.padding_side == "right":
        shown = right["attention_mask"].bool()
        assert right["answer_index"][shown].tolist() == expected["answer_index"][expected["attention_mask"].bool()].tolist()
        assert not right["answer_index"][~shown].any()


def test_forms_of_the_marks(loaded: Callable[[str], Loaded]):
    """Lists for lists, none where there are no earlier answers, and one message where tokens cannot be matched."""
    _, processor = loaded("llama")
    text = processor.apply_chat_template(CHATS[2], add_generation_prompt=True)
    one = processor(text=text, images=[IMAGES[1]])
    (row,) = one["answer_index"] if isinstance(one["answer_index"][0], list) else [one["answer_index"]]
    assert sum(row) == sum(processor.encode_chat(CHATS[2], add_generation_prompt=True).answer) > 3
    assert "answer_index" not in processor(text=processor.apply_chat_template(CHATS[1], add_generation_prompt=True))
    plain: Any = processor(text=[processor.apply_chat_template([*CHATS[1], *earlier()], add_generation_prompt=True)])
    assert len(plain["answer_index"]) == 1 and len(plain["answer_index"][0]) == len(plain["input_ids"][0])
    with pytest.raises(ValueError, match="answers of earlier turns do not stand in the tokens as they did in training"):
        processor(
            text=[processor.apply_chat_template([*CHATS[1], *earlier()], add_generation_prompt=True)],
            truncation=True,
            max_length=9,
        )


def test_arrays_are_marked_too(loaded: Callable[[str], Loaded]):
    _, processor = loaded("llama")
    text = processor.apply_chat_template([*CHATS[1], *earlier()], add_generation_prompt=True)
    array = processor(text=[text], return_tensors="np")
    assert array["answer_index"].tolist() == processor(text=[text], return_tensors="pt")["answer_index"].tolist()


def test_a_template_without_a_generation_prompt(loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """As Mistral's, where an answer follows the user's words directly: it cannot be found in the text."""
    _, processor = loaded("llama")
    stop = processor.stop_token
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
        "{% else %} {{ message['content'] }}" + stop + "{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(processor.tokenizer, "chat_template", template)
    single = processor.apply_chat_template(CHATS[1], add_generation_prompt=True)
    assert "answer_index" not in processor(text=single)
    chat = [*CHATS[1], *earlier()]
    assert processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)["answer_index"].max() == 1
    with pytest.raises(ValueError, match="this chat template writes nothing before an answer"):
        processor(text=processor.apply_chat_template(chat, add_generation_prompt=True))


def earlier() -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Sure?"}]


# --- images of messages ----------------------------------------------------------------------------------------------------


def shown(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*({"type": "image", **part} for part in parts), {"type": "text", "text": "What?"}]}]


def test_images_stand_in_the_order_of_their_parts(loaded: Callable[[str], Loaded], tmp_path: Path):
    """Whether a part carries its image or takes the next one of those given beside the messages."""
    _, processor = loaded("llama")
    first, second, third = (random_image(seed) for seed in (1, 2, 3))

    def pixels(chat: Any, images: Any = None) -> torch.Tensor:
        return processor.apply_chat_template(chat, tokenize=True, images=images)["pixel_values"]

    expected = processor.image_processor(images=[first, second, third], return_tensors="pt")["pixel_values"]
    third.save(tmp_path / "c.png")
    data = base64.b64encode((tmp_path / "c.png").read_bytes()).decode()
    chats: list[tuple[Any, Any]] = [
        (shown({}, {}, {}), [first, second, third]),
        (shown({}, {"image": second}, {}), [first, third]),
        (shown({}, {"image": second}, {"path": str(tmp_path / "c.png")}), first),
        (shown({"image": first}, {}, {"base64": data}), (second,)),
        ([shown({}), shown({"image": second}, {"url": f"data:image/png;base64,{data}"})], [first]),
        ([shown({}, {"image": second}), shown({})], [[first], [third]]),
        (shown({"image": first}, {"image": second}, {"image": tmp_path / "c.png"}), None),
        (shown({"image": first}, {"image": second}, {"url": (tmp_path / "c.png").as_uri()}), []),
    ]
    for chat, images in chats:
        torch.testing.assert_close(pixels(chat, images), expected)


@pytest.mark.parametrize("name", ["tools", "continue_final_message", "videos"])
def test_what_is_not_taken_is_refused_by_name(name: str, loaded: Callable[[str], Loaded]):
    _, processor = loaded("llama")
    given: dict[str, Any] = {name: [1]}
    with pytest.raises(ValueError, match=f"{name} is not taken here"):
        processor.apply_chat_template(shown(), tokenize=True, **given)
    given[name] = None
    assert processor.apply_chat_template(shown(), tokenize=True, **given)["input_ids"].shape[0] == 1


@pytest.mark.parametrize(
    ("parts", "images", "says"),
    [
        (
            [{"image": random_image()}],
            [random_image()],
            "1 images are given beside the messages, but 0 of their 1 image parts carry none",
        ),
        ([{}, {}], [random_image()], "1 images are given beside the messages, but 2 of their 2 image parts carry none"),
        ([{}], None, "0 images are given beside the messages, but 1 of their 1"),
        ([{}], [[random_image()], [random_image()]], "neither a flat list nor one list for each of the 1 conversations"),
        ([{"url": "https://example.org/a.png"}], None, "is an address on the net; images are not fetched: give a file's path"),
        ([{"image": "nowhere.png"}], None, "the image 'nowhere.png' cannot be read"),
        ([{"base64": "AAAA"}], None, "the image 'AAAA' cannot be read"),
    ],
)
def test_images_that_do_not_fit_their_parts(parts: list[Any], images: Any, says: str, loaded: Callable[[str], Loaded]):
    with pytest.raises(ValueError, match=says):
        loaded("llama")[1].apply_chat_template(shown(*parts), tokenize=True, images=images)
