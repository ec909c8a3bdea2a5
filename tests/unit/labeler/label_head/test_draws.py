"""Heads by mass and by probability, and draws: against float64, in distribution, at the edges."""

import numpy as np
import pytest
import torch

from labeler.label_head import draws, position_labels
from labeler.label_head.labels import COLUMNS
from labeler.label_head.position_labels import PositionLabels, label_logits
from labeler.teachers.vllm.packed_labels import empty_packed, pack, unpack
from schemas.spec import RecordSpec
from tests.support.label_oracle import entries_of, probs_at

HIGHEST = 1 - 2.0**-53
RECORDS = [
    RecordSpec(kind="topp", temperatures=(2.0,)),
    RecordSpec(kind="topp", top_p=0.5, max_head=5),
    RecordSpec(kind="threshold"),
    RecordSpec(kind="threshold", tau=0.3, entropy=False),
    RecordSpec(kind="threshold", tau=0.004, temperatures=(2.0, 3.0)),
    RecordSpec(kind="threshold", temperatures=(0.5, 2.0), draw_temperature=0.5),
    RecordSpec(kind="sampled"),
    RecordSpec(kind="sampled", draws=1, temperatures=(2.0,)),
    RecordSpec(kind="sampled", draws=255, temperatures=(0.5, 2.0), draw_temperature=1.0),
]
names = pytest.mark.parametrize("record", RECORDS, ids=lambda r: f"{r.kind}-{r.tau:g}-{r.drawn_at}")


def make_logits(num_rows: int, vocab_size: int, scale: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


def numbers(record: RecordSpec, num_rows: int, seed: int = 0) -> np.ndarray | None:
    if not record.has_draws:
        return None
    count = record.draws if record.kind == "sampled" else 1
    return np.random.default_rng(seed).random((num_rows, count))


def drawn_ids(labels: PositionLabels, row: int) -> list[int]:
    head, tail = int(labels.head_len[row]), int(labels.tail_len[row])
    return labels.entry_ids[row, head : head + tail].tolist()


@names
@pytest.mark.parametrize(
    ("vocab_size", "scale"),
    [(3, 2.0), (50, 0.05), (320, 2.0), (4096, 3.0), (5003, 0.05), (5003, 12.0)],
)
def test_entries_agree_with_float64(record: RecordSpec, vocab_size: int, scale: float) -> None:
    logits = make_logits(40, vocab_size, scale)
    targets = torch.randint(0, vocab_size, (40,), generator=torch.Generator().manual_seed(1))
    uniforms = numbers(record, 40)
    labels = label_logits(logits, targets, record, uniforms)
    at_an_edge = 0
    for row, values in enumerate(logits.double().numpy()):
        logprobs = values - np.logaddexp.reduce(values)
        kept = entries_of(logprobs, record, None if uniforms is None else uniforms[row])
        count = len(kept.ids)
        lengths = (int(labels.head_len[row]), int(labels.tail_len[row]))
        found = labels.entry_ids[row].numpy()
        if lengths != (len(kept.head), len(kept.draws)) or (found[:count] != kept.ids).any():
            at_an_edge += 1  # between two ids, or of the head
            continue
        assert (found[count:] == 0).all()
        assert (labels.entry_logprobs[row, count:] == 0).all()
        np.testing.assert_allclose(
            labels.entry_logprobs[row, :count].numpy(), logprobs[kept.ids], rtol=0, atol=1e-4
        )
        rest = np.logaddexp.reduce(np.delete(logprobs, kept.head), initial=-np.inf)
        np.testing.assert_allclose(labels.tail_logmass[row], rest, rtol=0, atol=1e-4)
        target = int(targets[row])
        np.testing.assert_allclose(labels.target_logprob[row], logprobs[target], atol=1e-4)
        assert labels.target_rank[row] == 1 + np.count_nonzero(values > values[target])
        if labels.entropy is not None:
            entropy = -np.sum(np.exp(logprobs) * logprobs)
            np.testing.assert_allclose(labels.entropy[row], entropy, rtol=0, atol=1e-4)
        for column, temperature in enumerate(record.temperatures):
            assert labels.lse is not None
            lse = np.logaddexp.reduce(logprobs / temperature)
            np.testing.assert_allclose(labels.lse[row, column], lse, rtol=0, atol=1e-4)
        if record.kind == "sampled":
            assert labels.entry_counts is not None
            assert labels.entry_counts[row, :count].tolist() == kept.counts.tolist()
    # Positions of hundreds of draws from thousands of ids of one size have an edge under many.
    assert at_an_edge <= (6 if record.tau < 0.01 or record.draws > 100 else 2)


@pytest.mark.parametrize("temperatures", [(), (2.0,)])
def test_threshold_draws_each_id_as_often_as_it_is_probable(
    temperatures: tuple[float, ...],
) -> None:
    record = RecordSpec(kind="threshold", tau=1 / 12, temperatures=temperatures)
    logits = make_logits(1, 40, 2.0, seed=3)
    count = 20_000
    labels = label_logits(
        logits.expand(count, -1), torch.zeros(count), record, numbers(record, count, seed=4)
    )
    probs = probs_at(torch.log_softmax(logits.double(), 1)[0].numpy(), record.drawn_at)
    is_head = probs >= record.tau
    expected = np.where(is_head, 0.0, probs / record.tau)
    assert (labels.head_len == is_head.sum()).all()
    drawn = np.zeros(40)
    for slot in range(labels.entry_ids.shape[1]):
        used = (slot >= labels.head_len) & (slot < labels.head_len + labels.tail_len)
        drawn += np.bincount(labels.entry_ids[used, slot].numpy(), minlength=40)
    error = np.sqrt(expected * (1 - expected) / count)
    np.testing.assert_array_less(np.abs(drawn / count - expected), 5 * error + 1e-9)


@pytest.mark.parametrize("temperatures", [(), (2.0,)])
def test_sampled_draws_each_id_as_often_as_it_is_probable(temperatures: tuple[float, ...]) -> None:
    record = RecordSpec(kind="sampled", draws=20, temperatures=temperatures)
    logits = make_logits(1, 40, 2.0, seed=3)
    count = 2000
    labels = label_logits(
        logits.expand(count, -1), torch.zeros(count), record, numbers(record, count, seed=4)
    )
    probs = probs_at(torch.log_softmax(logits.double(), 1)[0].numpy(), record.drawn_at)
    assert labels.entry_counts is not None
    assert (labels.entry_counts.sum(dim=1) == record.draws).all()
    drawn = np.zeros(40)
    for slot in range(labels.entry_ids.shape[1]):
        used = slot < labels.tail_len
        weights = labels.entry_counts[used, slot].numpy()
        drawn += np.bincount(labels.entry_ids[used, slot].numpy(), weights, minlength=40)
    total = count * record.draws
    error = np.sqrt(probs * (1 - probs) / total)
    np.testing.assert_array_less(np.abs(drawn / total - probs), 5 * error + 1e-9)


@names
@pytest.mark.parametrize("vocab_size", [320, 5003])
def test_labels_do_not_depend_on_how_rows_are_put_together(
    record: RecordSpec, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, targets = make_logits(23, vocab_size, 2.0), torch.arange(23)
    uniforms = numbers(record, 23)

    def some(rows: slice) -> PositionLabels:
        part = None if uniforms is None else uniforms[rows]
        return label_logits(logits[rows], targets[rows], record, part)

    whole = some(slice(0, 23))
    ways = [[some(slice(row, row + 1)) for row in range(23)]]
    monkeypatch.setattr(position_labels, "_SLICE_ELEMENTS_CPU", 4 * vocab_size)
    monkeypatch.setattr(draws, "_CONVERTED_AT_ONCE_CPU", 3 * vocab_size)
    ways.append([some(slice(0, 9)), some(slice(9, 23))])
    for parts in ways:
        columns = zip(*(part.columns() for part in parts), strict=True)
        for column, pieces in zip(whole.columns(), columns, strict=True):
            if column is not None:
                torch.testing.assert_close(torch.cat(pieces), column, rtol=0, atol=1e-6)
        for name in ("entry_ids", "head_len", "tail_len"):
            pieces = [getattr(part, name) for part in parts]
            assert torch.equal(torch.cat(pieces), getattr(whole, name)), name


@pytest.mark.parametrize("u", [0.0, 0.5, HIGHEST])
@pytest.mark.parametrize("kind", ["threshold", "sampled"])
def test_draws_never_take_an_id_without_probability(kind: str, u: float) -> None:
    record = RecordSpec(kind=kind, temperatures=(2.0,))
    logits = make_logits(60, 500, 1.0)
    logits[:, :7] = -torch.inf
    logits[:, 490:] = -torch.inf
    logits[::3, ::2] = -torch.inf
    logits[0] = -torch.inf
    logits[0, 99] = 1.0
    targets = logits.argmax(dim=1)
    uniforms = np.full((60, record.draws), u)[:, : None if kind == "sampled" else 1]
    labels = label_logits(logits, targets, record, uniforms)
    for row in range(60):
        assert torch.isfinite(logits[row, drawn_ids(labels, row)]).all()
        if row > 0:
            assert len(drawn_ids(labels, row)) >= (10 if kind == "threshold" else 1)
    assert torch.isfinite(labels.entropy).all()
    if kind == "threshold":
        assert (labels.head_len[0], labels.tail_len[0]) == (1, 0)
        assert torch.isneginf(labels.tail_logmass[0])


@pytest.mark.parametrize("kind", ["topp", "threshold", "sampled"])
@pytest.mark.parametrize("temperatures", [(), (2.0,)])
def test_nan_stays_in_its_row(kind: str, temperatures: tuple[float, ...]) -> None:
    record = RecordSpec(kind=kind, temperatures=temperatures)
    logits = make_logits(5, 300, 1.0)
    whole = label_logits(logits, torch.zeros(5), record, numbers(record, 5))
    logits[1, 5] = torch.nan
    logits[3] = torch.nan
    labels = label_logits(logits, torch.zeros(5), record, numbers(record, 5))
    assert labels.target_logprob.isnan().tolist() == [False, True, False, True, False]
    for row in (0, 2, 4):
        assert torch.equal(labels.entry_ids[row], whole.entry_ids[row])
        assert torch.equal(labels.tail_logmass[row], whole.tail_logmass[row])
    used = labels.head_len + labels.tail_len
    assert (used <= labels.entry_ids.shape[1]).all()
    assert (labels.entry_ids < 300).all()


def test_head_has_the_most_probable_id_even_below_tau() -> None:
    record = RecordSpec(kind="threshold", tau=0.25)
    logits = torch.zeros(2, 100)
    logits[1, 50] = 0.5
    labels = label_logits(logits, torch.zeros(2), record, np.array([[0.0], [HIGHEST]]))
    # Of equals, the lowest id.
    assert labels.entry_ids[0].tolist()[:5] == [0, 1, 26, 51, 76]
    assert labels.head_len.tolist() == [1, 1]
    assert labels.entry_ids[1, 0] == 50
    assert labels.tail_len.tolist() == [4, 3]


def test_flat_distribution_fills_no_more_slots_than_exist() -> None:
    for tau, vocab_size in ((1 / 8, 8), (1 / 8, 9), (0.1, 10), (0.1, 4096), (0.3, 1000)):
        record = RecordSpec(kind="threshold", tau=tau)
        uniforms = np.array([[0.0], [1e-12], [HIGHEST]])
        labels = label_logits(torch.zeros(3, vocab_size), torch.zeros(3), record, uniforms)
        used = labels.head_len + labels.tail_len
        assert (used <= record.most_entries(vocab_size)).all()
        expected = (1 - float(labels.head_len[0]) / vocab_size) / tau
        assert np.abs(labels.tail_len.numpy() - expected).max() <= 1 + 1e-6


def test_tail_too_small_for_the_softmax_keeps_its_digits() -> None:
    logits = torch.full((2, 200), -150.0)
    logits[:, 7] = 0.0
    logits[1, 8] = -95.0
    for record in (RecordSpec(kind="threshold"), RecordSpec(kind="topp")):
        uniforms = np.zeros((2, 1)) if record.has_draws else None
        labels = label_logits(logits, torch.tensor([7, 8]), record, uniforms)
        assert labels.head_len.tolist() == [1, 1]
        np.testing.assert_allclose(labels.tail_logmass[0], np.log(199) - 150, rtol=1e-6)
        np.testing.assert_allclose(labels.tail_logmass[1], -95, rtol=1e-6)
        assert labels.tail_len.tolist() == [0, 0]


def test_draws_of_a_large_vocabulary_whose_float32_sum_is_not_one() -> None:
    record = RecordSpec(kind="sampled", draws=4)
    logits = make_logits(3, 151_937, 0.1)
    uniforms = np.tile([0.0, 0.25, 0.5, HIGHEST], (3, 1))
    labels = label_logits(logits, torch.zeros(3), record, uniforms)
    for row in range(3):
        ends = torch.softmax(logits[row].double(), 0).cumsum(0)
        ids = drawn_ids(labels, row)
        assert ids[0] == 0
        assert ids[3] == 151_936
        for u, found in zip((0.25, 0.5), ids[1:3], strict=True):
            np.testing.assert_allclose(ends[found], u, atol=1e-5)


@names
@pytest.mark.parametrize("scale", [0.01, 9.0])
def test_labels_travel_packed(record: RecordSpec, scale: float) -> None:
    labels = label_logits(make_logits(9, 700, scale), torch.arange(9), record, numbers(record, 9))
    row = unpack(pack(labels, record), record, np.zeros(0, np.int64))
    empty = empty_packed(9, record, 700)
    assert [part.shape for part in empty] == [part.shape for part in pack(labels, record)]
    assert [part.dtype for part in empty] == [part.dtype for part in pack(labels, record)]
    for name, column in zip(COLUMNS, labels.columns(), strict=True):
        mine = getattr(row, name)
        assert (mine is None) == (column is None), name
        if column is not None and column.ndim == 2 and name != "lse":
            assert (column[:, mine.shape[1] :] == 0).all(), name
            column = column[:, : mine.shape[1]]
        if column is not None:
            np.testing.assert_array_equal(mine, column.numpy(), err_msg=name)


def test_draws_of_no_positions_are_empty() -> None:
    for record in RECORDS:
        uniforms = numbers(record, 0)
        labels = label_logits(torch.zeros(0, 50), torch.zeros(0), record, uniforms)
        assert labels.entry_ids.shape == (0, record.most_entries(50))
        assert (labels.entry_counts is None) == (record.kind != "sampled")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@names
def test_gpu_draws_the_same_entries(record: RecordSpec) -> None:
    logits, targets = make_logits(200, 5003, 2.0), torch.arange(200)
    uniforms = numbers(record, 200)
    here = label_logits(logits, targets, record, uniforms)
    there = label_logits(logits.cuda(), targets.cuda(), record, uniforms)
    same = (here.entry_ids == there.entry_ids.cpu()).all(dim=1)
    # Its softmax may differ in the last bit, which a draw at the edge of two ids can show.
    assert same.double().mean() > (0.8 if record.tau < 0.01 or record.draws > 100 else 0.97)
    for name in ("entry_logprobs", "tail_logmass", "target_logprob"):
        mine, theirs = getattr(here, name), getattr(there, name).cpu()
        torch.testing.assert_close(mine[same], theirs[same], rtol=0, atol=1e-4)
    assert torch.equal(here.target_rank, there.target_rank.cpu())
