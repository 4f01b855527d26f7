"""`heapledger serve` as a real process: it says where it is, answers, and ends cleanly; wrong input is one line."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from web_traces import write_trace

Run = Callable[..., "subprocess.CompletedProcess[str]"]
COMMAND = [sys.executable, "-m", "heapledger", "serve"]


@contextmanager
def serving(*args: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server and the URL it printed."""
    argv = [*COMMAND, *map(str, args)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.search(r"http://\S+", line)
            assert match, line + (process.stderr.read() if process.stderr else "")
            yield process, match[0]
        finally:
            process.kill()


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serves_a_folder_until_it_is_told_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    write_trace(tmp_path / "a.heapledger", command="./needle")
    with serving("--port", "0", tmp_path) as (process, url):
        assert url.startswith("http://127.0.0.1:")
        status, page = get(url)
        assert status == 200
        assert "./needle" in page
        assert get(url + "healthz") == (200, "ok\n")
        assert get(url, Host="evil.example")[0] == 403
        process.send_signal(number)
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_only_loopback_is_listened_on_unless_told_otherwise(tmp_path: Path) -> None:
    with serving("--port", "0", tmp_path) as (process, url):
        port = int(url.rstrip("/").rpartition(":")[2])
        table = Path(f"/proc/{process.pid}/net/tcp").read_text()
        listening = [line.split()[1] for line in table.splitlines()[1:] if line.split()[3] == "0A"]
        assert [address for address in listening if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


def test_listening_for_others_is_warned_about(tmp_path: Path) -> None:
    with serving("--host", "0.0.0.0", "--port", "0", "--allow-host", "Box.Example", tmp_path) as (process, url):
        assert url.startswith("http://127.0.0.1:")
        assert get(url, Host="box.example")[0] == 200
        assert get(url, Host="0.0.0.0")[0] == 403
        process.terminate()
        assert process.stderr is not None
        assert "whoever reaches this port can read the traces" in process.stderr.read()


def test_a_taken_port_is_one_clear_line(tmp_path: Path, heapledger: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = heapledger("serve", "--port", str(port), tmp_path)
    assert result.returncode == 2
    assert f"port {port} on 127.0.0.1 is taken" in result.stderr
    assert "--port 0" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_usual_port_gives_way_to_a_free_one_when_none_is_asked_for(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, first), serving(tmp_path) as (_, second):
        assert first != second
        assert get(second + "healthz")[0] == 200


@pytest.mark.parametrize("name", ["missing.heapledger", "junk.heapledger"])
def test_a_file_that_is_no_trace_is_refused_at_the_start(tmp_path: Path, heapledger: Run, name: str) -> None:
    (tmp_path / "junk.heapledger").write_text("junk")
    result = heapledger("serve", "--port", "0", tmp_path / name)
    assert result.returncode == 2
    assert name in result.stderr
    assert "Traceback" not in result.stderr


def test_an_address_of_another_machine_is_refused(tmp_path: Path, heapledger: Run) -> None:
    for host in ("192.0.2.1", "no..such.name"):
        result = heapledger("serve", "--host", host, "--port", "0", tmp_path)
        assert result.returncode == 2
        assert host in result.stderr


def test_the_page_in_the_docs_names_every_option(heapledger: Run) -> None:
    options = set(re.findall(r"--[a-z-]+", heapledger("serve", "--help").stdout)) - {"--help"}
    page = (Path(__file__).parent.parent / "docs/dashboard.md").read_text()
    assert len(options) >= 4
    assert [option for option in sorted(options) if not re.search(rf"`{option}\b", page)] == []


def test_help_has_an_example_and_needs_no_flask(heapledger: Run) -> None:
    result = heapledger("serve", "--help")
    assert result.returncode == 0
    assert "Examples:" in result.stdout
    code = "import sys, heapledger.cli.serve as s; sys.exit('flask' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0
