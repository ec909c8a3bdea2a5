"""Bias and variance of the gradient that each kind of record gives, at equal ids per label.

``python -m benchmarks.estimators --json out.json``

Positions are the demo teacher's own, on text it has not read; the student is a fixed distribution
apart from it. A position is labelled again and again with other draws (``record.draw_seed``), by
the labeller's own arithmetic; labels are rounded as they are stored and become the gradient of the
student's logits by the trainer's own targets, at the student's logits over the whole vocabulary.
What is compared with is q - p, the gradient of the KL to the full distribution.

- bias: the distance of the mean gradient from q - p. Labels with draws are random, so the distance
  of a mean over R labels has an expectation of variance / R that more labels would remove: it is
  subtracted, and reported beside it.
- variance: the mean squared distance of one label's gradient from the mean gradient; once of the
  gradient of the logits, once of that of the hidden state, g W with W [V, H] an output head (the
  demo teacher's), which is what the body of the student gets. There, errors of ids that have much
  the same row of W cancel, and draws at equal distances along the ids, which take them evenly from
  the whole of a tail, have more of that.

Norms are averaged in the square over positions, relative to that of q - p, or of (q - p) W.

Of all Horvitz-Thompson estimates that keep so many ids a label, ``threshold`` has the least
variance of the logits' gradient: inclusion probabilities min(1, p / tau) make the sum over ids and
positions of p^2 (1 / pi - 1) least. How far that is below independent draws is the teacher's
doing: much where a few ids have most of the mass, nothing where it is nearly flat, as a small
teacher is at temperature 2.
"""

import argparse
import bisect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo_positions import Positions, teacher_positions
from labeler.label_head.position_labels import PositionLabels, label_logits
from schemas.record import round_logprobs
from schemas.record.rounding import FLOAT16_BITS
from schemas.record.uniforms import uniforms
from schemas.spec import RecordSpec
from trainer.config.train import LossConfig
from trainer.losses.objectives import StudentPartition, pull_of
from trainer.losses.targets import SparseTargets

ROW_KEY = bytes(range(16))
IDS_PER_LABEL = 12.0


@dataclass(frozen=True)
class Measured:
    """One kind of record at one temperature.

    Attributes:
        ids_per_label: entries of a position, on average.
        relative_bias: norm of the mean gradient's error over that of the dense gradient, without
            what is left of the variance in a mean of so many labels.
        noise_of_mean: that part, likewise relative.
        variance: of the gradient of the logits, over the squared norm of the dense gradient.
        hidden_variance: the same of the gradient of the hidden state.
        record: what was asked for.
    """

    ids_per_label: float
    relative_bias: float
    noise_of_mean: float
    variance: float
    hidden_variance: float
    record: str


def perturbed_student(teacher_logits: Tensor, seed: int = 0) -> Tensor:
    """Logits of a student that is flatter than the teacher and wrong about every id."""
    noise = torch.randn(teacher_logits.shape, generator=torch.Generator().manual_seed(seed))
    return 0.7 * teacher_logits + noise


def matched_records(
    logits: Tensor, temperature: float, ids_per_label: float = IDS_PER_LABEL
) -> dict[str, RecordSpec]:
    """A record of each kind that keeps as many ids per label, drawn at `temperature`.

    The number of draws is whole, so ``sampled`` comes as near as it can and the others follow it.
    """
    p = torch.softmax(logits.double(), 1)
    drawn_from = torch.softmax(logits.double() / temperature, 1)
    served = {"temperatures": (temperature,)} if temperature != 1.0 else {}

    def distinct(draws: int) -> float:
        return float((1 - (1 - drawn_from) ** draws).sum(1).mean())

    enough = bisect.bisect_left(range(1, 255), ids_per_label, key=distinct) + 1
    draws = min((max(1, enough - 1), enough), key=lambda n: abs(distinct(n) - ids_per_label))
    matched = distinct(draws)
    ordered = drawn_from.sort(1, descending=True).values

    def kept(tau: float) -> float:
        exact = ordered >= tau
        exact[:, 0] = True
        return float((exact.sum(1) + torch.where(exact, 0.0, ordered).sum(1) / tau).mean())

    before = p.sort(1, descending=True).values.cumsum(1)

    def covering(top_p: float) -> float:
        return float(((before < top_p).sum(1) + 1).clamp(max=128).double().mean())

    return {
        "topk": RecordSpec(kind="topk", k=round(matched), **served),
        "topp": RecordSpec(kind="topp", top_p=_root(covering, matched, 0.1, 0.9999), **served),
        "sampled": RecordSpec(kind="sampled", draws=draws, **served),
        "threshold": RecordSpec(kind="threshold", tau=_root(kept, matched, 0.9, 1e-3), **served),
    }


def measure(
    positions: Positions,
    student_logits: Tensor,
    record: RecordSpec,
    temperature: float,
    num_labels: int,
) -> Measured:
    """Labels every position `num_labels` times and compares the gradients with the dense one.

    Args:
        positions: T of them, over V ids.
        student_logits: float32 [T, V].
        record: what labels are.
        temperature: distillation temperature, of teacher and student.
        num_labels: of one position; kinds without draws need one.
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
        record=_named(record),
    )


class _Errors:
    """What the errors of many gradients have in common, and what they do not."""

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
        """Relative to the squared norm of the dense gradient; 0 of a single one."""
        if self._count < 2:
            return 0.0
        spread = self._squares - self._count * self._apart
        return spread / (self._count - 1) / self._scale

    @property
    def bias(self) -> float:
        """Norm of the mean error without what is left of the variance in it, relative."""
        squared = self._apart / self._scale - self.variance / self._count
        return float(max(0.0, squared) ** 0.5)

    @property
    def _apart(self) -> float:
        return float((self._sum / self._count).square().sum())


def labelled(positions: Positions, record: RecordSpec, seed: int) -> SparseTargets:
    """Labels of these positions as the trainer gets them: the labeller's, rounded."""
    record = record.model_copy(update={"draw_seed": seed}) if record.has_draws else record
    numbers = None
    if record.has_draws:
        per_position = record.draws if record.kind == "sampled" else 1
        places = np.arange(len(positions.logits))
        numbers = uniforms(ROW_KEY, places, per_position, record.draw_seed)
    labels = label_logits(positions.logits, positions.target_ids, record, numbers)
    return _as_targets(labels, positions.target_ids, record)


def gradient(log_q: Tensor, targets: SparseTargets, loss: LossConfig) -> Tensor:
    """The target's gradient with respect to the student's logits over T, dense.

    Args:
        log_q: [T, V], log of the student's softmax at the distillation temperature.
    """
    segments = targets.segments()
    flat = segments.rows * log_q.shape[1] + targets.entry_ids
    off = log_q.clone()
    off.view(-1).index_fill_(0, flat, -torch.inf)
    log_tail = torch.logsumexp(off, 1)
    student = StudentPartition(log_q.view(-1).index_select(0, flat), log_tail, segments)
    pull = pull_of(targets, loss, student)
    dense = (off - log_tail[:, None]).exp() * pull.tail_gradient[:, None]
    return dense.view(-1).scatter_(0, flat, pull.entry_gradient).view_as(dense)


def _as_targets(labels: PositionLabels, target_ids: Tensor, record: RecordSpec) -> SparseTargets:
    lengths = (labels.head_len + labels.tail_len).long()
    slots = torch.arange(labels.entry_ids.shape[1])
    used = slots < lengths[:, None]
    draws = None
    if record.has_draws:
        counts = labels.entry_counts
        once = torch.ones_like(labels.entry_ids, dtype=torch.uint8)
        drawn = slots >= labels.head_len[:, None]
        draws = torch.where(drawn, once if counts is None else counts, 0)[used]
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return SparseTargets(
        positions=torch.arange(len(target_ids)),
        token_ids=target_ids,
        weights=torch.ones(len(target_ids)),
        entry_ids=labels.entry_ids[used],
        entry_logprobs=_stored(labels.entry_logprobs[used], record.logprob_bits),
        entry_bounds=bounds,
        entry_offsets=bounds,
        entry_draws=draws,
        tail_logmass=_stored(labels.tail_logmass, record.logprob_bits),
        lse=None if labels.lse is None else _stored(labels.lse, FLOAT16_BITS),
        record=record,
        num_ids=1 + int(labels.entry_ids.max()),
    )


def _stored(values: Tensor, bits: int) -> Tensor:
    return torch.from_numpy(round_logprobs(values.numpy(), bits))


def _root(function: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a function that rises from `low` to `high` comes to `wanted`, by bisection."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < wanted else (low, middle)
    return (low + high) / 2


def _named(record: RecordSpec) -> str:
    own = {"topk": "k", "topp": "top_p", "sampled": "draws", "threshold": "tau"}[record.kind]
    return f"{own} = {getattr(record, own):.4g}"


def table(found: dict[float, dict[str, Measured]]) -> str:
    """What was measured, one line for a kind and temperature."""
    lines = [
        "| T | record | | ids / label | relative bias | noise of mean | variance | of hidden |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {temperature:g} | {kind} | {one.record} | {one.ids_per_label:.2f} "
        f"| {one.relative_bias:.4f} | {one.noise_of_mean:.4f} | {one.variance:.4f} "
        f"| {one.hidden_variance:.4f} |"
        for temperature, kinds in found.items()
        for kind, one in kinds.items()
    ]
    return "\n".join(lines)


def run(
    num_positions: int, num_labels: int, temperatures: tuple[float, ...] = (1.0, 2.0), seed: int = 0
) -> dict[float, dict[str, Measured]]:
    """All kinds at all temperatures, at equal ids per label."""
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
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--labels", type=int, default=300, help="of each position")
    parser.add_argument("--seed", type=int, default=0, help="of positions and student")
    args = parser.parse_args()
    found = run(args.positions, args.labels, seed=args.seed)
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(as_json(found, vars(args)), indent=1))


def as_json(
    found: dict[float, dict[str, Measured]], settings: dict[str, object]
) -> dict[str, object]:
    """By field, then by kind; temperature 1 at the top, the others under their name."""
    by_temperature = {
        temperature: {
            name: {kind: asdict(one)[name] for kind, one in kinds.items()}
            for name in Measured.__dataclass_fields__
        }
        for temperature, kinds in found.items()
    }
    others = {f"temperature_{t:g}": values for t, values in by_temperature.items() if t != 1.0}
    kept = {name: settings[name] for name in ("positions", "labels", "seed")}
    return {**by_temperature[1.0], **others, "settings": kept}


if __name__ == "__main__":
    main()
