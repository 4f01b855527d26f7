"""A command run alone and under heapledger, to be compared: what a user would see, bytes and status."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HEAPLEDGER = [sys.executable, "-m", "heapledger"]


@dataclass
class Both:
    """A command's result alone and under heapledger, and the trace of the latter."""

    plain: subprocess.CompletedProcess[bytes]
    traced: subprocess.CompletedProcess[bytes]
    trace: Path

    def check_same(self) -> None:
        alone, ours = self.plain, self.traced
        assert (ours.returncode, ours.stdout, ours.stderr) == (alone.returncode, alone.stdout, alone.stderr)

    def verify(self) -> dict[str, Any]:
        found = subprocess.run(
            [*HEAPLEDGER, "verify", self.trace, "--format", "json"], capture_output=True, check=False
        )
        assert found.returncode == 0, found.stderr
        return dict(json.loads(found.stdout))

    def check_exact(self, *, processes: int = 1) -> None:
        """Every address predicted, nothing lost, every page owned; at least so many processes."""
        found = self.verify()
        assert found["lost"] == 0
        assert len(found["processes"]) >= processes
        assert found["addresses"]["predicted"] > 0
        assert found["addresses"]["exact"] == found["addresses"]["predicted"], json.dumps(found, indent=1)[:4000]
        assert found["maps"]["exact"] == found["maps"]["compared"]
        assert found["rss"]["ledger_bytes"] == found["rss"]["kernel_bytes"]


def runner(tmp_path: Path) -> Callable[..., Both]:
    """`both(argv)` runs a command alone and then traced, each in an empty folder of the same path."""

    def run(
        argv: list[str], *, env: Mapping[str, str] | None = None, stdin: bytes = b"", options: tuple[str, ...] = ()
    ) -> Both:
        if shutil.which(argv[0]) is None:
            pytest.skip(f"{argv[0]} is not installed")
        trace = tmp_path / "trace.heapledger"
        folder = tmp_path / "work"
        ours = [*HEAPLEDGER, "run", "-q", "--no-symbols", *options, "-o", str(trace), "--"]
        results = []
        for command in (argv, [*ours, *argv]):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            settings: dict[str, Any] = {"cwd": folder, "env": os.environ if env is None else env, "input": stdin}
            results.append(subprocess.run(command, capture_output=True, timeout=60, check=False, **settings))
        return Both(results[0], results[1], trace)

    return run
