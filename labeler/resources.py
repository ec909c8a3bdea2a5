"""What a label job asks of a cluster, so that teachers and the tasks that feed them all fit.

Reading and tokenising are CPU tasks; teachers are actors. An engine that shares the GPUs of one
node is one actor with all of them. An engine that needs more GPUs than a node has gets a placement
group: one bundle for each GPU, the actor in the first, the engine's own Ray workers in all.
"""

from dataclasses import dataclass

from labeler.config import LabelConfig
from schemas.errors import ConfigError, TeacherError

_WORKER_CPUS = 1.0  # of each of an engine's own workers, where they are spread over nodes


@dataclass(frozen=True)
class Resources:
    """What Ray is asked for.

    Attributes:
        actor_cpus, actor_gpus: Of one teacher actor.
        actor_threads: OMP threads of a teacher actor; 0 leaves them to Ray.
        task_cpus: Of one tokenising task.
        min_replicas, max_replicas: Teacher actors.
        bundles: Of the placement group of one replica, a CPU and a GPU each; 0: it needs none.
    """

    actor_cpus: float
    actor_gpus: float
    actor_threads: int
    task_cpus: float
    min_replicas: int = 1
    max_replicas: int = 1
    bundles: int = 0

    def bundle(self) -> dict[str, float]:
        """One bundle of a replica's placement group."""
        return {"CPU": max(_WORKER_CPUS, self.actor_cpus), "GPU": 1.0}

    def replica(self) -> dict[str, float]:
        """All that one replica takes, on however many nodes."""
        if self.bundles:
            return {kind: self.bundles * amount for kind, amount in self.bundle().items()}
        return {"CPU": self.actor_cpus, "GPU": self.actor_gpus}


def plan_resources(
    config: LabelConfig, node_cpus: list[float], node_gpus: list[float]
) -> Resources:
    """Divides a cluster between teachers and tokenising tasks.

    Teachers never get all CPUs: the tasks that feed them would wait for ever. On machines without a
    GPU a teacher counts as half of the CPUs but may use the threads of all of them, since
    tokenising is brief.

    Args:
        config: Says how many teachers there are and what each needs.
        node_cpus: CPUs of each node that has any.
        node_gpus: GPUs of each node that has any.

    Raises:
        TeacherError: The cluster has fewer GPUs than the fewest teachers need.
        ConfigError: The teachers would take every CPU.
    """
    run, teacher = config.run, config.teacher
    least, most = teacher.replica_range
    runs_here = teacher.backend not in ("none", "remote")
    gpus = run.gpus_per_replica
    if gpus is None:
        gpus = float(teacher.gpus_of_replica if node_gpus and runs_here else 0)
    if gpus * least > sum(node_gpus):
        raise TeacherError(
            f"{least} teachers of {gpus:g} GPUs each need {gpus * least:g}, but the cluster "
            f"has {sum(node_gpus):g}; lower teacher.replicas or run.gpus_per_replica"
        )
    bundles = _bundles(config, gpus, node_gpus)
    actor_cpus = _actor_cpus(config, node_cpus, bool(gpus) or not runs_here)
    left = sum(node_cpus) - max(actor_cpus, bundles * _WORKER_CPUS) * least
    if left <= 0:
        raise ConfigError(
            f"{least} teachers of {actor_cpus:g} CPUs each leave none of {sum(node_cpus):g} to "
            "read the corpus; lower teacher.replicas or run.cpus_per_replica"
        )
    threads = run.threads_per_replica or 0
    if not threads and not gpus and runs_here:
        replicas_of_node = -(-most // len(node_cpus))
        threads = max(1, int(max(node_cpus)) // replicas_of_node)
    return Resources(
        actor_cpus=actor_cpus,
        actor_gpus=0.0 if bundles else gpus,
        actor_threads=threads,
        task_cpus=min(1.0, left),
        min_replicas=least,
        max_replicas=most,
        bundles=bundles,
    )


def _actor_cpus(config: LabelConfig, node_cpus: list[float], at_most_one: bool) -> float:
    if config.run.cpus_per_replica is not None:
        return config.run.cpus_per_replica
    share = sum(node_cpus) / 2 / config.teacher.replica_range[1]
    return min(1.0, share) if at_most_one else share


def _bundles(config: LabelConfig, gpus: float, node_gpus: list[float]) -> int:
    """Bundles of one replica's placement group; 0 where it fits a node."""
    teacher = config.teacher
    if not gpus or gpus <= max(node_gpus):
        return 0
    if teacher.backend != "vllm" or gpus != teacher.gpus_of_replica:
        raise TeacherError(
            f"a teacher of {gpus:g} GPUs fits no node, the largest has {max(node_gpus):g}; only "
            "vllm spreads an engine over nodes, by teacher.tensor_parallel_size and "
            f"teacher.pipeline_parallel_size (now {teacher.gpus_of_replica} GPUs together)"
        )
    return teacher.gpus_of_replica
