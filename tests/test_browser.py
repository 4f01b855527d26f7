"""The dashboard in a real browser: what stands on the page is what the command line says; nothing leaves the machine.

Every page that a test opens is watched: a console error, a violation of the content security policy or a request to
another host fails the test, whatever else it looks at.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from test_web_serve import get, serving
from web_traces import SITE, write_trace

from heapledger.web.app import create_app
from heapledger.web.config import Config
from heapledger.web.server import bind, wsgi_server

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

pytestmark = pytest.mark.browser

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DRAWN = "#timeline-plot[data-state=drawn]"
MAX_POINTS = 4_000

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Json = dict[str, Any]


@dataclass
class Watched:
    """A page of the browser, and what went wrong on it."""

    page: Any
    base: str
    troubles: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, path: str, wait_for: str = DRAWN) -> Any:
        self.page.goto(self.base + path.lstrip("/"))
        self.page.wait_for_selector(wait_for, timeout=20_000)
        return self.page

    def bytes(self, selector: str) -> int:
        return int(self.page.locator(selector).first.get_attribute("data-bytes"))

    def all_bytes(self, selector: str) -> list[int]:
        return [int(item.get_attribute("data-bytes")) for item in self.page.locator(selector).all()]

    def check(self) -> None:
        violations = self.page.evaluate("window.violations")
        strangers = [url for url in self.requests if not url.startswith((self.base, "data:"))]
        assert (self.troubles, violations, strangers) == ([], [], [])


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory, native: Callable[..., Path], heapledger: Run) -> Path:
    """A folder of real traces: a program with a known leak and hole, and a tree of processes. And a hostile one."""
    folder = tmp_path_factory.mktemp("traces")
    for name, argv in (("known", [native("known_leak_hole.c")]), ("tree", ["sh", "-c", "ls / >/dev/null; ls /usr"])):
        result = heapledger("run", "-o", folder / f"{name}.heapledger", "--", *argv)
        assert result.returncode == 0, result.stderr
    write_trace(folder / "hostile.heapledger", command="./<b>bold</b> '<img src=x onerror=alert(1)>'")
    return folder


def chromium_path(bundled: str) -> str:
    """The system's Chromium, or the one that Playwright brought; skips where there is neither."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), bundled)
    if not Path(found).exists():
        pytest.skip("Chromium is not installed (Debian's package `chromium`, or `playwright install chromium`)")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        path = chromium_path(playwright.chromium.executable_path)
        chromium = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def served(traces: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(base URL, path of the page by the trace's name) of `heapledger serve` over the folder."""
    with serving("--port", "0", traces) as (_, url):
        listed = json.loads(get(f"{url}api/v1/traces")[1])["traces"]
        yield url, {trace["name"].partition(".")[0]: trace["url"] for trace in listed}


def new_context(browser: Any, **options: Any) -> Any:
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options})
    context.add_init_script(
        "window.violations = [];"
        "document.addEventListener('securitypolicyviolation', e => window.violations.push(e.violatedDirective));"
    )
    return context


def new_page(context: Any, base: str) -> Watched:
    watched = Watched(context.new_page(), base)
    watched.page.on("pageerror", lambda error: watched.troubles.append(str(error)))
    watched.page.on("request", lambda request: watched.requests.append(request.url))
    watched.page.on("console", lambda line: line.type in ("error", "warning") and watched.troubles.append(line.text))
    return watched


@pytest.fixture(scope="module")
def context(browser: Any) -> Iterator[Any]:
    """What most tests share: plotly.js is fetched and compiled once."""
    shared = new_context(browser)
    yield shared
    shared.close()


@pytest.fixture
def watch(browser: Any, context: Any) -> Iterator[Callable[..., Watched]]:
    """`watch(base, **options)` opens a watched page (options: of a browser context); all are checked at the end."""
    opened: list[Watched] = []

    def make(base: str, **options: Any) -> Watched:
        opened.append(new_page(new_context(browser, **options) if options else context, base))
        return opened[-1]

    yield make
    for watched in opened:
        watched.check()
        watched.page.close()


@pytest.fixture(scope="module")
def known_page(context: Any, served: tuple[str, dict[str, str]]) -> Watched:
    base, pages = served
    watched = new_page(context, base)
    watched.open(pages["known"])
    return watched


@pytest.fixture
def known(known_page: Watched) -> Iterator[Watched]:
    """The page of the program with the known leak and hole. Tests share it: none may depend on what is unfolded."""
    yield known_page
    known_page.check()


@pytest.fixture(scope="module")
def told(traces: Path, heapledger: Run) -> Callable[..., Json]:
    """What a command says of the known program, as JSON."""

    @functools.cache
    def run(command: str, *options: str) -> Json:
        result = heapledger(command, traces / "known.heapledger", "--format", "json", *options)
        assert result.returncode == 0, result.stderr
        loaded = json.loads(result.stdout)
        assert isinstance(loaded, dict)
        return loaded

    return run


def test_rss_and_owners_on_the_page_are_those_of_the_report(known: Watched, told: Callable[..., Json]) -> None:
    report = told("report", "--at", "exit")
    assert known.bytes("#rss-exit") == report["rss_bytes"]
    assert known.bytes("#figure-rss") == report["rss_bytes"]
    assert known.bytes("#owners-sum-exit") == report["rss_bytes"]
    assert known.bytes("#figure-unexplained") == report["unexplained_bytes"]
    bars = known.all_bytes("#ledger-exit .bar:not(.total) data")
    assert len(bars) > 5
    assert sum(bars) == report["rss_bytes"]
    rows = known.all_bytes("#owners-exit tbody td:nth-child(2) data")
    assert sum(rows) == report["rss_bytes"]
    live = sum(kind["rss_bytes"] for kind in report["kinds"] if kind["kind"] == "live")
    assert sum(known.all_bytes("#ledger-exit .bar[data-family=live] data")) == live


def test_the_ledger_at_peak_is_that_of_the_report(known: Watched, told: Callable[..., Json]) -> None:
    exit_report, peak = told("report", "--at", "exit"), told("report", "--at", "peak")
    tabs = known.page.get_by_role("tab")
    if peak["snapshot"]["id"] == exit_report["snapshot"]["id"]:
        assert tabs.count() == 0
        return
    known.page.get_by_role("tab", name="At peak").click()
    assert known.page.locator("#ledger-peak").is_visible()
    assert not known.page.locator("#ledger-exit").is_visible()
    assert known.bytes("#rss-peak") == peak["rss_bytes"] == known.bytes("#owners-sum-peak")
    assert sum(known.all_bytes("#ledger-peak .bar:not(.total) data")) == peak["rss_bytes"]


def test_the_known_leak_and_the_known_hole_are_on_the_page_to_the_byte(
    known: Watched, told: Callable[..., Json]
) -> None:
    leaks, holes = told("leaks"), told("holes")
    assert known.bytes("#leaks-total") == leaks["total_bytes"]
    row = known.page.locator("#leaks-table tbody tr", has_text="leak_some").first
    assert row.locator("td:nth-child(2) data").get_attribute("data-bytes") == str(7 * 1234)
    assert row.locator("td:nth-child(3)").inner_text() == "7"
    assert known.bytes("#holes-total") == holes["total_bytes"]
    assert known.bytes("#holes-reclaimable") == holes["total_reclaimable_bytes"]
    # 1,000 neighbours of 10,000 bytes are one hole of 1,000 chunks: 16 bytes more than asked for, each.
    hole = known.page.locator("#holes-table tbody tr", has_text="make_pin").first
    assert hole.locator("td:nth-child(2) data").get_attribute("data-bytes") == "48"
    assert hole.locator("td:nth-child(4) data").get_attribute("data-bytes") == str(1000 * 10_016)


def test_the_agreement_is_that_of_verify(known: Watched, told: Callable[..., Json]) -> None:
    verify = told("verify")
    row = known.page.locator("#agreement-table [data-check=addresses]")
    assert int(row.locator(".compared").get_attribute("value")) == verify["addresses"]["predicted"] > 1000
    assert int(row.locator(".exact").get_attribute("value")) == verify["addresses"]["exact"]
    assert int(known.page.locator("#lost").get_attribute("value")) == verify["lost"] == 0
    assert int(known.page.locator("#events").get_attribute("value")) == verify["events"]


def test_the_api_says_what_the_command_line_says(known: Watched, told: Callable[..., Json]) -> None:
    trace = re.search(r"/traces/(\w+)", known.page.url)
    assert trace
    for command in ("report", "leaks", "holes", "verify"):
        answer = known.page.request.get(f"{known.base}api/v1/traces/{trace[1]}/{command}")
        assert answer.json() == told(command), command
    answer = known.page.request.get(f"{known.base}api/v1/traces/{trace[1]}/timeline?points=50").json()
    assert answer == told("timeline", "--points", "50")


def test_the_timeline_is_drawn_with_few_points_and_zooms(known: Watched) -> None:
    page = known.page
    assert page.locator("#timeline-plot .scatterlayer .trace").count() == 5  # four series, snapshots
    assert int(page.locator(DRAWN).get_attribute("data-points")) <= 4 * MAX_POINTS
    box = page.locator("#timeline-plot .nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 50)
    page.mouse.down()
    with page.expect_response(re.compile("t0=")) as answer:
        page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 60, steps=4)
        page.mouse.up()
    zoomed = answer.value.url
    page.wait_for_selector(DRAWN)
    start, end = (int(re.search(rf"{name}=(\d+)", zoomed)[1]) for name in ("t0", "t1"))  # type: ignore[index]
    assert 0 < start < end
    page.get_by_role("button", name="reset").click()
    page.wait_for_selector(DRAWN)


def test_the_timeline_zooms_by_keyboard(known: Watched) -> None:
    page, spans = known.page, []
    page.locator("#timeline-plot").focus()
    for key in ("+", "+", "ArrowLeft", "0"):
        with page.expect_response(re.compile("/timeline")) as answer:
            page.keyboard.press(key)
        bounds = [int(number) for number in re.findall(r"t[01]=(\d+)", answer.value.url)]
        spans.append(bounds[1] - bounds[0])
        page.wait_for_selector(DRAWN)
    assert spans[1] < spans[0] < spans[3]
    assert abs(spans[2] - spans[1]) <= 2


def test_tables_sort_by_keyboard_and_say_so(known: Watched) -> None:
    heading = known.page.locator("#owners-exit thead th").nth(1)
    rows = "#owners-exit tbody tr:not(.rest) td:nth-child(2) data"
    heading.get_by_role("button").focus()
    known.page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert known.all_bytes(rows) == sorted(known.all_bytes(rows), reverse=True)
    known.page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert known.all_bytes(rows) == sorted(known.all_bytes(rows))


def test_everything_that_can_be_reached_has_a_name(known: Watched) -> None:
    nameless = known.page.evaluate(
        """[...document.querySelectorAll('a, button, select, summary, [tabindex="0"], table, img')]
        .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.hasAttribute('alt')))
        .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    levels = known.page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    assert known.page.evaluate(
        "new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size"
    ) == known.page.evaluate("document.querySelectorAll('[id]').length")


def test_the_page_is_never_wider_than_the_window(
    watch: Callable[..., Watched], served: tuple[str, dict[str, str]]
) -> None:
    base, pages = served
    watched = watch(base)
    for path in ("/", pages["known"]):
        page = watched.open(path, "main")
        for width in (1280, 800, 400):
            page.set_viewport_size({"width": width, "height": 800})
            page.wait_for_timeout(100)
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_it_is_dark_where_darkness_is_asked_for(
    watch: Callable[..., Watched], served: tuple[str, dict[str, str]]
) -> None:
    base, pages = served
    brightness = {}
    page = watch(base).open(pages["known"])
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colors = page.evaluate(
            "[document.documentElement, document.body].map(e => getComputedStyle(e))"
            ".map((s, i) => i ? s.color : s.backgroundColor)"
        )
        brightness[scheme] = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors]
    paper, ink = zip(brightness["light"], brightness["dark"], strict=True)
    assert paper[0] > 700 > 150 > paper[1]
    assert ink[0] < 150 < 600 < ink[1]


def test_names_made_to_do_harm_are_shown_as_text(
    watch: Callable[..., Watched], served: tuple[str, dict[str, str]]
) -> None:
    base, pages = served
    watched = watch(base)
    page = watched.open(pages["hostile"])
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert SITE in page.locator("#leaks-table").inner_text()
    assert "<b>bold</b>" in page.locator("h1").inner_text()
    assert page.locator("main b, main img[src=x], main script").count() == 0
    watched.open("/", "#traces")
    assert "<img src=x onerror=alert(1)>" in page.locator("#traces").inner_text()


def test_a_reason_made_to_do_harm_stays_text_in_the_drawing(
    watch: Callable[..., Watched], served: tuple[str, dict[str, str]]
) -> None:
    """plotly renders some HTML in its labels: a snapshot's reason is one."""
    base, pages = served
    watched = watch(base)

    def poison(route: Any) -> None:
        answer = route.fetch()
        body = answer.json()
        body["snapshots"] = [
            {"id": 1, "reason": '<a href="https://evil.example">x</a>vector<b>', "time_ns": body["end_ns"] // 2}
        ]
        route.fulfill(response=answer, json=body)

    watched.page.route("**/timeline?**", poison)
    page = watched.open(pages["known"])
    label = page.locator("#timeline-plot .annotation-text")
    assert label.text_content() == '<a href="https://evil.example">x</a>vector<b>'[:40]
    assert label.locator("a, tspan[style]").count() == 0


def test_the_policy_stops_scripts_that_got_onto_the_page(
    watch: Callable[..., Watched], served: tuple[str, dict[str, str]]
) -> None:
    base, pages = served
    watched = watch(base)
    page = watched.open(pages["known"])
    page.evaluate(
        """() => {
            const script = document.createElement('script');
            script.textContent = 'window.harmed = true';
            document.body.append(script);
        }"""
    )
    assert page.evaluate("window.harmed") is None
    for _ in range(100):  # wait_for_function would need `unsafe-eval`, which the policy forbids
        if page.evaluate("window.violations.length"):
            break
        page.wait_for_timeout(50)
    assert page.evaluate("window.violations.splice(0)") == ["script-src-elem"]
    watched.troubles.clear()


def test_the_other_processes_of_a_tree_can_be_chosen(
    watch: Callable[..., Watched], served: tuple[str, dict[str, str]], traces: Path, heapledger: Run
) -> None:
    base, pages = served
    watched = watch(base)
    page = watched.open(pages["tree"])
    report = json.loads(heapledger("report", traces / "tree.heapledger", "--format", "json").stdout)
    assert len(report["processes"]) >= 3
    assert page.locator("#process option").count() == len(report["processes"])
    other = report["processes"][-1]
    page.get_by_label("Process").select_option(str(other["id"]))
    page.get_by_role("button", name="Show", exact=True).click()
    page.wait_for_selector(DRAWN)
    assert f"pid {other['pid']}" in page.locator(".subtitle").first.inner_text()
    assert watched.bytes("#rss-exit") == other["exit_rss_bytes"] or other["exit_rss_bytes"] is None


def test_the_page_reads_well_without_scripts(watch: Callable[..., Watched], served: tuple[str, dict[str, str]]) -> None:
    base, pages = served
    watched = watch(base, java_script_enabled=False)
    watched.page.goto(base + pages["known"].lstrip("/"))
    assert watched.bytes("#rss-exit") == watched.bytes("#owners-sum-exit") > 0
    for panel in watched.page.locator(".panel").all():
        assert panel.is_visible()
    hidden = watched.page.locator("#leaks-table tbody tr").all()
    assert all(row.is_visible() for row in hidden)
    watched.check = lambda: None  # type: ignore[method-assign]  # nothing can be asked of a page without scripts


def run_in_background(app: Flask) -> tuple[Any, str]:
    listener = bind("127.0.0.1", 0)
    server = wsgi_server(app, "127.0.0.1", listener, verbose=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = listener.getsockname()[1]
    listener.close()
    return server, f"http://127.0.0.1:{port}/"


def test_a_first_analysis_shows_its_progress_and_then_the_page(watch: Callable[..., Watched], tmp_path: Path) -> None:
    file = write_trace(tmp_path / "fresh.heapledger", blocks=[100] * 50_000)
    server, base = run_in_background(create_app(Config(paths=(file,), patience_s=0)))
    try:
        watched = watch(base)
        page = watched.open("/", "#progress")
        assert "Replaying fresh.heapledger" in page.locator("h1").inner_text()
        page.wait_for_selector(DRAWN, timeout=20_000)
        assert watched.bytes("#leaks-total") == 5_000_000
    finally:
        server.shutdown()
        server.server_close()
