import numpy as np
import pytest
import torch

from schemas.errors import ConfigError, RecordError
from schemas.record import LabelRows
from schemas.spec import RecordSpec
from trainer.config.train import LossConfig
from trainer.head.fused_head import fused_distillation_loss
from trainer.losses.targets import SparseTargets, build_targets
from trainer.losses.teacher_weights import TeacherPartition, teacher_partition

EMPTY_KEYS = np.zeros((2, 16), np.uint8)


def two_rows(**changes: object) -> LabelRows:
    """Rows of 5 and 4 tokens, labelled at 1, 3, 4 and at 2; head sizes 2, 1, 3 and 2."""
    columns = {
        "row_key": EMPTY_KEYS,
        "content_key": EMPTY_KEYS,
        "token_ids": np.array([10, 11, 12, 13, 14, 20, 21, 22, 23], np.int32),
        "token_offsets": np.array([0, 5, 9]),
        "label_spans": np.array([1, 2, 3, 5, 2, 3], np.int32),
        "span_offsets": np.array([0, 4, 6]),
        "head_len": np.array([2, 1, 3, 2], np.uint16),
        "tail_len": np.zeros(4, np.uint16),
        "entry_ids": np.array([11, 5, 13, 14, 2, 3, 22, 1], np.int32),
        "entry_logprobs": np.log([0.5, 0.2, 0.9, 0.4, 0.3, 0.2, 0.6, 0.3]).astype(np.float16),
        "tail_logmass": np.log([0.3, 0.1, 0.1, 0.1]).astype(np.float16),
        "target_logprob": np.log([0.5, 0.9, 0.4, 0.6]).astype(np.float16),
        "target_rank": np.ones(4, np.int32),
        "lse": np.log([[1.9], [1.3], [1.9], [1.6]]).astype(np.float16),
    }
    return LabelRows(**{**columns, **changes})


HEADS = RecordSpec(kind="topk", temperatures=(2.0,))


def build(
    rows: LabelRows | None = None, vocab_size: int = 30, record: RecordSpec = HEADS
) -> SparseTargets:
    """The two rows packed into a [2, 8] micro-batch, the first at 2, the second at 8."""
    weights = np.array([1.0, 0.5], np.float32)
    return build_targets(
        two_rows() if rows is None else rows, np.array([2, 8]), record, vocab_size, weights
    )


def weights_of(partition: TeacherPartition, targets: SparseTargets) -> torch.Tensor:
    return partition.log_weights(targets.segments()).exp()


def test_position_is_the_state_before_the_target_token():
    targets = build()
    assert targets.positions.tolist() == [2, 4, 5, 9]
    assert targets.token_ids.tolist() == [11, 13, 14, 22]
    assert targets.weights.tolist() == [1.0, 1.0, 1.0, 0.5]
    assert targets.entry_bounds.tolist() == [0, 2, 3, 6, 8]
    assert targets.segments().rows.tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
    assert targets.num_ids == 23


def test_chunks_are_the_whole_cut_apart():
    targets = build()
    chunk = targets.chunk(1, 3)
    assert chunk.positions.tolist() == [4, 5]
    assert chunk.entry_ids.tolist() == [13, 14, 2, 3]
    assert chunk.entry_offsets.tolist() == [0, 1, 4]
    assert chunk.segments().rows.tolist() == [0, 1, 1, 1]
    assert chunk.lse.shape == (2, 1)


def test_loss_off_by_one_would_be_seen():
    """A student whose state at t - 1 names token t has no loss; at t it would have a large one."""
    targets = build()
    hidden = torch.zeros(16, 30)
    hidden[targets.positions, targets.token_ids] = 50.0
    loss, _ = fused_distillation_loss(hidden, torch.eye(30), None, targets, LossConfig(kind="hard"))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    tokens = torch.zeros(16, dtype=torch.long)
    tokens[2:7], tokens[8:12] = torch.arange(10, 15), torch.arange(20, 24)
    by_text = tokens[targets.positions + 1]
    assert by_text.tolist() == targets.token_ids.tolist()


def test_head_sums_to_what_the_tail_leaves_whatever_rounding_did():
    rows = two_rows(entry_logprobs=np.full(8, -0.3, np.float16))
    targets = build(rows)
    partition = teacher_partition(targets, 1.0, targets.segments(), torch.float64)
    head = torch.zeros(4, dtype=torch.float64).index_add_(
        0, targets.segments().rows, weights_of(partition, targets)
    )
    torch.testing.assert_close(head, 1 - partition.tail)
    torch.testing.assert_close(partition.tail, targets.tail_logmass.double().exp())


def test_weights_at_another_temperature_come_from_the_stored_normaliser():
    targets = build()
    partition = teacher_partition(targets, 2.0, targets.segments(), torch.float64)
    expected = (
        targets.entry_logprobs.double() / 2 - targets.lse[targets.segments().rows, 0].double()
    ).exp()
    torch.testing.assert_close(weights_of(partition, targets), expected)
    assert partition.tail[1].item() == pytest.approx(1 - expected[2].item())
    assert (partition.tail > 0).all()


def test_head_that_rounding_lifted_over_one_has_all_mass():
    rows = two_rows(lse=np.full((4, 1), -0.5, np.float16))
    targets = build(rows)
    partition = teacher_partition(targets, 2.0, targets.segments(), torch.float64)
    assert not partition.tail.any()
    assert torch.isneginf(partition.log_tail).all()
    sums = torch.zeros(4, dtype=torch.float64).index_add_(
        0, targets.segments().rows, weights_of(partition, targets)
    )
    torch.testing.assert_close(sums, torch.ones(4, dtype=torch.float64))


def test_entries_the_student_lacks_go_to_the_tail_and_nothing_else_changes():
    rows = two_rows(entry_ids=np.array([11, 27, 13, 14, 2, 3, 22, 28], np.int32))
    full, folded = build(rows), build(rows, vocab_size=25)
    assert folded.entry_ids.tolist() == [11, 13, 14, 2, 3, 22]
    assert folded.num_ids == 23
    tail = folded.tail_logmass.double().exp()
    assert tail.tolist() == pytest.approx([0.5, 0.1, 0.1, 0.4], rel=2e-3)
    assert torch.equal(folded.tail_logmass[1:3], full.tail_logmass[1:3])
    at_two = teacher_partition(folded, 2.0, folded.segments(), torch.float64)
    whole = teacher_partition(full, 2.0, full.segments(), torch.float64)
    assert at_two.tail[3].item() == pytest.approx(
        (whole.tail[3] + weights_of(whole, full)[7]).item()
    )


def test_rows_without_a_teacher_are_hard_labels_only():
    names = ("head_len", "tail_len", "entry_ids", "entry_logprobs", "tail_logmass", "lse")
    targets = build(two_rows(**dict.fromkeys(names)))
    assert targets.num_labels == 4
    assert targets.num_entries == 0
    hidden = torch.randn(16, 30, generator=torch.Generator().manual_seed(0))
    hard, _ = fused_distillation_loss(hidden, torch.eye(30), None, targets, LossConfig(kind="hard"))
    same, _ = fused_distillation_loss(hidden, torch.eye(30), None, build(), LossConfig(kind="hard"))
    assert hard.item() == same.item()
    with pytest.raises(ConfigError, match="without the teacher's columns"):
        fused_distillation_loss(hidden, torch.eye(30), None, targets, LossConfig(kind="ghost"))


def test_position_without_entries_is_an_error():
    with pytest.raises(RecordError, match=r"label 1 .* has no entries"):
        build(
            two_rows(
                head_len=np.array([3, 0, 3, 2], np.uint16), entry_offsets=np.array([0, 3, 3, 6, 8])
            )
        )


def test_draws_that_the_record_does_not_have_are_refused():
    with pytest.raises(RecordError, match='"topk" has none'):
        build(two_rows(tail_len=np.array([0, 1, 0, 0], np.uint16)))


def test_text_outside_the_students_vocabulary_is_refused():
    with pytest.raises(RecordError, match=r"token id 22, .* only 20 ids"):
        build(vocab_size=20)


def test_read_only_arrays_are_fine():
    rows = two_rows()
    for name in ("entry_ids", "entry_logprobs", "tail_logmass", "lse"):
        getattr(rows, name).flags.writeable = False
    assert build(rows).num_entries == 8
