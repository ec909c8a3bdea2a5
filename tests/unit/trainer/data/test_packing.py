"""First-fit packing."""

import numpy as np

from trainer.data.packing import OPEN_PACKS, Packer


def pack(lengths: list[int], max_tokens: int) -> list[list[int]]:
    packer = Packer(max_tokens)
    packs = list(packer.add(list(range(len(lengths))), lengths))
    return packs + list(packer.flush())


def test_packer_puts_a_row_into_the_first_pack_with_room() -> None:
    assert pack([6, 5, 4, 5, 1], 10) == [[0, 2], [1, 3], [4]]


def test_packer_closes_the_fullest_pack_when_all_are_open() -> None:
    lengths = [6] * OPEN_PACKS + [7]
    lengths[3] = 9
    packs = pack(lengths, 10)
    assert packs[0] == [3]
    assert packs[-1] == [OPEN_PACKS]


def test_packer_leaves_a_row_of_full_length_alone() -> None:
    assert pack([10, 10, 3], 10) == [[0], [1], [2]]


def test_packer_of_no_rows_makes_no_packs() -> None:
    assert pack([], 10) == []


def test_packer_does_not_depend_on_how_rows_are_added() -> None:
    lengths = np.random.default_rng(0).integers(1, 64, 500).tolist()
    packer = Packer(64)
    packs = []
    for start in range(0, 500, 7):
        rows = list(range(start, min(start + 7, 500)))
        packs += packer.add(rows, [lengths[row] for row in rows])
    assert packs + list(packer.flush()) == pack(lengths, 64)


def test_packer_fills_packs_nearly() -> None:
    lengths = np.random.default_rng(1).integers(1, 512, 4000).tolist()
    packs = pack(lengths, 1024)
    assert sum(lengths) / (len(packs) * 1024) > 0.97
