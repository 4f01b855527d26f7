"""Real programs with work to do, each run in the same way alone and traced, and what has to come out the same.

Used by test_real_suites.py and bench/suites.py. A suite's outcome is everything that a user would see of the run and
that does not change from run to run: not output of times and process ids, but which tests passed, what a server
answered and counted, the bytes of a database.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Outcome = dict[str, Any]
#: The system's Python, whose test suite is packaged with it.
PYTHON = "/usr/bin/python3"


class HungError(Exception):
    """The run did not end in time, and was killed."""


@dataclass
class Ended:
    """A finished command: its status, output, and what it and the processes it waited for took in seconds."""

    status: int
    stdout: bytes
    stderr: bytes
    wall: float
    cpu: float


@dataclass
class Suite:
    """A program with its work: `prepare` fills an empty folder, `argv` is run in it.

    `client` makes a server work, brings it to its end and says what it answered; `outcome` looks at what is left.
    """

    name: str
    argv: Callable[[Path], list[str]]
    outcome: Callable[[Ended, Path], Outcome]
    prepare: Callable[[Path], None] = lambda folder: None
    client: Callable[[Path], Outcome] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    #: Commands that have to be there.
    needs: tuple[str, ...] = ()
    #: Why it cannot run, or "", where that is not a matter of commands.
    lacks: Callable[[], str] = lambda: ""
    #: One thread and glibc's allocator: every address can be predicted.
    exact: bool = False
    #: glibc's allocator: every resident page has an owner.
    own_malloc: bool = False

    def missing(self) -> str:
        """Why this suite cannot run here, or ""."""
        absent = [command for command in self.needs if shutil.which(command) is None]
        return f"not installed: {', '.join(absent)}" if absent else self.lacks()


def run(suite: Suite, prefix: list[str], *, timeout: float) -> tuple[Outcome, Ended]:
    """Runs a suite below `prefix` in a new folder that every user can read. HungError after `timeout` seconds."""
    with tempfile.TemporaryDirectory(prefix="suite-", dir="/tmp") as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)  # a server's workers may be another user's
        suite.prepare(folder)
        with open(folder / "stdout", "w+b") as stdout, open(folder / "stderr", "w+b") as stderr:
            start = time.monotonic()
            process = subprocess.Popen(
                [*prefix, *suite.argv(folder)],
                cwd=folder,
                env={**os.environ, **suite.env},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                answers = suite.client(folder) if suite.client else {}
                status, usage = _wait(process, start + timeout)
            finally:
                with contextlib.suppress(ProcessLookupError):  # nothing is left behind, whatever happened
                    os.killpg(process.pid, signal.SIGKILL)
                if process.returncode is None:
                    process.wait()
            wall = time.monotonic() - start
            stdout.seek(0)
            stderr.seek(0)
            ended = Ended(status, stdout.read(), stderr.read(), wall, usage.ru_utime + usage.ru_stime)
        return {"status": status, **answers, **suite.outcome(ended, folder)}, ended


def _wait(process: subprocess.Popen[bytes], until: float) -> tuple[int, Any]:
    while time.monotonic() < until:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage
        time.sleep(0.005)
    raise HungError(f"{process.args!r} was still running:\n{_what_hangs(process.pid)}")


def _what_hangs(session: int) -> str:
    """A line for each thread of the session's processes: what it waits for, and whether heapledger is in it."""
    lines = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(path.name)) != session:
                continue
            argv = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120]
            traced = "traced" if "/libheapledger" in (path / "maps").read_text(errors="replace") else "plain"
            for task in sorted((path / "task").iterdir()):
                wait = (task / "wchan").read_text()
                state = (task / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                lines.append(f"{path.name}/{task.name} {traced} {state} {wait} {argv}")
    return "\n".join(lines)


def _printed(ended: Ended, folder: Path) -> Outcome:
    """Its output without the folder's name and without heapledger's own lines."""

    def shown(text: bytes) -> str:
        lines = text.decode(errors="replace").replace(str(folder), "FOLDER").splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("heapledger:"))

    return {"stdout": shown(ended.stdout), "stderr": shown(ended.stderr)}


def _until(what: Callable[[], object], seconds: float = 20.0) -> None:
    """Waits until something is true; an OSError is "not yet"."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if what():
                return
        time.sleep(0.02)
    raise HungError("the server did not answer in time")


# ---- CPython


def cpython(*modules: str, ignored: tuple[str, ...] = ()) -> Suite:
    """Modules of CPython's own test suite: the outcome is each test's result."""
    alone = ["env", "-u", "PYTHONPATH", "-u", "PYTHONHOME", PYTHON]  # the variables are for the Python that runs us

    def argv(folder: Path) -> list[str]:
        options = [argument for pattern in ignored for argument in ("-i", pattern)]
        report = ["--junit-xml", str(folder / "results.xml"), "--tempdir", str(folder)]
        return [*alone, "-m", "test", *report, *options, *modules]

    def lacks() -> str:
        probe = [*alone, "-c", f"import test.{', test.'.join(modules)}"]
        return (
            ""
            if subprocess.run(probe, capture_output=True, check=False).returncode == 0
            else "not installed: the test suite of the system's Python"
        )

    return Suite(f"CPython: {' '.join(modules)}", argv, _test_results, needs=(PYTHON,), lacks=lacks)


def _test_results(ended: Ended, folder: Path) -> Outcome:
    results = folder / "results.xml"
    if not results.exists():
        return {"tests": None, "stderr": ended.stderr.decode(errors="replace")}
    found = {}
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        kinds = sorted({child.tag for child in case if child.tag in ("failure", "error", "skipped")})
        found[case.attrib["name"]] = " ".join(kinds) or "passed"
    return {"tests": found}


# ---- SQLite


def sqlite(rows: int = 200_000) -> Suite:
    def prepare(folder: Path) -> None:
        (folder / "work.sql").write_text(_sql(rows))

    def outcome(ended: Ended, folder: Path) -> Outcome:
        digest = hashlib.sha256((folder / "work.db").read_bytes()).hexdigest()
        return {"database": digest, **_printed(ended, folder)}

    argv = ["sqlite3", "-batch", "work.db", ".read work.sql"]
    return Suite("SQLite's shell", lambda _: argv, outcome, prepare, needs=("sqlite3",), exact=True, own_malloc=True)


def _sql(rows: int) -> str:
    """A script of single inserts, then joins, full-text search, JSON, windows, updates and a VACUUM."""
    dice = random.Random(7)
    words = [
        f"{a}{b}" for a in ("pin", "oak", "ash", "elm", "fir", "yew") for b in ("e", "wood", "leaf", "root", "ery")
    ]
    lines = ["CREATE TABLE item(id INTEGER PRIMARY KEY, owner INT, price REAL, name TEXT, data TEXT);", "BEGIN;"]
    for number in range(rows):
        name = " ".join(dice.choices(words, k=3))
        data = json.dumps({"tags": dice.choices(words, k=2), "n": number % 97})
        lines.append(f"INSERT INTO item VALUES({number},{number % 1009},{number * 37 % 1000 / 8},'{name}','{data}');")
    lines.append(f"""COMMIT;
CREATE TABLE owner AS WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 1008)
    SELECT i AS id, 'owner ' || i AS name, i % 17 AS city FROM n;
CREATE INDEX by_owner ON item(owner, price);
SELECT city, count(*), round(sum(price), 2) FROM item JOIN owner ON owner.id = item.owner GROUP BY city ORDER BY 2, 1;
SELECT a.name, b.name FROM item a JOIN item b ON b.owner = a.owner AND b.id = a.id + 1009 WHERE a.id < 20;
CREATE VIRTUAL TABLE words USING fts5(name, content='item', content_rowid='id');
INSERT INTO words(words) VALUES('rebuild');
SELECT count(*) FROM words WHERE words MATCH 'oakleaf AND yewroot';
SELECT rowid, highlight(words, 0, '<', '>') FROM words WHERE words MATCH 'pine elmery' ORDER BY rank, rowid LIMIT 9;
SELECT json_extract(data, '$.tags[0]') AS tag, count(*) FROM item WHERE id < {rows // 4} GROUP BY tag ORDER BY tag;
SELECT value, count(*) FROM item, json_each(item.data, '$.tags') WHERE item.id < {rows // 8} GROUP BY value ORDER BY 2;
SELECT json_group_array(json_object('id', id, 'name', name)) FROM item WHERE id % {rows // 20} = 3;
SELECT id, rank() OVER (PARTITION BY owner ORDER BY price DESC, id) FROM item WHERE owner < 3 ORDER BY owner, id;
UPDATE item SET name = upper(name), data = json_set(data, '$.n', id) WHERE id % 5 = 0;
DELETE FROM item WHERE id % 7 = 0;
VACUUM;
PRAGMA integrity_check;
SELECT nonsense FROM nowhere;
SELECT count(*), sum(length(data)) FROM item;
""")
    return "\n".join(lines)


# ---- redis


def redis(requests: int = 10_000) -> Suite:
    """A server on a socket in the folder, redis-benchmark, and a background save, for which it forks."""
    kinds = "set,get,incr,lpush,rpush,lpop,sadd,hset,spop,zadd,lrange_100,mset"

    def argv(folder: Path) -> list[str]:
        where = ["--port", "0", "--unixsocket", str(folder / "redis.sock"), "--dir", str(folder)]
        return ["redis-server", *where, "--save", "", "--appendonly", "no", "--enable-debug-command", "yes"]

    def client(folder: Path) -> Outcome:
        address = ["-s", str(folder / "redis.sock")]

        def ask(*words: str) -> str:
            answer = subprocess.run(["redis-cli", *address, *words], capture_output=True, text=True, check=False)
            return (answer.stdout + answer.stderr).strip()

        _until(lambda: ask("PING") == "PONG")
        load = ["redis-benchmark", *address, "-q", "-c", "16", "-n", str(requests), "-t", kinds]
        subprocess.run(load, check=True, capture_output=True, timeout=120)
        found: Outcome = {"digest": ask("DEBUG", "DIGEST"), "size": ask("DBSIZE"), "list": ask("LLEN", "mylist")}
        counted = re.findall(r"cmdstat_(\w+):calls=(\d+)", ask("INFO", "commandstats"))
        found["calls"] = {name: count for name, count in counted if name not in ("ping", "info")}
        ask("BGSAVE")
        _until(lambda: "rdb_bgsave_in_progress:0" in ask("INFO", "persistence"))
        found["saved"] = "rdb_last_bgsave_status:ok" in ask("INFO", "persistence")
        ask("SHUTDOWN", "NOSAVE")
        return found

    def outcome(ended: Ended, folder: Path) -> Outcome:
        check = subprocess.run(
            ["redis-check-rdb", str(folder / "dump.rdb")], capture_output=True, text=True, check=False
        )
        return {"dump": re.findall(r"\d+ keys read|RDB looks OK", check.stdout)}

    return Suite("redis-server", argv, outcome, client=client, needs=("redis-server", "redis-benchmark", "redis-cli"))


# ---- nginx


def nginx(requests: int = 2_000) -> Suite:
    """A master and two workers that give up root, compressing what they serve; a reload in the middle."""

    def prepare(folder: Path) -> None:
        dice = random.Random(3)
        (folder / "www").mkdir()
        (folder / "www/page.html").write_text("".join(f"<p>{dice.random()}</p>\n" for _ in range(4000)))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            (folder / "port").write_text(str(free.getsockname()[1]))
        places = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
        (folder / "nginx.conf").write_text(f"""
            daemon off; worker_processes 2; pid {folder}/pid; error_log {folder}/error.log warn;
            events {{ worker_connections 256; }}
            http {{
                access_log off; gzip on; gzip_types *; client_body_temp_path {folder}/body; {places}
                server {{
                    listen 127.0.0.1:{(folder / "port").read_text()};
                    root {folder}/www;
                    location /hello {{ return 200 "hello\\n"; }}
                    location /again {{ proxy_pass http://127.0.0.1:{(folder / "port").read_text()}/page.html; }}
                }}
            }}
        """)

    def client(folder: Path) -> Outcome:
        address = f"http://127.0.0.1:{(folder / 'port').read_text()}"

        def get(path: str) -> bytes:
            with urllib.request.urlopen(address + path, timeout=20) as answer:
                return bytes(answer.read())

        _until(lambda: get("/hello") == b"hello\n")
        found: Outcome = {"hello": get("/hello").decode()}
        pid = int((folder / "pid").read_text())
        for number, path in enumerate(("/page.html", "/again", "/hello", "/nowhere")):
            load = ["ab", "-q", "-n", str(requests), "-c", "16", "-H", "Accept-Encoding: gzip", address + path]
            shown = subprocess.run(load, capture_output=True, text=True, timeout=120, check=False)
            found[path] = re.findall(
                r"^(?:Complete|Failed|Non-2xx|Document Length|HTML transferred).*$", shown.stdout, re.M
            )
            if number == 1:
                os.kill(pid, signal.SIGHUP)
        found["page"] = get("/page.html") == (folder / "www/page.html").read_bytes()
        os.kill(pid, signal.SIGQUIT)
        return found

    def outcome(ended: Ended, folder: Path) -> Outcome:
        said = [re.sub(r"^.*\*\d+ |^\S+ \S+ ", "", line) for line in (folder / "error.log").read_text().splitlines()]
        return {"errors": sorted({line for line in said if "No such file" not in line})}

    return Suite(
        "nginx",
        lambda folder: ["nginx", "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")],
        outcome,
        prepare,
        client,
        needs=("nginx", "ab"),
        exact=True,
        own_malloc=True,
    )


# ---- the JVM

_HELLO = """
import java.util.*; import java.util.stream.*;
public class Hello {
    public static void main(String[] names) throws Exception {
        System.out.println("hello " + String.join(", ", names));
        int[] sums = new int[4];
        Thread[] threads = new Thread[4];
        for (int i = 0; i < 4; i++) {
            final int n = i;
            threads[i] = new Thread(() -> sums[n] = IntStream.range(0, 200_000).mapToObj(Integer::toString)
                .collect(Collectors.toMap(s -> s.substring(s.length() / 2), s -> 1, Integer::sum)).size());
            threads[i].start();
        }
        for (Thread thread : threads) thread.join();
        System.gc();
        System.out.println(Arrays.toString(sums));
        try { sums[names.length + 2]++; } catch (IndexOutOfBoundsException e) { System.out.println(e.getMessage()); }
        String nothing = names.length > 9 ? "" : null;
        try { nothing.length(); } catch (NullPointerException e) { System.out.println("caught by signal"); }
        try { deep(0); } catch (StackOverflowError e) { System.out.println("caught overflow"); }
        System.exit(3);
    }
    static int deep(int n) { return deep(n + 1) + 1; }
}
"""


def java() -> Suite:
    """A program compiled in memory and run: threads, collections, faults that the JVM handles, its own exit status."""

    def prepare(folder: Path) -> None:
        (folder / "Hello.java").write_text(_HELLO)

    argv = ["java", "-Xmx256m", "Hello.java", "x", "y"]
    return Suite("JVM: a source file", lambda _: argv, _printed, prepare, needs=("java", "javac"), own_malloc=True)


def java_version() -> Suite:
    return Suite("JVM: -version", lambda _: ["java", "-version"], _printed, needs=("java",), own_malloc=True)


# ---- node

_NPM = """set -e
mkdir lib app
echo '{"name": "lib", "version": "1.0.0"}' >lib/package.json
echo 'module.exports = () => "from lib"' >lib/index.js
cd app
$INIT
npm install --offline --no-audit --no-fund ../lib
node -e 'console.log(require("lib")(), require("./package.json").dependencies)'
"""


def npm(init: str = 'echo \'{"name": "app"}\' >package.json') -> Suite:
    """npm installs a package into another, which `init` makes, without a network."""

    def prepare(folder: Path) -> None:
        (folder / "npm.sh").write_text(_NPM.replace("$INIT", init))

    def outcome(ended: Ended, folder: Path) -> Outcome:
        shown = _printed(ended, folder)
        shown["stdout"] = re.sub(r" in [\d.]+m?s", "", shown["stdout"])
        return shown

    return Suite(
        "node: npm",
        lambda folder: ["env", f"npm_config_cache={folder}/cache", f"HOME={folder}", "sh", "npm.sh"],
        outcome,
        prepare,
        env={"npm_config_update_notifier": "false"},
        needs=("npm", "node"),
        own_malloc=True,
    )


#: The suites of CPython in full: minutes, most of them asleep.
FULL_CPYTHON = ("test_json", "test_threading", "test_subprocess", "test_multiprocessing_spawn")


def quick() -> Iterator[Suite]:
    """What CI runs; of CPython what does not sleep for seconds or run a second time in another way."""
    slow = ("*.ProcessTestCase*", "*imeout*", "*repeated_call_after*", "*_dead", "*pass_fds*", "*shutdown*")
    yield cpython("test_json", "test_threading", "test_subprocess", ignored=slow)
    yield sqlite(40_000)
    yield redis(3_000)
    yield nginx(600)
    yield java()
    yield npm()


def full() -> Iterator[Suite]:
    """All of it."""
    for module in FULL_CPYTHON:
        yield cpython(module)
    yield sqlite()
    yield redis(50_000)
    yield nginx(5_000)
    yield java_version()
    yield java()
    yield npm("npm --version && npm init -y >/dev/null")
