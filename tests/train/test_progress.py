"""What a run shows and leaves behind: exact lines without a terminal, a bar with one, each step once in metrics.jsonl."""

import io
import json
import logging
import os
from pathlib import Path

import datasets
import pytest
import transformers
from rich.console import Console

from diffvl.errors import CheckpointError
from diffvl.store.files import replace_text
from diffvl.store.metrics import measures_of, read_json_lines
from diffvl.terminal.bars import duration, number, quiet_libraries, spinner_or_line, track
from diffvl.train.progress import MetricsLog, TrainingProgress, Watchers


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=40), file


def terminal() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=100, force_terminal=True, force_interactive=True), file


# --- plain lines and spinners --------------------------------------------------------------------------------------------


def test_spinner_is_one_plain_line_without_a_terminal() -> None:
    console, file = plain()
    with spinner_or_line(console, "loading [bold] a checkpoint whose name is longer than the line"):
        pass
    assert file.getvalue() == "loading [bold] a checkpoint whose name is longer than the line\n"


def test_spinner_on_a_terminal_gives_the_cursor_back_after_an_error() -> None:
    console, file = terminal()
    with pytest.raises(KeyError), spinner_or_line(console, "loading"):
        raise KeyError("x")
    assert "loading" in file.getvalue()
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


def test_track_says_a_line_every_few_seconds_and_one_at_the_end() -> None:
    (console, file), clock = plain(), Clock()
    seen = []
    for item in track(console, "abcde", 5, "decoding", every=10, clock=clock):
        seen.append(item)
        clock.now += 6
    assert seen == list("abcde")
    assert file.getvalue().splitlines() == ["decoding: 2/5", "decoding: 4/5", "decoding: 5/5 done in 0:00:30"]


def test_track_without_a_known_length() -> None:
    console, file = plain()
    assert list(track(console, iter(range(3)), None, "reading")) == [0, 1, 2]
    assert file.getvalue() == "reading: 3 done in 0:00:00\n"


def test_track_on_a_terminal_counts() -> None:
    console, file = terminal()
    assert list(track(console, iter(range(3)), 3, "reading")) == [0, 1, 2]
    assert "3/3" in file.getvalue()


# --- TrainingProgress ----------------------------------------------------------------------------------------------------


def test_plain_training_lines_start_at_the_resumed_step() -> None:
    (console, file), clock = plain(), Clock()
    progress = TrainingProgress(console, "diffuse", every=10, clock=clock)
    progress.begin(40, 46)
    for step in range(41, 47):
        clock.now += 4
        progress.log(step, {"loss": 2.0 + step / 1000, "mask_ratio": 0.523, "tokens_per_second": 512.4, "learning_rate": 1e-4})
        progress.step(step)
    progress.end(46)
    # The speed is that of this process: 4 s a step, not 24 s / 46.
    assert file.getvalue().splitlines() == [
        "diffuse: 46 steps, going on after step 40",
        "diffuse: step 43/46  loss 2.043  mask 0.52  512 tok/s  0:00:12 left",
        "diffuse: step 46/46  loss 2.046  mask 0.52  512 tok/s  took 0:00:24",
    ]
    assert "\x1b" not in file.getvalue()


def test_evaluation_is_said_at_once() -> None:
    console, file = plain()
    progress = TrainingProgress(console, "align")
    progress.begin(0, 100)
    logs = {"eval_next_token_loss": 1.23456, "eval_tokens": 8120, "epoch": 0.5}
    progress.log(50, logs)
    assert file.getvalue().splitlines() == ["align: 100 steps", "align: held out, step 50: next token loss 1.235, tokens 8,120"]


def test_other_processes_show_and_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for is_main in (False, True):
        console, file = plain()
        watchers = Watchers(TrainingProgress(console, "diffuse", every=0), MetricsLog(path, "diffuse"), is_main)
        watchers.begin(0, 100)
        watchers.log(1, {"eval_loss": 1.0})
        watchers.step(1)
        watchers.end(100)
        assert bool(file.getvalue()) == path.exists() == is_main


def test_bar_on_a_terminal_starts_at_the_resumed_step() -> None:
    console, file = terminal()
    with TrainingProgress(console, "diffuse") as progress:
        progress.begin(40, 100)
        progress.log(41, {"loss": 2.5, "mask_ratio": 0.5, "tokens_per_second": 99.0})
        progress.step(41)
        list(track(console, range(2), 2, "evaluating"))  # a second bar while the first is shown
        progress.end(100)
    shown = file.getvalue()
    assert " 40/100" in shown and "2/2" in shown and "100/100" in shown
    assert "loss 2.500 mask 0.50 99 tok/s" in shown and "  0/100" not in shown


def test_bar_is_closed_by_an_exception() -> None:
    console, file = terminal()
    with pytest.raises(KeyboardInterrupt), TrainingProgress(console, "diffuse") as progress:
        progress.begin(0, 100)
        raise KeyboardInterrupt
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")
    progress.close()


def test_quiet_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")
    transformers.utils.logging.set_verbosity_info()
    transformers.utils.logging.enable_progress_bar()
    datasets.enable_progress_bars()
    try:
        quiet_libraries()
        assert not transformers.utils.logging.is_progress_bar_enabled()
        assert transformers.utils.logging.get_verbosity() == logging.WARNING
        assert datasets.are_progress_bars_disabled() and os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"
        assert logging.getLogger("datasets").isEnabledFor(logging.WARNING)
        assert not logging.getLogger("datasets").isEnabledFor(logging.INFO)
    finally:
        transformers.utils.logging.enable_progress_bar()
        datasets.enable_progress_bars()


# --- MetricsLog ----------------------------------------------------------------------------------------------------------


def test_metrics_lines(tmp_path: Path) -> None:
    path, clock = tmp_path / "metrics.jsonl", Clock()
    log = MetricsLog(path, "diffuse", clock=clock)
    log.begin(0)
    clock.now += 2.5
    log.log(1, {"loss": 2.1, "grad_norm": float("nan"), "epoch": 0.5})
    assert path.read_text().endswith("\n")  # on disk before the next step
    log.log(1, {"eval_masked_loss": 1.9})
    assert read_json_lines(path) == [
        {"stage": "diffuse", "step": 1, "loss": 2.1, "grad_norm": None, "epoch": 0.5, "seconds": 2.5},
        {"stage": "diffuse", "step": 1, "eval_masked_loss": 1.9, "seconds": 2.5},
    ]


def test_resume_drops_later_steps_and_the_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    path, clock = tmp_path / "metrics.jsonl", Clock()
    lines = [json.dumps({"stage": "diffuse", "step": step, "loss": float(step), "seconds": step * 10.0}) for step in range(1, 8)]
    path.write_text("\n".join(lines) + '\n{"stage": "diffuse", "st')
    log = MetricsLog(path, "diffuse", clock=clock)
    log.begin(4)
    clock.now += 3
    log.log(5, {"loss": 55.0})
    written = read_json_lines(path)
    assert [(line["step"], line["loss"]) for line in written] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 55.0)]
    assert written[-1]["seconds"] == 43.0  # goes on from step 4
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for loss in (3.0, 3.5):  # the second start evaluates step 0 again
        log = MetricsLog(path, "diffuse")
        log.begin(0)
        log.log(0, {"eval_masked_loss": loss})
        log.log(1, {"loss": loss})
    assert [(line["step"], line.get("loss"), line.get("eval_masked_loss")) for line in read_json_lines(path)] == [
        (0, None, 3.5),
        (1, 3.5, None),
    ]


# --- reading back --------------------------------------------------------------------------------------------------------


def test_bad_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: not valid JSON .*; correct or remove this line"):
        read_json_lines(path)
    path.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: expected a JSON object, not list; correct or remove it"):
        read_json_lines(path)
    path.write_text('{"question": "line\u2028separator"}\n\n{"a": 1}')  # one record a newline, and no newline at the end
    assert read_json_lines(path) == [{"question": "line\u2028separator"}, {"a": 1}]


def test_measures_leave_out_and_count_what_is_not_finite() -> None:
    lines = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 3.0}, {"step": 3, "loss": None}, {"step": 4, "loss": float("inf")}]
    lines += [{"loss": 9.0}, {"step": 2, "loss": 2.0, "epoch": 1.0, "stage": "align", "note": "text"}]
    measures = measures_of(lines)
    assert list(measures) == ["loss"]
    assert measures["loss"].points == [(1, 3.0), (2, 2.0)] and measures["loss"].lost == 2


def test_smoothing_is_the_mean_of_full_windows_only() -> None:
    loss = measures_of([{"step": step, "loss": float(step)} for step in range(1, 61)])["loss"]
    assert loss.window == 3
    assert loss.smoothed()[0] == (3, 2.0) and loss.smoothed()[-1] == (60, 59.0) and len(loss.smoothed()) == 58


def test_write_beside_keeps_the_old_text_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "new \ud800")
    assert path.read_text() == "old"


def test_numbers_and_durations() -> None:
    assert [number(value) for value in (812, 20000.0, 0.123456, 1e-5, 2.5e-05, 0.0, 123456.7)] == [
        "812", "20,000", "0.1235", "1e-5", "2.5e-5", "0", "1.235e5",
    ]  # fmt: skip
    assert number(10.425, digits=10) == "10.425" and number(float("nan")) == "nan"
    assert duration(3723.4) == "1:02:03"
