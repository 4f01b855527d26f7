"""Call stacks, frame by frame, against libgcc's unwinder; and each answer of the memo against a full unwind.

The unwinder runs in test programs of its own (tests/native/stack_*), built with -DHEAPLEDGER_CHECK_STACKS: a stack that
a walk with all registers and without any cache, or each 64th time libgcc, does not confirm ends the program.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from preload_spool import shim_library  # noqa: F401

NATIVE = Path(__file__).parent / "native"
PRELOAD = Path(__file__).parents[1] / "preload"
PACKAGES = Path(__file__).parents[2] / "shared" / "glibc"
UNWINDER = sorted([*PRELOAD.glob("stack*.c"), *PRELOAD.glob("unwind*.c")])
OLD_LIBRARIES = ("libpthread.so.0", "libdl.so.2", "libc.so.6", "ld-linux-x86-64.so.2")
WARN = ["-Wall", "-Wextra", "-Werror"]

#: What stack_shapes.c can do, but for the ways that signals arrive in.
SHAPES = ("shapes", "recursion", "bases", "libc", "signals", "threads", "jumps", "coroutines")
#: With the loader's lock-free lookup, and as it is on a libc before 2.35.
LOOKUPS: tuple[dict[str, str], ...] = ({}, {"NO_FIND_OBJECT": "1"})


@dataclass
class Counts:
    """The line that stack_test_report prints."""

    code: int
    numbers: dict[str, int]

    def __getitem__(self, name: str) -> int:
        return self.numbers[name]


def _run(*argv: str | Path, env: dict[str, str] | None = None) -> Counts:
    command = [str(part) for part in argv]
    done = subprocess.run(
        command, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return Counts(done.returncode, {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", done.stdout)})


Build = Callable[..., Path]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The unwinder and the rest of the shim that it needs, compiled as the shim is."""
    folder = tmp_path_factory.mktemp("stack-objects")
    flags = [
        "-std=gnu11",
        "-O2",
        "-g",
        "-fPIC",
        "-fno-builtin",
        "-ftls-model=initial-exec",
        "-DHEAPLEDGER_CHECK_STACKS",
    ]
    sources = [str(source) for source in (*UNWINDER, NATIVE / "stack_host.c")]
    subprocess.run(["gcc", *flags, *WARN, "-c", *sources], cwd=folder, check=True)
    return sorted(folder.glob("*.o"))


@pytest.fixture(scope="module")
def build(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`build("name.c", *flags)` compiles a test program with the unwinder in it, once."""
    folder = tmp_path_factory.mktemp("stack-programs")
    built: dict[tuple[str, ...], Path] = {}

    def make(source: str, *flags: str) -> Path:
        key = (source, *flags)
        if key not in built:
            target = folder / f"{Path(source).stem}-{len(built)}"
            compiler = "g++" if source.endswith(".cpp") else "gcc"
            command: list[str | Path] = [compiler, "-g", *WARN, *flags, NATIVE / source, *objects, "-o", target]
            subprocess.run([*command, "-rdynamic", "-pthread", "-ldl"], check=True)
            built[key] = target
        return built[key]

    return make


@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize("way", SHAPES)
def test_every_frame_is_the_one_that_libgcc_finds(build: Build, way: str, level: str) -> None:
    counts = _run(build("stack_shapes.c", level), way)
    assert (counts.code, counts["mismatches"], counts["lost"]) == (0, 0, 0)
    assert counts["captures"] > 200
    if way != "threads":  # whose counters are those of the threads
        assert counts["compared"] > counts["captures"] // 100
        assert counts["hits"] + counts["rejoined"] + counts["walked"] == counts["captures"]


@pytest.mark.parametrize("way", SHAPES)
def test_stacks_are_the_same_without_the_loaders_lookup(build: Build, way: str) -> None:
    counts = _run(build("stack_shapes.c", "-O2"), way, env={"NO_FIND_OBJECT": "1"})
    assert (counts.code, counts["mismatches"], counts["lost"]) == (0, 0, 0)


@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_a_signal_at_any_instruction_changes_no_stack(build: Build, level: str) -> None:
    counts = _run(build("stack_shapes.c", level), "timer", "128", "1000")
    assert (counts.code, counts["mismatches"], counts["lost"]) == (0, 0, 0)
    assert counts["nested"] > 0  # some came while a stack was being captured


def test_a_handler_that_never_returns_leaves_the_next_stacks_right(build: Build) -> None:
    counts = _run(build("stack_shapes.c", "-O2"), "leaving")
    assert (counts.code, counts["mismatches"]) == (0, 0)
    assert counts["nested"] < counts["hits"]  # the thread got back to its fast way


@pytest.mark.parametrize("depth", [1, 2, 7, 128])
@pytest.mark.parametrize("way", ["shapes", "recursion", "libc"])
def test_a_stack_deeper_than_the_limit_keeps_its_innermost_frames_and_says_so(
    build: Build, way: str, depth: int
) -> None:
    counts = _run(build("stack_shapes.c", "-O2"), way, str(depth))
    assert (counts.code, counts["mismatches"]) == (0, 0)
    assert (counts["cut"] > 0) == (depth < 128 or way == "recursion")


@pytest.mark.parametrize("flags", [("-O0",), ("-O2",), ("-O3", "-fno-plt"), ("-O2", "-fno-omit-frame-pointer")])
def test_stacks_of_cpp_with_exceptions_are_the_ones_that_libgcc_finds(build: Build, flags: tuple[str, ...]) -> None:
    counts = _run(build("stack_cpp.cpp", "-std=c++17", *flags))
    assert (counts.code, counts["mismatches"], counts["lost"]) == (0, 0, 0)


def test_a_frame_address_in_another_register_takes_the_walk_with_all_registers(build: Build) -> None:
    counts = _run(build("stack_code.c", "-O2"), "rare")
    assert (counts.code, counts["full"], counts["mismatches"]) == (0, 100, 0)


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_code_without_cfi_is_passed_by_its_frame_pointer_or_marked_as_lost(
    build: Build, lookup: dict[str, str]
) -> None:
    assert _run(build("stack_code.c", "-O2"), "guesses", env=lookup).code == 0


def test_code_registered_with_libgcc_is_followed_as_libgcc_does_or_marked_as_lost(build: Build) -> None:
    counts = _run(build("stack_code.c", "-O2"), "registered")
    assert (counts.code, counts["captures"], counts["mismatches"], counts["lost"]) == (0, 60, 0, 0)


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_a_library_loaded_where_another_one_was_has_its_own_rules(
    build: Build, tmp_path: Path, lookup: dict[str, str]
) -> None:
    plugins = []
    for frame_bytes in (64, 640):
        plugins.append(tmp_path / f"plugin-{frame_bytes:04}.so")
        command: list[str | Path] = [
            "gcc",
            "-O2",
            "-shared",
            "-fPIC",
            f"-DFRAME_BYTES={frame_bytes}",
            NATIVE / "stack_plugin.c",
        ]
        subprocess.run([*command, "-o", plugins[-1]], check=True)
    counts = _run(build("stack_code.c", "-O2"), "reload", *plugins, env=lookup)
    assert (counts.code, counts["mismatches"], counts["lost"]) == (0, 0, 0)


def test_when_nodes_run_out_the_callers_known_are_still_said(build: Build) -> None:
    assert _run(build("stack_code.c", "-O1"), "exhaust", env={"SEGMENTS": "1"}).code == 0


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_errno_is_left_alone(build: Build, lookup: dict[str, str]) -> None:
    assert _run(build("stack_code.c", "-O2"), "errno", env=lookup).code == 0


@pytest.mark.parametrize("version", ["2.31", "2.41"])
def test_stacks_are_right_under_this_libc(version: str, tmp_path: Path) -> None:
    """Without the timer: there libgcc's own lookup, through dl_iterate_phdr, deadlocks before glibc 2.35."""
    folders = {name: _unpack(name, tmp_path / name) for name in {"2.31", version}}
    old, libraries = folders["2.31"], folders[version]
    asked = ["gcc", "-print-file-name=libc_nonshared.a"]
    nonshared = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    program = tmp_path / "shapes"
    flags = ["-std=gnu11", "-O2", "-g", "-DOLD_LIBC", "-DHEAPLEDGER_CHECK_STACKS", "-rdynamic", "-nodefaultlibs"]
    sources = [NATIVE / "stack_shapes.c", NATIVE / "stack_host.c", *UNWINDER]
    linked: list[str | Path] = [*(old / name for name in OLD_LIBRARIES), nonshared, "-lgcc", "-lgcc_eh"]
    subprocess.run(["gcc", *flags, *sources, "-o", program, *linked], check=True)
    for way in SHAPES:
        loader: list[str | Path] = [libraries / "ld-linux-x86-64.so.2", "--library-path", libraries]
        counts = _run(*loader, program, way, env={"NO_FIND_OBJECT": "1"} if version == "2.31" else {})
        assert (way, counts.code, counts["mismatches"], counts["lost"]) == (way, 0, 0, 0)


def _unpack(version: str, folder: Path) -> Path:
    packages = sorted(PACKAGES.glob(f"libc6_{version}-*.deb"))
    if not packages or not shutil.which("dpkg-deb"):
        pytest.skip(f"no libc6 {version} package in ../shared/glibc, or no dpkg-deb")
    subprocess.run(["dpkg-deb", "-x", packages[0], folder], check=True)
    return next(path for path in folder.rglob("libc.so.6")).parent


def test_the_shim_brings_no_other_unwinder_into_the_program(shim_library: Path) -> None:  # noqa: F811
    symbols = subprocess.run(["nm", "-D", shim_library], capture_output=True, text=True, check=True).stdout
    assert "_Unwind_" not in symbols
    assert "__register_frame" not in symbols
    dynamic = subprocess.run(["readelf", "-d", shim_library], capture_output=True, text=True, check=True).stdout
    assert "STATIC_TLS" in dynamic  # initial-exec: a capture never asks the loader for memory
    assert not re.search(r"NEEDED.*lib(gcc_s|unwind)", dynamic)
