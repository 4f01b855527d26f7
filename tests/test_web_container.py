"""The container's files, and its command line as a real process: another user, a folder that cannot be written."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from web_traces import write_trace

from heapledger.web.health import is_healthy

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT = Path(__file__).resolve().parent.parent
NOBODY = 65534


def compose() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def dockerfile(instruction: str) -> list[str]:
    """The arguments of an instruction of the last stage, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    stage = text[text.rindex("\nFROM ") :]
    return [line.partition(" ")[2].strip() for line in stage.splitlines() if line.startswith(instruction + " ")]


def test_the_service_is_published_on_loopback_only() -> None:
    assert [port for service in compose()["services"].values() for port in service["ports"]] == ["127.0.0.1:8321:8321"]


def test_the_service_has_no_more_rights_than_it_needs() -> None:
    service = compose()["services"]["web"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [volume["read_only"] for volume in service["volumes"]] == [True]
    assert not service["user"].startswith(("0", "root"))
    assert "privileged" not in service
    assert service["mem_limit"]
    assert any(mount.startswith("/tmp:") for mount in service["tmpfs"])


def test_the_image_does_not_run_as_root_and_checks_its_health() -> None:
    assert dockerfile("USER") == ["10001:10001"]
    assert "heapledger.web.health" in dockerfile("HEALTHCHECK")[0]
    assert compose()["services"]["web"]["healthcheck"]["test"] == ["CMD", "python", "-m", "heapledger.web.health"]


def test_what_the_build_needs_is_let_into_it() -> None:
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    let_in = {line[1:] for line in lines if line.startswith("!")}
    links = {path.resolve().name for path in (ROOT / "src/heapledger").iterdir() if path.is_symlink()}
    assert links | {"src", "preload", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= let_in
    assert all((ROOT / name).exists() for name in let_in)


def image_environment(port: int, traces: Path, tmp: Path) -> dict[str, str]:
    """The image's own settings, with another port and folder."""
    settings = dict(part.split("=", 1) for part in shlex.split(dockerfile("ENV")[0]))
    assert settings["HEAPLEDGER_BIND"] == "0.0.0.0:8321"
    settings |= {"HEAPLEDGER_BIND": f"127.0.0.1:{port}", "HEAPLEDGER_TRACES": str(traces)}
    return {"PATH": os.environ["PATH"], "TMPDIR": str(tmp), **settings}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that another user can reach (pytest's own cannot be)."""
    path = Path("/tmp") / f"heapledger-container-{os.getpid()}"
    path.mkdir(mode=0o755)
    yield path
    for inner in path.rglob("*"):
        if inner.is_dir():
            inner.chmod(0o700)
    shutil.rmtree(path)


def other_user() -> dict[str, Any]:
    """What makes a child process run as nobody; skips where that cannot be."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a process as another user")
    identity: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    try:
        reach = subprocess.run([sys.executable, "-c", "import heapledger"], cwd="/", check=False, **identity)
    except PermissionError:
        pytest.skip("another user cannot reach this Python")
    if reach.returncode:
        pytest.skip("another user cannot reach this checkout")
    return identity


@pytest.mark.parametrize("user", ["the same user", "another user"])
def test_the_images_command_serves_from_a_read_only_folder(folder: Path, user: str) -> None:
    argv = yaml.safe_load(dockerfile("CMD")[-1])
    argv[0] = str(Path(sys.executable).parent / argv[0])
    if not Path(argv[0]).exists():
        pytest.skip("gunicorn is not installed")
    identity = other_user() if user == "another user" else {}
    traces, tmp = folder / "traces", folder / "tmp"
    traces.mkdir()
    tmp.mkdir()
    tmp.chmod(0o1777)
    write_trace(traces / "a.heapledger").chmod(0o444)
    traces.chmod(0o555)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = image_environment(port, traces, tmp)
    with subprocess.Popen(argv, env=environment, cwd="/", stderr=subprocess.PIPE, text=True, **identity) as process:
        try:
            deadline = time.monotonic() + 20
            while not is_healthy(environment["HEAPLEDGER_BIND"]):
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            check_it_serves(port)
        finally:
            process.terminate()
            assert process.wait(15) == 0
    assert sorted(path.name for path in traces.iterdir()) == ["a.heapledger"]


def check_it_serves(port: int) -> None:
    """The index, and an analysis whose results cannot be stored in the file."""
    base = f"http://127.0.0.1:{port}"
    with urllib.request.urlopen(f"{base}/api/v1/traces", timeout=10) as answer:
        trace = json.load(answer)["traces"][0]
    assert (trace["name"], trace["problem"], trace["events"]) == ("a.heapledger", None, 2)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{base}/api/v1/traces/{trace['id']}/leaks", timeout=10) as answer:
            if answer.status == 200:
                assert json.load(answer)["total_bytes"] == 300
                return
        time.sleep(0.1)
    raise AssertionError("the analysis never ended")


def test_health_is_told_by_the_server_and_not_by_hope() -> None:
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        assert not is_healthy(f"0.0.0.0:{nobody_listens.getsockname()[1]}")
