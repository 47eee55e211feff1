"""Target vllm in a real tritonserver, whose backend `vllm` is a stand-in: clients see what every target gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.check import check_repository
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.clients.connect import PROTOCOLS, ProtocolName, connect
from deepseek_triton.clients.errors import ClientError
from deepseek_triton.clients.request import GenerateRequest
from deepseek_triton.ensemble.server.installation import Installation, find_tritonserver
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import TINY_SMOLLM2, end_at_once
from tests.support.checkpoints import write_tiny
from tests.support.real_tokenizers import smollm2_directory

pytestmark = pytest.mark.server
NAME = "far"
BACKEND = Path(__file__).parents[1] / "support" / "fake_vllm_backend.py"


@dataclass(frozen=True)
class WithVllm(Installation):
    """An installation that has the stand-in among its backends."""

    def make_backends(self, directory: Path) -> list[str]:
        options = super().make_backends(directory)
        for link in (directory / "backends" / "python").iterdir():  # a backend made of Python may not lead elsewhere
            file = link.resolve()
            link.unlink()
            shutil.copy(file, link)
        backend = directory / "backends" / "vllm"
        backend.mkdir(parents=True)
        shutil.copy(BACKEND, backend / "model.py")
        return options


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    if find_spec("pytriton") is None:
        pytest.skip("no tritonserver: pip install --no-deps nvidia-pytriton==0.7.0")
    directory = tmp_path_factory.mktemp("vllm")
    checkpoint = write_tiny(directory / "checkpoint", **TINY_SMOLLM2)
    shutil.copytree(smollm2_directory(), checkpoint, dirs_exist_ok=True)
    models = directory / "models"
    build(BuildOptions(checkpoint, NAME, models, target="vllm", precision="stored", max_seq_len=512, infer=True))
    assert check_repository(models) == []
    found = find_tritonserver()
    installation = WithVllm(found.binary, found.python_backend, found.library_dirs)
    log = directory / "log"
    with TritonServer(
        models, http_port=0, grpc_port=0, metrics_port=0, log_file=log, installation=installation
    ) as server:
        yield server
        assert server.exit_status is None, log.read_text()[-3000:]
        end_at_once(server)


def ask(server: TritonServer, protocol: ProtocolName = "grpc", **fields: Any) -> Any:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    with connect(protocol, NAME, url, 30) as client:
        return client.generate(GenerateRequest(**fields))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_answer(vllm_server: TritonServer, protocol: ProtocolName) -> None:
    result = ask(vllm_server, protocol, prompt="tea, été and 茶")
    assert (result.text, result.finish_reason) == ("TEA, ÉTÉ AND 茶", "stop")
    assert result.num_output_tokens > 1 and result.num_input_tokens > 1


def test_the_parameters_that_vllm_gets(vllm_server: TritonServer) -> None:
    result = ask(
        vllm_server, prompt="parameters", max_tokens=400, temperature=0.5, top_k=7, top_p=0.9, seed=3,
        bad_words=("xyz",), presence_penalty=0.25, guide_type="regex", guide="a+",
    )  # fmt: skip
    got = json.loads(result.text)
    assert got.pop("stop_token_ids") == [2]
    guide = json.loads(got.pop("structured_outputs"))
    assert guide == {"regex": "a+"}
    assert got == {
        "temperature": 0.5, "top_p": pytest.approx(0.9), "top_k": 7, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.25, "frequency_penalty": 0.0, "min_tokens": 0, "ignore_eos": True, "logprobs": 0,
        "detokenize": False, "bad_words": ["xyz"], "max_tokens": 400, "seed": 3,
    }  # fmt: skip


def test_stop_words_and_length(vllm_server: TritonServer) -> None:
    stopped = ask(vllm_server, prompt="one two three four", stop_words=("THREE",))
    assert (stopped.text, stopped.finish_reason) == ("ONE TWO ", "stop")
    short = ask(vllm_server, prompt="one two three four", max_tokens=2)
    assert (short.finish_reason, short.num_output_tokens) == ("length", 2)


def test_long_answers_to_several_clients_damage_nothing(vllm_server: TritonServer) -> None:
    """Triton frees the responses of a call without Python's lock, if nobody else has them: after ten calls it died."""

    def parameters(_: int) -> str:
        return str(ask(vllm_server, prompt="parameters", max_tokens=400).text)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(parameters, range(48)))) == 1
    assert vllm_server.exit_status is None


def test_log_probs(vllm_server: TritonServer) -> None:
    result = ask(vllm_server, prompt="one two three", num_top_log_probs=3, max_tokens=2)
    assert result.log_probs == pytest.approx([-0.693147, -0.693147], abs=1e-5)
    assert [len(row) for row in result.top_log_probs] == [3, 3]


def test_several_answers_and_a_chat(vllm_server: TritonServer) -> None:
    url = vllm_server.grpc_url
    with connect("grpc", NAME, url, 30) as client:
        results = client.generate_all(GenerateRequest(prompt="tea", num_return_sequences=3, temperature=1.0))
        assert [result.text for result in results] == ["TEA"] * 3
        chat = client.generate(GenerateRequest(messages=({"role": "user", "content": "tea"},), max_tokens=200))
    assert "TEA" in chat.text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "fail"}, "vLLM: Error generating stream: no such luck"),
        (
            {"prompt": "x", "thinking_token_budget": 3},
            "thinking_token_budget isn't here with target vllm; leave it out",
        ),
        ({"prompt": "x", "guide_type": "choice", "guide": "["}, "guided_decoding_guide is no JSON"),
    ],
)
def test_errors(vllm_server: TritonServer, fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ClientError, match=expected):
        ask(vllm_server, **fields)
