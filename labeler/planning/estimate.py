"""What a label job will take, before it runs: ``tutelage label --plan``.

The corpus is read in part (whole where it is small), the real teacher labels a few units that are
thrown away, and what both show is scaled up. Nothing is written to the label set.
"""

import math

import numpy as np
from pydantic import Field

from labeler.config import LabelConfig
from labeler.planning.calibration import Calibration
from labeler.planning.corpus_sample import CorpusSample, Estimate
from labeler.run.progress import Progress, duration
from labeler.run.resources import Resources
from labeler.units.sizing import rows_gathered
from schemas.config import StrictModel

SEED = 0
"""Which pieces of a corpus are read, and which rows calibrate."""

# Two runs of the same work on the same machine differ by this much, as a standard error.
_LEAST_SPEED_ERROR = 0.1

_TWO_SIDED = 2.0  # standard errors on either side of what is expected


class Range(StrictModel):
    """A number that is expected, and between which it will most likely be."""

    expected: float
    low: float
    high: float


class LabelPlan(StrictModel):
    """What a label job is expected to take."""

    corpus_bytes: int = Field(description="of all files, as they are stored")
    exact_counts: bool = Field(description="the whole corpus was read, so counts are exact")
    sampled_pieces: int = Field(description="of the corpus, read for this plan")
    pieces: int
    rows_read: Range = Field(description="windows of the corpus, or samples asked for")
    rows: Range = Field(description="of these, still to be labelled")
    tokens: Range = Field(description="of the rows to be labelled, responses included")
    labels: Range
    bytes: Range = Field(description="on disk: data, keys and manifests")
    units: int = Field(description="commits, about")
    replicas: int = Field(description="teacher actors that are counted on")
    tokens_per_s: Range = Field(description="of one replica, end to end")
    tokenise_tokens_per_s: float = Field(description="of one CPU")
    start_s: float = Field(description="until a teacher had labelled its first rows")
    hours: Range
    limited_by: str = Field(description="teachers or tokenising")
    cost: Range | None = Field(
        default=None, description="replicas x hours x price; unset: no price"
    )


def make_plan(
    config: LabelConfig,
    sample: CorpusSample,
    calibration: Calibration | None,
    resources: Resources,
    cluster: tuple[float, float],
    price_per_hour: float | None = None,
) -> LabelPlan:
    """The plan that a sample of the corpus and a calibration make.

    Args:
        config: of the run.
        sample: of its corpus; ``pieces`` and ``corpus_bytes`` of the plan are left at 0.
        calibration: None where nothing is left to label.
        resources: what the run will ask Ray for.
        cluster: CPUs and GPUs of the cluster.
        price_per_hour: of one replica, in any currency.
    """
    rows, tokens, labels = (sample.counts[name] for name in ("rows", "tokens", "labels"))
    if config.generate is not None and calibration is not None:
        per_row = 1.0 / max(calibration.rows, 1)
        tokens = _times(rows, calibration.tokens * per_row)
        labels = _times(rows, sum(calibration.unit_labels) * per_row)
    units = max(
        math.ceil(tokens.value / config.run.unit_tokens),
        math.ceil(rows.value / rows_gathered(config)),
    )
    replicas = _replicas(config, resources, cluster[1])
    speed = _speed(calibration)
    start_s = 0.0 if calibration is None else calibration.start_s
    seconds, limited_by = _seconds(tokens, speed, replicas, sample, cluster[0], resources)
    hours = Range(
        expected=(seconds.expected + start_s) / 3600,
        low=(seconds.low + start_s) / 3600,
        high=(seconds.high + start_s) / 3600,
    )
    cost = None
    if price_per_hour is not None:
        cost = _scaled(hours, replicas * price_per_hour)
    return LabelPlan(
        corpus_bytes=0,
        exact_counts=sample.is_whole,
        sampled_pieces=sample.pieces_read,
        pieces=0,
        rows_read=_range(sample.counts["rows_read"]),
        rows=_range(rows),
        tokens=_range(tokens),
        labels=_range(labels),
        bytes=_bytes(labels, units, calibration),
        units=units,
        replicas=replicas,
        tokens_per_s=speed,
        tokenise_tokens_per_s=sample.tokens_per_s,
        start_s=start_s,
        hours=hours,
        limited_by=limited_by,
        cost=cost,
    )


def _replicas(config: LabelConfig, resources: Resources, gpus: float) -> int:
    """As many replicas as the cluster has room for now, at most."""
    if config.teacher.backend == "remote":
        return 1  # all of them would ask one server
    each = resources.bundles or resources.actor_gpus
    room = int(gpus // each) if each else resources.max_replicas
    return max(resources.min_replicas, min(resources.max_replicas, room))


def _speed(calibration: Calibration | None) -> Range:
    """Tokens a second of one replica."""
    if calibration is None or not calibration.timed_tokens:
        return Range(expected=0.0, low=0.0, high=0.0)
    expected = calibration.timed_tokens / max(calibration.seconds, 1e-6)
    intervals = np.array(calibration.intervals_s)
    error = _LEAST_SPEED_ERROR
    if len(intervals) > 1:
        error = max(error, float(intervals.std(ddof=1) / intervals.mean() / len(intervals) ** 0.5))
    off = 1 + _TWO_SIDED * error
    return Range(expected=expected, low=expected / off, high=expected * off)


def _seconds(
    tokens: Estimate,
    speed: Range,
    replicas: int,
    sample: CorpusSample,
    cpus: float,
    resources: Resources,
) -> tuple[Range, str]:
    """How long labelling takes once the teachers run, and what limits it."""
    if not tokens.value or not speed.expected:
        return Range(expected=0.0, low=0.0, high=0.0), "teachers"
    spare = max(cpus - replicas * resources.actor_cpus, resources.task_cpus)
    tokenising = tokens.value / max(sample.tokens_per_s * spare, 1e-6)
    wanted = _range(tokens)
    labelling = Range(
        expected=wanted.expected / speed.expected / replicas,
        low=wanted.low / speed.high / replicas,
        high=wanted.high / speed.low / replicas,
    )
    if tokenising <= labelling.expected:
        return labelling, "teachers"
    return Range(expected=tokenising, low=labelling.low, high=2 * tokenising), "tokenising"


def _bytes(labels: Estimate, units: int, calibration: Calibration | None) -> Range:
    """Bytes of units: a part for each unit and a part for each label, by least squares."""
    if calibration is None or not sum(calibration.unit_labels):
        return Range(expected=0.0, low=0.0, high=0.0)
    found = np.array(calibration.unit_labels, np.float64)
    sizes = np.array(calibration.unit_bytes, np.float64)
    each, rate = 0.0, float(sizes.sum() / found.sum())
    if len(found) > 1 and float(found.std()) > 0.05 * float(found.mean()):
        slope, constant = np.polyfit(found, sizes, 1)
        if slope > 0 and constant > 0:
            each, rate = float(constant), float(slope)
    expected = each * units + rate * labels.value
    off = _TWO_SIDED * labels.error * rate + 0.05 * expected
    return Range(expected=expected, low=max(expected - off, 0.0), high=expected + off)


def _times(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(estimate.value * factor, estimate.error * factor)


def _range(estimate: Estimate) -> Range:
    off = _TWO_SIDED * estimate.error
    low = max(estimate.value - off, 0.0)
    return Range(expected=estimate.value, low=low, high=estimate.value + off)


def _scaled(known: Range, factor: float) -> Range:
    return Range(expected=known.expected * factor, low=known.low * factor, high=known.high * factor)


def describe(plan: LabelPlan) -> list[str]:
    """The plan in lines for people."""
    how = (
        "the whole corpus was read"
        if plan.exact_counts
        else f"from {plan.sampled_pieces} of {plan.pieces:,} pieces; rows that occur in several "
        "of the others count each time"
    )
    lines = [
        f"rows       {_shown(plan.rows)} of {_shown(plan.rows_read)} still to be labelled ({how})",
        f"tokens     {_shown(plan.tokens)}, {_shown(plan.labels)} labels",
        f"disk       {_shown(_scaled(plan.bytes, 1e-6), 1)} MB in about {plan.units:,} units",
        f"speed      {_shown(plan.tokens_per_s)} tokens/s a replica, end to end; one CPU tokenises "
        f"{plan.tokenise_tokens_per_s:,.0f}",
        f"time       {duration(3600 * plan.hours.expected)} with {plan.replicas} replicas "
        f"({duration(3600 * plan.hours.low)} to {duration(3600 * plan.hours.high)}; "
        f"{duration(plan.start_s)} of it to start), limited by {plan.limited_by}",
    ]
    if plan.cost is not None:
        lines.append(f"cost       {_shown(plan.cost, 2)}")
    return lines


def _shown(known: Range, digits: int = 0) -> str:
    text = f"{known.expected:,.{digits}f}"
    if known.low == known.high:
        return text
    return f"{text} ({known.low:,.{digits}f} to {known.high:,.{digits}f})"


def say(plan: LabelPlan, shown: Progress) -> None:
    """Shows a plan."""
    for line in describe(plan):
        shown.say(line)
