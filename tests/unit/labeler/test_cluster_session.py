"""Errors that reach the user as one line."""

import ray.exceptions

from labeler.cluster_session import user_error
from schemas.errors import CorpusError, TeacherError


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
