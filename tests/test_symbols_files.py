"""Which files are read for a binary: build-ids, separate debug files, stripped binaries, load bias."""

from __future__ import annotations

import ctypes
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile
from symbols_programs import build, function_addresses, tool

from heapledger.tracer.symbols import Frame, Symbolizer, build_id, elf, load_bias


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A C program with debug information in it, exporting its functions."""
    return build(tmp_path_factory.mktemp("symbols"), "c", "program", "-rdynamic")


def run(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def resolve(path: Path, addresses: list[int], *debug_dirs: Path, build_id: str | None = None) -> list[list[Frame]]:
    with Symbolizer(debug_dirs=debug_dirs, cache_dir=None) as symbols:
        return symbols.resolve(path, addresses, build_id=build_id)


def split(program: Path, folder: Path) -> tuple[Path, Path]:
    """The program stripped, and its debug information in a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    stripped, debug = folder / "stripped", folder / "stripped.debug"
    run(tool("objcopy"), "--only-keep-debug", program, debug)
    run(tool("objcopy"), "--strip-all", program, stripped)
    return stripped, debug


def lines_known(found: list[list[Frame]]) -> int:
    return sum(1 for frames in found if frames and frames[-1].line)


def test_the_build_id_is_the_one_readelf_shows(program: Path) -> None:
    shown = run(tool("readelf"), "-n", program).partition("Build ID: ")[2].split()[0]
    assert build_id(program) == shown


def test_a_file_without_section_headers_still_has_its_build_id(program: Path, tmp_path: Path) -> None:
    data = bytearray(program.read_bytes())
    data[0x28:0x30] = bytes(8)  # e_shoff
    data[0x3C:0x40] = bytes(4)  # e_shnum, e_shstrndx
    (tmp_path / "headless").write_bytes(data)
    assert build_id(tmp_path / "headless") == build_id(program)


def test_no_build_id_in_a_text_file_an_empty_one_or_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not an ELF file")
    (tmp_path / "empty").touch()
    assert [build_id(tmp_path / name) for name in ("text", "empty", "missing", ".")] == [None] * 4


def test_a_debug_file_is_found_by_build_id(program: Path, tmp_path: Path) -> None:
    stripped, debug = split(program, tmp_path)
    known = build_id(program) or ""
    place = tmp_path / "debug" / ".build-id" / known[:2] / f"{known[2:]}.debug"
    place.parent.mkdir(parents=True)
    shutil.copy(debug, place)
    addresses = function_addresses(program, 200)
    assert resolve(stripped, addresses, tmp_path / "debug") == resolve(program, addresses)
    assert lines_known(resolve(stripped, addresses)) == 0


def test_a_debug_file_of_another_build_is_not_believed(program: Path, tmp_path: Path) -> None:
    stripped, _ = split(program, tmp_path)
    known = build_id(program) or ""
    place = tmp_path / "debug" / ".build-id" / known[:2] / f"{known[2:]}.debug"
    place.parent.mkdir(parents=True)
    shutil.copy("/bin/true", place)
    assert lines_known(resolve(stripped, function_addresses(program, 50), tmp_path / "debug")) == 0


@pytest.mark.parametrize("folder", ["", ".debug"])
def test_a_debug_file_is_found_by_its_debuglink(program: Path, tmp_path: Path, folder: str) -> None:
    stripped, debug = split(program, tmp_path)
    run(tool("objcopy"), "--remove-section=.note.gnu.build-id", f"--add-gnu-debuglink={debug}", stripped)
    (tmp_path / folder).mkdir(exist_ok=True)
    debug.rename(tmp_path / folder / debug.name)
    addresses = function_addresses(program, 200)
    assert build_id(stripped) is None
    assert resolve(stripped, addresses) == resolve(program, addresses)


def test_a_debuglink_is_found_under_the_debug_folder(program: Path, tmp_path: Path) -> None:
    stripped, debug = split(program, tmp_path / "bin")
    run(tool("objcopy"), "--remove-section=.note.gnu.build-id", f"--add-gnu-debuglink={debug}", stripped)
    place = tmp_path / "debug" / str(stripped.parent.resolve()).lstrip("/")
    place.mkdir(parents=True)
    debug.rename(place / debug.name)
    addresses = function_addresses(program, 50)
    assert resolve(stripped, addresses, tmp_path / "debug") == resolve(program, addresses)


def test_a_debuglink_with_a_wrong_checksum_is_not_believed(program: Path, tmp_path: Path) -> None:
    stripped, debug = split(program, tmp_path)
    run(tool("objcopy"), "--remove-section=.note.gnu.build-id", f"--add-gnu-debuglink={debug}", stripped)
    with debug.open("ab") as stream:
        stream.write(b"\0")
    assert lines_known(resolve(stripped, function_addresses(program, 50))) == 0


def test_a_stripped_program_has_the_names_it_exports(program: Path, tmp_path: Path) -> None:
    stripped, _ = split(program, tmp_path)
    exported = {int(line.split()[0], 16): line.split()[2] for line in run(tool("nm"), "-D", program).splitlines()
                if line.split()[-2] == "T"}  # fmt: skip
    outer = next(address for address, name in exported.items() if name == "outer")
    assert resolve(stripped, [outer + 3]) == [[Frame("outer", None, None, False)]]


def test_names_of_a_stripped_program_come_from_its_minidebuginfo(program: Path, tmp_path: Path) -> None:
    """As Fedora makes it: the full symbol table, xz-compressed, in .gnu_debugdata."""
    stripped, _ = split(program, tmp_path)
    run(tool("objcopy"), "--strip-debug", program, tmp_path / "mini")
    (tmp_path / "mini.xz").write_bytes(lzma.compress((tmp_path / "mini").read_bytes()))
    run(tool("objcopy"), f"--add-section=.gnu_debugdata={tmp_path / 'mini.xz'}", stripped)
    listing = run(tool("nm"), program)
    nested = next(
        int(line.split()[0], 16) for line in listing.splitlines() if " t nested" in line or " t apply" in line
    )
    assert resolve(stripped, [nested])[0][0].function in ("nested", "nested.0", "apply", "apply.constprop.0")


def test_a_file_of_another_build_id_is_not_trusted(program: Path) -> None:
    addresses = function_addresses(program, 20)
    assert resolve(program, addresses, build_id="00" * 20) == [[]] * 20
    assert lines_known(resolve(program, addresses, build_id=build_id(program)))


def test_a_deleted_binary_is_resolved_from_the_debug_folder(program: Path, tmp_path: Path) -> None:
    known = build_id(program) or ""
    _, debug = split(program, tmp_path)
    place = tmp_path / "debug" / ".build-id" / known[:2] / f"{known[2:]}.debug"
    place.parent.mkdir(parents=True)
    debug.rename(place)
    addresses = function_addresses(program, 50)
    assert resolve(tmp_path / "gone", addresses, tmp_path / "debug", build_id=known) == resolve(program, addresses)


def test_addresses_outside_any_function_have_no_frames(program: Path) -> None:
    assert resolve(program, [0, 1, (1 << 64) - 1, 1 << 64, -5]) == [[]] * 5


def test_answers_keep_the_order_and_number_of_the_questions(program: Path) -> None:
    addresses = function_addresses(program, 30)
    asked = [*addresses, *reversed(addresses), 0]
    found = resolve(program, asked)
    assert found[:30] == found[30:60][::-1]
    assert found[60] == []


class _Info(ctypes.Structure):
    """The front of struct dl_phdr_info."""

    _fields_ = (("address", ctypes.c_size_t), ("name", ctypes.c_char_p))


def loader_biases() -> dict[str, int]:
    """dlpi_addr of each library of this process: what the dynamic loader itself says."""
    found: dict[str, int] = {}

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Info), ctypes.c_size_t, ctypes.c_void_p)
    def note(info: Any, _size: int, _data: int) -> int:
        found[os.path.realpath(info.contents.name.decode())] = info.contents.address
        return 0

    ctypes.CDLL(None).dl_iterate_phdr(note, None)
    return found


def test_the_load_bias_of_every_mapping_is_the_one_the_loader_says() -> None:
    biases = loader_biases()
    compared = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        parts = line.split(None, 5)
        if len(parts) == 6 and parts[5] in biases and "x" in parts[1]:
            start = int(parts[0].split("-")[0], 16)
            compared += 1
            assert load_bias(parts[5], start, int(parts[2], 16)) == biases[parts[5]], line
            assert load_bias(parts[5], start, int(parts[2], 16), executable=True) == biases[parts[5]], line
    assert compared >= 3


def test_the_load_bias_of_a_program_at_fixed_addresses_is_zero(tmp_path: Path) -> None:
    path = build(tmp_path, "c", "fixed", "-no-pie")
    loads = [line.split(None, 6) for line in run(tool("readelf"), "-lW", path).splitlines() if " LOAD " in line]
    assert len(loads) >= 2
    for _, offset, address, *_, flags in loads:
        page = ~4095
        if "E" in flags.split("0x")[0] or int(offset, 16) == 0:
            assert load_bias(path, int(address, 16) & page, int(offset, 16) & page) == 0


def test_shared_debug_information_that_dwz_moved_out_is_followed(program: Path, tmp_path: Path) -> None:
    """dwz -m: names and abstract functions of two programs in a third file, linked by .gnu_debugaltlink."""
    dwz = tool("dwz")
    cxx = build(tmp_path, "cpp", "first")
    for name in ("one", "two"):
        shutil.copy(cxx, tmp_path / name)
    run(dwz, "-m", tmp_path / "shared", tmp_path / "one", tmp_path / "two")
    assert ".gnu_debugaltlink" in run(tool("readelf"), "-SW", tmp_path / "one")
    addresses = function_addresses(cxx, 200)
    assert resolve(tmp_path / "one", addresses) == resolve(cxx, addresses)


SEGMENTS = {"PT_LOAD": elf.PT_LOAD, "PT_NOTE": elf.PT_NOTE}


def some_elf_files(folder: Path) -> list[Path]:
    """Programs and libraries of this system, an object with more sections than a header can count, and a 32-bit one."""
    many, narrow = folder / "many.o", folder / "narrow.o"
    sections = "".join(f'.section .text.f{number},"ax"\nret\n' for number in range(65_300))
    for path, text, flags in ((many, sections, ["--64"]), (narrow, ".text\nf: ret\n", ["--32"])):
        subprocess.run([tool("as"), *flags, "-o", str(path), "-"], input=text.encode(), check=True)
    found = [
        Path(sys.executable).resolve(),
        many,
        narrow,
        *sorted(Path("/usr/lib/x86_64-linux-gnu").glob("lib[a-m]*.so")),
    ]
    return [path for path in found[:60] if path.read_bytes()[:4] == b"\x7fELF"]


def test_headers_are_read_as_pyelftools_reads_them(tmp_path: Path) -> None:
    files = some_elf_files(tmp_path)
    assert len(files) > 3
    for path in files:
        with path.open("rb") as stream, elf.Elf(path) as ours:
            theirs = ELFFile(stream)
            expected = {}
            for section in theirs.iter_sections():
                header = section.header
                size = 0 if header["sh_type"] == "SHT_NOBITS" else header["sh_size"]
                expected.setdefault(section.name, (header["sh_addr"], size, header["sh_entsize"], header["sh_flags"]))
            found = {name: (s.address, s.size, s.entry_size, s.flags) for name, s in ours.sections.items()}
            assert found == expected, path
            loads = [s.header for s in theirs.iter_segments() if s.header["p_type"] in SEGMENTS]
            assert [s for s in ours.segments() if s.kind in SEGMENTS.values()] == [
                elf.Segment(SEGMENTS[h["p_type"]], h["p_offset"], h["p_vaddr"], h["p_filesz"], bool(h["p_flags"] & 1))
                for h in loads
            ], path
            assert ours.wide == (theirs.elfclass == 64)
