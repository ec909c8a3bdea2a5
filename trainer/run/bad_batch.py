"""Reports the rows of a step that stopped a run, in RUN/bad_batch.json."""

import numpy as np
import torch
import torch.distributed as dist

from schemas.config import StrictModel
from schemas.errors import StudentError
from schemas.label_set.tables import key_array
from schemas.storage.store import Store
from trainer.config.train import TrainConfig
from trainer.data.loader import RowReader, StepBatch, read_micro_batch
from trainer.data.mixture import TrainingView
from trainer.data.row_order import RowTable, view_rows
from trainer.engine.collectives import gathered
from trainer.engine.guards import LOSS, BadStep
from trainer.engine.train_step import TrainStep
from trainer.run_folder import BAD_BATCH

MAX_PROBED_ROWS = 64
"""Maximum rows that each rank runs individually, those of the worst micro-batches first."""


class BadRow(StrictModel):
    """One row of the step.

    Attributes:
        view_row: row number in the view; in a mixture, numbered through all views.
        row_key: hexadecimal.
        shard, row_group, row: location in ``label_set``, a URL.
        lane, rank, micro_batch: position in the step, each counted from 0.
        loss: mean per label of the row on its own, nats; None if non-finite or unknown.
        is_finite: whether that loss is finite; None if the row was not run on its own.
    """

    view_row: int
    row_key: str
    label_set: str
    shard: str
    row_group: int
    row: int
    num_tokens: int
    lane: int
    rank: int
    micro_batch: int
    loss: float | None
    is_finite: bool | None


class BadBatch(StrictModel):
    """The content of bad_batch.json.

    Attributes:
        what: "loss" or "gradient norm" of the step.
        value: None if non-finite.
        median: median of the preceding steps, if the value is a spike.
        checkpoint: the newest checkpoint before the step; empty if none exists.
        rows: all rows of the step: first those with a non-finite loss, then by decreasing loss.
    """

    step: int
    what: str
    value: float | None
    median: float | None
    checkpoint: str
    rows: list[BadRow]


class BadBatchReport:
    """Finds the rows that caused a bad step. Collective."""

    def __init__(
        self,
        config: TrainConfig,
        view: TrainingView,
        rows: RowTable,
        step: TrainStep,
        vocab_size: int,
    ) -> None:
        """
        Args:
            step: runs single rows.
            vocab_size: rows of the student's head.
        """
        self._config, self._view, self._rows = config, view, rows
        self._step, self._vocab_size = step, vocab_size

    def write(self, store: Store, bad: BadStep, batch: StepBatch, checkpoint: str) -> StudentError:
        """Writes the rows of the step to the run's folder, on rank 0.

        Returns:
            The error for every rank to raise.
        """
        losses = self._row_losses(bad, batch)
        report = BadBatch(
            step=bad.step,
            what=bad.what,
            value=_finite(bad.value),
            median=bad.median,
            checkpoint=checkpoint,
            rows=self._describe(batch, losses),
        )
        if dist.get_rank() == 0:
            store.write_bytes(BAD_BATCH, report.model_dump_json(indent=2).encode())
        dist.barrier()
        return StudentError(summary(bad, report, store.path(BAD_BATCH)))

    def _row_losses(self, bad: BadStep, batch: StepBatch) -> dict[int, float]:
        """Mean loss per label of single rows, by id, from all ranks; empty after a bad gradient."""
        if bad.what != LOSS:
            return {}  # the gradient may have reached the weights, so no loss identifies a row
        reader = RowReader(self._view, self._rows, self._config.loss, self._config.data.cache_bytes)
        mine = self._candidates(bad, batch)
        found: dict[int, float] = {}
        try:
            # All ranks run the same number of forward passes: ZeRO-3 gathers parameters in each.
            for number in range(max(gathered([len(mine)]))):
                ids = mine[number : number + 1]
                loss = self._row_loss(reader, ids)
                found.update(dict.fromkeys(ids, loss))
        finally:
            reader.close()
        return {row: loss for part in gathered([found]) for row, loss in part.items()}

    def _candidates(self, bad: BadStep, batch: StepBatch) -> list[int]:
        """Ids of this rank's rows to run individually."""
        size = self._config.data.micro_batch_size
        packs = batch.packs[dist.get_rank() :: dist.get_world_size()]
        order = sorted(range(len(packs)), key=lambda i: _badness(bad.micro_losses[i // size]))
        return [int(row) for i in order for row in packs[i]][:MAX_PROBED_ROWS]

    def _row_loss(self, reader: RowReader, ids: list[int]) -> float:
        pack = np.array(ids, np.int64)
        micro_batch = read_micro_batch(reader, [pack], self._config.data, self._vocab_size)
        with torch.no_grad(), self._step.without_dropout():
            loss, _ = self._step.forward(micro_batch)
        return float(loss) / micro_batch.weight if micro_batch.weight else 0.0

    def _describe(self, batch: StepBatch, losses: dict[int, float]) -> list[BadRow]:
        world_size, size = dist.get_world_size(), self._config.data.micro_batch_size
        described = []
        for lane, pack in enumerate(batch.packs):
            numbers = view_rows(self._view, self._config.data, pack)
            keys = key_array(self._view.table.take(numbers), "row_key")
            for row, number, key in zip(pack.tolist(), numbers.tolist(), keys, strict=True):
                label_set, shard, row_group = self._rows.groups[self._rows.group[row]]
                loss = losses.get(row)
                bad_row = BadRow(
                    view_row=number,
                    row_key=key.tobytes().hex(),
                    label_set=self._view.label_sets[label_set].url,
                    shard=shard,
                    row_group=row_group,
                    row=int(self._rows.row[row]),
                    num_tokens=int(self._rows.num_tokens[row]),
                    lane=lane,
                    rank=lane % world_size,
                    micro_batch=lane // world_size // size,
                    loss=None if loss is None else _finite(loss),
                    is_finite=None if loss is None else _finite(loss) is not None,
                )
                described.append(bad_row)
        return sorted(described, key=lambda row: (row.is_finite is not False, -(row.loss or 0.0)))


def summary(bad: BadStep, report: BadBatch, path: str) -> str:
    """Summarizes in one line: the bad value, its rows, the last good checkpoint, and advice."""
    value = f"{bad.value}" if bad.median is None else f"{bad.value:.4g}"
    what = f"the {bad.what} of step {bad.step} is {value}"
    if bad.median is not None:
        what += f", {bad.value / bad.median:.1f} times the median before it"
    where = f"{path} lists the {len(report.rows)} rows of the step"
    checkpoint = (
        f"the last good checkpoint is {report.checkpoint}"
        if report.checkpoint
        else "no checkpoint precedes it"
    )
    return f"{what}{_blame(report)}; {where}; {checkpoint}. {_advice(bad)}"


def _blame(report: BadBatch) -> str:
    culprits = [row for row in report.rows if row.is_finite is False]
    probed = [row for row in report.rows if row.is_finite is not None]
    if not culprits:
        return ""
    if len(culprits) == len(probed):
        return ", and every row fails on its own: the student's weights are corrupted"
    first = culprits[0]
    return (
        f", as it is for {len(culprits)} of {len(probed)} rows run on their own; the first is row "
        f"{first.view_row} of the view (shard {first.shard}, row group {first.row_group}, row "
        f"{first.row})"
    )


def _advice(bad: BadStep) -> str:
    if bad.median is not None:
        return "To train through spikes set guard.spikes=warn; to avoid them lower optimizer.lr"
    return (
        "Lower optimizer.lr, lengthen the warm-up, lower deepspeed.gradient_clipping, or leave bad "
        "rows out of the view (tutelage labels verify, labels view)"
    )


def _badness(loss: float) -> float:
    """Sort key: non-finite losses first, then by decreasing loss."""
    return -loss if _finite(loss) is not None else -float("inf")


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
