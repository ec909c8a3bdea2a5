"""Errors that reach the user as one line."""

import pytest
import ray
import ray.exceptions

from labeler.run.ray_cluster.ray_session import cluster_size, user_error
from schemas.errors import CorpusError, TeacherError


def test_error_line_survives_ray() -> None:
    cause = CorpusError("one clear line\nFailed to apply UDF transform after 1/1 attempts.")
    wrapped = ray.exceptions.RayTaskError("task", "a wall of text", cause).as_instanceof_cause()
    found = user_error(wrapped)
    assert type(found) is CorpusError
    assert str(found) == "one clear line"
    assert user_error(ValueError("a bug")) is None
    died = user_error(ray.exceptions.WorkerCrashedError())
    assert type(died) is TeacherError
    assert "\n" not in str(died)


def test_cpus_and_gpus_of_a_node_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    has = [{"memory": 1.0}, {"CPU": 4.0}, {"CPU": 2.0, "GPU": 8.0}, {"GPU": 1.0}, {"CPU": 99.0}]
    nodes = [{"Alive": index < 4, "Resources": found} for index, found in enumerate(has)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert cluster_size() == ([4.0, 2.0, 0.0], [0.0, 8.0, 1.0])
