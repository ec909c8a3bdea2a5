"""Scales a sample of the corpus and a calibration up to a whole job: ``tutelage label --plan``."""

import math

from pydantic import Field

from labeler.config import LabelConfig
from labeler.planning.calibration import Calibration
from labeler.planning.corpus_sample import CorpusSample, Range
from labeler.run.resources import Resources
from labeler.units.sizing import rows_gathered
from schemas.config import StrictModel
from schemas.console.text import duration_text, size_text

SPEED_FACTOR = 1.5
"""A job may label this many times faster or slower than the calibration did."""

BYTES_FACTOR = 1.2
"""Labels of a job may take this many times more or fewer bytes than those of the calibration."""

_NOTHING = Range(expected=0.0, low=0.0, high=0.0)


class LabelPlan(StrictModel):
    """What a label job is expected to take."""

    corpus_bytes: int = Field(description="bytes of all corpus files as they are stored")
    exact_counts: bool = Field(description="the whole corpus was read, so that counts are exact")
    sampled_pieces: int = Field(description="pieces of the corpus read for this plan")
    pieces: int = Field(description="pieces of the corpus")
    rows_read: Range = Field(description="windows of the corpus, or requested samples")
    rows: Range = Field(description="rows still to be labelled")
    tokens: Range = Field(description="tokens of the rows to be labelled, responses included")
    labels: Range = Field(description="labels of the rows to be labelled")
    bytes: Range = Field(description="bytes on disk: data, keys and manifests")
    units: int = Field(description="commits, about")
    replicas: int = Field(description="teacher actors that the plan assumes")
    tokens_per_s: float = Field(description="tokens per second of one replica, end to end")
    tokenise_tokens_per_s: float = Field(description="tokens per second that one CPU tokenises")
    start_s: float = Field(description="seconds until a teacher had labelled its first rows")
    hours: Range = Field(description="hours from the start of the teachers to the end")
    limited_by: str = Field(description="teachers or tokenising")
    cost: Range | None = Field(
        default=None, description="replicas x hours x price; null where no price is given"
    )


def make_plan(
    config: LabelConfig,
    sample: CorpusSample,
    calibration: Calibration | None,
    resources: Resources,
    cluster: tuple[float, float],
    price_per_hour: float | None = None,
) -> LabelPlan:
    """The plan of a job.

    Args:
        config: of the run.
        sample: of its corpus.
        calibration: None where nothing is left to label.
        resources: that the run would request from Ray.
        cluster: CPUs and GPUs of the cluster.
        price_per_hour: of one replica, in any currency.
    """
    rows, tokens, labels = (sample.counts[name] for name in ("rows", "tokens", "labels"))
    size = _NOTHING
    if calibration is not None and calibration.rows:
        if config.generate is not None:
            tokens = _scaled(rows, calibration.tokens / calibration.rows)
            labels = _scaled(rows, calibration.labels / calibration.rows)
        size = _scaled(labels, calibration.size_bytes / max(calibration.labels, 1), BYTES_FACTOR)
    units = max(
        math.ceil(tokens.expected / config.run.unit_tokens),
        math.ceil(rows.expected / rows_gathered(config)),
    )
    replicas = _count_replicas(config, resources, cluster[1])
    hours, limited_by = _hours(tokens, calibration, replicas, sample, cluster[0], resources)
    price = None if price_per_hour is None else replicas * price_per_hour
    return LabelPlan(
        corpus_bytes=sample.corpus_bytes,
        exact_counts=sample.is_whole,
        sampled_pieces=sample.pieces_read,
        pieces=sample.pieces,
        rows_read=sample.counts["rows_read"],
        rows=rows,
        tokens=tokens,
        labels=labels,
        bytes=size,
        units=units,
        replicas=replicas,
        tokens_per_s=0.0 if calibration is None else calibration.tokens_per_s,
        tokenise_tokens_per_s=sample.tokens_per_s,
        start_s=0.0 if calibration is None else calibration.start_s,
        hours=hours,
        limited_by=limited_by,
        cost=None if price is None else _scaled(hours, price),
    )


def _scaled(known: Range, rate: float, factor: float = 1.0) -> Range:
    """A range times a rate that may be off by a factor either way."""
    return Range(
        expected=known.expected * rate,
        low=known.low * rate / factor,
        high=known.high * rate * factor,
    )


def _count_replicas(config: LabelConfig, resources: Resources, gpus: float) -> int:
    """As many replicas as the cluster has room for now, at most."""
    if config.teacher.backend == "remote":
        return 1  # they would share one server
    each = resources.bundles or resources.actor_gpus
    room = int(gpus // each) if each else resources.max_replicas
    return max(resources.min_replicas, min(resources.max_replicas, room))


def _hours(
    tokens: Range,
    calibration: Calibration | None,
    replicas: int,
    sample: CorpusSample,
    cpus: float,
    resources: Resources,
) -> tuple[Range, str]:
    """Hours of the job, and what limits it."""
    if calibration is None or not calibration.tokens_per_s:
        return _NOTHING, "teachers"
    spare_cpus = max(cpus - replicas * resources.actor_cpus, resources.task_cpus)
    speeds = {
        "teachers": replicas * calibration.tokens_per_s,
        "tokenising": max(spare_cpus * sample.tokens_per_s, 1e-6),
    }
    limited_by = min(speeds, key=lambda name: speeds[name])
    working = _scaled(tokens, 1 / speeds[limited_by])
    seconds = Range(
        expected=working.expected + calibration.start_s,
        low=working.low + calibration.start_s,
        high=working.high + calibration.start_s,
    )
    return _scaled(seconds, 1 / 3600, SPEED_FACTOR), limited_by


def describe(plan: LabelPlan) -> list[str]:
    """The lines that show a plan."""
    counted = (
        "the whole corpus was read"
        if plan.exact_counts
        else f"from {plan.sampled_pieces} of {plan.pieces:,} pieces; a row that occurs in several "
        "pieces counts in each"
    )
    hours = plan.hours
    expected, low, high = (
        duration_text(3600 * each) for each in (hours.expected, hours.low, hours.high)
    )
    size, least, most = (
        size_text(each) for each in (plan.bytes.expected, plan.bytes.low, plan.bytes.high)
    )
    lines = [
        f"rows       {_text(plan.rows)} of {_text(plan.rows_read)} still to be labelled "
        f"({counted})",
        f"tokens     {_text(plan.tokens)}, {_text(plan.labels)} labels",
        f"disk       {size} ({least} to {most}) in about {plan.units:,} units",
        f"speed      {plan.tokens_per_s:,.0f} tokens/s per replica, end to end; one CPU tokenises "
        f"{plan.tokenise_tokens_per_s:,.0f} tokens/s",
        f"time       {expected} with {plan.replicas} replicas ({low} to {high}; "
        f"{duration_text(plan.start_s)} of it to start), limited by {plan.limited_by}",
    ]
    if plan.cost is not None:
        lines.append(f"cost       {_text(plan.cost, 2)}")
    return lines


def _text(known: Range, digits: int = 0) -> str:
    text = f"{known.expected:,.{digits}f}"
    if known.low == known.high:
        return text
    return f"{text} ({known.low:,.{digits}f} to {known.high:,.{digits}f})"
