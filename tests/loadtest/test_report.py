"""The report: charts of known numbers, and a page without external resources."""

from __future__ import annotations

import dataclasses
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from deepseek_triton.loadtest.report.__main__ import main
from deepseek_triton.loadtest.report.chart import Bars, Chart, Series, nice_ticks, time_ticks
from deepseek_triton.loadtest.report.page import render
from deepseek_triton.loadtest.report.text import drift_sentence, headline, table
from tests.support.loadtests import engine_reading, failed, make_profile, make_result, reading, sample, usage

SAMPLES = [sample(i / 2 - 5, latency_s=1 + i / 100) for i in range(90)]
READINGS = [reading(float(i), 1.5 * (i + 5), slots_used=i % 8) for i in range(-5, 45)]


@pytest.mark.parametrize(
    ("highest", "expected"),
    [
        (1, [0, 0.25, 0.5, 0.75, 1.0]),
        (0.9, [0, 0.25, 0.5, 0.75, 1.0]),
        (7, [0, 2, 4, 6, 8]),
        (100, [0, 25, 50, 75, 100]),
        (0.03, [0, 0.01, 0.02, 0.03]),
    ],
)
def test_ticks_are_round_and_reach_the_highest(highest: float, expected: list[float]) -> None:
    assert nice_ticks(highest) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-10, 80, [0, 20, 40, 60, 80]),
        (0, 8, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (-30, 3600, [0, 600, 1200, 1800, 2400, 3000, 3600]),
    ],
)
def test_moments_are_round(low: float, high: float, expected: list[float]) -> None:
    assert time_ticks(low, high) == expected


def test_lines_are_drawn_where_their_values_are() -> None:
    chart = Chart("Latency", "s", [0, 1, 2, 3, 4, 5], [Series("median", [0.0, 1.0, None, 0.5, None], "c1")])
    svg = chart.svg()
    # From x 44 to 390 in five steps, from y 202 (0) up to 20 (1).
    assert 'points="78.6,202.0 147.8,20.0"' in svg
    assert 'cx="286.2" cy="111.0"' in svg, "a value between gaps is a dot"
    assert "limit" not in svg
    assert 'class="warmup"' not in svg


def test_a_limit_is_drawn_where_it_leaves_room_for_the_lines() -> None:
    series = [Series("median", [1.0, 2.0], "c1")]
    assert "limit 4" in Chart("t", "s", [0, 1, 2], series, limit=4.0).svg()
    assert "limit" not in Chart("t", "s", [0, 1, 2], series, limit=400.0).svg()


def test_bars_share_one_scale() -> None:
    svg = Bars("ms", [("a", (1.0, 3.0)), ("b", (1.0, 1.0))], (("queue", "c2"), ("compute", "c1"))).svg()
    assert re.findall(r'class="bar \w+" x="([\d.]+)" y="\d+" width="([\d.]+)"', svg) == [
        ("4.0", "98.0"),
        ("102.0", "294.0"),
        ("4.0", "98.0"),
        ("102.0", "98.0"),
    ]


class Page(HTMLParser):
    """What a page refers to and holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.captions: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.references += [str(v) for name, v in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "line", "rect", "polyline", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect", "polyline", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-2:] == ["figcaption", "b"]:
            self.captions.append(data)


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    levels = {"p99_latency_s": 5, "max_error_ratio": 0}
    text = render(make_result(SAMPLES, make_profile(levels=levels), readings=READINGS, tokens={0: 5, 7: 9}))
    page = Page(text)
    assert page.open == [], "every element is closed"
    assert page.references == []
    assert not re.search(r"@import|url\(|https?://|fetch\(|XMLHttp", text)
    assert page.captions == [
        "Latency", "Time to first token", "Inter-token latency", "Requests", "Output", "Streams under way", "Waiting",
        "Executed batch size", "Queue time", "Compute time", "CPU of this machine", "Memory of the server",
        "Queue and compute",
    ]  # fmt: skip
    assert "MET: all 2 service levels hold, and the run is valid" in text
    for figure in re.findall("data-points='([^']*)'", text):
        assert json.loads(unescape(figure))["series"]


def test_an_engines_own_numbers_stand_beside_the_clients() -> None:
    readings = [engine_reading(float(at), [0.1] * max(at, 0)) for at in range(-5, 46)]
    text = render(make_result([sample(float(at)) for at in range(45)], readings=readings))
    captions = Page(text).captions
    assert "Batch size" in captions and "A request's time in the engine" in captions
    assert "Executed batch size" not in captions, "the only model's is an engine's, whose batch Triton doesn't see"
    names = {
        series["name"]
        for figure in re.findall("data-points='([^']*)'", text)
        for series in json.loads(unescape(figure))["series"]
    }
    assert {
        "engine's median", "engine's slots used", "engine's sequences without a slot", "generated", "queue", "prefill",
        "decode",
    } <= names  # fmt: skip
    assert "used 4 of\n8 slots at most" in text
    assert "100\u00a0ms to 500\u00a0ms" in text, "the bucket of the engine's inter-token percentiles"


def test_what_a_server_says_can_not_become_markup() -> None:
    text = render(make_result([*SAMPLES, failed(1.0, error="RequestRejected: <script>alert('x')</script>")]))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_the_headline_says_the_worst_first() -> None:
    levels = {"p99_latency_s": 1.0, "p99_first_token_s": 0.1}
    missed = make_result(SAMPLES, make_profile(levels=levels))
    assert headline(missed).startswith("MISSED: latency, 99th percentile: 1.89 s, limit 1 s (and 1 more level)")
    invalid = make_result(SAMPLES, make_profile(levels=levels), usage=[usage(0.0), usage(40.0, generator_s=38.8)])
    assert headline(invalid).startswith("INVALID: load generator's CPU, of one core, busiest 5 s: 97 %, limit 50 %")
    assert headline(make_result(SAMPLES)) == "DONE: the run is valid; the profile promises no service level"
    assert "MISSED service level: latency, 99th percentile: 1.89 s, limit 1 s" in table(missed)


def test_the_report_is_made_again_from_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = make_result(SAMPLES, readings=READINGS)
    result.save(tmp_path / "result.json")
    assert main([str(tmp_path / "result.json")]) == 0
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert main([str(tmp_path / "other.json")]) == 1
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "the following arguments are required" in capsys.readouterr().err


def test_what_creeps_up_is_told() -> None:
    samples = [sample(float(i), latency_s=1.0 if i < 20 else 3.0) for i in range(40)]
    grown = dataclasses.replace(usage(40.0), server_bytes=500 * 2**20)
    result = make_result([*samples, failed(39.5)], usage=[usage(-5.0), usage(2.0), grown])
    told = "from the first quarter to the last: median latency 1 s to 3 s, the server's memory 400 MiB to 500 MiB"
    assert drift_sentence(result) == told
    assert told in table(result)
    assert f"F{told[1:]}." in unescape(render(result)).replace("\u00a0", " ")
    assert "memory" not in drift_sentence(make_result(samples, usage=[usage(0.0, server_s=None)] * 2))
