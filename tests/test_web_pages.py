"""Pages and API over trace files, without a browser: what is asked wrongly, what is missing, what is hostile."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from web_traces import SITE, write_trace

from heapledger.web.app import create_app
from heapledger.web.books import make_books
from heapledger.web.config import Config
from heapledger.web.views.header import OPTION_LIMIT, offered

PATIENCE_S = 20.0


def client_of(*paths: Path, **settings: Any) -> FlaskClient:
    return create_app(Config(paths=paths, **{"patience_s": PATIENCE_S, **settings})).test_client()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_trace(tmp_path / "a.heapledger", blocks=(100, 200, 5000))


@pytest.fixture
def client(file: Path) -> FlaskClient:
    return client_of(file)


@pytest.fixture
def api(client: FlaskClient) -> str:
    trace = client.get("/api/v1/traces").get_json()["traces"][0]
    return f"/api/v1/traces/{trace['id']}"


def test_one_file_is_shown_right_away_and_a_folder_is_listed(client: FlaskClient, file: Path) -> None:
    answer = client.get("/")
    assert (answer.status_code, answer.location) == (302, client.get("/api/v1/traces").get_json()["traces"][0]["url"])
    listing = client_of(file.parent).get("/")
    assert listing.status_code == 200
    assert "a.heapledger" in listing.text


def test_an_empty_folder_says_how_to_fill_it(tmp_path: Path) -> None:
    assert "heapledger run -o app.heapledger" in client_of(tmp_path).get("/").text


def test_a_trace_without_snapshots_says_what_was_not_measured(client: FlaskClient, api: str) -> None:
    page = client.get("/", follow_redirects=True).text
    assert "No snapshot of this process was taken" in page
    assert page.count("not measured") >= 3
    assert f'id="leaks-total" value="{5300}"' in page
    answer = client.get(f"{api}/report?at=peak")
    assert answer.status_code == 404
    assert "nobody looked at this process" in answer.get_json()["error"]["message"]
    assert client.get(f"{api}/holes").status_code == 404


@pytest.mark.parametrize(
    "query",
    [
        "report?at=yesterday",
        "report?at=-1",
        "report?at=1e3",
        "report?at=²",
        "timeline?points=1",
        "timeline?points=4001",
        "timeline?points=many",
        "timeline?t0=-5",
        "timeline?t0=99999999999999999999",
        "timeline?t0=20&t1=10",
        "timeline?t0=٣",
        "leaks?process=x",
        "leaks?process=77",
        "status?process=0x1",
    ],
)
def test_a_query_that_makes_no_sense_is_refused_in_one_sentence(client: FlaskClient, api: str, query: str) -> None:
    answer = client.get(f"{api}/{query}")
    assert answer.status_code == 400
    message = answer.get_json()["error"]["message"]
    assert 10 < len(message) < 120
    assert "\n" not in message


def test_a_timeline_never_has_more_points_than_asked_for(client: FlaskClient, api: str) -> None:
    for points in (2, 7, 4000):
        series = client.get(f"{api}/timeline?points={points}").get_json()["series"]
        assert series["rss"]["points"]
        assert all(len(line["points"]) <= points for line in series.values())


def test_while_the_analysis_runs_a_page_says_so_and_the_api_answers_202(file: Path) -> None:
    client = client_of(file, patience_s=0)
    trace = client.get("/api/v1/traces").get_json()["traces"][0]
    page = client.get(trace["url"])
    assert page.status_code == 202
    assert '<noscript><meta http-equiv="refresh"' in page.text
    deadline = time.monotonic() + PATIENCE_S
    states = []
    while not states or states[-1] != "done":
        assert time.monotonic() < deadline
        states.append(client.get(f"/api/v1/traces/{trace['id']}/status").get_json()["state"])
        time.sleep(0.02)
    assert set(states) <= {"waiting", "working", "done"}
    assert client.get(trace["url"]).status_code == 200


def test_results_are_stored_in_the_trace_for_the_next_time(file: Path) -> None:
    client_of(file).get("/", follow_redirects=True)
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT count(*) FROM fact").fetchone()[0] > 0
    connection.close()
    shares: list[float] = []
    make_books(file, None, shares.append)
    assert shares == []


def test_a_trace_that_vanished_is_an_error_and_not_a_crash(client: FlaskClient, api: str, file: Path) -> None:
    url = client.get("/").location
    file.unlink()
    for path in (url, f"{api}/leaks", "/api/v1/traces"):
        assert client.get(path).status_code in (200, 404, 422)
    assert "cannot be read" in client.get(url).text


def test_hostile_names_are_escaped_wherever_they_stand(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>"
    file = write_trace(
        tmp_path / f"x{'<b>'}.heapledger", command=f"'{nasty}' '\x1b[31m\u202e'", exe=nasty, notes=[nasty]
    )
    for page in (client_of(file).get("/", follow_redirects=True).text, client_of(tmp_path).get("/").text):
        assert nasty not in page
        assert SITE not in page
        assert "<b>" not in page
        assert "\x1b" not in page
        assert "\u202e" not in page
        assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize("value", ['{"html": "<script>"}', "[]", '"text"', "7", "null", "{", '{"groups": 5}'])
def test_results_in_the_file_that_nobody_made_are_no_crash(file: Path, value: str) -> None:
    """Facts are read from a file that may be anybody's: the page is an error page, or right, and never a traceback."""
    client_of(file).get("/", follow_redirects=True)
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE fact SET value = ?", (value,))
    connection.close()
    answer = client_of(file).get("/", follow_redirects=True)
    assert answer.status_code in (200, 422, 500)
    assert "Traceback" not in answer.text
    assert "<script>" not in re.sub(r"<script src=[^>]*>", "", answer.text)


def test_more_analyses_than_the_desk_takes_on_are_turned_away_for_a_moment(tmp_path: Path) -> None:
    for number in range(6):
        write_trace(tmp_path / f"{number}.heapledger", blocks=[10] * 20_000)
    client = client_of(tmp_path, patience_s=0, queue_limit=1)
    answers = [client.get(trace["url"]) for trace in client.get("/api/v1/traces").get_json()["traces"]]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused
    assert all(answer.headers["Retry-After"] for answer in refused)
    assert "try again in a moment" in refused[0].text


def test_a_build_of_thousands_of_processes_offers_the_busiest_and_the_one_shown() -> None:
    processes = [{"id": number, "events": number} for number in range(5_000)]
    chosen = [process["id"] for process in offered(processes, 3)]
    assert len(chosen) == OPTION_LIMIT + 1
    assert chosen[0] == 3
    assert chosen[1:] == list(range(5_000 - OPTION_LIMIT, 5_000))


def test_every_figure_on_a_page_carries_its_exact_value(client: FlaskClient) -> None:
    page = client.get("/", follow_redirects=True).text
    figures = re.findall(r'<data[^>]*value="(\d+)" data-bytes="(\d+)" title="([\d,]+) bytes?">', page)
    assert len(figures) > 10
    assert all(value == exact == title.replace(",", "") for value, exact, title in figures)


def test_the_api_is_json_that_a_script_can_keep(client: FlaskClient, api: str) -> None:
    for name in ("report", "timeline", "leaks", "verify", "status"):
        answer = client.get(f"{api}/{name}")
        assert answer.mimetype == "application/json"
        assert json.loads(answer.text)
        assert answer.headers["Cache-Control"] == "no-store"
