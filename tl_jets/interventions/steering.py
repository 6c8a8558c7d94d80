r"""Steering with a detached map: one prompt's frozen network, applied to another prompt.

At a label (a layer's stream, or one write) the model's own value f(x) is mixed with s(x), the value that the network,
frozen at the last token of the steering prompt, gives for the running prompt's first stream x:

.. math::
    f'_p = \lambda f_p(x) + (1 - \lambda)\, s_p(x), \qquad
    s_p(x) = J_0 x_0 + \sum_{j \ge 1} J_j\, x_{p - (n - 1) + j} + \text{bias}.

============  ======================================================================================
symbol        name here
============  ======================================================================================
J_0 .. J_n-1  the maps from the steering prompt's n positions to its last one (`DetachedJacobian`)
x             the first stream of the running prompt (`wrt`)
1 - lambda    `strength`
p             the steered position: the last one of each forward pass, or all from `start` on
============  ======================================================================================

The paper does not say how to align prompts of different lengths. Here first positions correspond (often a
beginning-of-sequence token), the others are aligned at the end, and maps without a token are left out. On stories260K,
three steering prompts on three others, this brought s_p nearer to f_p and to the steering prompt's own value (mean
cosines at layer 4: 0.33 and 0.30) than aligning all at the end (0.18 and 0.05). Position 0 is never steered. On its own
prompt the mixture changes nothing.

Source: Golden (arXiv 2505.24293, v3), equation 16. Cost: a backward pass for each of d_model rows when the hooks are
made; then one product with [d_model, n d_model] per steered position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tl_jets.core.labels import LabelInput
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.selection import stream_labels
from tl_jets.detached_map.jacobian import detached_jacobian
from tl_jets.interventions.hooks import hookable

Hook = tuple[str, Callable[[Tensor, Any], Tensor | None]]


def steering_hooks(
    model: Any,
    steer_text: Any,
    *,
    output: int | LabelInput,
    strength: float,
    wrt: LabelInput = "0_pre",
    start: int | None = None,
) -> list[Hook]:
    """`[(hook_name, function)]` that mix a layer of the running prompt with another prompt's detached map of it.

    With or without a key-value cache (`model.run_with_hooks`, `model.generate`); prompts must not be padded.

    Args:
        model: A `TransformerBridge`, a `HookedTransformer`, or a `ResidualNetwork` of one.
        steer_text: The steering prompt: text, token ids [1, pos], or a `Trace`, of at least two tokens.
        output: Where to steer: a layer (l is `l_pre`, -1 `final_post`), a stream, or a write (`"3_mlp_out"`).
        strength: 1 - lambda: 0 leaves the model unchanged, 1 replaces its value by the map's.
        wrt: The stream that the map reads.
        start: Steer all positions from this one on. None: the last position of each forward pass.

    Raises:
        ValueError: Bad labels, strength, start or steering prompt. When run: a key-value cache that was made without
            the hooks; or a pass of one token where the model does not fill its cache (TransformerLens 3.9 and 4.3 with
            transformers 5.24, for Llama, GPT-2 and many other families).
        NotImplementedError: A network of plain callables; or the model does not come out affine.

    Source: Golden, arXiv 2505.24293 (v3), equation 16.
    """
    network = hookable(model)
    if not math.isfinite(strength):
        raise ValueError(f"strength must be a finite number, 0 for no steering; got {strength}.")
    if start is not None and start < 0:
        raise ValueError(f"start must be a position from the beginning, 0 or more; got {start}. None is the last one.")
    label = stream_labels(network, output, False)[0] if isinstance(output, int) else network.label(output)
    wrt = network.label(wrt)
    written, read = _hook_name(network, label), _hook_name(network, wrt)
    J = detached_jacobian(network, steer_text, output=label, wrt=wrt, ordinary=False)
    if len(J.tokens) != 1 or J.tokens.shape[1] < 2:
        raise ValueError(f"The steering prompt must be one prompt of at least two tokens; got {list(J.tokens.shape)}.")
    fills_cache = network.view.fills_cache(J.tokens)  # type: ignore[attr-defined]
    steering = _Steering(J.map.block(), J.bias[0, 0].detach(), strength, start, fills_cache)
    pattern = f"blocks.{int(wrt.split('_')[0])}.attn.hook_pattern"
    return [(read, steering.read), (pattern, steering.place), (written, steering.mix)]


class _Steering:
    """State of the hooks: the map, and the part of the running prompt seen so far.

    A pass that continues a key-value cache has more keys than queries in its attention pattern. Where the model does
    not fill its cache, each pass looks like a new prompt; passes of one token are then refused.
    """

    def __init__(self, matrix: Tensor, bias: Tensor, strength: float, start: int | None, fills_cache: bool):
        self.matrix, self.bias, self.strength, self.start = matrix, bias, strength, start
        self.fills_cache = fills_cache
        self.arriving: Tensor | None = None
        self.seen: Tensor | None = None
        self.is_placed = False

    def read(self, stream: Tensor, hook: Any) -> None:
        """Record the stream that the map reads."""
        self.arriving, self.is_placed = stream.clone(), False  # a hook that comes later may write to it

    def place(self, pattern: Tensor, hook: Any) -> None:
        """Append the stream to the cached positions, or start a new prompt."""
        assert self.arriving is not None
        keys, queries = pattern.shape[-1], pattern.shape[-2]
        self.is_placed = True
        if keys == queries:
            if queries == 1 and not self.fills_cache:
                raise ValueError(
                    "Steering with a key-value cache needs a model that fills it; this one's attention ignores the cache it is "
                    "given, and got one token alone, so that generation would forget the prompt, steered or not. (From "
                    "transformers 5.24 on, TransformerLens 3.9 and 4.3 do not know the cache's new name.) Generate with "
                    "use_past_kv_cache=False, from two tokens or more, or install transformers<5.24."
                )
            self.seen = self.arriving
            return
        if self.seen is None or self.seen.shape[1] < keys - queries or len(self.seen) != len(self.arriving):
            raise ValueError(
                "A key-value cache must be filled under the steering hooks, which need the prompt's first stream; "
                f"{keys - queries} positions are cached and {0 if self.seen is None else self.seen.shape[1]} were seen. "
                "Run the whole prompt inside `with model.hooks(...)`."
            )
        self.seen = torch.cat([self.seen.detach(), self.arriving], dim=1)

    def mix(self, value: Tensor, hook: Any) -> Tensor:
        """Mix the model's own value with the map's at the steered positions."""
        if self.seen is None or not self.is_placed:
            raise ValueError("Steering needs the attention pattern's hook to tell a cache, and it did not fire.")
        total, queries = self.seen.shape[1], value.shape[1]
        first = max(1, total - queries, total - 1 if self.start is None else self.start)
        if first >= total:
            return value
        positions = torch.arange(first, total, device=value.device)
        steered = self._map(positions).to(value)
        here = positions - (total - queries)
        mixed = value.clone()
        mixed[:, here] = value[:, here] + self.strength * (steered - value[:, here])
        return mixed

    def _map(self, positions: Tensor) -> Tensor:
        """s_p(x) [batch, position, width]."""
        assert self.seen is not None
        matrix, bias = self.matrix.to(positions.device), self.bias.to(positions.device)
        x = self.seen.to(matrix)
        n = matrix.shape[1]
        places = positions[:, None] - (n - 1) + torch.arange(1, n, device=positions.device)
        window = x[:, places.clamp_min(0)] * (places >= 1)[..., None].to(x)
        rest = torch.einsum("ojd,bpjd->bpo", matrix[:, 1:], window)
        return rest + (x[:, 0] @ matrix[:, 0].T + bias)[:, None]


def _hook_name(network: ResidualNetwork, label: str) -> str:
    """TransformerLens' name of a stream or write."""
    fine = network.at("sublayer")
    layers = fine.stages[-1].steps[-1].layer
    if label == FINAL_STREAM:
        return f"blocks.{layers}.hook_resid_post"
    writes = [step.write for step in fine.steps]
    if label in writes or (label in fine.streams and label.endswith("_pre")):
        layer, kind = label.split("_", 1)
        return f"blocks.{layer}.hook_{'resid_pre' if kind == 'pre' else kind}"
    streams = [stream for stream in fine.streams if not stream.endswith("_mid")]
    raise ValueError(
        f"Steering reads and writes the streams {streams[0]!r} .. {streams[-1]!r} and writes such as {writes[0]!r}; got "
        f"{label!r}. (A hook between attention and MLP does not change the stream in every model.)"
    )
