"""Trains a student from views of label sets, under DeepSpeed.

``config/``        configuration: ``train.toml`` and ``evaluate.toml``
``run_folder.py``  the folder of a run: identity, owner, summary
``losses/``        targets from stored labels; objectives and divergences on them
``head/``          the output head fused with the loss
``student/``       builds, checks and adapts the model
``data/``          row order, packing, mixtures, the loader
``engine/``        one optimizer step under DeepSpeed
``checkpoints/``   saved in the background, restored on any world size
``tracking/``      learning curve, row log, external trackers
``evaluation/``    held-out metrics during training, and against the teacher
``run/``           pre-launch checks, Ray Train, each worker's training loop

Each room imports only rooms above it in this list; nothing here imports labeler.

The names exported below form the public library, for use in a custom training loop or a Hugging
Face Trainer (``docs/library.md``). They are imported lazily to keep the package import light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config.train import DataConfig as DataConfig
    from trainer.config.train import LossConfig as LossConfig
    from trainer.data.view_dataset import ViewBatch as ViewBatch
    from trainer.data.view_dataset import ViewDataset as ViewDataset
    from trainer.head.distillation_head import DistillationHead as DistillationHead
    from trainer.head.fused_head import LogitTransform as LogitTransform
    from trainer.losses.targets import SparseTargets as SparseTargets
    from trainer.student.build import StudentWithHead as StudentWithHead
    from trainer.student.build import check_student as check_student
    from trainer.student.build import install_head as install_head

_HOMES = {
    "DataConfig": "trainer.config.train",
    "DistillationHead": "trainer.head.distillation_head",
    "LogitTransform": "trainer.head.fused_head",
    "LossConfig": "trainer.config.train",
    "SparseTargets": "trainer.losses.targets",
    "StudentWithHead": "trainer.student.build",
    "ViewBatch": "trainer.data.view_dataset",
    "ViewDataset": "trainer.data.view_dataset",
    "check_student": "trainer.student.build",
    "install_head": "trainer.student.build",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
