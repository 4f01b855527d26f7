"""Programs for the symbol tests: built once a session, and what binutils says of their addresses."""

from __future__ import annotations

import bisect
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from heapledger.tracer.symbols import Frame

CXX_SOURCE = r"""
#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>
namespace shop {
struct Item { std::string name; int price; };
template <typename T> struct Shelf {
  std::vector<T> items;
  void put(T item) { items.push_back(std::move(item)); }
  int total() const { int sum = 0; for (const auto &item : items) sum += item.price; return sum; }
};
struct Base { virtual ~Base() = default; virtual int value() const = 0; };
struct Derived : Base { int n; explicit Derived(int n) : n(n) {} int value() const override { return n * 3; } };
static inline __attribute__((always_inline)) int twice(int x) { return x + x * (x & 3); }
static inline __attribute__((always_inline)) int four(int x) { return twice(x) + twice(x + 1); }
}
namespace { struct Hidden { int v; int get() const { return shop::four(v); } }; }
static __attribute__((noinline)) int visible(int x) { return shop::four(x) ^ 5; }
int main(int argc, char **argv) {
  shop::Shelf<shop::Item> shelf;
  std::map<std::string, int> counts;
  for (int i = 0; i < argc; i++) { shelf.put({argv[i], i}); counts[argv[i]]++; }
  std::sort(shelf.items.begin(), shelf.items.end(), [](const auto &a, const auto &b) { return a.name < b.name; });
  std::unique_ptr<shop::Base> base = std::make_unique<shop::Derived>(argc);
  Hidden hidden{argc};
  if (argc > 90) throw std::string("many");
  std::printf("%d %d %d %d\n", shelf.total(), base->value(), hidden.get(), visible(argc));
}
"""

# A nested function (GNU C), a function cut in two (.cold), and code that a header brings in.
C_SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
static inline int clamp(int x) { return x > 100 ? 100 : x < 0 ? 0 : x; }
static int apply(int (*f)(int), int n) { int s = 0; for (int i = 0; i < n; i++) s += f(clamp(i * 7)); return s; }
__attribute__((noinline)) int outer(int n) {
  int bias = n * 3;
  int nested(int x) { return x + bias; }
  return apply(nested, n);
}
__attribute__((noinline)) int risky(int n) {
  if (__builtin_expect(n > 1000, 0)) { fprintf(stderr, "no\n"); abort(); }
  return n * n;
}
int main(int argc, char **argv) { printf("%d %d %s\n", outer(argc), risky(argc), argv[0]); return 0; }
"""

CLONE = re.compile(r"( \[clone [^\]]*\])+$|\.(cold|part|isra|constprop|lto_priv)\b.*$")
DISCRIMINATOR = re.compile(r" \(discriminator \d+\)$")


def tool(name: str) -> str:
    """The path of a program; the test is skipped where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def build(folder: Path, language: str, output: str, *flags: str) -> Path:
    """A program of C_SOURCE or CXX_SOURCE, with debug information as `flags` say. Built once: all builds of a folder
    have the same source file and compilation folder."""
    path = folder / f"{output}-{language}"
    if path.exists():
        return path
    compiler, source = ("gcc", C_SOURCE) if language == "c" else ("g++", CXX_SOURCE)
    (folder / f"program.{language}").write_text(source)
    command = [tool(compiler), f"program.{language}", "-o", path.name, "-O2", "-g", "-Wl,--build-id=sha1", *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{compiler} does not take {' '.join(flags)}: {done.stderr.splitlines()[-1:]}")
    return path


def function_addresses(path: Path, count: int, seed: int = 1) -> list[int]:
    """Random addresses within the sized functions of a symbol table: not the padding between them, to which no
    return address points, and where addr2line names whatever function comes before."""
    with path.open("rb") as stream:
        elf = ELFFile(stream)
        table = elf.get_section_by_name(".symtab") or elf.get_section_by_name(".dynsym")
        spans = sorted(
            {
                (s["st_value"], s["st_size"])
                for s in table.iter_symbols()
                if s["st_info"]["type"] in ("STT_FUNC", "STT_LOOS") and s["st_size"] and s["st_shndx"] != "SHN_UNDEF"
            }
        )
    chosen = random.Random(seed)
    return [start + chosen.randrange(size) for start, size in chosen.choices(spans, k=count)]


def addr2line(path: Path, addresses: Sequence[int]) -> list[list[tuple[str, str]]]:
    """(function, place) lists as `addr2line -i -f -C` has them, innermost first; `??` and `??:?` for unknown."""
    command = [tool("addr2line"), "-a", "-i", "-f", "-C", "-e", str(path)]
    asked = "".join(f"{address:#x}\n" for address in addresses)
    lines = subprocess.run(command, input=asked, capture_output=True, text=True, check=True).stdout.splitlines()
    answers: list[list[str]] = []
    for line in lines:
        if re.fullmatch(r"0x[0-9a-f]{16}", line):
            answers.append([])
        else:
            answers[-1].append(line)
    return [[(a[i], place(a[i + 1])) for i in range(0, len(a), 2)] for a in answers]


def place(text: str) -> str:
    text = DISCRIMINATOR.sub("", text)
    file, _, line = text.rpartition(":")
    return f"{file}:{line}" if line not in ("?", "0") else "??:?"


def shown(frames: Sequence[Frame]) -> list[tuple[str, str]]:
    """Our frames as `addr2line` above has them."""
    if not frames:
        return [("??", "??:?")]
    return [(f.function or "??", f"{f.file}:{f.line}" if f.file and f.line else "??:?") for f in frames]


def symbol_names(path: Path, addresses: Sequence[int]) -> list[set[str]]:
    """The demangled symbols that cover each address, without the suffixes of functions that the compiler cut up."""
    listing = subprocess.run([tool("nm"), "-S", "-C", str(path)], capture_output=True, text=True, check=True).stdout
    spans = []
    for line in listing.splitlines():
        parts = line.split(" ", 3)
        if len(parts) == 4 and len(parts[1]) == 16:
            spans.append((int(parts[0], 16), int(parts[1], 16), CLONE.sub("", parts[3])))
    return [{name for start, size, name in spans if start <= address < start + size} for address in addresses]


def decoded_rows(path: Path) -> list[tuple[int, str, int]]:
    """Rows (address, file without folder, line) of the line table, ascending, as objdump decodes it; the last of those
    of one address. A row that ends a sequence has line 0."""
    command = [tool("objdump"), "--dwarf=decodedline", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    row = re.compile(r"^(\S+)\s+(\d+|-)\s+0x([0-9a-f]+)(?:\s|$)")
    last: dict[int, tuple[str, int]] = {}
    for line in listing.splitlines():
        found = row.match(line)
        if found and not (found[2] == "-" and int(found[3], 16) in last):
            last[int(found[3], 16)] = (found[1], 0 if found[2] == "-" else int(found[2]))
    return [(address, *last[address]) for address in sorted(last)]


def row_at(rows: Sequence[tuple[int, str, int]], address: int) -> tuple[str, int]:
    """File and line of the row that covers an address."""
    at = bisect.bisect_right(rows, address, key=lambda row: row[0]) - 1
    return rows[at][1:] if at >= 0 else ("", 0)
