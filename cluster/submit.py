"""`tutelage submit`: a thin layer over `ray job submit`."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from schemas.errors import ConfigError


def submit(
    job: str,
    config: str,
    overrides: Sequence[str],
    *,
    address: str | None,
    working_dir: str,
    wait: bool,
) -> int:
    """Submits one command to a Ray cluster and, with `wait`, follows its output to the end.

    The folder `working_dir` travels to the cluster (less what .gitignore names), so nothing of this
    project needs to be installed there; `config` is a path inside it.

    Returns:
        The exit code of `ray job submit`, which is non-zero when the job failed.

    Raises:
        ConfigError: the config is not inside the working directory, so the job could not read it.
    """
    root = Path(working_dir).resolve()
    path = Path(config).resolve()
    if not path.is_file():
        raise ConfigError(f"{config}: no such file; expected the job's TOML configuration")
    if not path.is_relative_to(root):
        raise ConfigError(
            f"{config}: lies outside of the folder that travels to the cluster ({root}); "
            "move it there or name another folder with --working-dir"
        )
    ray_cli = Path(sys.executable).with_name("ray")
    command = [str(ray_cli), "job", "submit", "--working-dir", str(root)]
    if address:
        command += ["--address", address]
    if not wait:
        command.append("--no-wait")
    entry = ["python", "-m", "cluster", job, path.relative_to(root).as_posix(), *overrides]
    return subprocess.run([*command, "--", *entry], check=False).returncode
