"""The commit of one unit: a manifest, created exclusively and last. What has none is not there."""

import json
from typing import Any

import pydantic

from schemas.config import StrictModel
from schemas.errors import DamagedError
from schemas.storage.store import Store

MANIFESTS = "manifests"


class Fidelity(StrictModel):
    """What an audit of some of a unit's labels found, against the full distribution in float64.

    Attributes:
        labels: how many were audited.
        mean_kl, max_kl: nats a label, KL(teacher, stored) on the exact entries and one bucket for
            the rest, the stored side as a trainer reads it; for kind ``sampled`` on the draws.
        covered_mass: mean probability of the heads.
        missed_mass: by how much a head fell short of the most probable ids of its length, at most.
    """

    labels: int
    mean_kl: float
    max_kl: float
    covered_mass: float
    missed_mass: float


class Manifest(StrictModel):
    """What one unit of work left, and how it came about.

    Attributes:
        unit_key: identity of the unit; the name of this file.
        attempt: identity of the one attempt that won; part of the names of its files.
        fingerprint: of the label set.
        shard: path of the data in the label set; empty where no row was labelled.
        sha256: of the shard; empty where there is none.
        size_bytes: of the shard.
        row_groups: rows of each row group of the shard.
        num_entries: exact entries and draws of all labels.
        keys: path of the row keys and lengths; empty where no row was labelled.
        quarantine: path of the rows that could not be labelled; empty where there are none.
        fidelity: what an audit found; None where there was none.
        provenance: what does not change what a label means: backend, engine, versions, host, time.
    """

    unit_key: str
    attempt: str
    fingerprint: str
    shard: str
    sha256: str
    size_bytes: int
    num_rows: int
    num_tokens: int
    num_labels: int
    row_groups: list[int]
    keys: str
    quarantine: str
    num_quarantined: int
    num_entries: int = 0
    fidelity: Fidelity | None = None
    provenance: dict[str, Any]


def manifest_path(unit_key: str) -> str:
    """Where the manifest of a unit is in its label set."""
    return f"{MANIFESTS}/{unit_key}.json"


def repair(store: Store, unit_key: str) -> str:
    """What to do about a damaged unit, for error messages."""
    return (
        f"drop it with `tutelage labels drop {store.url} --unit {unit_key}` and label the corpus "
        "again, which computes that unit only"
    )


def write_manifest(store: Store, manifest: Manifest) -> Manifest:
    """Commits a unit. Of several attempts at one unit exactly one wins; all get the winner's."""
    data = json.dumps(manifest.model_dump(mode="json"), indent=1).encode()
    if store.create_exclusive(manifest_path(manifest.unit_key), data):
        return manifest
    return read_manifest(store, manifest_path(manifest.unit_key), manifest.fingerprint)


def read_manifest(store: Store, rel: str, fingerprint: str) -> Manifest:
    """Reads one manifest of a label set with this fingerprint.

    Raises:
        DamagedError: it is torn, is not a manifest, or is of another label set or unit.
        StoreError: it is not there.
    """
    unit_key = rel.rsplit("/", 1)[-1].removesuffix(".json")
    try:
        manifest = Manifest.model_validate_json(store.read_bytes(rel))
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        what = f"{'.'.join(map(str, problem['loc']))} {problem['msg']}".strip()
        raise DamagedError(
            f"{store.path(rel)}: not a whole manifest ({what}); {repair(store, unit_key)}"
        ) from error
    if manifest.fingerprint != fingerprint:
        raise DamagedError(
            f"{store.path(rel)}: belongs to a label set with fingerprint {manifest.fingerprint}, "
            f"found in one with {fingerprint}; {repair(store, unit_key)}"
        )
    if manifest.unit_key != unit_key:
        raise DamagedError(
            f"{store.path(rel)}: is the manifest of unit {manifest.unit_key}, expected {unit_key}; "
            f"{repair(store, unit_key)}"
        )
    return manifest


def unit_of_shard(store: Store, shard: str) -> str | None:
    """The unit that a shard belongs to, by looking for it; None where no manifest names it."""
    for rel in store.list(MANIFESTS, ".json"):
        if shard.encode() in store.read_bytes(rel):
            return rel.rsplit("/", 1)[-1].removesuffix(".json")
    return None
