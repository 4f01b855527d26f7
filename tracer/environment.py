"""The environment variables that pass from the collector to the shim."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

SPOOL = "HEAPLEDGER_SPOOL"
OPTIONS = "HEAPLEDGER_OPTIONS"
PRELOAD = "LD_PRELOAD"


def preload_value(library: Path, existing: str | None) -> str:
    """LD_PRELOAD with `library` first. The loader splits at spaces and colons: neither may be in the path."""
    return f"{library}:{existing}" if existing else str(library)


def for_target(base: Mapping[str, str], *, library: Path, spool: Path, options: Mapping[str, str]) -> dict[str, str]:
    """The environment to start the traced program with."""
    environment = dict(base)
    environment[PRELOAD] = preload_value(library, base.get(PRELOAD))
    environment[SPOOL] = str(spool)
    environment[OPTIONS] = ",".join(f"{name}={value}" for name, value in options.items())
    return environment
