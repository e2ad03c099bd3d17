"""Chat templates of the field: what can be trained on is, what cannot is refused for the true reason, by prepare and doctor."""

import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from chat_zoo import CONTROL, TEMPLATES, chat_processor
from shared_fixtures import Loaded

from diffvl.config.resolve import resolve
from diffvl.demo.standins import CHATML, GEMMA, make_tokenizer
from diffvl.errors import CheckpointError, ConfigError, UnsupportedModelError
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.hub.template_diffvl import FIXED_DATE
from diffvl.prepare.run import read_parts
from diffvl.prepare.source import Source
from diffvl.prepare.templates import check_template, load_tokenizer, look_at_template, stop_token, system_advice

ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
LAST_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if loop.last or m['role'] == 'user' %}<|im_end|>{% endif %}\n{% endfor %}" + ASK
)
STRIPPED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and '</think>' in m['content'] and "
    "not loop.last %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}" + ASK
)
PARTS = CHATML.replace("{{ message['content'] }}", "{% for p in message['content'] %}{{ p['text'] }}{% endfor %}")
PARTS_BUT_SYSTEM = CHATML.replace(
    "{{ message['content'] }}",
    "{% if message['role'] == 'system' %}{{ message['content'] + '' }}{% else %}"
    "{% for p in message['content'] %}{{ p['text'] }}{% endfor %}{% endif %}",
)
SYSTEMLESS = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
SILENT = CHATML.replace("{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}")
MOVED = (  # as Mistral's: the system turn stands in the last question
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'user' and (loop.last or loop.index == rest | length - 1) %}{{ system }}{% endif %}{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}" + ASK
)
UNSTABLE_LATER = "{% for m in messages %}" + TURN + "{% endfor %}{% if messages | length > 2 %}{{ '\n' }}{% endif %}" + ASK


def processor_of(template: str, **settings: Any) -> DiffVLProcessor:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return chat_processor(tokenizer, template, "<|im_end|>", **settings)


def saved(template: Any, folder: Path) -> str:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def chat(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


# --- proven once ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, STRIPPED, PARTS, PARTS_BUT_SYSTEM, SYSTEMLESS, SILENT, *TEMPLATES.values()])
def test_templates_that_can_be_trained_on(template: str):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.add_tokens(CONTROL, special_tokens=True)
    tokenizer.chat_template = template
    check_template(chat_processor(tokenizer, template, stop_token(tokenizer)).encoder)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (LAST_ONLY, r"does not write '<\|im_end\|>' after answer 1, 'answer 1': it writes '.*question 2' there, which would be"),
        (UNSTABLE_LATER, "is not prefix-stable: the prompt of an answer is not the beginning of the whole chat"),
        (CHATML.replace("{{ message['content'] }}", "{{ message['content'] | upper }}"), "leaves the answer out"),
        (
            CHATML.replace("<|im_end|>\n{% endfor", "{% if loop.index < 4 %}<|im_end|>{% endif %}\n{% endfor"),
            "does not write '.*' after answer 2",
        ),
        (
            CHATML.replace("{{ message['content'] }}", "{{ message['content'] if loop.index < 3 else '...' }}"),
            "leaves the turn of the role 'user' out",
        ),
        (
            CHATML.replace("{{ message['content'] }}", "{{ message['content'] | e }}"),
            "changes '<image>', which stands for images",
        ),
        ({"tool_use": CHATML, "rag": CHATML}, "has the chat templates rag, tool_use, but none named default"),
    ],
    ids=[
        "stop behind the last answer only",
        "later rounds",
        "another answer",
        "no stop later",
        "turns left out",
        "escaped",
        "no default",
    ],
)
def test_templates_that_cannot(template: Any, says: str, tmp_path: Path):
    with pytest.raises((UnsupportedModelError, CheckpointError), match=says):
        look_at_template(saved(template, tmp_path), "llama", False, None)


def test_of_several_templates_the_default_is_kept(tmp_path: Path):
    tokenizer = load_tokenizer(saved({"default": CHATML, "tool_use": STRIPPED}, tmp_path), "llama")
    assert tokenizer.chat_template == CHATML


def test_a_directory_without_a_tokenizer_is_told(tmp_path: Path):
    assert look_at_template(str(tmp_path), "llama", False, None).startswith("no tokenizer beside it")


# --- answers that the template changes -----------------------------------------------------------------------------------------


def test_reasoning_that_is_taken_out_of_earlier_answers():
    processor = processor_of(STRIPPED)
    thought = "<think>hmm</think>A red dot."
    encoding = processor.encode_chat(chat("What?", thought))
    assert thought in encoding.text
    with pytest.raises(
        ValueError, match="changes answer 1: of '<think>hmm</think>A red dot.' it writes 'A red dot.'; an answer is"
    ):
        processor.encode_chat(chat("What?", thought, "And?", "No more."))
    assert processor.encode_chat(chat("What?", "A dot.", "And?", thought)).answer[-1] == 0


# --- the date ------------------------------------------------------------------------------------------------------------------

FORMATS = ("%d %B %Y", "%d %b %Y", "%Y-%m-%d", "%A, %B %-d, %Y", "%m/%d/%y %H:%M:%S", "%I:%M %p", "%a %j", "%F", "100%%")


@pytest.mark.parametrize("code", FORMATS)
def test_the_date_is_the_same_on_every_day(code: str):
    template = "\n\n  {% if strftime_now is defined %}{{ strftime_now('" + code + "') }}{% endif %}\n" + CHATML
    expected = datetime(2024, 7, 26).strftime(code)
    plain = processor_of("\n\n  {% if true %}" + expected + "{% endif %}\n" + CHATML)
    for settings in ({}, {"system_turn": "first_question"}):
        processor = processor_of(template, **settings)
        encoding = processor.encode_chat(chat("What?", "This."))
        assert encoding.text == plain.encode_chat(chat("What?", "This.")).text, "to the byte, white space around it included"
    assert processor.apply_chat_template(chat("What?")).startswith("\n\n")


@pytest.mark.parametrize(
    "asking",
    [
        "{{ date_string }}",
        "{% set date_string = date_string if date_string is defined else strftime_now('%d %b %Y') %}{{ date_string }}",
        "{% macro head(code) %}{{ strftime_now(code) }}{% endmacro %}{{ head('%d %b %Y') }}",
        "{% set now = strftime_now(format='%d %b %Y') %}{{ now }}",
        "{% for m in messages %}{% if loop.first %}{{ strftime_now('%d ') + strftime_now('%b %Y') }}{% endif %}{% endfor %}",
    ],
)
def test_ways_to_ask_for_the_date(asking: str):
    assert processor_of(asking + "\n" + CHATML).encode_chat(chat("What?")).text.startswith(FIXED_DATE)


def test_the_written_tokenizer_gives_the_fixed_date_by_itself(tmp_path: Path):
    tokenizer = load_tokenizer(saved("{{ strftime_now('%d %b %Y') }}\n" + CHATML, tmp_path / "source"), "llama")
    check_template(chat_processor(tokenizer, tokenizer.chat_template, "<|im_end|>").encoder)
    tokenizer.save_pretrained(tmp_path / "written")
    again = load_tokenizer(str(tmp_path / "written"), "llama")
    assert again.chat_template == tokenizer.chat_template, "fixed once"
    assert again.apply_chat_template(chat("What?"), tokenize=False).startswith("26 Jul 2024\n<|im_start|>user")


# --- parts ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [PARTS, PARTS_BUT_SYSTEM])
def test_templates_that_want_content_as_parts_get_it(template: str):
    asked: list[Any] = [*chat("What?", "A dot.", "And?", "No.", system="Be brief.")]
    asked[1] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    given, plain = processor_of(template), processor_of(CHATML)
    assert given.encode_chat(asked) == plain.encode_chat(asked)
    assert given.apply_chat_template(asked[:2], add_generation_prompt=True) == plain.apply_chat_template(
        asked[:2], add_generation_prompt=True
    )
    assert system_advice(given.encoder) == ""


# --- system turns --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "reason"), [(SYSTEMLESS, "System role not supported"), (SILENT, "leaves the"), (MOVED, "")])
def test_system_turns_that_do_not_work_say_what_to_do(template: str, reason: str):
    processor = processor_of(template)
    check_template(processor.encoder)
    assert "prepare.system_turn=first_question puts it in front of the first question" in system_advice(processor.encoder)
    asked = chat("What?", "A dot.", "And?", "No.", system="Be brief.")
    says = f"{re.escape(reason)}.*put the system turn's text into the first question, or convert with --set prepare.system_turn="
    with pytest.raises(ValueError, match=re.compile(says, re.DOTALL)):
        processor.encode_chat(asked)
    folding = processor_of(template, system_turn="first_question")
    expected = processor.encode_chat(chat("Be brief.\n\nWhat?", "A dot.", "And?", "No."))
    assert folding.encode_chat(asked) == expected and system_advice(folding.encoder) == ""
    assert folding.apply_chat_template(asked[:2]) == processor.apply_chat_template(chat("Be brief.\n\nWhat?"))


def test_a_system_turn_needs_a_question_to_go_into():
    folding = processor_of(SYSTEMLESS, system_turn="first_question")
    for turns in (chat(system="Be brief."), [{"role": "system", "content": "Be."}, {"role": "assistant", "content": "Hi"}]):
        with pytest.raises(ValueError, match="no question follows it"):
            folding.encode_chat(turns)
    image: list[Any] = [*chat(system=""), {"role": "user", "content": [{"type": "image"}]}]
    assert folding.encode_chat(image).ids == folding.encode_chat(image[1:]).ids


def test_the_system_setting_is_kept_beside_the_checkpoint(loaded: Callable[[str], Loaded], tmp_path: Path):
    _, processor = loaded("gemma2")
    assert processor.tokenizer.chat_template == GEMMA
    with pytest.raises(ValueError, match="prepare.system_turn=first_question"):
        processor.encode_chat(chat("What?", system="Be brief."))
    parts = {name: getattr(processor, name) for name in ("image_token", "image_tokens", "stop_token")}
    folding = DiffVLProcessor(processor.image_processor, processor.tokenizer, **parts, system_turn="first_question")
    folding.save_pretrained(tmp_path)
    again = DiffVLProcessor.from_pretrained(tmp_path)
    assert again.encode_chat(chat("What?", system="Be brief.")).text.startswith("<bos><start_of_turn>user\nBe brief.\n\nWhat?<")
    with pytest.raises(ValueError, match="system_turn is 'elsewhere'; expected template or first_question"):
        DiffVLProcessor(processor.image_processor, processor.tokenizer, **parts, system_turn="elsewhere")


def test_the_system_setting_of_a_recipe(source: Callable[[str], Path], tower: Path):
    stages = {"align": {"objective": {"kind": "ar"}, "trainable": {"connector": 1e-3}, "steps": 1}}
    recipe = resolve({"stages": stages}, ["prepare.system_turn=first_question"], "test")
    parts = read_parts(Source(str(source("gemma2")), None, str(tower)), recipe)
    assert parts.processor.system_turn == "first_question"
    assert 1 in parts.processor.encode_chat(chat("What?", "It.", system="Be brief.")).answer
    with pytest.raises(ConfigError, match="system_turn"):
        resolve({"stages": stages}, ["prepare.system_turn=elsewhere"], "test")


def test_a_chat_that_begins_with_an_answer():
    with pytest.raises(ValueError, match="the chat begins with an answer: there is no prompt for it"):
        processor_of(CHATML).encode_chat([{"role": "assistant", "content": "Hi"}])
