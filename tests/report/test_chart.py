"""A chart as a file: well-formed by itself, with everything in it that a page says beside it."""

from xml.etree import ElementTree

import pytest

from diffvl.report.chart import HUES, Chart, Line, ticks_of_shares, ticks_up_to
from diffvl.report.charts import draw_overlaid
from diffvl.store.metrics import measures_of

SVG = "{http://www.w3.org/2000/svg}"


def chart() -> Chart:
    lines = [
        Line(0, "bold", "first <run>", [(0, 0.0), (10, 1.0)]),
        Line(9, "dots", "second", [(5, 0.5)], ["five & a half"]),
        Line(2, "raw", "", [(0, 0.2), (10, 0.4)]),
    ]
    return Chart("Exact match", lines, [0, 0.5, 1], [0, 5, 10], 10, "step", "match over steps", ["A note."])


def test_a_file_is_an_svg_with_its_legend_and_its_colours():
    root = ElementTree.fromstring(chart().file())
    assert root.tag == f"{SVG}svg" and root.attrib["aria-label"] == "match over steps"
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"step", "0.5", "10", "first <run>", "second"} <= set(texts)
    style = root.find(f"{SVG}style")
    assert style is not None and style.text is not None and all(f".h{number} " in style.text for number in range(len(HUES)))
    assert [element.attrib["class"] for element in root.iter(f"{SVG}g")][:3] == ["h0", "h1", "h2"]
    (title,) = root.iter(f"{SVG}title")
    assert title.text == "five & a half"
    height = float(root.attrib["viewBox"].split()[3])
    assert all(float(element.attrib["y"]) < height for element in root.iter(f"{SVG}text"))


def test_points_stand_where_their_values_are():
    root = ElementTree.fromstring(chart().file())
    corners = [element.attrib["points"].split() for element in root.iter(f"{SVG}polyline")]
    assert corners[0] == ["64.0,258.0", "606.0,14.0"]
    (circle, *_) = root.iter(f"{SVG}circle")
    assert (circle.attrib["cx"], circle.attrib["cy"]) == ("335.0", "136.0")


@pytest.mark.parametrize(
    ("last", "whole", "expected"), [(10, True, [0, 2, 4, 6, 8, 10]), (1, True, [0, 1]), (0.9, False, [0, 0.2, 0.4, 0.6, 0.8])]
)
def test_ticks_lie_in_the_plot(last: float, whole: bool, expected: list[float]):
    assert ticks_up_to(last, whole) == expected
    assert ticks_of_shares([0.2, 0.3]) == [0, 0.2, 0.4, 0.6, 0.8, 1]


def test_runs_on_top_of_each_other_keep_their_colours():
    """A run without a curve leaves its colour out; losses of different objectives are told apart."""
    answers = {"eval_exact_match": 0.5, "eval_edit_similarity": 0.75}
    first = measures_of([{"step": step, "loss": 1.0, "eval_masked_loss": 2.0, **answers} for step in (1, 2)])
    third = measures_of([{"step": step, "loss": 3.0, "eval_next_token_loss": 1.0} for step in (1, 2)])
    figures = draw_overlaid({"a": first, "b": {}, "c": third})
    assert [figure.partition("</h3>")[0].removeprefix("<figure><h3>") for figure in figures] == [
        *("Training loss", "Held-out loss", "Held-out exact match", "Held-out edit similarity")
    ]
    assert "a: loss" in figures[0] and "c: loss" in figures[0] and 'class="h2"' in figures[0] and 'class="h1"' not in figures[0]
    assert "different scales" in figures[1] and "a: eval_masked_loss" in figures[1]
    assert "next token from all before it" not in figures[2]
