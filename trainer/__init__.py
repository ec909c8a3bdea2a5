"""Labelled shards to a student: reads views of label sets, trains under DeepSpeed and Ray Train.

``config`` says what a run is, ``plan`` and ``packing`` say in which order rows are read, ``loader``
reads them, ``loop`` trains, ``checkpoint`` and ``export`` keep what came of it, and ``launch`` runs
it all on a cluster or on this machine.

As a library, in a training loop of one's own or in a Hugging Face Trainer (``docs/library.md``):
the names below. Each is imported when it is first asked for, so that nothing heavy is imported
here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import DataConfig as DataConfig
    from trainer.config import LossConfig as LossConfig
    from trainer.distillation_head import DistillationHead as DistillationHead
    from trainer.fused_head import LogitTransform as LogitTransform
    from trainer.student import StudentWithHead as StudentWithHead
    from trainer.student import check_student as check_student
    from trainer.student import install_head as install_head
    from trainer.targets import SparseTargets as SparseTargets
    from trainer.view_dataset import ViewBatch as ViewBatch
    from trainer.view_dataset import ViewDataset as ViewDataset

_HOMES = {
    "DataConfig": "trainer.config",
    "DistillationHead": "trainer.distillation_head",
    "LogitTransform": "trainer.fused_head",
    "LossConfig": "trainer.config",
    "SparseTargets": "trainer.targets",
    "StudentWithHead": "trainer.student",
    "ViewBatch": "trainer.view_dataset",
    "ViewDataset": "trainer.view_dataset",
    "check_student": "trainer.student",
    "install_head": "trainer.student",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
