"""Records the output of commands in README and docs/labels.md: `python -m benchmarks.tour`.

Runs them on `examples/quickstart` with an empty `runs/quickstart`; damages one label set on
purpose. The result file has the output of each step by name; `python -m benchmarks.render` inserts
it into the pages. About six minutes on two cores.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import command_line, write_results

OUT = Path("runs/quickstart")
DAMAGED = OUT / "damaged"
LABEL = "label examples/quickstart/label.toml"
DAMAGED_JOB = f"{LABEL} labels={DAMAGED} run.unit_rows=32"
RESPONSES = (
    f"label examples/demo/generate.toml corpus.path={OUT}/prompts.jsonl labels={OUT}/chats view="
)
HERE = re.compile(re.escape(f"{Path.cwd()}/") + r"(\S+)( {2})?")
PROGRESS = re.compile(r"logging\.cc:|^\w+: (.* \| |\w+ [\d,]+ of )|^(labelled|step) [\d,]+( of|/)")
UNIT = re.compile(r"--unit (\w+)")


def main() -> None:
    """Runs every step and writes the result file."""
    args = command_line("tour", __doc__).parse_args()
    shutil.rmtree(OUT, ignore_errors=True)
    _write_prompts()
    output = {
        "label": _run(LABEL),
        "again": _run(LABEL),
        "split": _run(f"labels view {OUT}/views --from {OUT}/labels --holdout 0.1"),
        "train": _run("train examples/quickstart/train.toml"),
        "evaluate": _run("evaluate examples/quickstart/evaluate.toml"),
        "ls": _run(f"labels ls {OUT}"),
        "show": _run(f"labels show {OUT}/labels --rows 1 --positions 6"),
        "verify": _run(f"labels verify {OUT}/labels"),
        "where": _run(
            f"labels view {OUT}/long --from {OUT}/labels --where "
            "\"num_labels >= 64 and not source.endswith('config.py')\""
        ),
        "typo": _run(f"labels view {OUT}/x --from {OUT}/labels --where 'num_lables >= 64'"),
        "column": _run(f"{RESPONSES} corpus.column=promptt"),
    }
    _run(DAMAGED_JOB)
    _damage()
    output["verify_damaged"] = _run(f"labels verify {DAMAGED}")
    units = dict.fromkeys(UNIT.findall(output["verify_damaged"]))
    output["drop"] = "".join(_run(f"labels drop {DAMAGED} --unit {unit}") for unit in units)
    output["label_dropped"] = _run(DAMAGED_JOB)
    output["verify_again"] = _run(f"labels verify {DAMAGED}")
    output["gc"] = _run(f"labels gc {DAMAGED} --older-than 0")
    _run(RESPONSES)
    output["export"] = _run(f"labels export {OUT}/chats {OUT}/chats.jsonl --format chat-jsonl")
    first = (OUT / "chats.jsonl").read_text(encoding="utf-8").splitlines()[0]
    output["export"] += f"$ head -1 {OUT}/chats.jsonl\n{first}\n"
    write_results(args, {"output": output})


def _run(command: str) -> str:
    """Returns a command as the user types it, and its output without progress."""
    words = shlex.split(command)
    done = subprocess.run(
        [sys.executable, "-m", "cluster", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if not PROGRESS.search(line)]
    text = HERE.sub(_shortened, "\n".join([f"$ tutelage {command}", *lines])) + "\n"
    print(text, flush=True)
    return text


def _shortened(path: re.Match[str]) -> str:
    """A path relative to this folder, as wide as the absolute one within a table."""
    return path[1].ljust(len(path[0])) if path[2] else path[1]


def _damage() -> None:
    """Flips one bit of a shard and removes the key file of another unit."""
    manifests = sorted((DAMAGED / "manifests").glob("*.json"))
    units = [json.loads(path.read_text(encoding="utf-8")) for path in manifests]
    first, second = [unit for unit in units if unit["shard"]][:2]
    shard = DAMAGED / first["shard"]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (DAMAGED / second["keys"]).unlink()


def _write_prompts() -> None:
    prompts = ("def read_json(path):\n", "class Queue:\n", "import os\n", "def main():\n")
    OUT.mkdir(parents=True)
    lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (OUT / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
