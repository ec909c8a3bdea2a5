import re

import pytest

from schemas.errors import VocabularyError
from trainer.student.vocabulary import check_vocabularies

LABELS = {f"token{i}": i for i in range(10)}


def test_equal_mappings_pass_whatever_the_padding():
    for vocab_size in (10, 16, 1000):
        check_vocabularies(dict(LABELS), vocab_size, LABELS, "student")


def test_tokens_that_labels_never_name_pass():
    check_vocabularies({**LABELS, "<pad>": 10}, 11, LABELS, "student")


def test_equal_sizes_with_other_ids_are_refused_and_named():
    student = {**LABELS, "token3": 4, "token4": 3}
    expected = re.escape(
        "the tokenizer of student differs from the labels' in 2 of 10 tokens: "
        "id 3 is 'token3' in the labels but 'token4' in the student, where 'token3' has id 4; "
        "id 4 is 'token4' in the labels but 'token3' in the student, where 'token4' has id 3"
    )
    with pytest.raises(VocabularyError, match=expected):
        check_vocabularies(student, 10, LABELS, "student")


def test_vocabulary_names_a_missing_token():
    student = {token: i for token, i in LABELS.items() if i != 7}
    with pytest.raises(
        VocabularyError, match=r"id 7 is 'token7' .* nothing in the student, without 'token7'"
    ):
        check_vocabularies(student, 10, LABELS, "student")


def test_only_the_first_few_are_shown():
    with pytest.raises(VocabularyError, match=r"in 10 of 10 .*token4.*; \.\.\.\.") as error:
        check_vocabularies({}, 10, LABELS, "student")
    assert "token5" not in str(error.value)


def test_vocabulary_refuses_a_head_with_too_few_rows():
    with pytest.raises(VocabularyError, match=r"9 rows .* 10 ids"):
        check_vocabularies(dict(LABELS), 9, LABELS, "student")
