"""The status of a training run on a cluster of two nodes."""

import os
import subprocess
import sys

from tests.support import ROOT

# In a process of its own: the tests' own Ray has one node. Actors without a CPU go to any node
# unless one is named, so that one of several would be on the other.
PROGRAM = """
import ray
from ray.cluster_utils import Cluster
from schemas.errors import DamagedError
from trainer.run.status import RunStatusActor

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
assert len(ray.nodes()) == 2
here = ray.get_runtime_context().get_node_id()
for _ in range(6):
    status = RunStatusActor()
    status.note("step")
    status.fail(DamagedError("the cause"))
    assert status.news(0) == (None, ["step"])
    assert isinstance(status.error(), DamagedError)
    place = status._actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
    assert ray.get(place) == here
ray.shutdown()
cluster.shutdown()
"""


def test_status_actor_is_on_the_drivers_node() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
