"""An address-exact model of glibc's malloc: same source interpreted (the specification) and compiled (the product)."""

from __future__ import annotations

from heapledger.analyzer.glibc.profile import Profile, profile_for
from heapledger.analyzer.glibc.settings import Settings
from heapledger.analyzer.glibc.states import ChunkState

__all__ = ["ChunkState", "Profile", "Settings", "profile_for"]
