"""Real programs under the whole shim, built so that it unwinds each stack anew, each 64th by libgcc's unwinder too,
and traps when one differs from the other."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from preload_spool import Recorded, Run, Shim, build_shim, plain

from heapledger.store.events import Kind

NODE = np.dtype([("ip", "<u8"), ("parent", "<u4"), ("module", "<u4")])
CUT, LOST = 1, 2
ALLOCATIONS = (Kind.MALLOC, Kind.CALLOC, Kind.REALLOC, Kind.MEMALIGN)

PYTHON = """
import asyncio, ctypes, decimal, json, os, re, sqlite3, threading, zlib
def work(n):
    data = [{"a": i, "b": str(i), "c": [i] * 3} for i in range(n)]
    return len(json.dumps(json.loads(json.dumps(data))))
def deep(n):
    return deep(n - 1) if n else work(20)
threads = [threading.Thread(target=work, args=(200,)) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(work(400), deep(60), re.sub(r"(a+)(b*)", r"\\2\\1", "aab" * 50)[:9])
async def both(): return await asyncio.gather(*(asyncio.sleep(0, i) for i in range(20)))
print(asyncio.run(both())[-1])
for _ in range(20):
    try: json.loads("{]")
    except ValueError: pass
base = sqlite3.connect(":memory:")
base.execute("create table t(a, b)")
base.executemany("insert into t values (?, ?)", ((i, str(i)) for i in range(200)))
print(base.execute("select sum(a) from t").fetchone(), flush=True)
child = os.fork()
if child == 0:
    print(work(30), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""

CPP = b"""
#include <string>
#include <vector>
int main() { std::vector<std::string> v(3, "a"); return v[0].size() - 1; }
"""

#: Exceptions through destructors in several threads; built here.
THREADS = """
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
struct Keep { std::string text; Keep(int n) : text(n * 5, 'x') {} ~Keep() { std::string copy(text + "y"); } };
int nest(int n) { Keep keep(n); if (n == 0) throw std::runtime_error(keep.text + "end"); return nest(n - 1) + 1; }
void work() {
    std::map<int, std::string> seen;
    for (int i = 0; i < 300; i++)
        try { seen[nest(i % 23)] = "no"; } catch (const std::exception &error) { seen[i] = error.what(); }
}
int main() {
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; i++) threads.emplace_back(work);
    for (auto &thread : threads) thread.join();
}
"""

SCRIPT = "const made = []; for (let i = 0; i < 500; i++) made.push(Buffer.alloc(i), 's' + i); console.log(made.length)"

PERL = 'my %h; $h{$_ % 977} .= "x$_" for 1..4000; eval { die {a => $_} } for 1..50; print scalar(sort keys %h), "\\n"'

PROGRAMS: dict[str, tuple[tuple[str, ...], bytes]] = {
    "python": (("/usr/bin/python3", "-c", PYTHON), b""),
    "git": (("git", "-C", str(Path(__file__).parents[1]), "log", "--stat", "-8"), b""),
    "compiler": (("g++", "-O0", "-S", "-o", "-", "-x", "c++", "-"), CPP),
    "perl": (("perl", "-e", PERL), b""),
    "node": (("node", "-e", SCRIPT), b""),
    "java": (("java", "-Xint", "-version"), b""),
}
#: These have code of their own making, without call frame information: a stack that cannot be followed says so.
COMPILING = {"node", "java"}


@pytest.fixture(scope="module")
def checking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ("-DHEAPLEDGER_CHECK_STACKS", "-Wl,--no-as-needed", "-lgcc_s")
    return build_shim(tmp_path_factory.mktemp("checking"), *flags)


def nodes_of(image: Recorded) -> npt.NDArray[np.void]:
    """The image's trie; row i is node i."""
    count = image.get("nodes")
    files = range((count + 65535) // 65536)
    return np.concatenate([np.fromfile(image.folder / f"stacks.{k}", NODE) for k in files])[:count]


def marks_of(nodes: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """The outermost ip of each node's stack: CUT, LOST, or that of a real frame."""
    root = nodes["ip"].copy()
    for i in np.flatnonzero(nodes["parent"]):
        root[i] = root[nodes["parent"][i]]
    return root


def check_trie(image: Recorded) -> None:
    """Each node is written and has an older parent; each that is used is the only one of its kind."""
    nodes = nodes_of(image)
    assert (nodes["ip"][1:] != 0).all()
    assert (nodes["parent"][1:] < np.arange(1, len(nodes))).all()
    stacks = image.of(*ALLOCATIONS).stack
    used = np.union1d(stacks, nodes["parent"])
    assert len(np.unique(nodes[used])) == len(used)
    assert (stacks > 0).all()
    assert (stacks < len(nodes)).all()


def run(checking: Path, folder: Path, argv: tuple[str, ...], stdin: bytes) -> Run:
    if shutil.which(argv[0]) is None:
        pytest.skip(f"no {argv[0]} here")
    env = {"PYTHONMALLOC": "malloc", "LC_ALL": "C"}
    expected = plain("env", *(f"{key}={value}" for key, value in env.items()), *argv, stdin=stdin)
    done = Shim(checking, folder).run(*argv, stdin=stdin, env=env)
    assert done.stderr == expected.stderr
    assert (done.code, done.stdout) == (0, expected.stdout)
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_each_stack_of_a_real_program_is_what_a_full_unwind_finds(checking: Path, tmp_path: Path, name: str) -> None:
    done = run(checking, tmp_path, *PROGRAMS[name])
    captured, lost = 0, 0
    for image in done.images:
        if not len(image.of(*ALLOCATIONS)):
            continue
        check_trie(image)
        stacks = image.of(*ALLOCATIONS).stack
        captured += len(stacks)
        ends = marks_of(nodes_of(image))[stacks]
        lost += int(np.count_nonzero(ends == LOST))
    assert captured > 1000
    assert lost <= (captured // 1000 if name in COMPILING else 0)


@pytest.mark.slow
def test_each_stack_of_threads_that_throw_is_what_a_full_unwind_finds(checking: Path, tmp_path: Path) -> None:
    program = tmp_path / "threads"
    source = THREADS.encode()
    subprocess.run(["g++", "-O2", "-pthread", "-x", "c++", "-", "-o", program], input=source, check=True)
    done = run(checking, tmp_path, (str(program),), b"")
    check_trie(done.first)
    stacks = done.first.of(*ALLOCATIONS).stack
    assert len(stacks) > 10_000
    assert not (marks_of(nodes_of(done.first))[stacks] == LOST).any()


def test_a_fork_child_names_its_stacks_in_nodes_of_its_own(checking: Path, tmp_path: Path) -> None:
    source = "import os\ndef fill(): return [bytes(i) for i in range(600, 900)]\nfill()\n"
    source += "if os.fork() == 0: fill()\nelse: os.wait()"
    done = Shim(checking, tmp_path).run("/usr/bin/python3", "-c", source, env={"PYTHONMALLOC": "malloc"})
    assert done.code == 0
    assert len(done.images) == 2
    for image in done.images:
        check_trie(image)
    assert nodes_of(done.children[0])["ip"][1] != 0


def test_a_depth_option_cuts_each_stack_there(checking: Path, tmp_path: Path) -> None:
    done = Shim(checking, tmp_path).run("/usr/bin/python3", "-c", "import json", options="depth=5")
    assert done.code == 0
    nodes = nodes_of(done.first)
    depth = np.zeros(len(nodes), int)
    for i in range(1, len(nodes)):
        depth[i] = depth[nodes["parent"][i]] + (nodes["ip"][i] > LOST)
    assert depth.max() == 5
    assert (marks_of(nodes)[depth == 5] == CUT).any()
