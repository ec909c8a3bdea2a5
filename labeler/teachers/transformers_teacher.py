"""The reference teacher in plain transformers: slow, simple, the baseline for the others."""

import contextlib
import importlib.metadata
import inspect
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from labeler.config import TeacherConfig
from labeler.label_head.audit_logits import audit_logits
from labeler.label_head.labels import COLUMNS
from labeler.label_head.position_labels import PositionLabels, concatenate, label_logits
from labeler.teacher_model.identity import (
    eos_ids,
    load_model_config,
    model_folder,
    resolve_dtype,
    resolve_head_dtype,
)
from labeler.teachers.audits import Audit, audited_labels
from labeler.teachers.draw_uniforms import row_uniforms
from labeler.teachers.protocol import OnRow, RowLabels, ignore_row, usable_or_failure
from labeler.teachers.request_checks import ModelLimits
from schemas.errors import RowFailure, TeacherError, first_line
from schemas.record.spans import span_targets
from schemas.spec import GenerationSpec, RecordSpec

# Limits: padded tokens of one forward pass, and logits in memory at once.
_BATCH_TOKENS = 4096
_LOGIT_ELEMENTS = 2**26


class TransformersTeacher:
    """A causal language model run by transformers; see ``labeler.teachers.protocol.Teacher``.

    ``teacher.engine`` is passed to ``from_pretrained``.
    """

    shareable: ClassVar[bool] = False

    def __init__(
        self, config: TeacherConfig, record: RecordSpec, device: str | None = None
    ) -> None:
        """Loads the model.

        Args:
            config: configuration of the model.
            record: what to compute.
            device: torch device; None: a GPU if available.

        Raises:
            TeacherError: the model cannot be loaded.
        """
        self._record = record
        self._config = config
        self._limits = ModelLimits.load(config)
        self._eos_ids = eos_ids(config)
        self._lock = threading.Lock()
        best = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device or best)
        with self._failing_as("cannot be moved there"):
            self._model = _load(config).to(self._device).eval()
        self._keeps_logits = "logits_to_keep" in inspect.signature(self._model.forward).parameters

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        """Exclusive use of the model, without gradients; failures become engine failures."""
        with self._lock, torch.inference_mode(), self._failing_as("failed in a forward pass"):
            yield

    @contextlib.contextmanager
    def _failing_as(self, what: str) -> Iterator[None]:
        """Converts torch errors to ``TeacherError``, after which rows are tried one by one."""
        try:
            yield
        except TeacherError:
            raise
        except (RuntimeError, MemoryError) as error:
            advice = "check that the device works"
            if isinstance(error, torch.OutOfMemoryError | MemoryError):
                advice = "lower text.max_tokens, or use a smaller teacher.dtype or a larger device"
                # The traceback's frames keep the tensors that filled the memory alive.
                traceback.clear_frames(error.__traceback__)
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
            raise TeacherError(
                f"teacher.model: {self._config.model} on {self._device} {what} "
                f"({type(error).__name__}: {first_line(error)}); {advice}"
            ) from error

    def label(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        row_keys: np.ndarray,
        audit_rate: float = 0.0,
        on_row: OnRow = ignore_row,
    ) -> list[RowLabels | RowFailure]:
        """See ``Teacher.label``."""
        results = self._limits.refuse_requests(token_ids, label_spans)
        valid = [row for row, refused in enumerate(results) if refused is None]
        with self._forward():
            for batch in _batches(valid, [len(tokens) for tokens in token_ids]):
                states = [
                    _RowState.create(
                        self._record, label_spans[row], row_keys[row].tobytes(), audit_rate
                    )
                    for row in batch
                ]
                self._label_batch([token_ids[row] for row in batch], states)
                for row, state in zip(batch, states, strict=True):
                    results[row] = usable_or_failure(state.labels())
                    on_row(row)
        return [result for result in results if result is not None]

    def _label_batch(self, rows: list[np.ndarray], states: list["_RowState"]) -> None:
        """Labels rows that fit into one forward pass, in as many passes as their logits need."""
        padded, mask = _pad(rows, self._device)
        for positions, logits in self._all_logits(padded, mask, [row.targets for row in states]):
            for index, row in enumerate(states):
                here, at = row.labels_at(positions)
                if len(here):
                    row_logits = logits[index, torch.from_numpy(at).to(self._device)]
                    next_ids = padded[index, torch.from_numpy(row.targets[here]).to(self._device)]
                    row.add(row_logits, next_ids, here, self._record)

    def logprobs(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        entry_ids: Sequence[np.ndarray],
    ) -> list[np.ndarray]:
        """Log-probabilities of given ids by a plain log-softmax in float64.

        Args:
            token_ids: one integer array [L] per row, within the model's context.
            label_spans: one flat array of [start, end) pairs per row.
            entry_ids: one integer array [N, K] per row, for its N targets.

        Returns:
            float64 [N, K] per row, nats.
        """
        results = []
        with self._forward():
            for tokens, spans, ids in zip(token_ids, label_spans, entry_ids, strict=True):
                targets = span_targets(spans)
                found = np.empty(ids.shape)
                padded, mask = _pad([tokens], self._device)
                for positions, logits in self._all_logits(padded, mask, [targets]):
                    here = np.isin(targets - 1, positions)
                    wanted = torch.from_numpy(ids[here].astype(np.int64)).to(self._device)
                    full = torch.log_softmax(logits[0].double(), dim=-1)
                    found[here] = full.gather(1, wanted).cpu().numpy()
                results.append(found)
        return results

    def _all_logits(
        self, padded: torch.Tensor, mask: torch.Tensor, targets: list[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yields positions that precede a target of any row, with their logits, in parts."""
        wanted = np.unique(np.concatenate(targets)) - 1
        step = max(1, _LOGIT_ELEMENTS // (len(padded) * self._limits.vocab_size))
        for start in range(0, len(wanted), step):
            positions = wanted[start : start + step]
            yield positions, self._logits(padded, mask, positions)

    def _logits(
        self, padded: torch.Tensor, mask: torch.Tensor, positions: np.ndarray
    ) -> torch.Tensor:
        """Logits [B, positions, V] of the tokens that follow ``positions``.

        Padding is on the right, where a causal model does not see it. Tokens after the last
        position are left out.
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
        on_row: OnRow = ignore_row,
    ) -> list[list[np.ndarray] | RowFailure]:
        """See ``Teacher.generate``. Samples one response at a time, each from its own seed."""
        results: list[list[np.ndarray] | RowFailure] = []
        with self._forward():
            for row, (prompt, prompt_seeds) in enumerate(zip(prompt_ids, seeds, strict=True)):
                refused = self._limits.refuse_generation(prompt, generation.max_tokens)
                samples = []
                for seed in prompt_seeds if refused is None else ():
                    samples.append(self._sample(prompt, generation, seed))
                    on_row(row)
                results.append(refused or samples)
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


def _load(config: TeacherConfig) -> Any:
    from transformers import AutoModelForCausalLM

    model_config = load_model_config(config)
    options = {name: value for name, value in config.engine.items() if name != "hf_overrides"}
    if getattr(model_config.get_text_config(), "attn_logit_softcapping", None) is not None:
        # The fused attention of transformers silently ignores the cap.
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
    """Casts the weights and inputs of the lm_head; a tied embedding keeps its dtype."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().to(dtype), requires_grad=False)
    if getattr(head, "bias", None) is not None:
        head.bias = torch.nn.Parameter(head.bias.detach().to(dtype), requires_grad=False)
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))


def _batches(rows: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Groups rows of similar length, at most ``_BATCH_TOKENS`` padded tokens each."""
    batch: list[int] = []
    for row in sorted(rows, key=lambda row: lengths[row]):
        if batch and lengths[row] * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _pad(rows: list[np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as int64 [B, L], padded with id 0 on the right, and the attention mask."""
    longest = max(len(row) for row in rows)
    padded = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.from_numpy(np.asarray(row, dtype=np.int64))
        mask[index, : len(row)] = 1
    return padded.to(device), mask.to(device)


@dataclass
class _RowState:
    """A row that is being labelled, some of its positions at a time.

    Attributes:
        targets: int64 [N], target indices, rising.
        uniforms: float64 [N, numbers per position], for the draws; None for kinds without draws.
        audited: int64 [A], labels to audit, rising.
    """

    targets: np.ndarray
    uniforms: np.ndarray | None
    audited: np.ndarray
    parts: list[PositionLabels] = field(default_factory=list)
    audits: list[torch.Tensor] = field(default_factory=list)

    @staticmethod
    def create(
        record: RecordSpec, spans: np.ndarray, row_key: bytes, audit_rate: float
    ) -> "_RowState":
        targets = span_targets(spans)
        audited = audited_labels(row_key, len(targets), audit_rate)
        return _RowState(targets, row_uniforms(record, row_key, targets), audited)

    def labels_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The labels that the given positions predict, and where in ``positions`` each is."""
        here = np.flatnonzero(np.isin(self.targets - 1, positions))
        return here, np.searchsorted(positions, self.targets[here] - 1)

    def add(
        self, logits: torch.Tensor, next_ids: torch.Tensor, here: np.ndarray, record: RecordSpec
    ) -> None:
        """Computes the labels ``here`` from their logits."""
        numbers = None if self.uniforms is None else self.uniforms[here]
        labels = label_logits(logits, next_ids, record, numbers)
        self.parts.append(labels)
        at = torch.from_numpy(np.flatnonzero(np.isin(here, self.audited))).to(logits.device)
        if len(at):
            self.audits.append(audit_logits(logits[at], labels.entry_ids[at], labels.head_len[at]))

    def labels(self) -> RowLabels:
        """All labels of the row, on the host."""
        labels = concatenate(self.parts)
        columns: dict[str, Any] = {
            name: None if column is None else column.cpu().numpy()
            for name, column in zip(COLUMNS, labels.columns(), strict=True)
        }
        audit = None
        if self.audits:
            audit = Audit.from_columns(self.audited, torch.cat(self.audits).cpu().numpy())
        return RowLabels(**columns, audit=audit)
