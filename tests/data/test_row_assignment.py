"""First fit against its definition, and what makes the packer resumable: rows are a function of lengths and order."""

import pytest
import torch

from diffvl.data.packing import RowAssignment, first_fit


def plain_first_fit(lengths: list[int], order: list[int], row_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for place in order:
        for row in rows:
            if sum(lengths[other] for other in row) + lengths[place] <= row_length:
                row.append(place)
                break
        else:
            rows.append([place])
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_first_fit_is_its_definition(seed: int):
    generator = torch.Generator().manual_seed(seed)
    count = 1 + 60 * seed
    lengths = torch.randint(1, 51, (count,), generator=generator).tolist()
    order = torch.randperm(count, generator=generator).tolist()
    rows = first_fit(lengths, order, 50)
    assert list(rows) == plain_first_fit(lengths, order, 50)
    assert sorted(place for row in rows for place in row) == list(range(count))


def test_rows_are_well_filled():
    """1,000 samples of 1 to 512 tokens in rows of 2,048: the room that first fit leaves is small."""
    lengths = torch.randint(1, 513, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = first_fit(lengths, range(1000), 2048)
    assert sum(lengths) / (len(rows) * 2048) > 0.98


def test_a_sample_of_the_whole_row_has_one_to_itself():
    assert list(first_fit([4, 8, 4, 8], [0, 1, 2, 3], 8)) == [[0, 2], [1], [3]]


def test_rows_are_a_sequence():
    rows = RowAssignment([5, 3, 4, 1], [0, 1, 0, 2])
    assert len(rows) == 3 and rows[0] == [5, 4] and rows[2] == [1]
    with pytest.raises(IndexError, match="row 3 of 3"):
        rows[3]
