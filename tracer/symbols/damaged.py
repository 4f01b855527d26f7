"""The one exception of this package. It never leaves it."""

from __future__ import annotations


class DamagedError(Exception):
    """The bytes are not what they claim to be: the frame stays unresolved, or falls back to a symbol table."""
