"""A program: loads the newest checkpoint of a run on this process alone and shows its optimizer."""

import json
import os
import tempfile
from pathlib import Path


def main(config_path: str) -> None:
    """Prints a JSON list of the optimizer's groups as they are after loading.

    Args:
        config_path: TOML of the run, whatever its number of workers.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch.distributed as dist

    from schemas.config import load_toml
    from trainer.checkpoints.restore import load_checkpoint
    from trainer.checkpoints.store import find_checkpoint
    from trainer.config.train import TrainConfig
    from trainer.engine.deepspeed_engine import build_engine, prepare_process
    from trainer.run_folder import RunFolder
    from trainer.student.build import StudentWithHead, build_student

    config = load_toml(config_path, TrainConfig)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/r", rank=0, world_size=1)
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        prepare_process(config)
        engine = build_engine(StudentWithHead(build_student(config.student)[0]), config)
        found, manifest, _ = find_checkpoint(RunFolder(config.run).store, Path(folder), True)
        assert found is not None
        assert manifest is not None
        load_checkpoint(engine, found, manifest, is_leader=True)
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in engine.optimizer.param_groups
        ]
        steps = [state["step"] for state in engine.optimizer.optimizer.state.values()]
        found_groups = {
            "saved_by": manifest.world_size,
            "groups": groups,
            "steps": [float(step) for step in steps],
            "separate_steps": len({id(step) for step in steps}) == len(steps) > 1,
        }
        print(json.dumps(found_groups))
