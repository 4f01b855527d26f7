"""Functions, files, lines and inline chains, against `addr2line -i -f -C` and `objdump --dwarf=decodedline`.

Where addr2line (binutils 2.40) is wrong, and the tests therefore allow for it:

* An inlined C++ function without a linkage name, when it is the innermost of several frames, gets the name of the
  symbol that covers the address, that is, of the outermost function (`dwarf2.c` asks the symbol table by address), and
  keeps that name in later answers. The outermost then has its short name, where ours has the symbol's (`visible(int)`,
  not `visible`).
* In DWARF 5 with a relative compilation folder, folder 0 is prefixed with itself: `./malloc/./malloc/malloc.c`.
* Lines of code included from another file into a unit (`nss/getXXbyYY.c`), or from the only file of a unit that LTO
  made, keep their number and get the unit's own file name (`<artificial>`); `objdump --dwarf=decodedline`, from the
  same package, has the right file.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
from symbols_programs import (
    CLONE,
    addr2line,
    build,
    decoded_rows,
    function_addresses,
    row_at,
    shown,
    symbol_names,
    tool,
)

from heapledger.tracer.symbols import Frame, Symbolizer
from heapledger.tracer.symbols.engine import COMPILED

LIBC = Path("/lib/x86_64-linux-gnu/libc.so.6")
BUILDS = {
    "dwarf5": (),
    "dwarf4": ("-gdwarf-4",),
    "dwarf3": ("-gdwarf-3", "-gstrict-dwarf"),
    "zlib": ("-gz=zlib",),
    "sections": ("-ffunction-sections", "-Wl,--gc-sections"),
    "O0": ("-O0",),
    "not-PIE": ("-no-pie",),
    "lto": ("-flto",),
}
# Those where C++ makes a difference; each takes a second or two to compile.
CXX_BUILDS = ("dwarf5", "dwarf4", "sections", "O0", "lto")
# The same code as dwarf5, in forms that binutils' own tools cannot be asked about, or not in this version.
SAME_CODE = {"old-zlib": ("-gz=zlib-gnu",), "64-bit": ("-gdwarf64",), "types": ("-fdebug-types-section",)}


@pytest.fixture(params=["compiled", "interpreted"])
def compiled(request: pytest.FixtureRequest) -> bool:
    if request.param == "compiled" and importlib.util.find_spec(COMPILED) is None:
        pytest.skip("the compiled inner loops are not built: python setup.py build_ext --inplace")
    return bool(request.param == "compiled")


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("symbols")


def differences(path: Path, addresses: list[int], found: list[list[Frame]]) -> list[str]:
    """What is not as addr2line has it, but for what the module's comment says of it."""
    wrong = []
    named = symbol_names(path, addresses)
    rows = decoded_rows(path)
    for address, theirs, frames, symbols in zip(addresses, addr2line(path, addresses), found, named, strict=True):
        ours = shown(frames)
        good = len(ours) == len(theirs)
        for at, (mine, expected) in enumerate(zip(ours, theirs, strict=False)):
            name = CLONE.sub("", expected[0])
            last = at + 1 == len(theirs)
            good &= mine[0] == name or (mine[0] in symbols if last else name in symbols)
            good &= mine[1] == expected[1] or (at == 0 and file_and_line(mine[1]) == row_at(rows, address))
        if not good:
            wrong.append(f"{address:#x}\n  addr2line {theirs}\n  heapledger {ours}")
    return wrong


def file_and_line(place: str) -> tuple[str, int]:
    file, _, line = place.rpartition(":")
    return os.path.basename(file), int(line) if line.isdigit() else 0


@pytest.mark.parametrize(("language", "kind"), [("c", k) for k in BUILDS] + [("cpp", k) for k in CXX_BUILDS])
def test_every_frame_is_what_addr2line_says(programs: Path, language: str, kind: str, compiled: bool) -> None:
    path = build(programs, language, kind, *BUILDS[kind])
    addresses = function_addresses(path, 400)
    with Symbolizer(cache_dir=None, compiled=compiled) as symbols:
        found = symbols.resolve(path, addresses)
    assert not differences(path, addresses, found)
    assert sum(1 for frames in found if frames and frames[-1].line) > 100


@pytest.mark.parametrize(("language", "kind"), [("c", "old-zlib"), ("c", "64-bit"), ("cpp", "types")])
def test_another_encoding_of_the_same_code_has_the_same_frames(
    programs: Path, language: str, kind: str, compiled: bool
) -> None:
    plain = build(programs, language, "dwarf5")
    path = build(programs, language, kind, *SAME_CODE[kind])
    addresses = function_addresses(plain, 400)
    assert function_addresses(path, 400) == addresses
    with Symbolizer(cache_dir=None, compiled=compiled) as symbols:
        assert symbols.resolve(path, addresses) == symbols.resolve(plain, addresses)


@pytest.mark.parametrize("command", ["--remove-section=.debug_aranges", "--compress-debug-sections=zstd"])
def test_a_rewritten_file_has_the_same_frames(programs: Path, tmp_path: Path, command: str, compiled: bool) -> None:
    plain = build(programs, "cpp", "dwarf5")
    if subprocess.run([tool("objcopy"), command, str(plain), str(tmp_path / "other")], capture_output=True).returncode:
        pytest.skip(f"this objcopy does not take {command}")
    addresses = function_addresses(plain, 400)
    with Symbolizer(cache_dir=None, compiled=compiled) as symbols:
        assert symbols.resolve(tmp_path / "other", addresses) == symbols.resolve(plain, addresses)


def test_inlined_calls_come_innermost_first_and_the_real_function_last(programs: Path, compiled: bool) -> None:
    path = build(programs, "cpp", "dwarf5")
    with Symbolizer(cache_dir=None, compiled=compiled) as symbols:
        found = symbols.resolve(path, function_addresses(path, 400))
    chains = {tuple(frame.function for frame in frames) for frames in found}
    assert ("twice", "four", "visible(int)") in chains
    assert all(not frames[-1].inlined and all(f.inlined for f in frames[:-1]) for frames in found if frames)


def test_a_nested_function_is_found_inside_its_parent(programs: Path, compiled: bool) -> None:
    path = build(programs, "c", "O0", "-O0")
    listing = subprocess.run([tool("nm"), path], capture_output=True, text=True, check=True).stdout
    address = next(int(line.split()[0], 16) for line in listing.splitlines() if " nested" in line)
    with Symbolizer(cache_dir=None, compiled=compiled) as symbols:
        assert [frame.function for frame in symbols.resolve(path, [address])[0]] == ["nested"]


@pytest.mark.slow
@pytest.mark.parametrize("dwarf", ["4", "5"])
def test_llvm_debug_information_of_a_rust_program_agrees(tmp_path: Path, dwarf: str, compiled: bool) -> None:
    """LLVM writes no DW_AT_sibling, and in DWARF 5 indexed addresses, strings and range lists."""
    source = tmp_path / "program.rs"
    source.write_text(
        "fn work<T: Copy + Into<u64>>(v: &[T]) -> u64 { v.iter().map(|&x| x.into() * 3).filter(|x| x % 2 == 1).sum() }"
        'fn main() { let v: Vec<u32> = std::env::args().map(|a| a.len() as u32).collect(); println!("{}", work(&v)); }'
    )
    flags = ["-O", "-g", "-Csymbol-mangling-version=v0", f"-Cdwarf-version={dwarf}"]
    done = subprocess.run([tool("rustc"), *flags, "-o", "program", source.name], cwd=tmp_path, capture_output=True)
    if done.returncode:
        pytest.skip("rustc does not take the flags")
    path = tmp_path / "program"
    addresses = function_addresses(path, 600 if compiled else 60)
    with Symbolizer(cache_dir=None, compiled=compiled) as symbols:
        found = symbols.resolve(path, addresses)
    theirs = addr2line(path, addresses)
    shorter = 0
    for frames, expected in zip(found, theirs, strict=True):
        ours = shown(frames)
        if len(expected) < len(ours):  # binutils 2.40 loses chains whose range lists are indexed; none is ever longer
            shorter += 1
            assert ours[0][1] == expected[0][1]
        else:
            assert ours == expected
    assert shorter <= len(addresses) // 20


def libc_debug_file() -> Path:
    from heapledger.tracer.symbols import build_id

    found = build_id(LIBC) if LIBC.exists() else None
    path = Path(f"/usr/lib/debug/.build-id/{(found or '--')[:2]}/{(found or '--')[2:]}.debug")
    if not path.exists():
        pytest.skip("libc6-dbg is not installed")
    return path


def test_libc_with_its_separate_debug_file_agrees(compiled: bool) -> None:
    debug = libc_debug_file()
    addresses = function_addresses(debug, 1500 if compiled else 200)
    with Symbolizer(cache_dir=None, compiled=compiled) as symbols:
        found = symbols.resolve(LIBC, addresses)
    compared = 0
    for address, theirs, frames in zip(addresses, addr2line(LIBC, addresses), found, strict=True):
        if not frames or frames[-1].line is None:
            continue  # no debug information: addr2line guesses among the aliases of the symbol
        compared += 1
        assert [f.function for f in frames] == [function for function, _ in theirs], hex(address)
        lines = [place.rpartition(":")[2] for _, place in theirs]
        assert [str(f.line or "?") for f in frames] == lines, hex(address)
    assert compared > len(addresses) * 0.9


@pytest.mark.slow
def test_libc_files_are_those_of_the_decoded_line_table() -> None:
    """The file of each row, against objdump (see above why not addr2line)."""
    debug = libc_debug_file()
    rows = decoded_rows(debug)
    addresses = function_addresses(debug, 3000)
    with Symbolizer(cache_dir=None) as symbols:
        found = symbols.resolve(LIBC, addresses)
    compared = 0
    for address, frames in zip(addresses, found, strict=True):
        if frames and frames[0].file and frames[0].line:
            compared += 1
            assert (os.path.basename(frames[0].file), frames[0].line) == row_at(rows, address), hex(address)
    assert compared > len(addresses) * 0.9
