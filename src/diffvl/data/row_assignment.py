"""Which samples share a row: first fit, by a tree over the room that is left in the rows.

The rows are a function of the lengths and the order alone. So packing has no state to lose: what a resumed run packs is what
the interrupted one packed.
"""

from collections.abc import Sequence

import numpy


class RowAssignment(Sequence[list[int]]):
    """Rows of places, in two flat arrays: ten million samples take 160 MB, not gigabytes of lists."""

    def __init__(self, order: Sequence[int], row_of: Sequence[int]) -> None:
        """row_of: the row of each sample of `order`, from 0 without gaps."""
        rows = numpy.asarray(row_of, dtype=numpy.int64)
        self._places = numpy.asarray(order, dtype=numpy.int64)[numpy.argsort(rows, kind="stable")]
        self._ends = numpy.cumsum(numpy.bincount(rows))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> list[int]:  # type: ignore[override]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start = self._ends[row - 1] if row else 0
        return self._places[start : self._ends[row]].tolist()


def first_fit(lengths: Sequence[int], order: Sequence[int], row_length: int) -> RowAssignment:
    """Puts each sample, in this order, into the first row that still has room for it. Time grows as n log n.

    Args:
        lengths: tokens of the sample at each place, none above `row_length`. order: the places.
    """
    leaves = 1 << max(len(order) - 1, 0).bit_length()
    # room[1] is the root; the room of row r is leaf leaves + r; a node holds the most room below it.
    room = [row_length] * (2 * leaves)
    row_of = []
    for place in order:
        length = lengths[place]
        assert length <= row_length
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        row_of.append(node - leaves)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return RowAssignment(order, row_of)
