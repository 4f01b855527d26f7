"""An address-exact model of glibc's malloc: same source interpreted (the specification) and compiled (the product)."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
from types import ModuleType

from heapledger.analyzer.glibc.profile import Profile, profile_for
from heapledger.analyzer.glibc.settings import Settings
from heapledger.analyzer.glibc.states import ChunkState

__all__ = ["ChunkState", "Profile", "Settings", "compiled_engine_exists", "engine", "profile_for"]


def compiled_engine_exists() -> bool:
    """Whether the model has been compiled; its amalgamated source alone does not count."""
    spec = importlib.util.find_spec("heapledger.analyzer.glibc._compiled")
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    return spec is not None and spec.origin is not None and spec.origin.endswith(suffixes)


def engine(compiled: bool | None = None) -> ModuleType:
    """The model's functions: compiled, interpreted, or (None) compiled if it is built."""
    if compiled is None:
        compiled = compiled_engine_exists()
    name = "_compiled" if compiled else "interpreted"
    return importlib.import_module(f"heapledger.analyzer.glibc.{name}")
