"""What machine a trace was made on: the facts that the models and the reader of a report need."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def _text(path: str) -> str:
    """The stripped text of a small file of /proc or /sys; "" where it does not exist."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _chosen(text: str) -> str:
    """The word in brackets: "always [madvise] never" → "madvise"."""
    return text.partition("[")[2].partition("]")[0] or text


def boot_id() -> str:
    """Changes with every boot: CLOCK_MONOTONIC and the TSC compare only within one."""
    return _text("/proc/sys/kernel/random/boot_id")


def mem_total_bytes() -> int:
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def facts() -> dict[str, Any]:
    """The `host` column of a session."""
    machine = os.uname()
    overcommit = _text("/proc/sys/vm/overcommit_memory")
    return {
        "kernel": machine.release,
        "machine": machine.machine,
        "hostname": machine.nodename,
        "cpus_online": os.cpu_count() or 1,
        "page_size": os.sysconf("SC_PAGE_SIZE"),
        "memory_bytes": mem_total_bytes(),
        "thp": _chosen(_text("/sys/kernel/mm/transparent_hugepage/enabled")),
        "thp_defrag": _chosen(_text("/sys/kernel/mm/transparent_hugepage/defrag")),
        "overcommit": int(overcommit) if overcommit.isdigit() else None,
        "max_map_count": int(_text("/proc/sys/vm/max_map_count") or 0),
        "aslr": int(_text("/proc/sys/kernel/randomize_va_space") or 0),
        "boot_id": boot_id(),
    }
