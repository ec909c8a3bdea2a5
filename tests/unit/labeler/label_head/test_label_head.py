"""Sparse labels from full logits, against a float64 reference."""

import numpy as np
import pytest
import torch

from labeler.label_head import numpy_kernels, position_labels
from labeler.label_head.labels import COLUMNS
from labeler.label_head.position_labels import PositionLabels, label_logits
from labeler.label_head.thread_pool import SlicePool
from labeler.label_head.topk import ordered_topk
from schemas.spec import RecordSpec
from tests.support.label_oracle import Entries, entries_of

TEMPERATURES = (0.5, 2.0, 4.0)


def reference(
    logits: np.ndarray,
    targets: np.ndarray,
    record: RecordSpec,
    uniforms: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The labels in float64, position by position, from their definitions."""
    columns: dict[str, list[object]] = {}
    for at, (row, target) in enumerate(zip(logits.astype(np.float64), targets, strict=True)):
        logprobs = row - np.logaddexp.reduce(row)
        kept = entries_of(logprobs, record, None if uniforms is None else uniforms[at])
        probs = np.exp(logprobs)
        values = {
            **padded(kept, logprobs, record.most_entries(len(row))),
            "tail_logmass": np.logaddexp.reduce(np.delete(logprobs, kept.head), initial=-np.inf),
            "target_logprob": logprobs[target],
            "target_rank": 1 + np.count_nonzero(row > row[target]),
            "entropy": -np.sum(probs[probs > 0] * logprobs[probs > 0]),
            "lse": np.array([np.logaddexp.reduce(logprobs / t) for t in record.temperatures]),
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return {name: np.array(column) for name, column in columns.items()}


def padded(kept: Entries, logprobs: np.ndarray, width: int) -> dict[str, object]:
    def row(values: np.ndarray) -> np.ndarray:
        return np.pad(values, (0, width - len(values)))

    return {
        "entry_ids": row(kept.ids),
        "entry_logprobs": row(logprobs[kept.ids]),
        "head_len": len(kept.head),
        "tail_len": len(kept.draws),
        "entry_counts": row(kept.counts) if not len(kept.head) else None,
    }


def check(labels: PositionLabels, expected: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    for name, column in zip(COLUMNS, labels.columns(), strict=True):
        if column is None:
            assert name in ("entry_counts", "entropy", "lse")
        elif column.is_floating_point():
            np.testing.assert_allclose(
                column.numpy(), expected[name], rtol=0, atol=tolerance, err_msg=name
            )
        else:
            np.testing.assert_array_equal(column.numpy(), expected[name], err_msg=name)


def make_logits(num_rows: int, vocab_size: int, scale: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


@pytest.mark.parametrize("scale", [0.05, 2.0, 12.0])
@pytest.mark.parametrize(("vocab_size", "k"), [(50, 8), (320, 64), (4096, 64), (5003, 12)])
def test_labels_agree_with_float64(vocab_size: int, k: int, scale: float) -> None:
    logits = make_logits(40, vocab_size, scale)
    targets = torch.randint(0, vocab_size, (40,), generator=torch.Generator().manual_seed(1))
    targets[::2] = logits[::2].argmax(dim=1)
    record = RecordSpec(kind="topk", k=k, temperatures=TEMPERATURES)
    labels = label_logits(logits, targets, record)
    check(labels, reference(logits.numpy(), targets.numpy(), record))


def test_tail_too_small_for_the_softmax_keeps_its_digits() -> None:
    logits = torch.full((3, 200), -150.0)
    logits[:, 7] = 0.0
    logits[1, 8] = -1.0
    logits[2, 9:12] = -95.0
    targets = torch.tensor([7, 8, 9])
    record = RecordSpec(kind="topk", k=2, temperatures=(2.0,))
    labels = label_logits(logits, targets, record)
    check(labels, reference(logits.numpy(), targets.numpy(), record))
    assert (labels.tail_logmass < -90).all()


def test_large_logits_do_not_overflow() -> None:
    logits = make_logits(10, 500, 1.0) * 20 + 3000.0
    targets = torch.arange(10)
    record = RecordSpec(kind="topk", k=16)
    labels = label_logits(logits, targets, record)
    # float32 itself resolves 2e-4 at 3000.
    check(labels, reference(logits.numpy(), targets.numpy(), record), 2e-3)


def test_forbidden_ids_get_no_probability() -> None:
    logits = make_logits(6, 100, 2.0)
    logits[:, 90:] = -torch.inf
    logits[3, 10:] = -torch.inf
    targets = torch.tensor([1, 2, 3, 4, 5, 6])
    record = RecordSpec(kind="topk", k=20, temperatures=(2.0,))
    labels = label_logits(logits, targets, record)
    with np.errstate(invalid="ignore"):
        check(labels, reference(logits.numpy(), targets.numpy(), record))
    assert torch.isneginf(labels.entry_logprobs[3, 10:]).all()
    assert torch.isneginf(labels.tail_logmass[3])


def test_head_as_wide_as_the_vocabulary_has_no_tail() -> None:
    logits = make_logits(5, 30, 1.0)
    labels = label_logits(logits, torch.arange(5), RecordSpec(kind="topk", k=64))
    assert labels.entry_ids.shape == (5, 30)
    assert torch.isneginf(labels.tail_logmass).all()
    torch.testing.assert_close(labels.entry_logprobs.exp().sum(dim=1), torch.ones(5))


@pytest.mark.parametrize("numpy_threads", [0, 1000])
@pytest.mark.parametrize("vocab_size", [16, 100, 4096, 5003, 20_003])
def test_equal_logits_are_ordered_by_id(
    vocab_size: int, numpy_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numpy_kernels, "NUMPY_THREADS", numpy_threads)
    # bfloat16 keeps 8 bits, so that ties are everywhere, at the boundary of the head too.
    logits = make_logits(50, vocab_size, 1.0).bfloat16().float()
    logits[0] = 0.25
    logits[1, ::2] = -0.0
    logits[1, 1::2] = 0.0
    ids, values = ordered_topk(logits, 16)
    expected = np.lexsort((np.broadcast_to(np.arange(vocab_size), logits.shape), -logits.numpy()))
    np.testing.assert_array_equal(ids.numpy(), expected[:, :16])
    torch.testing.assert_close(values, logits.gather(1, ids))
    assert ids[0].tolist() == list(range(16))
    assert ids[1].tolist() == list(range(16))


def test_rank_counts_only_what_is_strictly_more_probable() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0, 2.0]]).expand(4, -1)
    labels = label_logits(logits, torch.tensor([0, 3, 4, 5]), RecordSpec(kind="topk", k=2))
    assert labels.target_rank.tolist() == [1, 3, 6, 2]


def test_bfloat16_logits_are_computed_on_in_float32() -> None:
    logits = make_logits(20, 300, 3.0).bfloat16()
    targets = torch.arange(20)
    record = RecordSpec(kind="topk", k=32, temperatures=(2.0,))
    labels = label_logits(logits, targets, record)
    check(labels, reference(logits.float().numpy(), targets.numpy(), record))


def test_labels_do_not_depend_on_the_slice_size(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = make_logits(37, 400, 2.0), torch.arange(37)
    record = RecordSpec(kind="topk", k=10, temperatures=(2.0,))
    whole = label_logits(logits, targets, record)
    monkeypatch.setattr(position_labels, "_SLICE_ELEMENTS_CPU", 5 * 400)
    for one, other in zip(
        whole.columns(), label_logits(logits, targets, record).columns(), strict=True
    ):
        if one is not None:
            torch.testing.assert_close(one, other)


def test_workers_with_memory_of_earlier_calls_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(position_labels, "_SLICE_ELEMENTS_CPU", 10_000)
    num_threads = torch.get_num_threads()
    workers = SlicePool(torch.device("cpu"))
    workers.num_threads = 3
    records = [RecordSpec(kind="topk", k=10), RecordSpec(kind="threshold", tau=0.1)]
    for num_rows, vocab_size in ((137, 400), (1, 400), (260, 400), (8, 50)):
        logits, targets = make_logits(num_rows, vocab_size, 2.0), torch.arange(num_rows) % 50
        uniforms = np.random.default_rng(num_rows).random((num_rows, 1))
        for record in records:
            numbers = uniforms if record.has_draws else None
            for given in (logits, logits.bfloat16()):
                with torch.inference_mode(num_rows == 137):
                    fresh = label_logits(given, targets, record, numbers)
                    again = label_logits(given, targets, record, numbers, workers)
                for one, other in zip(fresh.columns(), again.columns(), strict=True):
                    assert (one is None) == (other is None)
                    assert one is None or torch.equal(one, other)
    with pytest.raises(AssertionError, match="needs uniform numbers"):
        label_logits(given, targets, records[1], None, workers)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(num_threads)


def test_only_the_columns_of_the_record_are_computed() -> None:
    labels = label_logits(
        make_logits(3, 50, 1.0), torch.zeros(3), RecordSpec(kind="topk", k=4, entropy=False)
    )
    assert labels.entropy is None
    assert labels.lse is None


def test_labels_of_no_positions_are_empty() -> None:
    record = RecordSpec(kind="topk", k=4, temperatures=(2.0, 3.0))
    labels = label_logits(torch.zeros(0, 50), torch.zeros(0), record)
    assert labels.entry_ids.shape == (0, 4)
    assert labels.lse is not None
    assert labels.lse.shape == (0, 2)


def test_nan_stays_in_its_row() -> None:
    logits = make_logits(3, 300, 1.0)
    logits[1, 5] = torch.nan
    labels = label_logits(logits, torch.zeros(3), RecordSpec(kind="topk", k=4))
    assert labels.target_logprob.isnan().tolist() == [False, True, False]
    assert labels.tail_logmass.isnan().tolist() == [False, True, False]
