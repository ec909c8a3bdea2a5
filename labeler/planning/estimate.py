"""Extrapolates a corpus sample and a calibration to the job: ``tutelage label --plan``."""

import math
from collections.abc import Callable

from pydantic import Field

from labeler.config import LabelConfig
from labeler.planning.calibration import Calibration
from labeler.planning.corpus_sample import CorpusSample, Range
from labeler.run.ray_cluster.resources import Resources
from labeler.units.sizing import rows_gathered
from schemas.config import StrictModel
from schemas.console.text import duration_text, size_text

SPEED_FACTOR = 1.5
"""Factor by which a job may be faster or slower than the calibration."""

OVERHEAD_S = 10.0
"""Maximum seconds to start a job's Ray tasks and to close its accounts."""

BYTES_FACTOR = 1.2
"""Factor by which a job's bytes per label may differ from the calibration's."""


class LabelPlan(StrictModel):
    """Estimated tokens, bytes, time and cost of a label job."""

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
    """Makes the plan of a job.

    Args:
        config: configuration of the run.
        sample: sample of its corpus.
        calibration: measurements of the teacher; None if nothing is left to label.
        resources: resources that the run would request from Ray.
        cluster: CPUs and GPUs of the cluster.
        price_per_hour: price of one replica, in any currency.
    """
    counts = dict(sample.counts)
    measured = calibration or Calibration()
    if config.generate is not None and measured.rows:
        counts["tokens"] = _scaled(counts["rows"], measured.tokens / measured.rows)
        counts["labels"] = _scaled(counts["rows"], measured.labels / measured.rows)
    bytes_per_label = measured.size_bytes / max(measured.labels, 1)
    units = max(
        math.ceil(counts["tokens"].expected / config.run.unit_tokens),
        math.ceil(counts["rows"].expected / rows_gathered(config)),
    )
    replicas = _count_replicas(config, resources, cluster[1])
    # Tokenising runs concurrently with the teachers, so only the slower of the two counts.
    spare_cpus = max(cluster[0] - replicas * resources.actor_cpus, resources.task_cpus)
    speeds = {
        "teachers": replicas * measured.tokens_per_s,
        "tokenising": spare_cpus * sample.tokens_per_s,
    }
    limited_by = min(speeds, key=lambda name: speeds[name]) if calibration else "teachers"
    hours = _hours(counts["tokens"], speeds[limited_by], measured.start_s)
    return LabelPlan(
        corpus_bytes=sample.corpus_bytes,
        exact_counts=sample.is_whole,
        sampled_pieces=sample.pieces_read,
        pieces=sample.pieces,
        **counts,
        bytes=_scaled(counts["labels"], bytes_per_label, BYTES_FACTOR),
        units=units,
        replicas=replicas,
        tokens_per_s=measured.tokens_per_s,
        tokenise_tokens_per_s=sample.tokens_per_s,
        start_s=measured.start_s,
        hours=hours,
        limited_by=limited_by,
        cost=None if price_per_hour is None else _scaled(hours, replicas * price_per_hour),
    )


def _hours(tokens: Range, tokens_per_s: float, start_s: float) -> Range:
    working = _scaled(tokens, 1 / tokens_per_s if tokens_per_s else 0.0)
    seconds = Range(
        expected=working.expected + start_s,
        low=(working.low + start_s) / SPEED_FACTOR,
        # Not in the expected value, because it only matters for jobs of a few minutes.
        high=(working.high + start_s) * SPEED_FACTOR + (OVERHEAD_S if working.high else 0.0),
    )
    return _scaled(seconds, 1 / 3600)


def _scaled(known: Range, rate: float, factor: float = 1.0) -> Range:
    """Multiplies a range by a rate that may be off by a factor either way."""
    return Range(
        expected=known.expected * rate,
        low=known.low * rate / factor,
        high=known.high * rate * factor,
    )


def _count_replicas(config: LabelConfig, resources: Resources, gpus: float) -> int:
    """The number of replicas that fit on the cluster now, within the configured bounds."""
    if config.teacher.backend == "remote":
        return 1  # they would share one server
    each = resources.bundles or resources.actor_gpus
    room = int(gpus // each) if each else resources.max_replicas
    return max(resources.min_replicas, min(resources.max_replicas, room))


def describe(plan: LabelPlan) -> list[str]:
    """Renders a plan as lines of text."""
    counted = (
        "the whole corpus was read"
        if plan.exact_counts
        else f"from {plan.sampled_pieces} of {plan.pieces:,} pieces; a row that occurs in several "
        "pieces counts in each"
    )
    time = _text(_scaled(plan.hours, 3600), duration_text)
    lines = [
        f"rows       {_text(plan.rows)} of {_text(plan.rows_read)} still to be labelled "
        f"({counted})",
        f"tokens     {_text(plan.tokens)}, {_text(plan.labels)} labels",
        f"disk       {_text(plan.bytes, size_text)} in about {plan.units:,} units",
        f"speed      {plan.tokens_per_s:,.0f} tokens/s per replica, end to end; one CPU tokenises "
        f"{plan.tokenise_tokens_per_s:,.0f} tokens/s",
        f"time       {time} with {plan.replicas} replicas, {duration_text(plan.start_s)} of it to "
        f"start; limited by {plan.limited_by}",
    ]
    if plan.cost is not None:
        lines.append(f"cost       {_text(plan.cost, '{:,.2f}'.format)}")
    return lines


def _text(known: Range, show: Callable[[float], str] = "{:,.0f}".format) -> str:
    text = show(known.expected)
    return text if known.low == known.high else f"{text} ({show(known.low)} to {show(known.high)})"
