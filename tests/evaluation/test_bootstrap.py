"""Intervals of paired bootstrap over records: right where the answer is known, and narrower than unpaired ones."""

import math

import numpy
import pytest

from diffvl.evaluation import bootstrap as module
from diffvl.evaluation.bootstrap import bootstrap


def test_means_and_differences_are_those_of_all_answers():
    means, differences = bootstrap([[1, 0, 1, 1], [0, 0, 1, 0]], records=[0, 0, 1, 2])
    assert [one.value for one in means] == [0.75, 0.25]
    assert [one.value for one in differences] == [0.0, -0.5]
    assert (differences[0].low, differences[0].high) == (0, 0)
    assert all(one.low <= one.value <= one.high for one in [*means, *differences])


def test_the_interval_of_a_share_is_that_of_the_binomial_law():
    generator = numpy.random.default_rng(1)
    values = (generator.random(400) < 0.3).tolist()
    (mean,), _ = bootstrap([values], records=list(range(400)))
    reach = 1.96 * math.sqrt(mean.value * (1 - mean.value) / 400)
    assert mean.high - mean.value == pytest.approx(reach, rel=0.15)
    assert mean.value - mean.low == pytest.approx(reach, rel=0.15)


def test_pairs_and_records_count():
    """What is hard for both cancels out of the difference; answers of one record that are all alike count as one."""
    generator = numpy.random.default_rng(2)
    hard = generator.random(200) < 0.5
    second = hard & (generator.random(200) > 0.2)
    means, differences = bootstrap([hard.tolist(), second.tolist()], records=list(range(200)))
    unpaired = math.hypot(*(mean.high - mean.low for mean in means))
    assert differences[1].high - differences[1].low < 0.5 * unpaired
    assert differences[1].excludes_zero and differences[1].high < 0
    alone, _ = bootstrap([hard.tolist()], records=list(range(200)))
    four_times, _ = bootstrap([numpy.repeat(hard, 4).tolist()], records=numpy.repeat(numpy.arange(200), 4).tolist())
    assert (four_times[0].low, four_times[0].high) == pytest.approx((alone[0].low, alone[0].high))


def test_a_seed_gives_the_same_interval_in_however_many_pieces(monkeypatch: pytest.MonkeyPatch):
    values, records = numpy.random.default_rng(5).random((2, 40)).tolist(), list(range(40))
    whole = bootstrap(values, records, seed=3)
    assert bootstrap(values, records, seed=3) == whole != bootstrap(values, records, seed=4)
    monkeypatch.setattr(module, "_MOST", 400)
    assert bootstrap(values, records, seed=3) == whole
