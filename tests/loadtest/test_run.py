"""The load generator as a whole: a process of its own, since Locust patches the one that it is in.

Against a fake with known times for its clock and its judgement; against the real server for the whole way.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deepseek_triton.clients.api import GenerateRequest
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.loadtest.metrics import Reading, parse, work
from deepseek_triton.loadtest.options import check_model, make_parser
from deepseek_triton.loadtest.profile import LoadProfileError
from deepseek_triton.loadtest.result import LoadTestResult, load
from deepseek_triton.loadtest.status import Status, help_text, status_of
from tests.conftest import NAME
from tests.support.fake_triton import MODEL, Behaviour, Ports, fake_triton
from tests.support.loadtests import missed_but_for_time
from tests.support.serving import wait_until
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # each test runs a load for seconds, in a process of its own

PROFILE = """
description = "A test"
arrivals = "{arrivals}"
seed = 1
warmup_s = 0.5
timeout_s = {timeout_s}
{think}

[[stages]]
seconds = {seconds}
start = {level}
end = {level}

[requests]
form = "text"
prompt_words = {{ median = 5, sigma = 0, least = 5, most = 5 }}
answer_tokens = {{ median = 5, sigma = 0, least = 5, most = 5 }}

[protocols]
{protocols}

[levels]
{levels}
"""
ALL_PROTOCOLS = "grpc-stream = 1\ngrpc = 1\nhttp-stream = 1\nhttp = 1"


def write_profile(
    directory: Path,
    *,
    arrivals: str = "open",
    think: str = "",
    timeout_s: float = 10,
    seconds: float = 4,
    level: float = 10,
    protocols: str = ALL_PROTOCOLS,
    levels: str = "max_error_ratio = 0",
) -> Path:
    path = directory / "test.toml"
    path.write_text(
        PROFILE.format(
            arrivals=arrivals,
            think=think,
            timeout_s=timeout_s,
            seconds=seconds,
            level=level,
            protocols=protocols,
            levels=levels,
        )
    )
    return path


def run(
    *arguments: str, timeout_s: float = 60, module: str = "deepseek_triton.loadtest.run"
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *module.split(), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)


CALLS = """
import contextlib, io, json, sys
from deepseek_triton.loadtest.run import main
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(json.loads(line))
        except SystemExit as stopped:
            status = stopped.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""
Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    """The command for what ends before a load begins: one process for all, which takes seconds to start."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", CALLS],
        cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        written, read = process.stdin, process.stdout
        assert written is not None and read is not None

        def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
            written.write(json.dumps(arguments) + "\n")
            written.flush()
            return subprocess.CompletedProcess(arguments, *json.loads(read.readline()))

        yield ask
        written.close()


def fake_options(ports: Ports) -> list[str]:
    # Load by other programs must not make these tests fail.
    options = ["--http-port", str(ports.http), "--grpc-port", str(ports.grpc), "--metrics-port", str(ports.http)]
    return ["--model", MODEL, "--host", "127.0.0.1", *options, "--shared-machine"]


def run_on_fake(
    ports: Ports, profile: Path, *options: str, module: str = "deepseek_triton.loadtest.run", output: str = "output"
) -> tuple[subprocess.CompletedProcess[str], LoadTestResult]:
    directory = profile.parent / output
    done = run(str(profile), *fake_options(ports), "--output", str(directory), *options, module=module)
    assert (directory / "result.json").is_file(), done.stderr
    return done, load(directory / "result.json")


def run_on_fake_without_stalls(ports: Ports, profile: Path) -> tuple[subprocess.CompletedProcess[str], LoadTestResult]:
    """The first of three runs in which the machine didn't hold up the generator; other runs count for nothing."""
    for number in range(3):
        done, result = run_on_fake(ports, profile, output=f"output{number}")
        if met(result, "event loop's lag, 99th percentile"):
            return done, result
    pytest.skip("the machine held up the generator in three runs of three")


def reading(server: TritonServer) -> Reading:
    """Its counters now."""
    with urllib.request.urlopen(server.metrics_url, timeout=30) as response:
        return parse(response.read().decode(), 0.0)


def met(result: LoadTestResult, name: str) -> bool:
    (verdict,) = [each for each in (*result.levels, *result.checks) if each.name == name]
    return verdict.is_met


def test_known_times_are_measured_over_every_protocol(tmp_path: Path) -> None:
    with fake_triton(Behaviour(first_s=0.1, gap_s=0.01, num_tokens=6)) as ports:
        done, result = run_on_fake(ports, write_profile(tmp_path))
    # The machine may be too busy for a valid run, but the exit status must match the result.
    assert done.returncode == status_of(result) != Status.MISSED, done.stderr
    assert result.errors == {}
    assert set(result.protocols) == {"grpc-stream", "grpc", "http-stream", "http"}
    assert all(part.num_complete == part.num_requests > 2 for part in result.protocols.values())
    for name, part in result.protocols.items():
        assert part.latency_s.p50 is not None and 0.149 < part.latency_s.p50 < 0.4, name
        if name.endswith("-stream"):
            assert part.first_token_s.p50 is not None and 0.099 < part.first_token_s.p50 < 0.3, name
            assert part.inter_token_s.p50 is not None and 0.004 < part.inter_token_s.p50 < 0.06, name
            # A first token seen late shortens the times between the next; all together are at least what was sent.
            assert part.first_token_s.mean is not None and part.inter_token_s.mean is not None, name
            assert 0.149 < part.first_token_s.mean + 5 * part.inter_token_s.mean < 0.5, name
        else:
            assert part.first_token_s.count == 0, "what isn't streamed has no first token"
    assert result.summary.output_tokens.mean == 6
    assert result.summary.input_tokens.mean == 3
    assert all(sample.due_s < 0 for sample in result.samples[:1]), "the warm-up's requests are kept, and not counted"
    assert result.summary.num_requests == sum(sample.due_s >= 0 for sample in result.samples) < len(result.samples)
    assert met(result, "scheduled requests not sent, or sent twice")
    assert met(result, "requests of others")


@pytest.mark.timed
def test_time_to_first_token_under_gevent_is_a_plain_clients(tmp_path: Path) -> None:
    with fake_triton(Behaviour(first_s=0.1, num_tokens=2)) as ports:
        _, result = run_on_fake(ports, write_profile(tmp_path, protocols="grpc-stream = 1", level=10, seconds=2))
        plain = []
        with GrpcClient(f"127.0.0.1:{ports.grpc}", MODEL, 10) as client:
            for _ in range(20):
                start = time.perf_counter()
                chunks = client.stream(GenerateRequest(prompt="a", max_tokens=2))
                next(chunks)
                plain.append(time.perf_counter() - start)
                list(chunks)
    assert result.summary.first_token_s.p50 == pytest.approx(statistics.median(plain), abs=0.015)


def test_closed_users_wait_for_their_answer(tmp_path: Path) -> None:
    profile = write_profile(
        tmp_path, arrivals="closed", think="think_s = 0.1", level=4, protocols="grpc-stream = 1\nhttp = 1"
    )
    with fake_triton(Behaviour(first_s=0.1, gap_s=0, num_tokens=2)) as ports:
        _, result = run_on_fake(ports, profile)
    # Four users, each 0.1 s answer and 0.1 s thought: twenty requests a second, at most.
    assert result.summary.backlog.peak <= 4
    assert 40 < result.summary.num_requests <= 81
    assert {sample.protocol for sample in result.samples} == {"grpc-stream", "http"}


@pytest.mark.timed
def test_a_missed_level_is_named_with_its_value_and_limit(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, levels="p99_latency_s = 0.05\nmax_error_ratio = 0", level=8, seconds=2)
    with fake_triton(Behaviour(first_s=1.0)) as ports:
        done, result = run_on_fake_without_stalls(ports, profile)
    assert done.returncode == Status.MISSED, done.stdout
    assert result.is_valid and [level.name for level in result.missed] == ["latency, 99th percentile"]
    assert met(result, "requests without a complete answer")
    assert done.stdout.splitlines()[1].startswith("MISSED: latency, 99th percentile: 1")
    assert "limit 50 ms" in done.stdout.splitlines()[1]


@pytest.mark.timed
def test_levels_that_hold_and_a_client_with_headroom_make_a_run_that_counts(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, levels="p99_latency_s = 5\nmax_error_ratio = 0", level=10)
    with fake_triton(Behaviour(first_s=1.0)) as ports:
        done, result = run_on_fake_without_stalls(ports, profile)
    assert done.returncode == Status.OK, done.stdout
    assert all(check.is_met for check in result.checks)
    share = next(
        check.value for check in result.checks if check.name == "load generator's CPU, of one core, busiest 5 s"
    )
    assert share is not None and 0 < share < 50


@pytest.mark.timed
def test_speed_is_judged_against_a_recorded_run(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, level=8, seconds=2)
    recorded = tmp_path / "recorded" / "result.json"
    with fake_triton(Behaviour(first_s=0.5)) as ports:
        _, first = run_on_fake(ports, profile, output="recorded")
    assert [level.name for level in first.levels] == ["requests without a complete answer"]
    if not first.is_valid:  # the tests' machine was too busy, and against such a run nothing is judged
        pytest.skip("the recorded run is invalid")
    with fake_triton(Behaviour(first_s=1.5)) as ports:
        done, result = run_on_fake(ports, profile, "--against", str(recorded))
    assert "latency, 99th percentile" in [level.name for level in result.missed]
    assert done.returncode == status_of(result)


def test_a_run_is_not_judged_against_what_is_no_result(call: Call, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    done = call("smoke", "--host", "127.0.0.1", "--against", str(tmp_path / "a.json"))
    assert done.returncode == Status.ERROR
    assert done.stderr.startswith("error: ") and "must be a load test's result" in done.stderr


@pytest.mark.parametrize(
    ("slowness", "level", "caught"),
    [
        # Stands still for 0.2 s in each 0.3 s without computing: only its lateness tells.
        ("stall 0.2 0.1", 4, {"event loop's lag, 99th percentile", "requests sent late, 99th percentile"}),
        # Computes for 3 ms in each 4 ms: never late by much, and without a reserve. It needs a core of its own.
        pytest.param(
            "burn 0.003 0.001", 4, {"load generator's CPU, of one core, busiest 5 s"}, marks=pytest.mark.timed
        ),
        # Stands still once in a while: the median is right, the tail isn't.
        ("stall 0.4 2.0", 20, {"event loop's lag, 99th percentile", "requests sent late, 99th percentile"}),
    ],
)
def test_a_client_that_is_too_slow_is_found_out(tmp_path: Path, slowness: str, level: float, caught: set[str]) -> None:
    profile = write_profile(tmp_path, protocols="grpc-stream = 1", level=level, seconds=6, levels="p99_latency_s = 5")
    with fake_triton(Behaviour(first_s=1.0)) as ports:
        done, result = run_on_fake(ports, profile, module=f"tests.support.slow_generator {slowness}")
    missed = {check.name for check in result.checks if not check.is_met}
    assert caught <= missed, done.stdout
    assert done.returncode == Status.INVALID
    assert done.stdout.splitlines()[1].startswith("INVALID: ")


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("refuse", "RequestRejected: the fake refuses"),
        ("breaks", "ProtocolError: the responses ended without a finish_reason"),
    ],
)
def test_errors_are_counted_and_told(tmp_path: Path, behaviour: str, message: str) -> None:
    profile = write_profile(tmp_path, protocols="grpc-stream = 1\nhttp-stream = 1", seconds=2)
    with fake_triton(Behaviour(behaviour=behaviour)) as ports:
        done, result = run_on_fake(ports, profile)
    assert result.errors == {message: result.summary.num_requests}
    assert result.summary.error_ratio == 1
    assert not met(result, "requests without a complete answer")
    assert not met(result, "requests counted are missing"), "a run without one answer measures nothing"
    assert done.returncode == Status.INVALID
    assert message in done.stdout


def test_a_stalled_server_ends_the_run_with_errors(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, timeout_s=1.5, seconds=2, level=4)
    start = time.monotonic()
    with fake_triton(Behaviour(behaviour="stall")) as ports:
        done, result = run_on_fake(ports, profile)
    assert time.monotonic() - start < 30
    assert done.returncode == Status.INVALID
    assert result.summary.num_complete == 0
    assert result.summary.num_errors == result.summary.num_requests > 0
    assert all(error.startswith("RequestTimeout: no complete answer") for error in result.errors)
    assert met(result, "requests begun without a result"), "each request has its end, and it is an error"


def test_the_help_tells_every_status(call: Call) -> None:
    done = run("--help")
    assert done.returncode == Status.OK
    assert done.stdout.endswith(f"{help_text()}\n")
    assert call().returncode == Status.USAGE


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, seconds=60)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with fake_triton(Behaviour()) as ports:
        command = [
            sys.executable,
            "-m",
            "deepseek_triton.loadtest.run",
            str(profile),
            *fake_options(ports),
            "--output",
            str(tmp_path),
        ]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert "under way" in process.stderr.readline(), "the first line of progress"
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == Status.INTERRUPTED
            *progress, last = process.stderr.read().splitlines()
    assert last == "interrupted" and all("under way" in line for line in progress), "no traceback"


def test_no_server_is_one_line(call: Call, tmp_path: Path) -> None:
    ports = ["--http-port", "9", "--grpc-port", "9"]
    done = call("smoke", "--host", "127.0.0.1", *ports, "--output", str(tmp_path))
    assert done.returncode == Status.ERROR
    assert done.stderr == "error: no ready model 'smollm2' at http://127.0.0.1:9 and 127.0.0.1:9\n"


def test_a_folder_that_cannot_be_written_is_told_before_the_run(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = call("smoke", "--host", "127.0.0.1", "--output", str(tmp_path / "file" / "folder"))
    assert done.returncode == Status.ERROR
    assert done.stderr.endswith("folder: Not a directory; choose another --output\n") and done.stderr.count("\n") == 1


def test_a_gateway_needs_its_server(call: Call, tmp_path: Path) -> None:
    done = call("gateway", "--gateway", "http://127.0.0.1:9", "--output", str(tmp_path / "output"))
    assert done.returncode == Status.ERROR
    assert done.stderr == "error: --gateway is of a running server: give its --host too\n"


def test_no_gateway_is_one_line(call: Call, tmp_path: Path) -> None:
    with fake_triton(Behaviour()) as ports:
        options = [*fake_options(ports), "--gateway", "http://127.0.0.1:9", "--output", str(tmp_path / "output")]
        done = call("gateway", *options)
    assert done.returncode == Status.ERROR
    assert done.stderr.startswith("error: no gateway at http://127.0.0.1:9: ") and done.stderr.count("\n") == 1


def test_an_unknown_profile_is_one_line(call: Call) -> None:
    done = call("spke")
    assert done.returncode == Status.ERROR
    assert done.stderr.startswith(
        "error: no profile 'spke'; there are chat, gateway, ramp, scoring, smoke, soak, spike, steady"
    )
    assert done.stderr.count("\n") == 1


def test_what_cannot_be_loaded_is_told_before_a_server_starts(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    with pytest.raises(LoadProfileError, match=r"nowhere is not a directory; build a model first, or name another --"):
        check_model(tmp_path / "nowhere", "demo")
    with pytest.raises(LoadProfileError, match=r" has no model 'demo'; there is none$"):
        check_model(tmp_path, "demo")
    (tmp_path / "demo" / "config.pbtxt").touch()
    check_model(tmp_path, "demo")
    with pytest.raises(LoadProfileError, match=r" has no model 'dmo'; did you mean demo\?$"):
        check_model(tmp_path, "dmo")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--host", "localhost:9999"], "'localhost:9999' is not a host's name or address alone; ports have options"),
        (["--host", "http://localhost"], "'http://localhost' is not a host's name or address alone"),
        (["--host", ""], "'' is not a host's name"),
        (["--http-port", "80000"], "'80000' is not a port: a whole number from 1 to 65535"),
        (["--grpc-port", "-1"], "'-1' is not a port"),
        (["--metrics-port", "x"], "'x' is not a port"),
        (["--scal", "2"], "unknown option --scal; did you mean --scale?"),
        (["--scale", "two"], "'two' is not a number"),
        (["steady"], "takes profile alone; too much: steady"),
    ],
)
def test_a_wrong_option_is_two_lines(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        make_parser().parse_args(["smoke", *options])
    assert stopped.value.code == Status.USAGE
    assert told in (error := capsys.readouterr().err) and error.count("\n") == 2, error


def test_an_ipv6_address_gets_its_brackets() -> None:
    assert [make_parser().parse_args(["smoke", "--host", each]).host for each in ("::1", "[::1]", "a.b-c")] == [
        "[::1]",
        "[::1]",
        "a.b-c",
    ]


@pytest.mark.server
def test_a_server_is_started_loaded_and_stopped(tiny_server: TritonServer, tmp_path: Path) -> None:
    profile = write_profile(tmp_path, seconds=2, level=5)
    options = ["--repository", str(tiny_server.repository), "--model", NAME, "--shared-machine"]
    done = run(str(profile), *options, "--output", str(tmp_path / "output"))
    result = load(tmp_path / "output" / "result.json")
    assert done.returncode == status_of(result), done.stderr
    assert result.errors == {} and done.stderr.startswith("starting tritonserver on "), done.stderr


def smoke_without_levels() -> str:
    """Nearly as many requests as the profile has, sooner."""
    smoke = (ROOT / "loadtest" / "profiles" / "smoke.toml").read_text().split("[levels]")[0]
    return smoke.replace("seconds = 20", "seconds = 10").replace("= 1.0", "= 1.6")


def options_for(server: TritonServer, output: Path) -> list[str]:
    ports = {"http": server.http_port, "grpc": server.grpc_port, "metrics": server.metrics_port}
    options = [each for name, port in ports.items() for each in (f"--{name}-port", str(port))]
    return ["--host", "127.0.0.1", "--model", NAME, "--shared-machine", *options, "--output", str(output)]


@pytest.mark.server
def test_the_smoke_profile_on_the_real_server(server: TritonServer, tmp_path: Path) -> None:
    patient = tmp_path / "patient.toml"
    patient.write_text(f"{smoke_without_levels()}[levels]\np99_latency_s = 60\nmax_error_ratio = 0\n")
    wait_until(server, 60, slots_used=0)  # other tests' requests have ended
    before = reading(server)
    done = run(str(patient), *options_for(server, tmp_path), timeout_s=180)
    result = load(tmp_path / "result.json")
    assert done.returncode == status_of(result), done.stdout + done.stderr
    assert missed_but_for_time(result) == []
    assert result.errors == {}
    assert result.summary.num_complete == result.summary.num_requests > 10
    assert set(result.protocols) == {"grpc-stream", "grpc", "http-stream", "http"}
    assert result.summary.first_token_s.p50 is not None
    assert 0 < result.summary.first_token_s.p50 < (result.summary.latency_s.max or 0)
    # Triton's own counters tell the same story of the whole run. Those since the warm-up may have its last requests,
    # which end later, and lack what ended before their first reading, which comes within two seconds.
    parts = (NAME, f"{NAME}-tokenizer", f"{NAME}-engine")
    until(lambda: [work(before, reading(server))[part].requests for part in parts] == [len(result.samples)] * 3)
    most = sum(sample.end_s > 0 for sample in result.samples)
    least = sum(sample.sent_s > 5 for sample in result.samples)
    assert 5 < least <= result.summary.num_requests <= most
    for part in parts:
        assert least <= result.server[part].requests <= most, part
    assert result.server[f"{NAME}-tokenizer"].compute_ms is not None
    assert met(result, "requests of others")
    # And so does the engine itself.
    assert result.engine is not None and result.engine_course is not None
    assert met(result, "tokens, generated less received")
    assert least <= result.engine.outcomes["accepted"] <= most
    assert result.engine.slots == 8 and 1 <= result.engine.max_slots_used <= 8
    assert result.engine.first_token_s.mean is not None and result.engine.decode_s is not None
    assert 0 < result.engine.first_token_s.mean < (result.summary.latency_s.mean or 0)
    assert any(result.engine_course.slots_used)
    assert any(share for share in result.usage_course.server_percent), "its processes were found by its port"
    report = (tmp_path / "report.html").read_text()
    assert "<svg" in report and "Client and engine" in report


@pytest.mark.server
def test_a_level_that_nothing_keeps_is_missed_on_a_real_server(tiny_server: TritonServer, tmp_path: Path) -> None:
    """The same load, shorter."""
    strict, smoke = tmp_path / "strict.toml", smoke_without_levels().replace("seconds = 10", "seconds = 4")
    strict.write_text(f"{smoke}[levels]\np99_latency_s = 0.001\n")
    done = run(str(strict), *options_for(tiny_server, tmp_path))
    result = load(tmp_path / "result.json")
    assert [level.name for level in result.missed] == ["latency, 99th percentile"]
    assert done.returncode == status_of(result) != Status.OK, done.stdout
    assert missed_but_for_time(result) == []
    assert "MISSED service level: latency, 99th percentile: " in done.stdout
    assert "limit 1 ms" in done.stdout
