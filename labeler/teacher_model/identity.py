"""Resolves a configured teacher: its folder, its tokenizer, and the digests of its identity.

Identity depends on what the teacher computes, not on its location: copies of a model share an
identity; a model that was trained further gets a new one, even under the same name.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from labeler.config import TeacherConfig
from labeler.teacher_model.vocabulary import (
    check_same_vocabulary,
    check_vocabulary_fits,
    vocabulary,
)
from labeler.teacher_model.weights_digest import first_float_dtype, weight_files, weights_digest
from schemas.errors import TeacherError, first_line
from schemas.spec import TeacherIdentity

_DIGEST_BYTES = 16

# Files to download from a hub: everything except the same weights in other formats.
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")

# Keys of config.json that do not affect the computation; the dtype has its own field.
_NOT_IDENTITY = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
)

# Engine options that affect the computation and have no field of their own.
_NUMERIC_OPTIONS = ("hf_overrides", "kv_cache_dtype", "rope_scaling", "rope_theta")


def teacher_identity(config: TeacherConfig) -> TeacherIdentity:
    """The identity of a configured teacher; with ``backend = "none"``, of its tokenizer only.

    Raises:
        TeacherError: the model is missing or invalid.
        VocabularyError: its tokenizer does not fit the model.
    """
    tokenizer = load_tokenizer(config)
    template = getattr(tokenizer, "chat_template", None)
    template_digest = _digest(template) if template else ""
    if config.backend == "none":
        return TeacherIdentity(
            tokenizer_digest=tokenizer_digest(tokenizer),
            chat_template_digest=template_digest,
            vocab_size=max(vocabulary(tokenizer).values()) + 1,
        )
    folder = model_folder(config)
    model_config = load_model_config(config)
    declared = config.weights_digest  # for a server, whose weights may not be readable
    return TeacherIdentity(
        weights_digest=f"declared:{declared}" if declared else weights_digest(folder),
        config_digest=_config_digest(config),
        tokenizer_digest=tokenizer_digest(tokenizer),
        chat_template_digest=template_digest,
        vocab_size=model_vocab_size(model_config),
        dtype=resolve_dtype(config),
        head_dtype=resolve_head_dtype(config),
        quantization=_quantization(config, model_config),
        model_type=str(model_config.model_type),
    )


def model_folder(config: TeacherConfig) -> Path:
    """The local folder of the teacher's model; a hub name is downloaded into the hub's cache.

    A remote teacher with declared weights needs only config and tokenizer.

    Raises:
        TeacherError: no such folder or reachable hub model exists, or the folder holds no model.
    """
    folder = _resolve(config.model, "teacher.model", not config.weights_digest)
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not config.weights_digest and not weight_files(folder):
        missing.append("weights (*.safetensors)")
    if missing:
        hint = "; or teacher.weights_digest to declare them" if config.backend == "remote" else ""
        raise TeacherError(
            f"teacher.model: {folder} has no {' and no '.join(missing)}; expected a Hugging Face "
            f"model folder with config.json, *.safetensors and the tokenizer's files{hint}"
        )
    return folder


def tokenizer_folder(config: TeacherConfig) -> Path:
    """The local folder of the tokenizer: ``teacher.tokenizer``, else the model's own."""
    if config.tokenizer:
        return _resolve(config.tokenizer, "teacher.tokenizer")
    return _resolve(config.model, "teacher.model", not config.weights_digest)


def _resolve(name: str, field: str, weights: bool = True) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    # A hub name has at most one slash.
    looks_local = name.startswith(("/", ".", "~")) or len(folder.parts) > 2
    if looks_local or folder.exists():
        found = "is not a folder" if folder.exists() else "does not exist"
        raise TeacherError(
            f"{field}: {name} {found} (seen from {os.getcwd()}); expected a folder with "
            "config.json, *.safetensors and tokenizer files, or a name on the Hugging Face hub"
        )
    return _download(name, field, weights)


def _download(name: str, field: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    files = [pattern for pattern in _HUB_FILES if weights or pattern != "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub's client has no common base class for its errors
        raise TeacherError(
            f"{field}: there is no folder {name} (seen from {os.getcwd()}), and no model of that "
            f"name could be downloaded from the Hugging Face hub ({first_line(error)}); expected a "
            "folder with config.json, *.safetensors and tokenizer files, or the name of a hub model"
        ) from error


def load_model_config(config: TeacherConfig) -> Any:
    """The model's transformers configuration, with ``teacher.engine.hf_overrides`` applied.

    Raises:
        TeacherError: config.json is not one that transformers knows.
    """
    from transformers import AutoConfig

    folder = model_folder(config)
    try:
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=trusts_code(config))
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise TeacherError(
            f"teacher.model: {folder / 'config.json'} cannot be used: {first_line(error)}"
        ) from error
    overrides = config.engine.get("hf_overrides", {})
    if not isinstance(overrides, dict):
        raise TeacherError(
            f"teacher.engine.hf_overrides is {overrides!r}; expected a table, because its content "
            "is part of the identity of the labels"
        )
    model_config.update(overrides)
    return model_config


def model_vocab_size(model_config: Any) -> int:
    """The number of ids in the model's softmax, padding rows included.

    Padding ids have tiny probabilities, but leaving them out would change every normaliser.
    """
    return int(model_config.get_text_config().vocab_size)


def context_tokens(config: TeacherConfig) -> int:
    """Maximum sequence length of the teacher, generated tokens included."""
    if config.max_model_len is not None:
        return config.max_model_len
    return int(load_model_config(config).get_text_config().max_position_embeddings)


def load_tokenizer(config: TeacherConfig) -> Any:
    """Loads the teacher's tokenizer and checks it against the model.

    Raises:
        TeacherError: the folder has no tokenizer.
        VocabularyError: it has ids that the model lacks, maps tokens to other ids than the model's
            own tokenizer, or is far smaller than the model's vocabulary.
    """
    folder = tokenizer_folder(config)
    tokenizer = _load_tokenizer_folder(folder, config)
    if config.backend == "none":
        return tokenizer
    if config.tokenizer and has_tokenizer(model_folder(config)):
        own = _load_tokenizer_folder(model_folder(config), config)
        check_same_vocabulary(tokenizer, own, str(folder), str(model_folder(config)))
    size = model_vocab_size(load_model_config(config))
    check_vocabulary_fits(tokenizer, size, str(folder), config.model)
    return tokenizer


def _load_tokenizer_folder(folder: Path, config: TeacherConfig) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts_code(config))
    except Exception as error:  # tokenizers raises plain Exception on a bad file
        raise TeacherError(
            f"no tokenizer can be loaded from {folder}: {first_line(error)}; expected "
            "tokenizer.json and tokenizer_config.json there, or teacher.tokenizer to name another "
            "folder"
        ) from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder contains a tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    return any((folder / name).is_file() for name in names)


def eos_ids(config: TeacherConfig) -> tuple[int, ...]:
    """Ids that end a response: those of generation_config.json, config.json and the tokenizer."""
    from transformers import GenerationConfig

    found: set[int] = set()
    folder = model_folder(config)
    sources = [load_model_config(config).get_text_config()]
    if (folder / "generation_config.json").is_file():
        sources.append(GenerationConfig.from_pretrained(folder))
    if has_tokenizer(tokenizer_folder(config)):
        sources.append(load_tokenizer(config))
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or ())
    return tuple(sorted(found))


def trusts_code(config: TeacherConfig) -> bool:
    """Whether the configuration allows code from the model's folder to run."""
    return bool(config.engine.get("trust_remote_code", False))


def resolve_dtype(config: TeacherConfig) -> str:
    """The dtype of the model's body: as configured, or that of the checkpoint for ``auto``.

    Engines have their own ``auto``, which may round a float32 checkpoint to 16 bits; labels must
    not depend on it.

    Raises:
        TeacherError: the dtype is not supported.
    """
    if config.dtype != "auto":
        return _known_dtype(config.dtype, "teacher.dtype")
    declared = getattr(load_model_config(config).get_text_config(), "dtype", None)
    name = str(declared or first_float_dtype(model_folder(config))).removeprefix("torch.")
    return _known_dtype(name, f"the checkpoint {config.model}")


def resolve_head_dtype(config: TeacherConfig) -> str:
    """The dtype of the lm_head's product; ``auto`` is that of the body."""
    if config.head_dtype == "auto":
        return resolve_dtype(config)
    return _known_dtype(config.head_dtype, "teacher.head_dtype")


def _known_dtype(name: str, where: str) -> str:
    if name not in ("float32", "bfloat16", "float16"):
        raise TeacherError(f"{where}: dtype {name}; expected float32, bfloat16 or float16")
    return name


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of how text becomes ids: vocabulary, merges, normaliser, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # Truncation and padding are settings of the last call, not of the tokenizer.
        rules = {key: content[key] for key in content if key not in ("truncation", "padding")}
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": vocabulary(tokenizer)}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _digest({"rules": rules, "special": special})


def _config_digest(config: TeacherConfig) -> str:
    """Digest of the raw config.json, because library defaults change between versions."""
    content = json.loads((model_folder(config) / "config.json").read_text(encoding="utf-8"))
    fields = dict(_without(content, _NOT_IDENTITY))
    options = {name: config.engine[name] for name in _NUMERIC_OPTIONS if name in config.engine}
    return _digest({"config": fields, "options": options})


def _without(fields: dict[str, Any], names: frozenset[str]) -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        if key not in names:
            yield key, dict(_without(value, names)) if isinstance(value, dict) else value


def _quantization(config: TeacherConfig, model_config: Any) -> str | None:
    if config.engine.get("quantization"):
        return str(config.engine["quantization"])
    declared = getattr(model_config, "quantization_config", None)
    if declared is None:
        return None
    fields = declared if isinstance(declared, dict) else declared.to_dict()
    return str(fields.get("quant_method", "unknown"))


def _digest(content: object) -> str:
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False).encode()
    return hashlib.blake2b(canonical, digest_size=_DIGEST_BYTES).hexdigest()
