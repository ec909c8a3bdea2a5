"""Teachers behind one protocol: token ids in, labels or sampled responses out.

Start with `protocol`. Backends live in `vllm/`, `remote/` and `transformers_teacher`; `factory`
picks one.
"""
