"""The environment variables that pass from the collector to the shim."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

SPOOL = "HEAPLEDGER_SPOOL"
OPTIONS = "HEAPLEDGER_OPTIONS"
PRELOAD = "LD_PRELOAD"


def preload_value(library: Path, existing: str | None) -> str:
    """LD_PRELOAD with `library` first. The loader splits at spaces and colons: neither may be in the path."""
    return f"{library}:{existing}" if existing else str(library)


def of_caller() -> dict[str, str]:
    """The environment that heapledger was started with.

    In the C locale Python sets LC_CTYPE for itself and for all it starts (PEP 538); the program must not see that. The
    kernel's copy still is as it was at our exec.
    """
    environment = dict(os.environ)
    try:
        given = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return environment
    if not any(entry.startswith(b"LC_CTYPE=") for entry in given):
        environment.pop("LC_CTYPE", None)
    return environment


def for_target(base: Mapping[str, str], *, library: Path, spool: Path, options: Mapping[str, str]) -> dict[str, str]:
    """The environment to start the traced program with."""
    environment = dict(base)
    environment[PRELOAD] = preload_value(library, base.get(PRELOAD))
    environment[SPOOL] = str(spool)
    environment[OPTIONS] = ",".join(f"{name}={value}" for name, value in options.items())
    return environment
