"""What a label job asks of a cluster, so that teachers and the tasks that feed them all fit.

Reading and tokenising are CPU tasks; teachers are actors. An engine that shares the GPUs of one
node is one actor with all of them. An engine that needs more GPUs than a node has gets a placement
group: one bundle for each GPU, the actor in the first, the engine's own Ray workers in all.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

from labeler.config import LabelConfig
from schemas.errors import ConfigError, TeacherError

_WORKER_CPUS = 1.0  # of each of an engine's own workers, where they are spread over nodes
_ROUNDING = 1e-4  # in which Ray counts


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


@dataclass(frozen=True)
class _Node:
    """What one node of the cluster has."""

    cpus: float
    gpus: float


def plan_resources(
    config: LabelConfig, node_cpus: list[float], node_gpus: list[float]
) -> Resources:
    """Divides a cluster between teachers and tokenising tasks.

    Teachers never get all CPUs: the tasks that feed them would wait for ever. On machines without a
    GPU teachers count as half of each node but may use the threads of all of it, since
    tokenising is brief. A teacher is on one node, and so is a task, so it is not enough that the
    cluster has what they ask for: a node has to have it.

    Args:
        config: Says how many teachers there are and what each needs.
        node_cpus: CPUs of each node.
        node_gpus: GPUs of each node, in the same order; empty: no node has any.

    Raises:
        TeacherError: The nodes have no room for the fewest teachers.
        ConfigError: The teachers would take every CPU.
    """
    node_gpus = node_gpus or [0.0] * len(node_cpus)
    nodes = [_Node(*has) for has in zip(node_cpus, node_gpus, strict=True)]
    least, most = config.teacher.replica_range
    gpus = _gpus(config, node_gpus)
    bundles = _bundles(config, gpus, node_gpus)
    actor_cpus = _actor_cpus(config, nodes, gpus, bundles)
    planned = Resources(
        actor_cpus=actor_cpus,
        actor_gpus=0.0 if bundles else gpus,
        actor_threads=config.run.threads_per_replica or 0,
        task_cpus=0.0,
        min_replicas=least,
        max_replicas=most,
        bundles=bundles,
    )
    _check_fit(planned, nodes)
    if not planned.actor_threads and not gpus and _runs_here(config):
        planned = replace(planned, actor_threads=_threads(nodes, most))
    return replace(planned, task_cpus=_task_cpus(planned, nodes))


def _runs_here(config: LabelConfig) -> bool:
    return config.teacher.backend not in ("none", "remote")


def _gpus(config: LabelConfig, node_gpus: list[float]) -> float:
    """GPUs of one replica."""
    gpus, least = config.run.gpus_per_replica, config.teacher.replica_range[0]
    if gpus is None:
        gpus = float(config.teacher.gpus_of_replica if any(node_gpus) and _runs_here(config) else 0)
    if gpus * least > sum(node_gpus):
        raise TeacherError(
            f"{least} teachers of {gpus:g} GPUs each need {gpus * least:g}, but the cluster "
            f"has {sum(node_gpus):g}; lower teacher.replicas or run.gpus_per_replica"
        )
    return gpus


def _actor_cpus(config: LabelConfig, nodes: list[_Node], gpus: float, bundles: int) -> float:
    if config.run.cpus_per_replica is not None:
        return config.run.cpus_per_replica
    most = config.teacher.replica_range[1]
    share = _cpu_share(nodes, most * (bundles or 1), 1.0 if bundles else gpus)
    return min(1.0, share) if gpus or not _runs_here(config) else share


def _places(nodes: list[_Node], cpus: float, gpus: float) -> int:
    """How many actors, or bundles, that ask for so much the nodes have room for."""
    return sum(
        int(min(node.cpus / cpus, node.gpus / gpus if gpus else math.inf) + _ROUNDING)
        for node in nodes
    )


def _cpu_share(nodes: list[_Node], wanted: int, gpus: float) -> float:
    """The most CPUs that each of so many actors can have of one half of every node's.

    Args:
        nodes: Of the cluster.
        wanted: Actors; where the GPUs are too few, as many as these allow.
        gpus: Of each.
    """
    halves = [_Node(node.cpus / 2, node.gpus) for node in nodes if node.cpus]
    if gpus:
        wanted = max(1, min(wanted, sum(int(node.gpus / gpus + _ROUNDING) for node in halves)))
    shares = {node.cpus / count for node in halves for count in range(1, wanted + 1)}
    for share in sorted(shares, reverse=True):
        if _places(halves, share, gpus) >= wanted:
            return share
    return 1.0  # nothing fits, and what is checked next says so


def _check_fit(planned: Resources, nodes: list[_Node]) -> None:
    """Refuses teachers for which no node has room, though all nodes together have it."""
    of_actor = {"CPU": planned.actor_cpus, "GPU": planned.actor_gpus}
    of_each = planned.bundle() if planned.bundles else of_actor
    wanted = planned.min_replicas * (planned.bundles or 1)
    room = _places(nodes, of_each["CPU"], of_each["GPU"])
    if room >= wanted:
        return
    what = "GPU bundles" if planned.bundles else "teachers"
    gpus = f" and {of_each['GPU']:g} GPUs" if of_each["GPU"] else ""
    raise TeacherError(
        f"{wanted} {what} of {of_each['CPU']:g} CPUs{gpus} each are needed at once, but the nodes "
        f"have room for {room}: each is on one node, and they have {_described(nodes)}; lower "
        "teacher.replicas, run.cpus_per_replica or run.gpus_per_replica, or add nodes"
    )


def _described(nodes: list[_Node]) -> str:
    """``3 x 8 CPUs, 1 x 4 CPUs + 2 GPUs``."""
    kinds = Counter(
        f"{node.cpus:g} CPUs" + (f" + {node.gpus:g} GPUs" if node.gpus else "") for node in nodes
    )
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def _threads(nodes: list[_Node], most: int) -> int:
    """OMP threads of a teacher on CPUs, which shares a node with as many others as it must."""
    replicas_of_node = -(-most // sum(node.cpus > 0 for node in nodes))
    return max(1, int(max(node.cpus for node in nodes)) // replicas_of_node)


def _task_cpus(planned: Resources, nodes: list[_Node]) -> float:
    """CPUs of a tokenising task, which has to find them on one node wherever the teachers are."""
    of_replica = planned.actor_cpus
    if planned.bundles:
        of_replica = planned.bundles * planned.bundle()["CPU"]
    total = sum(node.cpus for node in nodes)
    left = total - of_replica * planned.min_replicas
    if left < _ROUNDING:
        raise ConfigError(
            f"{planned.min_replicas} teachers of {of_replica:g} CPUs each leave none of {total:g} "
            "to read the corpus; lower teacher.replicas or run.cpus_per_replica"
        )
    # Some node has at least the average of what is left.
    return min(1.0, left / sum(node.cpus > 0 for node in nodes))


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
