"""The two files that describe a label set: its spec and its teacher's vocabulary."""

import hashlib
import json
from collections.abc import Mapping

import pydantic

from schemas.config import StrictModel
from schemas.errors import DamagedError, StoreError
from schemas.spec import SCHEMA_VERSION, LabelSetSpec
from schemas.storage.store import Store

LABEL_SET_FILE = "label_set.json"


class LabelSetFile(StrictModel):
    """Content of label_set.json."""

    fingerprint: str
    spec: LabelSetSpec
    vocabulary: str = ""


def read_label_set_file(store: Store) -> LabelSetFile:
    """Reads the description of a label set.

    Raises:
        StoreError: it does not exist, or was created by a later version of this project.
        DamagedError: it is damaged or does not match its fingerprint.
    """
    if not store.exists(LABEL_SET_FILE):
        raise StoreError(f"{store.url}: no label set there (no {LABEL_SET_FILE}); check the path")
    path = store.path(LABEL_SET_FILE)
    try:
        content = json.loads(store.read_bytes(LABEL_SET_FILE))
        version = content["spec"]["schema_version"]
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise StoreError(
                f"{path}: has schema version {version}, but this version of the program reads up "
                f"to {SCHEMA_VERSION}; upgrade it"
            )
        file = LabelSetFile.model_validate(content)
    except (ValueError, LookupError, TypeError, pydantic.ValidationError) as error:
        what = str(error).replace("\n", " ")
        raise DamagedError(f"{path}: not a valid label set description ({what})") from error
    if file.spec.fingerprint() != file.fingerprint:
        raise DamagedError(
            f"{path}: records fingerprint {file.fingerprint}, but its spec has "
            f"{file.spec.fingerprint()}; restore the file from a copy"
        )
    return file


def write_vocabulary(store: Store, vocabulary: Mapping[str, int]) -> str:
    """Writes the mapping token -> id to a file and returns the file's name.

    The name contains a digest, so that concurrent creators of a label set never mix vocabularies.
    """
    data = json.dumps(vocabulary, sort_keys=True, ensure_ascii=False).encode()
    name = _vocabulary_name(data)
    store.write_bytes(name, data)
    return name


def _vocabulary_name(data: bytes) -> str:
    return f"vocabulary-{hashlib.sha256(data).hexdigest()[:32]}.json"


def read_vocabulary(store: Store, name: str) -> dict[str, int]:
    """Reads the mapping token -> id from a file of `write_vocabulary`.

    Raises:
        DamagedError: the content does not match the digest in the name.
    """
    data = store.read_bytes(name)
    if _vocabulary_name(data) != name:
        raise DamagedError(
            f"{store.path(name)}: content and name have different digests; restore the file from "
            "a copy"
        )
    vocabulary: dict[str, int] = json.loads(data)
    return vocabulary
