"""What can be traced and what cannot, on real programs."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from heapledger.errors import TargetError
from heapledger.tracer import target
from heapledger.tracer.target import examine

TRUE = "/usr/bin/true"
MAIN = "int main(void) { return 0; }"


def build(folder: Path, source: str, *flags: str, name: str = "program") -> Path:
    (folder / f"{name}.c").write_text(source)
    result = subprocess.run(["gcc", "-o", folder / name, folder / f"{name}.c", *flags], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"gcc cannot build this here: {result.stderr.splitlines()[-1]}")
    return folder / name


def refusal(path: Path | str) -> TargetError:
    with pytest.raises(TargetError) as caught:
        examine(str(path), os.environ)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    return caught.value


def patched(folder: Path, changes: dict[int, bytes]) -> Path:
    """A copy of `true` with other bytes at some offsets."""
    data = bytearray(Path(TRUE).read_bytes())
    for offset, value in changes.items():
        data[offset : offset + len(value)] = value
    path = folder / "patched"
    path.write_bytes(data)
    path.chmod(0o755)
    return path


def test_a_command_is_found_as_a_shell_finds_it(tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to(TRUE)
    target = examine("mine", {"PATH": f"/nowhere:{tmp_path}"})
    assert target.path == str(tmp_path / "mine")
    assert not target.warnings


def test_what_is_not_there_is_named() -> None:
    assert "no command 'no-such-command'" in refusal("no-such-command").message
    assert "'/no/such/file' does not exist" in refusal("/no/such/file").message


def test_folders_and_files_that_cannot_run_are_refused(tmp_path: Path) -> None:
    assert "folder" in refusal(tmp_path).message
    path = tmp_path / "data"
    path.write_text("x")
    assert "not executable" in refusal(path).message
    path.chmod(0o755)
    assert "neither ELF nor a script" in refusal(path).message


def test_a_script_is_followed_to_its_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\nexit 0\n")
    script.chmod(0o755)
    target = examine(str(script), os.environ)
    assert (target.script, target.path, target.program) == (True, str(script), "/bin/sh")
    script.write_text("#!/usr/bin/env -S sh -e\nexit 0\n")
    assert examine(str(script), os.environ).program.endswith("/sh")
    script.write_text("#!/no/such/interpreter\n")
    assert "/no/such/interpreter" in refusal(script).message


@pytest.mark.parametrize("flag", ["-static", "-static-pie"])
def test_static_programs_are_refused(tmp_path: Path, flag: str) -> None:
    assert "statically linked" in refusal(build(tmp_path, MAIN, flag)).message


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    assert "aarch64" in refusal(patched(tmp_path, {18: struct.pack("<H", 183)})).message
    thirty_two = bytearray(Path(TRUE).read_bytes()[:52])
    thirty_two[4] = 1
    thirty_two[18:20] = struct.pack("<H", 3)
    path = tmp_path / "i386"
    path.write_bytes(thirty_two)
    path.chmod(0o755)
    assert "32-bit" in refusal(path).message


def test_big_endian_programs_are_refused_by_their_machine(tmp_path: Path) -> None:
    path = patched(tmp_path, {5: b"\x02", 16: struct.pack(">HH", 2, 22)})
    assert "S/390" in refusal(path).message


def test_libraries_and_loader_are_those_that_readelf_prints() -> None:
    printed = subprocess.run(["readelf", "-ld", sys.executable], capture_output=True, text=True, check=True).stdout
    with open(sys.executable, "rb") as file:
        elf = ELFFile(file)
        assert target._needed(elf) == re.findall(r"\(NEEDED\).*\[(.*)\]", printed)
        assert [target._segment_interpreter(elf)] == re.findall(r"interpreter: (.*)\]", printed)


def test_musl_programs_are_refused(tmp_path: Path) -> None:
    program = build(tmp_path, MAIN, "-Wl,--dynamic-linker=/lib/ld-musl-x86_64.so.1")
    assert "musl" in refusal(program).message


def test_a_missing_loader_is_named(tmp_path: Path) -> None:
    program = build(tmp_path, MAIN, "-Wl,--dynamic-linker=/lib/ld-other.so.1")
    assert "/lib/ld-other.so.1" in refusal(program).message


@pytest.mark.parametrize("length", [17, 64, 700])
def test_damaged_elf_files_give_one_clear_line(tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut"
    path.write_bytes(Path(TRUE).read_bytes()[:length])
    path.chmod(0o755)
    refusal(path)


def test_bytes_flipped_in_the_header_never_raise_anything_else(tmp_path: Path) -> None:
    for offset in range(16, 64):
        path = patched(tmp_path, {offset: b"\xff"})
        try:
            examine(str(path), os.environ)
        except TargetError:
            continue


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a file to somebody else")
@pytest.mark.parametrize("mode", [0o4755, 0o2755])
def test_programs_that_change_identity_are_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "set"
    shutil.copy(TRUE, path)
    os.chown(path, 65534, 65534)
    path.chmod(mode)
    assert "LD_PRELOAD" in refusal(path).message


def test_a_setuid_program_that_changes_nothing_can_be_traced(tmp_path: Path) -> None:
    path = tmp_path / "set"
    shutil.copy(TRUE, path)
    path.chmod(0o4755)
    assert not examine(str(path), os.environ).warnings


def test_sanitizers_are_refused(tmp_path: Path) -> None:
    assert "AddressSanitizer" in refusal(build(tmp_path, MAIN, "-fsanitize=address")).message


def test_a_sanitizer_in_the_environment_is_refused() -> None:
    with pytest.raises(TargetError, match="LD_PRELOAD names ThreadSanitizer"):
        examine(TRUE, {"LD_PRELOAD": "/usr/lib/other.so /usr/lib/x86_64-linux-gnu/libtsan.so.2"})


@pytest.mark.parametrize("flags", [(), ("-rdynamic",)])
def test_a_program_with_its_own_malloc_is_warned_about(tmp_path: Path, flags: tuple[str, ...]) -> None:
    own = "#include <stddef.h>\nvoid *malloc(size_t n) { (void)n; return 0; }\nvoid free(void *p) { (void)p; }\n"
    target = examine(str(build(tmp_path, own + MAIN, "-fno-builtin", *flags)), os.environ)
    assert "own malloc" in target.warnings[0]


def test_another_allocator_among_the_libraries_is_warned_about(tmp_path: Path) -> None:
    build(tmp_path, "int nothing;", "-shared", "-fPIC", "-Wl,-soname,libjemalloc.so.2", name="libjemalloc.so")
    program = build(tmp_path, MAIN, "-Wl,--no-as-needed", f"-L{tmp_path}", "-l:libjemalloc.so")
    assert "libjemalloc.so.2" in examine(str(program), os.environ).warnings[0]
