"""What the loader hands to the training, against the rows that were committed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from schemas.errors import DamagedError, StoreError
from schemas.record.reduce import reduce_rows
from schemas.record.rows import LabelRows
from schemas.spec import RecordSpec
from schemas.views.view import View, build_view
from tests.support.training_runs import make_config, make_view
from trainer.config.train import DataConfig, LossConfig, TrainConfig
from trainer.data.loader import Loader, RowReader, StepBatch, lay_out, padded_length
from trainer.data.row_order import LoaderState, count_steps, epoch_steps, read_row_table

RECORD = RecordSpec(kind="topk", k=3, temperatures=(2.0,), entropy=False)
VOCABULARY = {f"t{i}": i for i in range(40)}


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> View:
    return make_view(tmp_path_factory.mktemp("view"), RECORD, VOCABULARY)


def config(view: View, **sections: dict[str, object]) -> TrainConfig:
    data = {"steps": None, "epochs": 1, **sections.pop("data", {})}
    return make_config(Path("run"), view.url, "tokenizer", data=data, **sections)


def start(view: View) -> LoaderState:
    return LoaderState(view_hash=view.view_hash, seed=0, epoch=0, step=0)


def load(
    view: View,
    config: TrainConfig,
    rank: int = 0,
    state: LoaderState | None = None,
    world_size: int = 1,
) -> list[StepBatch]:
    """All batches from a state on."""
    rows = read_row_table(view, config.data)
    num_steps = count_steps(rows, config.data)
    state = state or start(view)
    loader = Loader(config, view, rows, state, rank, len(VOCABULARY), world_size)
    try:
        return [next(loader) for _ in range(num_steps - state.step)]
    finally:
        loader.close()


def documents(batches: list[StepBatch]) -> list[tuple[int, ...]]:
    """Tokens of all packed documents, padding left out, by what position ids and targets say."""
    found = []
    for batch in batches:
        for micro_batch in batch.micro_batches:
            for tokens, positions in zip(
                micro_batch.input_ids.tolist(), micro_batch.position_ids.tolist(), strict=True
            ):
                begins = [i for i, position in enumerate(positions) if position == 0]
                for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
                    found.append(tuple(tokens[begin:end]))
    return [document for document in found if any(document)]


def stored(view: View) -> list[tuple[int, ...]]:
    rows = view.label_sets[0].read_rows(view.table)
    bounds = rows.token_offsets
    return [tuple(rows.token_ids[bounds[i] : bounds[i + 1]].tolist()) for i in range(len(rows))]


def test_loader_returns_every_row_once(view: View) -> None:
    job = config(view)
    batches = load(view, job)
    assert sorted(documents(batches)) == sorted(stored(view))
    assert sum(batch.num_tokens for batch in batches) == view.num_tokens
    assert sum(batch.num_labels for batch in batches) == view.num_labels
    weight = sum(micro_batch.weight for batch in batches for micro_batch in batch.micro_batches)
    assert weight == view.num_labels


@pytest.mark.parametrize("num_workers", [2, 3, 5])  # of four lanes
def test_loader_shares_the_rows_among_ranks(view: View, num_workers: int) -> None:
    job = config(view)
    alone = load(view, job)
    shares = [load(view, job, rank, world_size=num_workers) for rank in range(num_workers)]
    assert {len(share) for share in shares} == {len(alone)}
    for number, whole in enumerate(alone):
        together = [share[number] for share in shares]
        assert sorted(documents(together)) == sorted(documents([whole]))
        assert len({len(part.micro_batches) for part in together}) == 1
        assert {part.state for part in together} == {whole.state}


def test_loader_resumes_with_the_rest(view: View) -> None:
    job = config(view, data={"micro_batch_size": 2})
    whole = load(view, job)
    for done in (1, len(whole) - 1):
        rest = load(view, job, state=whole[done - 1].state)
        for mine, other in zip(rest, whole[done:], strict=True):
            assert mine.state == other.state
            for a, b in zip(mine.micro_batches, other.micro_batches, strict=True):
                assert torch.equal(a.input_ids, b.input_ids)
                assert torch.equal(a.targets.entry_ids, b.targets.entry_ids)


def test_loader_targets_point_at_the_state_before_their_token(view: View) -> None:
    for batch in load(view, config(view, data={"micro_batch_size": 3})):
        for micro_batch in batch.micro_batches:
            targets = micro_batch.targets
            tokens = micro_batch.input_ids.reshape(-1)
            assert torch.equal(tokens[targets.positions + 1], targets.token_ids)
            positions = micro_batch.position_ids.reshape(-1)
            assert (positions[targets.positions + 1] == positions[targets.positions] + 1).all()


def test_gathered_rows_are_the_stored_rows(view: View) -> None:
    rows = read_row_table(view, config(view).data)
    ids = np.random.default_rng(0).permutation(len(rows))[:50]
    reader = RowReader(view, rows, LossConfig(kind="ghost"), cache_bytes=0)
    gathered = reader.gather(ids)
    expected = view.label_sets[0].read_rows(view.table.take(ids))
    assert_same_rows(gathered, expected)
    reader.close()


def test_hard_labels_read_no_teacher(view: View) -> None:
    reader = RowReader(view, read_row_table(view, config(view).data), LossConfig(kind="hard"), 0)
    assert reader.gather(np.arange(5)).entry_ids is None
    reader.close()


def test_view_may_promise_less_than_its_label_set_holds(tmp_path: Path) -> None:
    have = RecordSpec(kind="threshold", tau=0.05, temperatures=(0.5, 2.0), draw_temperature=2.0)
    want = RecordSpec(kind="threshold", tau=0.2, temperatures=(2.0,), entropy=False)
    whole = make_view(tmp_path, have, VOCABULARY)
    view = build_view(str(tmp_path / "less"), [(whole.label_sets[0], "run")], want)
    assert view.view_hash != whole.view_hash
    assert View.open(view.url).records == [want]
    ids = np.arange(20)[::-1].copy()
    table = read_row_table(view, config(view).data)
    reader = RowReader(view, table, LossConfig(kind="forward_kl"), cache_bytes=0)
    found = reader.gather(ids)
    reader.close()
    stored = whole.label_sets[0].read_rows(view.table.take(ids))
    assert_same_rows(found, reduce_rows(stored, have, want))
    assert len(found.entry_ids) < len(stored.entry_ids)
    batches = load(view, config(view, loss={"kind": "forward_kl", "temperature": 2.0}))
    assert batches[0].micro_batches[0].targets.record == want
    hard = RowReader(view, table, LossConfig(kind="hard"), cache_bytes=0)
    assert hard.gather(ids).entry_ids is None
    hard.close()


def test_view_cannot_promise_what_its_label_set_lacks(view: View) -> None:
    with pytest.raises(StoreError, match=r"record\.k: only 3 stored"):
        build_view(f"{view.url}-more", [(view.label_sets[0], "run")], RecordSpec(kind="topk", k=4))


def test_loader_raises_damage_in_the_training(tmp_path: Path) -> None:
    view = make_view(tmp_path, RECORD, VOCABULARY)
    shard = next((tmp_path / "labels" / "shards").iterdir())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedError, match=shard.name):
        load(view, config(view))


def test_padding_is_a_document_of_its_own() -> None:
    rows = LabelRows(
        row_key=np.zeros((3, 16), np.uint8),
        content_key=np.zeros((3, 16), np.uint8),
        token_ids=np.arange(1, 8, dtype=np.int32),
        token_offsets=np.array([0, 3, 5, 7]),
        label_spans=np.empty(0, np.int32),
        span_offsets=np.zeros(4, np.int64),
    )
    input_ids, position_ids = lay_out(rows, np.array([0, 3, 12]), (3, 6))
    assert input_ids.tolist() == [[1, 2, 3, 4, 5, 0], [0] * 6, [6, 7, 0, 0, 0, 0]]
    assert position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]]


def test_padding_ends_at_the_longest_sequence() -> None:
    assert padded_length([0, 0], 1000) == 64
    assert padded_length([65, 3], 1000) == 128
    assert padded_length([65, 3], 100) == 100


def assert_same_rows(found: LabelRows, expected: LabelRows) -> None:
    for name in ("token_ids", "label_spans", "head_len", "entry_ids", "entry_logprobs", "lse"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    for name in ("token_offsets", "label_offsets", "entry_offsets"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def test_order_does_not_depend_on_the_labels(tmp_path: Path) -> None:
    """Students of two records learn from the same rows in the same order."""
    tables = [
        read_row_table(make_view(tmp_path / record.kind, record, VOCABULARY), job_data())
        for record in (RecordSpec(kind="topk", k=2), RecordSpec(kind="threshold", tau=0.2))
    ]
    one, other = (
        [[lane.tolist() for lane in step] for step in epoch_steps(table, job_data(), 0)]
        for table in tables
    )
    assert one == other


def job_data() -> DataConfig:
    return DataConfig(max_tokens=64, sequences_per_step=2, epochs=1)


def test_freed_memory_stays_with_arrow_unless_told_otherwise():
    code = (
        "import pyarrow as pa\n"
        "from trainer.data.loader import keep_freed_pages\n"
        "keep_freed_pages()\n"
        "print(pa.default_memory_pool().backend_name)"
    )

    def backend(**asked: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "ARROW_DEFAULT_MEMORY_POOL"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env={**environment, **asked}, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    if "jemalloc" in pa.supported_memory_backends():
        assert backend() == "jemalloc"
    assert backend(ARROW_DEFAULT_MEMORY_POOL="system") == "system"
