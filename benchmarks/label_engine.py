"""One engine, and everything that it is measured on: the child processes of `benchmarks.label`.

A process holds one engine only, and what is compared has to run in one process: prefill, the stock
paths, ours and the floor take turns, so that a machine that grows slow is slow for all of them.
"""

import argparse
import functools
import json
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.label_cases import K, make_folder, make_rows, model_shape, records, teacher_config
from benchmarks.label_figures import Generated, engine_figures, generation_figures
from benchmarks.label_floor import floor_seconds
from benchmarks.label_profile import profile_us
from benchmarks.label_units import label_units, make_requests, prompt_requests
from labeler.teachers.protocol import RowLabels
from labeler.teachers.vllm.teacher import VllmTeacher, engine_request
from schemas.errors import RowFailure
from schemas.spec import GenerationSpec, RecordSpec

_CALLS = 3
"""Units that are in work together, as in a label job's teacher actor."""

_SAMPLES = 2
"""Responses a prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.label_engine", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, help="folder for figures and labels")
    for name in ("tokens", "row-tokens", "unit-rows", "repeats", "prompts"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        bench = EngineBenchmark(args, Path(folder))
        figures = bench.measure()
        with open(Path(args.out) / f"{args.model}.pickle", "wb") as file:
            pickle.dump((bench.rows, bench.labels()), file)
        bench.teacher.close()
    (Path(args.out) / f"{args.model}.json").write_text(json.dumps(figures), encoding="utf-8")


class EngineBenchmark:
    """An engine with one model, the rows for it, and the ways to run them."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder
        config = teacher_config(make_folder(args.model, folder / "model"))
        self.shape = model_shape(config)
        self.records = records(args.model)
        self.teacher = VllmTeacher(config, next(iter(self.records.values())))
        self.rows = make_rows(args.model, args.tokens, args.row_tokens, self.shape.vocab_size)
        self.num_tokens = sum(len(tokens) for tokens in self.rows.token_ids)

    def measure(self) -> dict[str, Any]:
        """Medians over repeats in which everything takes its turn."""
        tokens = self.rows.token_ids
        ways: dict[str, Callable[[], float]] = {
            "plain": lambda: self._prefill(tokens),
            "stock_flat": lambda: self._prefill(tokens, flat=True),
            "stock_dict": lambda: self._prefill(tokens, flat=False),
            "floor": lambda: self._floor(self.rows.num_labels),
        }
        for name, record in self.records.items():
            ways[name] = functools.partial(self._ours, record)
        for name in ("plain", *self.records):  # the first step of each kind is slow
            ways[name]()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        generated = []
        for _ in range(self.args.repeats):
            for name, run in ways.items():
                seconds[name].append(run())
            generated.append(self._generation())
        figures = engine_figures(seconds, list(self.records), self.num_tokens)
        for name, record in self.records.items():
            ours = functools.partial(self._ours, record)
            figures["records"][name]["profile_us"] = profile_us(self.teacher, ours, self.num_tokens)
        return {
            **figures,
            "limit_gemm": self.shape.gemm_limit,
            "generation": generation_figures(generated, _SAMPLES),
            "vocab_size": self.shape.vocab_size,
            "provenance": self.teacher.provenance(),
        }

    def labels(self) -> dict[str, list[RowLabels]]:
        """Labels of all rows before rounding, by kind of record."""
        found = {}
        for name, record in self.records.items():
            self._use_record(record)
            rows = self.rows
            results = self.teacher.label(rows.token_ids, rows.label_spans, rows.row_keys)
            found[name] = [one for one in results if isinstance(one, RowLabels)]
            assert len(found[name]) == len(results)
        return found

    def _use_record(self, record: RecordSpec) -> None:
        """Labels by another record; a new engine would take long to start."""
        self.teacher._record = record
        self.teacher._engine.alone(self.teacher._install_label_path)

    def _prefill(self, token_ids: Sequence[np.ndarray], flat: bool | None = None) -> float:
        """Seconds of prefill: plain (None), or with K candidates in flat lists or dictionaries."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            skip_reading_prefix_cache=True,
            prompt_logprobs=None if flat is None else K,
            flat_logprobs=bool(flat),
        )
        # The engine is driven as the teacher drives it, on the thread that owns its cores.
        started = time.perf_counter()
        requests = [engine_request(tokens, params) for tokens in token_ids]
        outputs = self.teacher._engine.outputs(requests)
        seconds = time.perf_counter() - started
        assert not any(isinstance(output, RowFailure) for output in outputs)
        return seconds

    def _ours(self, record: RecordSpec) -> float:
        """Seconds from requests to the last manifest."""
        self._use_record(record)
        requests = make_requests(self.rows)
        return self._committed(requests, record, None)[0]

    def _committed(
        self, requests: list[Any], record: RecordSpec, generation: GenerationSpec | None
    ) -> tuple[float, int]:
        """Seconds from requests to the last manifest, and the tokens of what is committed."""
        batches = [
            requests[first : first + self.args.unit_rows]
            for first in range(0, len(requests), self.args.unit_rows)
        ]
        with TemporaryDirectory(dir=self.folder) as folder, ThreadPoolExecutor(_CALLS) as pool:
            units = label_units(folder, self.teacher, record, self.shape.vocab_size, generation)
            started = time.perf_counter()
            done = list(pool.map(units.label, batches))
            seconds = time.perf_counter() - started
        assert not sum(unit.num_quarantined for unit in done)
        return seconds, sum(unit.num_tokens for unit in done)

    def _floor(self, num_labels: int) -> float:
        """Seconds of what no labeller can do without; see ``label_floor``."""
        seconds = functools.partial(
            floor_seconds, num_labels=num_labels, hidden_size=self.shape.hidden_size
        )
        return max(self.teacher._engine.alone(self.teacher._llm.apply_model, seconds))

    def _generation(self) -> Generated:
        """Some responses a prompt: generated alone; and generated, scored and committed."""
        generation = GenerationSpec(n=_SAMPLES, max_tokens=self.args.row_tokens // 4)
        prompts = [tokens[: self.args.row_tokens // 4] for tokens in self.rows.token_ids]
        prompts = prompts[: self.args.prompts]
        requests = prompt_requests(prompts, generation)
        seeds = [[one.seed() for one in requests[at::_SAMPLES]] for at in range(_SAMPLES)]
        record = next(iter(self.records.values()))
        self._use_record(record)
        started = time.perf_counter()
        found = self.teacher.generate(prompts, generation, list(zip(*seeds, strict=True)))
        alone_s = time.perf_counter() - started
        committed_s, num_tokens = self._committed(requests, record, generation)
        rows, num_labels = [], 0
        for prompt, responses in zip(prompts, found, strict=True):
            assert not isinstance(responses, RowFailure)
            rows += [np.concatenate([prompt, response]) for response in responses]
            num_labels += sum(map(len, responses))
        return Generated(
            num_tokens,
            alone_s,
            committed_s,
            self._prefill(rows),
            self._floor(num_labels),
        )


if __name__ == "__main__":
    main()
