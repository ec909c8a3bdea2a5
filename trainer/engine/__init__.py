"""Runs optimizer steps under DeepSpeed on any number of ranks; only this room imports deepspeed."""
