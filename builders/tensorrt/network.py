"""Parse the ONNX graph into a TensorRT network, correct its attention, and set its profiles.

What enters is the graph's protobuf and TensorRT's objects; what leaves is a network that is ready to compile. This
module compiles and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from deepseek_triton.builders.tensorrt.compiler import CompileTarget
from deepseek_triton.builders.tensorrt.errors import EngineError, GraphError
from deepseek_triton.ensemble.artefacts.tensorrt_api import BEST_ID, BEST_LOG_PROB, Messages, make_logger

MASK = "mask"  # decoder.py's causal mask over the whole cache


@dataclass(frozen=True)
class AttentionForm:
    """How attention is masked, and whether TensorRT must run it as one fused kernel.

    name: "lengths" (key/value lengths and lower-right causality) or "mask".
    """

    name: str
    is_fused: bool


# They are tried in this order. If no fused kernel takes the lengths, one may take the mask; decomposed attention is
# the last resort, except in float32, for which TensorRT has no fused kernel.
ATTENTION_FORMS: dict[str, tuple[AttentionForm, ...]] = {
    "fp32": (AttentionForm("lengths", False), AttentionForm("mask", False)),
    "fp16": (AttentionForm("lengths", True), AttentionForm("mask", True), AttentionForm("lengths", False)),
    "fp8": (AttentionForm("lengths", True), AttentionForm("mask", True), AttentionForm("lengths", False)),
}
STATELESS_FORMS: dict[str, tuple[AttentionForm, ...]] = {
    "fp32": (AttentionForm("mask", False),),
    "fp16": (AttentionForm("mask", True), AttentionForm("mask", False)),
    "fp8": (AttentionForm("mask", True), AttentionForm("mask", False)),
}


@dataclass(frozen=True)
class OptimizationProfile:
    """An optimisation profile: lowest, best and highest batch size and sequence length."""

    name: str
    batch: tuple[int, int, int]
    seq_len: tuple[int, int, int]

    def shapes(self, name: str, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Input `name`'s lowest, best and highest shape: the first dynamic dimension is the batch."""
        return [_fill(shape, self.batch[i], self.seq_len[i]) for i in range(3)]


@dataclass(frozen=True)
class RaggedProfile:
    """A profile of inputs whose first dimension is the only dynamic one: the lowest, best and highest size of each."""

    name: str
    sizes: Mapping[str, tuple[int, int, int]]

    def shapes(self, name: str, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Input `name`'s lowest, best and highest shape."""
        return [(size, *shape[1:]) for size in self.sizes[name]]


def decoder_profiles(max_num_seqs: int, max_num_batched_tokens: int) -> tuple[OptimizationProfile, OptimizationProfile]:
    """The profiles of a decoder, in the order of their numbers: prefill of one slot, decode of up to all slots."""
    return (
        OptimizationProfile("prefill", (1, 1, 1), (1, max_num_batched_tokens, max_num_batched_tokens)),
        # With a sequence length that is fixed to 1 TensorRT chooses its decode kernel.
        OptimizationProfile("decode", (1, max_num_seqs, max_num_seqs), (1, 1, 1)),
    )


class Network:
    """TensorRT's builder, network and parser, which must be kept alive together."""

    def __init__(self, target: CompileTarget) -> None:
        self.messages = Messages()
        self.api = target.api
        self._logger = make_logger(self.api, self.messages)
        self.builder = self.api.Builder(self._logger)
        strongly_typed = self.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        self.network = self.builder.create_network(1 << int(strongly_typed))
        self._parser = self.api.OnnxParser(self.network, self._logger)

    def parse(self, model: onnx.ModelProto, path: Path) -> None:
        """Read `model`, whose weights lie beside `path`.

        Raises:
            GraphError: names the node that TensorRT can't read.
        """
        if self._parser.parse(model.SerializeToString(), str(path)):
            return
        where, reason = "", self.messages.reason()
        if self._parser.num_errors:
            error = self._parser.get_error(0)
            where = f"node {error.node_name()} ({error.node_operator()}): " if error.node_name() else ""
            if reason.endswith("false"):  # a failed check that has no text
                reason = error.code().name.lower().replace("_", " ")
        raise GraphError(f"TensorRT can't read {path.name}: {where}{reason}")

    def inputs(self) -> dict[str, Any]:
        """Input tensors by name."""
        tensors = (self.network.get_input(index) for index in range(self.network.num_inputs))
        return {tensor.name: tensor for tensor in tensors}

    def outputs(self) -> dict[str, Any]:
        """Output tensors by name."""
        tensors = (self.network.get_output(index) for index in range(self.network.num_outputs))
        return {tensor.name: tensor for tensor in tensors}

    def attentions(self) -> list[Any]:
        """Every attention, as `IAttention`."""
        found = []
        for index in range(self.network.num_layers):
            layer = self.network.get_layer(index)
            if layer.type == self.api.LayerType.ATTENTION_INPUT:
                # get_layer returns the base class; assigning the class is how TensorRT's Python API casts.
                layer.__class__ = self.api.IAttentionInputLayer
                found.append(layer.attention)
        return found

    def set_attention(self, form: AttentionForm) -> None:
        """Give every attention `form`; for "lengths" the mask must have been left out by `without_mask`.

        Raises:
            GraphError: this TensorRT doesn't have the form.
        """
        attentions = self.attentions()
        try:
            lengths = self._key_value_lengths() if form.name == "lengths" and attentions else None
            for attention in attentions:
                attention.decomposable = not form.is_fused
                if lengths is not None:
                    attention.causal_kind = self.api.CausalMaskKind.LOWER_RIGHT
                    attention.key_value_lengths = lengths
        except (AttributeError, RuntimeError) as error:  # an older API, and how the bindings say no
            version = self.api.__version__
            raise GraphError(f"TensorRT {version} has no attention in the form {form.name}: {error}") from error

    def _key_value_lengths(self) -> Any:
        """start + seq_len [batch], int32.

        With lower-right causality query i attends to the keys up to i + length - seq_len = start + i, as with the mask,
        in padded rows too. With start + num_tokens a padded row would lose keys.
        """
        api, network, inputs = self.api, self.network, self.inputs()
        shape = network.add_shape(inputs["input_ids"]).get_output(0)  # [2] int64: batch, seq_len
        seq_len = network.add_slice(shape, (1,), (1,), (1,)).get_output(0)
        total = network.add_elementwise(inputs["start"], seq_len, api.ElementWiseOperation.SUM).get_output(0)
        lengths = network.add_cast(total, api.DataType.INT32).get_output(0)
        lengths.name = "key_value_lengths"
        return lengths

    def add_best_token(self) -> None:
        """Add each row's likeliest token, BEST_ID [batch, 1] int32, and its log probability, BEST_LOG_PROB [batch, 1]
        float32: minus the logarithm of the sum of exp(logit - best logit).
        """
        api, network, logits = self.api, self.network, self.outputs()["logits"]
        vocabulary = 1 << 1
        top = network.add_topk(logits, api.TopKOperation.MAX, 1, vocabulary)
        below = network.add_elementwise(logits, top.get_output(0), api.ElementWiseOperation.SUB).get_output(0)
        weights = network.add_unary(below, api.UnaryOperation.EXP).get_output(0)
        total = network.add_reduce(weights, api.ReduceOperation.SUM, vocabulary, keep_dims=True).get_output(0)
        log_total = network.add_unary(total, api.UnaryOperation.LOG).get_output(0)
        log_prob = network.add_unary(log_total, api.UnaryOperation.NEG).get_output(0)
        for name, output in ((BEST_LOG_PROB, log_prob), (BEST_ID, top.get_output(1))):
            output.name = name
            self.network.mark_output(output)

    def add_profiles(self, config: Any, profiles: Sequence[OptimizationProfile | RaggedProfile]) -> None:
        """Set every dynamic dimension of every input."""
        for wanted in profiles:
            profile = self.builder.create_optimization_profile()
            for tensor in self.inputs().values():
                profile.set_shape(tensor.name, *wanted.shapes(tensor.name, tensor.shape))
            if config.add_optimization_profile(profile) < 0:
                raise EngineError(f"TensorRT refuses the {wanted.name} profile: {self.messages.reason()}")


def _fill(shape: Sequence[int], batch: int, seq_len: int) -> tuple[int, ...]:
    return tuple(size if size >= 0 else (batch if axis == 0 else seq_len) for axis, size in enumerate(shape))


def has_causal_mask(model: onnx.ModelProto) -> bool:
    """Whether every attention takes the decoder's own causal mask, which lengths can replace."""
    attentions = [node for node in model.graph.node if node.op_type == "Attention"]
    return bool(attentions) and all(len(node.input) == 4 and node.input[3] == MASK for node in attentions)


def without_mask(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the graph without attention masks, which TensorRT can't remove after parsing."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type == "Attention":
            del node.input[3:]
    return copy
