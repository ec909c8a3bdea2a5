"""Resources that cannot block each other, and errors that reach the user as one line."""

from typing import Any

import pytest
import ray.exceptions

from labeler.cluster_session import plan_resources, user_error
from labeler.config import LabelConfig
from schemas.errors import ConfigError, CorpusError, TeacherError


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
def test_there_is_always_room_for_a_task(cpus: float, replicas: int, gpus: float) -> None:
    plan = plan_resources(config({"replicas": replicas}), [cpus], gpus)
    assert plan.actor_cpus * replicas + plan.task_cpus <= cpus
    assert plan.task_cpus > 0
    assert plan.actor_gpus == (1.0 if gpus else 0.0)


def test_a_cpu_teacher_has_the_threads_of_its_node() -> None:
    assert plan_resources(config(), [16.0], 0.0).actor_threads == 16
    assert plan_resources(config({"replicas": 2}), [16.0], 0.0).actor_threads == 8
    assert plan_resources(config({"replicas": 2}), [16.0, 16.0], 0.0).actor_threads == 16
    assert plan_resources(config({"replicas": 2}), [16.0], 2.0).actor_threads == 0
    assert plan_resources(config(run={"threads_per_replica": 3}), [16.0], 0.0).actor_threads == 3


def test_impossible_demands_are_refused() -> None:
    with pytest.raises(TeacherError, match=r"need 4, but the cluster has 2"):
        plan_resources(config({"replicas": 4}), [16.0], 2.0)
    with pytest.raises(ConfigError, match=r"leave none of 2 to read the corpus"):
        plan_resources(config(run={"cpus_per_replica": 2}), [2.0], 0.0)


def test_the_line_of_an_error_survives_ray() -> None:
    cause = CorpusError("one clear line\nFailed to apply UDF transform after 1/1 attempts.")
    wrapped = ray.exceptions.RayTaskError("task", "a wall of text", cause).as_instanceof_cause()
    found = user_error(wrapped)
    assert type(found) is CorpusError
    assert str(found) == "one clear line"
    assert user_error(ValueError("a bug")) is None
    died = user_error(ray.exceptions.WorkerCrashedError())
    assert type(died) is TeacherError
    assert "\n" not in str(died)
