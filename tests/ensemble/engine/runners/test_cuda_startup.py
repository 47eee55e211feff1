"""What makes the cuda engine load quickly, as far as it runs without a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from deepseek_triton.ensemble.engine.runners.cuda.startup.kernel_cache import cached_image, use_kernel_cache
from deepseek_triton.ensemble.engine.runners.cuda.startup.load_times import LoadTimes


@pytest.fixture(autouse=True)
def no_cache_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # so that it is restored
    monkeypatch.delenv("TRITON_CACHE_DIR")


def engine(tmp_path: Path) -> Path:
    directory = tmp_path / "models" / "m-engine" / "3"
    directory.mkdir(parents=True)
    return directory


def test_kernels_are_kept_beside_the_repository_and_not_inside_it(tmp_path: Path) -> None:
    use_kernel_cache(engine(tmp_path))
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / ".models-kernels")
    assert (tmp_path / ".models-kernels").is_dir()
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["m-engine"]


def test_a_cache_that_the_environment_names_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "own"))
    use_kernel_cache(engine(tmp_path))
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "own")


def test_without_a_right_to_write_the_defaults_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = engine(tmp_path)
    (tmp_path / ".models-kernels").write_text("a file in the way")
    use_kernel_cache(directory)
    assert "TRITON_CACHE_DIR" not in os.environ


def test_an_image_is_compiled_once_for_each_source_option_and_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[int] = []

    def image() -> bytes:
        compiled.append(len(compiled))
        return f"image {len(compiled)}".encode()

    assert cached_image("a", ["-x"], "13.0", image) == b"image 1"  # no cache: nothing is kept
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first = cached_image("a", ["-x"], "13.0", image)
    assert cached_image("a", ["-x"], "13.0", image) == first and len(compiled) == 2
    others = [("b", ["-x"], "13.0"), ("a", ["-y"], "13.0"), ("a", ["-x"], "13.1"), ("a", ["-", "x"], "13.0")]
    assert len({cached_image(*other, image) for other in others} | {first}) == 5
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "gone"))
    assert cached_image("a", ["-x"], "13.0", image) == b"image 7"  # it can't be kept


def test_the_log_tells_each_stage() -> None:
    times = LoadTimes()
    times.ended("weights")
    times.ended("graphs")
    assert str(times).split(": ", 1)[1] == "weights 0.0 s, graphs 0.0 s"


def test_kernels_are_compiled_ahead_once_for_each_kind_of_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from deepseek_triton.ensemble.engine.runners.cuda.launcher import Launcher
    from deepseek_triton.ensemble.engine.runners.cuda.startup.compile_ahead import compile_ahead

    warmed: list[tuple[Any, ...]] = []
    launched: list[tuple[Any, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **constants: launched.append(arguments)

        def warmup(self, *arguments: Any, grid: tuple[int, ...], **constants: Any) -> None:
            warmed.append((*arguments, constants["BLOCK"]))

    class Mode:
        def __init__(self, executor: Any, *, ignore_errors: bool) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(triton, "AsyncCompileMode", Mode, raising=False)
    launch, kernel = Launcher(torch.device("cpu"), torch.float32, pdl=False), Kernel()
    aligned = torch.zeros(64)
    odd = next(aligned[i:] for i in range(1, 4) if aligned[i:].data_ptr() % 16)
    with launch.recording() as launches:
        for number in (1, 32, 48, 7):  # 1, multiples of 16, and others have code of their own
            launch(kernel, (1,), aligned, number, BLOCK=16)
        launch(kernel, (2,), aligned, 32, BLOCK=32)
        launch(kernel, (2,), odd, 32, BLOCK=64)
    assert compile_ahead(launches) == 4 == len(warmed)
    assert warmed[0] == (torch.float32, 1, 16) and not launched
    launch(kernel, (1,), aligned, 1, BLOCK=16)
    assert len(launched) == 1
    monkeypatch.delattr(triton, "AsyncCompileMode")
    assert compile_ahead(launches) == 0
