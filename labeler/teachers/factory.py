"""Creates the configured teacher; engines and torch are imported lazily."""

from labeler.config import TeacherConfig
from labeler.teachers.protocol import Teacher
from schemas.errors import TeacherError
from schemas.spec import RecordSpec


def make_teacher(config: TeacherConfig, record: RecordSpec) -> Teacher:
    """Loads the configured teacher.

    Raises:
        TeacherError: the model cannot be loaded, or the backend cannot serve the record.
    """
    if config.backend == "vllm":
        from labeler.teachers.vllm.teacher import VllmTeacher

        return VllmTeacher(config, record)
    if config.backend == "transformers":
        from labeler.teachers.transformers_teacher import TransformersTeacher

        return TransformersTeacher(config, record)
    if config.backend == "remote":
        from labeler.teachers.remote.teacher import RemoteTeacher

        return RemoteTeacher(config, record)
    raise TeacherError(
        f'teacher.backend = "{config.backend}" has no teacher; '
        'expected "vllm", "transformers" or "remote"'
    )
