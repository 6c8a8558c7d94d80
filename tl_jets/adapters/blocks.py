"""The blocks of a TransformerLens model: its weights and hooks, followed as they change; forward passes; norms."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tl_jets.adapters.reading import (
    read_norm,
    refuse_training,
    refuse_unsupported,
    strange_parts,
    unreplayable,
    working_dtype,
)
from tl_jets.calculus import Norm, full_precision
from tl_jets.core.changes import Found, Watch, is_first_look, look, numbers
from tl_jets.core.decoder import Decoder
from tl_jets.core.protocol import State, Step


@dataclass(eq=False)
class Kept:
    """Values computed from a model, by the state of its weights and hooks; must not reference the model.

    Attributes:
        lock: Held by a thread while it has hooks on the model or evaluates its modules.
        watches: Watches of its weights: outside the blocks, then by block.
        checked: Heads and neurons that were compared with the model.
        replays: Stages, and the decoder, that were compared with the model.
        decoder: State of the weights outside the blocks, and the decoder read then, with its metrics.
    """

    lock: Any = field(default_factory=threading.RLock)
    watches: list[Watch] = field(default_factory=list)
    checked: set[Hashable] = field(default_factory=set)
    replays: set[Hashable] = field(default_factory=set)
    decoder: tuple[int, Decoder] | None = None


_KEPT: WeakKeyDictionary[Any, Kept] = WeakKeyDictionary()


def kept_of(model: Any) -> Kept:
    """The kept values of a TransformerLens model."""
    kept = _KEPT.setdefault(model, Kept())
    kept.watches += [Watch() for _ in range(1 + len(model.blocks) - len(kept.watches))]
    return kept


Sublayer = Literal["attn", "mlp"]


def under_lock(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a view's method under the lock of its model."""

    @wraps(method)
    def locked(self: Blocks, *args: Any, **kwargs: Any) -> Any:
        with self.kept.lock:
            return method(self, *args, **kwargs)

    return locked


class Blocks(ABC):
    """A TransformerLens model and its blocks, callable at any stream [batch, pos, d_model]."""

    def __init__(self, model: Any):
        refuse_unsupported(model)
        self.model = model
        self.cfg = model.cfg
        self.n_layers = len(model.blocks)
        called = str(getattr(self.cfg, "model_name", None) or "custom")  # a local directory goes by its last part
        self.name = f"{type(model).__name__}({Path(called).name if Path(called).is_absolute() else called})"
        self.kept = kept_of(model)
        self.checked, self.checks = self.kept.checked, self.kept.replays
        # Values with the state of weights and hooks that they are of, by the name of their user.
        self.memo: dict[str, tuple[Any, ...]] = {}
        self._read_state: list[int] = [0] * (1 + self.n_layers)
        self._norms_read: dict[tuple[int, str, bool], Norm | None] = {}
        self._reasons: dict[tuple[int, tuple[str, ...]], str | None] = {}
        self.follow()
        for layer, which in product(sorted({*range(self.n_layers)} - self.opaque), get_args(Sublayer)):
            # An unreadable norm, or a hook inside one, is refused when needed.
            with suppress(ValueError, NotImplementedError):
                self.post_norm(layer, which)

    @abstractmethod
    def _decoder(self) -> Decoder:
        """Final norm, unembedding and output transform."""

    @abstractmethod
    def call_attn(self, calls: Any, layer: int, stream: Tensor) -> Tensor:
        """Pre-norm and attention, before any post-norm."""

    @abstractmethod
    def finish_attn(self, layer: int, out: Tensor) -> Tensor:
        """Map the attention module's output to its write."""

    @abstractmethod
    def call_mlp(self, calls: Any, layer: int, stream: Tensor) -> Tensor:
        """The MLP's write."""

    @abstractmethod
    def _post_norm_module(self, layer: int, which: Sublayer) -> torch.nn.Module | None:
        """The module between a sublayer and the stream, or None."""

    @abstractmethod
    def _pre_norm_module(self, layer: int, which: Sublayer) -> torch.nn.Module | None:
        """The module between the stream and a sublayer, or None."""

    @abstractmethod
    def is_parallel(self, layer: int) -> bool:
        """Whether attention and MLP read the same stream."""

    @abstractmethod
    def has_mlp(self, layer: int) -> bool:
        """Whether the block has an MLP."""

    @abstractmethod
    def edits_mid(self) -> bool:
        """Whether a hook on `hook_resid_mid` changes the stream itself, skip included."""

    @abstractmethod
    def _call_modules(self) -> list[tuple[Hashable, torch.nn.Module]]:
        """Modules whose call arguments a replay needs, by key."""

    def cannot(self, step: Step) -> str | None:
        """Why a step cannot be replayed on another stream, frozen or split into parts; None if it can."""
        attn = {"block": ("attn", "mlp"), "attn": ("attn",), "head": ("attn",), "attn_bias": ("attn",)}
        which = attn.get(step.kind, ("mlp",))
        if (step.layer, which) not in self._reasons:
            self._reasons[step.layer, which] = unreplayable(self.model, step.layer, *which)
        return self._reasons[step.layer, which]

    def refuse(self, *steps: Step) -> None:
        """Raise NotImplementedError if any of the steps cannot be replayed."""
        for step in steps:
            reason = self.cannot(step)
            if reason is not None:
                raise NotImplementedError(
                    f"This needs {step.label} of {self.name} on other streams than its own, which is not supported: {reason}. "
                    f"Lenses, and direct attribution at 'ln_final' (linearize='detached'), read streams only."
                )

    @contextmanager
    def hooks(self, hooks: list[tuple[str, Any]]) -> Iterator[None]:
        """`model.hooks`, invisible to the traces and evaluations of other threads."""
        with self.kept.lock, self.model.hooks(hooks):
            yield

    @under_lock
    def hook_state(self, layer: int | None = None) -> State:
        """Ids of forward hooks and number of the weights' state: outside the blocks, then by block.

        `layer` restricts it to one block, or to outside the blocks (-1). Raises ValueError in training mode. The first look
        of a call (`one_look`) is at everything, the decoder's weights too, so that a device is waited for once.
        """
        if len(self.model.blocks) != self.n_layers:
            raise ValueError(
                f"A network is of the blocks that its model had; it had {self.n_layers} and has {len(self.model.blocks)} now. "
                f"Make the ResidualNetwork again."
            )
        every = range(self.n_layers + 1)
        wanted = every if layer is None else [layer + 1]
        is_first = is_first_look([self.kept.watches[part] for part in wanted])
        found = {part: self._look(part) for part in wanted}
        found |= {part: self._contents(part) for part in every if is_first and part not in found}
        watched = [(self.kept.watches[part], (own.weights, own.modules)) for part, own in found.items()]
        watched += [self.decoder.watched] if is_first and self._read_state[0] else []
        states = dict(zip(found, numbers(*zip(*watched, strict=True))[: len(found)], strict=True))
        return tuple((found[part].hooks, states[part]) for part in wanted)

    def _look(self, part: int) -> Found:
        """The contents of a block, or of what is outside the blocks (0); ValueError in training mode."""
        found = self._contents(part)
        if found.is_training:
            refuse_training(self.model)
        return found

    def _contents(self, part: int) -> Found:
        blocks = list(self.model.blocks)
        roots = (
            [blocks[part - 1]] if part else [self.model, *filter(None, [getattr(self.model, "original_model", None)])]
        )
        return look(roots, without=() if part else blocks)

    @under_lock
    def follow(self, *, everywhere: bool = True) -> State:
        """Reread cached parts of the model if its modules or weights have changed; `everywhere` includes the blocks.

        Returns the `hook_state` of what was checked.
        """
        state = self.hook_state(None if everywhere else -1)
        changed = [part for part, (_, number) in enumerate(state) if number != self._read_state[part]]
        if changed:
            model = self.model
            # Not a quantized weight, which is stored in another dtype.
            parameter = next(p for p in model.parameters() if p.is_floating_point() and p.itemsize > 1)
            self.blocks = list(model.blocks)
            self.opaque = {layer for layer, block in enumerate(self.blocks) if strange_parts(block)}
            self._reasons.clear()
            self.input_device, self.device = parameter.device, model.W_U.device
            self.native_dtype = parameter.dtype
            self.dtype = working_dtype(parameter.dtype)
            self.hook_dict = dict(model.hook_dict)  # rebuilt at every access on a bridge
            self.stream_names = self._read_stream_names()
            if 0 in changed:
                self.decoder = self._read_decoder(*state[0])
        for part in changed:
            for which, is_post in product(get_args(Sublayer), (False, True)):
                self._norms_read.pop((part - 1, which, is_post), None)
            self._read_state[part] = state[part][1]
        return state

    def _read_decoder(self, hooks: tuple[int, ...], number: int) -> Decoder:
        """The decoder at a state of the weights, with metrics already known for that state."""
        if self.kept.decoder is not None and self.kept.decoder[0] == number and not hooks:
            return self.kept.decoder[1]
        found = self._decoder()
        if found.transform is None:  # a softcap may refer to the model
            self.kept.decoder = number, found
        return found

    def precision(self) -> AbstractContextManager[Any]:
        """Context that keeps float64 models in float64 and computes half-precision models in float32."""
        return nullcontext() if self.native_dtype is torch.float32 else full_precision()

    def _read_stream_names(self) -> list[str]:
        names = ["hook_embed", "hook_pos_embed", *self.block_names()]
        return [name for name in names if name in self.hook_dict]

    def block_names(self) -> list[str]:
        """The hooks of all streams and writes of the blocks."""
        names = []
        for layer in range(self.n_layers):
            kinds = ["resid_pre", "resid_post"] if layer in self.opaque else ["resid_pre", "attn_out", "resid_post"]
            if layer not in self.opaque and self.has_mlp(layer):
                kinds += ["mlp_out"] if self.is_parallel(layer) else ["resid_mid", "mlp_out"]
            names += [f"blocks.{layer}.hook_{kind}" for kind in kinds]
        return names

    @property
    def sources(self) -> tuple[str, ...]:
        """`embed`, and `pos_embed` if learned positions are added to the stream."""
        learned = getattr(self.cfg, "positional_embedding_type", "standard") == "standard"
        return ("embed", "pos_embed") if learned and "hook_pos_embed" in self.hook_dict else ("embed",)

    def read_sources(self, saved: dict[str, Tensor], first: Tensor, edited: bool) -> dict[str, Tensor]:
        """Values of the sources; `embed` is taken after any scale or norm of embeddings (Gemma, Bloom)."""
        positions = saved["hook_pos_embed"].expand_as(first) if "pos_embed" in self.sources else None
        embed = saved.get("hook_embed")
        if embed is None or embed.shape != first.shape:
            embed = first if positions is None else first - positions
        total = embed if positions is None else embed + positions
        if not edited and total is not first:  # without a wait for a device to say whether they are equal
            embed = torch.where((total == first).all(), embed, first if positions is None else first - positions)
        return {"embed": embed} if positions is None else {"embed": embed, "pos_embed": positions}

    @under_lock
    def forward(
        self, tokens: Tensor, attention_mask: Tensor | None, until: str | None = None, also: Sequence[str] = ()
    ) -> tuple[dict[str, Tensor], Any, Any]:
        """Activations by hook name, calls and logits of a forward pass; logits are None if it stops at hook `until`.

        Saved are streams and writes, and what passes the hooks in `also`.
        """
        saved: dict[str, Tensor] = {}
        calls: dict[Hashable, tuple[tuple, dict]] = {}
        # Layers share a tensor as last and first stream, and a user's hook may write to it.
        shared = any(point.fwd_hooks for point in self.hook_dict.values())

        def save_call(key: Hashable, module: Any, args: tuple, kwargs: dict) -> None:
            calls[key] = (args, dict(kwargs))

        with ExitStack() as stack, torch.no_grad(), self.precision():
            for key, module in self._call_modules():
                save = partial(save_call, key)
                stack.enter_context(module.register_forward_pre_hook(save, with_kwargs=True, prepend=True))
            savers = [saver(saved, name, copies=shared) for name in (*self.stream_names, *also)]
            logits = self.run_until(until, tokens, savers, attention_mask)
        return saved, calls, None if logits is None else logits.to(self.device)

    def run_until(
        self, until: str | None, tokens: Tensor, hooks: list[tuple[str, Any]], attention_mask: Tensor | None = None
    ) -> Tensor | None:
        """Logits of a forward pass under some hooks; None if it stops at hook `until`, after the other hooks there."""
        stops = [] if until is None else [(until, _stop)]
        try:
            with self.hooks([*hooks, *stops]):
                return self._run(tokens, attention_mask)
        except _StoppedError:
            return None

    def _run(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        extra = {} if attention_mask is None else {"attention_mask": attention_mask.to(self.input_device)}
        return self.model(tokens.to(self.input_device), return_type="logits", **extra)

    def post_norm(self, layer: int, which: Sublayer = "attn") -> Norm | None:
        """The norm between a sublayer and the stream, or None; reread after changes of the block."""
        return self._norm_at(layer, which, True)

    def pre_norm(self, layer: int, which: Sublayer) -> Norm | None:
        """The norm between the stream and a sublayer, or None; reread after changes of the block."""
        return self._norm_at(layer, which, False)

    def _norm_at(self, layer: int, which: Sublayer, is_post: bool) -> Norm | None:
        if (layer, which, is_post) not in self._norms_read:
            module = (self._post_norm_module if is_post else self._pre_norm_module)(layer, which)
            self._norms_read[layer, which, is_post] = None if module is None else self._read_norm(module)
        return self._norms_read[layer, which, is_post]

    def shares(self, layer: int, which: Sublayer, parts: Tensor, out: Tensor) -> Tensor:
        """Contributions of parts of a sublayer's output `out` to its write, at the post-norm's scale, without bias."""
        post = self.post_norm(layer, which)
        if post is not None and post.kind != "none":
            centered = post.center(out)
            parts = post.scale(post.center(parts) * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + post.eps))
        return parts * self.residual_scale(layer)

    def post_bias(self, layer: int) -> Tensor | None:
        """The bias of a norm after the MLP, as added to the write [d_model]."""
        post = self.post_norm(layer, "mlp")
        return None if post is None or post.bias is None else post.bias * self.residual_scale(layer)

    def residual_scale(self, layer: int) -> float:
        """What all writes of a block are multiplied by (Granite)."""
        return float(getattr(self.blocks[layer], "residual_contribution_scale", 1.0))

    def has_biases(self, layer: int) -> bool:
        """Whether a bias among a block's parameters is not zero; frozen blocks without one write no constant."""
        named = ((name.rsplit(".", 1)[-1], weight) for name, weight in self.blocks[layer].named_parameters())
        return any(bool(weight.any()) for name, weight in named if name in ("b", "bias") or name.startswith("b_"))

    def device_of(self, layer: int) -> torch.device:
        """The device of a block."""
        return next(self.blocks[layer].parameters()).device

    def _read_norm(self, module: Any) -> Norm:
        return read_norm(module, self.cfg, self.cfg.d_model, self.device, self.dtype)

    def _read_last_norm(self, module: Any) -> Norm:
        norm = self._read_norm(module)
        weight, bias = (None if x is None else x.to(self.device) for x in (norm.weight, norm.bias))
        return replace(norm, weight=weight, bias=bias)


class _StoppedError(Exception):
    """Stops a forward pass at the requested hook."""


def _stop(tensor: Tensor, hook: Any) -> None:
    raise _StoppedError


def saver(saved: dict[str, Tensor], name: str, *, copies: bool) -> tuple[str, Any]:
    """A hook that stores an activation, or a copy of it."""

    def save(tensor: Tensor, hook: Any) -> None:
        saved[name] = tensor.detach().clone() if copies else tensor.detach()

    return name, save
