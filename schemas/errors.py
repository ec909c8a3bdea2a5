"""Every error that a user can meet.

One line each: what was found, what was expected, where, and what to do. Each class keeps a
standard-library base, so that code which knows nothing of this project can still catch it by kind,
and takes one string, so that it survives pickling between processes.
"""


class TutelageError(Exception):
    """Root of the tree. Anything else that escapes is a bug of this project."""


class ConfigError(TutelageError, ValueError):
    """A configuration file or a ``key=value`` word does not say a valid run."""


class CorpusError(TutelageError, ValueError):
    """The corpus cannot be read as the configuration says."""


class TeacherError(TutelageError, RuntimeError):
    """The teacher cannot be loaded, or cannot give what the record asks for."""


class TeacherGoneError(TeacherError):
    """A teacher that runs elsewhere answers no row any more; no row can be blamed for it."""


class StudentError(TutelageError, RuntimeError):
    """The student cannot be built, trained or exported."""


class VocabularyError(TutelageError, ValueError):
    """Token ids mean different things to two parts that have to agree on them."""


class RecordError(TutelageError, ValueError):
    """Rows break an invariant of the label record."""


class StoreError(TutelageError, OSError):
    """A label set, roster or view is not there, is another one, or cannot be written."""


class MissingError(StoreError, FileNotFoundError):
    """A store answers that it has no such file."""


class DamagedError(StoreError):
    """Stored bytes are not what the manifest says."""


class JobStoppedError(TutelageError, RuntimeError):
    """A job was asked to stop and did so, between two units; the same command goes on."""


class AccountsError(TutelageError, RuntimeError):
    """A run cannot show what became of each row that it read."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
