"""Result of the parity gate, stored as parity.json in the label set."""

import pydantic

from schemas.config import StrictModel
from schemas.errors import DamagedError
from schemas.storage.store import Store

PARITY_FILE = "parity.json"


class Parity(StrictModel):
    """Comparison of labels with those of a reference teacher.

    Attributes:
        reference: teacher that scored the rows again.
        rows, labels: numbers of rows and labels compared.
        mean_kl, max_kl: nats per label, KL(reference, teacher) over the stored entries and one
            bucket for the rest.
        max_logprob_difference: nats, over entries with a probability above 0.001.
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
    """Reads the stored result; None if no comparison was made.

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
            f"{store.path(PARITY_FILE)}: not a valid parity result ({what}); delete it, and "
            "the next label job compares again"
        ) from error
