"""The shim is built once and runs with every libc from 2.31 on: tried with the packages in ../shared/glibc."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from preload_spool import Run, Shim, plain, rows_said, shim, shim_library  # noqa: F401

from heapledger.store.events import Kind

NATIVE = Path(__file__).parent / "native"
PACKAGES = Path(__file__).parents[2] / "shared" / "glibc"
VERSIONS = ("2.31", "2.36", "2.41")
OLDEST = (2, 31)


@dataclass
class OldLibc:
    """An unpacked libc6 package."""

    version: str
    libraries: Path

    def command(self, *argv: str | Path) -> list[str | Path]:
        return [self.libraries / "ld-linux-x86-64.so.2", "--library-path", self.libraries, *argv]

    def run(self, shim: Shim, *argv: str | Path) -> Run:  # noqa: F811
        return shim.run(*self.command(*argv))


def _unpack(version: str, folder: Path) -> OldLibc:
    packages = sorted(PACKAGES.glob(f"libc6_{version}-*.deb"))
    if not packages or not shutil.which("dpkg-deb"):
        pytest.skip(f"no libc6 {version} package in ../shared/glibc, or no dpkg-deb")
    subprocess.run(["dpkg-deb", "-x", packages[0], folder], check=True)
    found = next(path for path in folder.rglob("libc.so.6"))
    return OldLibc(version, found.parent)


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> OldLibc:
    return _unpack("2.31", tmp_path_factory.mktemp("libc-2.31"))


@pytest.fixture(scope="module", params=VERSIONS)
def libc(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OldLibc:
    return _unpack(request.param, tmp_path_factory.mktemp(f"libc-{request.param}"))


@pytest.fixture(scope="module")
def programs(oldest: OldLibc, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The test programs, linked with the oldest libc's own libraries so that every later one can run them."""
    folder = tmp_path_factory.mktemp("programs")
    libraries = [
        oldest.libraries / name for name in ("libpthread.so.0", "libdl.so.2", "libc.so.6", "ld-linux-x86-64.so.2")
    ]
    asked = ["gcc", "-print-file-name=libc_nonshared.a"]
    nonshared = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    built = {}
    for name in ("shim_calls", "shim_process"):
        built[name] = folder / name
        command: list[str | Path] = [
            "gcc",
            "-g",
            "-O1",
            NATIVE / f"{name}.c",
            "-o",
            built[name],
            "-nodefaultlibs",
            *libraries,
            nonshared,
            "-lgcc",
        ]
        subprocess.run(command, check=True)
    return built


def test_the_shim_needs_nothing_newer_than_its_oldest_libc(shim_library: Path) -> None:  # noqa: F811
    table = subprocess.run(["objdump", "-T", shim_library], capture_output=True, text=True, check=True).stdout
    needed = {tuple(map(int, match.split("."))) for match in re.findall(r"GLIBC_([0-9.]+)", table)}
    assert needed
    assert max(needed) <= OLDEST
    sections = subprocess.run(["readelf", "-d", shim_library], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"\(NEEDED\).*\[(.*)\]", sections) == ["libc.so.6"]


def test_every_call_is_recorded_under_this_libc(shim: Shim, libc: OldLibc, programs: dict[str, Path]) -> None:  # noqa: F811
    run = libc.run(shim, programs["shim_calls"])
    assert run.code == 0
    rows = run.first.rows()
    start = next(i for i, row in enumerate(rows) if row[0] == Kind.MALLOC and row[2] == 0x12345)
    expected = rows_said(run.stdout)
    assert rows[start + 1 : start + 1 + len(expected)] == expected
    assert run.first.log[0][3].startswith(libc.version)
    run.first.check()


@pytest.mark.parametrize("way", ["fork", "rawfork", "threads", "thread_ends", "exit", "_exit", "quick_exit", "longjmp"])
def test_processes_and_threads_work_under_this_libc(
    shim: Shim,  # noqa: F811
    libc: OldLibc,
    programs: dict[str, Path],
    way: str,
) -> None:
    if way == "thread_ends" and plain(*libc.command(programs["shim_process"], way)).returncode:
        pytest.skip("this libc needs its own libgcc_s.so.1 to end a thread early, which the package does not hold")
    run = libc.run(shim, programs["shim_process"], way)
    assert run.stderr == b""
    assert run.code == {"exit": 12, "_exit": 13, "quick_exit": 15}.get(way, 0)
    assert len(run.images) == (2 if "fork" in way else 1)
    for image in run.images:
        assert image.held == 1
        image.check()
    if way == "thread_ends":
        assert run.first.of(Kind.THREAD_END).thread.tolist() == [1, 2, 3, 4]
