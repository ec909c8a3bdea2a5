"""A digest of a checkpoint's weights that reads little of them.

Of each tensor it hashes name, dtype, shape and a few blocks of bytes; training moves every block of
a tensor, so a model that was trained further has another digest. ``every_byte`` hashes all.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from schemas.errors import TeacherError

_DIGEST_BYTES = 16
_BLOCK_BYTES = 4096
_BLOCKS = 3
# Files of other formats have no header to go by: more blocks, spread over the file.
_OPAQUE_BLOCKS = 256
_READ_BYTES = 2**24

_FLOAT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def weight_files(folder: Path) -> list[Path]:
    """Files that hold weights, by name; safetensors where there are any."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def weights_digest(folder: Path, every_byte: bool = False) -> str:
    """32 hexadecimal digits that identify the weights of a model folder.

    The digest does not depend on how tensors are spread over files, with safetensors.

    Raises:
        TeacherError: a file is cut short or is not a safetensors file.
    """
    parts: dict[str, bytes] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            parts.update(_tensor_parts(file, every_byte))
        else:
            parts[file.name] = _range_digest(
                file, 0, file.stat().st_size, _OPAQUE_BLOCKS, every_byte
            )
    total = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    total.update(b"every byte" if every_byte else b"sampled")
    for name in sorted(parts):
        total.update(len(name.encode()).to_bytes(4, "little") + name.encode() + parts[name])
    return total.hexdigest()


def first_float_dtype(folder: Path) -> str:
    """The dtype of the first floating tensor, for a checkpoint whose config does not say."""
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            for entry in read_header(file)[0].values():
                if entry["dtype"] in _FLOAT_DTYPES:
                    return _FLOAT_DTYPES[entry["dtype"]]
    return "float32"


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Tensors of a safetensors file, name -> {dtype, shape, data_offsets}; where the data begins.

    Raises:
        TeacherError: the file is cut short or is not a safetensors file.
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


def _tensor_parts(file: Path, every_byte: bool) -> dict[str, bytes]:
    header, base = read_header(file)
    parts = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        described = json.dumps([entry["dtype"], entry["shape"]]).encode()
        content = _range_digest(file, base + start, end - start, _BLOCKS, every_byte)
        parts[name] = described + content
    return parts


def _range_digest(file: Path, start: int, size: int, blocks: int, every_byte: bool) -> bytes:
    """Digest of evenly spread blocks of a byte range, its first and last ones included."""
    hasher = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=_DIGEST_BYTES)
    with open(file, "rb") as stream:
        if every_byte or size <= blocks * _BLOCK_BYTES:
            stream.seek(start)
            for offset in range(0, size, _READ_BYTES):
                hasher.update(stream.read(min(_READ_BYTES, size - offset)))
        else:
            for block in range(blocks):
                stream.seek(start + (size - _BLOCK_BYTES) * block // (blocks - 1))
                hasher.update(stream.read(_BLOCK_BYTES))
    return hasher.digest()
