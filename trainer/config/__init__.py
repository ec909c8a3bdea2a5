"""Configuration of `train.toml` and `evaluate.toml`; imports neither torch nor Ray."""
