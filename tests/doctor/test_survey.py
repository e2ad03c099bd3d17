"""docs/architectures.md: every model type of the installed transformers has its row, and no model can spoil the survey."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bad_models import judged
from helpers import QUIET

from diffvl.cli import main as cli
from diffvl.doctor import survey as architectures
from diffvl.doctor.checks import Check
from diffvl.doctor.page import page
from diffvl.doctor.survey import default_config, judge_type, judge_vlm_type, model_types, survey, vlm_types
from diffvl.doctor.verdict import Verdict

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
ANSWERS = {"Supported": "supported", "Not supported": "not supported", "Unknown": "unknown"}
TEXT, VISION = "Language models", "Vision-language models"


def chapters_of(text: str) -> dict[str, str]:
    """Title -> text of the chapters of a page."""
    return {part.partition("\n")[0]: part for part in text.split("\n# ")[1:]}


def answers_of(text: str) -> dict[str, str]:
    """Model type -> answer, from the sections of a chapter; a type stands in one of them."""
    found: dict[str, str] = {}
    for section in text.split("\n## ")[1:]:
        title = section.partition("\n")[0]
        for name in re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE):
            if title in ANSWERS:
                assert name not in found, f"{name} stands there twice"
                found[name] = ANSWERS[title]
    return found


# --- the page ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("title", "types"), [(TEXT, model_types()), (VISION, vlm_types())])
def test_every_model_type_has_its_verdict_on_the_page(title: str, types: list[str]):
    text = chapters_of(PAGE.read_text(encoding="utf-8"))[title]
    assert sorted(answers_of(text)) == types, "write it again: diffvl doctor --all --out docs/architectures.md"
    assert f"| model types | {len(types)} |" in text
    for answer in ANSWERS.values():
        assert f"| {answer} | {list(answers_of(text).values()).count(answer)} |" in text


def test_at_least_58_vision_language_types_are_supported_and_none_that_was_not_probed():
    text = chapters_of(PAGE.read_text(encoding="utf-8"))[VISION]
    supported = text.partition("\n## Supported\n")[2].partition("\n## ")[0]
    errors = re.findall(r"^\| `.*\| (\d\.\de-\d\d) \| [^|]* \|$", supported, flags=re.MULTILINE)
    assert len(vlm_types()) == 97
    assert len(errors) == list(answers_of(text).values()).count("supported") >= 58
    assert max(map(float, errors)) < 1e-4


def test_types_in_both_lists_stand_in_the_chapter_of_what_they_are():
    types = model_types()
    assert len(types) > 170 and not {"gemma3", "llama4", "mllama", "fuyu"} & set(types)
    assert {"gemma3_text", "emu3", "git"} <= set(types)


def test_the_page_holds_what_the_survey_found():
    good = Verdict("llama", "llama", "supported", copy="2 layers", checks=(Check("AR parity", True, 2e-6, "< 0.001"),))
    limited = Verdict("llama4_text", "llama4_text", "supported", reason="exact up to 7", limit=7, checks=good.checks)
    almost = Verdict("moshi", "moshi", "not supported", "sound", "has a | in it", checks=good.checks)
    bad = Verdict("gpt_neo", "gpt_neo", "not supported", "own mask", "why", checks=(Check("no leak", False, 2.5, "< 0.001"),))
    lost = Verdict("xlm", "xlm", "unknown", "no answer", "xlm: no answer within 5 s")
    seeing = Verdict("gemma3", "gemma3", "supported", copy="2 layers", checks=good.checks)
    seeing = replace(seeing, image_inputs=("pixel_values", "image_sizes"), image_attention="runs")
    blind = Verdict("mllama", "mllama", "not supported", "images not by placeholders", "mllama does not")
    text = page([good, limited, almost, bad, lost], [seeing, blind], Path("docs/x.md"))
    chapters = chapters_of(text)
    assert answers_of(chapters[TEXT]) == {
        **{"llama": "supported", "llama4_text": "supported", "xlm": "unknown"},
        **{"moshi": "not supported", "gpt_neo": "not supported"},
    }
    assert answers_of(chapters[VISION]) == {"gemma3": "supported", "mllama": "not supported"}
    assert "Written by `diffvl doctor --all --out docs/x.md` on 20" in text
    for line in (
        "| of these, attention passes | 1 |",
        "| largest error of a supported one | 2.0e-06 |",
        "| smallest error of one whose attention fails | 2.5 |",
        "| `llama4_text` | Llama4ForCausalLM | - | 2.0e-06 | exact up to 7 |",
        "### Sound (1)",
        "| `moshi` | MoshiForCausalLM | 2e-06 | has a \\| in it |",
        "| `xlm` | XLMWithLMHeadModel | xlm: no answer within 5 s |",
        "| `gemma3` | Gemma3ForConditionalGeneration | 2 layers | pixel_values, image_sizes | runs | 2.0e-06 | - |",
        "| `mllama` | MllamaForConditionalGeneration | - | mllama does not |",
    ):
        assert line in text.splitlines(), line


def test_types_that_can_be_encoders_are_taken_as_decoders():
    assert default_config("bert").is_decoder is True
    assert judge_type("bert").answer == "supported"


def test_a_default_configuration_that_cannot_be_made_is_unknown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(architectures, "COMPLETIONS", {})
    verdict = judge_type("gemma4_assistant")
    assert verdict.answer == "unknown" and "its default configuration cannot be made (Strict" in verdict.reason


# --- the survey ----------------------------------------------------------------------------------------------------------


class FakeChild:
    """Answers like a process; `crashes` and `hangs` answer as `Child` says it then."""

    living = 0
    started = 0

    def __init__(self, judged_by: Any) -> None:
        FakeChild.living += 1
        FakeChild.started += 1

    def ask(self, model_type: str, seconds: float) -> Verdict | str:
        return "it is gone" if model_type in ("crashes", "hangs") else Verdict(model_type, model_type, "supported")

    def end(self) -> None:
        FakeChild.living -= 1


def test_a_lost_child_costs_one_verdict_and_is_replaced(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(architectures, "Child", FakeChild)
    monkeypatch.setattr(FakeChild, "started", 0)
    verdicts = survey(["a", "crashes", "b", "hangs"], QUIET)
    assert [verdict.answer for verdict in verdicts] == ["supported", "unknown", "supported", "unknown"]
    assert (verdicts[1].kind, verdicts[1].reason) == ("no answer", "crashes: it is gone")
    assert (FakeChild.started, FakeChild.living) == (2, 0)


@pytest.mark.slow
def test_real_children_survive_their_models():
    verdicts = survey(["a", "b", "crashes", "hangs", "c"], QUIET, seconds=2.0, judged_by=judged)
    assert [verdict.answer for verdict in verdicts] == ["supported", "supported", "unknown", "unknown", "supported"]
    assert verdicts[0].reason == verdicts[1].reason != verdicts[4].reason, "one process for many, another one afterwards"
    assert verdicts[2].reason == "crashes: it ended the process that probed it (exit code -6)"
    assert verdicts[3].reason == "hangs: no answer within 2 s"


@pytest.mark.slow
@pytest.mark.parametrize(("title", "types", "judged_by"), [(TEXT, model_types, judge_type), (VISION, vlm_types, judge_vlm_type)])
def test_the_page_is_up_to_date(title: str, types: Callable[[], list[str]], judged_by: Callable[[str], Verdict]):
    found = {verdict.model_type: verdict.answer for verdict in survey(types(), QUIET, judged_by=judged_by)}
    assert found == answers_of(chapters_of(PAGE.read_text(encoding="utf-8"))[title]), (
        "write it again: diffvl doctor --all --out docs/architectures.md"
    )


def test_a_handful_of_types_is_surveyed_in_one_child():
    types = ["mllama", "internvl", "qwen2_5_omni_thinker", "gemma3"]
    verdicts = survey(types, QUIET, judged_by=judge_vlm_type)
    assert [verdict.model_type for verdict in verdicts] == types
    assert [verdict.answer for verdict in verdicts] == ["not supported", "supported", "not supported", "supported"]
    text = chapters_of(page([], verdicts, Path("x.md")))[VISION]
    assert answers_of(text) == {verdict.model_type: verdict.answer for verdict in verdicts}
    assert "| supported | 2 |" in text and "| largest error of a supported one | 0.0e+00 |" not in text


def test_the_command_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    verdict = Verdict("llama", "llama", "supported", checks=(Check("AR parity", True, 0.0, "< 0.001"),))
    seeing = replace(verdict, model="llava", model_type="llava")
    monkeypatch.setattr(architectures, "survey", lambda types, console, judged_by=None: [seeing if judged_by else verdict])
    monkeypatch.setattr("sys.argv", ["diffvl", "doctor", "--all", "--out", str(tmp_path / "new" / "a.md")])
    monkeypatch.setattr("sys.excepthook", None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    chapters = chapters_of((tmp_path / "new" / "a.md").read_text(encoding="utf-8"))
    assert (answers_of(chapters[TEXT]), answers_of(chapters[VISION])) == ({"llama": "supported"}, {"llava": "supported"})
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'a.md'}\n"
