"""Making a plan: the corpus is sampled here, the teacher calibrates where a replica would run."""

from collections.abc import Callable
from typing import Any

import numpy as np

from labeler.config import LabelConfig
from labeler.corpus.requests import Request
from labeler.planning.calibration import Calibration, Calibrator
from labeler.planning.estimate import SEED, LabelPlan, make_plan, say
from labeler.run.job import everywhere, wanted_label_set
from labeler.run.openmp_env import cpu_environment
from labeler.run.progress import Progress
from labeler.run.resources import Resources
from labeler.run.startup_notice import TeacherWait
from schemas.label_set.description import LABEL_SET_FILE
from schemas.label_set.label_set import LabelSet
from schemas.spec import LabelSetSpec
from schemas.storage.store import Store

_POLL_S = 1.0


def plan_label_job(
    config: LabelConfig, progress: bool = True, price_per_hour: float | None = None
) -> LabelPlan:
    """Says what a label job would take; changes nothing in the label set.

    Args:
        config: the run.
        progress: say on the standard error stream what is found.
        price_per_hour: of one replica, in any currency.

    Raises:
        ConfigError, CorpusError, TeacherError, VocabularyError, StoreError: as the run would.
    """
    from labeler.corpus.documents import RowTokenizer
    from labeler.corpus.listing import list_corpus
    from labeler.corpus.piece_reader import KeySnapshot, PieceReader
    from labeler.planning.corpus_sample import sample_corpus
    from labeler.run.ray_session import cluster_size, ray_session
    from labeler.run.resources import plan_resources
    from labeler.teacher_model.identity import load_tokenizer

    shown = Progress(enabled=progress)
    pieces = list_corpus(config.corpus)
    spec, _ = wanted_label_set(config)
    spec, committed, quarantined = _there(config, spec)
    rows = RowTokenizer(
        load_tokenizer(config.teacher),
        config.corpus,
        spec.text,
        spec.teacher.vocab_size,
        prompts=config.generate is not None,
    )
    reader = PieceReader(config.corpus, spec.text, config.generate, rows)
    frozen = KeySnapshot(committed, quarantined, config.run.retry_quarantined)
    shown.say(f"reading {config.corpus.path} to count its tokens")
    sample = sample_corpus(pieces, reader, frozen, SEED)
    with ray_session(config.run):
        cpus, gpus = cluster_size()
        resources = plan_resources(config, cpus, gpus)
        calibration = None
        if sample.requests:
            shown.say("labelling a few units, which are thrown away")
            calibration = _calibrated(config, spec, resources, sample.requests, shown.say)
    cluster = (sum(cpus), sum(gpus))
    plan = make_plan(config, sample, calibration, resources, cluster, price_per_hour)
    sizes = {"corpus_bytes": sum(piece.size_bytes for piece in pieces), "pieces": len(pieces)}
    plan = plan.model_copy(update=sizes)
    say(plan, shown)
    return plan


def _there(config: LabelConfig, spec: LabelSetSpec) -> tuple[LabelSetSpec, Any, Any]:
    """Spec and keys of the label set, where there is one; else the spec that it would have."""
    if not Store(config.labels).exists(LABEL_SET_FILE):
        return spec, np.empty(0, "S16"), np.empty(0, "S16")
    label_set = LabelSet.create_or_open(config.labels, spec)
    return label_set.spec, label_set.committed_keys(), label_set.quarantined_keys()


def _calibrated(
    config: LabelConfig,
    spec: LabelSetSpec,
    resources: Resources,
    requests: list[Request],
    say_line: Callable[[str], None],
) -> Calibration:
    import ray

    from labeler.corpus.requests import to_table
    from labeler.run.ray_session import user_error
    from labeler.run.replicas import Replicas, make_replica

    environment = cpu_environment(resources.actor_threads)
    with Replicas(resources) as replicas:
        options: dict[str, Any] = {
            "num_cpus": resources.actor_cpus,
            "num_gpus": resources.actor_gpus or None,
            "max_restarts": 0,
            "runtime_env": {"env_vars": environment if resources.actor_threads else {}},
        }
        options |= replicas.remote_args()
        actor = (
            ray.remote(Calibrator).options(**options).remote(everywhere(config), spec, make_replica)
        )
        wait = TeacherWait(resources, 1, say_line, ray.available_resources)
        try:
            _wait_until_up(actor, wait)
            calibration: Calibration = ray.get(actor.run.remote(to_table(requests)))
        except Exception as error:  # everything that the teacher raised comes out here
            known = user_error(error)
            if known is None:
                raise
            raise known from None
        finally:
            ray.kill(actor)
    return calibration


def _wait_until_up(actor: Any, wait: TeacherWait) -> None:
    """Or until it cannot be any more, which the next call to it says."""
    import ray

    is_up = actor.__ray_ready__.remote()
    while not wait.is_over:
        wait.look(bool(ray.wait([is_up], timeout=_POLL_S)[0]))
