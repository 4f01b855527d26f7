"""heapledger and its peers side by side: wall time, CPU time of the whole tree, bytes an event.

    python bench/peers_bench.py [--rounds 3] [--only tree ...] [--tracers heapledger ...] [--quick] [--format json]

Each program runs under each tool in turn (A B C A B C ...), so that a drift of the machine hits all alike; medians are
printed. What is compared:

* CPU is that of the program and of everything that ran for it: each command is run below a warden that adopts what its
  processes leave behind (PR_SET_CHILD_SUBREAPER), waits for all of it, and reads one sum. So a collector, a compressor
  at the other end of a pipe and a helper that daemonises are all in it. Wall time ends when the command does.
* An event is one that heapledger's full trace of the program holds (`heapledger info`); the counts of all rows of a
  program are the same. Added ns = (CPU - CPU untraced) / events. "Less start-up" takes off what the tool adds to `true`
  too: it is what one more event costs. "Of heaptrack" is the added ns divided by those of heaptrack --raw.
* Tools that take minutes where others take seconds (gperftools, dhat) run the program with reduced counts, beside
  untraced and counted runs of the reduced program; their ns and ratios come from those, and the row says so.
* Symbols are resolved by none but heaptrack's normal mode, which cannot do without. That mode may not have more than
  --memory GB of address space: it runs out of memory on some programs, and the row says so. A tool that is not
  installed has a row that says so; options that this heapledger does not know have none.

Programs: ../shared/bench (allocbench.cpp, pyjson.py, bigcc.cpp preprocessed and given to cc1plus alone), git on this
repository's own history, and two of our own that are made to be hard: bench/programs/stacks.cpp, tree.cpp.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
SHARED = HERE.parents[1] / "shared" / "bench"
#: The heapledger of this Python: the one that is measured.
HEAPLEDGER = [str(Path(sys.executable).with_name("heapledger"))]
PR_SET_CHILD_SUBREAPER = 36
UNTRACED = "untraced"
REFERENCE = "heaptrack --raw"
START_UP = "start-up"


# ---- one run


@dataclass
class Figures:
    """What one run took: wall and CPU in seconds."""

    wall: float
    cpu: float
    bytes_on_disk: int = 0
    peak_bytes: int = 0
    #: Of heapledger's collector alone, by its own count: seconds of CPU, RSS at its peak.
    collector_cpu: float = 0
    collector_peak_bytes: int = 0


class RunFailedError(Exception):
    """The run is not comparable; the text says why."""


@dataclass
class Program:
    """A command to be traced. `stdin`: a file to feed it."""

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    stdin: Path | None = None


def measure(command: Program, *, timeout: float, memory_bytes: int = 0) -> tuple[Figures, str]:
    """Runs a command and all that it leaves behind to their end: what they took, and stderr's end. RunFailedError if it
    fails or takes longer than `timeout` seconds."""
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as result:
        warden = os.fork()
        if warden == 0:
            status = 70
            with contextlib.suppress(BaseException):
                found = _watch(command, errors.fileno(), timeout, memory_bytes)
                result.write(json.dumps(found).encode())
                result.flush()
                status = 0
            os._exit(status)
        _, status = os.waitpid(warden, 0)
        errors.seek(0)
        text = errors.read().decode(errors="replace")
        result.seek(0)
        found = json.loads(result.read() or b"null")
    if status or found is None:
        raise RunFailedError("the warden failed")
    if found["status"] is None:
        raise RunFailedError(f"more than {timeout:.0f} s")
    if found["status"] != 0:
        reason = "out of memory" if "bad_alloc" in text else (text.strip().splitlines() or [""])[-1][:120]
        raise RunFailedError(f"ended with {found['status']}: {reason}")
    return Figures(found["wall"], found["cpu"], peak_bytes=found["peak_bytes"]), text


def _watch(command: Program, errors: int, timeout: float, memory_bytes: int) -> dict[str, Any]:
    """In the warden: every process below becomes our child when its parent ends, and its times ours when it is waited
    for. A process whose parent ignores SIGCHLD is the exception: the kernel books it nowhere."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def limit() -> None:
        if memory_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))

    with open(command.stdin or os.devnull, "rb") as stdin:
        start = time.monotonic()
        process = subprocess.Popen(
            command.argv,
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, **command.env},
            start_new_session=True,
            preexec_fn=limit,
        )
        late = False

        def give_up(*_: object) -> None:
            nonlocal late
            late = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, timeout, 1.0)
        wall, status = 0.0, None
        while True:
            try:
                pid, waited = os.wait()
            except ChildProcessError:
                break
            if pid == process.pid:
                wall, status = time.monotonic() - start, os.waitstatus_to_exitcode(waited)
        signal.setitimer(signal.ITIMER_REAL, 0)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "status": None if late else status,
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


# ---- the tools


@dataclass
class Tool:
    """A tracer: what stands before the program's command, given the folder for its files."""

    name: str
    prefix: Callable[[Path], list[str]]
    env: Callable[[Path], dict[str, str]] = lambda folder: {}
    #: What it needs → how to say that it is not there.
    missing: str = ""
    #: So slow that programs run with reduced counts.
    reduced: bool = False
    #: Its address space is bounded.
    bounded: bool = False
    #: From stderr and the folder: why the run does not count, or "".
    fault: Callable[[str, Path], str] = lambda errors, folder: ""
    #: Adds what only this tool's files tell.
    look: Callable[[Figures, Path], None] = lambda figures, folder: None


def option_known(option: str) -> bool:
    """Does this heapledger's `run` have the option?"""
    shown = subprocess.run([*HEAPLEDGER, "run", "--help"], capture_output=True, text=True, check=True).stdout
    return f"{option} " in shown or f"{option}\n" in shown


def tools() -> list[Tool]:
    return [
        Tool(UNTRACED, lambda folder: []),
        ours("heapledger"),
        *(ours("heapledger --no-free-stacks", "--no-free-stacks") for _ in " " if option_known("--no-free-stacks")),
        *(ours("heapledger --sample 512K", "--sample", "512K") for _ in " " if option_known("--sample")),
        Tool(
            REFERENCE,
            lambda folder: ["heaptrack", "--raw", "-o", str(folder / "ht")],
            missing=needs("heaptrack"),
        ),
        Tool(
            "heaptrack",
            lambda folder: ["heaptrack", "-o", str(folder / "ht")],
            missing=needs("heaptrack"),
            bounded=True,
            fault=heaptrack_fault,
        ),
        Tool("memusage", lambda folder: ["memusage"], missing=needs("memusage")),
        Tool("memusage -d", lambda folder: ["memusage", "-d", str(folder / "memusage")], missing=needs("memusage")),
        Tool(
            "gperftools heap profile",
            lambda folder: ["env", "LD_PRELOAD=" + library("libtcmalloc.so.4")],
            env=lambda folder: {"HEAPPROFILE": str(folder / "profile")},
            missing="" if library("libtcmalloc.so.4") else "libtcmalloc.so.4 is not installed",
            reduced=True,
        ),
        Tool(
            "valgrind --tool=dhat",
            lambda folder: [
                "valgrind",
                "-q",
                "--tool=dhat",
                "--trace-children=yes",
                f"--dhat-out-file={folder}/dhat.%p",
            ],
            missing=needs("valgrind"),
            reduced=True,
        ),
    ]


def ours(name: str, *options: str) -> Tool:
    def prefix(folder: Path) -> list[str]:
        return [*HEAPLEDGER, "run", "-q", "--no-symbols", *options, "-o", str(folder / "t.heapledger"), "--"]

    def fault(errors: str, folder: Path) -> str:
        lost = info_of(folder / "t.heapledger")["lost"]
        return f"{lost:,} events lost" if lost else ""

    def look(figures: Figures, folder: Path) -> None:
        collector = info_of(folder / "t.heapledger")["collector"]
        figures.collector_cpu, figures.collector_peak_bytes = collector["cpu_s"], collector["peak_rss_bytes"]

    return Tool(name, prefix, fault=fault, look=look)


def needs(command: str) -> str:
    return "" if shutil.which(command) else f"{command} is not installed"


def library(name: str) -> str:
    """The path of a library that the loader knows, or ""."""
    cache = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    paths = [line.split("=>")[1].strip() for line in cache.splitlines() if line.split() and line.split()[0] == name]
    return paths[0] if paths else ""


def heaptrack_fault(errors: str, folder: Path) -> str:
    """The script ends as the program does, whatever became of the interpreter: that prints its totals if it lives."""
    if "heaptrack stats:" in errors:
        return ""
    return "its interpreter ran out of memory" if "bad_alloc" in errors else "its interpreter failed"


def info_of(trace: Path) -> dict[str, Any]:
    argv = [*HEAPLEDGER, "info", "--format", "json", str(trace)]
    return dict(json.loads(subprocess.run(argv, check=True, capture_output=True).stdout))


# ---- the programs


@dataclass
class Workload:
    """A program in full, and the same with reduced counts."""

    name: str
    full: Program
    reduced: Program


class Shop:
    """Builds the programs, when they are asked for, in one folder."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.makers: dict[str, Callable[[], Workload]] = {
            START_UP: self.start_up,
            "allocbench-1": lambda: self.allocbench(1),
            "allocbench-4": lambda: self.allocbench(4),
            "python-json": self.python_json,
            "git": self.git,
            "cc1plus": self.cc1plus,
            "stacks": self.stacks,
            "tree": self.tree,
        }

    def make(self, name: str) -> Workload:
        found = self.makers[name]()
        return Workload(found.name, found.reduced, found.reduced) if self.quick else found

    def compile(self, source: Path, *flags: str) -> str:
        target = self.folder / source.stem
        argv = ["g++", "-std=c++17", "-O2", "-g", "-fomit-frame-pointer", *flags, str(source), "-o", str(target)]
        subprocess.run(argv, check=True)
        return str(target)

    def start_up(self) -> Workload:
        true = Program([shutil.which("true") or "/bin/true"])
        return Workload("start-up (`true`)", true, true)

    def allocbench(self, threads: int) -> Workload:
        binary = self.compile(SHARED / "allocbench.cpp", "-pthread")
        name = f"allocbench, {threads} thread{'s' if threads > 1 else ''}"
        return Workload(
            name, Program([binary, "5000000", str(threads)]), Program([binary, "500000", str(threads), "20000"])
        )

    def python_json(self) -> Workload:
        argv, env = ["/usr/bin/python3", str(SHARED / "pyjson.py")], {"PYTHONMALLOC": "malloc"}
        return Workload("python json", Program(argv, env), Program([*argv, "1500"], env))

    def git(self) -> Workload:
        """Diffs with statistics of each commit, by one process that is told the commits several times over."""
        clone = self.folder / "history.git"
        subprocess.run(["git", "clone", "-q", "--bare", str(REPOSITORY), str(clone)], check=True)
        argv = ["git", "-C", str(clone), "diff-tree", "--stdin", "-r", "-M", "-p", "--stat"]
        known = ["git", "-C", str(clone), "rev-list", "--no-merges", "HEAD"]
        commits = subprocess.run(known, check=True, capture_output=True).stdout.splitlines(keepends=True)
        for name, count in (("full", 6000), ("reduced", 300)):
            repeated = commits * (count // len(commits) + 1)
            (self.folder / name).write_bytes(b"".join(repeated[:count]))
        return Workload(
            "git diff-tree -p --stat",
            Program(argv, stdin=self.folder / "full"),
            Program(argv, stdin=self.folder / "reduced"),
        )

    def cc1plus(self) -> Workload:
        compiler = subprocess.run(["g++", "-print-prog-name=cc1plus"], check=True, capture_output=True, text=True)
        small = self.folder / "smallcc.cpp"
        small.write_text(
            "#include <map>\n#include <string>\nint main() { return std::map<std::string, int>().size(); }"
        )
        programs = []
        for source in (SHARED / "bigcc.cpp", small):
            preprocessed = self.folder / f"{source.stem}.ii"
            subprocess.run(["g++", "-std=c++17", "-O2", "-E", str(source), "-o", str(preprocessed)], check=True)
            argv = [compiler.stdout.strip(), "-quiet", "-fpreprocessed", "-std=c++17", "-O2", str(preprocessed)]
            programs.append(Program([*argv, "-o", os.devnull]))
        return Workload("cc1plus", programs[0], programs[1])

    def stacks(self) -> Workload:
        binary = self.compile(HERE / "programs/stacks.cpp")
        return Workload("43,000 stacks, uniform", Program([binary, "2500000"]), Program([binary, "250000"]))

    def tree(self) -> Workload:
        binary = self.compile(HERE / "programs/tree.cpp")
        return Workload("tree, 131,071 stacks", Program([binary, "17", "20"]), Program([binary, "17", "2"]))


# ---- the rounds


@dataclass
class Row:
    """All rounds of one tool on one program. `note`: why there is nothing (more), or what to know."""

    workload: str
    tool: str
    reduced: bool
    rounds: list[Figures] = field(default_factory=list)
    events: int = 0
    base: list[Figures] = field(default_factory=list)
    note: str = ""

    def median(self, what: str) -> float:
        return float(statistics.median(getattr(figures, what) for figures in self.rounds))

    def base_median(self, what: str) -> float:
        return float(statistics.median(getattr(figures, what) for figures in self.base))


def run_one(tool: Tool, program: Program, *, timeout: float, memory_bytes: int) -> Figures:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        traced = Program([*tool.prefix(folder), *program.argv], {**program.env, **tool.env(folder)}, program.stdin)
        figures, errors = measure(traced, timeout=timeout, memory_bytes=memory_bytes if tool.bounded else 0)
        if fault := tool.fault(errors, folder):
            raise RunFailedError(fault)
        tool.look(figures, folder)
        figures.bytes_on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return figures


def count_events(program: Program) -> int:
    """Those of heapledger's full trace."""
    with tempfile.TemporaryDirectory() as temporary:
        tool = ours("heapledger")
        argv = [*tool.prefix(Path(temporary)), *program.argv]
        measure(Program(argv, program.env, program.stdin), timeout=600)
        return int(info_of(Path(temporary) / "t.heapledger")["events"])


def run_workload(workload: Workload, chosen: list[Tool], options: argparse.Namespace) -> list[Row]:
    rows = [Row(workload.name, tool.name, tool.reduced, note=tool.missing) for tool in chosen]
    bases = {False: rows[0].rounds, True: []}
    if any(tool.reduced and not tool.missing for tool in chosen):
        say(f"{workload.name}: counting, reduced")
        reduced_events = count_events(workload.reduced)
    else:
        reduced_events = 0
    say(f"{workload.name}: counting")
    events = count_events(workload.full)
    limits = {"timeout": options.timeout, "memory_bytes": options.memory << 30}
    # Starting is short, and its noise is taken off every other figure.
    rounds = options.rounds * (5 if workload.full is workload.reduced and not options.quick else 1)
    for number in range(rounds):
        if reduced_events:
            bases[True].append(run_one(chosen[0], workload.reduced, **limits))
        for tool, row in zip(chosen, rows, strict=True):
            row.events, row.base = (reduced_events if tool.reduced else events), bases[tool.reduced]
            if row.note:
                continue
            try:
                figures = run_one(tool, workload.reduced if tool.reduced else workload.full, **limits)
            except RunFailedError as error:
                row.note = str(error)
                say(f"{workload.name}: {tool.name}: {error}")
                continue
            row.rounds.append(figures)
            say(f"{workload.name}: round {number + 1}, {tool.name}: {figures.wall:.2f} s, {figures.cpu:.2f} s of CPU")
    return rows


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- the tables


@dataclass
class Line:
    """A row's medians and what follows from them. None: not known."""

    workload: str
    tool: str
    events: int
    reduced: bool
    note: str
    wall_s: float | None = None
    wall_ratio: float | None = None
    cpu_s: float | None = None
    cpu_ratio: float | None = None
    cpu_ratio_less_start_up: float | None = None
    added_ns: float | None = None
    added_less_start_up_ns: float | None = None
    of_reference: float | None = None
    bytes_an_event: float | None = None
    peak_mb: float | None = None
    collector_cpu_s: float | None = None
    collector_peak_mb: float | None = None


def lines_of(rows: list[Row], start_up_cpu: dict[str, float]) -> list[Line]:
    """`start_up_cpu`: tool → CPU seconds that it adds to `true`."""
    lines = []
    for row in rows:
        line = Line(row.workload, row.tool, row.events, row.reduced, row.note)
        lines.append(line)
        if not row.rounds or row.note:
            continue
        line.wall_s, line.cpu_s = row.median("wall"), row.median("cpu")
        line.wall_ratio = line.wall_s / row.base_median("wall")
        line.cpu_ratio = line.cpu_s / max(row.base_median("cpu"), 1e-6)
        line.peak_mb = row.median("peak_bytes") / 1e6
        if row.tool == UNTRACED:
            continue
        if row.median("collector_cpu"):
            line.collector_cpu_s = row.median("collector_cpu")
            line.collector_peak_mb = row.median("collector_peak_bytes") / 1e6
        added = line.cpu_s - row.base_median("cpu")
        line.added_ns = added / row.events * 1e9
        if row.tool in start_up_cpu:
            less = added - start_up_cpu[row.tool]
            line.added_less_start_up_ns = less / row.events * 1e9
            line.cpu_ratio_less_start_up = 1 + less / max(row.base_median("cpu"), 1e-6)
        line.bytes_an_event = row.median("bytes_on_disk") / row.events
    reference = next((line.added_ns for line in lines if line.tool == REFERENCE), None)
    for line in lines:
        if reference and line.added_ns is not None:
            line.of_reference = line.added_ns / reference
    return lines


def added_to_true(rows: list[Row]) -> dict[str, float]:
    return {row.tool: row.median("cpu") - row.base_median("cpu") for row in rows if row.rounds and not row.note}


def markdown(lines: list[Line], *, start_up: bool) -> Iterable[str]:
    if start_up:
        yield "| tool | wall ms | CPU ms | |"
        yield "|---|---|---|---|"
        for line in lines:
            yield f"| {line.tool} | {shown(line.wall_s, 1000)} | {shown(line.cpu_s, 1000)} | {line.note} |"
        return
    counted = {line.reduced: line.events for line in lines}
    reduced = f"; reduced: {counted[True]:,}" if True in counted else ""
    yield f"**{lines[0].workload}**, {counted[False]:,} events{reduced}"
    yield ""
    yield (
        "| tool | wall s | × | CPU s | × | less start-up × | added ns an event | less start-up | of heaptrack "
        "| bytes an event | |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for line in lines:
        note = line.note or ("reduced" if line.reduced else "")
        if line.collector_cpu_s:
            note = f"collector: {line.collector_cpu_s:.2f} s, {line.collector_peak_mb:.0f} MB"
        cells = [
            line.tool,
            shown(line.wall_s, digits=2),
            shown(line.wall_ratio, digits=2),
            shown(line.cpu_s, digits=2),
            shown(line.cpu_ratio, digits=2),
            shown(line.cpu_ratio_less_start_up, digits=2),
            shown(line.added_ns),
            shown(line.added_less_start_up_ns),
            share(line.of_reference),
            shown(line.bytes_an_event, digits=2),
            note,
        ]
        yield "| " + " | ".join(cells) + " |"


def shown(value: float | None, factor: float = 1, digits: int = 0) -> str:
    return "" if value is None else f"{value * factor:.{digits}f}"


def share(value: float | None) -> str:
    """A part as 1/n, a multiple as ×n."""
    if value is None:
        return ""
    if value <= 0:
        return "0"
    return f"1/{1 / value:.1f}" if value < 1 else f"×{value:.1f}"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{os.cpu_count()} CPUs ({model}), Linux {platform.release()}, glibc {platform.libc_ver()[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(Shop(Path(), False).makers)
    known = {tool.name: tool for tool in tools()}
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=names, help="these programs; may be given several times")
    parser.add_argument("--tracers", action="append", choices=list(known)[1:], help="these tools; likewise")
    parser.add_argument("--quick", action="store_true", help="reduced counts for all: a trial, not a measurement")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that one run may take")
    parser.add_argument("--memory", type=int, default=6, help="GB of address space for heaptrack's normal mode")
    parser.add_argument("--format", choices=["markdown", "json"], default="markdown")
    options = parser.parse_args()
    chosen = [tool for tool in known.values() if tool.name in {UNTRACED, *(options.tracers or known)}]
    wanted = [name for name in names if name in (options.only or names)]
    results: dict[str, list[Line]] = {}
    raw: list[Row] = []
    start_up_cpu: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        shop = Shop(Path(temporary), options.quick)
        for name in wanted:
            rows = run_workload(shop.make(name), chosen, options)
            raw += rows
            if name == START_UP:
                start_up_cpu = added_to_true(rows)
            results[name] = lines_of(rows, start_up_cpu)
            if options.format == "markdown":
                print("", *markdown(results[name], start_up=name == START_UP), sep="\n", flush=True)
    if options.format == "json":
        found = {"machine": machine(), "rounds": options.rounds, "quick": options.quick}
        found["lines"] = [asdict(line) for lines in results.values() for line in lines]
        found["runs"] = [asdict(row) for row in raw]
        print(json.dumps(found, indent=1))
    else:
        print(f"\n{options.rounds} rounds in turn, medians; {machine()}")


if __name__ == "__main__":
    main()
