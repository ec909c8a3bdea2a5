"""One label job, end to end: checks, pipeline, accounts, view, summary.

Everything that can be checked without Ray is checked before Ray starts. Resuming needs no special
mode: every run labels the rows that have no committed label.
"""

import os
import time
import uuid
from datetime import UTC, datetime

from labeler.config import LabelConfig
from labeler.run.summary import LabelSummary, describe, summarise
from schemas.console.progress import Progress
from schemas.console.text import count_text
from schemas.errors import ConfigError
from schemas.label_set.label_set import LabelSet
from schemas.label_set.roster import close_roster
from schemas.spec import LabelSetSpec, RecordSpec
from schemas.storage.retry import RetryPolicy, retrying
from schemas.views.view import build_view


def run_label_job(config: LabelConfig, progress: bool = True) -> LabelSummary:
    """Labels the rows of a corpus that have no label yet.

    Args:
        config: configuration of the run.
        progress: show progress on standard error.

    Raises:
        CorpusError: the corpus cannot be read as configured.
        TeacherError, VocabularyError: the teacher cannot be used.
        StoreError: the label set has another spec, or cannot be written to.
        AccountsError: the run cannot account for every row.
    """
    with retrying(RetryPolicy(config.run.store_patience_s)):
        return _run(config, Progress("label", enabled=progress))


def _run(config: LabelConfig, progress: Progress) -> LabelSummary:
    from labeler.corpus.listing import list_corpus
    from labeler.corpus.piece_reader import KeySnapshot
    from labeler.run.actors.setup import RunSetup
    from labeler.run.pipeline import run_pipeline
    from labeler.run.ray_cluster.ray_session import cluster_size, ray_session
    from labeler.run.ray_cluster.resources import plan_resources

    started = time.monotonic()
    pieces = list_corpus(config.corpus)
    label_set = open_label_set(config)
    frozen = KeySnapshot(
        label_set.committed_keys(), label_set.quarantined_keys(), config.run.retry_quarantined
    )
    progress.say(
        f"corpus {config.corpus.path}: {sum(piece.size_bytes for piece in pieces):,} bytes in "
        f"{count_text(len(pieces), 'piece')}; {config.labels} has "
        f"{count_text(len(frozen.committed), 'labelled row')}"
    )
    reduced = _richer_fields(label_set.spec.record, config.record)
    if reduced:
        progress.say(f"reusing richer labels ({reduced})")
    # Run ids sort by time; the suffix separates runs that start in the same second.
    run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
    with ray_session(config.run), progress:  # closed before the summary is printed below the bar
        resources = plan_resources(config, *cluster_size())
        setup = RunSetup(run, with_absolute_paths(config))
        run_pipeline(pieces, setup, frozen, resources, progress)
    # From the roster and the manifests, because progress may miss a row or count it twice.
    accounts = close_roster(label_set, run, frozen.committed)
    accounts.check()
    if config.view:
        build_view(config.view, [(label_set, run)], config.record)
    seconds = time.monotonic() - started
    summary = summarise(
        label_set, run, accounts, config.teacher.backend, config.view, seconds, reduced
    )
    for line in describe(summary):
        progress.say(line)
    return summary


def _richer_fields(stored: RecordSpec, requested: RecordSpec) -> str:
    """Describes the fields in which stored labels differ from the requested ones; may be empty."""
    have, want = stored.identity(), requested.identity()
    return "; ".join(
        f"stored {name} {have.get(name)}, requested {want.get(name)}"
        for name in sorted(have.keys() | want.keys())
        if have.get(name) != want.get(name)
    )


def open_label_set(config: LabelConfig) -> LabelSet:
    """Opens the label set of a run, or creates it after checking that the teacher is usable.

    Raises:
        ConfigError: the text settings do not fit the teacher.
        TeacherError, VocabularyError: the teacher cannot be used.
        StoreError: the label set has another spec.
    """
    return LabelSet.create_or_open(config.labels, *label_set_spec(config))


def label_set_spec(config: LabelConfig) -> tuple[LabelSetSpec, dict[str, int]]:
    """Returns the spec of a run's labels and the tokenizer's vocabulary; writes nothing.

    Raises:
        ConfigError: the text settings do not fit the teacher.
        TeacherError, VocabularyError: the teacher cannot be used.
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
    # Fails here, rather than in a Ray task, if rows of this kind cannot be tokenised.
    RowTokenizer(tokenizer, config.corpus, text, identity.vocab_size, config.generate is not None)
    spec = LabelSetSpec(
        record=config.record, teacher=identity, text=text, generation=config.generate
    )
    return spec, vocabulary(tokenizer)


def with_absolute_paths(config: LabelConfig) -> LabelConfig:
    """Makes paths absolute, so that the configuration is valid in any working directory."""
    teacher = config.teacher_with_context()
    folders = {"model": teacher.model, "tokenizer": teacher.tokenizer}
    update = {
        name: os.path.abspath(folder)
        for name, folder in folders.items()
        if os.path.isdir(folder)  # otherwise a name on a hub, or empty
    }
    labels = config.labels if "://" in config.labels else os.path.abspath(config.labels)
    teacher = teacher.model_copy(update=update)
    return config.model_copy(update={"labels": labels, "teacher": teacher})
