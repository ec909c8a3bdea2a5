"""Lists label sets below a URL, with totals from their manifests."""

from collections.abc import Iterator

from schemas.config import StrictModel
from schemas.errors import StoreError
from schemas.label_set.description import LABEL_SET_FILE
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import Manifest
from schemas.spec import RecordSpec
from schemas.storage.store import Store
from schemas.views.view import VIEW_FILE

MAX_DEPTH = 6
"""Maximum depth of the folders searched."""


class LabelSetEntry(StrictModel):
    """A label set and its totals.

    Attributes:
        url: where the label set is.
        teacher: path or name of the teacher's model from provenance, else its type and digest.
        record: kind and parameters, for example ``threshold tau=0.033``.
        rows, tokens, labels: totals of all units; a row in two units counts twice.
        bytes: total size of the shards.
        problem: why the set cannot be read; all other fields are then empty.
    """

    url: str
    teacher: str = ""
    record: str = ""
    units: int = 0
    rows: int = 0
    tokens: int = 0
    labels: int = 0
    quarantined: int = 0
    bytes: int = 0
    bytes_per_label: float = 0.0
    problem: str = ""


def list_label_sets(url: str) -> list[LabelSetEntry]:
    """Finds the label sets at a URL or in folders below it, sorted by path.

    Raises:
        StoreError: no file system supports the URL, or the URL does not exist.
    """
    store = Store(url)
    if not store.exists():
        raise StoreError(f"{url}: does not exist; check the path")
    return [_entry(_joined(url, rel)) for rel in _find(store, "", MAX_DEPTH)]


def record_text(record: RecordSpec) -> str:
    """Formats the kind of a record and its parameters."""
    own = record.identity()
    shown = {name: own[name] for name in ("k", "top_p", "max_head", "tau", "draws") if name in own}
    words = [record.kind, *(f"{name}={_short(value)}" for name, value in shown.items())]
    if record.temperatures:
        words.append(f"T={','.join(f'{t:g}' for t in record.temperatures)}")
    return " ".join(words)


def teacher_text(label_set: LabelSet, manifests: list[Manifest]) -> str:
    """The name of the teacher's model if a manifest records it, else its type and digest."""
    models = {str(m.provenance["model"]) for m in manifests if m.provenance.get("model")}
    if models:
        return ", ".join(sorted(models))
    teacher = label_set.spec.teacher
    if label_set.spec.record.kind == "tokens":
        return "none"
    return " ".join(part for part in (teacher.model_type, teacher.weights_digest[:12]) if part)


def _find(store: Store, rel: str, depth: int) -> Iterator[str]:
    if store.exists(f"{rel}/{LABEL_SET_FILE}" if rel else LABEL_SET_FILE):
        yield rel
    elif depth and not store.exists(f"{rel}/{VIEW_FILE}" if rel else VIEW_FILE):
        for folder in store.folders(rel):
            if not folder.rsplit("/", 1)[-1].startswith("."):
                yield from _find(store, folder, depth - 1)


def _joined(url: str, rel: str) -> str:
    return f"{url.rstrip('/')}/{rel}" if rel else url


def _entry(url: str) -> LabelSetEntry:
    try:
        label_set = LabelSet.open(url)
        manifests = label_set.manifests()
    except StoreError as error:
        return LabelSetEntry(url=url, problem=str(error))
    labels = sum(manifest.num_labels for manifest in manifests)
    size = sum(manifest.size_bytes for manifest in manifests)
    return LabelSetEntry(
        url=url,
        teacher=teacher_text(label_set, manifests),
        record=record_text(label_set.spec.record),
        units=len(manifests),
        rows=sum(manifest.num_rows for manifest in manifests),
        tokens=sum(manifest.num_tokens for manifest in manifests),
        labels=labels,
        quarantined=sum(manifest.num_quarantined for manifest in manifests),
        bytes=size,
        bytes_per_label=size / labels if labels else 0.0,
    )


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
