"""Plans a label job: samples the corpus locally, calibrates the teacher where it would run."""

import contextlib
import dataclasses
import time
from typing import Any

import numpy as np

from labeler.config import LabelConfig
from labeler.corpus.piece_reader import KeySnapshot
from labeler.planning.calibration import Calibration, Calibrator
from labeler.planning.corpus_sample import CorpusSample, sample_corpus
from labeler.planning.estimate import LabelPlan, describe, make_plan
from labeler.run.job import label_set_spec, with_absolute_paths
from labeler.run.ray_cluster.resources import Resources
from labeler.run.ray_cluster.startup_notice import StartupNotice
from schemas.console.progress import Progress
from schemas.label_set.description import LABEL_SET_FILE
from schemas.label_set.label_set import LabelSet
from schemas.spec import LabelSetSpec
from schemas.storage.store import Store

SEED = 0
"""Determines which pieces of a corpus are read and which rows are used for calibration."""

_POLL_S = 1.0


def plan_label_job(
    config: LabelConfig, progress: bool = True, price_per_hour: float | None = None
) -> LabelPlan:
    """Estimates a label job; writes nothing to the label set.

    Args:
        config: configuration of the run.
        progress: show progress and the plan on standard error.
        price_per_hour: price of one replica, in any currency.

    Raises:
        ConfigError, CorpusError, TeacherError, VocabularyError, StoreError: as the run would.
    """
    from labeler.run.ray_cluster.ray_session import cluster_size, ray_session
    from labeler.run.ray_cluster.resources import plan_resources

    spec, frozen = _label_set_state(config)
    with Progress("plan", enabled=progress) as shown:
        sample = _sample(
            config, spec, frozen, shown
        )  # before Ray starts, because it may fail and needs no Ray
    with ray_session(config.run), Progress("plan", enabled=progress) as shown:
        cpus, gpus = cluster_size()
        resources = plan_resources(config, cpus, gpus)
        calibration = None
        if sample.requests:
            shown.say("labelling a few units, which are thrown away")
            calibration = _calibrate(config, spec, resources, sample, shown)
    plan = make_plan(config, sample, calibration, resources, (sum(cpus), sum(gpus)), price_per_hour)
    for line in describe(plan):
        shown.say(line)
    return plan


def _label_set_state(config: LabelConfig) -> tuple[LabelSetSpec, KeySnapshot]:
    """Returns spec and keys of the label set; for a new one, the spec that it would get."""
    spec, _ = label_set_spec(config)
    committed = quarantined = np.empty(0, "S16")
    if Store(config.labels).exists(LABEL_SET_FILE):
        label_set = LabelSet.create_or_open(config.labels, spec)
        spec = label_set.spec
        committed, quarantined = label_set.committed_keys(), label_set.quarantined_keys()
    return spec, KeySnapshot(committed, quarantined, config.run.retry_quarantined)


def _sample(
    config: LabelConfig, spec: LabelSetSpec, frozen: KeySnapshot, progress: Progress
) -> CorpusSample:
    from labeler.corpus.listing import list_corpus
    from labeler.run.actors.corpus_tasks import make_reader

    def show(pieces_read: int, pieces: int, tokens: int) -> None:
        what = f"read {pieces_read:,} of {pieces:,} pieces of {config.corpus.path}"
        progress.show(pieces_read, pieces, what, tokens=tokens)

    pieces = list_corpus(config.corpus)
    return sample_corpus(pieces, make_reader(config, spec), frozen, SEED, show)


def _calibrate(
    config: LabelConfig,
    spec: LabelSetSpec,
    resources: Resources,
    sample: CorpusSample,
    progress: Progress,
) -> Calibration:
    import ray

    from labeler.corpus.requests import to_table
    from labeler.run.ray_cluster.ray_session import errors_for_users
    from labeler.run.ray_cluster.replicas import make_replica, placed_replicas

    notice = StartupNotice(resources, 1, progress.say, ray.available_resources)
    with errors_for_users(), placed_replicas(resources) as place:
        calibrator = ray.remote(Calibrator).options(
            max_restarts=0,
            max_concurrency=2,  # the second call is for progress
            **resources.actor_options(),
            **place(),
        )
        actor = calibrator.remote(with_absolute_paths(config), spec, make_replica)
        try:
            return _watch(actor, to_table(sample.requests), notice, progress)
        finally:
            ray.kill(actor)


def _watch(actor: Any, requests: Any, notice: StartupNotice, progress: Progress) -> Calibration:
    """Runs the calibration and shows its progress; ``start_s`` includes the process start."""
    import ray

    started = time.monotonic()
    is_up = actor.__ray_ready__.remote()
    result = actor.run.remote(requests)
    up_s = 0.0
    while not ray.wait([result], timeout=_POLL_S)[0]:
        if not ray.wait([is_up], timeout=0)[0]:
            up_s = time.monotonic() - started
            notice.update(is_up=False)
            continue
        notice.update(is_up=True)
        with contextlib.suppress(ray.exceptions.GetTimeoutError):
            rows, total, tokens = ray.get(actor.progress.remote(), timeout=_POLL_S)
            what = f"labelled {rows:,} of {total:,} rows"
            progress.show(rows, max(total, 1), what, tokens=tokens)
    calibration: Calibration = ray.get(result)
    return dataclasses.replace(calibration, start_s=up_s + calibration.start_s)
