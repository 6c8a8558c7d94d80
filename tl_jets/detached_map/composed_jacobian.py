r"""The Jacobian from one label of a network to others, as a composition of stage maps.

.. math::
    J = S_n \cdots S_2 S_1, \qquad S_l = 1 + D\gamma_l \text{ at the true stream of stage } l,

with every gamma frozen (the detached map) or not (the ordinary Jacobian). Each stage map has a graph of its own. If the
graphs would take more than `GRAPH_BYTES` and more than a hundredth of the matrix, they are not kept but made at each
use: memory is then that of one stage, at the price of a forward pass per product.

The bias goes through the same frozen stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.factors import Span
from tl_jets.core.frozen_network import freeze
from tl_jets.core.linear_map import CHUNK_ELEMENTS, CHUNK_SIZE, GraphMap, LinearMap
from tl_jets.core.protocol import DECODER_STEP, FINAL_STREAM, Stage, some
from tl_jets.core.structure import Structure
from tl_jets.core.trace import Trace
from tl_jets.detached_map.stage_products import StageProducts

LOGITS = "logits"
# Graphs up to this size are always kept.
GRAPH_BYTES = 2**26
# Number of elements of the covectors that run together where a matrix is made.
SPAN_ELEMENTS = 2**25

Function = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class StageMap:
    """One function of the composition, at its true input.

    Attributes:
        function: Returns the function; called at each use, because the hooks must still be those of the trace.
        is_frozen: Whether norm scales, patterns and gates are constants.
        kept: The graph, if it is kept.
        products: Returns the stage's products, if it is a stage of the network.
    """

    point: Tensor
    function: Callable[[], Function]
    is_frozen: bool = True
    kept: GraphMap | None = None
    products: Callable[[], StageProducts | None] = lambda: None

    def graph(self) -> GraphMap:
        """The derivative at the point."""
        if self.kept is not None:
            return self.kept
        if self.is_frozen:
            return freeze(self.function(), self.point)[0]
        with torch.inference_mode(False), torch.enable_grad():
            point = self.point.detach().clone().requires_grad_()
            return GraphMap(point, self.function()(point))

    def graph_and_bias(self, bias: Tensor) -> tuple[GraphMap, Tensor]:
        """The derivative, and the same frozen function of another input."""
        graph, at = freeze(self.function(), self.point)
        return graph, at(bias)

    def ordinary(self) -> StageMap:
        """The same function with nothing frozen."""
        return StageMap(self.point, self.function, is_frozen=False)


@dataclass(frozen=True, eq=False, repr=False)
class ComposedMap(LinearMap):
    """A composition of derivatives; `parts` are in the order in which they are applied."""

    parts: Sequence[StageMap] = field(default=(), kw_only=True)

    def apply_rows(
        self, vectors: Float[Tensor, "*many batch pos d_model"], *, chunk_size: int = CHUNK_SIZE
    ) -> Float[Tensor, "*many batch out_pos rows"]:
        """J u before the readout."""
        for part in self.parts:
            vectors = part.graph().apply_rows(vectors, chunk_size=chunk_size)
        return vectors

    def apply_transpose_rows(
        self, vectors: Float[Tensor, "*many batch out_pos rows"], *, chunk_size: int = CHUNK_SIZE
    ) -> Float[Tensor, "*many batch pos d_model"]:
        """J' v for v before the readout."""
        for part in reversed(self.parts):
            vectors = part.graph().apply_transpose_rows(vectors, chunk_size=chunk_size)
        return vectors

    def _all_rows(self, chunk_size: int | None) -> Tensor:
        """By factors of the stages where they are known, if the matrix is of one prompt."""
        batch, out_pos, rows = self.value.shape
        if batch > 1 or chunk_size is not None or not self.parts[0].is_frozen:
            return super()._all_rows(chunk_size)
        step = max(1, SPAN_ELEMENTS // self.point.numel())
        units = torch.eye(out_pos * rows, dtype=self.value.dtype, device=self.value.device).view(-1, 1, out_pos, rows)
        *stages, tail = self.parts
        spans = [_span(_pulled_back(tail, part)) for part in units.split(step)]
        for stage in reversed(stages):
            products = stage.products()
            if products is not None and products.factors is not None:
                spans = products.pulled_back(spans)
            else:
                spans = [Span(0, _columns(_pulled_back(stage, _each(x, self.point.shape[1])))) for x in spans]
        found = self.point.new_zeros(1, out_pos * rows, *self.in_shape[1:])
        for span, part in zip(spans, found[0].split(step), strict=True):
            part[:, span.start : span.stop] = span.vectors.permute(2, 0, 1)
        return found

    def ordinary(self) -> ComposedMap:
        """The same composition with nothing frozen; its graphs are not kept."""
        parts = [part.ordinary() for part in self.parts]
        return ComposedMap(self.point, self.value, self.readout, parts=parts)


def _pulled_back(part: StageMap, vectors: Tensor) -> Tensor:
    """J' v of one part, for many v at once."""
    graph = part.graph()
    return graph.apply_transpose_rows(vectors, chunk_size=max(CHUNK_SIZE, CHUNK_ELEMENTS // graph.point.numel()))


def _columns(vectors: Float[Tensor, "many 1 pos d_model"]) -> Float[Tensor, "pos d_model many"]:
    return vectors[:, 0].permute(1, 2, 0).contiguous()


def _each(span: Span, length: int) -> Float[Tensor, "many 1 pos d_model"]:
    return span.over(0, length).vectors.permute(2, 0, 1)[:, None]


def _span(vectors: Float[Tensor, "many 1 pos d_model"]) -> Span:
    """From the first to the last position at which vectors are not zero."""
    places = (vectors[:, 0] != 0).any(2).any(0).nonzero().flatten().tolist() or [0]
    return Span(places[0], _columns(vectors[:, :, places[0] : places[-1] + 1]))


class ComposedJacobian:
    """The stages from the label `wrt` to outputs after it, which see the same output positions.

    Attributes:
        start: Index of the first stage.
        stages: All stages that an output needs.
    """

    def __init__(self, trace: Trace, wrt: str, outputs: Sequence[str], positions: list[int]):
        network = _network_with(trace.network, wrt, outputs)
        self.trace = trace = Trace(network, trace.recording)
        self.positions = positions
        self.point = trace[wrt]
        first = network.streams[0]
        self._offset = trace[first] - self.point if wrt in network.sources else torch.zeros_like(self.point)
        self.outputs = list(outputs)
        self.start = start = 0 if wrt in network.sources else network.streams.index(wrt)
        stops: list[int] = []
        self._counts: dict[str, int] = {}  # how many stages come before an output
        for output in outputs:
            is_write = output in _writes(network)
            stop = _place(network, output) or 0
            if stop < start + is_write:
                raise ValueError(f"output must come after wrt in the network; {output!r} does not follow {wrt!r}.")
            self._counts[output] = stop - start - is_write
            stops.append(stop)
            for stage in network.stages[start:stop]:
                # Values that a view computes once per input (heads at zero) must not be computed under `frozen`.
                if any(step.kind == "head" for step in stage.steps):
                    with torch.no_grad():
                        trace.stage_function(stage)(trace[stage.stream])
        self._stages = network.stages[start : start + max(self._counts.values())]
        self.stages = network.stages[start : max(stops)]  # those of the writes, too

    def maps(self, keep_graph: bool | None = None) -> list[tuple[ComposedMap, Tensor]]:
        """The detached map to every output, and the frozen map at zero [batch, out_pos, rows], both before the readout."""
        network = self.trace.network
        parts = [self._stage_part(stage) for stage in self._stages]
        bias, biases = self._offset, {0: self._offset}
        room, weights = self._room(keep_graph), _weight_storages(network)
        for count, part in enumerate(parts, 1):
            graph, bias = part.graph_and_bias(bias)
            if count in self._counts.values():
                biases[count] = bias
            if keep_graph is None and room >= 0:
                room -= _graph_bytes(graph.value, weights)
                # Estimate the total from the average so far, once there is one of each kind.
                expected = (self._room(None) - room) / count * len(parts)
                room = -1.0 if count > 1 and expected > self._room(None) else room
            part.kept = graph if room >= 0 else None
            if room < 0:
                for earlier in parts:
                    earlier.kept = None
        found = []
        for output, count in self._counts.items():
            tail = self._tail(output)
            graph, bias = tail.graph_and_bias(biases[count])
            tail.kept = graph if room >= 0 else None
            decoder = self.trace.decoder
            readout = decoder.scaled(decoder.W_U.to(self.point)) if output == LOGITS else None
            on_the_way = [*parts[:count], tail]
            found.append((ComposedMap(self.point, graph.value.detach(), readout, parts=on_the_way), bias))
        return found

    def _room(self, keep_graph: bool | None) -> float:
        """Bytes that the graphs may take."""
        if keep_graph is not None:
            return 0.0 if keep_graph else -1.0
        width = len(self.positions) * self.point.shape[-1]
        return max(float(GRAPH_BYTES), self.point.numel() * self.point.element_size() * width / 100)

    def _stage_part(self, stage: Stage) -> StageMap:
        """Stream -> next stream."""
        trace = self.trace
        edits = sum(trace.edits(trace.network.next_stream(stage)).values())

        def function() -> Function:
            gamma = trace.stage_function(stage)
            return lambda stream: stream + gamma(stream).sum(0) + edits

        def products() -> StageProducts | None:
            layer = stage.steps[0].layer
            is_traced = trace.network.view.hook_state(layer) == trace.recording.hook_state[layer + 1 : layer + 2]
            return StageProducts.of(trace, stage) if is_traced else None  # a kept graph serves a changed model

        return StageMap(trace[stage.stream], function, products=products)

    def on_the_way(self, spans: Sequence[Span]) -> Iterator[tuple[str, list[Float[Tensor, "d_model many"]]]]:
        """J u of every output, by label, at the only output position, by span; the spans are overwritten."""
        network, (place,) = self.trace.network, self.positions
        if network.streams[self.start] in self.outputs:
            yield network.streams[self.start], [span.at(place).clone() for span in spans]
        for stage in self.stages:
            written = StageProducts.of(self.trace, stage).writes(spans)
            for index, step in enumerate(stage.steps):
                if step.write in self.outputs:
                    yield step.write, [parts[index].at(place) for parts in written]
            spans = [span.plus(parts) for span, parts in zip(spans, written, strict=True)]
            following = network.next_stream(stage)
            if following in self.outputs:
                yield following, [span.at(place).clone() for span in spans]

    def _tail(self, output: str) -> StageMap:
        """The function from the last stage's stream to an output at the output positions."""
        trace, network, positions = self.trace, self.trace.network, self.positions
        if output in _writes(network):
            stage = next(stage for stage in network.stages if output in [step.write for step in stage.steps])
            index = [step.write for step in stage.steps].index(output)

            def function() -> Function:
                gamma = trace.stage_function(stage)
                return lambda stream: gamma(stream)[index][:, positions]

            return StageMap(trace[stage.stream], function)
        norm = trace.decoder.norm if output in (LOGITS, DECODER_STEP) else None
        stream = output if norm is None else FINAL_STREAM

        def last(stream: Tensor) -> Tensor:
            return stream[:, positions] if norm is None else norm(stream[:, positions])

        return StageMap(trace[stream], lambda: last)

    def truth(self, output: str) -> Tensor:
        """The model's own output [batch, out_pos, width]."""
        trace, decoder = self.trace, self.trace.decoder
        if output not in (LOGITS, DECODER_STEP):
            return trace[output][:, self.positions]
        if output == LOGITS and decoder.transform is None and trace.logits is not None:
            return trace.logits[:, self.positions].to(self.point.dtype)
        normed = decoder.norm(trace[FINAL_STREAM][:, self.positions])
        return normed if output == DECODER_STEP else decoder.logits(normed)


def _network_with(own: Structure, wrt: str, outputs: Sequence[str]) -> Structure:
    """The network at the first granularity that has all labels."""
    for network in (own, own.at("sublayer"), own.at("head")):
        starts = (*network.sources, *network.streams)
        if wrt in starts and all(_place(network, output) is not None for output in outputs):
            return network
    raise ValueError(
        f"wrt must be a source or stream and output a stream, a write, or one of {(LOGITS, DECODER_STEP)}; got "
        f"wrt={wrt!r}, output={', '.join(map(repr, outputs))}. Labels are {some(own.at('head').labels, 24)}."
    )


def _place(network: Structure, output: str) -> int | None:
    """Number of stages before a label; None if the network has no such label."""
    if output in (LOGITS, DECODER_STEP):
        return len(network.stages)
    if output in network.streams:
        return network.streams.index(output)
    places = [i + 1 for i, stage in enumerate(network.stages) if output in (step.write for step in stage.steps)]
    return places[0] if places else None


def _writes(network: Structure) -> set[str]:
    return {step.write for stage in network.stages for step in stage.steps}


def _graph_bytes(value: Tensor, ignored: set[int]) -> int:
    """Bytes held by a graph, apart from ignored storages (the model's weights)."""
    seen, total, nodes, stack = set(ignored), 0, set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        stack.extend(following for following, _ in node.next_functions)
        for name in _saved_names(type(node)):
            saved = getattr(node, name)
            for tensor in saved if isinstance(saved, tuple) else (saved,):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in seen:
                    seen.add(tensor.untyped_storage().data_ptr())
                    total += tensor.untyped_storage().nbytes()
    return total


@cache
def _saved_names(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_saved_")]


def _weight_storages(network: Structure) -> set[int]:
    model = getattr(network.view, "model", None)
    return set() if model is None else {weight.untyped_storage().data_ptr() for weight in model.parameters()}
