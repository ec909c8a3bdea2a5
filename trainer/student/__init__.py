"""Builds, loads, checks and adapts (LoRA) the student model, and compares its vocabulary."""
