"""Manifests. Creating one, exclusively and last, commits its unit."""

import json
from typing import Any

import pydantic

from schemas.config import StrictModel
from schemas.errors import DamagedError
from schemas.storage.store import Store

MANIFESTS = "manifests"


class Fidelity(StrictModel):
    """Audit of some of a unit's labels against the full distribution in float64.

    Attributes:
        labels: number of audited labels.
        mean_kl, max_kl: nats per label, KL(teacher, stored) over the exact entries and one bucket
            for the rest, with stored values as a trainer reads them; kind ``sampled``: over the
            draws.
        covered_mass: mean probability mass of the heads.
        missed_mass: largest shortfall of a head's mass against that of as many top ids.
    """

    labels: int
    mean_kl: float
    max_kl: float
    covered_mass: float
    missed_mass: float


class Manifest(StrictModel):
    """Files, counts and provenance of one unit of work.

    Attributes:
        unit_key: identity of the unit and name of this file.
        attempt: identity of the winning attempt; part of its files' names.
        fingerprint: fingerprint of the label set.
        shard: path of the data in the label set; empty if no row was labelled.
        sha256: digest of the shard.
        size_bytes: size of the shard.
        row_groups: number of rows in each row group of the shard.
        num_entries: number of exact entries and draws in all labels.
        keys: path of the row keys and lengths; empty if no row was labelled.
        quarantine: path of the rows that could not be labelled; empty if none.
        fidelity: result of the audit; None without one.
        provenance: facts that do not affect the labels: backend, engine, versions, host, time.
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
    """Path of a unit's manifest in its label set."""
    return f"{MANIFESTS}/{unit_key}.json"


def unit_of_manifest(rel: str) -> str:
    """The unit key in the path of a manifest."""
    return rel.rsplit("/", 1)[-1].removesuffix(".json")


def repair(store: Store, unit_key: str) -> str:
    """How to repair a damaged unit, for error messages."""
    return (
        f"drop it with `tutelage labels drop {store.url} --unit {unit_key}` and label the corpus "
        "again, which recomputes only that unit"
    )


def write_manifest(store: Store, manifest: Manifest) -> Manifest:
    """Commits a unit and returns its manifest, which is that of the first attempt to commit."""
    data = json.dumps(manifest.model_dump(mode="json"), indent=1).encode()
    if store.create_exclusive(manifest_path(manifest.unit_key), data):
        return manifest
    return read_manifest(store, manifest_path(manifest.unit_key), manifest.fingerprint)


def read_manifest(store: Store, rel: str, fingerprint: str) -> Manifest:
    """Reads a manifest and checks that it belongs to the label set with this fingerprint.

    Raises:
        DamagedError: it is not a valid manifest, or belongs to another label set or unit.
        MissingError: it does not exist.
    """
    unit_key = unit_of_manifest(rel)
    try:
        manifest = Manifest.model_validate_json(store.read_bytes(rel))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
        raise DamagedError(
            f"{store.path(rel)}: not a valid manifest ({what}); {repair(store, unit_key)}"
        ) from error
    problem = ""
    if manifest.fingerprint != fingerprint:
        found = manifest.fingerprint
        problem = (
            f"belongs to a label set with fingerprint {found}, found in one with {fingerprint}"
        )
    elif manifest.unit_key != unit_key:
        problem = f"is the manifest of unit {manifest.unit_key}, expected {unit_key}"
    if problem:
        raise DamagedError(f"{store.path(rel)}: {problem}; {repair(store, unit_key)}")
    return manifest


def unit_of_shard(store: Store, shard: str) -> str | None:
    """Searches all manifests for the unit of a shard; None if no manifest names it."""
    for rel in store.list(MANIFESTS, ".json"):
        if shard.encode() in store.read_bytes(rel):
            return unit_of_manifest(rel)
    return None
