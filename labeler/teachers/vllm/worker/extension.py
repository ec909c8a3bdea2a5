"""The mixin for vLLM's worker class; its one RPC installs the label head."""

from typing import Any

from labeler.teachers.vllm.worker import runner_v1, runner_v2
from schemas.spec import RecordSpec


class LabelHeadExtension:
    """Mixin for vLLM's worker class, which provides the attributes."""

    model_runner: Any

    def install_tutelage_label_head(self, record_json: str) -> tuple[str, str]:
        """Replaces the runner's prompt-logprobs step.

        Returns:
            The runner's class, and how it differs from the expected one; the step is replaced only
            if that is empty. A string, because exception types do not survive the RPC.
        """
        runner = self.model_runner
        record = RecordSpec.model_validate_json(record_json)
        if hasattr(runner, "prompt_logprobs_worker"):
            return f"{type(runner).__name__} (V2)", runner_v2.install_into(runner, record)
        return type(runner).__name__, runner_v1.install_into(runner, record)
