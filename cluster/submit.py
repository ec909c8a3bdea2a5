"""`tutelage submit`: runs a command as a job on a Ray cluster, with `ray job submit`."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from schemas.errors import ConfigError


def submit(command: Sequence[str], address: str | None, working_dir: str, wait: bool) -> int:
    """Submits a command and optionally follows its output.

    Args:
        command: job (label, train or evaluate), path of its config, overrides.
        address: URL of the job server; None: Ray's default.
        working_dir: folder that Ray uploads, except files in .gitignore, so that this project need
            not be installed on the cluster; must contain the config.
        wait: whether to follow the output to the end.

    Returns:
        The exit code of `ray job submit`, non-zero if the job failed.

    Raises:
        ConfigError: the config is outside the uploaded folder, so the job could not read it.
    """
    job, config, *overrides = command
    root = Path(working_dir).resolve()
    path = Path(config).resolve()
    if not path.is_file():
        raise ConfigError(f"{config}: no such file; expected the job's TOML configuration")
    if not path.is_relative_to(root):
        raise ConfigError(
            f"{config}: outside the folder uploaded to the cluster ({root}); move it there, or "
            "choose another folder with --working-dir"
        )
    # The CLI of this interpreter's environment, which need not be on PATH.
    ray_cli = Path(sys.executable).with_name("ray")
    options = ["--working-dir", str(root)]
    if address:
        options += ["--address", address]
    if not wait:
        options.append("--no-wait")
    entry = ["python", "-m", "cluster", job, path.relative_to(root).as_posix(), *overrides]
    words = [str(ray_cli), "job", "submit", *options, "--", *entry]
    return subprocess.run(words, check=False).returncode
