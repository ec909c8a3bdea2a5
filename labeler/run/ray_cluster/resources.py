"""Divides a cluster between teachers and the tasks that feed them, so that all of them fit.

Reading and tokenising are CPU tasks; teachers are actors. An engine that fits on one node is one
actor with all of its GPUs. An engine that needs more GPUs than any node has gets a placement group:
one bundle per GPU, the actor in the first, the engine's Ray workers in all of them.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from labeler.config import LabelConfig
from labeler.run.ray_cluster.openmp_env import openmp_env
from schemas.errors import ConfigError, TeacherError

_WORKER_CPUS = 1.0  # per engine worker, if the engine spans nodes
_ROUNDING = 1e-4  # resolution of Ray's resource amounts


@dataclass(frozen=True)
class Resources:
    """The resources that a job requests from Ray.

    Attributes:
        actor_cpus, actor_gpus: per teacher actor.
        actor_threads: OpenMP threads per teacher actor; 0: Ray's choice.
        task_cpus: CPUs per tokenising task.
        min_replicas, max_replicas: bounds on the number of teacher actors.
        bundles: bundles in a replica's placement group, each a CPU and a GPU; 0: no group.
    """

    actor_cpus: float
    actor_gpus: float
    actor_threads: int
    task_cpus: float
    min_replicas: int = 1
    max_replicas: int = 1
    bundles: int = 0

    def actor_options(self) -> dict[str, Any]:
        """Ray's options for one teacher actor, without its placement."""
        environment = openmp_env(self.actor_threads) if self.actor_threads else {}
        return {
            "num_cpus": self.actor_cpus,
            "num_gpus": self.actor_gpus or None,
            "runtime_env": {"env_vars": environment},
        }

    def bundle(self) -> dict[str, float]:
        """One bundle of a replica's placement group."""
        return {"CPU": max(_WORKER_CPUS, self.actor_cpus), "GPU": 1.0}

    def replica(self) -> dict[str, float]:
        """The total resources of one replica, across its nodes."""
        if self.bundles:
            return {kind: self.bundles * amount for kind, amount in self.bundle().items()}
        return {"CPU": self.actor_cpus, "GPU": self.actor_gpus}


@dataclass(frozen=True)
class _Node:
    cpus: float
    gpus: float


def plan_resources(
    config: LabelConfig, node_cpus: list[float], node_gpus: list[float]
) -> Resources:
    """Divides a cluster between teachers and tokenising tasks.

    Teachers never get all CPUs, or the tasks that feed them would wait forever. Without GPUs,
    teachers request half of each node but may use threads on all of its cores, because tokenising
    is brief. Each teacher and each task must fit on a single node.

    Args:
        config: number of teachers and their needs.
        node_cpus: CPUs of each node.
        node_gpus: GPUs of each node, in the same order; empty: none.

    Raises:
        TeacherError: the nodes cannot fit the minimum number of teachers.
        ConfigError: the teachers would take every CPU.
    """
    node_gpus = node_gpus or [0.0] * len(node_cpus)
    nodes = [_Node(*sizes) for sizes in zip(node_cpus, node_gpus, strict=True)]
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
    """Number of actors, or bundles, of this size that fit on the nodes."""
    return sum(
        int(min(node.cpus / cpus, node.gpus / gpus if gpus else math.inf) + _ROUNDING)
        for node in nodes
    )


def _cpu_share(nodes: list[_Node], wanted: int, gpus: float) -> float:
    """Largest number of CPUs per actor such that all actors fit in half of every node.

    Args:
        nodes: nodes of the cluster.
        wanted: number of actors, lowered if the GPUs do not suffice.
        gpus: GPUs per actor.
    """
    halves = [_Node(node.cpus / 2, node.gpus) for node in nodes if node.cpus]
    if gpus:
        wanted = max(1, min(wanted, sum(int(node.gpus / gpus + _ROUNDING) for node in halves)))
    shares = {node.cpus / count for node in halves for count in range(1, wanted + 1)}
    for share in sorted(shares, reverse=True):
        if _places(halves, share, gpus) >= wanted:
            return share
    return 1.0  # nothing fits; _check_fit reports it


def _check_fit(planned: Resources, nodes: list[_Node]) -> None:
    """Raises if the teachers do not fit on single nodes, even if the cluster total suffices."""
    one = planned.bundle() if planned.bundles else planned.replica()
    wanted = planned.min_replicas * (planned.bundles or 1)
    room = _places(nodes, one["CPU"], one["GPU"])
    if room >= wanted:
        return
    what = "GPU bundles" if planned.bundles else "teachers"
    gpus = f" and {one['GPU']:g} GPUs" if one["GPU"] else ""
    raise TeacherError(
        f"{wanted} {what} of {one['CPU']:g} CPUs{gpus} each are needed at once, but the nodes "
        f"have room for {room}: each must fit one node, and they have {_describe(nodes)}; lower "
        "teacher.replicas, run.cpus_per_replica or run.gpus_per_replica, or add nodes"
    )


def _describe(nodes: list[_Node]) -> str:
    """``3 x 8 CPUs, 1 x 4 CPUs + 2 GPUs``."""
    kinds = Counter(
        f"{node.cpus:g} CPUs" + (f" + {node.gpus:g} GPUs" if node.gpus else "") for node in nodes
    )
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def _threads(nodes: list[_Node], most: int) -> int:
    """OpenMP threads of a CPU teacher, with teachers spread evenly over the nodes."""
    replicas_of_node = -(-most // sum(node.cpus > 0 for node in nodes))
    return max(1, int(max(node.cpus for node in nodes)) // replicas_of_node)


def _task_cpus(planned: Resources, nodes: list[_Node]) -> float:
    """CPUs per tokenising task; one must fit on some node, wherever the teachers are placed."""
    replica_cpus = planned.replica()["CPU"]
    total = sum(node.cpus for node in nodes)
    left = total - replica_cpus * planned.min_replicas
    if left < _ROUNDING:
        raise ConfigError(
            f"{planned.min_replicas} teachers of {replica_cpus:g} CPUs each leave none of "
            f"{total:g} CPUs to read the corpus; lower teacher.replicas or run.cpus_per_replica"
        )
    # At least one node has the average of the remaining CPUs or more.
    return min(1.0, left / sum(node.cpus > 0 for node in nodes))


def _bundles(config: LabelConfig, gpus: float, node_gpus: list[float]) -> int:
    """Bundles in a replica's placement group; 0 if it fits on one node."""
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
