"""Compares students with their teacher on held-out rows, using full distributions.

All models stay loaded, so the teacher runs only once per batch for any number of students. Rows are
right-padded, which needs no mask under causal attention.
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

from schemas.console.progress import Progress
from schemas.console.text import table
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

_READ_ROWS = 2048
"""Rows read at a time and then batched by length."""


def run_evaluate(config: EvaluateConfig, progress: bool = True) -> EvaluateSummary:
    """Measures every model of the configuration.

    Args:
        config: what to compare.
        progress: show progress on standard error and print a table of the result.

    Returns:
        Metrics by model name, the teacher's under "teacher".

    Raises:
        ConfigError: a GPU is requested and torch sees none, or the view has no labels.
        StudentError: a model cannot be loaded, or its context is shorter than the longest row.
        VocabularyError: a model's tokenizer differs from that of the labels.
        StoreError, DamagedError: the view or a shard is missing or damaged.
    """
    started = time.perf_counter()
    view = View.open(config.view)
    view.check_shards()
    rows = _sample_rows(view.table, config.max_rows)
    device = _device(config.device)
    paths = {TEACHER: config.teacher, **config.students}
    runners: dict[str, _Runner] = {}
    total = int(np.sum(rows.column("num_tokens").to_numpy()))
    console = Progress("evaluate", enabled=progress)
    for name, path in paths.items():
        console.say(f"loading {name} ({path})")
        runners[name] = _load(name, path, config, view, device)
    with console:  # only now, since transformers draws its own bars while loading
        for batch in _batches(view, rows, config.batch_tokens, device):
            _measure(runners, batch, config.chunk_tokens)
            _show(console, runners, len(rows), total)
    summary = EvaluateSummary(
        view=config.view,
        view_hash=view.view_hash,
        rows=len(rows),
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
    """Formats the result as aligned plain text."""
    head = ["model", "parameters", "perplexity", "CE", "KL to teacher", "agreement", "accuracy"]
    head += ["ECE", "tokens/s"]
    lines = [
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
    title = f"{summary.view}: {summary.rows:,} rows, {summary.labels:,} labels, {summary.device}"
    return f"{title}\n{table(head, lines, right=range(1, len(head)))}"


@dataclass(frozen=True)
class _Batch:
    """Rows of one forward pass.

    Attributes:
        input_ids: [B, L] int64, padded on the right.
        position_ids: [B, L] int64.
        states: [T] int64, flat index of the hidden state that predicts each labelled token.
        token_ids: [T] int64, the labelled tokens.
        num_rows: B.
        num_tokens: without padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    states: Tensor
    token_ids: Tensor
    num_rows: int
    num_tokens: int


@dataclass
class _Runner:
    """One model, with the time and the metrics of the rows so far."""

    model: PreTrainedModel
    device: torch.device
    seconds: float = 0.0
    num_rows: int = 0
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
        """[T, H], the hidden states that predict the labelled tokens of the batch."""
        with self.timed():
            hidden = hidden_states(self.model, batch.input_ids, batch.position_ids)
            chosen = hidden.flatten(0, 1)[batch.states]
        self.num_rows += batch.num_rows
        self.num_tokens += batch.num_tokens
        return chosen

    def logits(self, states: Tensor) -> Tensor:
        """[T, V] float32."""
        with self.timed():
            return output_logits(self.model, states)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    def metrics(self) -> ModelMetrics:
        tally = self.tally
        ce = tally.ce / tally.num_labels
        return ModelMetrics(
            cross_entropy=ce,
            perplexity=math.exp(ce),
            kl_to_teacher=tally.kl / tally.num_labels,
            top1_agreement=tally.agreements / tally.num_labels,
            top1_accuracy=tally.hits / tally.num_labels,
            ece=tally.calibration.error,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            tokens_per_s=self.tokens_per_s,
        )

    def _wait(self) -> None:
        # CUDA kernels are asynchronous; without a sync their time would count for the next block.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.no_grad()
def _measure(runners: dict[str, _Runner], batch: _Batch, chunk_tokens: int) -> None:
    """Adds one batch to every model's tally."""
    states = {name: runner.states(batch) for name, runner in runners.items()}
    # In chunks: two full [T, V] logit tensors of a batch would outgrow the models themselves.
    for start in range(0, len(batch.token_ids), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        teacher = runners[TEACHER].logits(states[TEACHER][part])
        for name, runner in runners.items():
            logits = teacher if name == TEACHER else runner.logits(states[name][part])
            runner.tally.add(logits, teacher, batch.token_ids[part])


def _show(progress: Progress, runners: dict[str, _Runner], num_rows: int, num_tokens: int) -> None:
    done = runners[TEACHER]  # every model has seen the same rows
    progress.show(
        done.num_tokens,
        num_tokens,
        f"{done.num_rows:,} of {num_rows:,} rows, {done.num_tokens:,} tokens",
        facts=[f"{name} {runner.tokens_per_s:,.0f} tokens/s" for name, runner in runners.items()],
    )


def _load(
    name: str, path: str, config: EvaluateConfig, view: View, device: torch.device
) -> _Runner:
    """Loads a model and checks that it can run on the rows of the view."""
    model = load_model(path, config.dtype).eval().to(device)
    check_student(model)
    rows = model.get_output_embeddings().weight.shape[0]
    tokenizer = load_tokenizer(path)
    for label_set in view.label_sets:
        check_vocabularies(tokenizer.get_vocab(), rows, label_set.vocabulary(), f"{name} ({path})")
    longest = int(np.max(view.table.column("num_tokens").to_numpy(), initial=0))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise StudentError(
            f"{name} ({path}) has a context of {limit} tokens, the longest row of {config.view} "
            f"has {longest}; evaluate on a view of shorter rows"
        )
    return _Runner(model, device)


def _sample_rows(rows: pa.Table, max_rows: int) -> pa.Table:
    """All rows, or `max_rows` spread evenly over them."""
    if max_rows and max_rows < len(rows):
        rows = rows.take(pa.array(np.arange(max_rows) * len(rows) // max_rows))
    if not int(np.sum(rows.column("num_labels").to_numpy())):
        raise ConfigError("the view has no labels to evaluate on; name the view of held-out rows")
    return rows


def _device(requested: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if requested == "cuda" and not has_gpu:
        raise ConfigError('device = "cuda", but torch sees no GPU; use device = "auto" or "cpu"')
    return torch.device("cuda" if has_gpu and requested != "cpu" else "cpu")


def _batches(
    view: View, chosen: pa.Table, batch_tokens: int, device: torch.device
) -> Iterator[_Batch]:
    """The chosen rows of a view in batches of similar length, which keeps padding small."""
    sets = chosen.column("label_set").to_numpy()
    for number, label_set in enumerate(view.label_sets):
        places = np.flatnonzero(sets == number)
        for start in range(0, len(places), _READ_ROWS):
            where = chosen.take(pa.array(places[start : start + _READ_ROWS]))
            rows = label_set.read_rows(where, columns=())
            lengths = np.diff(rows.token_offsets)
            order = np.argsort(lengths, kind="stable")
            for group in _groups(lengths[order], batch_tokens):
                yield _batch(rows.take(order[group]), device)


def _groups(lengths: np.ndarray, batch_tokens: int) -> Iterator[slice]:
    """Splits rows of increasing length into batches of `batch_tokens` padded tokens or one row."""
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
        num_rows=len(rows),
        num_tokens=rows.num_tokens,
    )
