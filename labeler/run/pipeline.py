"""The Ray Data pipeline of a run: corpus pieces -> requests -> units -> committed shards.

Only token ids go through Ray's object store: teacher actors write shards themselves. A task or an
actor may run twice; this is safe: row keys, claims and unit keys make the work idempotent.
"""

import contextlib
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from labeler.corpus.listing import Piece
from labeler.corpus.piece_reader import KeySnapshot
from labeler.run.actors.corpus_tasks import cut_into_units, read_pieces
from labeler.run.actors.ledger import Ledger
from labeler.run.actors.run_state import RunState
from labeler.run.actors.setup import RunSetup
from labeler.run.actors.teacher_actor import TeacherActor
from labeler.run.ray_cluster.ray_session import errors_for_users, quiet_ray_data, this_node
from labeler.run.ray_cluster.replicas import placed_replicas
from labeler.run.ray_cluster.resources import Resources
from labeler.run.ray_cluster.startup_notice import StartupNotice
from labeler.run.shutdown import GracefulShutdown
from labeler.supervision.attempts import remove_attempts
from labeler.units.sizing import rows_gathered
from schemas.console.progress import Progress
from schemas.errors import JobStoppedError
from schemas.label_set.label_set import LabelSet
from schemas.label_set.roster import remove_parts

_MIN_BLOCK_BYTES = 2**16

_POLL_S = 1.0


def run_pipeline(
    pieces: list[Piece],
    setup: RunSetup,
    frozen: KeySnapshot,
    resources: Resources,
    progress: Progress,
) -> None:
    """Reads all pieces and labels the missing rows; Ray must be running.

    Raises:
        JobStoppedError: on SIGTERM; in-flight units are committed.
        KeyboardInterrupt: on Ctrl-C, likewise.
        TutelageError: the cause of a failure, in one line; committed units are kept.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Never restarted: a ledger without its claims would let rows be labelled twice. On the driver's
    # node, because the job cannot survive the loss of that node anyway.
    on_this_node = NodeAffinitySchedulingStrategy(this_node(), soft=False)
    ledger = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=on_this_node)(
        Ledger
    ).remote(sum(piece.size_bytes for piece in pieces))
    run = setup.config.run
    quiet = quiet_ray_data(max(4 * run.unit_tokens, _MIN_BLOCK_BYTES), run.waiting_bytes)
    shutdown = GracefulShutdown(run.drain_s)
    notice = StartupNotice(resources, resources.min_replicas, progress.say, ray.available_resources)
    store = LabelSet.open(setup.config.labels).store
    try:
        watched = _watched(ledger, progress, shutdown, notice)
        with (
            errors_for_users(),
            shutdown.draining(),
            quiet,
            watched,
            placed_replicas(resources) as place,
        ):
            _dataset(pieces, setup, ray.put(frozen), resources, ledger, place).materialize()
    except (JobStoppedError, KeyboardInterrupt):
        # Only closing this run would read them; a rerun gets a new id.
        remove_attempts(store, setup.run)
        remove_parts(store, setup.run)
        raise
    finally:
        ray.kill(ledger)
    remove_attempts(store, setup.run)


def _dataset(
    pieces: list[Piece],
    setup: RunSetup,
    frozen: Any,
    resources: Resources,
    ledger: Any,
    place: Callable[[], dict[str, Any]],
) -> Any:
    import ray.data

    run = setup.config.run
    # Ray's defaults retry tasks and restart actors without limit.
    return (
        ray.data.from_items(
            [{"piece": pickle.dumps(piece)} for piece in pieces], override_num_blocks=len(pieces)
        )
        .map_batches(
            read_pieces,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"setup": setup, "frozen": frozen, "ledger": ledger},
            num_cpus=resources.task_cpus,
            # Ray runs one task per CPU; tokenizer threads would compete with them.
            runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
            max_retries=run.max_task_retries,
        )
        .map_batches(
            cut_into_units,
            batch_size=rows_gathered(setup.config),
            batch_format="pyarrow",
            fn_kwargs={"setup": setup},
            num_cpus=0,  # cheap; reserving a CPU could deadlock with the upstream tasks
            max_retries=run.max_task_retries,
        )
        .map_batches(
            TeacherActor,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs={"setup": setup, "ledger": ledger},
            # While the engine runs one unit, the next is queued in it and the previous one is
            # being written, so that a shared engine never idles.
            compute=ray.data.ActorPoolStrategy(
                min_size=resources.min_replicas,
                max_size=resources.max_replicas,
                max_tasks_in_flight_per_actor=4,
                max_concurrent_calls_per_actor=3,
                enable_true_multi_threading=True,
            ),
            ray_remote_args_fn=place,
            **resources.actor_options(),
            max_restarts=run.max_restarts,
            max_task_retries=run.max_task_retries,
        )
    )


@contextmanager
def _watched(
    ledger: Any, progress: Progress, shutdown: GracefulShutdown, notice: StartupNotice
) -> Iterator[None]:
    """Shows the ledger's state once a second and forwards a stop request to it."""
    import ray

    over = threading.Event()

    def refresh() -> None:
        if shutdown.is_requested:
            ledger.stop.remote()
        state: RunState
        state, lines = ray.get(ledger.report.remote(), timeout=_POLL_S)
        notice.update(state.is_teacher_up)
        for line in lines:
            progress.say(line)
        state.show(progress)

    def watch() -> None:
        while not over.wait(_POLL_S):
            # The job itself raises the error.
            with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
                refresh()

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            refresh()  # show the final state, even if the job failed
