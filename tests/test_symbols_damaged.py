"""Files that lie: no exception, little time and memory; addresses are unresolved, or named by what is left."""

from __future__ import annotations

import importlib.util
import os
import random
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from symbols_programs import build, function_addresses, tool

from heapledger.tracer.symbols import Symbolizer, build_id, load_bias
from heapledger.tracer.symbols.damaged import DamagedError
from heapledger.tracer.symbols.elf import check_declared, inflate_zlib
from heapledger.tracer.symbols.engine import COMPILED

WORST_SECONDS = 5.0


@pytest.fixture(params=["compiled", "interpreted"])
def compiled(request: pytest.FixtureRequest) -> bool:
    if request.param == "compiled" and importlib.util.find_spec(COMPILED) is None:
        pytest.skip("the compiled inner loops are not built: python setup.py build_ext --inplace")
    return bool(request.param == "compiled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("symbols")


def survives(path: Path, addresses: list[int], compiled: bool) -> float:
    """Seconds that all of the API takes on a file; an exception fails the test."""
    start = time.perf_counter()
    with Symbolizer(debug_dirs=(), cache_dir=None, compiled=compiled) as symbols:
        found = symbols.resolve(path, addresses)
    build_id(path)
    load_bias(path, 0x10000, 0)
    assert len(found) == len(addresses)
    return time.perf_counter() - start


def interesting_places(path: Path) -> list[tuple[int, int]]:
    """(offset, size) of the ELF header, the section headers, and each section that describes code."""
    with path.open("rb") as stream:
        elf = ELFFile(stream)
        places = [(0, 64), (elf["e_shoff"], 64 * elf.num_sections()), (elf["e_phoff"], 56 * elf.num_segments())]
        for section in elf.iter_sections():
            if section.name.startswith((".debug_", ".symtab", ".strtab", ".note", ".dynsym", ".gnu_debug")):
                places.append((section["sh_offset"], section["sh_size"]))
    return [(offset, size) for offset, size in places if size]


@pytest.mark.parametrize(("flags", "rounds"), [((), 250), (("-gdwarf-4",), 150), (("-gz",), 100)])
def test_a_program_with_random_bytes_changed_raises_nothing(
    folder: Path, tmp_path: Path, flags: tuple[str, ...], rounds: int, compiled: bool
) -> None:
    path = build(folder, "c", "plain" + "".join(flags), *flags)
    good = path.read_bytes()
    places = interesting_places(path)
    addresses = function_addresses(path, 60)
    chance = random.Random(f"{flags}{compiled}")
    for number in range(rounds if compiled else rounds // 4):
        data = bytearray(good)
        for _ in range(chance.choice((1, 3, 20, 200))):
            offset, size = chance.choice(places)
            at = chance.randrange(size if chance.random() < 0.6 else min(size, 48))
            data[offset + at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        if number % 5 == 0:
            del data[chance.randrange(len(data)) :]
        (tmp_path / "damaged").write_bytes(data)
        assert survives(tmp_path / "damaged", addresses, compiled) < WORST_SECONDS, number


def test_a_debug_section_of_noise_leaves_the_symbol_table(folder: Path, tmp_path: Path, compiled: bool) -> None:
    path = build(folder, "c", "plain")
    (tmp_path / "noise").write_bytes(random.Random(7).randbytes(5000))
    damaged = tmp_path / "damaged"
    update = f"--update-section=.debug_info={tmp_path / 'noise'}"
    subprocess.run([tool("objcopy"), update, str(path), str(damaged)], check=True, capture_output=True)
    addresses = function_addresses(path, 50)
    with Symbolizer(debug_dirs=(), cache_dir=None, compiled=compiled) as symbols:
        names = [frames[-1].function for frames in symbols.resolve(damaged, addresses) if frames]
    assert "outer" in names
    assert len(names) == 50


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 63, 64, 65, 1000, 5000])
def test_a_file_cut_short_raises_nothing(folder: Path, tmp_path: Path, cut: int, compiled: bool) -> None:
    path = build(folder, "c", "plain")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:cut])
    assert survives(tmp_path / "cut", function_addresses(path, 10), compiled) < WORST_SECONDS


def test_folders_devices_pipes_and_missing_files_have_no_frames(tmp_path: Path, compiled: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), Path("/proc/self/mem"), tmp_path / "missing"):
        assert survives(path, [0x1000], compiled) < WORST_SECONDS


def test_a_declared_size_that_cannot_be_is_refused_before_memory_is_taken() -> None:
    packed = zlib.compress(bytes(1000))
    for declared in (1 << 62, 1 << 31, len(packed) * 1041):
        with pytest.raises(DamagedError, match="impossible size"):
            check_declared(declared, len(packed))
    assert inflate_zlib(packed, 1000) == bytes(1000)


def test_a_section_that_inflates_to_more_than_it_declares_is_cut_off() -> None:
    packed = zlib.compress(bytes(50 << 20))
    assert inflate_zlib(packed, 4096) == bytes(4096)
    with pytest.raises(DamagedError, match="declared size"):
        inflate_zlib(zlib.compress(bytes(10)), 4096)


def test_a_compressed_section_declared_as_a_terabyte_takes_no_memory(folder: Path, tmp_path: Path) -> None:
    """In a process of its own that may have half a gigabyte of address space."""
    path = build(folder, "c", "packed", "-gz")
    data = bytearray(path.read_bytes())
    with path.open("rb") as stream:
        sections = [s["sh_offset"] for s in ELFFile(stream).iter_sections() if s["sh_flags"] & 0x800]
    assert sections
    for offset in sections:
        struct.pack_into("<Q", data, offset + 8, 1 << 40)
    (tmp_path / "bomb").write_bytes(data)
    code = (
        "import sys\nfrom heapledger.tracer.symbols import Symbolizer\n"
        "print(Symbolizer((), None).resolve(sys.argv[1], [int(sys.argv[2])])[0][0].function)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bomb"), str(function_addresses(path, 1)[0])],
        capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (512 << 20,) * 2),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def unit(abbrevs: bytes, dies: bytes) -> object:
    """A DWARF 4 unit with the given abbreviations and DIEs, through the interpreted inner loops."""
    from heapledger.tracer.symbols import interpreted as engine

    body = struct.pack("<HIB", 4, 0, 8) + dies
    made = engine.Unit(struct.pack("<I", len(body)) + body, 0)
    made.use_abbrevs(engine.AbbrevTable(abbrevs, 0, engine.form_ops(8, 4, 4), 4))
    return made


def test_a_sibling_that_points_backwards_does_not_loop() -> None:
    """compile_unit { structure_type with children, sibling = its own offset }."""
    from array import array

    from heapledger.tracer.symbols import interpreted as engine

    abbrevs = bytes([1, 0x11, 1, 0, 0, 2, 0x13, 1, 1, 0x13, 0, 0, 0])
    made = unit(abbrevs, bytes([1, 2]) + struct.pack("<I", 12) + bytes([0, 0]))
    walker = engine.FunctionWalker(made, engine.RangeReader(b"", b""), array("Q", [1]))  # type: ignore[arg-type]
    walker.walk(False)
    assert walker.unclaimed() == 1


@pytest.mark.parametrize(
    "abbrevs",
    [
        bytes([5, 0x11, 0, 0, 0, 0]),  # codes that do not count up
        bytes([1, 0x11, 0, 3, 0x7E, 0, 0, 0]),  # a form that is none
        bytes([1, 0x11, 0]) + bytes([3, 0x19]) * 300 + bytes(3),  # more attributes than any DIE has
        bytes([1, 0x11]),
    ],
)
def test_abbreviations_that_no_compiler_writes_are_refused(abbrevs: bytes) -> None:
    with pytest.raises(DamagedError):
        unit(abbrevs, b"")
