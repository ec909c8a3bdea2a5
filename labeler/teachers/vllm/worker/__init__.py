"""Code that runs inside vLLM's workers: a label head replaces the prompt-logprobs step.

``extension`` installs it; ``runner_v1`` and ``runner_v2`` are the two model runners of vLLM 0.32;
everything else is shared. The front-end is ``labeler.teachers.vllm.label_requests``.
"""
