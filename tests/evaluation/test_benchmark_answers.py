"""Questions of benchmarks -> answers: order, batches, what ends them, what is refused, and likelihoods."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from block_checkpoints import block_checkpoint
from helpers import QUIET
from PIL import Image
from rich.console import Console

from diffvl.decode.answer import Answer, Decoder, answer_chats, load_for_decoding
from diffvl.errors import UsageError
from diffvl.evaluation import benchmark_answers
from diffvl.evaluation.benchmark_answers import Answering, Choice, Question
from diffvl.evaluation.benchmark_chats import chat_of_text
from diffvl.hub.configuration_diffvl import never_predicted
from diffvl.hub.settings_diffvl import DecodeSettings

IMAGES = [Image.radial_gradient("L").convert("RGB").crop((0, 0, 40, 40)), Image.new("RGB", (20, 50), "blue")]
ASKED = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def decoder(prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_for_decoding(block_checkpoint(prepared("llama"), tmp_path_factory.mktemp("blocks") / "llama"))


def question(text: str, *images: Image.Image, task: str = "t", **asked: Any) -> Question:
    place = f"task {task}, {text}"
    return Question(task, place, lambda: chat_of_text(text, images, place), {**ASKED, **asked})


QUESTIONS = [
    question("Hi"),
    question("What is it, and which colour does it have?", IMAGES[0]),
    question("Which is larger?", *IMAGES, task="other"),
    question("What?", IMAGES[1]),
    question("A", max_new_tokens=3),
]


def answering(decoder: Decoder, size: int, settings: DecodeSettings = DecodeSettings(), **more: Any) -> Answering:  # noqa: B008
    return Answering(decoder, settings, more.pop("named", ()), size, more.pop("console", QUIET))


@pytest.mark.parametrize("size", [1, 3])
def test_answers_come_in_the_order_of_the_questions_whatever_the_batches(size: int, decoder: Decoder):
    found = answering(decoder, size).answers(QUESTIONS)
    for asked, (text, tokens) in zip(QUESTIONS, found, strict=True):
        alone = answer_chats(decoder, [asked.chat()], DecodeSettings(max_new_tokens=asked.asked["max_new_tokens"]))[0]
        assert (text, tokens) == (alone.text, alone.tokens)
    assert len({text for text, _ in found}) == len(found), "answers that are alike would prove nothing"


def test_batches_hold_one_task_and_one_way_of_decoding_and_what_they_take_is_counted(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
):
    batches: list[list[int]] = []
    real = benchmark_answers.answer_chats

    def watched(decoder: Decoder, chats: list[Any], settings: DecodeSettings) -> Any:
        lengths = [len(decoder.processor.encode_chat(chat, add_generation_prompt=True).ids) for chat in chats]
        batches.append(lengths)
        return real(decoder, chats, settings)

    monkeypatch.setattr(benchmark_answers, "answer_chats", watched)
    found = answering(decoder, 2)
    answers = found.answers(QUESTIONS)
    assert sorted(map(len, batches)) == [1, 1, 1, 2] and all(batch == sorted(batch, reverse=True) for batch in batches)
    assert {task: figures.answers for task, figures in found.figures.items()} == {"t": 4, "other": 1}
    assert sum(figures.tokens for figures in found.figures.values()) == sum(tokens for _, tokens in answers)
    assert found.figures["other"].forwards >= 8 and found.figures["t"].seconds > 0


def test_groups_stand_where_their_longest_question_does(decoder: Decoder, monkeypatch: pytest.MonkeyPatch):
    """Rooms are numbers: as text, 9 would come after 80."""
    order: list[int] = []

    def watched(decoder: Decoder, chats: list[Any], settings: DecodeSettings) -> list[Any]:
        order.append(settings.max_new_tokens)
        return [Answer("x", 1, 1, 1.0, 0.0, 0.0, 0.0) for _ in chats]

    monkeypatch.setattr(benchmark_answers, "answer_chats", watched)
    asked = [question("a" * length, max_new_tokens=most) for length, most in ((30, 80), (90, 9), (60, 100), (10, 9))]
    answering(decoder, 1).answers(asked)
    assert order == [9, 9, 100, 80]


@pytest.mark.parametrize("size", [1, 3])
def test_a_question_asked_several_times_is_sampled_anew_and_alike_in_every_run(size: int, decoder: Decoder):
    warm = {"do_sample": True, "temperature": 1.0}
    runs = [[text for text, _ in answering(decoder, size).answers([question("Hi", **warm)] * 6)] for _ in range(2)]
    assert runs[0] == runs[1] and len(set(runs[0])) > size
    several = answering(decoder, size)
    assert [text for _ in range(2) for text, _ in several.answers([question("Hi", **warm)] * 3)] == runs[0], "call by call"
    cold = [text for text, _ in answering(decoder, size).answers([question("Hi")] * 6)]
    assert len(set(cold)) == 1, "a greedy answer is one"


def test_an_answer_ends_before_the_text_that_ends_it(decoder: Decoder):
    plain, _ = answering(decoder, 1).answers([QUESTIONS[1]])[0]
    end = plain[3]
    assert (
        answering(decoder, 1).answers([question(QUESTIONS[1].place[8:], IMAGES[0], until=[end])])[0][0]
        == plain.split(end)[0].strip()
    )


def test_questions_that_cannot_be_answered_are_all_told_before_the_first_is_answered(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(benchmark_answers, "answer_chats", lambda *_: pytest.fail("nothing may be answered"))
    asked = [QUESTIONS[0], question("long " * 3000), Question("t", "task t, document 5", lambda: [{"role": 5}], ASKED)]
    with pytest.raises(UsageError) as error:
        answering(decoder, 2).answers(asked)
    told = str(error.value)
    assert told.startswith("2 of 3 questions cannot be answered; nothing was")
    assert "tokens do not fit the context of" in told and "task t, document 5: a message has the role 5" in told


def test_an_answer_has_the_room_that_its_own_question_leaves(decoder: Decoder, monkeypatch: pytest.MonkeyPatch):
    length = len(decoder.processor.encode_chat(QUESTIONS[1].chat(), add_generation_prompt=True).ids)
    monkeypatch.setattr(benchmark_answers, "context_length", lambda _: length + 3)
    found = answering(decoder, 2).answers([QUESTIONS[0], QUESTIONS[1]])
    assert [tokens for _, tokens in found] == [8, 3]


def test_rooms_that_are_nearly_alike_share_a_batch(decoder: Decoder, monkeypatch: pytest.MonkeyPatch):
    """Else every length of a prompt would be a batch of its own, where a task asks for all that a context leaves."""
    batches: list[tuple[int, int]] = []

    def watched(decoder: Decoder, chats: list[Any], settings: DecodeSettings) -> list[Any]:
        batches.append((len(chats), settings.max_new_tokens))
        return [Answer("x", 1, 1, 1.0, 0.0, 0.0, 0.0) for _ in chats]

    monkeypatch.setattr(benchmark_answers, "answer_chats", watched)
    texts = ["a" * length for length in (3, 5, 7, 9)]
    shortest = len(decoder.processor.encode_chat(chat_of_text(texts[0], (), "t"), add_generation_prompt=True).ids)
    monkeypatch.setattr(benchmark_answers, "context_length", lambda _: shortest + 190)
    answering(decoder, 4).answers([question(text, max_new_tokens=4096) for text in texts])
    assert batches == [(4, 128)]


def test_a_question_of_text_is_answered_as_it_was_looked_at(decoder: Decoder, monkeypatch: pytest.MonkeyPatch):
    """A task may draw other examples each time; images are opened again, for all would not fit in memory."""
    seen: list[Any] = []
    drawn = iter(range(100))

    def watched(decoder: Decoder, chats: list[Any], settings: DecodeSettings) -> list[Any]:
        seen.extend(chat[0]["content"][-1]["text"].strip() for chat in chats)
        return [Answer("x", 1, 1, 1.0, 0.0, 0.0, 0.0) for _ in chats]

    monkeypatch.setattr(benchmark_answers, "answer_chats", watched)

    def asked(*images: Image.Image) -> Question:
        return Question("t", "t", lambda: chat_of_text(f"Example {next(drawn)}", images, "t"), ASKED)

    answering(decoder, 2).answers([asked(), asked(IMAGES[0])])
    assert sorted(seen) == ["Example 0", "Example 2"]


def test_what_a_task_asks_for_in_vain_is_said_once(decoder: Decoder, capsys: pytest.CaptureFixture[str]):
    asked = [question("Hi", num_beams=3, max_new_tokens=1), question("You", num_beams=3, max_new_tokens=1)]
    answering(decoder, 2, console=Console(stderr=True)).answers(asked)
    assert capsys.readouterr().err.count("task t asks for num_beams=3, which block decoding does not know: not used") == 1


# --- likelihoods -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def by_hand(decoder: Decoder, chat: list[Any], answer: str) -> tuple[float, bool]:
    """Token by token: the causal logits behind the prompt and what is known of the answer."""
    inputs = decoder.processor.apply_chat_template([chat], tokenize=True, add_generation_prompt=True)
    pixels = {name: inputs[name] for name in decoder.model.config.image_inputs if name in inputs}
    ids, total, best = inputs["input_ids"], 0.0, True
    for token in decoder.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]:
        logits = decoder.model(ids, **pixels).logits[0, -1].float()
        logits[never_predicted(decoder.model.config, len(logits), logits.device)] = -torch.inf
        total, best = total + float(logits.log_softmax(0)[token]), best and int(logits.argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return total, best


@pytest.mark.parametrize("size", [1, 4])
def test_likelihoods_are_those_of_the_weights_token_by_token(size: int, decoder: Decoder):
    greedy = answer_chats(decoder, [QUESTIONS[1].chat()], DecodeSettings(max_new_tokens=3, mode="ar"))[0].text
    asked = [(QUESTIONS[1], "red"), (QUESTIONS[1], " a blue one"), (QUESTIONS[0], "red"), (QUESTIONS[2], "blue")]
    found = answering(decoder, size, DecodeSettings(mode="ar")).likelihoods([Choice(*one) for one in asked])
    for (one, answer), (total, best) in zip(asked, found, strict=True):
        expected = by_hand(decoder, one.chat(), answer.strip())
        assert total == pytest.approx(expected[0], abs=1e-3) and best == expected[1]
    assert len({round(total, 3) for total, _ in found}) == len(found)
    if greedy.isascii():
        assert answering(decoder, 1, DecodeSettings(mode="ar")).likelihoods([Choice(QUESTIONS[1], greedy)])[0][1]


def test_choices_that_cannot_be_compared_are_all_told_before_the_first_is(decoder: Decoder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark_answers, "likelihoods", lambda *_: pytest.fail("nothing may be computed"))
    refused = Question("t", "task t, document 5", lambda: [{"role": 5}], {})
    broken = Question("t", "task t, document 6", lambda: chat_of_text("x", [b"no image"], "task t, document 6"), {})
    asked = [(QUESTIONS[0], "red"), (QUESTIONS[0], "red " * 3000), (refused, "a"), (broken, "a"), (broken, "b")]
    with pytest.raises(UsageError) as error:
        answering(decoder, 1, DecodeSettings(mode="ar")).likelihoods([Choice(*one) for one in asked])
    told = str(error.value)
    assert told.startswith("4 of 5 questions, each with an answer, cannot be compared; nothing was\n")
    assert "tokens with an answer do not fit the context of" in told and "task t, document 5: a message has the role 5" in told
    assert told.count("task t, document 6: an image cannot be read") == 1


def test_a_question_and_its_answer_may_fill_the_context(decoder: Decoder, monkeypatch: pytest.MonkeyPatch):
    choice = Choice(QUESTIONS[1], "red")
    whole = [*QUESTIONS[1].chat(), {"role": "assistant", "content": "red"}]
    length = len(decoder.processor.encode_chat(whole).ids)
    found = answering(decoder, 1, DecodeSettings(mode="ar"))
    monkeypatch.setattr(benchmark_answers, "context_length", lambda _: length)
    assert -torch.inf < found.likelihoods([choice])[0][0] < 0
    monkeypatch.setattr(benchmark_answers, "context_length", lambda _: length - 1)
    with pytest.raises(UsageError, match=f"{length} tokens with an answer do not fit the context of {length - 1}"):
        found.likelihoods([choice])


def test_an_empty_answer_is_certain(decoder: Decoder):
    assert answering(decoder, 1, DecodeSettings(mode="ar")).likelihoods([Choice(QUESTIONS[0], " ")]) == [(0.0, True)]


def test_blocks_have_no_exact_likelihood(decoder: Decoder):
    with pytest.raises(UsageError, match="task t compares likelihoods, .* add mode=ar"):
        answering(decoder, 1).likelihoods([Choice(QUESTIONS[0], "red")])
