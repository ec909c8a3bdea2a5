"""Resources that cannot block each other, for every shape of cluster and replica."""

from typing import Any

import pydantic
import pytest

from labeler.config import LabelConfig
from labeler.run.ray_cluster.resources import plan_resources
from schemas.errors import ConfigError, TeacherError


def config(teacher: dict[str, Any] | None = None, run: dict[str, Any] | None = None) -> LabelConfig:
    return LabelConfig.model_validate(
        {
            "labels": "labels",
            "corpus": {"path": "corpus"},
            "teacher": {"backend": "vllm", "model": "model", **(teacher or {})},
            "run": run or {},
        }
    )


@pytest.mark.parametrize("cpus", [1.0, 2.0, 3.0, 16.0])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("gpus", [0.0, 2.0])
def test_placement_leaves_room_for_a_task(cpus: float, replicas: int, gpus: float) -> None:
    plan = plan_resources(config({"replicas": replicas}), [cpus], [gpus] if gpus else [])
    assert plan.actor_cpus * replicas + plan.task_cpus <= cpus
    assert plan.task_cpus > 0
    assert plan.actor_gpus == (1.0 if gpus else 0.0)


def test_cpu_teacher_gets_the_threads_of_its_node() -> None:
    assert plan_resources(config(), [16.0], []).actor_threads == 16
    assert plan_resources(config({"replicas": 2}), [16.0], []).actor_threads == 8
    assert plan_resources(config({"replicas": 2}), [16.0, 16.0], []).actor_threads == 16
    assert plan_resources(config({"replicas": 2}), [16.0], [2.0]).actor_threads == 0
    assert plan_resources(config(run={"threads_per_replica": 3}), [16.0], []).actor_threads == 3


def test_impossible_demands_are_refused() -> None:
    with pytest.raises(TeacherError, match=r"need 4, but the cluster has 2"):
        plan_resources(config({"replicas": 4}), [16.0], [2.0])
    with pytest.raises(ConfigError, match=r"leave none of 2 CPUs to read the corpus"):
        plan_resources(config(run={"cpus_per_replica": 2}), [2.0], [])


def test_engine_that_fits_a_node_is_one_actor() -> None:
    teacher = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2, "replicas": 2}
    plan = plan_resources(config(teacher), [32.0, 32.0], [8.0, 8.0])
    assert (plan.actor_gpus, plan.bundles) == (8.0, 0)
    assert (plan.min_replicas, plan.max_replicas) == (2, 2)


def test_engine_larger_than_a_node_has_a_placement_group() -> None:
    teacher = {"tensor_parallel_size": 8, "pipeline_parallel_size": 2}
    plan = plan_resources(config(teacher), [32.0, 32.0], [8.0, 8.0])
    assert (plan.actor_gpus, plan.bundles) == (0.0, 16)
    assert plan.bundle() == {"CPU": 1.0, "GPU": 1.0}
    assert plan.task_cpus > 0
    with pytest.raises(TeacherError, match=r"fits no node, the largest has 8"):
        plan_resources(config(run={"gpus_per_replica": 12}), [32.0, 32.0], [8.0, 8.0])
    with pytest.raises(ConfigError, match="leave none of 16"):
        plan_resources(config(teacher), [8.0, 8.0], [8.0, 8.0])


def test_range_of_replicas_needs_room_for_the_fewest() -> None:
    plan = plan_resources(config({"replicas": {"min": 1, "max": 8}}), [16.0], [4.0])
    assert (plan.min_replicas, plan.max_replicas) == (1, 8)
    with pytest.raises(TeacherError, match=r"need 5, but the cluster has 4"):
        plan_resources(config({"replicas": {"min": 5, "max": 8}}), [16.0], [4.0])
    on_cpus = plan_resources(config({"replicas": {"min": 1, "max": 4}}), [16.0], [])
    assert on_cpus.actor_cpus * 4 + on_cpus.task_cpus <= 16
    assert on_cpus.actor_threads == 4
    with pytest.raises(pydantic.ValidationError, match=r"min is 3, which is more than max, 2"):
        config({"replicas": {"min": 3, "max": 2}})
    with pytest.raises(pydantic.ValidationError, match=r"greater than or equal to 1"):
        config({"replicas": 0})


def test_remote_teacher_needs_no_gpu_of_the_cluster() -> None:
    remote = {"backend": "remote", "url": "http://h:1", "dtype": "bfloat16"}
    content = config().model_dump() | {"record": {"kind": "topk", "entropy": False}}
    content["teacher"] |= remote
    plan = plan_resources(LabelConfig.model_validate(content), [16.0], [8.0])
    assert (plan.actor_gpus, plan.actor_threads, plan.actor_cpus) == (0.0, 0, 1.0)


@pytest.mark.parametrize("nodes", [[8.0] * 4, [16.0, 2.0, 2.0], [2.0] * 9, [4.0, *[1.0] * 12]])
@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
def test_cpu_teacher_requests_what_nodes_have(nodes: list[float], replicas: int) -> None:
    plan = plan_resources(config({"replicas": replicas}), nodes, [])
    fitting = sum(int(cpus / plan.actor_cpus + 1e-4) for cpus in nodes)
    assert plan.actor_cpus <= max(nodes) / 2
    assert fitting >= replicas
    left = sum(nodes) - replicas * plan.actor_cpus
    assert 0 < plan.task_cpus <= left / len(nodes)  # so that some node has it, whichever it is


def test_placement_keeps_half_of_a_node_for_tasks() -> None:
    assert plan_resources(config(), [16.0], []).actor_cpus == 8.0
    assert plan_resources(config(), [8.0] * 4, []).actor_cpus == 4.0
    assert plan_resources(config({"replicas": 4}), [8.0] * 4, []).actor_cpus == 4.0
    assert plan_resources(config({"replicas": 8}), [8.0] * 4, []).actor_cpus == 2.0


def test_placement_refuses_what_fits_no_single_node() -> None:
    with pytest.raises(
        TeacherError,
        match=r"^1 teachers of 12 CPUs each .* room for 0: each must fit one node, and they have "
        r"2 x 8 CPUs; lower teacher.replicas, run.cpus_per_replica",
    ):
        plan_resources(config(run={"cpus_per_replica": 12}), [8.0, 8.0], [])
    three = {"gpus_per_replica": 3}
    with pytest.raises(TeacherError, match=r"1 CPUs and 3 GPUs .* have room for 1: .*4 GPUs, 1 x"):
        plan_resources(config({"replicas": 2}, three), [16.0, 16.0], [4.0, 2.0])
    plan = plan_resources(config({"replicas": {"min": 1, "max": 2}}, three), [16.0] * 2, [4.0, 2.0])
    assert plan.actor_gpus == 3.0


def test_teacher_gets_its_cpus_where_its_gpus_are() -> None:
    nodes = ([64.0, 4.0], [0.0, 8.0])
    assert plan_resources(config({"replicas": 8}), *nodes).actor_cpus == 0.25
    with pytest.raises(TeacherError, match=r"room for 4"):
        plan_resources(config({"replicas": 8}, {"cpus_per_replica": 1}), *nodes)


def test_bundles_fit_node_by_node() -> None:
    teacher = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}
    assert plan_resources(config(teacher), [8.0, 8.0], [4.0, 4.0]).bundles == 8
    with pytest.raises(TeacherError, match=r"^8 GPU bundles of 1 CPUs and 1 GPUs .* room for 6"):
        plan_resources(config(teacher), [32.0, 2.0], [4.0, 4.0])
