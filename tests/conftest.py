"""Fixtures that every test may use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from compared import Both, runner

NATIVE = Path(__file__).parent / "native"


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`native("name.c", *flags)` compiles tests/native/name.c (or .cpp) once a session and gives the program's path."""
    folder = tmp_path_factory.mktemp("native")
    built: dict[tuple[str, ...], Path] = {}

    def build(source: str, *flags: str) -> Path:
        key = (source, *flags)
        if key not in built:
            target = folder / f"{Path(source).stem}-{len(built)}"
            compiler = "g++" if source.endswith(".cpp") else "gcc"
            subprocess.run([compiler, "-g", "-Wall", str(NATIVE / source), "-o", str(target), *flags], check=True)
            built[key] = target
        return built[key]

    return build


@pytest.fixture(scope="session")
def heapledger() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`heapledger("report", file)` runs the command line in a process of its own, output captured as text."""

    def run(*args: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        settings: dict[str, object] = {"capture_output": True, "text": True, "timeout": 300, **options}
        argv = [sys.executable, "-m", "heapledger", *map(str, args)]
        return subprocess.run(argv, check=False, **settings)  # type: ignore[call-overload, no-any-return]

    return run


@pytest.fixture
def both(tmp_path: Path) -> Callable[..., Both]:
    """`both(argv)` runs a command alone and then traced, each in an empty folder of the same path."""
    return runner(tmp_path)
