"""Low-rank adapters, injected by peft and merged on export.

Adapters are injected into the model's own layers, so the model keeps its class, its names and its
head. Frozen weights cost no gradient work in the layers or in the fused head. Checkpoints hold only
the adapters; the base is rebuilt from the configuration, and `base_digest` detects a change in it.
"""

import hashlib

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from schemas.errors import ConfigError, StudentError
from trainer.config.student import LoraConfig, StudentConfig

ADAPTER = "default"
_BASE, _A, _B = ".base_layer.", f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"

_SAMPLED = 4096
"""Values hashed at the start, in the middle and at the end of each frozen tensor."""


def add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Freezes a model and injects adapters into it.

    The adapters' products start at zero, so the model's outputs do not change. The same seed gives
    the same adapters on every rank.

    Raises:
        StudentError: no layer matches; or a match is not an inner linear layer but an embedding or
            the head, whose adapter the fused loss would ignore.
    """
    import peft

    targets = config.target_modules
    wanted = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it, and takes any number
        lora_dropout=config.dropout,
        use_rslora=config.rank_stabilised,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
    )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(wanted, model, ADAPTER)
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise StudentError(f"student.lora.target_modules cannot be used: {reason}") from error
    if model.get_output_embeddings() is not head or model.get_input_embeddings() is not embedding:
        raise StudentError(
            f"student.lora.target_modules = {targets} matches the output head or the embedding, "
            'where adapters are not supported; name inner layers, or use "all-linear"'
        )
    other = [name for name, layer in _adapted(model) if type(layer.base_layer) is not nn.Linear]
    if other:
        kind = type(model.get_submodule(other[0]).base_layer).__name__
        raise StudentError(
            f"student.lora.target_modules = {targets} matches {other[0]}, which is a {kind}; "
            "expected linear layers only"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def scalings(model: nn.Module) -> dict[str, float]:
    """Scaling factor of each adapter, by layer name."""
    return {name: float(layer.scaling[ADAPTER]) for name, layer in _adapted(model)}


def merged(weights: dict[str, Tensor], factors: dict[str, float]) -> dict[str, Tensor]:
    """Returns the weights of an equivalent model without adapters.

    Args:
        weights: state dict of a model with adapters; its tensors are not changed.
        factors: from `scalings`.

    Returns:
        W + factor * B A, computed in float32 and rounded to the dtype of W, under the base model's
        names; other weights unchanged.
    """
    result = {
        name.replace(_BASE, "."): value for name, value in weights.items() if ".lora_" not in name
    }
    for layer, factor in factors.items():
        name = f"{layer}.weight"
        change = weights[layer + _B].float() @ weights[layer + _A].float()
        result[name] = (result[name].float() + factor * change).to(result[name].dtype)
    return result


def base_digest(model: nn.Module) -> str:
    """Hashes the frozen weights: names, shapes, dtypes and sampled values; "" if none is frozen.

    Must be called before weights are partitioned over ranks or cast.
    """
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    if not frozen:
        return ""
    digest = hashlib.sha256()
    for name, parameter in frozen:
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().reshape(-1)
        middle = max(0, (len(flat) - _SAMPLED) // 2)
        for part in (flat[:_SAMPLED], flat[middle : middle + _SAMPLED], flat[-_SAMPLED:]):
            digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def check_base(student: StudentConfig, found: str, expected: str) -> None:
    """Refuses adapters that were trained on a different base.

    Args:
        student: configuration of the base.
        found: digest of the frozen weights.
        expected: digest in the checkpoint.

    Raises:
        ConfigError: they differ.
    """
    if found != expected:
        raise ConfigError(
            f"the frozen weights from {student.path or 'student.config'} have digest "
            f"{found or 'none'}, but the checkpoint was trained on {expected or 'none'}; restore "
            "the base, or choose a new run folder: run=..."
        )


def _adapted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    # Detected by an attribute, so that students without adapters need not import peft.
    return [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "lora_A")]
