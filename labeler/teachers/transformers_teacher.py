"""The reference teacher: plain transformers. Slow and simple; what other labels are checked by."""

import importlib.metadata
import inspect
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from labeler.config import TeacherConfig
from labeler.identity import (
    context_tokens,
    eos_ids,
    load_model_config,
    model_folder,
    model_vocab_size,
    resolve_dtype,
    resolve_head_dtype,
)
from labeler.label_head import PositionLabels, label_logits
from labeler.teachers.base import (
    RowFailure,
    RowLabels,
    refuse_generation,
    refuse_request,
    row_uniforms,
    span_targets,
    usable_or_failure,
)
from schemas.errors import TeacherError
from schemas.spec import GenerationSpec, RecordSpec

# Padded tokens of one forward pass, and logits that may exist at once.
_BATCH_TOKENS = 4096
_LOGIT_ELEMENTS = 2**26


class TransformersTeacher:
    """A causal language model run by transformers; see ``labeler.teachers.base.Teacher``.

    ``teacher.engine`` is passed to ``from_pretrained``.
    """

    def __init__(self, config: TeacherConfig, record: RecordSpec) -> None:
        self._record = record
        self._config = config
        model_config = load_model_config(config)
        self._vocab_size = model_vocab_size(model_config)
        self._context = context_tokens(config)
        self._eos_ids = eos_ids(config)
        self._lock = threading.Lock()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _load(config, model_config).to(self._device).eval()
        self._keeps_logits = "logits_to_keep" in inspect.signature(self._model.forward).parameters

    def label(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        row_keys: np.ndarray,
    ) -> list[RowLabels | RowFailure]:
        """See ``Teacher.label``."""
        results: list[RowLabels | RowFailure | None] = [
            refuse_request(tokens, spans, self._vocab_size, self._context)
            for tokens, spans in zip(token_ids, label_spans, strict=True)
        ]
        valid = [row for row, refused in enumerate(results) if refused is None]
        with self._lock, torch.inference_mode():
            for batch in _batches(valid, [len(tokens) for tokens in token_ids]):
                targets = [span_targets(label_spans[row]) for row in batch]
                drawn_by = [
                    row_uniforms(self._record, row_keys[row].tobytes(), row_targets)
                    for row, row_targets in zip(batch, targets, strict=True)
                ]
                labelled = self._label_batch([token_ids[row] for row in batch], targets, drawn_by)
                for row, labels in zip(batch, labelled, strict=True):
                    results[row] = usable_or_failure(labels)
        return [result for result in results if result is not None]

    def _label_batch(
        self,
        rows: list[np.ndarray],
        targets: list[np.ndarray],
        drawn_by: list[np.ndarray | None],
    ) -> Iterator[RowLabels]:
        """Labels rows that fit into one forward pass, in as many passes as their logits need."""
        padded, mask = _pad(rows, self._device)
        wanted = np.unique(np.concatenate(targets)) - 1
        step = max(1, _LOGIT_ELEMENTS // (len(rows) * self._vocab_size))
        parts: list[list[PositionLabels]] = [[] for _ in rows]
        for start in range(0, len(wanted), step):
            positions = wanted[start : start + step]
            logits = self._logits(padded, mask, positions)
            for index, row_targets in enumerate(targets):
                is_here = np.isin(row_targets - 1, positions)
                here, numbers = row_targets[is_here], drawn_by[index]
                at = torch.from_numpy(np.searchsorted(positions, here - 1)).to(self._device)
                next_ids = padded[index, torch.from_numpy(here).to(self._device)]
                numbers = None if numbers is None else numbers[is_here]
                parts[index].append(
                    label_logits(logits[index, at], next_ids, self._record, numbers)
                )
        return (_row_labels(row_parts) for row_parts in parts)

    def _logits(
        self, padded: torch.Tensor, mask: torch.Tensor, positions: np.ndarray
    ) -> torch.Tensor:
        """Logits [B, positions, V] of the tokens that follow ``positions``.

        Padding is on the right, where a causal model cannot see it, and what comes after the last
        position is left out.
        """
        end = int(positions[-1]) + 1
        keep = torch.from_numpy(positions).to(self._device)
        extra: dict[str, Any] = {"logits_to_keep": keep} if self._keeps_logits else {}
        output = self._model(
            input_ids=padded[:, :end], attention_mask=mask[:, :end], use_cache=False, **extra
        )
        logits: torch.Tensor = output.logits if self._keeps_logits else output.logits[:, keep]
        return logits

    def generate(
        self,
        prompt_ids: Sequence[np.ndarray],
        generation: GenerationSpec,
        seeds: Sequence[Sequence[int]],
    ) -> list[list[np.ndarray] | RowFailure]:
        """See ``Teacher.generate``. One sample at a time, each from its own seed."""
        results: list[list[np.ndarray] | RowFailure] = []
        with self._lock, torch.inference_mode():
            for prompt, prompt_seeds in zip(prompt_ids, seeds, strict=True):
                refused = refuse_generation(
                    prompt, generation.max_tokens, self._vocab_size, self._context
                )
                results.append(
                    refused or [self._sample(prompt, generation, seed) for seed in prompt_seeds]
                )
        return results

    def _sample(self, prompt: np.ndarray, generation: GenerationSpec, seed: int) -> np.ndarray:
        from transformers import GenerationConfig

        greedy = generation.temperature == 0.0
        sampling = {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": 0}
        settings = GenerationConfig(
            max_new_tokens=generation.max_tokens,
            do_sample=not greedy,
            eos_token_id=list(self._eos_ids) or None,
            pad_token_id=self._eos_ids[0] if self._eos_ids else 0,
            **({} if greedy else sampling),
        )
        tokens, mask = _pad([prompt], self._device)
        torch.manual_seed(seed)
        output = self._model.generate(tokens, attention_mask=mask, generation_config=settings)
        return output[0, len(prompt) :].cpu().numpy().astype(np.int32)

    def provenance(self) -> dict[str, object]:
        """See ``Teacher.provenance``."""
        return {
            "backend": "transformers",
            "model": self._config.model,
            "transformers": importlib.metadata.version("transformers"),
            "torch": str(torch.__version__),
            "device": str(self._device),
            "engine": dict(self._config.engine),
        }

    def close(self) -> None:
        """See ``Teacher.close``."""
        with self._lock:
            self._model = None


def _load(config: TeacherConfig, model_config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    options = {name: value for name, value in config.engine.items() if name != "hf_overrides"}
    if getattr(model_config.get_text_config(), "attn_logit_softcapping", None) is not None:
        # transformers' fused attention leaves the cap out, without a word.
        options.setdefault("attn_implementation", "eager")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_folder(config),
            config=model_config,
            dtype=getattr(torch, resolve_dtype(config)),
            **options,
        )
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        raise TeacherError(
            f"teacher.model: transformers cannot load {config.model}: {error}"
        ) from error
    if resolve_head_dtype(config) != resolve_dtype(config):
        _cast_head(model, getattr(torch, resolve_head_dtype(config)))
    return model


def _cast_head(model: Any, dtype: torch.dtype) -> None:
    """Gives the lm_head weights and inputs of another dtype; a tied embedding keeps its own."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().to(dtype), requires_grad=False)
    if getattr(head, "bias", None) is not None:
        head.bias = torch.nn.Parameter(head.bias.detach().to(dtype), requires_grad=False)
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))


def _batches(rows: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Rows of similar length, at most ``_BATCH_TOKENS`` padded tokens together."""
    batch: list[int] = []
    for row in sorted(rows, key=lambda row: lengths[row]):
        if batch and lengths[row] * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _pad(rows: list[np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as int64 [B, L], padded with id 0 on the right, and the mask of what is real."""
    longest = max(len(row) for row in rows)
    padded = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.from_numpy(np.asarray(row, dtype=np.int64))
        mask[index, : len(row)] = 1
    return padded.to(device), mask.to(device)


def _row_labels(parts: list[PositionLabels]) -> RowLabels:
    columns: list[Any] = []
    for column in zip(*parts, strict=True):
        present = [part.cpu() for part in column if part is not None]
        columns.append(torch.cat(present).numpy() if present else None)
    return RowLabels(*columns)
