"""Students against their teacher on held-out rows, with full distributions of every model.

All models are held at once, so that the teacher runs once per batch whatever the number of
students. Rows are padded on the right, which causal attention needs no mask for.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from schemas.errors import ConfigError, StudentError
from schemas.record import LabelRows, target_positions
from schemas.views.view import View
from trainer.config.evaluate import TEACHER, EvaluateConfig, EvaluateSummary, ModelMetrics
from trainer.evaluation.metrics import Tally
from trainer.student.build import (
    check_student,
    hidden_states,
    load_model,
    load_tokenizer,
    output_logits,
)
from trainer.student.vocabulary import check_vocabularies

__all__ = ["EvaluateConfig", "EvaluateSummary", "ModelMetrics", "run_evaluate"]

_ROWS_AT_ONCE = 2048
"""Rows that are read together and batched by length."""


def run_evaluate(config: EvaluateConfig, progress: bool = True) -> EvaluateSummary:
    """Measures every model of the configuration.

    Args:
        config: what to compare.
        progress: print a table of the result.

    Returns:
        The metrics by name of the model, the teacher's under "teacher".

    Raises:
        ConfigError: no GPU where one was asked for, or a view without labels.
        StudentError: a model cannot be loaded, or cannot take rows of this length.
        VocabularyError: a model's tokenizer is not that of the labels.
        StoreError, DamagedError: the view or its shards are not what they should be.
    """
    started = time.perf_counter()
    view = View.open(config.view)
    view.check_shards()
    table = _chosen_rows(view.table, config.max_rows)
    device = _device(config.device)
    paths = {TEACHER: config.teacher, **config.students}
    runners = {name: _load(name, path, config, view, device) for name, path in paths.items()}
    for batch in _batches(view, table, config.batch_tokens, device):
        _measure(runners, batch, config.chunk_tokens)
    summary = EvaluateSummary(
        view=config.view,
        view_hash=view.view_hash,
        rows=len(table),
        tokens=runners[TEACHER].num_tokens,
        labels=runners[TEACHER].tally.num_labels,
        device=str(device),
        seconds=round(time.perf_counter() - started, 3),
        models={name: runner.metrics() for name, runner in runners.items()},
    )
    if progress:
        print(format_table(summary), flush=True)
    return summary


def format_table(summary: EvaluateSummary) -> str:
    """The result as aligned plain text."""
    head = ["model", "parameters", "perplexity", "CE", "KL to teacher", "agreement", "accuracy"]
    head += ["ECE", "tokens/s"]
    rows = [
        [
            name,
            f"{m.parameters:,}",
            f"{m.perplexity:.2f}",
            f"{m.cross_entropy:.4f}",
            f"{m.kl_to_teacher:.4f}",
            f"{m.top1_agreement:.1%}",
            f"{m.top1_accuracy:.1%}",
            f"{m.ece:.1%}",
            f"{m.tokens_per_s:,.0f}",
        ]
        for name, m in summary.models.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in [head, *rows]
    ]
    title = f"{summary.view}: {summary.rows:,} rows, {summary.labels:,} labels, {summary.device}"
    return "\n".join([title, *lines])


@dataclass(frozen=True)
class _Batch:
    """Rows of one forward pass.

    Attributes:
        input_ids: [B, L] int64, padded on the right.
        position_ids: [B, L] int64.
        states: [T] int64, flat index of the hidden state that each label is predicted from.
        token_ids: [T] int64, the token that stands there.
        num_tokens: without padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    states: Tensor
    token_ids: Tensor
    num_tokens: int


@dataclass
class _Runner:
    """One model, what it cost and what it achieved so far."""

    model: PreTrainedModel
    device: torch.device
    seconds: float = 0.0
    num_tokens: int = 0
    tally: Tally = field(default_factory=Tally)

    @contextmanager
    def timed(self) -> Iterator[None]:
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.seconds += time.perf_counter() - started

    def states(self, batch: _Batch) -> Tensor:
        """[T, H], the hidden states that the labels of the batch are predicted from."""
        with self.timed():
            hidden = hidden_states(self.model, batch.input_ids, batch.position_ids)
            chosen = hidden.flatten(0, 1)[batch.states]
        self.num_tokens += batch.num_tokens
        return chosen

    def logits(self, states: Tensor) -> Tensor:
        """[T, V] float32."""
        with self.timed():
            return output_logits(self.model, states)

    def metrics(self) -> ModelMetrics:
        tally, parameters = self.tally, self.model.parameters()
        ce = tally.ce / tally.num_labels
        return ModelMetrics(
            cross_entropy=ce,
            perplexity=math.exp(ce),
            kl_to_teacher=tally.kl / tally.num_labels,
            top1_agreement=tally.agreements / tally.num_labels,
            top1_accuracy=tally.hits / tally.num_labels,
            ece=tally.calibration.error,
            parameters=sum(parameter.numel() for parameter in parameters),
            tokens_per_s=self.num_tokens / self.seconds,
        )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.no_grad()
def _measure(runners: dict[str, _Runner], batch: _Batch, chunk_tokens: int) -> None:
    """Adds one batch to every model's tally; [T, V] logits exist for one chunk of positions."""
    states = {name: runner.states(batch) for name, runner in runners.items()}
    for start in range(0, len(batch.token_ids), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        teacher = runners[TEACHER].logits(states[TEACHER][part])
        for name, runner in runners.items():
            logits = teacher if name == TEACHER else runner.logits(states[name][part])
            runner.tally.add(logits, teacher, batch.token_ids[part])


def _load(
    name: str, path: str, config: EvaluateConfig, view: View, device: torch.device
) -> _Runner:
    """Loads a model and shows that it can be given these rows."""
    model = load_model(path, config.dtype).eval().to(device)
    check_student(model)
    rows = model.get_output_embeddings().weight.shape[0]
    tokenizer = load_tokenizer(path)
    for label_set in view.label_sets:
        check_vocabularies(tokenizer, rows, label_set, f"{name} ({path})")
    longest = int(np.max(view.table.column("num_tokens").to_numpy(), initial=0))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise StudentError(
            f"{name} ({path}) takes {limit} tokens, the longest row of {config.view} has "
            f"{longest}; evaluate on a view of shorter rows"
        )
    return _Runner(model, device)


def _chosen_rows(table: pa.Table, max_rows: int) -> pa.Table:
    """The rows to measure on: all, or `max_rows` at equal distances."""
    if max_rows and max_rows < len(table):
        table = table.take(pa.array(np.arange(max_rows) * len(table) // max_rows))
    if not int(np.sum(table.column("num_labels").to_numpy())):
        raise ConfigError("the view has no labels to evaluate on; name the view of held-out rows")
    return table


def _device(wanted: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ConfigError('device = "cuda", but torch sees no GPU; use device = "auto" or "cpu"')
    return torch.device("cuda" if has_gpu and wanted != "cpu" else "cpu")


def _batches(
    view: View, table: pa.Table, batch_tokens: int, device: torch.device
) -> Iterator[_Batch]:
    """All rows of `table`, those of like length together."""
    sets = table.column("label_set").to_numpy()
    for number, label_set in enumerate(view.label_sets):
        places = np.flatnonzero(sets == number)
        for start in range(0, len(places), _ROWS_AT_ONCE):
            where = table.take(pa.array(places[start : start + _ROWS_AT_ONCE]))
            rows = label_set.read_rows(where, columns=())
            lengths = np.diff(rows.token_offsets)
            order = np.argsort(lengths, kind="stable")
            for group in _groups(lengths[order], batch_tokens):
                yield _batch(rows.take(order[group]), device)


def _groups(lengths: np.ndarray, batch_tokens: int) -> Iterator[slice]:
    """Cuts rows of rising length into batches of `batch_tokens` padded tokens, or of one row."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or (stop + 1 - start) * lengths[stop] > batch_tokens:
            yield slice(start, stop)
            start = stop


def _batch(rows: LabelRows, device: torch.device) -> _Batch:
    lengths = np.diff(rows.token_offsets)
    width = int(lengths.max())
    row = np.repeat(np.arange(len(rows)), lengths)
    column = np.arange(rows.num_tokens) - rows.token_offsets[row]
    input_ids = np.zeros((len(rows), width), np.int64)
    input_ids[row, column] = rows.token_ids
    indices, label_offsets = target_positions(rows.label_spans, rows.span_offsets)
    label_row = np.repeat(np.arange(len(rows)), np.diff(label_offsets))
    targets = torch.from_numpy(indices + label_row * width).to(device)
    tokens = torch.from_numpy(input_ids).to(device)
    return _Batch(
        input_ids=tokens,
        position_ids=torch.arange(width, device=device).expand(len(rows), -1),
        states=targets - 1,
        token_ids=tokens.flatten()[targets],
        num_tokens=rows.num_tokens,
    )
