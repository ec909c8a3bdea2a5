"""A server's answers, read as labels; a server that is slow, broken, gone or another one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labeler.config import TeacherConfig
from labeler.teachers.protocol import RowLabels
from labeler.teachers.remote.parse_logprobs import row_labels
from labeler.teachers.remote.teacher import RemoteTeacher
from schemas.errors import RowFailure, TeacherError, TeacherGoneError
from schemas.spec import GenerationSpec, RecordSpec
from tests.support.scripted_server import POISON, server, told

K = 2
RECORD = RecordSpec(kind="topk", k=K, entropy=False)
SPANS = np.array([1, 3], np.int32)
ROW = np.array([5, 7, 9], np.int32)
KEYS = np.zeros((1, 16), np.uint8)


def teacher(running: Any, model: Path, **remote: Any) -> RemoteTeacher:
    url = f"http://127.0.0.1:{running.server_address[1]}"
    content = {"backend": "remote", "url": url, "model": str(model), "dtype": "bfloat16"}
    content |= {"max_model_len": 32, "remote": {"patience_s": 5.0, **remote}}
    return RemoteTeacher(TeacherConfig.model_validate(content), RECORD)


def test_answer_gives_heads_ranks_and_tails() -> None:
    answer = [
        None,
        told({3: -1.0, 2: -1.0}, 7, -4.0, 5),  # equally probable ids, and a token beyond them
        told({9: -0.1, 4: -3.0}, 9, -0.1, 1),  # the token is the first of the head
    ]
    labels = row_labels(answer, ROW, SPANS, K, 320)
    assert labels.entry_ids.tolist() == [[2, 3], [9, 4]]
    assert labels.target_rank.tolist() == [5, 1]
    np.testing.assert_allclose(labels.target_logprob, [-4.0, -0.1], rtol=1e-6)
    tail = 1 - np.exp([[-1.0, -1.0], [-0.1, -3.0]]).sum(1)
    np.testing.assert_allclose(np.exp(labels.tail_logmass), tail, rtol=1e-5)
    assert labels.head_len.tolist() == [K, K]


def test_tail_is_within_what_the_answer_bounds() -> None:
    sure = [
        told({2: -1e-9, 3: -30.0}, 7, -31.0, 3),  # 318 others, none above exp(-30)
        told({9: float(np.log(0.999)), 4: float(np.log(0.001))}, 8, -10.0, 7),
    ]
    labels = row_labels([None, *sure], np.array([5, 7, 8]), SPANS, K, 320)
    assert labels.tail_logmass[0] == pytest.approx(np.log(318) - 30.0, abs=1e-5)
    assert labels.tail_logmass[1] == pytest.approx(-10.0, abs=1e-5)
    forbidden = [told({9: 0.0, 4: -9999.0}, 9, 0.0, 1)]
    labels = row_labels([None, *forbidden], np.array([5, 9]), np.array([1, 2]), K, 320)
    assert labels.entry_logprobs.tolist() == [[0.0, -np.inf]]
    assert labels.tail_logmass.tolist() == [-np.inf]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([None, told({1: -1.0, 2: -2.0}, 7, -3.0, 3)], "returned 2 positions for a row of 3"),
        ([None, told({1: -1.0}, 7, -3.0, 2), told({1: -1.0}, 1, -1.0, 1)], "expected its token"),
        ([None, *[told({1: 4.0, 2: 3.0}, t, 1.0, 3) for t in (7, 9)]], "raw_logprobs"),
    ],
)
def test_parser_refuses_answers_that_are_no_labels(answer: Any, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        row_labels(answer, ROW, SPANS, K, 320)


def test_client_retries_busy_and_broken_connections(tiny_model_dir: Path) -> None:
    with server(503, 0, 500) as running:
        remote = teacher(running, tiny_model_dir)
        (labels,) = remote.label([ROW], [SPANS], KEYS)
        remote.close()
    assert isinstance(labels, RowLabels)
    assert labels.entry_ids.tolist() == [[1, 0], [1, 0]]
    assert running.asked[-1]["prompt_logprobs"] == K
    assert len(running.asked) == 1 + 4


def test_client_quarantines_only_the_row_the_server_fails_on(tiny_model_dir: Path) -> None:
    with server() as running:
        remote = teacher(running, tiny_model_dir)
        poison = np.array([5, POISON, 9], np.int32)
        rows = [ROW, poison, ROW]
        results = remote.label(rows, [SPANS] * 3, np.zeros((3, 16), np.uint8))
        running.script = [400]
        refused = remote.label([ROW], [SPANS], KEYS)
        remote.close()
    assert [type(result) for result in results] == [RowLabels, RowFailure, RowLabels]
    assert isinstance(results[1], RowFailure)
    assert results[1].reason == "server_error"
    assert refused[0] == RowFailure("engine_refused", 'HTTP 400: {"error": "not now"}')


@pytest.mark.parametrize("status", [400, 404, 405, 500])
def test_client_raises_where_the_server_refuses_every_row(
    tiny_model_dir: Path, status: int
) -> None:
    with server() as running:
        remote = teacher(running, tiny_model_dir)
        running.refusal = status
        told = rf"HTTP {status}: .*not here.* serves big with --max-logprobs 2 or more; .*run the"
        with pytest.raises(TeacherGoneError, match=told):
            remote.label([ROW, ROW], [SPANS] * 2, np.zeros((2, 16), np.uint8))
        with pytest.raises(TeacherGoneError, match=rf"HTTP {status}: .*serves big; committed"):
            remote.generate([ROW], GenerationSpec(max_tokens=4, temperature=0.5), [[1]])
        canary = running.asked[-1]
        remote.close()
    assert (canary["prompt"], canary["max_tokens"], canary["temperature"]) == ([0, 1], 1, 0.5)


def test_client_raises_where_the_server_is_gone(tiny_model_dir: Path) -> None:
    with server() as running:
        remote = teacher(running, tiny_model_dir, patience_s=0.5)
    with pytest.raises(TeacherGoneError, match=r"no answer for 0 s.*run the same command again"):
        remote.label([ROW, ROW], [SPANS] * 2, np.zeros((2, 16), np.uint8))
    remote.close()


def test_remote_teacher_checks_its_server_at_the_start(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server() as running:
        with pytest.raises(TeacherError, match=r"serves big; teacher.remote.served_model is"):
            teacher(running, tiny_model_dir, served_model="small")
        with pytest.raises(TeacherError, match=r"names L3_KEY, which is not set"):
            teacher(running, tiny_model_dir, api_key_env="L3_KEY")
        url = f"http://127.0.0.1:{running.server_address[1]}"
        content = {"backend": "remote", "url": url, "model": str(tiny_model_dir)}
        content |= {"dtype": "float32", "max_model_len": 65}
        with pytest.raises(TeacherError, match=r"--max-model-len 64, but 65 is needed"):
            RemoteTeacher(TeacherConfig.model_validate(content), RECORD)
        config = TeacherConfig.model_validate(content)
        with pytest.raises(TeacherError, match=r'the label set has kind "threshold", entropy'):
            RemoteTeacher(config, RecordSpec())
        other = config.model_copy(update={"engine": {"max_num_seqs": 4}})
        with pytest.raises(TeacherError, match=r"teacher.engine.max_num_seqs: the engine is the"):
            RemoteTeacher(other, RECORD)
