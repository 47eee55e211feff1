"""The direction of the imports, and what a checkout holds. Sources are read, not imported."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.support.syntax import parse_source

ROOT = Path(__file__).parents[2]
PRODUCT = ("builders", "ensemble", "clients")
# A repository's model.py imports one of them; the engine's sends its responses through sinks.
ADAPTERS = (
    *(
        f"ensemble.models.{name}"
        for name in (
            "tokenizer", "engine", "sinks", "detokenizer", "infer", "score_tokenizer", "score_engine", "scorer",
        )
    ),
    *(f"examples.image_report.models.{name}" for name in ("preprocessor", "resnet", "findings")),
    *(f"examples.fraud.serving.{name}" for name in ("preprocess", "explanation", "decision", "drift")),
)  # fmt: skip
HEAVY = ("gguf", "jinja2", "onnx", "onnxruntime", "tokenizers", "torch", "tqdm", "transformers", "tritonclient")
# tritonclient itself needs numpy and ml_dtypes.
NOT_FOR_CLIENTS = ("builders", "gguf", "jinja2", "onnx", "onnxruntime", "tokenizers", "torch", "tqdm")
TOP_LEVEL = (
    "builders", "clients", "Dockerfile", "ensemble", "gateway", "loadtest", "model_repository", "pyproject.toml",
    "tests",
)  # fmt: skip


# What a request and its answer are on the wire; clients and models share it.
CONTRACT = tuple(
    f"ensemble.protocol.{name}"
    for name in ("compatible_options", "contract", "error_kind", "ranges", "request_options", "tensor_spec")
)
# Importing them patches the standard library: nothing else may, or the tests' own threads would change under them.
LOCUST_RUNS = tuple(f"loadtest.{name}" for name in ("gevent_patch", "interrupts", "run", "session", "users"))


@dataclass(frozen=True)
class Arrow:
    """Modules in `sources`, those in `excepted` aside, must not import what is in `forbidden`.

    A name stands for itself and everything below it.
    """

    sources: tuple[str, ...]
    forbidden: tuple[str, ...]
    excepted: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()  # below a forbidden name


ARROWS = {
    "clients know of the rest only the contract": Arrow(("clients",), ("builders", "ensemble"), allowed=CONTRACT),
    # A build is judged by the runner that will serve it, in a process of its own.
    "builders don't know the runners": Arrow(
        ("builders",), ("ensemble.engine.runners",), excepted=("builders.lifecycle.gate.built_model",)
    ),
    "what runs inside Triton knows neither builders nor clients": Arrow(("ensemble",), ("builders", "clients")),
    "a decoder's structure depends on nothing": Arrow(
        ("ensemble.decoder",), (*PRODUCT, "numpy", "onnx"), allowed=("ensemble.decoder",)
    ),
    "the contract is a leaf": Arrow(CONTRACT, PRODUCT, allowed=CONTRACT),
    "only the command line starts clients and servers": Arrow(
        ("builders",),
        ("clients", "loadtest", "ensemble.server.tritonserver"),
        excepted=("builders.cli", "builders.commands"),
        allowed=("loadtest.intervals",),  # figures alone
    ),
    "load tests know the rest as a user does: clients, and a server to start": Arrow(
        ("loadtest",),
        ("builders", "ensemble"),
        allowed=("ensemble.server.tritonserver", "ensemble.processes.machine"),  # a server, and what it runs on
    ),
    "nothing that serves or calls knows the load tests": Arrow(("ensemble", "clients", "gateway"), ("loadtest",)),
    "the gateway knows of the rest only the clients": Arrow(("gateway",), ("builders", "ensemble")),
    "nothing knows the gateway": Arrow((*PRODUCT, "loadtest"), ("gateway",)),
    "only what Locust runs may import what gevent patches": Arrow(
        ("loadtest",), ("gevent", "locust"), excepted=LOCUST_RUNS
    ),
    "what computes a load test's figures starts nothing": Arrow(
        ("loadtest",), (*LOCUST_RUNS, "ensemble.server.tritonserver"), excepted=LOCUST_RUNS
    ),
    "nothing in Triton or in a client starts a server": Arrow(
        ("ensemble", "clients"),
        ("ensemble.server.tritonserver",),
        excepted=("ensemble.server.tritonserver", "ensemble.server.supervisor"),
    ),
    "only the adapters know Triton's Python backend": Arrow(
        (*PRODUCT, "scripts", "benchmarks", "loadtest", "gateway", "examples"),
        ("triton_python_backend_utils",),
        excepted=ADAPTERS,
    ),
    "torch is for the cuda runner, training, FP8 builds on a GPU, tests and benchmarks": Arrow(
        (*PRODUCT, "scripts", "loadtest", "gateway"),
        ("torch", "triton"),
        excepted=("ensemble.engine.runners.cuda", "builders.fp8.rounding.arrays", "builders.lifecycle"),
    ),
    "transformers is for training, tests and benchmarks": Arrow(
        (*PRODUCT, "scripts", "loadtest", "gateway"), ("transformers", "peft"), excepted=("builders.lifecycle",)
    ),
    "nothing of the product knows the examples": Arrow((*PRODUCT, "loadtest", "gateway"), ("examples",)),
    "torch trains the image report's classifier and serves nothing of it": Arrow(
        ("examples.image_report",),
        ("torch",),
        excepted=tuple(f"examples.image_report.training.{name}" for name in ("export", "resnet", "train")),
    ),
    "nothing depends on the tests": Arrow((*PRODUCT, "scripts", "benchmarks", "loadtest", "gateway"), ("tests",)),
}


def is_in(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def parsed(path: Path) -> ast.Module:
    """A source, parsed once for all tests; nothing changes it."""
    return parse_source((ROOT / path).read_text(encoding="utf-8"))


def imported_modules(source: ast.Module, module: str) -> Iterator[str]:
    """Every module that `source` names in an import, those inside functions and strings of import_module included.

    The project's own are named by their folders, without the common name before.
    """
    for name in imported_names(source, module):
        yield name.removeprefix("deepseek_triton.")


def imported_names(source: ast.Module, module: str) -> Iterator[str]:
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            # `from deepseek_triton.ensemble import server` imports ensemble.server
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called_name(node.func) == "import_module":
            yield from (str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant))


def _called_name(function: ast.expr) -> str:
    """The last part of the name of what is called: to unparse every call takes seconds."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


@cache
def imports() -> dict[str, set[str]]:
    """Module → what it imports, for every source below the top-level directories."""
    directories = {name for arrow in ARROWS.values() for source in arrow.sources for name in [source.split(".")[0]]}
    paths = (path for name in directories for path in (ROOT / name).rglob("*.py"))
    return {module_name(path): set(imported_modules(parsed(path), module_name(path))) for path in paths}


def violations(arrow: Arrow, imports: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {imported}"
        for module, names in sorted(imports.items())
        if is_in(module, arrow.sources) and not is_in(module, arrow.excepted)
        for imported in sorted(names)
        if is_in(imported, arrow.forbidden) and not is_in(imported, arrow.allowed)
    ]


@pytest.mark.parametrize("arrow", ARROWS.values(), ids=ARROWS)
def test_imports_point_one_way(arrow: Arrow) -> None:
    for source in arrow.excepted:
        assert source in imports(), f"{source} has gone: its exception must go too"
    assert violations(arrow, imports()) == []


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("clients.http", "from deepseek_triton.ensemble import server", "clients know of the rest only the contract"),
        ("clients.http", "def f():\n    import deepseek_triton.builders", "clients know of the rest only the contract"),
        (
            "builders.checkpoint.spec",
            "import deepseek_triton.ensemble.engine.runners.onnx.runner as o",
            "builders don't know the runners",
        ),
        (
            "builders.checkpoint.spec",
            "from deepseek_triton.ensemble.engine import runners",
            "builders don't know the runners",
        ),
        (
            "builders.repository.check",
            "from deepseek_triton.clients import cli",
            "only the command line starts clients and servers",
        ),
        (
            "ensemble.text.tokenizer",
            "importlib.import_module('torch.nn')",
            "torch is for the cuda runner, training, FP8 builds on a GPU, tests and benchmarks",
        ),
        (
            "ensemble.models.tensors",
            "import triton_python_backend_utils",
            "only the adapters know Triton's Python backend",
        ),
        (
            "ensemble.protocol.contract",
            "from deepseek_triton.ensemble.text.tokenizer import Tokenizer",
            "the contract is a leaf",
        ),
        ("loadtest.compare", "import locust", "only what Locust runs may import what gevent patches"),
    ],
)
def test_an_import_the_wrong_way_is_seen(module: str, source: str, rule: str) -> None:
    assert len(violations(ARROWS[rule], {module: set(imported_modules(parse_source(source), module))})) == 1


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    code = """
import contextlib, sys
from builders.cli import main
with contextlib.suppress(SystemExit):
    main(["--help"])
print("loaded:", *(name for name in sys.argv[1:] if name in sys.modules))
"""
    output = run_python(code, *HEAVY)
    assert "generate" in output, "the help must have been made"
    assert output.splitlines()[-1].strip() == "loaded:"


@pytest.mark.slow
def test_clients_need_only_their_own_extra() -> None:
    code = """
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))  # None: importing it fails
import clients
for module in pkgutil.walk_packages(clients.__path__, "clients."):
    importlib.import_module(module.name)
    print(module.name)
"""
    assert "clients.grpc" in run_python(code, *NOT_FOR_CLIENTS).split()


def checkout() -> list[Path]:
    """What a commit of everything here would hold."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [Path(name) for name in names.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_a_fresh_clone_has_what_the_design_names(name: str) -> None:
    assert any(path.parts[0] == name for path in checkout()), f"{name} is missing, or holds nothing that git keeps"


def test_the_repository_holds_configurations_and_no_artefacts() -> None:
    kept = {path.name for path in checkout() if path.parts[0] == "model_repository"}
    assert kept <= {"config.pbtxt", "README.md", ".gitkeep"}


# The brackets keep the expression from finding itself.
PRIVATE = re.compile(
    r"""(?<![\w.$}*/-])/(?:(?:work|home|root|Users)/\w|tmp/[v]env)  # a directory of somebody's machine
    |index[-_]url|INDEX[_]URL|trusted[-_]host  # where packages come from is the user's business
    |https?://(?!localhost|127\.)[^\s/"']*(?:pypi|pythonhosted|artifactory|nexus|download\.pytorch)
    """,
    re.VERBOSE,
)


def private_words(text: str) -> list[str]:
    return [match[0] for match in PRIVATE.finditer(text)]


@pytest.mark.slow
def test_no_file_speaks_of_a_private_machine() -> None:
    texts = {path: (ROOT / path).read_bytes().decode("utf-8", errors="ignore") for path in checkout()}
    assert {path: words for path, text in texts.items() if (words := private_words(text))} == {}


@pytest.mark.parametrize("template", ["see {}work/x", "'{}home/me/x'", "({}root/x)", "PATH={}tmp/venv/bin"])
def test_a_private_path_is_seen(template: str) -> None:
    assert private_words(template.format("/"))
    assert not private_words(template.format("example/"))


@pytest.mark.slow
def test_one_public_class_name_means_one_thing() -> None:
    homes: dict[str, list[str]] = {}
    tops = (*PRODUCT, "loadtest", "gateway", "examples")
    for path in (path for path in checkout() if path.suffix == ".py" and path.parts[0] in tops):
        for node in parsed(ROOT / path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(str(path))
    homes.pop("TritonPythonModel")  # Triton's own name for every adapter
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


def imports_when_it_runs(path: Path) -> set[str]:
    """As `imported_modules`, without what is imported for type checks alone."""
    body: list[ast.stmt] = []
    for node in parsed(path).body:
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        body += node.orelse if isinstance(node, ast.If) and is_for_types else [node]
    return set(imported_modules(ast.Module(body, []), module_name(path)))


@pytest.mark.slow
def test_no_modules_of_the_builders_import_each_other_in_a_circle() -> None:
    imported = {module_name(path): imports_when_it_runs(path) for path in (ROOT / "builders").rglob("*.py")}
    edges = {
        module: {other for other in imported if other != module and any(is_in(name, (other,)) for name in names)}
        for module, names in imported.items()
    }

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        stack = list(edges[start])
        while stack:
            module = stack.pop()
            if module not in seen:
                seen.add(module)
                stack += edges[module]
        return seen

    assert [module for module in edges if module in reachable(module)] == []


TARGET_NAMES = {"cuda", "onnx", "tensorrt", "tensorrt-rtx"}
# A target's two halves, what it writes, and what they share; `device.type == "cuda"` is torch's word.
TARGETS_OWN = re.compile(r"builders/(targets|tensorrt)/|ensemble/engine/runners/|ensemble/artefacts/(cuda|tensorrt)_")


def compared_names(source: ast.Module) -> set[str]:
    """The names of targets that stand in a comparison or as a key."""
    nodes = [node for node in ast.walk(source) if isinstance(node, ast.Compare | ast.Dict | ast.Subscript)]
    keys = [
        key
        for node in nodes
        for key in (
            node.keys
            if isinstance(node, ast.Dict)
            else [node.slice]
            if isinstance(node, ast.Subscript)
            else [node.left, *node.comparators]
        )
    ]
    constants = (part for key in keys if key is not None for part in ast.walk(key) if isinstance(part, ast.Constant))
    return {part.value for part in constants if part.value in TARGET_NAMES}


@pytest.mark.slow
def test_only_a_targets_own_files_compare_its_name() -> None:
    paths = (path for path in checkout() if path.suffix == ".py" and path.parts[0] in PRODUCT)
    found = {
        str(path): names
        for path in paths
        if not TARGETS_OWN.match(str(path)) and (names := compared_names(parsed(ROOT / path)))
    }
    assert found == {}
    assert compared_names(parse_source('x = name in ("cuda",); y = {"onnx": 1}; z = t["tensorrt"]')) == TARGET_NAMES - {
        "tensorrt-rtx"
    }
