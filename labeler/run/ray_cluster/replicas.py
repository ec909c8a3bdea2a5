"""The teacher actors of a job and their placement groups, released when the job ends.

Ray Data 2.60 leaves the actors of a failed job to garbage collection. A reference to the error
keeps its traceback alive, and with it the executor and the actors: the next job of the session may
wait for their CPUs forever. A placement group made for an actor has no owner and would hold its
GPUs until the driver exits. So the job owns both. Remove once ``map_batches`` manages placement
groups and stops its actors when the execution ends.
"""

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from labeler.config import TeacherConfig
from labeler.run.ray_cluster.resources import Resources
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


@contextlib.contextmanager
def placed_replicas(resources: Resources) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yields a function that places one more actor; releases actors and groups on exit.

    The function returns Ray's options for the actor: its name and, if needed, its placement group.
    The actor runs in the first bundle of the group, the engine's workers in all bundles. A
    restarted actor keeps its group; if a node is lost, Ray moves its bundles to other nodes.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    names: list[str] = []
    groups: list[Any] = []

    def place() -> dict[str, Any]:
        names.append(f"teacher-{uuid.uuid4().hex}")
        if not resources.bundles:
            return {"name": names[-1]}
        bundles = [resources.bundle()] * resources.bundles
        groups.append(ray.util.placement_group(bundles, strategy="PACK"))
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=groups[-1],
            placement_group_bundle_index=0,
            placement_group_capture_child_tasks=True,
        )
        return {"name": names[-1], "scheduling_strategy": strategy}

    try:
        yield place
    except BaseException:
        # After a successful job they exit on their own, so that engines can close.
        for name in names:
            with contextlib.suppress(ValueError):  # it never started, or has ended
                ray.kill(ray.get_actor(name))
        raise
    finally:
        for group in groups:
            ray.util.remove_placement_group(group)
