"""The reference teacher: plain transformers. Slow and simple; what other labels are checked by."""

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
from labeler.label_head.position_labels import PositionLabels, label_logits
from labeler.teacher_model.identity import (
    context_tokens,
    eos_ids,
    load_model_config,
    model_folder,
    model_vocab_size,
    resolve_dtype,
    resolve_head_dtype,
)
from labeler.teachers.audits import audit_of, audited_labels
from labeler.teachers.protocol import OnRow, RowLabels, ignore_row, usable_or_failure
from labeler.teachers.request_checks import refuse_generation, refuse_request, row_uniforms
from schemas.errors import RowFailure, TeacherError, first_line
from schemas.record.spans import span_targets
from schemas.spec import GenerationSpec, RecordSpec

# Padded tokens of one forward pass, and logits that may exist at once.
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
            config: which one.
            record: what to compute.
            device: for torch; None: a GPU where there is one.

        Raises:
            TeacherError: it cannot be loaded.
        """
        self._record = record
        self._config = config
        model_config = load_model_config(config)
        self._vocab_size = model_vocab_size(model_config)
        self._context = context_tokens(config)
        self._eos_ids = eos_ids(config)
        self._lock = threading.Lock()
        best = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device or best)
        with self._failing_as("cannot be put there"):
            self._model = _load(config, model_config).to(self._device).eval()
        self._keeps_logits = "logits_to_keep" in inspect.signature(self._model.forward).parameters

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        """The model to oneself, without gradients; what fails in it is the engine's failure."""
        with self._lock, torch.inference_mode(), self._failing_as("failed in a forward pass"):
            yield

    @contextlib.contextmanager
    def _failing_as(self, what: str) -> Iterator[None]:
        """Turns errors of torch into a ``TeacherError``, for which rows can be tried apart."""
        try:
            yield
        except TeacherError:
            raise
        except (RuntimeError, MemoryError) as error:
            advice = "see whether the device works"
            if isinstance(error, torch.OutOfMemoryError | MemoryError):
                advice = "lower text.max_tokens, or use a smaller teacher.dtype or a larger device"
                # Frames that the error holds hold the tensors that took the memory.
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
        results: list[RowLabels | RowFailure | None] = [
            refuse_request(tokens, spans, self._vocab_size, self._context)
            for tokens, spans in zip(token_ids, label_spans, strict=True)
        ]
        valid = [row for row, refused in enumerate(results) if refused is None]
        with self._forward():
            for batch in _batches(valid, [len(tokens) for tokens in token_ids]):
                keys = [row_keys[row].tobytes() for row in batch]
                targets = [span_targets(label_spans[row]) for row in batch]
                labelled = self._label_batch(
                    [token_ids[row] for row in batch], targets, keys, audit_rate
                )
                for row, labels in zip(batch, labelled, strict=True):
                    results[row] = usable_or_failure(labels)
                    on_row(row)
        return [result for result in results if result is not None]

    def _label_batch(
        self,
        rows: list[np.ndarray],
        targets: list[np.ndarray],
        keys: list[bytes],
        audit_rate: float,
    ) -> Iterator[RowLabels]:
        """Labels rows that fit into one forward pass, in as many passes as their logits need."""
        padded, mask = _pad(rows, self._device)
        in_work = [
            _Row(
                row_targets,
                row_uniforms(self._record, key, row_targets),
                audited_labels(key, len(row_targets), audit_rate),
            )
            for row_targets, key in zip(targets, keys, strict=True)
        ]
        for positions, logits in self._all_logits(padded, mask, targets):
            for index, row in enumerate(in_work):
                here, at = row.labels_at(positions)
                row_logits = logits[index, torch.from_numpy(at).to(self._device)]
                next_ids = padded[index, torch.from_numpy(row.targets[here]).to(self._device)]
                row.add(row_logits, next_ids, here, self._record)
        return (row.labels() for row in in_work)

    def logprobs(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        entry_ids: Sequence[np.ndarray],
    ) -> list[np.ndarray]:
        """Log-probabilities of given ids, from a plain log-softmax in float64.

        Args:
            token_ids: one integer array [L] a row, within the model's context.
            label_spans: one flat array of [start, end) pairs a row.
            entry_ids: one integer array [N, K] a row, for each target.

        Returns:
            float64 [N, K] a row, nats.
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
        """Positions that are followed by a target of any row, and their logits, part by part."""
        wanted = np.unique(np.concatenate(targets)) - 1
        step = max(1, _LOGIT_ELEMENTS // (len(padded) * self._vocab_size))
        for start in range(0, len(wanted), step):
            positions = wanted[start : start + step]
            yield positions, self._logits(padded, mask, positions)

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
        on_row: OnRow = ignore_row,
    ) -> list[list[np.ndarray] | RowFailure]:
        """See ``Teacher.generate``. One sample at a time, each from its own seed."""
        results: list[list[np.ndarray] | RowFailure] = []
        with self._forward():
            for row, (prompt, prompt_seeds) in enumerate(zip(prompt_ids, seeds, strict=True)):
                refused = refuse_generation(
                    prompt, generation.max_tokens, self._vocab_size, self._context
                )
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


@dataclass
class _Row:
    """A row that is being labelled, a part of its positions at a time.

    Attributes:
        targets: int64 [N], target indices, rising.
        uniforms: float64 [N, numbers of a position], of the draws; None where there are none.
        audited: int64 [A], labels that are audited, rising.
    """

    targets: np.ndarray
    uniforms: np.ndarray | None
    audited: np.ndarray
    parts: list[PositionLabels] = field(default_factory=list)
    audits: list[torch.Tensor] = field(default_factory=list)

    def labels_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The labels that the given positions decide, and the places of these positions."""
        here = np.flatnonzero(np.isin(self.targets - 1, positions))
        return here, np.searchsorted(positions, self.targets[here] - 1)

    def add(
        self, logits: torch.Tensor, next_ids: torch.Tensor, here: np.ndarray, record: RecordSpec
    ) -> None:
        """Labels the positions of the labels ``here`` from their logits."""
        numbers = None if self.uniforms is None else self.uniforms[here]
        labels = label_logits(logits, next_ids, record, numbers)
        self.parts.append(labels)
        at = torch.from_numpy(np.flatnonzero(np.isin(here, self.audited))).to(logits.device)
        if len(at):
            self.audits.append(audit_logits(logits[at], labels.entry_ids[at], labels.head_len[at]))

    def labels(self) -> RowLabels:
        """All of them."""
        columns: list[Any] = []
        for column in zip(*self.parts, strict=True):
            present = [part.cpu() for part in column if part is not None]
            columns.append(torch.cat(present).numpy() if present else None)
        if self.audits:
            columns.append(audit_of(self.audited, torch.cat(self.audits).cpu().numpy()))
        return RowLabels(*columns)
