"""What tests share; imported under the name `tests.support` only."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The folder of the repository."""
