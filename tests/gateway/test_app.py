"""The app's parts fit together: settings, routes, errors, streams, and the end of a request whose client leaves."""

from __future__ import annotations

import json

import httpx
import pytest

from deepseek_triton.gateway.cli import main
from deepseek_triton.gateway.settings import SETTINGS, GatewaySettings
from tests.support.gateway import MODEL, FakeBackend, gateway
from tests.support.waiting import until

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


def test_a_chat_is_answered_and_streamed() -> None:
    backend = FakeBackend()
    with gateway(backend) as url, httpx.Client(base_url=url) as client:
        answer = client.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "mine"}).json()
        assert answer["choices"][0]["message"]["content"] == "Hello"
        assert answer["usage"]["total_tokens"] == 8
        text = client.post("/v1/chat/completions", json={**CHAT, "stream": True}).text
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello"
    assert backend.calls[0].request_id == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("is_streamed", [True, False])
def test_cancel_is_passed_on_when_the_client_leaves(is_streamed: bool) -> None:
    backend = FakeBackend(pause_s=60)
    with gateway(backend) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": is_streamed}, timeout=0.5)
        until(lambda: (backend.running, backend.cancelled) == (0, 1))


def test_settings_come_from_the_environment() -> None:
    settings = GatewaySettings(port=1234, models=("a", "b"))
    assert GatewaySettings.from_mapping(settings.to_mapping()) == settings
    other = {"DEEPSEEK_GATEWAY_HOST": "0.0.0.0", "DEEPSEEK_GATEWAY_MODELS": "c"}
    assert GatewaySettings.from_mapping({**other, **GatewaySettings().to_mapping()}) == GatewaySettings()
    assert len({setting.variable for setting in SETTINGS}) == len(SETTINGS)
    with pytest.raises(ValueError, match="--port must be a whole number, got 'x'"):
        GatewaySettings.from_mapping({"DEEPSEEK_GATEWAY_PORT": "x"})
    with pytest.raises(ValueError, match="DEEPSEEK_GATEWAY_PROT is no setting"):
        GatewaySettings.from_mapping({"DEEPSEEK_GATEWAY_PROT": "1"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serv"], "did you mean serve?"),
        (["serve", "--prot", "80"], "unknown option --prot; did you mean --port?"),
        (["keys", "ad"], "did you mean add?"),
        (["keys", "add", "a", "--nmae", "x"], "unknown option --nmae"),
    ],
)
def test_a_misspelt_word_of_the_command_line_is_told(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    text = capsys.readouterr().err
    assert message in text and "usage:" not in text


def test_a_port_that_there_isnt_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "99999"]) == 1
    assert capsys.readouterr().err == "error: --port must be at most 65535, got 99999\n"


def test_the_command_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    words = capsys.readouterr().out.split(maxsplit=1)
    assert ended.value.code == 0 and words[0] == "deepseek-gateway" and words[1].strip()
