"""Identities of rows and units: 16-byte BLAKE2b hashes.

Every hash starts with a domain, so that keys of different kinds never collide by content. Every
part is preceded by its length, so that different lists of parts never hash the same bytes. Integers
are little-endian.
"""

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.spec import GenerationSpec

KEY_BYTES = 16

Keys = npt.NDArray[np.uint8]
SortedKeys = npt.NDArray[np.bytes_]


def row_key(
    token_ids: npt.NDArray[Any],
    label_spans: npt.NDArray[Any],
    teacher_context: npt.NDArray[Any] | None = None,
) -> bytes:
    """Identity of a labelled request: everything the teacher saw, and the positions to label.

    Args:
        token_ids: int [L].
        label_spans: int [2 * spans], flat half-open [start, end) pairs of target indices.
        teacher_context: int, tokens that only the teacher saw; None and empty are equivalent.
    """
    context = np.empty(0, np.int32) if teacher_context is None else teacher_context
    return digest("row", _int32(token_ids), _int32(label_spans), _int32(context))


def generated_row_key(
    prompt_ids: npt.NDArray[Any], generation: GenerationSpec, sample_index: int
) -> bytes:
    """Identity of a response, known before it is sampled: prompt, generation spec, sample index.

    Excludes the number of samples, so that requesting more keeps the existing ones.
    """
    how = json.dumps(generation.model_dump(exclude={"n"}), sort_keys=True, separators=(",", ":"))
    return digest("generated", _int32(prompt_ids), how.encode(), _int64(sample_index))


def content_key(token_ids: npt.NDArray[Any], label_spans: npt.NDArray[Any]) -> bytes:
    """Hash of token ids and spans only; joins label sets of different teachers."""
    return digest("content", _int32(token_ids), _int32(label_spans))


def place_key(source: str, place: int, window: int) -> bytes:
    """Identity, by its place in the source, of a row that cannot be tokenised."""
    return digest("place", source.encode(), _int64(place), _int64(window))


def unit_key(row_keys: Keys) -> str:
    """Identity of a unit, 32 hexadecimal digits, from the keys of its rows in any order.

    Args:
        row_keys: uint8 [R, 16], of labelled and quarantined rows.
    """
    return digest("unit", keys_to_sorted(row_keys).tobytes()).hex()


def stack_keys(keys: list[bytes]) -> Keys:
    """uint8 [R, 16] from R keys of 16 bytes."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def keys_to_sorted(keys: Keys) -> SortedKeys:
    """Sorts keys, uint8 [R, 16], as S16 [R] for `contains`.

    numpy drops trailing zero bytes when it extracts an S16 element; comparisons are unaffected,
    because all keys have the same length.
    """
    return np.sort(as_strings(keys))


def contains(sorted_keys: SortedKeys, keys: Keys) -> npt.NDArray[np.bool_]:
    """bool [R]: which of `keys`, uint8 [R, 16], occur in `sorted_keys`, S16 ascending."""
    if not len(sorted_keys):
        return np.zeros(len(keys), bool)
    wanted = as_strings(keys)
    place = np.searchsorted(sorted_keys, wanted)
    return sorted_keys[np.minimum(place, len(sorted_keys) - 1)] == wanted


def find_keys(haystack: Keys, keys: Keys) -> npt.NDArray[np.int64]:
    """int64 [R]: index of each of `keys` in `haystack`, whose keys are unique; -1 if absent.

    Args:
        haystack: uint8 [n, 16], in any order.
        keys: uint8 [R, 16].
    """
    if not len(haystack):
        return np.full(len(keys), -1)
    strings, wanted = as_strings(haystack), as_strings(keys)
    order = np.argsort(strings)
    place = np.searchsorted(strings, wanted, sorter=order)
    place = order[np.minimum(place, len(strings) - 1)]
    return np.where(strings[place] == wanted, place, -1)


def as_strings(keys: Keys) -> SortedKeys:
    """Views keys, uint8 [R, 16], as S16 [R]; copies only if they are not contiguous."""
    contiguous = np.ascontiguousarray(keys, np.uint8)
    return contiguous.reshape(-1, KEY_BYTES).view(f"S{KEY_BYTES}").reshape(-1)


def _int32(values: npt.NDArray[Any]) -> bytes:
    return np.ascontiguousarray(values, "<i4").tobytes()


def _int64(value: int) -> bytes:
    return int(value).to_bytes(8, "little", signed=True)


def digest(domain: str, *parts: bytes) -> bytes:
    """Hashes `parts`, in order, within a `domain`, to 16 bytes."""
    hasher = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in (b"tutelage." + domain.encode(), *parts):
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()
