"""`labels report`: one file, everything in it; and the numbers behind its plots."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from cluster.__main__ import main
from cluster.labels.report.measures import bytes_by_column, calibration, units_over_time
from schemas.keys import unit_key
from schemas.label_set.label_set import LabelSet
from schemas.maintenance.sample import SampledGroup, labelled_positions, sample_groups
from schemas.spec import RecordSpec
from tests.support.label_rows import make_rows, make_spec

VOCAB = 60
SPEC = make_spec(RecordSpec(kind="topk", k=8), VOCAB)


def make_set(url: Path, record: RecordSpec) -> LabelSet:
    label_set = LabelSet.create_or_open(str(url), make_spec(record, VOCAB))
    for seed in (1, 2):
        rows = make_rows(20, record, VOCAB, seed=seed)
        label_set.commit_unit(rows, [], {"seconds": 2.0, "model": "m"}, unit_key(rows.row_key))
    return label_set


@pytest.mark.parametrize("record", [SPEC.record, RecordSpec(kind="tokens")])
def test_report_is_one_file_with_every_section(tmp_path: Path, record: RecordSpec) -> None:
    label_set = make_set(tmp_path / "labels", record)
    out, facts = tmp_path / "deep" / "report.html", tmp_path / "out.json"
    words = ["labels", "report", label_set.url, "--out", str(out), "--json", str(facts)]
    assert main(words) == 0
    page = out.read_text()
    drawn = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawn) == (11 if record.kind == "topk" else 5)
    for one in drawn:
        ElementTree.fromstring(one)
    assert not re.search(r"""(src|href)=["']https?:""", page)
    assert "<script" not in page
    numbers = json.loads(facts.read_text())
    assert (numbers["ece"] is None) == (record.kind == "tokens")
    assert main(words) == 0
    assert out.read_text() == page


def test_report_escapes_names(tmp_path: Path) -> None:
    hostile = """<script>alert('x') & "y" <b>"""
    label_set = LabelSet.create_or_open(str(tmp_path / hostile), SPEC)
    rows = make_rows(5, SPEC.record, VOCAB)
    label_set.commit_unit(rows, [], {"model": f"model {hostile}"}, unit_key(rows.row_key))
    out = tmp_path / "report.html"
    assert main(["labels", "report", label_set.url, "--out", str(out)]) == 0
    page = out.read_text()
    assert "<script" not in page
    assert "<b>" not in page
    escaped = "&lt;script&gt;alert(&#39;x&#39;) &amp; &#34;y&#34; &lt;b&gt;"
    assert f"<title>labels {tmp_path}/{escaped}</title>" in page
    assert f"<td>model {escaped}</td>" in page


def test_calibration_equals_a_naive_loop(tmp_path: Path) -> None:
    label_set = make_set(tmp_path / "labels", SPEC.record)
    groups = sample_groups(label_set, 10, 0)
    found = calibration(groups)
    assert found is not None
    labels = [
        label
        for group in groups
        for row in range(len(group.rows))
        for label in labelled_positions(group.rows, row)
    ]
    bins: dict[int, list[tuple[float, bool]]] = {}
    for label in labels:
        id_, logprob = label.head[0]
        p = float(np.exp(logprob))
        bins.setdefault(min(int(p * 15), 14), []).append((p, id_ == label.token))
    ece = sum(
        len(part) * abs(np.mean([p for p, _ in part]) - np.mean([hit for _, hit in part]))
        for part in bins.values()
    ) / len(labels)
    assert found.ece == pytest.approx(ece)
    assert found.counts.sum() == len(labels)
    tokens = make_rows(3, RecordSpec(kind="tokens"), VOCAB)
    assert calibration([SampledGroup("s", 0, tokens)]) is None


def test_bytes_and_units(tmp_path: Path) -> None:
    label_set = make_set(tmp_path / "labels", SPEC.record)
    manifests = label_set.manifests()
    columns, footers = bytes_by_column(label_set, 0)
    assert footers == 2
    assert set(columns) == set(SPEC.record.columns)
    labels = sum(manifest.num_labels for manifest in manifests)
    size = sum(manifest.size_bytes for manifest in manifests)
    assert 0.3 * size / labels < sum(columns.values()) < size / labels
    assert list(columns.values()) == sorted(columns.values(), reverse=True)
    units = units_over_time(label_set)
    assert units.seconds.tolist() == [2.0, 2.0]
    assert units.minutes[0] == 0.0
    assert sorted(units.tokens) == sorted(manifest.num_tokens for manifest in manifests)
