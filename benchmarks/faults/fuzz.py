"""Requests gone wrong below the level of fields: framing, connections, raw protobuf bytes, and the inner models.

tests/support/fuzz.py changes the fields of good requests and waits for each answer. This one leaves the fields alone
and breaks what carries them: HTTP heads, lengths, chunks and pipelines, connections that end in the midst of a request
or an answer, bytes of serialized messages, methods and models that no client of ours calls. What Triton 2.51 is known
to die of (SECURITY.md) is left out: deep nesting, thousands of chunks, several messages on one gRPC stream.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import grpc
from tritonclient.grpc import service_pb2

from benchmarks.faults.served import NAME, Served

MODELS = (NAME, NAME, f"{NAME}-engine", f"{NAME}-tokenizer", f"{NAME}-detokenizer", "nobody")
VERBS = ("generate", "generate_stream", "infer", "ready", "config", "stats", "", "versions/1/generate", "trace/setting")
METHODS = (
    "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics",
    "RepositoryIndex", "RepositoryModelUnload", "SystemSharedMemoryStatus", "SystemSharedMemoryRegister",
    "CudaSharedMemoryStatus", "TraceSetting", "LogSettings", "ModelInfer", "NoSuchMethod",
)  # fmt: skip
HttpSender = Callable[[tuple[str, int], random.Random], str]  # the server's address → how it ended
GrpcSender = Callable[[Any, random.Random], str]  # a channel → how it ended
TIMEOUT_S = 10.0
NUM_THREADS = 8


def good_body(draw: random.Random) -> bytes:
    """A small request that is right."""
    body: dict[str, Any] = {
        "text_input": draw.choice(("Hi", "1 2 3")),
        "max_tokens": draw.randint(1, 3),
        "stream": True,
    }
    if draw.random() < 0.2:
        body = {"input_ids": [1, 2, 3], "max_tokens": 2}
    return json.dumps(body).encode()


def broken_http(draw: random.Random) -> list[bytes]:
    """The bytes of a connection, in the pieces in which they are sent."""
    body = good_body(draw)
    method = draw.choice(("POST", "POST", "POST", "GET", "PUT", "DELETE", "BREW", "\x00", "post"))
    path = f"/v2/models/{draw.choice(MODELS)}/{draw.choice(VERBS)}" + draw.choice(
        ("", "", "?a=b", "/../..", "%00", "//")
    )
    length = draw.choice((len(body), len(body), len(body) - 1, len(body) + 7, 0, -1, 2**31, 2**63, "x", ""))
    headers = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(length)}
    odd = {
        "Inference-Header-Content-Length": str(draw.choice((0, 5, len(body), 10**6, -1, "x"))),
        "Expect": "100-continue", "Content-Encoding": draw.choice(("gzip", "deflate", "br")),
        "Accept-Encoding": "gzip", "Connection": draw.choice(("close", "upgrade", "keep-alive, Upgrade")),
        "x-triton-admin": "guess", "A" * draw.choice((1, 300, 5000)): "b" * draw.choice((0, 10, 9000)),
        "Transfer-Encoding": draw.choice(("chunked", "identity", "gzip, chunked")),
    }  # fmt: skip
    for name in draw.sample(list(odd), draw.randint(0, 3)):
        headers[name] = odd[name]
    if draw.random() < 0.2:
        headers.pop("Content-Length")
    if headers.get("Transfer-Encoding") == "chunked" and draw.random() < 0.8:
        headers.pop("Content-Length", None)
        sizes = draw.choice((f"{len(body):x}", f"{len(body) + 3:x}", "-1", "zz", "ffffffffffffffff"))
        body = f"{sizes}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    version = draw.choice(("1.1", "1.1", "1.0", "2.0", "9"))
    lines = [f"{method} {path} HTTP/{version}", *(f"{name}: {value}" for name, value in headers.items())]
    whole = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
    whole *= draw.choice((1, 1, 1, 2, 5))  # pipelined
    if draw.random() < 0.3:
        whole = whole[: draw.randrange(1, len(whole))]  # the connection ends early
    if draw.random() < 0.2:
        position = draw.randrange(len(whole))
        whole = whole[:position] + draw.randbytes(draw.randint(1, 8)) + whole[position + 1 :]
    cuts = sorted(draw.randrange(len(whole) + 1) for _ in range(draw.choice((0, 0, 1, 4))))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def send_http(address: tuple[str, int], draw: random.Random) -> str:
    """Send one broken connection; says how it ended."""
    reads = draw.choice((0, 1, 1, 64, 10**6))
    with socket.create_connection(address, timeout=TIMEOUT_S) as connection:
        connection.settimeout(1.0)
        try:
            for piece in broken_http(draw):
                connection.sendall(piece)
            if draw.random() < 0.3:
                connection.shutdown(socket.SHUT_WR)
            if draw.random() < 0.1:  # ends with a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            answer = connection.recv(reads) if reads else b""
        except TimeoutError:
            return "waits for more"
        except OSError as error:
            return type(error).__name__
    return answer[:12].decode("latin-1") if len(answer) >= 12 else "closed"


def good_message(draw: random.Random) -> bytes:
    """A serialized ModelInferRequest, of any of the models."""
    message = service_pb2.ModelInferRequest(model_name=draw.choice(MODELS), id=str(draw.randrange(10)))
    inputs: dict[str, tuple[str, bytes, int]] = {
        "text_input": ("BYTES", struct.pack("<I", 2) + b"Hi", 1), "max_tokens": ("INT32", struct.pack("<i", 2), 1),
        "input_ids": ("INT32", struct.pack("<3i", 1, 2, 3), 3), "stop": ("BOOL", b"\1", 1),
        "output_ids": ("INT32", struct.pack("<2i", 5, 6), 2),
        "progress": ("BYTES", struct.pack("<I", 4) + b"[1,2", 1),
        "prompt_info": ("BYTES", struct.pack("<I", 40) + b"0" * 40, 1),
    }  # fmt: skip
    for name in draw.sample(list(inputs), draw.randint(0, 4)):
        dtype, raw, count = inputs[name]
        message.inputs.add(name=name, datatype=dtype, shape=(1, count))
        message.raw_input_contents.append(raw)
    for key in draw.sample(("stop_key", "priority", "timeout", "sequence_id", "triton_x", ""), draw.randint(0, 2)):
        field, value = draw.choice((("string_param", "x"), ("int64_param", -1), ("bool_param", True)))
        setattr(message.parameters[key], field, value)
    whole: bytes = message.SerializeToString()
    return whole


def broken_message(draw: random.Random) -> bytes:
    """Bytes of a message, some of them flipped, lost, doubled or made up."""
    raw = bytearray(good_message(draw))
    for _ in range(draw.choice((0, 1, 1, 2, 8))):
        position = draw.randrange(len(raw) + 1)
        kind = draw.randrange(3)
        if kind == 0:
            raw[position : position + 1] = draw.randbytes(1)
        elif kind == 1:
            del raw[position : position + draw.randint(1, 9)]
        else:
            raw[position:position] = raw[: draw.randint(0, 40)]
    return bytes(raw) if draw.random() < 0.95 else draw.randbytes(draw.randint(0, 200))


def send_grpc(channel: Any, draw: random.Random) -> str:
    """Send one broken call, some of which are given up at once; says how it ended."""
    raw = broken_message(draw)
    prefix = "/inference.GRPCInferenceService/"
    try:
        if draw.random() < 0.6:
            call = channel.stream_stream(prefix + "ModelStreamInfer")(iter([raw]), timeout=TIMEOUT_S)
            if draw.random() < 0.2:
                time.sleep(draw.random() * 0.02)
                call.cancel()
                return "given up"
            return f"{len(list(call))} responses"
        channel.unary_unary(prefix + draw.choice(METHODS))(raw, timeout=TIMEOUT_S)
        return "answer"
    except grpc.RpcError as error:
        return str(error.code().name)


def fuzz(
    served: Served, num_each: int, seed: int = 0, http: HttpSender = send_http, grpc_: GrpcSender = send_grpc
) -> dict[str, Any]:
    """Send so many over HTTP and over gRPC; every death of the server is counted, with the reason that `serve` gave."""
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    lock, done = threading.Lock(), threading.Event()
    address = urlsplit(served.http)
    target = (str(address.hostname), int(address.port or 80))
    reference = served.ask(max_tokens=16).json()["text_output"]
    deaths_before = sum("starting it again" in line for line in served.lines)

    def work(number: int, count: int, send: Callable[[random.Random], str], kind: str) -> None:
        draw = random.Random(f"{kind}{number}/{seed}")
        for _ in range(count // NUM_THREADS):
            try:
                outcome = send(draw)
            except OSError:
                outcome = "no connection"
                time.sleep(0.5)
            with lock:
                outcomes[f"{kind}: {outcome}"] += 1

    def watch() -> None:
        while not done.wait(0.5):
            with contextlib.suppress(Exception):
                answer = served.ask(max_tokens=16)
                if answer.status_code == 200 and answer.json()["text_output"] != reference:
                    wrong.append(answer.text[:200])

    channel = grpc.insecure_channel(served.grpc)
    jobs = [(n, num_each, lambda draw: http(target, draw), "http") for n in range(NUM_THREADS)]
    jobs += [(n, num_each, lambda draw: grpc_(channel, draw), "grpc") for n in range(NUM_THREADS)]
    watcher = threading.Thread(target=watch)
    watcher.start()
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    channel.close()
    served.wait_for_answer()
    time.sleep(3)
    deaths = [line for line in served.lines if "starting it again" in line][deaths_before:]
    after = served.metrics()
    return {
        "seed": seed, "http": num_each, "grpc": num_each, "outcomes": dict(sorted(outcomes.items())), "deaths": deaths,
        "wrong_answers_beside": wrong, "slots_used": after["slots_used"], "waiting": after["sequences_waiting"],
    }  # fmt: skip
