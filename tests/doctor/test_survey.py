"""docs/architectures.md: every model type of the installed transformers has its row, and no model can spoil the survey."""

import re
from pathlib import Path
from typing import Any

import pytest
from bad_models import judged
from helpers import QUIET

from diffvl.cli import main as cli
from diffvl.doctor import survey as architectures
from diffvl.doctor.checks import Check
from diffvl.doctor.survey import default_config, judge_type, model_types, page, survey
from diffvl.doctor.verdict import Verdict

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
ANSWERS = {"Supported": "supported", "Not supported": "not supported", "Unknown": "unknown"}


def answers_of(text: str) -> dict[str, str]:
    """Model type -> answer, from the sections of a page; a type stands in one of them."""
    found: dict[str, str] = {}
    for section in text.split("\n## ")[1:]:
        title = section.partition("\n")[0]
        for name in re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE):
            if title in ANSWERS:
                assert name not in found, f"{name} stands there twice"
                found[name] = ANSWERS[title]
    return found


# --- the page ------------------------------------------------------------------------------------------------------------


def test_every_model_type_has_its_verdict_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    assert sorted(answers_of(text)) == model_types(), "write it again: diffvl doctor --all --out docs/architectures.md"
    assert f"| model types | {len(model_types())} |" in text
    for answer in ANSWERS.values():
        assert f"| {answer} | {list(answers_of(text).values()).count(answer)} |" in text


def test_the_page_holds_what_the_survey_found():
    good = Verdict("llama", "llama", "supported", copy="2 layers", checks=(Check("AR parity", True, 2e-6, "< 0.001"),))
    limited = Verdict("llama4_text", "llama4_text", "supported", reason="exact up to 7", limit=7, checks=good.checks)
    almost = Verdict("gemma3", "gemma3", "not supported", "vision", "has a | in it", checks=good.checks)
    bad = Verdict("gpt_neo", "gpt_neo", "not supported", "own mask", "why", checks=(Check("no leak", False, 2.5, "< 0.001"),))
    lost = Verdict("xlm", "xlm", "unknown", "no answer", "xlm: no answer within 5 s")
    text = page([good, limited, almost, bad, lost], Path("docs/x.md"))
    assert answers_of(text) == {
        **{"llama": "supported", "llama4_text": "supported", "xlm": "unknown"},
        **{"gemma3": "not supported", "gpt_neo": "not supported"},
    }
    assert "Written by `diffvl doctor --all --out docs/x.md` on 20" in text
    for line in (
        "| of these, attention passes | 1 |",
        "| largest error of a supported one | 2.0e-06 |",
        "| smallest error of one whose attention fails | 2.5 |",
        "| `llama4_text` | Llama4ForCausalLM | - | 2.0e-06 | exact up to 7 |",
        "### Vision (1)",
        "| `gemma3` | Gemma3ForConditionalGeneration | 2e-06 | has a \\| in it |",
        "| `xlm` | XLMWithLMHeadModel | xlm: no answer within 5 s |",
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
def test_the_page_is_up_to_date():
    found = {verdict.model_type: verdict.answer for verdict in survey(model_types(), QUIET)}
    assert found == answers_of(PAGE.read_text(encoding="utf-8")), (
        "write it again: diffvl doctor --all --out docs/architectures.md"
    )


def test_the_command_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    verdict = Verdict("llama", "llama", "supported", checks=(Check("AR parity", True, 0.0, "< 0.001"),))
    monkeypatch.setattr(architectures, "survey", lambda types, console: [verdict])
    monkeypatch.setattr("sys.argv", ["diffvl", "doctor", "--all", "--out", str(tmp_path / "new" / "a.md")])
    monkeypatch.setattr("sys.excepthook", None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert answers_of((tmp_path / "new" / "a.md").read_text(encoding="utf-8")) == {"llama": "supported"}
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'a.md'}\n"
