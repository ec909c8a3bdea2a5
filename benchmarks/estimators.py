"""Bias and variance of the gradient under each kind of record: ``python -m benchmarks.estimators``.

The teacher is the demo's, on text it was not trained on; the student is a fixed perturbation of it.
The label head labels each position many times with different draws (``record.draw_seed``). Labels
are rounded as in a label set, and the trainer's targets turn them into the gradient of the
student's logits over the full vocabulary. The reference is q - p, the gradient of the KL to the
full distribution.

- bias: the distance of the mean gradient from q - p. Labels with draws are random, so the mean over
  R labels has an expected squared distance of variance / R even without bias; that part is
  subtracted, and reported as the noise of the mean.
- variance: the mean squared distance of one label's gradient from the mean gradient; both for the
  gradient of the logits and for that of the hidden state, g W with W [V, H] the demo teacher's
  output head, which the body of the student receives. There, errors of ids with similar rows of W
  cancel, and systematic draws gain more, because they sample the tail evenly.

Norms are root mean squares over positions, relative to that of q - p, or of (q - p) W.

Of all Horvitz-Thompson estimators that keep as many ids per label, ``threshold`` has the lowest
variance of the logits' gradient: inclusion probabilities min(1, p / tau) minimise the sum over ids
and positions of p^2 (1 / pi - 1). The margin over independent draws depends on the teacher: it is
large where a few ids hold most of the mass, and zero where the distribution is nearly flat, as a
small teacher's is at temperature 2.

Results: the fields of `Measured` by kind of record at temperature 1; those at 2 under
``temperature_2``.

Shapes: T positions, V vocabulary, H hidden size.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo_labels import TokenRows
from benchmarks.demo_positions import Positions, teacher_positions
from benchmarks.harness import command_line, write_results
from benchmarks.records import described, matched_records
from labeler.corpus.windows import all_but_first
from labeler.label_head.position_labels import PositionLabels, label_logits
from labeler.teachers.protocol import RowLabels
from schemas.console.text import table
from schemas.record.uniforms import uniforms
from schemas.spec import RecordSpec
from trainer.config.train import LossConfig
from trainer.losses.objectives import StudentPartition, evaluate_objective
from trainer.losses.targets import SparseTargets, build_targets

ROW_KEY = bytes(range(16))


@dataclass(frozen=True)
class Measured:
    """One kind of record at one temperature.

    Attributes:
        ids_per_label: mean number of entries per position.
        relative_bias: norm of the mean gradient's error over that of the dense gradient, without
            the noise of a mean of finitely many labels.
        noise_of_mean: that noise, likewise relative.
        variance: variance of the logits' gradient, over the squared norm of the dense gradient.
        hidden_variance: the same for the gradient of the hidden state.
        record: its main field and value.
    """

    ids_per_label: float
    relative_bias: float
    noise_of_mean: float
    variance: float
    hidden_variance: float
    record: str


def perturbed_student(teacher_logits: Tensor, seed: int = 0) -> Tensor:
    """float32 [T, V]: logits of a student flatter than the teacher, with noise on every id."""
    noise = torch.randn(teacher_logits.shape, generator=torch.Generator().manual_seed(seed))
    return 0.7 * teacher_logits + noise


def measure(
    positions: Positions,
    student_logits: Tensor,
    record: RecordSpec,
    temperature: float,
    num_labels: int,
) -> Measured:
    """Labels every position `num_labels` times and compares the gradients with the dense one.

    Args:
        positions: the teacher's.
        student_logits: float32 [T, V].
        record: the kind of labels.
        temperature: distillation temperature, of teacher and student.
        num_labels: labels of each position; kinds without draws need one.
    """
    kind = "forward_kl" if record.has_draws else "ghost"
    loss = LossConfig(kind=kind, temperature=temperature)
    log_q = torch.log_softmax(student_logits / temperature, 1)
    dense = log_q.exp() - torch.softmax(positions.logits / temperature, 1)
    repeats = num_labels if record.has_draws else 1
    errors, hidden = _Errors(dense), _Errors(dense @ positions.head)
    num_ids = 0
    for seed in range(repeats):
        targets = labelled(positions, record, seed)
        error = gradient(log_q, targets, loss) - dense
        errors.add(error)
        hidden.add(error @ positions.head)
        num_ids += targets.num_entries
    return Measured(
        ids_per_label=num_ids / (repeats * len(dense)),
        relative_bias=errors.bias,
        noise_of_mean=(errors.variance / repeats) ** 0.5,
        variance=errors.variance,
        hidden_variance=hidden.variance,
        record=described(record),
    )


class _Errors:
    """Accumulates the systematic and random errors of many gradients."""

    def __init__(self, dense: Tensor) -> None:
        self._sum = torch.zeros_like(dense, dtype=torch.float64)
        self._squares, self._count = 0.0, 0
        self._scale = float(dense.square().sum(dtype=torch.float64))

    def add(self, error: Tensor) -> None:
        self._sum += error
        self._squares += float(error.square().sum(dtype=torch.float64))
        self._count += 1

    @property
    def variance(self) -> float:
        """Variance relative to the squared norm of the dense gradient; 0 for a single gradient."""
        if self._count < 2:
            return 0.0
        spread = self._squares - self._count * self._squared_mean
        return spread / (self._count - 1) / self._scale

    @property
    def bias(self) -> float:
        """Relative norm of the mean error, corrected for the noise of the mean."""
        squared = self._squared_mean / self._scale - self.variance / self._count
        return float(max(0.0, squared) ** 0.5)

    @property
    def _squared_mean(self) -> float:
        return float((self._sum / self._count).square().sum())


def labelled(positions: Positions, record: RecordSpec, seed: int) -> SparseTargets:
    """Labels these positions and rounds the labels, as a trainer would read them."""
    record = record.model_copy(update={"draw_seed": seed}) if record.has_draws else record
    numbers = None
    if record.has_draws:
        per_position = record.draws if record.kind == "sampled" else 1
        places = np.arange(len(positions.logits))
        numbers = uniforms(ROW_KEY, places, per_position, record.draw_seed)
    labels = label_logits(positions.logits, positions.target_ids, record, numbers)
    # One row: a first token without a label, then a target for every position.
    tokens = np.concatenate([[0], positions.target_ids.numpy()]).astype(np.int32)
    row = TokenRows([tokens], [all_but_first(len(tokens))])
    stored = row.assembled([_as_arrays(labels)], record)
    return build_targets(stored, np.zeros(1, np.int64), record, positions.logits.shape[1])


def _as_arrays(labels: PositionLabels) -> RowLabels:
    columns: list[Any] = [None if one is None else one.numpy() for one in labels.columns()]
    return RowLabels(*columns)


def gradient(log_q: Tensor, targets: SparseTargets, loss: LossConfig) -> Tensor:
    """float32 [T, V]: the loss gradient with respect to the student's logits / temperature.

    Args:
        log_q: [T, V], log of the student's softmax at the distillation temperature.
    """
    segments = targets.segments()
    flat = segments.rows * log_q.shape[1] + targets.entry_ids
    off = log_q.clone()
    off.view(-1).index_fill_(0, flat, -torch.inf)
    log_tail = torch.logsumexp(off, 1)
    student = StudentPartition(log_q.view(-1).index_select(0, flat), log_tail, segments)
    result = evaluate_objective(targets, loss, student)
    dense = (off - log_tail[:, None]).exp() * result.tail_gradient[:, None]
    return dense.view(-1).scatter_(0, flat, result.entry_gradient).view_as(dense)


def as_text(found: dict[float, dict[str, Measured]]) -> str:
    """Formats a table with one line per temperature and kind."""
    head = ["T", "kind", "record", "ids / label", "bias", "noise of mean", "variance", "of hidden"]
    lines = [
        [f"{temperature:g}", kind, one.record, f"{one.ids_per_label:.2f}"]
        + [f"{getattr(one, name):.4f}" for name in _ERRORS]
        for temperature, kinds in found.items()
        for kind, one in kinds.items()
    ]
    return table(head, lines, right=range(3, len(head)))


_ERRORS = ("relative_bias", "noise_of_mean", "variance", "hidden_variance")


def run(
    num_positions: int, num_labels: int, temperatures: tuple[float, ...] = (1.0, 2.0), seed: int = 0
) -> dict[float, dict[str, Measured]]:
    """Measures all kinds at all temperatures, at equal ids per label."""
    positions = teacher_positions(num_positions, seed)
    student = perturbed_student(positions.logits, seed)
    return {
        temperature: {
            kind: measure(positions, student, record, temperature, num_labels)
            for kind, record in matched_records(positions.logits, temperature).items()
        }
        for temperature in temperatures
    }


def main() -> None:
    parser = command_line("estimators", __doc__)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--labels", type=int, default=300, help="labels of each position")
    parser.add_argument("--seed", type=int, default=0, help="seed of positions and student")
    args = parser.parse_args()
    found = run(args.positions, args.labels, seed=args.seed)
    print(as_text(found))
    write_results(args, by_field(found))


def by_field(found: dict[float, dict[str, Measured]]) -> dict[str, Any]:
    """Results by field and kind; temperature 1 at the top level, others under their name."""
    by_temperature = {
        temperature: {
            name: {kind: asdict(one)[name] for kind, one in kinds.items()}
            for name in Measured.__dataclass_fields__
        }
        for temperature, kinds in found.items()
    }
    others = {f"temperature_{t:g}": values for t, values in by_temperature.items() if t != 1.0}
    return {**by_temperature[1.0], **others}


if __name__ == "__main__":
    main()
