"""`make gpu-report`: what is run within the budget, what is kept, what is told of the rest, and the tables."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tiny_runs import command

from diffvl.bench import machine
from tools.gpu_report import __main__ as program
from tools.gpu_report import gpu_tests, needs, sharding
from tools.gpu_report.parts import PARTS, ROOT, Part, chosen
from tools.gpu_report.run import Ended, Outcome, Request, has_failed, launch, run_parts
from tools.gpu_report.tables import page


def part(name: str, seconds: int = 10, missing: str | None = None) -> Part:
    return Part(name, f"about {name}", seconds, lambda quick: [name, *(["--quick"] if quick else [])], lambda quick: missing)


@dataclass
class Machine:
    """Stands for programs and the time that they take. ends: how a part ends; well, unless it is named."""

    takes: float = 10.0
    now: float = 0.0
    ends: dict[str, Ended] = field(default_factory=dict)
    launched: list[tuple[str, float]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def launch(self, words: list[str], limit: float) -> Ended:
        self.launched.append((words[0], limit))
        self.now += min(self.takes, limit)
        return self.ends.get(words[0], Ended(0, f'some line\n{{"name": "{words[0]}"}}\n', ""))

    def run(self, parts: list[Part], budget: float = 100.0, quick: bool = False, before: Any = ()) -> dict[str, Outcome]:
        request = Request(parts, budget, quick, list(before))
        saved: list[list[str]] = []

        def save(outcomes: list[Outcome]) -> None:
            saved.append([one.name for one in outcomes])

        found = run_parts(request, self.said.append, save, self.launch, lambda: self.now)
        names, earlier = [one.name for one in parts], {one.name for one in request.before}
        others = [one.name for one in found[len(parts) :]]
        ahead = [[name for name in names[count:] if name in earlier] for count in range(1, len(parts) + 1)]
        assert saved == [names[: count + 1] + ahead[count] + others for count in range(len(parts))]
        return {one.name: one for one in found}


# --- what is run -------------------------------------------------------------------------------------------------------------


def test_parts_are_chosen_by_name_or_by_how_their_names_begin():
    names = [one.name for one in PARTS]
    assert [one.name for one in chosen([], [])] == names and len(set(names)) == len(names)
    assert {"decode-1", "decode-8", "decode-32", "tests", "sharding", "memory", "train-L3000-R300"} <= set(names)
    assert [one.name for one in chosen(["decode"], ["decode-8"])] == ["decode-1", "decode-32"]
    assert "decode-1" in [one.name for one in chosen(["decode-1"], [])] and len(chosen(["decode-1"], [])) == 1
    with pytest.raises(ValueError, match="no part is called 'bench'; there are decode-1"):
        chosen(["bench"], [])
    with pytest.raises(ValueError, match="nothing is left"):
        chosen(["tests"], ["tests"])


def test_a_part_that_would_not_fit_is_skipped_and_said_and_later_ones_are_looked_at():
    there = Machine()
    found = there.run([part("a"), part("long", 200), part("b"), part("c", missing="no torch here")])
    assert [(name, one.state) for name, one in found.items()] == [
        *(("a", "done"), ("long", "skipped"), ("b", "done"), ("c", "skipped")),
    ]
    assert found["long"].why == "would not fit: about 200 s, of the budget 90 s are left" and found["c"].why == "no torch here"
    assert any("long: skipped: would not fit" in line for line in there.said)
    assert there.launched == [("a", 20), ("b", 20)], "a part may take twice its estimate, and no more than is left"
    assert found["a"].figures == {"name": "a"} and found["a"].seconds == 10.0


def test_what_is_done_is_not_done_again_and_the_rest_is():
    parts = [part("a"), part("failed"), part("stopped"), part("late", 50)]
    ends = {"failed": Ended(1, "", "line 1\nthe reason"), "stopped": Ended(None, "", "")}
    found = Machine(ends=ends).run(parts, budget=60)
    assert {name: one.state for name, one in found.items()} == dict(a="done", failed="failed", stopped="stopped", late="skipped")
    assert found["failed"].why == "line 1\nthe reason" and found["stopped"].why == "ran out of time"
    again = Machine()
    last = again.run(parts, before=found.values())
    assert [name for name, _ in again.launched] == ["failed", "stopped", "late"] and "a: done before" in again.said
    assert all(one.state == "done" for one in last.values()) and last["a"].figures == {"name": "a"}
    tiny = Machine()
    tiny.run(parts[:1], quick=True, before=found.values())
    assert [name for name, _ in tiny.launched] == ["a"], "another command is another measurement"
    one = Machine().run(parts[3:], before=found.values())
    assert list(one) == ["late", "a", "failed", "stopped"], "parts that were not asked for stay"


def test_a_run_that_is_interrupted_loses_nothing_that_was_done(tmp_path: Path):
    """Interrupted in its second part, before it has come to the last, which was done."""
    write = partial(program.write_report, tmp_path, "command", False)
    parts = [part("a"), part("b"), part("c")]
    done = Outcome("c", "done", ["c"], 1.0, figures={"x": 1})
    write([Outcome("a", "failed", ["a"], 1.0, why="x"), done])

    def interrupted(words: list[str], limit: float) -> Ended:
        if words == ["b"]:
            raise KeyboardInterrupt
        return Ended(0, '{"x": 2}', "")

    before = program.read_before(tmp_path / "report.json", False)
    with pytest.raises(KeyboardInterrupt):
        run_parts(Request(parts, 100, before=before), lambda line: None, write, interrupted)
    left = {one.name: one for one in program.read_before(tmp_path / "report.json", False)}
    assert left["a"].figures == {"x": 2} and left["c"] == done and "b" not in left


@pytest.mark.parametrize("figures", [{"passed": 1, "failed": {"b": "no"}}, {"agrees": False}])
def test_a_part_in_which_something_failed_is_done_again(figures: dict[str, Any], tmp_path: Path):
    """Its command ended well and is still the same; after a mend the report must be able to end well too."""
    before = [Outcome("a", "done", ["a"], 1.0, figures=figures), Outcome("b", "done", ["b"], 1.0, figures={"failed": {}})]
    again = Machine()
    found = again.run([part("a"), part("b")], before=before)
    assert [name for name, _ in again.launched] == ["a"] and found["b"] == before[1]
    assert found["a"].figures == {"name": "a"} and not any(map(has_failed, found.values()))
    assert Machine().run([part("a", 200)], before=before)["a"] == before[0], "what is skipped has still failed"


@pytest.mark.parametrize(
    "before",
    [
        Outcome("a", "failed", ["a"], 2.0, why="the reason"),
        Outcome("a", "stopped", ["a"], 2.0, why="ran out of time"),
        Outcome("a", "done", ["a", "--with", "other words"], 2.0, figures={"x": 1}),
    ],
)
def test_what_an_earlier_run_found_stays_where_a_part_is_skipped(before: Outcome):
    there = Machine()
    for skipped in (part("a", 200), part("a", missing="no pytest here")):
        assert there.run([skipped], before=[before])["a"] == before
    assert there.launched == [] and f"a: what an earlier run found stays: {before.state}" in there.said
    assert there.run([part("a")], before=[before])["a"].figures == {"name": "a"}, "and where there is time it is run again"
    never = Outcome("a", "skipped", ["a"], why="no torch here")
    assert there.run([part("a", missing="no pytest here")], before=[never])["a"].why == "no pytest here"


def test_a_failure_of_an_earlier_run_is_in_the_exit_code_of_one_that_skips_the_part(tmp_path: Path):
    failed = Outcome("tests", "failed", ["x"], 2.0, why="the reason")
    program.write_report(tmp_path, "command", True, [failed])
    assert program.main(["--quick", "--only", "tests", "--out", str(tmp_path)], lambda *_: pytest.fail("it needs a GPU")) == 1
    assert program.read_before(tmp_path / "report.json", True) == [failed]


def test_tiny_figures_never_take_the_place_of_real_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    program.write_report(tmp_path, "command", False, [Outcome("a", "done", ["a"], 1.0, figures={"x": 1})])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    words = ["--quick", "--only", "tests", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        program.main(words, lambda *_: pytest.fail("nothing may be run"))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'report.json'} holds real figures" in said and "name another folder with --out" in said
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    program.write_report(tmp_path, "command", True, [])
    assert program.main(words, lambda *_: pytest.fail("the tests need a GPU")) == 0


def test_a_report_that_is_torn_is_made_anew(tmp_path: Path):
    assert program.read_before(tmp_path / "report.json", False) == []
    for text in ("{", "[]", '{"parts": [{"name": "a"}]}'):
        (tmp_path / "report.json").write_text(text, encoding="utf-8")
        assert program.read_before(tmp_path / "report.json", False) == []
    done = Outcome("a", "done", ["a"], 1.0, figures={"x": 1})
    program.write_report(tmp_path, "command", False, [done])
    apart = Outcome("sharding", "done", ["x"], figures={"agrees": False})
    assert has_failed(apart) and not has_failed(done), "figures that must agree and do not are a failure"
    assert program.read_before(tmp_path / "report.json", False) == [done]
    assert program.read_before(tmp_path / "report.json", True) == [], "tiny figures and real ones are never in one report"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_a_part_without_figures_has_failed():
    found = Machine(ends={"a": Ended(0, "no figures", ""), "b": Ended(3, "", "")}).run([part("a"), part("b")])
    assert found["a"].state == "failed" and "no JSON" in str(found["a"].why) and found["b"].why == "exit code 3"


def test_a_program_is_ended_with_its_children(tmp_path: Path):
    ended = launch(["-c", "import sys; print('{}'); print('said', file=sys.stderr); sys.exit(4)"], 60)
    assert ended == Ended(4, "{}\n", "said\n")
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(1.2); pathlib.Path({str(mark)!r}).touch()"
    parent = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); print(1, flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    assert launch(["-c", parent], 0.6).code is None and time.monotonic() - start < 20
    time.sleep(max(0.0, start + 2.2 - time.monotonic()))
    assert not mark.exists()


def test_what_a_part_says_in_another_encoding_is_told():
    ended = launch(["-c", "import sys; sys.stdout.buffer.write(b'caf\\xe9'); sys.stderr.buffer.write('gr\u00fcn'.encode())"], 60)
    assert ended == Ended(0, "caf\ufffd", "gr\u00fcn")


def test_a_program_that_has_just_ended_by_itself_is_no_mistake(monkeypatch: pytest.MonkeyPatch):
    def killpg(group: int, number: int) -> None:
        os.kill(group, number)
        raise ProcessLookupError

    monkeypatch.setattr(os, "killpg", killpg)
    assert launch(["-S", "-c", "import time; time.sleep(60)"], 0.3).code is None


# What is started: a report whose only part writes its process id and sleeps.
SLEEPING = """
import signal, sys
from tools.gpu_report import __main__ as program
from tools.gpu_report.run import launch

if sys.argv[2] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
child = f"import os, pathlib, time; pathlib.Path({sys.argv[1] + '/id'!r}).write_text(str(os.getpid())); time.sleep({sys.argv[3]})"
words = ["--quick", "--only", "decode-1", "--out", sys.argv[1] + "/out"]
sys.exit(program.main(words, lambda words, limit: launch(["-S", "-c", child], limit)))
"""


@contextmanager
def sleeping_report(folder: Path, how: str = "", seconds: float = 60) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The report's process, and the id of its part's once that runs. Whatever happens neither is left."""
    process = subprocess.Popen([sys.executable, "-c", SLEEPING, str(folder), how, str(seconds)], cwd=ROOT)
    mark, part_id = folder / "id", 0
    try:
        end = time.monotonic() + 30
        while not (mark.is_file() and mark.read_text()):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        part_id = int(mark.read_text())
        yield process, part_id
    finally:
        process.kill()
        process.wait()
        if part_id:
            with suppress(ProcessLookupError):
                os.kill(part_id, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_report_that_is_told_to_end_leaves_no_part_running(number: signal.Signals, tmp_path: Path):
    with sleeping_report(tmp_path) as (process, part_id):
        process.send_signal(number)
        assert process.wait(30) == 128 + number
        with pytest.raises(ProcessLookupError):
            os.kill(part_id, 0)


def test_a_report_under_nohup_goes_on_where_the_terminal_is_closed(tmp_path: Path):
    with sleeping_report(tmp_path, "nohup", 1.0) as (process, _):
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == 1, "the part printed no figures, and that is told"
    assert json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))["parts"][0]["state"] == "failed"


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
    assert "| tests | skipped | - | the tests need a GPU |" in text and "Losses of 5 steps agree" in text
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
    report = {"date": "2026-11-29", "command": "x", "quick": True, "machines": []}
    assert "DO NOT AGREE" in page(report, [Outcome("sharding", "done", [], 1.0, figures=figures)])


def test_losses_that_are_not_finite_do_not_agree(monkeypatch: pytest.MonkeyPatch):
    found = iter([[1.0, float("nan"), float("nan")], [1.0, float("nan"), 2.0]])

    def steps_of(*_: Any) -> dict[str, Any]:
        return {"losses": next(found), "step_seconds": 1.0, "peak_bytes": None}

    monkeypatch.setattr(sharding, "steps_of", steps_of)
    figures = sharding.compared(sharding.torch.device("cpu"), quick=True)
    assert figures["agrees"] is False and figures["largest_difference"] is None
    done = Outcome("sharding", "done", [], 1.0, figures=figures)
    assert has_failed(done)
    told = page({"date": "2026-11-29", "command": "x", "quick": True, "machines": []}, [done])
    assert "Losses of 3 steps DO NOT AGREE: not all are finite." in told


def test_failed_tests_are_figures_and_the_report_says_so(tmp_path: Path):
    xml = '<s><testcase name="a" time="1.25"/><testcase name="b" time="1"><failure message="no | so&#10;more"/></testcase>'
    xml += '<testcase name="c" time="0"><skipped/></testcase></s>'
    figures = gpu_tests.figures(ElementTree.fromstring(xml))
    assert figures == {"passed": 1, "failed": {"b": "no | so"}, "skipped": 1, "seconds": 2.2}
    done = Outcome("tests", "done", [], 3.0, figures=figures)
    text = page({"date": "2026-11-29", "command": "x", "quick": False, "machines": []}, [done])
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


@pytest.mark.slow
def test_a_quick_report_as_it_is_started(tmp_path: Path):
    """Each part in a process of its own."""
    words = ["-m", "tools.gpu_report", "--quick", "--out", str(tmp_path), "--only", "decode-1", "--only", "sharding"]
    ended = launch(words, 600)
    assert ended.code == 0, ended.said
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert {one["name"]: one["state"] for one in report["parts"]} == {"decode-1": "done", "sharding": "done"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "bench"], "no part is called 'bench'"),
        (["--budget", "0"], "--budget 0: expected seconds above 0"),
        ([], "torch sees no CUDA device here"),
    ],
)
def test_wrong_words_end_in_one_message(words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    with pytest.raises(SystemExit) as stop:
        program.main([*words, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and says in capsys.readouterr().err and not (tmp_path / "out").exists()


# --- what a machine needs ----------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named_with_the_pinned_versions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    there = {"transformers": "5.17.0", "torch": "2.11.0+cu130", "rich": "15.0.0"}

    def version(name: str) -> str:
        if name in ("pydantic", "diffvl"):
            raise needs.PackageNotFoundError(name)
        return there.get(name, "99.0")

    monkeypatch.setattr(needs, "version", version)
    missing = needs.missing_packages()
    assert "diffvl" in missing and {name.partition("==")[0] for name in missing} == {"diffvl", "pydantic", "transformers"}
    assert all("==" in name for name in missing if name != "diffvl")
    assert program.main(["--needs"]) == 1
    said = capsys.readouterr().out
    assert "pip wheel -w wheels --no-deps ." in said and "--system-site-packages" in said
    monkeypatch.setattr(needs, "version", lambda name: "99.0")
    assert program.main(["--needs"]) == 0


def test_needs_and_the_list_are_told_by_the_standard_library_alone():
    """Where nothing is installed yet, somebody has to say what is to be."""
    check = "import sys; from tools.gpu_report.__main__ import main; main(['--list'])\n"
    check += "sys.exit(bool({'torch', 'diffvl', 'rich', 'pytest'} & set(sys.modules)))"
    ended = launch(["-S", "-c", check], 60)
    assert ended.code == 0 and "decode-1" in ended.out, ended.said
    assert sys.version_info >= (3, 11)
