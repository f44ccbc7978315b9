"""The checks of the course, for the solved editions: a kernel finds what lies beside its notebook.

They are the ones of ../../checks, not a copy.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "checks")]
