"""Readable names, against c++filt (which also knows Rust's two schemes)."""

from __future__ import annotations

import doctest
import re
import subprocess
import time
from pathlib import Path

import pytest
from symbols_programs import tool

from heapledger.tracer.symbols import apart, rust
from heapledger.tracer.symbols import demangle as demangle_module
from heapledger.tracer.symbols.apart import Apart
from heapledger.tracer.symbols.demangle import demangle

# What c++filt shows, and addr2line -C and we do not: crates' disambiguators, the legacy hash, types of const arguments.
VERBOSE = re.compile(
    r"\[[0-9a-f]{1,16}\]|::h[0-9a-f]{16}$|(?<=[\w'}]): (?:[ui](?:8|16|32|64|128|size)|bool|char)(?=[>,\]])"
)

RUST_NAMES = (
    "_ZN4core3fmt9Formatter3pad17h0123456789abcdefE",
    "_ZN71_$LT$Test$u20$$u2b$$u20$$u27$static$u20$as$u20$foo..Bar$LT$Test$GT$$GT$3bar17h930b740aa94f1d3aE",
    "_ZN13test$u20$test4foob17h05af221e174051e9E",
    "_RNvCs1234_7mycrate3foo",
    "_RNvNtCs1234_7mycrate4util6helper",
    "_RINvCs1234_7mycrate3fooTlmjEE",
    "_RNvMs_Cs4fqI2P2rA04_13const_genericINtB4_3BarKh1_E3foo",
    "_RNCNCNgCs6DXkGYLi8lr_2cc5spawn00B5_",
    "_RNCINkXs25_NgCsbmNqQUJIY6D_4core5sliceINyB9_4IterhENuNgNoBb_4iter8iterator8Iterator9rpositionNCNgNpB9_6memchr7"
    "memrchrs_0E0Bb_",
    "_RMCs4fqI2P2rA04_13const_genericINtB0_8UnsignedKhb_E",
    "_RMCs4fqI2P2rA04_13const_genericINtB0_6SignedKsn98_E",
    "_RMCs4fqI2P2rA04_13const_genericINtB0_4BoolKb1_E",
    "_RMCs4fqI2P2rA04_13const_genericINtB0_4CharKc76_E",
    "_RNvC6_123foo3bar",
    "_RINbNbCskIICzLVDPPb_5alloc5alloc8box_freeDINbNiB4_5boxed5FnBoxuEp6OutputuEL_ECs1iopQbuBiw2_3std",
    "_RNvMC0INtC8arrayvec8ArrayVechKj7b_E3new",
    "_RNvYNtC1a1bNtC1c1d1e",
    "_RINvC1a1bFUKCRShQTEPlOtEuE",
    "_RINvC1a1bFG_RL0_hEuE",
)


def cxxfilt(names: list[str]) -> list[str]:
    done = subprocess.run([tool("c++filt")], input="\n".join(names), capture_output=True, text=True, check=True)
    return [VERBOSE.sub("", line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", RUST_NAMES)
def test_a_rust_name_reads_as_in_cxxfilt(name: str) -> None:
    assert demangle(name) == cxxfilt([name])[0]


def test_the_names_that_libstdcxx_exports_read_as_in_nm() -> None:
    library = Path("/usr/lib/x86_64-linux-gnu/libstdc++.so.6")
    if not library.exists():
        pytest.skip("libstdc++ is not where Debian has it")
    plain, readable = (
        subprocess.run(
            [tool("nm"), "-D", "-p", *flags, str(library)], capture_output=True, text=True, check=True
        ).stdout
        for flags in ([], ["-C"])
    )
    pairs = {
        (mangled[19:].partition("@")[0], clear[19:].partition("@")[0])
        for mangled, clear in zip(plain.splitlines(), readable.splitlines(), strict=True)
        if mangled[19:].startswith("_Z")
    }
    assert len(pairs) > 3000
    assert {(name, demangle(name)) for name, _ in pairs} == pairs


@pytest.mark.slow
def test_every_symbol_of_a_rust_program_reads_as_in_cxxfilt(tmp_path: Path) -> None:
    (tmp_path / "p.rs").write_text('fn main() { println!("{:?}", std::env::args().collect::<Vec<_>>()); }')
    command = [tool("rustc"), "-O", "-Csymbol-mangling-version=v0", "-o", "p", "p.rs"]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("rustc cannot build here")
    listing = subprocess.run([tool("nm"), "p"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    names = sorted({w for line in listing.splitlines() if (w := line.split()[-1]).startswith(("_R", "_ZN"))})
    names = [name for name in names if "." not in name]
    assert len(names) > 100
    assert [demangle(name) for name in names] == cxxfilt(names)


@pytest.mark.parametrize("name", ["malloc", "", "_Z", "_R", "_ZN", "_RNv", "_Z3fo", "_ZN3fooE17h", "_RB_", "_RNvB_1a"])
def test_a_name_that_is_not_mangled_or_wrongly_stays_as_it_is(name: str) -> None:
    assert demangle(name) == name


def test_back_references_cannot_make_a_short_name_endless() -> None:
    """Each tuple refers twice to the one before it: 2 to the 60th in full."""
    name = "_RINvC1a1b"
    places = []
    for _ in range(60):
        here = len(name) - 2
        name += "T" + ("uu" if not places else f"B{places[-1]}B{places[-1]}") + "E"
        places.append(base62(here))
    start = time.perf_counter()
    assert demangle(name + "E") == name + "E"
    assert time.perf_counter() - start < 5


def base62(number: int) -> str:
    """As back references are written: 0 is `_`, 1 is `0_`."""
    if number == 0:
        return "_"
    number -= 1
    digits = ""
    while True:
        digits = rust.DIGITS[number % 62] + digits
        number //= 62
        if not number:
            return digits + "_"


def exploding(levels: int) -> str:
    """f(A<int, int>, A<A<int, int>, A<int, int>>, ...): each argument is a template of twice the one before it."""
    name = "_Z1f1AIiiE"
    for number in range(levels):
        name += f"S_I{substitution(number)}{substitution(number)}E"
    return name


def substitution(number: int) -> str:
    """The reference to the `number`th of those templates: `S_` is the template's name, A."""
    return f"S{base36(number)}_"


def base36(number: int) -> str:
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return (base36(number // 36) if number >= 36 else "") + digits[number % 36]


@pytest.mark.parametrize("levels", [1, 3, 8, 11])
def test_the_growth_of_a_name_is_not_underestimated(levels: int) -> None:
    name = exploding(levels)
    (shown,) = cxxfilt([name])
    assert len(shown) > 2**levels * 10
    assert demangle_module.growth(name) >= len(shown)


def test_no_exported_name_of_libstdcxx_is_longer_than_its_estimated_growth() -> None:
    library = Path("/usr/lib/x86_64-linux-gnu/libstdc++.so.6")
    if not library.exists():
        pytest.skip("libstdc++ is not where Debian has it")
    listing = subprocess.run([tool("nm"), "-D", "-p", str(library)], capture_output=True, text=True, check=True).stdout
    names = sorted({w for line in listing.splitlines() if (w := line[19:].partition("@")[0]).startswith("_Z")})
    readable = cxxfilt(names)
    assert [n for n, shown in zip(names, readable, strict=True) if len(shown) > demangle_module.growth(n)] == []


def test_a_name_that_may_grow_but_does_not_reads_as_in_cxxfilt() -> None:
    name = "_Z1f1AIiiE" + "S0_" * 60
    assert demangle_module.growth(name) > demangle_module.LIMIT_GROWTH
    assert demangle(name) == cxxfilt([name])[0] == "f(A<int, int>" + ", A<int, int>" * 60 + ")"


@pytest.mark.parametrize("levels", [14, 24, 60])
def test_a_name_that_explodes_stays_mangled(levels: int) -> None:
    """64 KB is little for a computer, 2 to the 60th is not."""
    fresh = Apart(demangle_module.LIMIT_OUTPUT)
    name = exploding(levels)
    try:
        assert fresh.demangle(name) is None
        assert fresh.demangle("_Z1fv") == "f()"
    finally:
        fresh.close()


def test_an_exploding_symbol_of_a_program_is_shown_as_it_is() -> None:
    assert demangle(exploding(40)) == exploding(40)


def test_after_some_names_that_end_the_process_others_are_not_tried() -> None:
    fresh = Apart(demangle_module.LIMIT_OUTPUT)
    try:
        for _ in range(apart.LIMIT_FAILURES):
            assert fresh.demangle(exploding(60)) is None
        assert fresh.demangle("_Z1fv") is None
        assert fresh.failures == apart.LIMIT_FAILURES
    finally:
        fresh.close()


def test_very_long_names_stay_mangled() -> None:
    name = "_ZN" + "1a" * 10_000 + "Ev"
    assert demangle(name) == name


@pytest.mark.parametrize("module", [demangle_module, rust])
def test_the_examples_in_the_docstrings_hold(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted
    assert not result.failed
