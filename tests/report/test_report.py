"""The report page says what the files say: one file, nothing fetched, everything escaped, charts that do not flatter."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pages import Page
from PIL import Image
from rich.console import Console

from diffvl.data.textscore import is_exact
from diffvl.errors import CheckpointError, ConfigError
from diffvl.report.page import write_report
from diffvl.report.stage_run import print_summary


def write_metrics(directory: Path, lines: list[dict[str, Any]]) -> None:
    (directory / "metrics.jsonl").write_text("".join(json.dumps({"stage": "diffuse", **line}) + "\n" for line in lines))


def write_samples(directory: Path, samples: list[dict[str, Any]]) -> None:
    (directory / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def page(directory: Path) -> Page:
    return Page(write_report(directory).read_text(encoding="utf-8"))


def charts(directory: Path) -> dict[str, ElementTree.Element]:
    """title -> SVG, which must be well-formed by itself."""
    html = write_report(directory).read_text(encoding="utf-8")
    found = re.findall(r"<figure><h3>(.*?)</h3>(<svg.*?</svg>)<figcaption>", html)
    return {title: ElementTree.fromstring(svg) for title, svg in found}


def summary(directory: Path) -> str:
    console = Console(file=io.StringIO(), width=120)
    print_summary(directory, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A finished diffuse stage with everything in it."""
    directory = tmp_path / "diffuse"
    directory.mkdir()
    lines = [{"step": 0, "eval_masked_loss": 4.0, "eval_masked_accuracy": 0.125, "eval_tokens": 812}]
    for step in range(1, 41):
        lines.append(
            {"step": step, "loss": 5 - step / 10, "mask_ratio": 0.5, "masked_accuracy": step / 50, "learning_rate": 1e-4}
        )
        lines[-1] |= {"grad_norm": 1.5, "tokens_per_second": 500.0 + step, "seconds": 90.0 * step}
    lines.append({"step": 20, "eval_masked_loss": 1.5, "eval_masked_accuracy": 0.75, "eval_tokens": 812})
    lines.append({"step": 40, "eval_masked_loss": 2.0, "eval_masked_accuracy": 0.5, "eval_tokens": 812})
    write_metrics(directory, lines)
    Image.new("RGBA", (1000, 500), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    write_samples(
        directory,
        [
            {"image": str(tmp_path / "clear.png"), "question": "How many?", "truth": "two", "before": "one", "after": " two\n"},
            {"image": str(tmp_path / "gone.png"), "question": "Colour?", "truth": "red", "before": "", "after": "blue"},
            {"image": None, "question": "Text only?", "truth": "yes", "before": "yes", "after": "yes"},
        ],
    )
    (directory / "run.yaml").write_text("model: smollm2-135m\nseed: 7\n")
    provenance = {
        "created": "2026-01-02",
        "versions": {"torch": "2.13.0"},
        "parents": ["runs/a/align"],
        "state": {"finished": True},
    }
    (directory / "diffvl.json").write_text(json.dumps(provenance))
    return directory


# --- the page ------------------------------------------------------------------------------------------------------------


def test_page_is_one_file_without_scripts(stage: Path) -> None:
    path = write_report(stage)
    assert path == stage / "report.html"
    html = path.read_text(encoding="utf-8")
    tags = Page(html).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object"}
    sources = [value for _, attributes in tags for key, value in attributes.items() if key in ("src", "href", "srcset", "data")]
    assert len(sources) == 1 and str(sources[0]).startswith("data:image/jpeg;base64,")
    assert "url(" not in html and "@import" not in html and "prefers-color-scheme: dark" in html
    first = path.read_bytes()
    assert write_report(stage).read_bytes() == first, "the same files give the same page"
    assert not list(stage.glob("*.partial"))


def test_page_has_headlines_samples_settings_and_versions(stage: Path) -> None:
    text = page(stage).text
    assert "smollm2-135m · diffuse" in text
    assert "4 → 2 eval_masked_loss, step 0 → 40" in text
    assert "0.125 → 0.5 eval_masked_accuracy, step 0 → 40" in text
    assert "4.85 → 1.05 loss, mean of 2 logged points, step 2 → 40" in text
    assert "1 → 2 of 3 samples answered right, before → after" in text
    assert "1:00:00 until the last log" in text and "520 tokens per second (median)" in text
    assert "eval_masked_loss 4 (step 0) 2 (step 40) 1.5 (step 20)" in text  # first, last, best
    assert "eval_masked_accuracy 0.125 (step 0) 0.5 (step 40) 0.75 (step 20)" in text
    assert "How many? truth two before ✗ one after ✓ two" in text
    assert "Colour? truth red before ✗ (empty) after ✗ blue" in text
    assert "Text only? truth yes before ✓ yes after ✓ yes" in text
    assert "run.yaml model: smollm2-135m seed: 7" in text
    assert "versions torch 2.13.0 parents runs/a/align state finished True" in text


def test_images_are_scaled_on_white_and_missing_ones_are_named(stage: Path) -> None:
    shown = page(stage)
    source = next(attributes["src"] for tag, attributes in shown.tags if tag == "img")
    image = Image.open(io.BytesIO(base64.b64decode(str(source).partition(",")[2])))
    assert image.size == (224, 112) and image.getpixel((5, 5)) == (255, 255, 255)
    assert f"image not shown (image missing): {stage.parent / 'gone.png'} Colour?" in shown.text
    (stage.parent / "gone.png").write_bytes(b"no image")
    assert "image not shown (image cannot be read)" in page(stage).text


def test_small_images_are_not_enlarged(stage: Path) -> None:
    Image.new("L", (40, 30)).save(stage.parent / "clear.png")
    sizes = [(a["width"], a["height"]) for tag, a in page(stage).tags if tag == "img"]
    assert sizes == [("40", "30")]


def test_everything_is_escaped(stage: Path) -> None:
    evil = "<script>alert('x')</script>&amp;\"</pre>"
    write_metrics(stage, [{"step": 1, "loss": 1.0, f"loss {evil}": 2.0, f"eval_loss {evil}": 2.0, "stage": evil}])
    write_samples(stage, [{"image": f"/{evil}", "question": evil, "truth": evil, "before": evil, "after": f"{evil}!"}])
    (stage / "run.yaml").write_text(json.dumps({"model": evil}))
    (stage / "diffvl.json").write_text(json.dumps({evil: {evil: [evil]}}))
    shown = page(stage)
    assert "script" not in {tag for tag, _ in shown.tags}
    assert shown.text.count(evil) >= 12
    assert len(charts(stage)) == 1


def test_control_characters_are_shown_in_page_and_terminal(stage: Path) -> None:
    """Of answers, questions, file names and settings; half a character (JSON can say one) is no reason to fail."""
    nasty = "x\x1b]0;t\x07\x9b2J\r\ud83d\u202e[/bold]:cat:y"
    shown = nasty.translate({ord(sign): "\N{REPLACEMENT CHARACTER}" for sign in "\x1b\x07\x9b\r\ud83d\u202e"})
    write_samples(stage, [{"image": "x\x1b]0;t.png", "question": nasty, "truth": nasty, "before": nasty, "after": nasty}])
    for text in (page(stage).text, summary(stage)):
        assert text.count(shown) >= 4 and not any(sign in text for sign in "\x1b\x07\x9b\r\ud83d\u202e")


def test_missing_pieces_leave_their_section_out(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "loss": 2.5}])
    text = page(tmp_path).text
    assert "2.5 loss, step 1" in text and "Curves" in text
    for heading in ("Samples", "Settings", "Where it came from", "Accuracy", "Mask ratio", "Learning rate", "tokens per second"):
        assert heading not in text
    assert "loss │ 2.5 (step 1) │ – " in " ".join(summary(tmp_path).split())


def test_ar_stage_has_its_own_names_and_no_mask_ratio(tmp_path: Path) -> None:
    lines = [{"stage": "align", "step": step, "loss": 4.0 - step, "eval_next_token_loss": 3.0 - step} for step in (1, 2)]
    write_metrics(tmp_path, [line | {"eval_next_token_accuracy": 0.25 * line["step"]} for line in lines])
    text = page(tmp_path).text
    assert "2 → 1 eval_next_token_loss, step 1 → 2" in text and "0.25 → 0.5 eval_next_token_accuracy" in text
    assert set(charts(tmp_path)) == {"Loss", "Accuracy"}


def test_long_sample_files_say_what_is_not_shown(stage: Path) -> None:
    write_samples(stage, [{"image": None, "question": f"q{i}", "truth": "a", "before": None, "after": "a"} for i in range(70)])
    shown = page(stage)
    assert "The first 60 of 70." in shown.text and "70 of 70 samples answered right, after" in shown.text
    assert sum(tag == "article" for tag, _ in shown.tags) == 60


# --- the charts ----------------------------------------------------------------------------------------------------------


def corners(svg: ElementTree.Element, style: str) -> list[tuple[float, ...]]:
    lines = [line for line in svg.iter("polyline") if line.get("class") == style]
    assert len(lines) == 1
    return [tuple(map(float, corner.split(","))) for corner in str(lines[0].get("points")).split()]


def tick_labels(svg: ElementTree.Element, anchor: str) -> list[str]:
    return [str(text.text) for text in svg.iter("text") if text.get("text-anchor") == anchor]


def test_points_stand_where_the_axes_say(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": step, "loss": value} for step, value in ((0, 4.0), (5, 1.0), (10, 2.0))])
    svg = charts(tmp_path)["Loss"]
    assert tick_labels(svg, "end") == ["0", "1", "2", "3", "4"]
    assert tick_labels(svg, "middle") == ["optimiser step", "0", "2", "4", "6", "8", "10"]
    grid = {text.text: float(str(text.get("y"))) - 4 for text in svg.iter("text") if text.get("text-anchor") == "end"}
    (x0, y0), (x5, y5), (x10, y10) = corners(svg, "bold")
    assert [y0, y5, y10] == [grid["4"], grid["1"], grid["2"]] and grid["0"] > grid["4"]
    places = {text.text: float(str(text.get("x"))) for text in svg.iter("text") if text.get("text-anchor") == "middle"}
    assert [x0, x10] == [places["0"], places["10"]] and x5 == (x0 + x10) / 2
    assert "Vertical axis from 0." in page(tmp_path).text


def test_axis_that_does_not_start_at_zero_says_so(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "loss": 10.4}, {"step": 2, "loss": 10.51}])
    assert "Vertical axis from 10.4, not from 0." in page(tmp_path).text
    assert tick_labels(charts(tmp_path)["Loss"], "end") == ["10.4", "10.425", "10.45", "10.475", "10.5", "10.525"]


def test_shares_are_drawn_from_zero_to_one(stage: Path) -> None:
    drawn = charts(stage)
    assert list(drawn) == ["Loss", "Accuracy", "Mask ratio", "Learning rate", "Gradient norm"]
    for title in ("Accuracy", "Mask ratio"):
        assert tick_labels(drawn[title], "end") == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


def test_raw_smoothed_and_held_out_lines_are_told_apart(stage: Path) -> None:
    svg = charts(stage)["Loss"]
    assert len(corners(svg, "raw")) == 40 and len(corners(svg, "bold")) == 39 and len(corners(svg, "dots")) == 3
    assert [circle.findtext("title") for circle in svg.iter("circle")] == ["4 (step 0)", "1.5 (step 20)", "2 (step 40)"]
    text = page(stage).text
    assert "loss, each logged point mean of the last 2 logged points eval_masked_loss (held out)" in text


def test_long_curves_keep_their_spikes(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": step, "loss": 50.0 if step == 7023 else 1.0 + step % 2} for step in range(1, 20001)])
    svg = charts(tmp_path)["Loss"]
    raw = corners(svg, "raw")
    assert len(raw) <= 800 and len(corners(svg, "bold")) <= 800
    assert min(y for _, y in raw) == 14.0  # the top of the axis, 50
    assert [x for x, _ in raw] == sorted(x for x, _ in raw)
    assert "loss: of 20,000 points the lowest and highest of each stretch are drawn." in page(tmp_path).text


def test_values_that_are_not_finite_are_counted_not_hidden(tmp_path: Path) -> None:
    text = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": null, "grad_norm": null}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    for words in (page(tmp_path).text, summary(tmp_path)):
        assert "loss: NaN or infinite at 2 of 3 logged steps, which are left out" in words
        assert "grad_norm: NaN or infinite at 1 of 1 logged steps" in words
    assert list(charts(tmp_path)) == ["Loss"]


def test_constant_and_zero_curves_can_be_drawn(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 0, "loss": 0.0, "learning_rate": 0.0, "grad_norm": -1.0}])
    assert list(charts(tmp_path)) == ["Loss", "Learning rate", "Gradient norm"]


# --- the terminal --------------------------------------------------------------------------------------------------------


def test_summary_in_the_terminal(stage: Path) -> None:
    write_samples(stage, [{"image": None, "question": "[red]How[/red]?", "truth": "two", "before": "", "after": "two"}])
    assert "report:" not in summary(stage)
    write_report(stage)
    text = summary(stage)
    words = " ".join(text.split())
    assert "smollm2-135m · diffuse" in words
    assert "loss, mean of 2 logged points │ 4.85 (step 2) │ 1.05 (step 40) │ 1.05 (step 40)" in words
    assert "eval_masked_loss │ 4 (step 0) │ 2 (step 40) │ 1.5 (step 20)" in words
    assert "[red]How[/red]? truth two before (empty) [wrong] after two [right]" in words
    assert "samples answered right, before → after: 0 → 1 of 1" in words
    assert f"report: {stage / 'report.html'}\n" in text  # never wrapped: a terminal makes it a link


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        (" a  red\nsquare ", "a red square", True),
        ("A red square", "a red square", False),
        ("a red square.", "a red square", False),
    ],
)
def test_right_is_word_for_word(answer: str, truth: str, right: bool) -> None:
    assert is_exact(answer, truth) is right


# --- mistakes ------------------------------------------------------------------------------------------------------------


def test_directory_without_measurements(tmp_path: Path) -> None:
    expected = r"metrics\.jsonl: not found; expected the directory of a stage that has run, e\.g\. runs/MODEL/diffuse"
    for function in (write_report, summary):
        with pytest.raises(CheckpointError, match=expected):
            function(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: holds no measurement; the stage stopped before its first log"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("metrics.jsonl", '{"step": \n{}\n', CheckpointError, r"metrics\.jsonl:1: not valid JSON"),
        (
            "samples.jsonl",
            '{"question": "q", "truth": 3}\n',
            CheckpointError,
            r"samples\.jsonl: sample 1: truth, after should be text",
        ),
        ("diffvl.json", "{", CheckpointError, r"diffvl\.json: damaged, not readable as JSON .*; copy the checkpoint again"),
        ("diffvl.json", "[]", CheckpointError, r"diffvl\.json: expected a JSON object, got list"),
        ("run.yaml", "- a", ConfigError, r"run\.yaml: expected a mapping of settings at the top, got list"),
    ],
)
def test_broken_files_are_named_and_the_old_report_stays(
    stage: Path, file: str, content: str, error: type[Exception], message: str
) -> None:
    before = write_report(stage).read_bytes()
    (stage / file).write_text(content)
    with pytest.raises(error, match=message):
        write_report(stage)
    assert (stage / "report.html").read_bytes() == before
