"""A whole label job: checks, pipeline, accounts, view, summary.

Everything that can be found wrong without Ray is found before it starts. Resuming is no mode: every
run labels the rows that have no committed label yet.
"""

import os
import time
import uuid
from datetime import UTC, datetime

from labeler.config import LabelConfig, TeacherConfig
from labeler.run.progress import Progress, duration
from labeler.run.summary import LabelSummary, summarise
from schemas.errors import ConfigError
from schemas.label_set.label_set import LabelSet
from schemas.label_set.roster import close_roster
from schemas.spec import LabelSetSpec
from schemas.storage.retry import RetryPolicy, retrying
from schemas.views.view import build_view


def run_label_job(config: LabelConfig, progress: bool = True) -> LabelSummary:
    """Labels a corpus; only what is missing is computed.

    Args:
        config: The run.
        progress: Show on the standard error stream how far it is.

    Raises:
        CorpusError: The corpus cannot be read as the configuration says.
        TeacherError, VocabularyError: The teacher cannot be used.
        StoreError: The label set is one of another spec, or cannot be written to.
        AccountsError: The run cannot show what became of each row.
    """
    with retrying(RetryPolicy(config.run.store_patience_s)):
        return _run(config, progress)


def _run(config: LabelConfig, progress: bool) -> LabelSummary:
    from labeler.corpus.listing import list_corpus
    from labeler.corpus.piece_reader import KeySnapshot
    from labeler.run.pipeline import RunSetup, run_pipeline
    from labeler.run.ray_session import cluster_size, ray_session
    from labeler.run.resources import plan_resources

    started = time.monotonic()
    shown = Progress(enabled=progress)
    pieces = list_corpus(config.corpus)
    label_set = open_label_set(config)
    frozen = KeySnapshot(
        label_set.committed_keys(), label_set.quarantined_keys(), config.run.retry_quarantined
    )
    shown.say(
        f"corpus {config.corpus.path}: {sum(piece.size_bytes for piece in pieces):,} bytes in "
        f"{len(pieces)} pieces; {config.labels} has {len(frozen.committed):,} labelled rows"
    )
    reduced = _reduced(label_set, config)
    if reduced:
        shown.say(
            f"{config.labels} holds more than is asked for, which is served from it: {reduced}"
        )
    run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
    with ray_session(config.run):
        resources = plan_resources(config, *cluster_size())
        run_pipeline(pieces, RunSetup(run, everywhere(config)), frozen, resources, shown)
    accounts = close_roster(label_set, run, frozen.committed)
    accounts.check()
    if config.view:
        build_view(config.view, [(label_set, run)], config.record)
    seconds = time.monotonic() - started
    shown.say(
        f"{accounts.rows_read:,} rows read = {accounts.rows_labelled:,} labelled + "
        f"{accounts.rows_reused:,} reused + {accounts.rows_duplicate:,} duplicate + "
        f"{accounts.rows_quarantined:,} quarantined, in {duration(seconds)}"
        + (f"; served from richer labels ({reduced})" if reduced else "")
    )
    summary = summarise(label_set, run, accounts, config.teacher.backend, config.view, seconds)
    if summary.ids_per_label:
        shown.say(
            f"{summary.labels:,} new labels; {summary.ids_per_label:.1f} ids and "
            f"{summary.bytes_per_label:.1f} bytes a label on disk"
        )
    for announcement in summary.announcements:
        shown.say(f"note: {announcement}")
    return summary.model_copy(update={"reduced": reduced})


def _reduced(label_set: LabelSet, config: LabelConfig) -> str:
    """What the label set has more of than was asked for, as ``field: there / wanted``."""
    asked = label_set.spec.model_copy(update={"record": config.record})
    return "; ".join(label_set.spec.differences(asked))


def open_label_set(config: LabelConfig) -> LabelSet:
    """The label set of a run, made if it is not there, after checking that the teacher can be used.

    Raises:
        ConfigError: Text and teacher do not fit together.
        TeacherError, VocabularyError: The teacher cannot be used.
        StoreError: A label set of another spec is there.
    """
    return LabelSet.create_or_open(config.labels, *wanted_label_set(config))


def wanted_label_set(config: LabelConfig) -> tuple[LabelSetSpec, dict[str, int]]:
    """The spec of a run's labels and its tokenizer's vocabulary; writes nothing.

    Raises:
        ConfigError: Text and teacher do not fit together.
        TeacherError, VocabularyError: The teacher cannot be used.
    """
    from labeler.corpus.documents import RowTokenizer, text_spec
    from labeler.teacher_model.identity import context_tokens, load_tokenizer, teacher_identity
    from labeler.teacher_model.vocabulary import vocabulary

    tokenizer = load_tokenizer(config.teacher)
    identity = teacher_identity(config.teacher)
    text = text_spec(config.text, tokenizer, config.corpus.kind)
    if config.teacher.backend != "none":
        longest = context_tokens(config.teacher) - 1
        if config.text.max_tokens > longest:
            raise ConfigError(
                f"text.max_tokens is {config.text.max_tokens}, but {config.teacher.model} labels "
                f"at most {longest} tokens; lower text.max_tokens"
            )
    # Says now, and not in a task, whether rows of this kind can be tokenised.
    RowTokenizer(tokenizer, config.corpus, text, identity.vocab_size, config.generate is not None)
    spec = LabelSetSpec(
        record=config.record, teacher=identity, text=text, generation=config.generate
    )
    return spec, vocabulary(tokenizer)


def everywhere(config: LabelConfig) -> LabelConfig:
    """The same configuration with paths that do not depend on a process's working directory."""
    teacher = config.teacher_with_context()
    update = {"model": _absolute_folder(teacher.model)}
    update["tokenizer"] = _absolute_folder(teacher.tokenizer)
    labels = config.labels if "://" in config.labels else os.path.abspath(config.labels)
    moved: TeacherConfig = teacher.model_copy(update=update)
    return config.model_copy(update={"labels": labels, "teacher": moved})


def _absolute_folder(name: str) -> str:
    """A local folder by its absolute path; a name on a hub, or none, as it is."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name
