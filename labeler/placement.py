"""Placement groups of replicas that need more GPUs than a node has, released when the job ends.

Ray Data 2.60 starts each actor with what ``ray_remote_args_fn`` returns, but nobody would own a
group that is made there: it would keep its GPUs until the driver exits, which in a session that
runs several jobs is too late. Here the job owns them. Can go when ``map_batches`` has placement
groups of its own.
"""

from typing import Any, Self

from labeler.resources import Resources


class PlacementGroups:
    """The placement groups of one job's replicas; a context that removes them at its end."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._groups: list[Any] = []

    def remote_args(self) -> dict[str, Any]:
        """Options of one more actor: in the first bundle of a group of its own.

        Workers that its engine starts are in the same group. An actor that is restarted, also
        because its node was lost, stays with its group, whose bundles Ray moves to other nodes.
        """
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundles = [self._resources.bundle()] * self._resources.bundles
        group = ray.util.placement_group(bundles, strategy="PACK")
        self._groups.append(group)
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=group,
            placement_group_bundle_index=0,
            placement_group_capture_child_tasks=True,
        )
        return {"scheduling_strategy": strategy}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        while self._groups:
            ray.util.remove_placement_group(self._groups.pop())
