"""Packs rows into sequences: first fit over a few open packs.

A pack holds complete rows. They remain separate documents: position ids restart with every row, and
attention does not cross rows.
"""

from collections.abc import Iterator

OPEN_PACKS = 16
"""Packs open at once. More of them fill better and mix rows over a longer range. The value affects
the row order, so a change needs a new ``row_order.PACKER_VERSION``."""


class Packer:
    """Packs rows greedily in the given order.

    A row goes into the first open pack with room for it, or else into a new one. If `OPEN_PACKS`
    are already open, the fullest is closed first.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._room: list[int] = []  # free tokens of the open packs, oldest first
        self._rows: list[list[int]] = []

    def add(self, rows: list[int], lengths: list[int]) -> Iterator[list[int]]:
        """Packs more rows and yields the packs that get closed.

        Args:
            rows: row ids, in packing order.
            lengths: tokens of each row, at most ``max_tokens``.
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
