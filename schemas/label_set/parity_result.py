"""Result of the parity gate: the content of a label set's parity.json."""

import pydantic

from schemas.config import StrictModel
from schemas.errors import DamagedError
from schemas.storage.store import Store

PARITY_FILE = "parity.json"


class Parity(StrictModel):
    """Result of comparing labels with those of a reference teacher.

    Attributes:
        reference: the teacher that scored the rows again.
        rows, labels: number compared.
        mean_kl, max_kl: nats per label, KL(reference, teacher) on the stored entries and one bucket
            for the rest.
        max_logprob_difference: over entries with a probability above 0.001, nats.
        bound: largest accepted mean_kl.
    """

    reference: str
    rows: int
    labels: int
    mean_kl: float
    max_kl: float
    max_logprob_difference: float
    bound: float


def read_parity(store: Store) -> Parity | None:
    """The stored result; None if no comparison was made.

    Raises:
        DamagedError: the file is damaged.
    """
    if not store.exists(PARITY_FILE):
        return None
    try:
        return Parity.model_validate_json(store.read_bytes(PARITY_FILE))
    except pydantic.ValidationError as error:
        what = str(error).replace("\n", " ")
        raise DamagedError(
            f"{store.path(PARITY_FILE)}: not a result of the parity gate ({what}); delete it, and "
            "the next label job compares again"
        ) from error
