"""Where the writes of steps are edited: hook points, and heads and neurons there, checked against the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.labels import LabelInput, is_label
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.path import ARROW, Path
from tl_jets.core.protocol import DECODER_STEP, GRANULARITIES, relative_error, some, tolerance
from tl_jets.core.trace import Trace

Steps = LabelInput | Path | Sequence[LabelInput | Path]


class Site(NamedTuple):
    """Where a write is edited: a hook point, and the head or neuron on its third axis (None: all of it)."""

    write: str
    layer: int
    point: str
    part: int | None = None

    @property
    def is_head(self) -> bool:
        """Whether it is a head's z."""
        return self.point.endswith("hook_z")


def network_of(model: Any, labels: Sequence[str]) -> ResidualNetwork:
    """The network of a model at the granularity of some labels; a network as it is."""
    network = ResidualNetwork.of(model)
    if isinstance(model, ResidualNetwork):
        return network
    neurons = [label for label in labels if getattr(network.view.fine_step(label), "kind", None) == "neuron"]
    heads = any(label.startswith("L") for label in labels if label not in neurons)
    return ResidualNetwork(network, "head" if heads else "sublayer", neurons) if heads or neurons else network


def sites_of(network: ResidualNetwork, steps: Steps) -> list[Site]:
    """Where the writes of some steps are edited, without duplicates."""
    known = {step.label: step for kind in GRANULARITIES for stage in network.view.stages(kind) for step in stage.steps}
    known |= {step.label: step for step in network.steps}
    by_write = {step.write: step for step in known.values()}
    labels: list[str] = []
    every: Any = [steps] if is_label(steps) or isinstance(steps, Path) else steps
    for step in every:
        path = Path.parse(step) if isinstance(step, str) and ARROW in step else step
        labels += [s for s in path.steps if s != DECODER_STEP] if isinstance(path, Path) else [network.label(path)]
    sites: list[Site] = []
    for label in labels:
        step = known.get(label) or by_write.get(label) or network.view.fine_step(label)
        if step is None:
            raise ValueError(
                f"A step to edit is one of {some(known, near=label)}, a neuron (L0N17), or its write; got {label!r}."
            )
        if step.is_feature or step.kind in ("attn_bias", "mlp_bias", "mlp_rest"):
            whole = step.label.rsplit("_", 1)[0]
            raise NotImplementedError(f"{label} is what no hook point carries alone; edit {whole} instead.")
        block = f"blocks.{step.layer}."
        if step.kind == "neuron":
            sites.append(Site(step.write, step.layer, block + "mlp.hook_post", step.neuron))
        elif step.kind == "head":
            sites.append(Site(step.write, step.layer, block + "attn.hook_z", step.head))
        elif step.kind == "block" and f"{step.layer}_attn" not in known:
            view: Any = network.view
            raise NotImplementedError(f"No hook point carries the write of {label} alone: {view.cannot(step)}.")
        else:
            for kind in ("attn", "mlp") if step.kind == "block" else (step.kind,):
                if f"{step.layer}_{kind}" in known:
                    sites.append(Site(f"{step.layer}_{kind}_out", step.layer, f"{block}hook_{kind}_out"))
    if not sites:
        raise ValueError(f"An intervention needs at least one step; got {steps!r}.")
    return list(dict.fromkeys(sites))


def _probe(network: ResidualNetwork) -> Trace:
    """A trace of the first and the last token of the vocabulary."""
    ends = torch.tensor([[0, network.decoder.d_vocab - 1]], device="cpu")
    return network.trace(ends, attention_mask=torch.ones_like(ends))


@torch.no_grad()
def check_parts(network: ResidualNetwork, sites: list[Site], given: Any = None) -> None:
    """Check heads and neurons of the sites' layers against the model, once; under hooks, on the input that is given."""
    view: Any = network.view
    if all(site.part is None for site in sites):
        return
    state = view.hook_state()
    keys = {("heads" if s.is_head else "neurons", s.layer, state): s.write for s in sites if s.part is not None}
    if not view.checked.issuperset(keys):
        heads, is_hooked = network.at("head"), any(hooks for hooks, _ in state)
        trace = trace_of(heads, given) if is_hooked and given is not None else _probe(heads)
        for write in keys.values():
            trace[write]


@torch.no_grad()
def heads_at_zero(network: ResidualNetwork, layers: set[int]) -> dict[int, Float[Tensor, "head d_head"]]:
    """By layer, every head's z for a zero normalized input; independent of the input if patterns sum to one."""
    found: dict[int, Tensor] = {}
    network = network.at("sublayer")
    trace = _probe(network) if layers else None
    for layer in sorted(layers):
        assert trace is not None
        gamma, zero = trace.gamma(f"{layer}_attn"), torch.zeros_like(trace[network.streams[0]])
        point = f"blocks.{layer}.attn.hook_z"
        _, grabbed = grabbing(network, [point], lambda gamma=gamma, zero=zero: gamma(zero))
        z = grabbed[point][0]
        if relative_error(z[0], z[1]) > tolerance(z.dtype):
            raise NotImplementedError(
                f"A head at zero keeps its constant, one for all positions; in block {layer} of {network.view.name} it is not, "
                f"for its patterns do not sum to 1 (attention sinks). Use mode='mean' or 'resample'."
            )
        found[layer] = z[0]
    return found


def grabbing(network: ResidualNetwork, points: list[str], run: Callable[[], Any]) -> tuple[Any, dict[str, Tensor]]:
    """What `run` returns, and the activations at some hook points meanwhile."""
    found: dict[str, Tensor] = {}

    def grab(tensor: Tensor, hook: Any, name: str) -> None:
        found[name] = tensor.detach()

    with network.view.hooks([(name, partial(grab, name=name)) for name in points]):  # type: ignore[attr-defined]
        return run(), found
