"""Names from perf maps: of generated code in real processes, and of maps as no compiler writes them."""

from __future__ import annotations

import doctest
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from heapledger import _preload
from heapledger.store.reader import StackFrame, Trace
from heapledger.tracer import perfmap
from heapledger.tracer.perfmap import Reading, meaning

Native = Callable[..., Path]
Heapledger = Callable[..., "subprocess.CompletedProcess[str]"]


# ---- names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("py::Shop.sell:/app/shop.py", ("Shop.sell", "/app/shop.py", None)),
        ("py::<module>:<frozen importlib._bootstrap>", ("<module>", "<frozen importlib._bootstrap>", None)),
        ("py::main.<locals>.<lambda>:C:/odd:name.py", ("main.<locals>.<lambda>", "C:/odd:name.py", None)),
        ("py::", ("py::", None, None)),
        ("JS:*outer file:///app/shop.mjs:3:15", ("outer", "/app/shop.mjs", 3)),
        ("JS:~get size /a b/c.js:10:2", ("get size", "/a b/c.js", 10)),
        ("JS:^ file:///app/shop.mjs:2:53", ("(anonymous)", "/app/shop.mjs", 2)),
        ("Script:~ file:///app/shop.mjs:1:1", ("(script)", "/app/shop.mjs", 1)),
        ("LazyCompile:*debug node:internal/util/debuglog:81:15", ("debug", "node:internal/util/debuglog", 81)),
        ("JS:~f [eval]:1:10", ("f", "[eval]", 1)),
        ("JS:*f /x.js:99999999999999999999:1", ("f", "/x.js", None)),
        ("Builtin:MathMax", ("Builtin:MathMax", None, None)),
        ("int Hello.work(int)", ("int Hello.work(int)", None, None)),
        ("[App] Shop::Sell(int32)[Tier0]", ("[App] Shop::Sell(int32)[Tier0]", None, None)),
    ],
)
def test_a_name_says_function_file_and_line(name: str, expected: tuple[str, str | None, int | None]) -> None:
    assert meaning(name) == expected


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(perfmap)
    assert result.attempted
    assert not result.failed


# ---- files


def reading_of(path: Path, wanted: list[int]) -> Reading:
    reading = Reading(wanted)
    fd = os.open(path, os.O_RDONLY)
    try:
        reading.read(fd)
    finally:
        os.close(fd)
    return reading


def by_hand(text: bytes, wanted: list[int]) -> dict[int, bytes]:
    """Address → name, line by line from the beginning, as the convention has it."""
    names = {}
    for line in text.split(b"\n")[:-1]:
        start, length, name = line.split(b" ", 2)
        for address in wanted:
            if int(start, 16) <= address - 1 < int(start, 16) + int(length, 16):
                names[address - 1] = name
    return names


@pytest.mark.parametrize("seed", range(20))
def test_later_entries_win_wherever_the_file_is_cut_into_chunks(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr(perfmap, "_CHUNK", chance.choice((64, 100, 1000)))
    lines = []
    for number in range(300):
        prefix = chance.choice(("", "0x", "0X0000"))
        start, length = chance.randrange(0x1000, 0x1800), chance.choice((0, 1, 16, 200))
        lines.append(f"{prefix}{start:x} {prefix}{length:X} f{number} {'x' * chance.randrange(40)}\n")
    torn = "1000 ffff half a na" if seed % 2 else ""
    text = ("".join(lines) + torn).encode()
    (tmp_path / "map").write_bytes(text)
    wanted = chance.sample(range(0x1000, 0x1900), 200)
    found = reading_of(tmp_path / "map", wanted)
    assert found.names == by_hand(text, wanted)
    assert found.names
    assert found.unreadable == 0


def test_lines_that_are_no_entries_are_counted_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "map").write_bytes(
        b"1000 10 good\n\nnonsense\n1000 zz bad\n11112222333344445 10 wide\n-1000 10 bad\n2000 10 \xff\xfe\x1b[31m\n"
    )
    found = reading_of(tmp_path / "map", [0x1001, 0x2001, 5])
    assert dict(found.meanings()) == {0x1001: ("good", None, None), 0x2001: ("\\xff\\xfe\x1b[31m", None, None)}
    assert found.unreadable == 5


def test_a_line_without_an_end_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perfmap, "_CHUNK", 1000)
    monkeypatch.setattr(perfmap, "LIMIT_LINE", 5000)
    (tmp_path / "map").write_bytes(b"1000 10 first\n2000 10 " + b"x" * 100_000 + b"\n3000 10 last\n")
    found = reading_of(tmp_path / "map", [0x1001, 0x2001, 0x3001])
    assert {name for name, _, _ in dict(found.meanings()).values()} == {"first", "last"}
    assert found.unreadable == 1


def test_a_very_long_name_is_cut(tmp_path: Path) -> None:
    (tmp_path / "map").write_bytes(b"1000 10 " + b"n" * 50_000 + b"\n")
    ((_, (function, _, _)),) = reading_of(tmp_path / "map", [0x1001]).meanings()
    assert function == "n" * perfmap.LIMIT_NAME + "…"


def test_of_a_huge_map_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perfmap, "LIMIT_BYTES", 10_000)
    text = b"1000 10 first\n" + b"5000 10 other\n" * 1000 + b"2000 10 last\n"
    (tmp_path / "map").write_bytes(text)
    found = reading_of(tmp_path / "map", [0x1001, 0x2001])
    assert found.names == {0x2000: b"last"}
    assert found.skipped_bytes == len(text) - 10_000
    assert found.unreadable == 0


def test_entries_that_all_hold_every_address_cost_no_more_than_others(tmp_path: Path) -> None:
    (tmp_path / "map").write_bytes(b"0 ffffffffffffffff all\n" * 50_000)
    found = reading_of(tmp_path / "map", list(range(10, 100_000)))
    assert len(found.names) == 99_990
    assert found.nameless == []


# ---- real processes


@pytest.fixture
def jit(native: Native) -> Iterator[str]:
    """The program; the maps that it leaves behind are removed."""
    before = set(Path("/tmp").glob("perf-*.map"))
    yield str(native("jit_map.c", "-O1", "-fno-omit-frame-pointer"))
    for path in set(Path("/tmp").glob("perf-*.map")) - before:
        path.unlink()


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace.heapledger"


def run(trace: Path, *argv: str, options: tuple[str, ...] = (), **settings: object) -> None:
    command = [sys.executable, "-m", "heapledger", "run", "-q", "-o", str(trace), *options, "--", *argv]
    # node writes a log of its own into the folder it is started in.
    kept: dict[str, object] = {"capture_output": True, "text": True, "timeout": 120, "cwd": trace.parent, **settings}
    subprocess.run(command, check=False, **kept)  # type: ignore[call-overload]


def jit_stacks(trace: Path) -> list[list[StackFrame]]:
    """The stacks of the blocks that generated code asked for, a process each, without the hook's own frames."""
    found = []
    with Trace(trace) as opened:
        for process in opened.processes():
            for events in opened.events(process.id):
                for stack in sorted(set(events.stack[events.size == 12345].tolist())):
                    frames = opened.stack(process.id, stack)
                    while frames and frames[0].module not in ("", "[JIT]"):
                        frames = frames[1:]
                    found.append(frames)
    return found


def named(trace: Path) -> set[tuple[str, str | None]]:
    """(function, file) of all generated code that has a name."""
    found = set()
    with Trace(trace) as opened:
        for process in opened.processes():
            for events in opened.events(process.id):
                for stack in set(events.stack.tolist()):
                    frames = opened.frames(process.id, stack)
                    found |= {(f.function, f.file) for f in frames if f.module == "[JIT]" and f.function}
    return found


def functions(trace: Path) -> list[list[str]]:
    """The names of the two generated functions in each of those stacks."""
    return [[frame.function for frame in stack[:2]] for stack in jit_stacks(trace)]


@pytest.mark.parametrize("how", ["exit", "reuse", "unlink", "kill"])
def test_generated_code_has_the_names_of_its_map(how: str, jit: str, trace: Path) -> None:
    run(trace, jit, how, "py::make:/app/shop.py")
    ((inner, outer, caller, *_),) = jit_stacks(trace)
    assert (inner.function, inner.file, inner.line, inner.module) == ("make", "/app/shop.py", None, "[JIT]")
    assert outer.function == "outer"
    assert (caller.function, caller.module) == ("call", jit)


def test_a_map_that_is_complete_only_after_the_end_is_read_then(jit: str, trace: Path) -> None:
    run(trace, jit, "late", "JS:~make file:///app/shop.mjs:3:15")
    ((inner, *_),) = jit_stacks(trace)
    assert (inner.function, inner.file, inner.line) == ("make", "/app/shop.mjs", 3)


def test_a_fork_child_knows_the_code_that_it_inherited(jit: str, trace: Path) -> None:
    run(trace, jit, "fork", "make")
    assert functions(trace) == [["make", "outer"]] * 2


def test_a_map_is_read_before_an_exec_overwrites_it(jit: str, trace: Path) -> None:
    run(trace, jit, "exec", "first")
    assert functions(trace) == [["first", "outer"], ["second", "outer"]]


def test_a_map_lies_where_the_programs_own_temporary_folder_is(jit: str, trace: Path, tmp_path: Path) -> None:
    run(trace, jit, "exit", "make", str(tmp_path), env={**os.environ, "TMPDIR": f"{tmp_path}/"})
    assert functions(trace) == [["make", "outer"]]


def test_a_map_is_found_in_namespaces_of_the_programs_own(jit: str, trace: Path, tmp_path: Path) -> None:
    """It calls itself 1, and its /tmp is not ours."""
    jail = tmp_path / "tmp"
    jail.mkdir()
    shutil.copy(jit, jail / "jit_map")
    command = f"mount --rbind {jail} /tmp && /tmp/jit_map exit make"
    shim = _preload.path().parent
    if shim.is_relative_to("/tmp"):  # this checkout: the program must still find the shim
        place = jail / shim.relative_to("/tmp")
        place.mkdir(parents=True)
        command = f"mount --bind {shim} {place} && {command}"
    unshare = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", command]
    if os.geteuid() or subprocess.run([*unshare[:-1], "true"], capture_output=True).returncode:
        pytest.skip("namespaces of one's own are not allowed here")
    shared = set(Path("/tmp").glob("perf-*.map"))
    run(trace, *unshare)
    assert set(Path("/tmp").glob("perf-*.map")) == shared
    assert len(list(jail.glob("perf-*.map"))) == 1
    assert functions(trace) == [["make", "outer"]]


def test_without_a_map_generated_code_stays_nameless(jit: str, trace: Path) -> None:
    run(trace, jit, "unnamed", "make")
    assert functions(trace) == [["", ""]]
    with Trace(trace) as opened:
        assert opened.process().notes == []


def test_names_are_not_looked_for_when_none_are_wanted(jit: str, trace: Path) -> None:
    run(trace, jit, "exit", "make", options=("--no-symbols",))
    assert functions(trace) == [["", ""]]


def test_lines_that_are_not_understood_are_noted(jit: str, trace: Path) -> None:
    run(trace, jit, "exit", "make\nnonsense")
    assert functions(trace) == [["make", "outer"]]
    with Trace(trace) as opened:
        assert opened.process().notes == ["1 lines of the perf map are not understood"]


def test_the_map_of_an_earlier_process_with_the_same_pid_is_none_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "perf-1.map"
    path.write_text("1000 10 old\n")
    written = path.stat().st_mtime_ns
    fd = perfmap._open(str(path), written, {os.geteuid()})
    assert fd is not None
    os.close(fd)
    assert perfmap._open(str(path), written + 1, {os.geteuid()}) is None
    assert perfmap._open(str(path), written, {os.geteuid() + 1}) is None


def test_what_is_no_plain_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("1000 10 name\n")
    (tmp_path / "link").symlink_to("file")
    opened = [perfmap._open(str(tmp_path / name), 0, {os.geteuid()}) for name in ("fifo", "link", ".", "none", "file")]
    assert [fd is None for fd in opened] == [True, True, True, True, False]
    os.close(opened[-1] or -1)


def test_reports_name_the_function_and_its_file(jit: str, trace: Path, heapledger: Heapledger) -> None:
    run(trace, jit, "exit", "py::make:/app/shop.py")
    leaks = heapledger("leaks", trace).stdout
    assert "make  /app/shop.py\n" in leaks
    report = heapledger("report", trace).stdout
    assert "make (shop.py)" in report
    folded = heapledger("export", trace, "--format", "folded").stdout
    assert ";call;outer;make;" in folded or ";call;outer;make " in folded


def test_a_report_tells_nothing_of_nameless_code_that_differs_from_run_to_run(
    jit: str, trace: Path, heapledger: Heapledger
) -> None:
    run(trace, jit, "unnamed", "make")
    assert "[JIT]" not in heapledger("report", trace, "--format", "json").stdout


def test_node_functions_are_named(trace: Path, tmp_path: Path, jit: str) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    (tmp_path / "shop.mjs").write_text(
        "import zlib from 'node:zlib';\n"
        "function sell(n) { let s = 0; for (let i = 0; i < n; i++) s += zlib.crc32 ? 1 : 1; return s; }\n"
        "function keep() { return zlib.deflateSync('x'.repeat(1000)).length; }\n"
        "let all = sell(10);\nfor (let i = 0; i < 300; i++) all += keep();\nconsole.log(all);\n"
    )
    run(trace, node, "--perf-basic-prof", "--interpreted-frames-native-stack", str(tmp_path / "shop.mjs"))
    found = named(trace)
    assert ("keep", str(tmp_path / "shop.mjs")) in found
    assert any(file and file.startswith("node:") for _, file in found)


def test_java_methods_are_named(trace: Path, tmp_path: Path, jit: str) -> None:
    java, javac = shutil.which("java"), shutil.which("javac")
    if java is None or javac is None:
        pytest.skip("no JDK is installed")
    (tmp_path / "Shop.java").write_text(
        "public class Shop {\n"
        "  static void sell() { java.util.zip.Deflater d = new java.util.zip.Deflater(); d.end(); }\n"
        "  public static void main(String[] a) { for (int i = 0; i < 20000; i++) sell(); }\n}\n"
    )
    subprocess.run([javac, "Shop.java"], cwd=tmp_path, check=True)
    options = ["-XX:+UnlockDiagnosticVMOptions", "-XX:+DumpPerfMapAtExit", "-Xbatch"]
    if subprocess.run([java, *options, "-version"], capture_output=True).returncode:
        pytest.skip("this JVM writes no perf map")
    run(trace, java, *options, "-cp", str(tmp_path), "Shop")
    assert any("java.util.zip.Deflater" in function or "Shop.sell" in function for function, _ in named(trace))


def python_with_perf_maps() -> str:
    """The interpreter itself: what is in the PATH may be a script that looks for it."""
    built = sorted(Path("~/.pyenv/versions").expanduser().glob("3.1[2-9]*/bin/python3"))
    for python in (*(f"python3.{minor}" for minor in range(12, 20)), *map(str, built)):
        if shutil.which(python):
            command = [python, "-X", "perf", "-c", "import sys; print(sys.executable)"]
            found = subprocess.run(command, capture_output=True, text=True)
            if found.returncode == 0:
                return found.stdout.strip()
    pytest.skip("no Python from 3.12 on that writes perf maps is installed")


def test_python_functions_are_named(trace: Path, tmp_path: Path, jit: str) -> None:
    (tmp_path / "shop.py").write_text(
        "class Shop:\n    def sell(self):\n        return [bytes(9000) for _ in range(100)]\n"
        "def keep():\n    return Shop().sell()\nkept = keep()\n"
    )
    run(trace, python_with_perf_maps(), "-X", "perf", str(tmp_path / "shop.py"))
    assert ("Shop.sell", str(tmp_path / "shop.py")) in named(trace)
    with Trace(trace) as opened:
        stacks = {s for events in opened.events(opened.process().id) for s in events.stack.tolist()}
        called = [[f.function for f in opened.stack(opened.process().id, s) if f.module == "[JIT]"] for s in stacks]
    assert ["Shop.sell", "keep", "<module>"] in called
