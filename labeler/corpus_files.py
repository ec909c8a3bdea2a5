"""The files of a corpus: those that a path, folder or pattern of any fsspec URL names.

Hidden files and folders (``.git``) are no part of a corpus.
"""

import json
import os
import re
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.utils import glob_translate

from labeler.config import CorpusConfig
from schemas.errors import CorpusError

DEFAULT_GLOBS = {
    "parquet": ("**/*.parquet",),
    "jsonl": ("**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst"),
    "text": ("**/*",),
}


@dataclass(frozen=True)
class CorpusFile:
    """One file: where to open it and what rosters call it."""

    url: str
    source: str
    size_bytes: int


def find_files(corpus: CorpusConfig) -> list[CorpusFile]:
    """Finds the files of a corpus, sorted by path.

    Raises:
        CorpusError: The path does not exist or no file matches.
    """
    fs, root = fsspec.core.url_to_fs(corpus.path)
    if any(mark in corpus.path for mark in "*?[") and not fs.exists(root):
        found = _with_sizes(fs.glob(root, detail=True))
        if not found:
            raise CorpusError(f"no file matches corpus.path {corpus.path}")
    elif not fs.exists(root):
        raise CorpusError(f"corpus.path {corpus.path} does not exist (looked for {root})")
    elif fs.isfile(root):
        found = {root: fs.size(root)}
    elif corpus.format == "hf":
        found = _hf_files(fs, root, corpus)
    else:
        found = _matching(fs, root, corpus)
    return [
        CorpusFile(fs.unstrip_protocol(path), _source_name(fs, path, corpus.path), size)
        for path, size in sorted(found.items())
    ]


def _with_sizes(listing: dict[str, dict[str, Any]]) -> dict[str, int]:
    return {path: info["size"] for path, info in listing.items() if info["type"] == "file"}


def _matching(fs: Any, root: str, corpus: CorpusConfig) -> dict[str, int]:
    listing = _with_sizes(fs.find(root, detail=True))
    globs = (corpus.glob,) if corpus.glob else DEFAULT_GLOBS[corpus.format]
    patterns = [re.compile(glob_translate(glob)) for glob in globs]
    found = {}
    for path, size in listing.items():
        relative = path[len(root) :].lstrip("/")
        hidden = any(part.startswith(".") for part in relative.split("/"))
        if not hidden and any(pattern.match(relative) for pattern in patterns):
            found[path] = size
    if not found:
        raise CorpusError(
            f"no file in corpus.path {corpus.path} matches {' or '.join(globs)} "
            f"({len(listing)} files are there); set corpus.glob"
        )
    return found


def _hf_files(fs: Any, root: str, corpus: CorpusConfig) -> dict[str, int]:
    """The Arrow files of a dataset that ``datasets`` saved with ``save_to_disk``."""
    root = root.rstrip("/")
    if fs.exists(f"{root}/dataset_dict.json"):
        splits = json.loads(fs.cat_file(f"{root}/dataset_dict.json"))["splits"]
        raise CorpusError(
            f"corpus.path {corpus.path} holds the splits {', '.join(splits)}; name one of them, "
            f"such as {corpus.path.rstrip('/')}/{splits[0]}"
        )
    if not fs.exists(f"{root}/state.json"):
        raise CorpusError(
            f"corpus.path {corpus.path} is no dataset saved to disk: it has no state.json"
        )
    state = json.loads(fs.cat_file(f"{root}/state.json"))
    paths = [f"{root}/{entry['filename']}" for entry in state["_data_files"]]
    return {path: fs.size(path) for path in paths}


def _source_name(fs: Any, path: str, given: str) -> str:
    """What rosters call a file: its path, relative if the configured one is."""
    if "file" not in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        name = str(fs.unstrip_protocol(path))
    else:
        name = path if "://" in given or os.path.isabs(given) else os.path.relpath(path)
    return os.fsencode(name).decode(errors="backslashreplace")  # names need not be UTF-8
