"""The ledger: claims, and progress that counts nothing twice."""

import numpy as np

from labeler.run.actors.ledger import Ledger
from schemas.keys import stack_keys

KEYS = stack_keys([bytes([n] * 16) for n in range(8)])


def test_ledger_counts_each_row_piece_and_unit_once() -> None:
    ledger = Ledger(bytes_total=100)
    for _ in range(2):
        claimed, is_stopping = ledger.claim(0, KEYS)
        assert claimed.all()
        assert not is_stopping
        ledger.piece_read(0, 40)
        ledger.unit_done("u", 4, 30)
    assert not ledger.claim(1, KEYS)[0].any()
    state, _ = ledger.report()
    assert (state.bytes_read, state.bytes_total, state.rows_found) == (40, 100, 8)
    assert (state.rows_done, state.tokens_done) == (4, 30)
    assert np.isclose(state.share_done(), 0.4 * 0.5)


def test_rows_of_a_unit_in_work_count_until_the_unit_does() -> None:
    ledger = Ledger(bytes_total=100)
    ledger.unit_progress("u", 2, 20, 3)
    ledger.unit_progress("u", 3, 25, 4)
    ledger.unit_progress("other", 1, 5, 0)
    state, _ = ledger.report()
    assert (state.rows_done, state.tokens_done, state.num_generated) == (4, 30, 4)
    ledger.unit_done("u", 4, 33)
    ledger.unit_progress("u", 3, 25, 4)  # overtaken by the commit
    state, _ = ledger.report()
    assert (state.rows_done, state.tokens_done, state.num_generated) == (5, 38, 4)


def test_claims_and_tasks_hear_that_the_run_is_stopping() -> None:
    ledger = Ledger(bytes_total=100)
    ledger.stop()
    assert ledger.is_stopping()
    assert ledger.claim(0, KEYS)[1]


def test_lines_are_reported_once() -> None:
    ledger = Ledger(bytes_total=100)
    ledger.note("a line")
    assert ledger.report()[1] == ["a line"]
    assert ledger.report()[1] == []
