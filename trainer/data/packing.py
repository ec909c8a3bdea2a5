"""Rows to packed sequences: first fit over a few open packs.

A packed sequence holds complete rows. They stay separate documents: position ids restart with every
row, and attention does not cross rows.
"""

from collections.abc import Iterator

OPEN_PACKS = 16
"""Packs waiting for a row that fits. More of them fill better and mix rows over a longer stretch.
Part of the order of rows, so a change needs a new ``row_order.PACKER_VERSION``."""


class Packer:
    """Packs rows greedily in the order in which they come.

    A row goes into the first open pack with room for it. If there is none and `OPEN_PACKS` are
    open, the fullest is closed before another is opened.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._room: list[int] = []  # free tokens of the open packs, oldest first
        self._rows: list[list[int]] = []

    def add(self, rows: list[int], lengths: list[int]) -> Iterator[list[int]]:
        """Packs more rows, and yields the packs that this closes.

        Args:
            rows: row ids, in packing order.
            lengths: tokens of each row, none longer than ``max_tokens``.
        """
        room, packs, max_tokens = self._room, self._rows, self._max_tokens
        for row, length in zip(rows, lengths, strict=True):
            for index, free in enumerate(room):
                if length <= free:
                    room[index] = free - length
                    packs[index].append(row)
                    break
            else:
                if len(room) == OPEN_PACKS:
                    fullest = room.index(min(room))
                    room.pop(fullest)
                    yield packs.pop(fullest)
                room.append(max_tokens - length)
                packs.append([row])

    def flush(self) -> Iterator[list[int]]:
        """Closes and yields the open packs, oldest first."""
        packs, self._rows, self._room = self._rows, [], []
        yield from packs
