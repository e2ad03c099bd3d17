"""`make gpu-report`: what is run within the budget, what is kept, what is told of the rest, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from report_parts import HERE, Machine, done, part

from tools.gpu_report import __main__ as program
from tools.gpu_report import needs
from tools.gpu_report.parts import PARTS, ROOT, chosen
from tools.gpu_report.run import Ended, Outcome, Request, has_failed, launch, run_parts

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
    write = partial(program.write_report, tmp_path, "command", False, HERE)
    parts = [part("a"), part("b"), part("c")]
    last = done("c", words=["c"], figures={"x": 1})
    write([Outcome("a", "failed", ["a"], 1.0, why="x"), last])

    def interrupted(words: list[str], limit: float) -> Ended:
        if words == ["b"]:
            raise KeyboardInterrupt
        return Ended(0, '{"x": 2}', "")

    before = program.read_before(tmp_path / "report.json", False)
    with pytest.raises(KeyboardInterrupt):
        run_parts(Request(parts, 100, HERE, before=before), lambda line: None, write, interrupted)
    left = {one.name: one for one in program.read_before(tmp_path / "report.json", False)}
    assert left["a"].figures == {"x": 2} and left["c"] == last and "b" not in left


@pytest.mark.parametrize("figures", [{"passed": 1, "failed": {"b": "no"}}, {"agrees": False}])
def test_a_part_in_which_something_failed_is_done_again(figures: dict[str, Any], tmp_path: Path):
    """Its command ended well and is still the same; after a mend the report must be able to end well too."""
    before = [done("a", words=["a"], figures=figures), done("b", words=["b"], figures={"failed": {}})]
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
    program.write_report(tmp_path, "command", True, HERE, [failed])
    assert program.main(["--quick", "--only", "tests", "--out", str(tmp_path)], lambda *_: pytest.fail("it needs a GPU")) == 1
    assert program.read_before(tmp_path / "report.json", True) == [failed]


def test_tiny_figures_never_take_the_place_of_real_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    program.write_report(tmp_path, "command", False, HERE, [done("a", words=["a"], figures={"x": 1})])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    words = ["--quick", "--only", "tests", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        program.main(words, lambda *_: pytest.fail("nothing may be run"))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'report.json'} holds real figures" in said and "name another folder with --out" in said
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    program.write_report(tmp_path, "command", True, HERE, [])
    assert program.main(words, lambda *_: pytest.fail("the tests need a GPU")) == 0


def test_a_report_that_is_torn_is_made_anew(tmp_path: Path):
    assert program.read_before(tmp_path / "report.json", False) == []
    for text in ("{", "[]", '{"parts": [{"name": "a"}]}'):
        (tmp_path / "report.json").write_text(text, encoding="utf-8")
        assert program.read_before(tmp_path / "report.json", False) == []
    good = done("a", words=["a"], figures={"x": 1})
    program.write_report(tmp_path, "command", False, HERE, [good])
    apart = Outcome("sharding", "done", ["x"], figures={"agrees": False})
    assert has_failed(apart) and not has_failed(good), "figures that must agree and do not are a failure"
    assert program.read_before(tmp_path / "report.json", False) == [good]
    assert program.read_before(tmp_path / "report.json", True) == [], "tiny figures and real ones are never in one report"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_a_part_without_figures_has_failed():
    ends = {"a": Ended(0, "no figures", ""), "b": Ended(3, "", ""), "c": Ended(0, "[1]", "")}
    found = Machine(ends=ends).run([part("a"), part("b"), part("c")])
    assert all(found[name].state == "failed" and "no JSON object" in str(found[name].why) for name in ("a", "c"))
    assert found["b"].why == "exit code 3"


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
        end = time.monotonic() + 60
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


# --- as it is started ----------------------------------------------------------------------------------------------------------


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
