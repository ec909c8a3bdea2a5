"""Checkpoints: written during training, committed by a manifest, restored on any world size."""
