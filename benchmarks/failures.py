"""An exception in one line of a table."""

from __future__ import annotations

LINES, LONGEST = 3, 240  # Dynamo's first line only names the backend


def failure(error: BaseException) -> str:
    """Return ``FAILED``, what was raised, and the first lines of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"FAILED: {type(error).__name__}: {' '.join(lines[:LINES])}"[:LONGEST]
