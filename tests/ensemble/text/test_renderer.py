"""Templates are read without computing anything, and rendered by processes: when those end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2.meta
import jinja2.nodes
import pytest

from deepseek_triton.ensemble.processes.stat import stat_fields
from deepseek_triton.ensemble.text.chat import end_workers, renderer
from deepseek_triton.ensemble.text.chat.environment import find_variables, make_environment
from deepseek_triton.ensemble.text.chat.renderer import WORKER, RenderError, RenderLimits, render
from deepseek_triton.ensemble.text.chat.template import ChatTemplate
from tests.serving.test_server import wait_until
from tests.support.chat_templates import HERMES, PLAIN, QWEN3_CODER

ROOT = Path(__file__).parents[3]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"

# Renders a template; then forks a process that keeps its pipes open, and renders a second one on a thread.
STARTER = """
import os, sys, threading, time
from deepseek_triton.ensemble.text.chat.renderer import RenderLimits, render
limits = RenderLimits(max_s=600)
render("hello", {}, limits)
holder = os.fork()
if holder == 0:
    time.sleep(60)
    os._exit(0)
threading.Thread(target=render, args=(sys.argv[1], {}, limits), daemon=True).start()
time.sleep(0.2)
print(holder, flush=True)
time.sleep(60)
"""


def workers(of: int | None = None) -> list[int]:
    """The processes that render, of one that started them or of all."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_worker = WORKER in (process / "cmdline").read_text().split("\0")
            if is_worker and of in (None, int(stat_fields(process.name)[1])):
                found.append(int(process.name))
        except OSError:  # ended meanwhile
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("template", ["hello", ENDLESS], ids=["idle", "busy"])
def test_a_worker_ends_with_its_killed_starter_though_its_pipes_stay_open(template: str) -> None:
    command = [sys.executable, "-c", STARTER, template]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as starter:
        assert starter.stdout is not None
        holder = int(starter.stdout.readline())
        try:
            own = workers(starter.pid)
            assert len(own) == 1
            starter.kill()
            starter.wait()
            assert wait_until(lambda: not set(own) & set(workers()), 5)
        finally:
            subprocess.run(["kill", str(holder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("struck", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_frozen_is_replaced(struck: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer, "LATE_S", 0.1)
    limits = RenderLimits(max_s=1)
    assert render("{{ 6 * 7 }}", {}, limits) == "42"
    own = workers(of=os.getpid())
    for worker in own:
        os.kill(worker, struck)
    assert render("{{ messages }}", {"messages": "x" * 10**6}, limits) == "x" * 10**6
    assert not set(own) & set(workers(of=os.getpid()))
    end_workers()


@pytest.mark.slow
def test_what_ended_a_worker_is_told() -> None:
    with pytest.raises(RenderError, match=r"^it takes over 0\.2 s for them$"):
        render(ENDLESS, {}, RenderLimits(max_s=0.2))
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(render, ENDLESS, {}, RenderLimits(max_s=600))
        killed: set[int] = set()
        while not endless.done():
            for worker in set(workers(of=os.getpid())) - killed:
                os.kill(worker, signal.SIGKILL)
                killed.add(worker)
            time.sleep(0.01)
        with pytest.raises(RenderError, match=r"^the process that renders it was killed by SIGKILL, 2 times$"):
            endless.result()


@pytest.mark.slow
def test_workers_are_ended_and_started_again() -> None:
    assert render("{{ 6 * 7 }}", {}) == "42"
    assert workers(of=os.getpid()) != []
    end_workers()
    assert workers(of=os.getpid()) == []
    assert render("{{ 6 * 7 }}", {}) == "42"
    end_workers()


@pytest.mark.parametrize(
    "source",
    [
        "{{ ('x' * 10**10)|length }}", "{{ 10 ** 10 ** 10 }}", "{{ 'x'|center(10**10) }}", "{{ '%9d' % 1 }}",
        "{% set a = 'x' * 10**10 %}{{ a }}", "{% if 'x' * 10**10 %}1{% endif %}", "{{ [1, 'x' * 10**10]|join }}",
        "{% for i in 'x' * 10**10 %}{{ i }}{% endfor %}", "{% autoescape 'x' * 10**10 %}{{ a }}{% endautoescape %}",
        "{% macro m(a='x' * 10**10) %}{{ a }}{% endmacro %}{{ m() }}", "{% filter center(10**10) %}x{% endfilter %}",
    ],
)  # fmt: skip
def test_a_template_that_is_read_computes_nothing(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[object] = []

    def note(node: object, eval_ctx: object = None) -> None:
        computed.append(node)
        raise jinja2.nodes.Impossible

    for kind in (jinja2.nodes.BinExpr, jinja2.nodes.Filter, jinja2.nodes.Test, jinja2.nodes.Call):
        monkeypatch.setattr(kind, "as_const", note)
    ChatTemplate(source + "{{ enable_thinking }}{% if tools %}{% set local = 1 %}{% endif %}{{ local }}")
    assert not computed


LOCAL = "{% if a is not defined %}{% set a = b %}{% endif %}{{ a }}{% for c in d %}{{ c }}{{ loop.index }}{% endfor %}"


MACRO = "{% macro m(x) %}{{ x + y }}{% endmacro %}{{ m(z) }}"


@pytest.mark.parametrize("source", [PLAIN, HERMES, QWEN3_CODER, LOCAL, MACRO])
def test_the_variables_are_those_that_jinja2_finds(source: str) -> None:
    environment = make_environment()
    parsed = environment.parse(source)
    found = find_variables(parsed, environment)
    assert found and found == jinja2.meta.find_undeclared_variables(parsed)
