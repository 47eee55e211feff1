"""Check the connections between an ensemble's steps: that each tensor exists, and that its two ends fit.

What enters are parsed configurations, what leaves are problems; this module opens no files. The rules are Triton's, but
stricter in one place: the two ends of a connection must have equal dims. Triton accepts -1 with any number, and fails
at the first request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig


@dataclass(frozen=True)
class Problem:
    """A reason why a repository can't be served: the place, and what is wrong with it and what to do."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class _End:
    """One end of a connection: the model whose tensor it is, and its type and dims with the batch dimension."""

    owner: str
    dtype: str
    dims: tuple[int, ...]
    optional: bool


@dataclass
class _Wires:
    """The ensemble's tensors by name, after the steps that were checked so far."""

    makers: Mapping[str, str]  # tensor → the model of the step that produces it
    ends: dict[str, _End]  # the tensors that exist so far
    streamed: dict[str, str] = field(default_factory=dict)  # tensor → the decoupled model that it comes from
    faulty: set[str] = field(default_factory=set)  # tensors that a step can't produce for a reason that was reported
    used: set[str] = field(default_factory=set)


def check_wiring(where: str, ensemble: ModelConfig, models: Mapping[str, ModelConfig]) -> Iterator[Problem]:
    """Check the ensemble, whose config.pbtxt is `where`, against the models of its repository."""
    inputs = {tensor.name: _end(ensemble.name, ensemble, tensor) for tensor in ensemble.input}
    outputs = {tensor.name: _end(ensemble.name, ensemble, tensor) for tensor in ensemble.output}
    steps = ensemble.ensemble_scheduling.step
    makers = {tensor: step.model_name for step in steps for tensor in step.output_map.values()}
    wires = _Wires(makers, dict(inputs))
    if not steps:
        yield Problem(where, "ensemble_scheduling.step is empty, an ensemble needs at least one step")
    for number, step in enumerate(steps):
        at = f"{where} step {number} ({step.model_name})"
        model = models.get(step.model_name)
        if model is None:
            yield Problem(at, "has no readable model in the repository; build it, or correct the name")
            wires.used.update(step.input_map.values())
            wires.faulty.update(step.output_map.values())
            continue
        if model.max_batch_size < ensemble.max_batch_size:
            what = f"the ensemble's max_batch_size is {ensemble.max_batch_size}, must be at most the model's"
            yield Problem(at, f"{what}, {model.max_batch_size}")
        yield from _check_inputs(at, step.input_map, model, wires)
        yield from _check_outputs(at, step, model, wires)
    for name, end in outputs.items():
        if name in wires.ends and name not in inputs:
            yield from _check_fit(where, f"output {name!r}", wires.ends[name], end)
        elif name not in wires.faulty:
            # Triton would load this and answer every request with a deadlock error.
            yield Problem(where, f"output {name!r} is produced by no step; map a step's output to it")
    for name in sorted(set(inputs) - wires.used):
        yield Problem(where, f"input {name!r} is used by no step; map it to a step's input, or remove it")


def _check_inputs(at: str, input_map: Mapping[str, str], model: ModelConfig, wires: _Wires) -> Iterator[Problem]:
    ends = {tensor.name: _end(model.name, model, tensor) for tensor in model.input}
    for name, end in ends.items():
        if name not in input_map and not end.optional:
            yield Problem(at, f"input {name!r} of the model is required; add it to input_map")
    for name, tensor in sorted(input_map.items()):
        wires.used.add(tensor)
        if name not in ends:
            what = f"input_map key {name!r} is not an input of the model, must be one of {sorted(ends)}"
            yield Problem(at, what)
        elif tensor in wires.ends:
            yield from _check_fit(at, f"input {name!r}", wires.ends[tensor], ends[name])
            if wires.ends[tensor].optional and not ends[name].optional:
                what = f"input {name!r} is required, but ensemble input {tensor!r} may be absent"
                yield Problem(at, f"{what}; make both optional or neither")
        elif tensor not in wires.makers:
            what = f"input {name!r} takes {tensor!r}, which no step produces and no client sends"
            yield Problem(at, f"{what}; correct the name in input_map")
        elif tensor not in wires.faulty:
            what = f"input {name!r} takes {tensor!r}, which only a later step ({wires.makers[tensor]}) produces"
            yield Problem(at, f"{what}; put the steps in the order of the data, without cycles")
    sources = {wires.streamed.get(tensor) for tensor in input_map.values() if tensor in wires.ends}
    if len(sources) > 1:
        decoupled = sorted(source for source in sources if source)
        early = sorted(tensor for tensor in input_map.values() if tensor not in wires.streamed)
        what = f"takes {early or 'tensors'} besides what decoupled {decoupled} produce"
        yield Problem(at, f"{what}, which Triton refuses (server issue 7275); pass it through the last of them")


def _check_outputs(at: str, step: ModelConfig, model: ModelConfig, wires: _Wires) -> Iterator[Problem]:
    ends = {tensor.name: _end(model.name, model, tensor) for tensor in model.output}
    behind = next((wires.streamed[t] for t in step.input_map.values() if t in wires.streamed), None)
    if model.model_transaction_policy.decoupled:
        behind = model.name
    for name, tensor in sorted(step.output_map.items()):
        if name not in ends:
            what = f"output_map key {name!r} is not an output of the model, must be one of {sorted(ends)}"
            yield Problem(at, what)
            wires.faulty.add(tensor)
            continue
        if tensor in wires.ends:
            what = f"output {name!r} is mapped to {tensor!r}, which {wires.ends[tensor].owner} produces already"
            yield Problem(at, f"{what}; give it a name of its own")
            continue
        wires.ends[tensor] = ends[name]
        if behind:
            wires.streamed[tensor] = behind


def _check_fit(at: str, what: str, source: _End, target: _End) -> Iterator[Problem]:
    for aspect, given, wanted in (
        ("data_type", source.dtype, target.dtype),
        ("dims", list(source.dims), list(target.dims)),
    ):
        if given != wanted:
            mismatch = f"{what} has {aspect} {wanted} in {target.owner} and {given} in {source.owner}"
            yield Problem(at, f"{mismatch} (dims with the batch dimension); make them equal")


def _end(owner: str, config: ModelConfig, tensor: ModelConfig) -> _End:
    dims = tuple(tensor.dims)
    if config.max_batch_size > 0:
        dims = (-1, *dims)
    return _End(owner, DataType.Name(tensor.data_type), dims, getattr(tensor, "optional", False))
