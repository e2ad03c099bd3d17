"""`make gpu-report`: where its figures come from, its tables, and its real parts on tiny sizes."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from report_parts import HERE, Machine, done, part
from tiny_runs import command

from diffvl.bench import machine
from diffvl.config.recipe import VERSION
from tools.gpu_report import __main__ as program
from tools.gpu_report import gpu_tests, origin, sharding
from tools.gpu_report.origin import find_origin
from tools.gpu_report.run import Ended, Outcome, Request, has_failed, run_parts
from tools.gpu_report.tables import page

ANEW = "another --out measures it anew"


def page_of(*outcomes: Outcome) -> str:
    return page("x", False, HERE, outcomes)


# --- where figures come from, and the page -----------------------------------------------------------------------------------


def test_a_part_is_measured_again_on_another_accelerator_and_kept_of_another_commit():
    before = [
        done("same", words=["same"], figures={"x": 1}),
        done("device", words=["device"], figures={"x": 1}, origin=replace(HERE, accelerator="GPU B")),
        done("version", words=["version"], figures={"x": 1}, origin=replace(HERE, version="0.0.9")),
        done("commit", words=["commit"], figures={"x": 1}, origin=replace(HERE, commit="def", date="2026-11-01")),
        done("unknown", words=["unknown"], figures={"x": 1}, origin=None),
    ]
    there = Machine()
    found = there.run([part(one.name) for one in before], before=before)
    assert [name for name, _ in there.launched] == ["device", "version", "unknown"]
    assert all(found[name].origin == HERE and found[name].figures == {"name": name} for name, _ in there.launched)
    assert found["same"] == before[0] and found["commit"] == before[3]
    kept = f"on 2026-11-01 with diffvl 0.1.0, commit def, this is 0.1.0, commit abc: kept; {ANEW}"
    assert {
        "same: done before",
        f"commit: done before {kept}",
        "device: done before on GPU B, this is GPU A: again",
        "version: done before with diffvl 0.0.9, this is 0.1.0: again",
        "unknown: done before, it is not known on what accelerator: again",
    } <= set(there.said)
    assert Machine().run([part("device", 200)], before=before)["device"] == before[1], "no time for it: what there is stays"


def test_figures_of_code_that_was_changed_and_may_have_been_again_are_told():
    changed = replace(HERE, commit="abc with changes")
    said: list[str] = []
    before = done("a", words=["a"], figures={"x": 1}, origin=changed)
    request = Request([part("a")], 100, changed, before=[before])
    assert run_parts(request, said.append, lambda _: None, lambda *_: pytest.fail("it is kept")) == [before]
    assert said == [f"a: done before on 2026-11-29 with diffvl {changed.code}, this is {changed.code}: kept; {ANEW}"]


def test_each_part_says_where_its_figures_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The report of two days and two machines, by its own command; tests and memory name no machine themselves."""

    def run(words: list[str], limit: float) -> Ended:
        named = "memory" if "memory" in words[-1] else "tests"
        figures = {"memory": {"widths": "w", "lines": ["l"]}, "tests": {"passed": 1, "failed": {}, "skipped": 0, "seconds": 1}}
        return Ended(0, json.dumps(figures[named]), "")

    for accelerator, date, name in (("GPU B", "2026-11-01", "memory"), ("GPU A", "2026-11-29", "tests")):
        monkeypatch.setattr(program, "_accelerator", lambda accelerator=accelerator: accelerator)
        monkeypatch.setattr(program, "find_origin", lambda name, date=date: replace(HERE, accelerator=name, date=date))
        assert program.main(["--only", name, "--out", str(tmp_path)], run) == 0
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert {one["name"]: (one["origin"]["accelerator"], one["origin"]["date"]) for one in report["parts"]} == {
        "tests": ("GPU A", "2026-11-29"),
        "memory": ("GPU B", "2026-11-01"),
    }
    assert report["machines"] == ["GPU A", "GPU B"] and (report["commit"], report["version"]) == ("abc", "0.1.0")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Machine: GPU A; and GPU B. Last run: 2026-11-29, GPU A, diffvl 0.1.0, commit abc" in text
    assert "Kept from another accelerator or other code than the last run's: memory; see Parts." in text
    assert "| memory | done | 0 | 2026-11-01 | GPU B | 0.1.0, commit abc |  |" in text


def test_a_table_that_cannot_be_made_loses_no_figures_and_no_other_table(tmp_path: Path):
    tests = done("tests", words=[], figures={"passed": 1, "failed": {}, "skipped": 0, "seconds": 1})
    odd = [
        done("decode-1", words=[], figures={"rows": [{"batch": 1}], "machine": {"device": "cuda", "torch": "2.13"}}),
        done("train-L512-R400", words=[], figures={"rows": [], "machine": "?"}),
        done("sharding", words=[], figures={"whole": None}),
        done("memory", words=[], figures={"lines": 3}),
    ]
    program.write_report(tmp_path, "command", False, HERE, [*odd, tests])
    assert program.read_before(tmp_path / "report.json", False) == [*odd, tests]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.count("This section could not be made (") == 5 and text.count("its figures are in report.json.") == 5
    assert "## Decoding\n\nThis section could not be made (KeyError: 'decoder')" in text
    assert "1 passed, 0 failed, 0 skipped" in text and "Machine: ?, ?, torch 2.13, transformers ?; and GPU A." in text


def test_figures_are_on_disk_before_the_page_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> str:
        raise AssertionError("a fault of ours")

    monkeypatch.setattr(program, "page", fail)
    with pytest.raises(AssertionError):
        program.write_report(tmp_path, "command", False, HERE, [done("a", words=["a"], figures={"x": 1})])
    assert program.read_before(tmp_path / "report.json", False)[0].figures == {"x": 1}


def test_a_table_of_two_machines_says_so():
    row = dict.fromkeys(("shape", "form", "attention"), "s") | dict.fromkeys(("step_seconds", "spread", "tokens_per_second"), 1.0)
    row |= {"peak_bytes": None, "mfu": None, "ratio_to": {"ar": 1.0}}
    figures = {"rows": [row], "machine": {"trunk": {"layers": 2}}}
    one, other = done("train-L1-R1", words=[], figures=figures), done("train-L2-R2", words=[], figures=figures)
    note = "Not all of one accelerator and code: train-L1-R1 GPU A, diffvl 0.1.0, commit abc; train-L2-R2 GPU B, diffvl 0.1.0"
    assert note in page_of(one, replace(other, origin=replace(HERE, accelerator="GPU B")))
    assert "Not all of one" not in page_of(one, other)


def test_the_origin_is_what_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not what is installed; a repository around a folder without git says nothing of it."""
    assert find_origin("GPU A").version == VERSION and find_origin(None).device == "CPU"
    git = ("git", "-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false", "-C", str(tmp_path))
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "file").write_text("1", encoding="utf-8")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "m"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(origin, "ROOT", tmp_path)
    assert find_origin(None).code == f"{VERSION}, commit {commit}"
    (tmp_path / "file").write_text("2", encoding="utf-8")
    assert find_origin(None).commit == f"{commit} with changes"
    monkeypatch.setattr(origin, "ROOT", inner)
    assert find_origin(None).code == VERSION
    monkeypatch.setattr(origin, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(inner))
    assert find_origin(None).commit is None, "no git on this machine"


# --- real parts, tiny --------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_this_process(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str], float], Ended]:
    """Runs a part here: to import torch for each takes longer than all of them."""

    def run(words: list[str], limit: float) -> Ended:
        if words[1] == "diffvl.cli":
            ended = command(*words[2:])
            return Ended(ended.code, ended.out, ended.err)
        assert words[1] == "tools.gpu_report.sharding"
        capsys.readouterr()
        sharding.main(words[2:])
        return Ended(0, capsys.readouterr().out, "")

    return run


def test_a_quick_report_on_a_cpu(in_this_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One part of each kind, by their own commands; the page and the JSON."""
    monkeypatch.setitem(machine.MATRIX_SIDE, "cpu", 128)  # what the machine reaches is not asked for here
    monkeypatch.setitem(machine.BUFFER_BYTES, "cpu", 2**20)
    monkeypatch.setattr(sharding, "STEPS", 5)
    parts = ["decode-1", "train-L512-R400", "sharding", "tests", "memory"]
    words = ["--quick", "--out", str(tmp_path), *(word for name in parts for word in ("--only", name))]
    words += ["--skip", "memory"]
    assert program.main(words, in_this_process) == 0
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    states = {one["name"]: one["state"] for one in report["parts"]}
    assert states == {"decode-1": "done", "tests": "skipped", "train-L512-R400": "done", "sharding": "done"}
    assert (
        report["quick"]
        and len(report["machines"]) == 1
        and "torch" in report["machines"][0]
        and str(tmp_path) in report["command"]
    )
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for heading in ("Parts", "Decoding", "The weight-streaming floor", "A training step", "FSDP2 in one process"):
        assert f"## {heading}\n" in text
    assert "| 1 | ours | 4 | 0.500 |" in text and "| L40-R32 | ours | tiled |" in text and "these figures mean nothing" in text
    assert "| tests | skipped | - | - | - | - | the tests need a GPU |" in text and "Losses of 5 steps agree" in text
    widths = [{line.count("|") for line in block.splitlines()} for block in text.split("\n\n") if block.startswith("|")]
    assert widths and all(len(width) == 1 for width in widths), "every row of a table has its cells"


def test_sharding_that_computes_something_else_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """With the bug built: a model that trains on other weights."""
    real, seeds = sharding.steps_of, iter((0, 1))

    def other(device: Any, quick: bool, stage: Any, in_parts: bool) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            seed, build = next(seeds), sharding.build_model
            patch.setattr(sharding, "build_model", lambda *given, **_: build(*given, seed=seed))
            return real(device, quick, stage, in_parts=False)

    monkeypatch.setattr(sharding, "steps_of", other)
    monkeypatch.setattr(sharding, "STEPS", 5)
    figures = sharding.compared(sharding.torch.device("cpu"), quick=True)
    assert not figures["agrees"] and figures["largest_difference"] > 1e-4
    assert "DO NOT AGREE" in page_of(done("sharding", words=[], figures=figures))


def test_losses_that_are_not_finite_do_not_agree(monkeypatch: pytest.MonkeyPatch):
    found = iter([[1.0, float("nan"), float("nan")], [1.0, float("nan"), 2.0]])

    def steps_of(*_: Any) -> dict[str, Any]:
        return {"losses": next(found), "step_seconds": 1.0, "peak_bytes": None}

    monkeypatch.setattr(sharding, "steps_of", steps_of)
    figures = sharding.compared(sharding.torch.device("cpu"), quick=True)
    assert figures["agrees"] is False and figures["largest_difference"] is None
    outcome = done("sharding", words=[], figures=figures)
    assert has_failed(outcome)
    assert "Losses of 3 steps DO NOT AGREE: not all are finite." in page_of(outcome)


def test_failed_tests_are_figures_and_the_report_says_so(tmp_path: Path):
    xml = '<s><testcase name="a" time="1.25"/><testcase name="b" time="1"><failure message="no | so&#10;more"/></testcase>'
    xml += '<testcase name="c" time="0"><skipped/></testcase></s>'
    figures = gpu_tests.figures(ElementTree.fromstring(xml))
    assert figures == {"passed": 1, "failed": {"b": "no | so"}, "skipped": 1, "seconds": 2.2}
    text = page_of(done("tests", words=[], figures=figures))
    assert "1 passed, 1 failed, 1 skipped" in text and "| b | no / so |" in text


SKIPPED = '<testcase name="{}" time="0"><skipped message="{}"/></testcase>'


@pytest.mark.parametrize(
    ("cases", "why"),
    [
        ("", "no test was found"),
        (SKIPPED.format("a", "no CUDA") + SKIPPED.format("b", "no CUDA"), "no test was run: 2 skipped (no CUDA)"),
        (SKIPPED.format("a", "no CUDA") + '<testcase name="b"/>', None),
        ('<testcase name="b"><failure message="x"/></testcase>', None),
    ],
)
def test_tests_of_which_none_was_run_have_failed(
    cases: str, why: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        xml = next(word.partition("=")[2] for word in words if word.startswith("--junitxml="))
        Path(xml).write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", encoding="utf-8")
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(gpu_tests.subprocess, "run", run)
    if why is None:
        gpu_tests.main()
        assert json.loads(capsys.readouterr().out)
    else:
        with pytest.raises(SystemExit) as stop:
            gpu_tests.main()
        assert stop.value.code == why, "an exit with words is code 1, and the report says the words"
