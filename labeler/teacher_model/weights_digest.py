"""A digest of a checkpoint's weights that reads only a sample of them.

Hashes the name, dtype, shape and a few byte blocks of each tensor. Training changes every block of
a tensor, so a model that was trained further gets a new digest; edits of single numbers may go
unnoticed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from schemas.errors import TeacherError

_DIGEST_BYTES = 16
_BLOCK_BYTES = 4096
_BLOCKS = 3
# Files of other formats have no readable header: more blocks, spread over the file.
_OPAQUE_BLOCKS = 256

_FLOAT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, sorted: *.safetensors if any exist, else *.bin."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def weights_digest(folder: Path) -> str:
    """32 hexadecimal digits that identify the weights of a model folder.

    With safetensors, independent of the distribution of tensors over files.

    Raises:
        TeacherError: a file is truncated or not a safetensors file.
    """
    parts: dict[str, bytes] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            parts.update(_tensor_parts(file))
        else:
            parts[file.name] = _range_digest(file, 0, file.stat().st_size, _OPAQUE_BLOCKS)
    total = hashlib.blake2b(b"sampled", digest_size=_DIGEST_BYTES)
    for name in sorted(parts):
        total.update(len(name.encode()).to_bytes(4, "little") + name.encode() + parts[name])
    return total.hexdigest()


def first_float_dtype(folder: Path) -> str:
    """The dtype of the first floating tensor, for a checkpoint whose config has none."""
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            for entry in read_header(file)[0].values():
                if entry["dtype"] in _FLOAT_DTYPES:
                    return _FLOAT_DTYPES[entry["dtype"]]
    return "float32"


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Reads the header of a safetensors file.

    Returns:
        The tensors, name -> {dtype, shape, data_offsets}, and the offset of their data in the file.

    Raises:
        TeacherError: the file is truncated or not a safetensors file.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 + length or not 2 <= length < 2**30:
            raise TeacherError(f"{file}: {size} bytes are not a safetensors file; copy it again")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != 8 + length + end:
        raise TeacherError(
            f"{file}: has {size} bytes, but its header promises {8 + length + end}; copy it again"
        )
    return header, 8 + length


def _tensor_parts(file: Path) -> dict[str, bytes]:
    header, base = read_header(file)
    parts = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        described = json.dumps([entry["dtype"], entry["shape"]]).encode()
        content = _range_digest(file, base + start, end - start, _BLOCKS)
        parts[name] = described + content
    return parts


def _range_digest(file: Path, start: int, size: int, blocks: int) -> bytes:
    """Digest of evenly spaced blocks of a byte range, including its first and last bytes."""
    hasher = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=_DIGEST_BYTES)
    with open(file, "rb") as stream:
        if size <= blocks * _BLOCK_BYTES:
            stream.seek(start)
            hasher.update(stream.read(size))
        else:
            for block in range(blocks):
                stream.seek(start + (size - _BLOCK_BYTES) * block // (blocks - 1))
                hasher.update(stream.read(_BLOCK_BYTES))
    return hasher.digest()
