"""The Ray Data job: pieces of the corpus -> requests -> committed units.

Only token ids go through Ray's object store. A tokenising task reads a piece and sends on what has
to be labelled; a teacher actor labels a unit, writes its shard itself and returns when the manifest
is there. Either may run twice: keys, claims and units make that harmless. Restarts and retries are
limited, which they are not by default.
"""

import functools
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from labeler.config import LabelConfig, TeacherConfig
from labeler.corpus.documents import RowTokenizer
from labeler.corpus.listing import Piece
from labeler.corpus.piece_reader import KeySnapshot, PieceReader, PieceResult
from labeler.corpus.requests import REQUEST_SCHEMA, from_table, to_table
from labeler.quality.gates import Gates
from labeler.quality.reference_teacher import reference_of
from labeler.run.ledger import Ledger
from labeler.run.openmp_env import cpu_environment
from labeler.run.progress import Progress
from labeler.run.ray_session import (
    is_lost_node,
    quiet_ray_data,
    this_actor,
    this_node,
    user_error,
    was_restarted,
)
from labeler.run.replicas import Replicas, make_replica
from labeler.run.resources import Resources
from labeler.run.shutdown import StopRequests
from labeler.run.startup_notice import TeacherWait
from labeler.run.unit_labeller import UnitDone, UnitLabeller
from labeler.supervision.attempts import Attempts, remove_attempts
from labeler.supervision.supervisor import Survivor
from labeler.supervision.watchdog import EngineWatch
from labeler.teacher_model.identity import load_tokenizer
from labeler.teachers.protocol import Teacher
from labeler.units.sizing import UNIT_SCHEMA, cut_units, rows_gathered, unwrapped, wrapped
from schemas.errors import JobStoppedError
from schemas.fault_points import fault_point
from schemas.keys import Keys, stack_keys, unit_key
from schemas.label_set.label_set import LabelSet
from schemas.label_set.roster import remove_parts, write_part
from schemas.spec import RecordSpec
from schemas.storage.retry import RetryPolicy, set_retry_policy

_MIN_BLOCK_BYTES = 2**16

_POLL_S = 1.0


@dataclass(frozen=True, eq=False)
class RunSetup:
    """What every process of a run knows.

    Attributes:
        run: Identity of the run.
        config: With paths that mean the same in every process.
        make_teacher: Loads the teacher, in its actor.
    """

    run: str
    config: LabelConfig
    make_teacher: Callable[[TeacherConfig, RecordSpec], Teacher] = make_replica

    @property
    def salt(self) -> str:
        """Makes units of this run different ones, where rows are tried again."""
        return self.run if self.config.run.retry_quarantined else ""

    def __hash__(self) -> int:
        return hash(self.run)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunSetup) and other.run == self.run


def run_pipeline(
    pieces: list[Piece],
    setup: RunSetup,
    frozen: KeySnapshot,
    resources: Resources,
    progress: Progress,
) -> None:
    """Reads all pieces and labels what is missing; Ray has to be there.

    Raises:
        JobStoppedError: SIGTERM came; what was in work is committed.
        KeyboardInterrupt: Ctrl-C came; likewise.
        TutelageError: Whatever ended the job, in one line; what is committed stays.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Not restarted: a ledger that forgot its claims would let rows be labelled twice. So it is on
    # the driver's own node, without which there is no job, and not on one that may be taken away.
    here = NodeAffinitySchedulingStrategy(this_node(), soft=False)
    ledger = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=here)(Ledger).remote(
        sum(piece.size_bytes for piece in pieces)
    )
    config = setup.config
    block_bytes = max(4 * config.run.unit_tokens, _MIN_BLOCK_BYTES)
    stop = StopRequests(config.run.drain_s)
    try:
        quiet = quiet_ray_data(block_bytes, config.run.waiting_bytes)
        wait = TeacherWait(resources, resources.min_replicas, progress.say, ray.available_resources)
        watched = _watched(ledger, progress, stop, wait)
        with stop.draining(), quiet, watched, Replicas(resources) as replicas:
            dataset = _dataset(pieces, setup, ray.put(frozen), resources, ledger, replicas)
            for _ in dataset.iter_batches(batch_size=None, prefetch_batches=0):
                pass
    except JobStoppedError:
        _forget_run(setup)
        raise
    except Exception as error:  # everything that a task raised comes out here
        known = user_error(error)
        if known is None:
            raise
        raise known from None
    except KeyboardInterrupt:
        _forget_run(setup)
        raise
    finally:
        ray.kill(ledger)
    remove_attempts(LabelSet.open(config.labels).store, setup.run)


def _forget_run(setup: RunSetup) -> None:
    """Removes what only the end of a run would need: the next run is another one."""
    store = LabelSet.open(setup.config.labels).store
    remove_attempts(store, setup.run)
    remove_parts(store, setup.run)


def _dataset(
    pieces: list[Piece],
    setup: RunSetup,
    frozen: Any,
    resources: Resources,
    ledger: Any,
    replicas: Replicas,
) -> Any:
    import ray.data

    run = setup.config.run
    environment = cpu_environment(resources.actor_threads)
    return (
        ray.data.from_items(
            [{"piece": pickle.dumps(piece)} for piece in pieces], override_num_blocks=len(pieces)
        )
        .map_batches(
            _read_pieces,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"setup": setup, "frozen": frozen, "ledger": ledger},
            num_cpus=resources.task_cpus,
            runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
            max_retries=run.max_task_retries,
        )
        .map_batches(
            _cut_into_units,
            batch_size=rows_gathered(setup.config),
            batch_format="pyarrow",
            fn_kwargs={"setup": setup},
            num_cpus=0,  # cuts tables, and must not wait for those who wait for it
            max_retries=run.max_task_retries,
        )
        .map_batches(
            _TeacherActor,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs={"setup": setup, "ledger": ledger},
            # While the engine works on one unit, the next is in its queue and the last one is
            # written: an engine that is shared never waits.
            compute=ray.data.ActorPoolStrategy(
                min_size=resources.min_replicas,
                max_size=resources.max_replicas,
                max_tasks_in_flight_per_actor=4,
                max_concurrent_calls_per_actor=3,
                enable_true_multi_threading=True,
            ),
            num_cpus=resources.actor_cpus,
            num_gpus=resources.actor_gpus or None,
            ray_remote_args_fn=replicas.remote_args,
            runtime_env={"env_vars": environment if resources.actor_threads else {}},
            max_restarts=run.max_restarts,
            max_task_retries=run.max_task_retries,
        )
    )


@contextmanager
def _watched(
    ledger: Any, progress: Progress, stop: StopRequests, wait: TeacherWait
) -> Iterator[None]:
    """Shows how far the run is while it goes, and passes on that it is to stop."""
    import ray

    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_S):
            try:
                if stop.is_asked:
                    ledger.stop.remote()
                if not wait.is_over:
                    wait.look(ray.get(ledger.has_teachers.remote(), timeout=_POLL_S))
                for line in ray.get(ledger.news.remote(), timeout=_POLL_S):
                    progress.say(line)
                progress.show(ray.get(ledger.state.remote(), timeout=_POLL_S))
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
                continue  # the job itself says what went wrong

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _tell(ledger: Any, text: str) -> None:
    """In the processes of a run, whose standard error stream nobody sees."""
    print(text, file=sys.stderr, flush=True)
    ledger.note.remote(text)


def _wait_for_stores(setup: RunSetup, ledger: Any) -> None:
    report = functools.partial(_tell, ledger)
    set_retry_policy(RetryPolicy(setup.config.run.store_patience_s, report))


# What runs in the tokenising tasks


@functools.lru_cache(maxsize=1)
def _tools(setup: RunSetup) -> tuple[PieceReader, LabelSet]:
    """A worker process serves many tasks; it loads the tokenizer once."""
    config = setup.config
    label_set = LabelSet.open(config.labels)
    spec = label_set.spec
    rows = RowTokenizer(
        load_tokenizer(config.teacher),
        config.corpus,
        spec.text,
        spec.teacher.vocab_size,
        prompts=config.generate is not None,
    )
    return PieceReader(config.corpus, spec.text, config.generate, rows), label_set


def _read_pieces(batch: pa.Table, setup: RunSetup, frozen: Any, ledger: Any) -> Iterator[pa.Table]:
    """The requests of a piece; its roster part and its bad rows are written when it ends."""
    import ray

    _wait_for_stores(setup, ledger)
    reader, label_set = _tools(setup)
    known: KeySnapshot = ray.get(frozen)
    yield REQUEST_SCHEMA.empty_table()  # a piece may have nothing to send
    for packed in batch.column("piece").to_pylist():
        if ray.get(ledger.stopping.remote()):
            return
        piece: Piece = pickle.loads(packed)
        result = PieceResult()

        def claim(keys: Keys, index: int = piece.index) -> Any:
            return ray.get(ledger.claim.remote(index, keys))

        for requests in reader.requests(piece, known, claim, result):
            yield to_table(requests)
            if ray.get(ledger.stopping.remote()):
                return  # no roster part: this run ends without a roster
        _finish_piece(label_set, setup, known, result)
        ray.get(ledger.piece_read.remote(piece.index, piece.size_bytes, result.rows_sent))


def _finish_piece(
    label_set: LabelSet, setup: RunSetup, frozen: KeySnapshot, result: PieceResult
) -> None:
    bad = result.newly_quarantined(frozen)
    if bad:
        keys = unit_key(stack_keys([row.row_key for row in bad]))
        label_set.commit_unit(None, bad, {"stage": "tokenise"}, keys)
    if result.roster:
        fault_point("before_roster_part")
        write_part(label_set.store, setup.run, result.roster_part())


def _cut_into_units(requests: pa.Table, setup: RunSetup) -> Iterator[pa.Table]:
    """Units of about equally many tokens, one a row."""
    generation = setup.config.generate
    generated_tokens = 0 if generation is None else generation.max_tokens
    yield UNIT_SCHEMA.empty_table()
    for unit in cut_units(requests, setup.config.run.unit_tokens, generated_tokens):
        yield wrapped(unit)


# What runs in the teacher actors

_DONE_SCHEMA = pa.schema(
    [("unit_key", pa.string())]
    + [(name, pa.int64()) for name in ("num_rows", "num_tokens", "num_labels", "num_quarantined")]
)


@contextmanager
def _parity_claim(ledger: Any, actor: str) -> Iterator[bool]:
    import ray

    is_mine = ray.get(ledger.may_check.remote(actor))
    try:
        yield is_mine
    finally:
        if is_mine:
            ledger.checked.remote(actor)


def _gated_teacher(setup: RunSetup, ledger: Any, label_set: LabelSet) -> tuple[Survivor, Gates]:
    config = setup.config
    # The set's record, which may be richer than the one that was asked for.
    make = functools.partial(setup.make_teacher, config.teacher, label_set.spec.record)
    actor = this_actor()
    attempts = Attempts(label_set.store, setup.run, this_node(), is_lost_node, actor)
    watch = EngineWatch(config.run.stall_s)
    tell = functools.partial(_tell, ledger)
    teacher = Survivor(make, attempts, config.generate, config.gates.audit_rate, watch, tell)
    reference = functools.partial(reference_of, config.teacher, teacher.ask)
    claim = functools.partial(_parity_claim, ledger, actor)
    return teacher, Gates(label_set, config.gates, reference, claim)


class _TeacherActor:
    """A teacher and the units that it labels; one call is one unit."""

    def __init__(self, setup: RunSetup, ledger: Any) -> None:
        config = setup.config
        self._ledger = ledger
        ledger.teacher_up.remote(this_actor())
        _wait_for_stores(setup, ledger)
        if was_restarted():
            _tell(ledger, "a teacher's process died and was started anew; Ray's logs may say why")
        label_set = LabelSet.open(config.labels)
        teacher, gates = None, None
        if config.teacher.backend != "none":
            teacher, gates = _gated_teacher(setup, ledger, label_set)
        self._units = UnitLabeller(label_set, teacher, setup.salt, gates)

    def __call__(self, units: pa.Table) -> pa.Table:
        import ray

        all_done: list[UnitDone] = []
        for requests in unwrapped(units):
            if ray.get(self._ledger.stopping.remote()):
                break
            all_done.append(self._units.label(from_table(requests)))
            self._ledger.unit_done.remote(all_done[-1])
        return pa.Table.from_pylist([asdict(done) for done in all_done], schema=_DONE_SCHEMA)
