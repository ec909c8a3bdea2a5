"""The model of ``label.toml``; all defaults of the labeler are on its fields.

Imports nothing heavier than pydantic, so that help and configuration errors are instant.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from schemas.config import Count, StrictModel, count_bounds
from schemas.spec import GenerationSpec, RecordSpec


class CorpusConfig(StrictModel):
    """Location of the corpus and content of its rows."""

    path: str = Field(description="file, folder or glob pattern, as a path or any fsspec URL")
    format: Literal["parquet", "jsonl", "text", "hf"] = Field(
        default="parquet",
        description="file format; text: one document per file; hf: a saved Hugging Face dataset",
    )
    glob: str = Field(
        default="", description="file name pattern within a folder; empty: that of the format"
    )
    kind: Literal["text", "chat", "pair", "ids"] = Field(
        default="text",
        description="content of a row: a text, a chat, a prompt with its response, or token ids",
    )
    column: str = Field(
        default="",
        description="column to read; empty: text for kind text, messages for chat, token_ids for "
        "ids",
    )
    prompt_column: str = Field(default="prompt", description="kind pair: column of the prompt")
    response_column: str = Field(
        default="response", description="kind pair: column of the response"
    )
    spans_column: str = Field(
        default="",
        description="kind ids: column of flat [start, end) pairs of the tokens to label; empty: "
        "all but the first token",
    )
    keep_columns: tuple[str, ...] = Field(
        default=(), description="further columns to keep in the roster, for filters of views"
    )
    piece_bytes: int = Field(
        default=4 * 2**20, ge=1, description="approximate bytes per tokenising task"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.format == "text" and self.kind != "text":
            raise ValueError(
                f'corpus.kind is "{self.kind}", but files of plain text only have kind "text"'
            )
        if self.format == "text" and self.keep_columns:
            raise ValueError("corpus.keep_columns: files of plain text have no columns to keep")
        if self.spans_column and self.kind != "ids":
            raise ValueError('corpus.spans_column is only read where corpus.kind is "ids"')
        return self

    def text_column(self) -> str:
        """The column that kinds text, chat and ids read."""
        by_kind = {"text": "text", "chat": "messages", "ids": "token_ids", "pair": ""}
        return self.column or by_kind[self.kind]


class TextConfig(StrictModel):
    """How documents become token sequences; part of the identity of a label set."""

    max_tokens: int = Field(default=1024, ge=2, description="maximum sequence length, in tokens")
    overlap: int = Field(
        default=128, ge=0, description="tokens of context that each further window repeats"
    )
    add_bos: bool | None = Field(
        default=None,
        description="put BOS before each document; unset: the tokenizer's default",
    )
    add_eos: bool = Field(
        default=True, description="kinds text and pair: put EOS after each document"
    )
    split_long: bool = Field(
        default=True, description="cut long documents into windows; false: quarantine them"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.split_long and self.overlap >= self.max_tokens - 1:
            raise ValueError(
                f"text.overlap is {self.overlap}, which leaves no room for new tokens in windows "
                f"of {self.max_tokens}; it must be less than text.max_tokens - 1"
            )
        return self


class RemoteConfig(StrictModel):
    """How requests are sent to a running vLLM server; does not affect labels."""

    served_model: str = Field(
        default="",
        description="name under which the server serves the model; empty: the only one it serves",
    )
    api_key_env: str = Field(
        default="",
        description="environment variable, in the teacher's processes, that holds the API key; the "
        "key itself is in no file; empty: no key is sent",
    )
    requests_in_flight: int = Field(default=64, ge=1, description="maximum rows in flight")
    timeout_s: float = Field(default=600.0, gt=0, description="seconds to wait for one response")
    patience_s: float = Field(
        default=300.0,
        ge=0,
        description="seconds to retry, with growing pauses, while the server is overloaded or does "
        "not respond; then the run ends",
    )


class TeacherConfig(StrictModel):
    """The teacher and the engine that runs it."""

    backend: Literal["vllm", "transformers", "remote", "none"] = Field(
        default="vllm",
        description="engine; remote: a running vLLM server; none: tokenise only, for hard labels",
    )
    model: str = Field(
        default="",
        description="folder or hub name of the model, required unless backend is none; a remote "
        "teacher only needs its config.json and tokenizer",
    )
    url: str = Field(default="", description="backend remote: the server, http://HOST:PORT")
    weights_digest: str = Field(
        default="",
        description="backend remote: identity of the weights that the server runs, such as the "
        "hub's commit; empty: those in the folder teacher.model",
    )
    remote: RemoteConfig = Field(
        default=RemoteConfig(), description="backend remote: how requests are sent"
    )
    tokenizer: str = Field(
        default="", description="folder or hub name of the tokenizer; empty: the model's own"
    )
    dtype: str = Field(
        default="auto",
        description="auto, float32, bfloat16 or float16; for a remote teacher, the server's dtype",
    )
    head_dtype: str = Field(
        default="auto", description="dtype of the lm_head's matrix product; auto: as dtype"
    )
    max_model_len: int | None = Field(
        default=None,
        ge=2,
        description="context length of the engine, in tokens; unset: text.max_tokens + 1",
    )
    replicas: Count = Field(
        default=1,
        description="teacher actors: a number, or { min = 1, max = 8 }: min are started at once, "
        "up to max while units wait and the cluster has room",
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, description="GPUs that share each layer of one replica"
    )
    pipeline_parallel_size: int = Field(
        default=1, ge=1, description="groups of GPUs that share the layers of one replica"
    )
    label_path: Literal["auto", "head", "flat"] = Field(
        default="auto",
        description="backend vllm: head: the label head in the engine's workers; flat: vLLM's own "
        "log-probabilities, slower, and only for kind topk without entropy and temperatures; auto: "
        "the head, or flat where the head does not fit this vLLM and the record allows it",
    )
    engine: dict[str, Any] = Field(
        default_factory=dict, description="options passed to the engine unchanged"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.backend != "none" and not self.model:
            raise ValueError(f'teacher.model is needed with teacher.backend = "{self.backend}"')
        if self.backend == "none" and not (self.model or self.tokenizer):
            raise ValueError('teacher.tokenizer is needed with teacher.backend = "none"')
        self._check_remote()
        return self

    @property
    def replica_range(self) -> tuple[int, int]:
        """Fewest and most teacher actors."""
        return count_bounds(self.replicas)

    @property
    def gpus_of_replica(self) -> int:
        """GPUs of one engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def _check_remote(self) -> None:
        remote = self.backend == "remote"
        if remote and not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f'teacher.url is "{self.url}"; teacher.backend = "remote" needs the URL of a vLLM '
                "server, http://HOST:PORT"
            )
        if remote and self.dtype == "auto":
            raise ValueError(
                "teacher.dtype is auto, but a server does not report its dtype; set it to float32, "
                "bfloat16 or float16, because it is part of the identity of the labels"
            )
        for name in ("url", "weights_digest", "remote"):
            if not remote and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f'teacher.{name} only applies to teacher.backend = "remote", but backend is '
                    f'"{self.backend}"; remove it'
                )


class RunConfig(StrictModel):
    """How the job runs; does not affect labels."""

    unit_tokens: int = Field(
        default=2**17, ge=1, description="approximate tokens per commit and per shard"
    )
    unit_rows: int = Field(default=4096, ge=1, description="maximum rows per commit")
    address: str = Field(
        default="",
        description="address of a Ray cluster; empty: RAY_ADDRESS, or else a Ray started here",
    )
    num_cpus: int | None = Field(
        default=None, ge=1, description="CPUs of a Ray started here; unset: all"
    )
    cpus_per_replica: float | None = Field(
        default=None,
        gt=0,
        description="CPUs of a teacher actor; unset: 1 on GPUs, else a share of half of each node",
    )
    gpus_per_replica: float | None = Field(
        default=None,
        ge=0,
        description="GPUs of a teacher actor; unset: what its engine shares, where the cluster has "
        "GPUs",
    )
    threads_per_replica: int | None = Field(
        default=None,
        ge=1,
        description="OpenMP threads of a teacher actor; unset: on CPUs an equal share of the node, "
        "on GPUs Ray's choice",
    )
    waiting_bytes: int = Field(
        default=2**30,
        ge=2**24,
        description="bytes of token ids queued for teachers in Ray's object store, approximately",
    )
    max_restarts: int = Field(
        default=30,
        ge=0,
        description="restarts of a teacher actor; finding one row that crashes engines takes about "
        "4 + log2(unit_rows)",
    )
    max_task_retries: int = Field(
        default=30, ge=0, description="retries of a task whose worker process crashed"
    )
    retry_quarantined: bool = Field(
        default=False, description="retry rows that earlier runs quarantined"
    )
    stall_s: float = Field(
        default=1800.0,
        gt=0.0,
        description="seconds without a result after which an engine, even while starting, is ended "
        "and counts as crashed",
    )
    drain_s: float = Field(
        default=300.0,
        gt=0.0,
        description="seconds for in-flight units to be committed after SIGTERM or Ctrl-C",
    )
    store_patience_s: float = Field(
        default=900.0,
        ge=0.0,
        description="seconds to retry one operation of a store that is full or returns errors; 0: "
        "no retries",
    )


class GatesConfig(StrictModel):
    """Checks that labels pass before they are published; does not affect labels."""

    audit_rate: float = Field(
        default=1 / 256,
        ge=0.0,
        le=1.0,
        description="share of labels compared with the full distribution; 0: none",
    )
    max_kl: float = Field(
        default=1e-3,
        gt=0.0,
        description="mean nats per label that storing may cost a unit; above it, the unit is "
        "quarantined",
    )
    max_missed_mass: float = Field(
        default=1e-3,
        gt=0.0,
        description="probability by which a head may fall short of the most probable ids",
    )
    parity_rows: int = Field(
        default=2,
        ge=0,
        description="rows that a second implementation of the teacher scores, once per label set; "
        "0: none",
    )
    parity_tokens: int = Field(
        default=256, ge=2, description="labels compared in each of these rows, at most"
    )
    max_parity_kl: float | None = Field(
        default=None,
        gt=0.0,
        description="mean nats per label by which the two implementations may differ; unset: 1e-4 "
        "in float32, else 1e-2",
    )


class LabelConfig(StrictModel):
    """A complete ``label.toml``."""

    labels: str = Field(description="URL of the label set")
    view: str = Field(
        default="", description="URL of a view of all rows of this run; empty: no view"
    )
    corpus: CorpusConfig = Field(description="the rows to label")
    text: TextConfig = Field(
        default=TextConfig(), description="how documents become token sequences"
    )
    teacher: TeacherConfig = Field(description="the model that labels, and its engine")
    record: RecordSpec = Field(
        default=RecordSpec(), description="what is stored of each distribution"
    )
    generate: GenerationSpec | None = Field(
        default=None,
        description="sample responses to the rows first, then label these; unset: label the rows",
    )
    gates: GatesConfig = Field(
        default=GatesConfig(), description="checks that labels pass before they are published"
    )
    run: RunConfig = Field(default=RunConfig(), description="how the job runs")

    @model_validator(mode="after")
    def _check(self) -> Self:
        tokens_only = self.record.kind == "tokens"
        if (self.teacher.backend == "none") != tokens_only:
            raise ValueError(
                f'record.kind is "{self.record.kind}", teacher.backend "{self.teacher.backend}"; '
                'kind "tokens" and backend "none" only work together'
            )
        if self.record.teacher_context:
            # Remove once the labeler writes the column.
            raise ValueError(
                "record.teacher_context is true, but a label job cannot write that column yet; "
                "remove it (label sets that have the column can be read)"
            )
        if self.teacher.backend == "remote":
            self._check_served(self.record)
        if self.teacher.max_model_len is not None:
            longest = self.teacher.max_model_len - 1
            if self.text.max_tokens > longest:
                raise ValueError(
                    f"text.max_tokens is {self.text.max_tokens}, but a teacher with "
                    f"teacher.max_model_len = {self.teacher.max_model_len} labels at most {longest}"
                )
        if self.generate is not None:
            self._check_generate(self.generate)
        return self

    def _check_served(self, record: RecordSpec) -> None:
        needs = record.needs_beyond_topk()
        if needs:
            raise ValueError(
                f"[record] has {', '.join(needs)}, but a server sends only the most probable ids: "
                'use kind = "topk", entropy = false and no temperatures, or teacher.backend = '
                '"vllm"'
            )

    def _check_generate(self, generate: GenerationSpec) -> None:
        if self.teacher.backend == "none":
            raise ValueError('[generate] needs a teacher, but teacher.backend is "none"')
        if self.corpus.kind == "pair":
            raise ValueError(
                '[generate] needs prompts, but corpus.kind is "pair"; use text, chat or ids'
            )
        if generate.max_tokens >= self.text.max_tokens:
            raise ValueError(
                f"generate.max_tokens is {generate.max_tokens}, which leaves no room for a prompt "
                f"in text.max_tokens = {self.text.max_tokens}"
            )

    def teacher_with_context(self) -> TeacherConfig:
        """The teacher with ``max_model_len`` filled in: the longest sequence plus one token."""
        if self.teacher.max_model_len is not None:
            return self.teacher
        return self.teacher.model_copy(update={"max_model_len": self.text.max_tokens + 1})
