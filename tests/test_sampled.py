"""Estimates from samples, against the full trace of the same run: what really was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampled_traces import sampled_copy

from heapledger.analyzer.reports import leaks, report, temporary, timeline, verify
from heapledger.analyzer.sampling import probability, weigh
from heapledger.analyzer.session import analyse
from heapledger.errors import NotMeasuredError
from heapledger.store.reader import Trace
from heapledger.web.app import create_app
from heapledger.web.config import Config

SAMPLE = 20_000
#: Standard errors that an estimate may be off.
ERRORS = 4


@pytest.fixture(scope="module")
def full(native: Callable[..., Path], heapledger: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sampled") / "full.heapledger"
    program = native("sites.c", "-O1", "-fno-builtin")
    done = heapledger("run", "-q", "-o", path, "--", program, "6000")
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def sample(full: Path) -> Path:
    return sampled_copy(full, full.with_name("sample.heapledger"), SAMPLE)


def reports_of(path: Path) -> dict[str, Any]:
    with Trace(path) as trace:
        analysis = analyse(trace)
        return {
            "report": report.build(trace, analysis),
            "leaks": leaks.build(trace, analysis),
            "temporary": temporary.build(trace, analysis),
            "timeline": timeline.build(trace, analysis),
            "verify": verify.build(trace, [analysis]),
            "lifetimes": analysis.lifetimes(),
        }


@pytest.fixture(scope="module")
def truth(full: Path) -> dict[str, Any]:
    return reports_of(full)


@pytest.fixture(scope="module")
def estimated(sample: Path) -> dict[str, Any]:
    return reports_of(sample)


def near(estimate: float, standard_error: float, true: float) -> bool:
    return abs(estimate - true) <= ERRORS * standard_error + 1


def by_name(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {entry["function"]: entry for entry in entries}


def test_a_block_of_s_bytes_is_recorded_with_probability_1_minus_exp_of_minus_s_over_b() -> None:
    assert probability([0, 1000, 10**9], 1000).tolist() == pytest.approx([0, 1 - math.exp(-1), 1])
    assert probability([0, 5], 0).tolist() == [1, 1]


def test_weights_are_unbiased_and_their_variance_is_the_one_that_is_seen() -> None:
    rng = np.random.default_rng(5)
    sizes = np.array([10, 500, 3000, 20_000] * 50)
    totals, claimed = [], []
    for _ in range(2000):
        chosen = sizes[rng.random(len(sizes)) < probability(sizes, 1000)]
        w = weigh(chosen, 1000)
        totals.append(w.amount.sum())
        claimed.append(w.amount_variance.sum())
    spread = np.std(totals)
    assert abs(np.mean(totals) - sizes.sum()) < 4 * spread / math.sqrt(len(totals))
    assert np.mean(claimed) == pytest.approx(spread**2, rel=0.1)


def test_totals_are_estimated_within_their_errors(truth: dict[str, Any], estimated: dict[str, Any]) -> None:
    for what in ("allocated", "released", "temporary", "live"):
        blocks, size, _, _ = truth["lifetimes"][what]
        found = estimated["lifetimes"][what]
        assert near(found[0], found[2], blocks), what
        assert near(found[1], found[3], size), what
        assert 0 < found[3] < 0.5 * max(found[1], 1), what


def test_call_sites_are_estimated_within_their_errors(truth: dict[str, Any], estimated: dict[str, Any]) -> None:
    true, found = (by_name(which["lifetimes"]["sites"]) for which in (truth, estimated))
    for name in ("scratch", "make_small", "make_medium", "make_large"):
        # One temporary block in a whole run is hardly ever in a sample.
        for what in ("allocated", "live", *(["temporary"] if name == "scratch" else [])):
            for i in (0, 1):
                assert near(found[name][what][i], found[name][what][i + 2], true[name][what][i]), (name, what)
        places = {p["function"]: p["released"] for p in true[name]["freed_at"]}
        for place in found[name]["freed_at"]:
            assert near(place["released"][0], place["released"][2], places[place["function"]][0]), name


def test_most_estimates_lie_within_two_errors_over_many_samples(full: Path, tmp_path: Path) -> None:
    """An error that is too small would let them out, one that is too large would let none out."""
    true = reports_of(full)["lifetimes"]["allocated"]
    off = []
    for seed in range(12):
        path = sampled_copy(full, tmp_path / f"{seed}.heapledger", 100_000, seed + 100)
        with Trace(path) as trace:
            blocks, size, blocks_error, bytes_error = analyse(trace).lifetimes()["allocated"]
        off += [(blocks - true[0]) / blocks_error, (size - true[1]) / bytes_error]
    assert max(map(abs, off)) < ERRORS
    assert 0.4 < math.sqrt(sum(x * x for x in off) / len(off)) < 1.8


def test_the_ledger_balances_and_says_that_it_is_estimated(truth: dict[str, Any], estimated: dict[str, Any]) -> None:
    found, true = estimated["report"], truth["report"]
    assert sum(o["rss_bytes"] for o in found["owners"]) == found["pagemap_bytes"] == true["pagemap_bytes"]
    assert all(o["rss_bytes"] >= 0 for o in found["owners"])
    assert found["estimated"] is True
    assert found["process"]["sample_bytes"] == SAMPLE
    live = {k["kind"]: k for k in found["kinds"]}["live"]
    exact = {k["kind"]: k["rss_bytes"] for k in true["kinds"]}
    assert live["estimated"] is True
    assert near(live["rss_bytes"], live["standard_error_rss_bytes"], exact["live"])
    malloc = ("chunk_overhead", "tcache", "fastbin", "hole_reclaimable", "hole_pinned", "top", "arena")
    rest = {k["kind"]: k["rss_bytes"] for k in found["kinds"]}["unsampled"]
    assert rest + live["rss_bytes"] == exact["live"] + sum(exact.get(kind, 0) for kind in malloc)
    # What is not malloc's is as in the full trace.
    for kind in ("library_text", "stack", "self", "library_bss"):
        assert {k["kind"]: k["rss_bytes"] for k in found["kinds"]}.get(kind) == exact.get(kind)


def test_live_bytes_and_their_peak_are_estimated(truth: dict[str, Any], estimated: dict[str, Any]) -> None:
    heap, true = estimated["report"]["heap"], truth["report"]["heap"]
    assert near(heap["live_bytes"], heap["standard_error_bytes"], true["live_bytes"])
    assert near(heap["live_blocks"], heap["standard_error_blocks"], true["live_blocks"])
    assert heap["hole_bytes"] is None
    peak, highest = estimated["report"]["peak"], truth["report"]["peak"]["live_bytes"]
    assert near(peak["live_bytes"], peak["standard_error_bytes"], highest)
    series = estimated["timeline"]["series"]
    assert series["live_bytes"]["max"] == peak["live_bytes"]
    assert series["live_bytes"]["estimated"] is True
    assert "hole_bytes" not in series
    assert "estimated" not in series["rss"]


def test_blocks_not_freed_are_estimated_by_call_stack(truth: dict[str, Any], estimated: dict[str, Any]) -> None:
    found, true = estimated["leaks"], truth["leaks"]
    assert found["estimated"] is True
    assert near(found["total_bytes"], found["standard_error_bytes"], true["total_bytes"])
    assert near(found["total_blocks"], found["standard_error_blocks"], true["total_blocks"])
    exact = {leak["site"]: leak for leak in true["leaks"]}
    for leak in found["leaks"]:
        assert near(leak["bytes"], leak["standard_error_bytes"], exact[leak["site"]]["bytes"])
    assert "estimated" not in true


def test_where_others_of_a_leaks_site_were_freed_is_said(truth: dict[str, Any]) -> None:
    large = next(leak for leak in truth["leaks"]["leaks"] if leak["site"].startswith("make_large"))
    assert [place["function"] for place in large["freed_at"]] == ["drop_other"]
    assert large["freed_at"][0]["share"] == 1
    assert large["freed_at"][0]["blocks"] == large["freed_blocks"] > 100
    assert large["freed_at"][0]["stack"][0]["function"] == "drop_other"


def test_temporary_allocations_are_listed_by_site(truth: dict[str, Any], estimated: dict[str, Any]) -> None:
    first = truth["temporary"]["sites"][0]
    assert (first["function"], first["blocks"], first["bytes"]) == ("scratch", 30_000, 720_000)
    assert first["share_of_site"] == 1
    assert near(
        estimated["temporary"]["temporary"]["blocks"],
        estimated["temporary"]["temporary"]["standard_error_blocks"],
        truth["temporary"]["temporary"]["blocks"],
    )


def test_a_sample_that_does_not_say_what_was_temporary_has_no_figure_for_it(full: Path, tmp_path: Path) -> None:
    path = sampled_copy(full, tmp_path / "x.heapledger", SAMPLE, told=False)
    with Trace(path) as trace:
        analysis = analyse(trace)
        assert report.build(trace, analysis)["temporary"] is None
        with pytest.raises(NotMeasuredError, match="sample"):
            temporary.build(trace, analysis)


def test_nothing_is_predicted_from_a_sample(sample: Path, heapledger: Callable[..., Any]) -> None:
    done = heapledger("verify", sample, "--format", "json")
    assert done.returncode == 4
    found = json.loads(done.stdout)
    assert (found["sampled"], found["ok"], found["addresses"]["predicted"]) == (True, False, 0)
    assert "sample" in done.stderr
    done = heapledger("holes", sample)
    assert (done.returncode, done.stdout) == (4, "")
    assert "sample" in done.stderr


@pytest.mark.parametrize("command", ["report", "leaks", "temporary", "timeline", "info"])
def test_text_of_a_sample_marks_estimates(sample: Path, heapledger: Callable[..., Any], command: str) -> None:
    done = heapledger(command, sample)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    if command != "info":
        assert "~" in done.stdout
        assert "sample" in done.stdout


def test_the_second_look_comes_from_the_file(sample: Path) -> None:
    with Trace(sample) as trace:
        analyse(trace)
    with Trace(sample) as trace:
        seen: list[int] = []
        analyse(trace, progress=lambda done, _: seen.append(done))
        assert not seen


def test_the_page_of_a_sample_wears_a_badge_and_marks_estimates(sample: Path, full: Path) -> None:
    pages = {}
    for path in (sample, full):
        client = create_app(Config(paths=(path,), patience_s=20.0)).test_client()
        pages[path] = client.get("/", follow_redirects=True).text
        trace = client.get("/api/v1/traces").get_json()["traces"][0]["id"]
        temporary_json = client.get(f"/api/v1/traces/{trace}/temporary").get_json()
        assert temporary_json["sites"][0]["function"] == "scratch"
        assert client.get(f"/api/v1/traces/{trace}/holes").status_code == (404 if path == sample else 200)
    assert "sampled, 1 in 19.5 KiB" in pages[sample]
    assert 'class="within"' in pages[sample]
    assert "between the recorded blocks" in pages[sample]
    assert "no address can be predicted" in pages[sample]
    assert "sampled, 1 in" not in pages[full]
    assert 'class="within"' not in pages[full]
    assert "freed at (" in pages[full]
    assert "Who freed what lies in the holes" in pages[full]
    assert pages[full].count("drop_other") > 1


def test_what_run_samples_agrees_with_a_full_trace_of_the_same_program(
    full: Path, native: Callable[..., Path], heapledger: Callable[..., Any], tmp_path: Path
) -> None:
    """The shim's own sample, of another run: the program is deterministic."""
    path, program = tmp_path / "run.heapledger", native("sites.c", "-O1", "-fno-builtin")
    done = heapledger("run", "-q", "--sample", "20000", "--sample-seed", "11", "-o", path, "--", program, "6000")
    assert done.returncode == 0, done.stderr
    with Trace(path) as trace:
        assert trace.process().sample_bytes == 20_000
    true, found = reports_of(full), reports_of(path)
    for what in ("allocated", "released", "temporary", "live"):
        for i in (0, 1):
            assert near(found["lifetimes"][what][i], found["lifetimes"][what][i + 2], true["lifetimes"][what][i]), what
    sites, exact = by_name(found["lifetimes"]["sites"]), by_name(true["lifetimes"]["sites"])
    assert near(sites["scratch"]["temporary"][0], sites["scratch"]["temporary"][2], 30_000)
    for name in ("scratch", "make_small", "make_medium", "make_large"):
        assert near(sites[name]["allocated"][1], sites[name]["allocated"][3], exact[name]["allocated"][1]), name
    assert [place["function"] for place in sites["make_medium"]["freed_at"]] == ["drop_other"]
    report_json = found["report"]
    assert sum(o["rss_bytes"] for o in report_json["owners"]) == report_json["pagemap_bytes"]
