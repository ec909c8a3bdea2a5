"""Converts DeepSpeed checkpoints to universal checkpoints, which any number of ranks can load."""

import argparse
import contextlib
import io
from pathlib import Path


def to_universal(folder: Path, to: Path) -> None:
    """Converts the checkpoint in `folder`, in this process and silently.

    Writes one file per state and parameter into the new folder `to`.
    """
    from deepspeed.checkpoint import ds_to_universal

    to.mkdir(parents=True)
    # One worker: a pool would fork this process, which runs threads of gloo and Ray.
    arguments = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(to),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
    (to.parent / "latest_universal").unlink(missing_ok=True)
