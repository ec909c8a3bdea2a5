"""Builds the student from a checkpoint or a configuration, checks it, and computes its loss.

A student is a Hugging Face causal language model whose output head is replaced by a
`DistillationHead` with the same parameters. Two properties are checked on six tokens: packed
documents cannot attend to each other, and the head alone produces the model's logits.

Shapes: B packed sequences, L their padded length, H hidden size, V vocabulary.
"""

import dataclasses
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from schemas.console.text import did_you_mean
from schemas.errors import StudentError
from trainer.config.student import StudentConfig
from trainer.config.train import LossConfig
from trainer.head.distillation_head import DistillationHead
from trainer.head.fused_head import LogitTransform
from trainer.losses.targets import SparseTargets
from trainer.student.lora import add_adapters

# transformers 5 still accepts these, although no config class declares them.
_LEGACY_FIELDS = frozenset({"rope_theta", "rope_scaling", "attn_implementation", "torch_dtype"})


class StudentWithHead(nn.Module):
    """A causal language model that maps tokens to the loss, for `deepspeed.initialize`.

    Attributes:
        model: the Hugging Face model with the replaced head; save this one.
    """

    def __init__(self, model: PreTrainedModel, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        install_head(model)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, targets: SparseTargets, loss: LossConfig
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of one packed micro-batch.

        Args:
            input_ids: [B, L] int64, packed documents.
            position_ids: [B, L] int64, restarting at 0 in every document; this alone keeps
                attention within documents.
            targets: labels of the micro-batch, on the device of `input_ids`.
            loss: the training loss.

        Returns:
            See `trainer.head.fused_head.fused_distillation_loss`.
        """
        hidden = hidden_states(self.model, input_ids, position_ids)
        result: tuple[Tensor, dict[str, Tensor]] = self.model.get_output_embeddings()(
            hidden, targets, loss
        )
        return result


def build_student(config: StudentConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads or initialises the student and its tokenizer, with adapters if configured.

    The same configuration gives the same weights on every rank and machine: a random student is
    initialised on the CPU in float32 from its own seed, then cast.

    Returns:
        The model, in training mode and on the CPU, and the tokenizer.

    Raises:
        StudentError: the path does not exist, configuration or weights are invalid, or the model
            cannot train on packed documents.
    """
    tokenizer = load_tokenizer(config.tokenizer or config.path)
    if config.path:
        model = load_model(config.path, config.dtype, config.attn_implementation)
    else:
        model = _random_model(config, tokenizer)
    check_student(model)
    if config.lora is not None:
        add_adapters(model, config.lora, config.seed)
    return model.train(), tokenizer


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or hub name.

    Raises:
        StudentError: it does not exist or cannot be used.
    """
    _check_path(path, "tokenizer")
    return _user_call(f"student tokenizer {path}", AutoTokenizer.from_pretrained, path)


def load_model(path: str, dtype: str, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """Loads a causal language model with all its weights from a folder or hub name.

    Raises:
        StudentError: it does not exist, cannot be used, or lacks some of its weights.
    """
    _check_path(path, "model")
    model, report = _user_call(
        f"model {path}",
        AutoModelForCausalLM.from_pretrained,
        path,
        dtype=getattr(torch, dtype),
        attn_implementation=attn_implementation,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise StudentError(
            f"the weights in {path} lack {len(missing)} tensors of the model, first {missing[0]}, "
            "which would be initialised randomly; use a complete checkpoint"
        )
    return model


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Hidden states [B, L, H] before the head, of packed documents [B, L]."""
    # With a cache, transformers does not treat restarting position ids as a new document.
    output = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def output_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The model's transformed logits, [..., V] float32, from its hidden states [..., H]."""
    logits: Tensor = model.get_output_embeddings()(hidden).float()
    logit_transform(model.config.get_text_config()).apply_(logits)
    return logits


def logit_transform(config: PreTrainedConfig) -> LogitTransform:
    """Reads the model's logit scale and soft cap from its Hugging Face config."""
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))


def install_head(model: PreTrainedModel) -> DistillationHead:
    """Replaces the model's output head by a `DistillationHead` with the same parameters.

    Raises:
        StudentError: the model has no head, or its head is more than a matrix and a bias (with
            LoRA, for example), which the fused loss would ignore.
    """
    head = model.get_output_embeddings()
    if isinstance(head, DistillationHead):
        return head
    if type(head) is not nn.Linear:
        raise StudentError(
            f"the student's output head is a {type(head).__name__}, expected a plain nn.Linear; "
            "adapters on the head are not supported, leave it out of their targets"
        )
    name = next(name for name, module in model.named_modules() if module is head)
    fused = DistillationHead.around(head, logit_transform(model.config.get_text_config()))
    fused.train(head.training)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, fused)
    return fused


def check_student(model: PreTrainedModel) -> None:
    """Checks on six tokens that packing is exact and that the head alone produces the logits.

    Two documents of three tokens are packed. Changing the first must not change the hidden states
    of the second, and the model's own logits must follow from its hidden states.

    flash_attention_2 runs only on GPUs. On a CPU the head is checked with another kernel, and
    packing is not checked, since flash_attention_2 separates documents in its own way.

    Raises:
        StudentError: either check fails.
    """
    config, training = model.config, model.training
    wanted = config._attn_implementation
    model.eval()
    try:
        with torch.no_grad():
            if wanted == "flash_attention_2" and model.device.type == "cpu":
                # Not by set_attn_implementation, which needs a GPU to restore flash_attention_2.
                config._attn_implementation = "eager"
            else:
                _check_packing(model)
            _check_head(model)
    finally:
        config._attn_implementation = wanted
        model.train(training)


def _six_tokens(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Token ids and position ids, [1, 6] each, of two documents."""
    ids = torch.arange(6, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    return ids, torch.arange(3, device=model.device).repeat(2)[None]


def _check_packing(model: PreTrainedModel) -> None:
    tokens, positions = _six_tokens(model)
    changed = torch.cat([tokens[:, :3].flip(1), tokens[:, 3:]], 1)
    hidden = hidden_states(model, tokens, positions)
    leak = (hidden - hidden_states(model, changed, positions))[:, 3:].abs().max()
    if not leak <= 1e-3 * hidden.abs().max():
        raise StudentError(
            f"{type(model).__name__} with {model.config._attn_implementation} attention lets "
            "packed documents attend to each other (it ignores restarting position ids); "
            "choose another student.attn_implementation or architecture"
        )


def _check_head(model: PreTrainedModel) -> None:
    tokens, positions = _six_tokens(model)
    logits = output_logits(model, hidden_states(model, tokens, positions))
    expected = model(input_ids=tokens, position_ids=positions, use_cache=False).logits.float()
    # Loose tolerance: the two paths round differently in half precision.
    if not torch.allclose(logits, expected, rtol=2e-2, atol=2e-2 * float(expected.std())):
        raise StudentError(
            f"{type(model).__name__} computes its logits with more than a head, a scale and a soft "
            "cap, which the fused loss does not support; choose another architecture"
        )


def _random_model(config: StudentConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model of `config.config` with weights from `config.seed`."""
    fields = dict(config.config)
    model_type = fields.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(model_type, CONFIG_MAPPING)
        raise StudentError(f"student.config.model_type = {model_type!r} is not known{hint}")
    _check_fields(model_type, fields)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, getattr(tokenizer, name))
    num_ids = 1 + max(tokenizer.get_vocab().values())
    if fields.setdefault("vocab_size", num_ids) < num_ids:
        raise StudentError(
            f"student.config.vocab_size = {fields['vocab_size']} is less than the {num_ids} ids of "
            f"the tokenizer {config.tokenizer}; remove it or give at least {num_ids}"
        )

    def build() -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return AutoModelForCausalLM.from_config(
                AutoConfig.for_model(model_type, **fields),
                dtype=torch.float32,
                attn_implementation=config.attn_implementation,
            )

    model: PreTrainedModel = _user_call("student.config", build)
    # Parameters only: rotary frequencies (buffers) of a loaded model are float32 in any dtype.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, config.dtype))
    return model


def _check_fields(model_type: str, fields: dict[str, Any]) -> None:
    """Refuses fields that the architecture lacks, which transformers would store and ignore."""
    kind = CONFIG_MAPPING[model_type]
    known = _LEGACY_FIELDS | set(inspect.signature(kind.__init__).parameters)
    known |= set(kind().to_dict()) | set(getattr(kind, "attribute_map", {}))
    if dataclasses.is_dataclass(kind):
        known |= {field.name for field in dataclasses.fields(kind)}
    for name in fields:
        if name not in known:
            hint = did_you_mean(name, known)
            raise StudentError(
                f"student.config.{name}: a {model_type} config has no such field{hint}"
            )


def _check_path(path: str, what: str) -> None:
    """Refuses the path of a missing folder, which transformers would look for on the hub."""
    looks_local = path.startswith((".", "~", os.sep)) or path.count("/") != 1
    if not Path(path).exists() and (looks_local or Path(path).parent.is_dir()):
        raise StudentError(
            f"no {what} at {path}: the folder does not exist (relative to {Path.cwd()}); "
            "use a checkpoint folder or a hub name"
        )


def _user_call(what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls transformers with user input; turns any exception into a one-line StudentError."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise StudentError(f"{what} cannot be used: {reason[:300]}") from error
