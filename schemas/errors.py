"""The exceptions shown to users.

Messages are one line: what was found, what was expected, where, and what to do. Each class keeps a
standard-library base, so that other code can catch it by kind, and takes a single string, so that
it survives pickling between processes.
"""

from dataclasses import dataclass


class TutelageError(Exception):
    """Base class. Any other exception that escapes is a bug."""


class ConfigError(TutelageError, ValueError):
    """A configuration file or a ``key=value`` override is invalid."""


class CorpusError(TutelageError, ValueError):
    """The corpus cannot be read as configured."""


class TeacherError(TutelageError, RuntimeError):
    """The teacher cannot be loaded, or cannot compute what the record requires."""


class TeacherGoneError(TeacherError):
    """A remote teacher stopped answering; no single row is to blame."""


class StudentError(TutelageError, RuntimeError):
    """The student cannot be built, trained or exported."""


class VocabularyError(TutelageError, ValueError):
    """Two vocabularies that must agree map token ids differently."""


class RecordError(TutelageError, ValueError):
    """Rows violate an invariant of the label record."""


class StoreError(TutelageError, OSError):
    """A label set, roster or view is missing, does not match, or cannot be written."""


class MissingError(StoreError, FileNotFoundError):
    """A file does not exist in its store."""


class DamagedError(StoreError):
    """Stored bytes differ from what the manifest records."""


class JobStoppedError(TutelageError, RuntimeError):
    """A job stopped on request, between two units; the same command resumes it."""


class AccountsError(TutelageError, RuntimeError):
    """A run cannot account for every row it read."""


@dataclass(frozen=True)
class RowFailure:
    """Why a row cannot be labelled; stored with the quarantined row, not raised.

    Attributes:
        reason: one word, by which failures are counted.
        detail: one line that explains it.
    """

    reason: str
    detail: str


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
