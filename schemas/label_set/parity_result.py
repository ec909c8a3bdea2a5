"""What the parity gate found for a label set: the content of its parity.json."""

import pydantic

from schemas.config import StrictModel
from schemas.errors import DamagedError
from schemas.storage.store import Store

PARITY_FILE = "parity.json"


class Parity(StrictModel):
    """What the comparison found.

    Attributes:
        reference: what scored the rows again.
        rows, labels: how many were compared.
        mean_kl, max_kl: nats a label, KL(reference, teacher) on the stored entries and one bucket.
        max_logprob_difference: of entries with a probability over 0.001, nats.
        bound: what mean_kl may be.
    """

    reference: str
    rows: int
    labels: int
    mean_kl: float
    max_kl: float
    max_logprob_difference: float
    bound: float


def read_parity(store: Store) -> Parity | None:
    """What was found; None where no comparison was made.

    Raises:
        DamagedError: the file is torn.
    """
    if not store.exists(PARITY_FILE):
        return None
    try:
        return Parity.model_validate_json(store.read_bytes(PARITY_FILE))
    except pydantic.ValidationError as error:
        what = str(error).replace("\n", " ")
        raise DamagedError(
            f"{store.path(PARITY_FILE)}: not what the parity gate writes ({what}); delete it, and "
            "the next label job compares again"
        ) from error
