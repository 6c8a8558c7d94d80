"""Interventions: hooks that ablate or patch the writes of steps.

The write of a step is what it adds to the stream (`tl_jets.core.network`). An ablation replaces it in a forward pass,
and all later steps read the changed stream:

==============  ===========================================================================================
mode            the write becomes
==============  ===========================================================================================
``"zero"``      zero
``"mean"``      its mean over the real positions of all prompts of a reference, attention sinks like all others
``"resample"``  the write at the same position in a randomly drawn prompt of the reference
==============  ===========================================================================================

Attention and MLP are edited at `hook_attn_out` and `hook_mlp_out`: after any post-norm, with all biases. A block (`3_block`)
is both. **Heads** are edited at `attn.hook_z`. Zero sets z to its value for a zero normalized input, so value biases stay, and
folding them changes no ablation. Zeroing all heads of a layer leaves `3_attn_bias`; zeroing `3_attn` does not. **Neurons**
(`L3N17`) are edited at `mlp.hook_post`, where zero is zero. Heads and neurons are edited before a post-norm.

Example:
    >>> from tl_jets.pretrained import load_tinydocs
    >>> model = load_tinydocs()
    >>> prompt = "This function is available on Unix and"
    >>> without = model.run_with_hooks(prompt, fwd_hooks=ablation_hooks(model, ["0_mlp", "L1H2"]))
    >>> clean = model(prompt)
    >>> bool((without[0, -1] - clean[0, -1])[clean[0, -1].argmax()] < 0)
    True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_jets.adapters.callables import CallableModel
from tl_jets.core.frozen_network import FrozenNetwork
from tl_jets.core.measures import check_seed
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.options import check_choice
from tl_jets.core.path import Path
from tl_jets.core.protocol import some
from tl_jets.core.trace import Trace
from tl_jets.interventions.places import Hooks, cells_at, only_at
from tl_jets.interventions.sites import Site, Steps, check_parts, grabbing, heads_at_zero, network_of, sites_of
from tl_jets.paths.evaluation import read_path

Mode = Literal["zero", "mean", "resample"]


def ablation_hooks(
    model: Any,
    steps: Steps,
    *,
    mode: Mode = "zero",
    reference: Any = None,
    positions: int | Sequence[int] | Bool[Tensor, "batch pos"] | None = None,
    seed: int = 0,
) -> Hooks:
    """Hooks that ablate the writes of some steps together.

    Args:
        model: A `TransformerBridge`, a `HookedTransformer`, or a `ResidualNetwork` of one.
        steps: One step or several: `3_attn`, `3_mlp`, `3_block`, `L0H3`, `L2N17`, their writes, or a `Path`.
        mode: `"zero"`; `"mean"`, over all real positions of the reference, attention sinks included, which dominate it on many
            models (a mean of your own goes into `patch_hooks`); or `"resample"`, a prompt of the reference drawn by `seed`.
        reference: For `"mean"` and `"resample"`: a prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        positions: Where writes are ablated, of any input: positions in its padded row (hooks see no padding), or a mask
            [batch, pos]; None for everywhere. `ablation_effect` counts among real tokens.
        seed: Chooses the reference prompt of each prompt under `"resample"`: the same one for all steps.

    Returns:
        `[(hook_name, function)]`, for `model.hooks(fwd_hooks=...)` and `model.run_with_hooks(..., fwd_hooks=...)`.

    Raises:
        ValueError: Unknown steps or mode, a missing or superfluous reference, or one of another length to resample from.
        NotImplementedError: A network of plain callables; a constant (`3_attn_bias`), or the rest of an MLP.

    Cost: heads at zero, a forward pass on two tokens and one attention layer each; references, a forward pass.

    Example:
        >>> from tl_jets.pretrained import load_tinydocs
        >>> hooks = ablation_hooks(load_tinydocs(), ["L0H3", "2_mlp"])
        >>> [name for name, function in hooks]
        ['blocks.0.attn.hook_z', 'blocks.2.hook_mlp_out']
    """
    return hooks_of_each(model, [steps], mode=mode, reference=reference, positions=positions, seed=seed)[0]


def hooks_of_each(
    model: Any, ablations: Sequence[Steps], *, mode: Mode, reference: Any, positions: Any, seed: int
) -> list[Hooks]:
    """The `ablation_hooks` of each of several ablations, from one run of the reference."""
    network = hookable(model)
    each = [sites_of(network, steps) for steps in ablations]
    sites = list(dict.fromkeys(site for own in each for site in own))
    check_parts(network, sites)
    check_choice("mode", mode, get_args(Mode))
    check_seed(seed)
    if (reference is None) != (mode == "zero"):
        raise ValueError(
            f"A reference says what writes become in modes 'mean' and 'resample', and is not used in mode 'zero'; got "
            f"mode {mode!r} and {'no reference (pass reference=[prompts])' if reference is None else 'a reference'}."
        )
    if mode == "zero":
        at_zero = heads_at_zero(network, {site.layer for site in sites if site.is_head})
        hooks = {s: _constant(s, at_zero[s.layer][s.part]) if s.is_head else _hook(s, torch.zeros_like) for s in sites}
    else:
        values, valid = _writes(network, reference, sites)
        if mode == "mean":
            hooks = {site: _constant(site, values[site][valid].mean(0)) for site in sites}
        elif bool(valid.all()):
            hooks = {site: _resampled(site, values[site], seed) for site in sites}
        else:
            raise ValueError(
                "A reference to resample from must have prompts of one length, the input's, as writes are taken at the same "
                "positions; got some padding. Choose prompts of equal length, or mode='mean'."
            )
    return [only_at(positions, [hooks[site] for site in own]) for own in each]


def patch_hooks(model: Any, steps: Steps, source: Any, *, positions: int | Sequence[int] | None = None) -> Hooks:
    """Hooks that replace the writes of some steps by those of another input, or by given tensors.

    Args:
        model: A `TransformerBridge`, a `HookedTransformer`, or a `ResidualNetwork` of one.
        steps: One step or several, as in `ablation_hooks`.
        source: A `Trace` or an input; or, for sublayers, the write [batch, pos, d_model], or tensors by step. A source
            of one prompt serves all prompts.
        positions: Positions to patch, counted among the real tokens of each prompt of the source, -1 its last; None for
            all. Padding of the source is not patched.

    Raises:
        ValueError: Unknown steps or positions, a source of another shape, or heads from a trace under other hooks.
        NotImplementedError: A network of plain callables; a constant (`3_attn_bias`); a tensor for a part or block.

    Cost: a forward pass, unless the source is tensors, or a trace and no step is a head or neuron.

    Example:
        >>> from tl_jets.pretrained import load_tinydocs
        >>> model = load_tinydocs()
        >>> hooks = patch_hooks(model, "1_mlp", "This function is available on Windows and", positions=[-2, -1])
        >>> patched = model.run_with_hooks("This function is available on Unix and", fwd_hooks=hooks)
    """
    network = hookable(model)
    sites = sites_of(network, steps)
    if isinstance(source, Tensor) and source.is_floating_point():
        source = {site.write: source for site in sites} if len(sites) == 1 else {}
    given = source if isinstance(source, Mapping) and "input_ids" not in source else None
    check_parts(network, sites, source if given is None else None)
    if given is not None:
        values = _given(network, given, sites)
        valid = torch.ones(values[sites[0]].shape[:2], dtype=torch.bool, device=values[sites[0]].device)
    else:
        values, valid = _writes(network, source, sites)
    if positions is not None:
        valid = cells_at(valid, [positions] if isinstance(positions, int) else list(positions))
    return [_patched(site, values[site], valid) for site in sites]


def without_path(model: Any, text_or_tokens: Any, path: str | Path) -> Hooks:
    """`[(hook_name, function)]` that subtracts one detached path from the last stream of one input.

    The vector is a source carried through the frozen linear parts of the path's steps (`tl_jets.core.frozen_network`).
    Other paths stay as they were; only the final norm responds.

    Args:
        model: A `TransformerBridge`, a `HookedTransformer`, or a `ResidualNetwork` of one, whose granularity says what
            steps are; for a model, those that the path names.
        text_or_tokens: The input of the hooks: a prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        path: `embed > 0_attn > 3_mlp`, its steps in the order of the network.

    Raises:
        ValueError: Unknown source or step, steps out of order, or `ln_final_bias`; when run, a stream of another shape.
        NotImplementedError: A network of plain callables; a model that cannot be frozen.

    Source: Golden, arXiv 2505.24293, section 3 (the frozen map); Elhage et al. 2021 (paths). Cost: freezing, once a
    trace, and one linear application per step.
    """
    hookable(model)
    network = network_of(model, (Path.parse(path) if isinstance(path, str) else path).steps)
    trace = trace_of(network, text_or_tokens)
    path, order = read_path(trace, path)
    frozen = FrozenNetwork.of(trace)
    if path.source not in frozen.sources:
        raise ValueError(f"A path starts at one of {some(frozen.sources)}; {path.source!r} is zero for this input.")
    with torch.no_grad():
        vector = frozen.sources[path.source][None]
        for stage, row in order:
            vector = frozen.writes(stage, vector)[row]

    def remove(stream: Tensor, hook: Any = None) -> Tensor:
        _check_shape(stream, vector[0], "without_path")
        return stream - vector[0].to(stream)

    last = max(step.layer for step in network.steps)
    return [(f"blocks.{last}.hook_resid_post", remove)]


def hookable(model: Any) -> ResidualNetwork:
    """The network of a model that has hooks."""
    network = ResidualNetwork.of(model)
    if isinstance(network.view, CallableModel):
        raise NotImplementedError(
            "Interventions are hooks on a TransformerLens model; a network of plain callables has none. Give it other "
            "functions: CallableModel(embed, stages, decoder)."
        )
    return network


@torch.no_grad()
def _writes(
    network: ResidualNetwork, source: Any, sites: list[Site]
) -> tuple[dict[Site, Float[Tensor, "batch pos *size"]], Bool[Tensor, "batch pos"]]:
    """The writes of an input at some sites, and which of its positions are real."""
    points = list({site.point for site in sites if site.part is not None})
    trace, mask, grabbed = None, None, {}
    if isinstance(source, Trace):
        trace = source.on(network)
        if points:  # heads and neurons are read off another run of its input
            trace.check_model()
        source, mask = trace.tokens, trace.recording.memo.get("attention_mask")
    if trace is None or points:
        run, grabbed = grabbing(network, points, lambda: network.trace(source, attention_mask=mask))
        trace = trace or run
    return {s: trace[s.write] if s.part is None else grabbed[s.point][:, :, s.part] for s in sites}, trace.valid


def _given(network: ResidualNetwork, source: Mapping[str, Tensor], sites: list[Site]) -> dict[Site, Tensor]:
    """Tensors given by the caller, by site."""
    found: dict[Site, Tensor] = {}
    for label, value in source.items():
        own = sites_of(network, label)
        if len(own) != 1 or own[0].part is not None:
            raise NotImplementedError(
                f"A tensor is the write of an attention or MLP sublayer; {label} is not one (a head's write spans d_head "
                f"dimensions, a neuron's one, a block is two writes). Give a prompt or a Trace as the source, or edit the "
                f"sublayer's."
            )
        if own[0] not in sites or own[0] in found:
            raise ValueError(
                f"Tensors are the writes of the steps to patch, {[site.write for site in sites]}, one for each; got another for "
                f"{label!r}. Name it among the steps, or leave its tensor out."
            )
        found[own[0]] = value
    shapes = {tuple(value.shape[:2]) for value in found.values()}
    d_model = network.decoder.d_model
    if any(value.ndim != 3 or value.shape[2] != d_model for value in found.values()) or len(shapes) > 1:
        raise ValueError(
            f"Writes must have shape [batch, pos, d_model = {d_model}], all the same; got "
            f"{[tuple(value.shape) for value in found.values()]}."
        )
    missing = [site.write for site in sites if site not in found]
    if missing:
        raise ValueError(
            f"Every step to patch needs its write; nothing was given for {some(missing)}. One tensor serves one step: "
            f"pass {{step: tensor}} for several."
        )
    return found


def _hook(site: Site, new: Callable[[Tensor], Tensor]) -> tuple[str, Callable[..., Tensor]]:
    def edit(write: Tensor, hook: Any = None) -> Tensor:
        # A copy of its own, laid out as the model's: hooks that come later may write to it.
        edited, part = write.clone(), slice(None) if site.part is None else site.part
        edited[:, :, part] = new(write[:, :, part])
        return edited

    return site.point, edit


def _constant(site: Site, value: Tensor) -> tuple[str, Callable[..., Tensor]]:
    return _hook(site, lambda write: value.to(write).expand_as(write))


def _resampled(site: Site, values: Tensor, seed: int) -> tuple[str, Callable[..., Tensor]]:
    def new(write: Tensor) -> Tensor:
        _check_shape(write[:1], values[:1], "resample")
        # The same rows at every site: a prompt's writes come from one reference prompt.
        rows = torch.randint(len(values), (len(write),), generator=torch.Generator().manual_seed(seed), device="cpu")
        return values[rows.to(values.device)].to(write)

    return _hook(site, new)


def _patched(site: Site, values: Tensor, where: Tensor) -> tuple[str, Callable[..., Tensor]]:
    def new(write: Tensor) -> Tensor:
        _check_shape(write, values if len(values) > 1 else values.expand(len(write), *values.shape[1:]), "patch")
        chosen = where.view(*where.shape, *[1] * (write.ndim - 2)).to(write.device)
        return torch.where(chosen, values.to(write), write)

    return _hook(site, new)


def _check_shape(write: Tensor, values: Tensor, what: str) -> None:
    if write.shape != values.shape:
        raise ValueError(
            f"{what} needs an input of the shape of what it writes, [batch, pos, size] = {tuple(values.shape)}; got "
            f"{tuple(write.shape)}. Use the hooks on an input of that batch and length, without a key-value cache."
        )
