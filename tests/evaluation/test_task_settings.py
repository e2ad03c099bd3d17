"""What a caller and a task say -> how a question is decoded."""

from typing import Any

import pytest

from diffvl.errors import UsageError
from diffvl.evaluation.task_settings import NAMES, as_record, cut, read_settings, settings_for_task
from diffvl.hub.settings_diffvl import DecodeSettings

GREEDY = {"do_sample": False, "temperature": 0, "top_p": None, "num_beams": 1}


def test_settings_are_read_from_words_and_values():
    """As lmms-eval hands them over: numbers as numbers, anything else as text."""
    given = {"max_new_tokens": 8, "denoising_steps": "2", "remasking": "low_confidence_dynamic", "threshold": 1}
    found = read_settings({**given, "stop_strings": "END", "cache_implementation": "static"})
    assert (found.max_new_tokens, found.denoising_steps, found.threshold) == (8, 2, 1.0)
    assert found.stop_strings == ("END",) and found.is_static
    assert read_settings({"stop_strings": ("a", "b")}).stop_strings == ("a", "b") and read_settings({}) == DecodeSettings()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"thresold": 0.9}, "the model diffvl knows no thresold; there are pretrained, device, max_new_tokens"),
        ({"compile_config": 1}, "knows no compile_config"),
        ({"denoising_steps": "two"}, "denoising_steps='two': Input should be a valid integer"),
        ({"denoising_steps": 2.5}, "denoising_steps=2.5"),
        ({"denoising_steps": True}, "denoising_steps=True"),
        ({"threshold": 0.9}, "threshold=0.9 has no effect with remasking='low_confidence_static'"),
        ({"mode": "ar", "denoising_steps": 4}, "denoising_steps has no effect with mode='ar'"),
        ({"seed": 3}, "seed has no effect"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected 1 or more"),
        ({"remasking": "random"}, "expected one of"),
    ],
)
def test_what_is_wrong_is_an_error(given: dict[str, Any], says: str):
    with pytest.raises(UsageError) as error:
        read_settings(given)
    assert says in str(error.value)


def test_a_task_is_heard_where_the_caller_says_nothing():
    asked = {**GREEDY, "max_new_tokens": 16, "until": ["\n\n", ""]}
    found = settings_for_task(DecodeSettings(denoising_steps=2), {"denoising_steps"}, asked, "t")
    assert found.settings == DecodeSettings(denoising_steps=2, max_new_tokens=16, stop_strings=("\n\n",))
    assert found.until == ("\n\n",) and found.unused == ()
    assert settings_for_task(DecodeSettings(), (), {}, "t").settings == DecodeSettings()
    assert settings_for_task(DecodeSettings(), (), {"max_gen_toks": 5}, "t").settings.max_new_tokens == 5


def test_what_the_caller_names_holds():
    asked = {"max_new_tokens": 16, "temperature": 0.7, "do_sample": True, "until": "."}
    base = read_settings({"max_new_tokens": 128, "temperature": 0, "stop_strings": "END"})
    found = settings_for_task(base, {"max_new_tokens", "temperature", "stop_strings"}, asked, "t")
    assert found.settings == DecodeSettings(max_new_tokens=128, stop_strings=("END", ".")) and found.until == (".",)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (GREEDY, {}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {}),
        ({"temperature": 0.7, "top_p": 0.9, "seed": 5}, {"temperature": 0.7, "top_p": 0.9, "seed": 5}),
        ({"do_sample": True, "top_k": 10}, {"temperature": 1.0, "top_k": 10}),
        ({"do_sample": True, "temperature": 0.5, "top_k": 0}, {"temperature": 0.5}),
        ({"do_sample": True, "temperature": 0, "top_p": 0.9}, {}),
        ({"do_sample": None, "temperature": 0.5}, {"temperature": 0.5}),
    ],
)
def test_sampling_is_as_lmms_eval_s_own_models_take_it(asked: dict[str, Any], expected: dict[str, Any]):
    assert settings_for_task(DecodeSettings(), (), asked, "t").settings == DecodeSettings(**expected)


def test_what_cannot_be_heard_is_told():
    asked = {"num_beams": 5, "image_aspect_ratio": "original", "repetition_penalty": 1.0, "length_penalty": None}
    found = settings_for_task(DecodeSettings(), (), asked, "t")
    assert found.unused == ("image_aspect_ratio='original'", "num_beams=5")
    with pytest.raises(UsageError, match="task t: .*max_new_tokens"):
        settings_for_task(read_settings({"mode": "speculative"}), {"mode"}, {"max_new_tokens": 0}, "t")


def test_an_answer_is_cut_where_the_task_ends_it():
    assert cut("Red.\n\nQuestion: 2", ["Question:", "\n\n"]) == "Red."
    assert cut(" Red ", []) == "Red" and cut("\n\nRed", ["\n\n"]) == ""


def test_a_record_names_every_setting_that_says_something():
    record = as_record(DecodeSettings(stop_strings=("a",), remasking="entropy", entropy_budget=0.5))
    assert record["stop_strings"] == ["a"] and record["entropy_budget"] == 0.5 and "top_k" not in record
    assert set(record) <= set(NAMES)
