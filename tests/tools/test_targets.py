"""`python -m tools.targets`: which figures of a report are held against which limits, and how the program ends."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import succeed

from tools import targets
from tools.targets import Target, decode_targets, train_targets

Row = dict[str, Any]


# --- training --------------------------------------------------------------------------------------------------------------


def rows_with(seconds: dict[str, float], peaks: dict[str, int | None], shape: str = "L3000-R300") -> list[Row]:
    return [{"form": form, "shape": shape, "step_seconds": seconds[form], "peak_bytes": peaks[form]} for form in seconds]


def test_training_targets_are_held_against_their_own_shape_and_device():
    seconds = {"ar": 4.0, "ar_answer_logits": 3.0, "published": 10.0, "ours": 4.0}
    peaks: dict[str, int | None] = {"ar": 9, "ar_answer_logits": 9, "published": 100, "ours": 46}
    found = train_targets(rows_with(seconds, peaks) + rows_with({**seconds, "ours": 1.0}, peaks, "L512-R400"), "cpu")
    assert [(target.limit, target.value, target.is_met) for target in found] == [
        (0.40, 0.4, True),
        (0.45, 0.46, False),
        (1.0, 1.0, True),
        (1.2, pytest.approx(4 / 3), False),
    ]
    on_cuda = train_targets(rows_with(seconds, peaks), "cuda")
    assert [(target.limit, target.is_met) for target in on_cuda] == [(0.35, False), (1.0, True)]


def test_a_target_without_its_figures_is_not_called_met():
    seconds = {"published": 10.0, "ours": 4.0}
    found = train_targets(rows_with(seconds, {"published": None, "ours": None}), "cpu")
    assert [target.is_met for target in found] == [True, None, None, None]
    assert found[1] == Target("peak memory, ours / published, L3000-R300", "<=", 0.45, None)
    assert [target.is_met for target in train_targets([], "cuda")] == [None] * len(targets.TRAIN["cuda"])


# --- decoding --------------------------------------------------------------------------------------------------------------


def made_up(decoder: str, steps: int, batch: int, speed: float, **more: Any) -> Row:
    common = {"block_size": 1 if decoder == "ar_generate" else 8, "tokens_per_second": speed, "forward_seconds": 0.006}
    common |= {"prefill_forwards": int(decoder == "published")}
    if decoder != "ar_generate":
        extra = 9 if decoder == "published" else 0
        common |= {"blocks": 8, "steps_due": 8 * steps, "forwards": 8 * steps + extra}
    return {"decoder": decoder, "steps": steps, "batch": batch, "compiled": False, **common, **more}


def test_decoding_targets_of_a_cpu():
    speeds = {8: (10.0, 10.0), 4: (18.0, 20.0), 2: (30.0, 32.0)}
    rows = [made_up("ar_generate", 1, 1, 25.0)]
    for steps, (other, own) in speeds.items():
        rows += [made_up("published", steps, 1, other), made_up("ours", steps, 1, own)]
    rows += [made_up("ours", 8, 8, 17.9), made_up("ours", 4, 8, 36.0)]
    found = {target.text: target for target in decode_targets(rows, "cpu", 0.004)}
    assert [(target.value, target.is_met) for text, target in found.items() if "ours / published" in text] == [
        (1.0, True),
        (pytest.approx(20 / 18), True),
        (pytest.approx(32 / 30), False),
    ]
    gains = [(target.value, target.is_met) for text, target in found.items() if "batch 8 / batch 1" in text]
    assert gains == [(pytest.approx(1.79), False), (1.8, True), (None, None)]
    text = "forwards, ours, 4 steps, batch 1, 8 blocks"
    assert found[text] == Target(text, "=", 32, 32)
    assert found["forwards, published, 4 steps, batch 1, 8 blocks"].value == 40
    assert not any("ar_generate" in text for text in found)


def test_decoding_targets_of_cuda():
    rows = [made_up("ar_generate", 1, 1, 100.0), made_up("published", 4, 1, 100.0), made_up("ours", 4, 1, 160.0)]
    found = decode_targets(rows, "cuda", 0.004)[2:]
    assert [(target.relation, target.limit, target.value, target.is_met) for target in found] == [
        (">=", 1.5, 1.6, True),
        (">=", 2.0, 1.6, False),
        ("<=", 1.5, pytest.approx(1.5), True),
    ]


def test_on_cuda_ours_is_measured_compiled_and_ar_is_not():
    rows = [made_up("ar_generate", 1, 1, 100.0), made_up("published", 4, 1, 100.0), made_up("ours", 4, 1, 110.0)]
    rows += [made_up("ar_generate", 1, 1, 190.0, compiled=True)]
    rows += [made_up("ours", 4, 1, 250.0, compiled=True, forward_seconds=0.005)]
    found = {target.text: target.value for target in decode_targets(rows, "cuda", 0.004)}
    assert found["tokens/s, ours / ar_generate, 4 steps, batch 1"] == 2.5
    assert found["time per forward, ours / weight streaming, 4 steps, batch 1"] == 1.25
    assert "forwards, ours compiled, 4 steps, batch 1, 8 blocks" in found
    assert {target.value for target in decode_targets(rows, "cpu", 1.0) if "4 steps, batch 1" in target.text} == {40, 32, 1.1}


def test_a_forward_too_many_is_not_met_and_other_block_sizes_have_no_target_of_speed():
    rows = [made_up("published", 4, 1, 10.0), made_up("ours", 4, 1, 20.0, forwards=33)]
    met = {target.text: target.is_met for target in decode_targets(rows, "cpu", 1.0)}
    assert met["forwards, ours, 4 steps, batch 1, 8 blocks"] is False
    assert met["tokens/s, ours / published, 4 steps, batch 1"] is True
    other = [row | {"block_size": 4} for row in rows]
    assert {target.is_met for target in decode_targets(other, "cpu", 1.0) if "tokens/s" in target.text} == {None}
    assert decode_targets([], "cuda", 1.0) and not any(target.is_met for target in decode_targets([], "cuda", 1.0))


# --- the program -----------------------------------------------------------------------------------------------------------


def write(file: Path, rows: list[Row], **machine: Any) -> str:
    file.write_text(json.dumps({"machine": {"device": "cpu", **machine}, "rows": rows}), encoding="utf-8")
    return str(file)


def ends(file: str) -> object:
    with pytest.raises(SystemExit) as stop:
        targets.main([file])
    return stop.value.code


def test_it_ends_with_1_if_a_target_is_not_met(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    seconds = {"published": 10.0, "ours": 3.0}
    assert not ends(write(tmp_path / "fast.json", rows_with(seconds, {"published": None, "ours": None})))
    out = capsys.readouterr().out
    assert "time, ours / published, L3000-R300" in out and "<= 0.40" in out and "0.300" in out and "not measured" in out
    assert ends(write(tmp_path / "slow.json", rows_with({**seconds, "ours": 5.0}, {"published": None, "ours": None}))) == 1
    assert "NOT met" in capsys.readouterr().out


@pytest.mark.parametrize("decoder_runs", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_reports_of_a_real_run_are_read(decoder_runs: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """At tiny sizes the figures mean nothing, but the number of forwards is what it must be."""
    words = ("decode", "--batch", "1", "--steps", "4") if decoder_runs else ("train", "--no-scaling")
    file = tmp_path / "bench.json"
    file.write_text(succeed("bench", *words, "--quick", "--json", "--device", "cpu").out, encoding="utf-8")
    ends(str(file))
    out = capsys.readouterr().out
    if decoder_runs:
        lines = [line for line in out.splitlines() if "forwards, " in line]
        assert len(lines) == 2 and all(" met" in line and "NOT" not in line for line in lines)
        assert "batch 8 / batch 1" in out
    else:
        assert out.count("not measured") == len(targets.TRAIN["cpu"]), "the shapes of a quick run have no targets"


@pytest.mark.parametrize("rows", [[], [{"threshold": 0.9}], [{"mode": "ar"}]])
def test_other_reports_are_refused(rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert ends(write(tmp_path / "other.json", rows)) == 2
    assert "there are targets for reports of `diffvl bench train`" in capsys.readouterr().err


def test_what_is_no_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "text.json").write_text("no json", encoding="utf-8")
    for name in ("list.json", "text.json", "missing.json"):
        assert ends(str(tmp_path / name)) == 2
        assert name in capsys.readouterr().err
