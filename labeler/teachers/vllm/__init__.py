"""The vLLM teacher, the only code that imports vLLM.

`label_requests` explains how labels leave the engine; `worker/` runs inside its workers; `patches`
holds workarounds for upstream bugs, each with the condition for its removal.
"""
