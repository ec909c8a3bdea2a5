"""Exports the trained student as an ordinary Hugging Face folder."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from schemas.config import dump_toml
from schemas.storage.driver_errors import store_errors
from schemas.storage.local_files import sync_folder
from schemas.storage.store import Store
from trainer.config.train import TrainConfig
from trainer.run_folder import STUDENT
from trainer.student.lora import merged, scalings

CARD = """---
library_name: transformers
tags: [distillation, tutelage]
---

# {name}

A student trained by Tutelage on cached teacher labels.

| | |
|---|---|
| label sets | {label_sets} |
| view | `{view_hash}` |
| rows, steps | {num_rows:,} rows, {num_steps:,} steps |
| final loss | {final_loss:.4f} nats per label |

Label sets and view are identified by fingerprint, which depends on the teacher's weights and
tokenizer, the numerics and the record, and not on where the labels are stored.
{note}
## Configuration

```toml
{config}```
"""


def model_card(
    config: TrainConfig,
    label_sets: list[str],
    view_hash: str,
    num_rows: int,
    num_steps: int,
    final_loss: float,
    note: str = "",
) -> str:
    """README.md of the exported student, with the fingerprints of its training data.

    Args:
        note: how the loss is approximated: a sentence without its period, or empty.
    """
    return CARD.format(
        name=Path(config.run).name,
        label_sets=", ".join(f"`{fingerprint}`" for fingerprint in label_sets),
        view_hash=view_hash,
        num_rows=num_rows,
        num_steps=num_steps,
        final_loss=final_loss,
        note=f"\nNote: {note}.\n" if note else "",
        config=dump_toml(config),
    )


def export_student(engine: Any, tokenizer: Any, store: Store, card: str) -> None:
    """Writes the student to the run's folder. Collective; rank 0 writes.

    The write is atomic on a local file system. On an object store files are written one by one, and
    only the run's summary, written later, marks them as complete. Adapters are merged.

    Args:
        engine: the DeepSpeed engine around a ``StudentWithHead``.
        tokenizer: the student's.
        store: the run's folder.
        card: text of README.md.
    """
    weights = _full_weights(engine.module.model)
    if dist.get_rank() == 0:
        weights = merged(weights, scalings(engine.module.model))
        scratch = None if store.is_local else tempfile.mkdtemp()
        folder = Path(scratch or store.path(), STUDENT)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        engine.module.model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync_folder(folder.parent)
        if scratch is not None:
            upload(store, folder, STUDENT)
            shutil.rmtree(scratch)
    dist.barrier()


def upload(store: Store, folder: Path, rel: str) -> None:
    """Replaces a folder in a store with a local one, file by file."""
    store.delete(rel)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        target = store.path(rel, path.relative_to(folder).as_posix())
        with store_errors(target):
            store.fs.put_file(str(path), target)


def _full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The full state dict on the CPU, gathered under ZeRO-3; empty on ranks other than 0.

    Parameters are gathered one at a time, so a device never holds more than one full parameter.
    """
    import deepspeed

    is_writer = dist.get_rank() == 0
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights: dict[str, torch.Tensor] = {}
    copies: dict[int, torch.Tensor] = {}  # tied parameters remain one tensor, saved once
    for name, value in model.state_dict(keep_vars=True).items():
        parameter = parameters.get(name)
        if parameter is None or not hasattr(parameter, "ds_id"):
            if is_writer:
                copies.setdefault(value.data_ptr(), value.detach().cpu())
                weights[name] = copies[value.data_ptr()]
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            if is_writer:
                copies.setdefault(id(parameter), parameter.detach().cpu().clone())
                weights[name] = copies[id(parameter)]
    return weights
