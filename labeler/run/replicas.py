"""The teacher actors of a job and their placement groups, released when the job ends.

Ray Data 2.60 leaves the actors of a failed job to garbage collection. Whoever holds the error holds
its traceback, and so the executor and the actors, whose CPUs the next job of the session may wait
for without end. And no one would own a placement group made for an actor: it would keep its GPUs
until the driver exits. So the job owns both. Remove once ``map_batches`` has placement groups of
its own and ends its actors with the execution.
"""

import contextlib
import uuid
from types import TracebackType
from typing import Any, Self

from labeler.config import TeacherConfig
from labeler.run.resources import Resources
from labeler.teachers.factory import make_teacher
from labeler.teachers.protocol import Teacher
from schemas.spec import RecordSpec


def make_replica(config: TeacherConfig, record: RecordSpec) -> Teacher:
    """Loads the teacher inside its actor.

    If the replica spans nodes, Ray starts the engine's workers in the actor's placement group.

    Raises:
        TeacherError: the model cannot be loaded, or the backend cannot serve the record.
    """
    import ray

    if config.backend == "vllm" and ray.util.get_current_placement_group() is not None:
        engine = {"distributed_executor_backend": "ray", **config.engine}
        config = config.model_copy(update={"engine": engine})
    return make_teacher(config, record)


class Replicas:
    """Names actors and makes placement groups; a context manager that releases both."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._names: list[str] = []
        self._groups: list[Any] = []

    def remote_args(self) -> dict[str, Any]:
        """Options of one more actor: its name and, if it needs one, its placement group.

        The actor runs in the first bundle of its group, the workers of its engine in all of them.
        A restarted actor keeps its group, whose bundles Ray moves to other nodes if one is lost.
        """
        self._names.append(f"teacher-{uuid.uuid4().hex}")
        options: dict[str, Any] = {"name": self._names[-1]}
        if self._resources.bundles:
            options["scheduling_strategy"] = self._place()
        return options

    def _place(self) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundles = [self._resources.bundle()] * self._resources.bundles
        group = ray.util.placement_group(bundles, strategy="PACK")
        self._groups.append(group)
        return PlacementGroupSchedulingStrategy(
            placement_group=group,
            placement_group_bundle_index=0,
            placement_group_capture_child_tasks=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        import ray

        # After a successful job they end by themselves, so that engines can close.
        for name in self._names if error is not None else ():
            with contextlib.suppress(ValueError):  # it never started, or has ended
                ray.kill(ray.get_actor(name))
        while self._groups:
            ray.util.remove_placement_group(self._groups.pop())
