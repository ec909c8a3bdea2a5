"""The two files that describe a label set: its spec, and its teacher's vocabulary."""

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
    """The content of label_set.json."""

    fingerprint: str
    spec: LabelSetSpec
    vocabulary: str = ""


def read_label_set_file(store: Store) -> LabelSetFile:
    """The description of a label set.

    Raises:
        StoreError: there is none, or a later version of this project made it.
        DamagedError: it is torn, or does not have its own fingerprint.
    """
    if not store.exists(LABEL_SET_FILE):
        raise StoreError(f"{store.url}: no label set there (no {LABEL_SET_FILE}); check the path")
    path = store.path(LABEL_SET_FILE)
    try:
        content = json.loads(store.read_bytes(LABEL_SET_FILE))
        version = content["spec"]["schema_version"]
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise StoreError(
                f"{path}: has schema version {version}, this program knows up to "
                f"{SCHEMA_VERSION}; use a newer version of it"
            )
        file = LabelSetFile.model_validate(content)
    except (ValueError, LookupError, TypeError, pydantic.ValidationError) as error:
        what = str(error).replace("\n", " ")
        raise DamagedError(f"{path}: not a description of a label set ({what})") from error
    if file.spec.fingerprint() != file.fingerprint:
        raise DamagedError(
            f"{path}: says its fingerprint is {file.fingerprint}, but its spec has "
            f"{file.spec.fingerprint()}; restore the file from a copy"
        )
    return file


def write_vocabulary(store: Store, vocabulary: Mapping[str, int]) -> str:
    """Its digest is in its name, so that two creators of different sets at one URL cannot mix."""
    data = json.dumps(vocabulary, sort_keys=True, ensure_ascii=False).encode()
    name = _vocabulary_name(data)
    store.write_bytes(name, data)
    return name


def _vocabulary_name(data: bytes) -> str:
    return f"vocabulary-{hashlib.sha256(data).hexdigest()[:32]}.json"


def read_vocabulary(store: Store, name: str) -> dict[str, int]:
    """Token -> id, from a file of ``write_vocabulary``.

    Raises:
        DamagedError: the file is not the one that was written.
    """
    data = store.read_bytes(name)
    if _vocabulary_name(data) != name:
        raise DamagedError(
            f"{store.path(name)}: its content does not have the digest in its name; restore the "
            "file from a copy"
        )
    vocabulary: dict[str, int] = json.loads(data)
    return vocabulary
