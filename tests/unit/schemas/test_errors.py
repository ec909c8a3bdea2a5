"""Errors survive pickling and keep their standard bases."""

import pickle

import pytest

from schemas import errors

TREE = {
    "ConfigError": ValueError,
    "CorpusError": ValueError,
    "TeacherError": RuntimeError,
    "TeacherGoneError": errors.TeacherError,
    "StudentError": RuntimeError,
    "VocabularyError": ValueError,
    "RecordError": ValueError,
    "StoreError": OSError,
    "MissingError": FileNotFoundError,
    "DamagedError": errors.StoreError,
    "JobStoppedError": RuntimeError,
    "AccountsError": RuntimeError,
}


@pytest.mark.parametrize("name", TREE)
def test_error_survives_pickling_and_keeps_its_base(name: str) -> None:
    error = getattr(errors, name)("what was found, and what to do")
    assert isinstance(error, errors.TutelageError)
    assert isinstance(error, TREE[name])
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == "what was found, and what to do"


def test_error_tree_is_complete() -> None:
    found = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, Exception)}
    assert found == {"TutelageError", *TREE}
