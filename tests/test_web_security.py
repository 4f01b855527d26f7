"""Who is answered, and what a browser is told to allow."""

from __future__ import annotations

from pathlib import Path

import pytest
from flask.testing import FlaskClient
from web_traces import write_trace

from heapledger.web.app import create_app
from heapledger.web.config import Config
from heapledger.web.security import host_name


@pytest.fixture
def client(tmp_path: Path) -> FlaskClient:
    write_trace(tmp_path / "a.heapledger")
    return create_app(Config(paths=(tmp_path,), allowed_hosts=frozenset({"box.example"}))).test_client()


PAGES = ["/", "/healthz", "/api/v1/traces", "/no/such/page", "/static/plotly.min.js", "/static/heapledger.css"]


@pytest.mark.parametrize("path", PAGES)
def test_every_answer_carries_the_strict_headers(client: FlaskClient, path: str) -> None:
    with client.get(path) as answer:
        headers = answer.headers
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize("path", PAGES)
def test_a_name_that_points_at_loopback_is_not_answered(client: FlaskClient, path: str) -> None:
    answer = client.get(path, headers={"Host": "evil.example:8321"})
    assert answer.status_code == 403
    assert "a.heapledger" not in answer.text


@pytest.mark.parametrize("host", ["localhost:8321", "127.0.0.1", "[::1]:8321", "LOCALHOST", "box.example:80"])
def test_loopback_names_and_configured_ones_are_answered(client: FlaskClient, host: str) -> None:
    assert client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["", "localhost.evil.example", "127.0.0.1.evil.example", "[::1].evil.example", "[", "::1"]
)
def test_names_that_merely_look_like_loopback_are_not(client: FlaskClient, host: str) -> None:
    assert client.get("/", headers={"Host": host}).status_code in (400, 403)


def test_the_port_is_no_part_of_the_name() -> None:
    assert host_name("[::1]:80") == "[::1]"
    assert host_name("LocalHost:80") == "localhost"
    assert host_name("[::1].evil") == ""


@pytest.mark.parametrize(
    "path",
    [
        "/traces/..%2f..%2fetc%2fpasswd",
        "/traces/a.heapledger",
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static//etc/passwd",
    ],
)
def test_paths_in_urls_lead_nowhere(client: FlaskClient, path: str) -> None:
    answer = client.get(path, follow_redirects=True)
    assert answer.status_code == 404
    assert "root:" not in answer.text
    assert "create_app" not in answer.text


@pytest.mark.parametrize("method", ["post", "put", "delete", "patch"])
def test_nothing_can_be_sent(client: FlaskClient, method: str) -> None:
    assert getattr(client, method)("/", data=b"x" * 100).status_code == 405


def test_an_error_is_a_page_with_one_sentence_and_json_for_the_api(client: FlaskClient) -> None:
    page = client.get("/traces/000000000000")
    assert (page.status_code, page.mimetype) == (404, "text/html")
    assert "There is no such trace here." in page.text
    answer = client.get("/api/v1/traces/000000000000/report")
    assert answer.status_code == 404
    assert answer.json["error"]["message"].startswith("There is no such trace here.")  # type: ignore[index]


def test_an_endless_query_is_refused(client: FlaskClient) -> None:
    assert client.get("/?" + "x" * 5_000).status_code == 400
