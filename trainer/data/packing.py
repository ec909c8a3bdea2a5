"""Rows to packed sequences: first fit over a few open packs.

A packed sequence holds whole rows, never a part of one. Documents stay apart in it: position ids
restart with every row and attention does not cross.
"""

from collections.abc import Iterator

OPEN_PACKS = 16
"""Packs that wait for a row that fits. More fill better and mix rows over a longer stretch; part of
the order of rows, so a change needs a new ``plan.PACKER_VERSION``."""


class Packer:
    """Packs rows greedily in the order in which they come.

    A row goes into the first open pack that has room for it. Where none has, the fullest pack is
    closed and a fresh one opened, so that at most ``OPEN_PACKS`` are ever open.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._room: list[int] = []  # free tokens of the open packs, oldest first
        self._rows: list[list[int]] = []

    def add(self, rows: list[int], lengths: list[int]) -> Iterator[list[int]]:
        """Pack more rows; yields the packs that were closed on the way.

        Args:
            rows: row ids, in the order in which they are to be packed.
            lengths: tokens of each of them, none longer than ``max_tokens``.
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
        """Yields what is still open, oldest first."""
        packs, self._rows, self._room = self._rows, [], []
        yield from packs
