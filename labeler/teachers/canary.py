"""The canary: a row of two tokens that every working teacher can label."""

import numpy as np

from labeler.teachers.protocol import RowLabels, Teacher
from schemas.errors import RowFailure
from schemas.keys import row_key, stack_keys

CANARY_IDS = np.array([0, 1], np.int32)
CANARY_SPANS = np.array([1, 2], np.int32)


def label_canary(teacher: Teacher) -> RowLabels | RowFailure:
    """Labels the canary; the labels are not stored."""
    keys = stack_keys([row_key(CANARY_IDS, CANARY_SPANS)])
    return teacher.label([CANARY_IDS], [CANARY_SPANS], keys)[0]
