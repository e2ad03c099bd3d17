"""Intervals of paired bootstrap over records: right where the answer is known, and narrower than unpaired ones."""

import math

import numpy
import pytest

from diffvl.evaluation import bootstrap as module
from diffvl.evaluation.bootstrap import Interval, bootstrap


def low(one: Interval) -> float:
    assert one.low is not None
    return one.low


def high(one: Interval) -> float:
    assert one.high is not None
    return one.high


def test_means_and_differences_are_those_of_all_answers():
    values, records = [[1, 0, 1, 1] * 2, [0, 0, 1, 0] * 2], [0, 0, 1, 2, 3, 3, 4, 5]
    means, differences = bootstrap(values, records)
    assert [one.value for one in means] == [0.75, 0.25]
    assert [one.value for one in differences] == [0.0, -0.5]
    assert (differences[0].low, differences[0].high) == (0, 0)
    assert all(low(one) < one.value < high(one) for one in [*means, differences[1]])


@pytest.mark.parametrize("count", [1, 4])
def test_a_handful_of_records_has_no_interval(count: int):
    """With however many answers."""
    means, differences = bootstrap([[1, 0] * count, [0, 0] * count], records=[number // 2 for number in range(2 * count)])
    assert means == [Interval(0.5, None, None), Interval(0.0, None, None)]
    assert differences[1] == Interval(-0.5, None, None) and not differences[1].excludes_zero


def test_records_that_are_all_alike_leave_room_for_others():
    """Shares of 0 and of 1 have Wilson's interval, by the number of records; a difference that was never seen may be there."""
    none, right, half = [0.0] * 60, [1.0] * 60, [1.0, 0.0] * 30
    means, differences = bootstrap([none, right, none, half], records=[number // 2 for number in range(60)])
    bound = 1.959964**2 / (30 + 1.959964**2)
    assert bound == pytest.approx(0.1135, abs=1e-4)
    for one, value, ends in zip(means, (0, 1, 0, 0.5), ((0, bound), (1 - bound, 1), (0, bound), None), strict=True):
        assert one.value == value
        assert (low(one), high(one)) == pytest.approx(ends or (0.5 - bound / 2, 0.5 + bound / 2), abs=1e-6)
    assert (low(differences[1]), high(differences[1])) == pytest.approx((1 - 2 * bound, 1), abs=1e-6)
    assert (low(differences[2]), high(differences[2])) == pytest.approx((-bound, bound), abs=1e-6)
    assert differences[1].excludes_zero and not differences[2].excludes_zero


def test_the_interval_of_a_share_is_that_of_the_binomial_law():
    generator = numpy.random.default_rng(1)
    values = (generator.random(400) < 0.3).tolist()
    (mean,), _ = bootstrap([values], records=list(range(400)))
    reach = 1.96 * math.sqrt(mean.value * (1 - mean.value) / 400)
    assert high(mean) - mean.value == pytest.approx(reach, rel=0.15)
    assert mean.value - low(mean) == pytest.approx(reach, rel=0.15)


def test_pairs_and_records_count():
    """What is hard for both cancels out of the difference; answers of one record that are all alike count as one."""
    generator = numpy.random.default_rng(2)
    hard = generator.random(200) < 0.5
    second = hard & (generator.random(200) > 0.2)
    means, differences = bootstrap([hard.tolist(), second.tolist()], records=list(range(200)))
    unpaired = math.hypot(*(high(mean) - low(mean) for mean in means))
    assert high(differences[1]) - low(differences[1]) < 0.5 * unpaired
    assert differences[1].excludes_zero and high(differences[1]) < 0
    alone, _ = bootstrap([hard.tolist()], records=list(range(200)))
    four_times, _ = bootstrap([numpy.repeat(hard, 4).tolist()], records=numpy.repeat(numpy.arange(200), 4).tolist())
    assert (four_times[0].low, four_times[0].high) == pytest.approx((alone[0].low, alone[0].high))


def test_a_seed_gives_the_same_interval_in_however_many_pieces(monkeypatch: pytest.MonkeyPatch):
    values, records = numpy.random.default_rng(5).random((2, 40)).tolist(), list(range(40))
    whole = bootstrap(values, records, seed=3)
    assert bootstrap(values, records, seed=3) == whole != bootstrap(values, records, seed=4)
    monkeypatch.setattr(module, "_MOST", 400)
    assert bootstrap(values, records, seed=3) == whole
