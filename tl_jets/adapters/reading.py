"""Reads the norms and hooks of a TransformerLens model, and whether jets support it.

Names and forms of norms' parameters differ between versions and architectures. So every candidate is tried, and the one
that reproduces the module on random input is kept.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from tl_jets.calculus import Norm, full_precision
from tl_jets.core.changes import is_random
from tl_jets.core.protocol import some

_HALF = (torch.float16, torch.bfloat16)
_EPS_NAMES = ("eps", "variance_epsilon", "layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")
_QUANTIZED = ("quantization_config", "quantization_method", "load_in_4bit", "load_in_8bit")
_BLOCK_PARTS = {"_original_component", "attn", "ln1", "ln1_post", "ln2", "ln2_post", "mlp"}


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a model's jets: float32 for half-precision models, else the model's own."""
    return torch.float32 if dtype in _HALF else dtype


def read_norm(module: Any, cfg: Any, d_model: int, device: torch.device, dtype: torch.dtype) -> Norm:
    """The norm that a module computes, on the module's device (`device` if it has no parameters).

    Raises:
        ValueError: A user's hook is active inside the module.
        NotImplementedError: No LayerNorm or RMSNorm with the module's parameters reproduces it.
    """
    if module is None:
        return Norm("none")
    hooked = [name for name, point in module.named_modules() if getattr(point, "fwd_hooks", None)]
    if hooked:
        raise ValueError(
            f"A norm is read with no hooks inside it; hooks are active on {hooked}. Build the ResidualNetwork before "
            f"entering `model.hooks(...)` and pass it instead of the model."
        )
    own = next(module.parameters(), None)
    device = device if own is None else own.device
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, 2, d_model, generator=generator, dtype=torch.float64, device="cpu") + 0.3
    sizes = torch.tensor([1e-3, 0.1, 1.0, 30.0], dtype=torch.float64, device="cpu")
    probe = (probe * sizes[:, None, None]).to(device, dtype)
    with torch.no_grad(), full_precision():
        wanted = module(probe)
    if not bool(wanted.isfinite().all()):
        raise ValueError(
            f"A norm must give finite numbers; {type(module).__name__} gives NaN or infinity. Look at its weights, which were "
            f"changed or not loaded."
        )
    best, best_error = Norm("none"), float("inf")
    for candidate in _norm_candidates(module, cfg, dtype):
        with torch.no_grad():
            error = float(((candidate(probe) - wanted).abs() / wanted.abs().amax(-1, keepdim=True)).max())
        if error < best_error:
            best, best_error = candidate, error
    if not best_error < 1000 * torch.finfo(dtype).eps:
        raise NotImplementedError(
            f"Norms must be LayerNorm, RMSNorm or absent; {type(module).__name__} matches none of them with its own "
            f"parameters (best relative error {best_error:.1e}). Please report the architecture."
        )
    return best


def _norm_candidates(module: Any, cfg: Any, dtype: torch.dtype) -> list[Norm]:
    sources = [module, getattr(module, "original_component", None)]

    def tensors(*names: str) -> list[Tensor]:
        found = (getattr(source, name, None) for source in sources for name in names)
        return [value.detach().to(dtype) for value in found if isinstance(value, Tensor)]

    weights = [None, *(weight for own in tensors("w", "weight") for weight in (own, own + 1))]
    numbers = (getattr(source, name, None) for source, name in product([*sources, cfg], _EPS_NAMES))
    epsilons = dict.fromkeys(float(value) for value in numbers if isinstance(value, float | int | Tensor))
    options = product(("RMS", "LN"), weights, [None, *tensors("b", "bias")], epsilons)
    return [Norm("none"), *(Norm(kind, weight=weight, bias=bias, eps=eps) for kind, weight, bias, eps in options)]


def refuse_unsupported(model: Any) -> None:
    """Raise NotImplementedError for encoders, models without blocks or with a quantized unembedding.

    Raises ValueError for a model in training mode.
    """
    name = type(model).__name__
    modules: Any = getattr(model, "_modules", {})
    if _option(model, "is_encoder_decoder") or "encoder_blocks" in modules or "mlm_head" in modules:
        raise NotImplementedError(f"Decoder-only models are supported; {name} holds an encoder or encoder-decoder.")
    if not len(getattr(model, "blocks", ())):
        raise NotImplementedError(f"A model must be a sequence of blocks, `model.blocks`; {name} has none.")
    decoder = [modules[part] for part in ("ln_final", "unembed") if part in modules]
    reason = next(filter(None, map(_quantization, decoder)), None)
    if reason:
        raise NotImplementedError(
            f"The final norm and the unembedding must be in floating point, for every tool reads them; {name} has {reason}. "
            f"Leave them out of the quantization."
        )
    refuse_training(model)


def strange_parts(block: Any) -> list[str]:
    """Names of a block's parts beyond attention, an MLP and their norms; `["no attention"]` if it has none of them."""
    parts = set(block._modules)
    strange = sorted(name for name in parts - _BLOCK_PARTS if not name.startswith("hook_"))
    return strange or ([] if "attn" in parts else ["no attention"])


def unreplayable(model: Any, layer: int, *which: str) -> str | None:
    """Why a block, or its `"attn"` or `"mlp"`, cannot be replayed, frozen or split; None if it can."""
    block = model.blocks[layer]
    strange = strange_parts(block)
    if strange:
        return f"its block holds {', '.join(strange)} beside attention and MLP, so that it is one write, seen from outside only"
    for part in which or ("attn", "mlp"):
        modules = [block._modules[part]] if part in block._modules else []
        names = {name.rpartition(".")[2] for module in modules for name, _ in module.named_modules()}
        if names & {"experts", "router"}:
            return "it routes tokens to experts (mixture of experts), and the choice of experts is not differentiable"
        reason = next(filter(None, map(_quantization, modules)), None)
        if reason is None and _option(model, *_QUANTIZED):
            reason = "quantized weights (the configuration says so)"
        if reason:
            return f"it has {reason}, and jets need floating-point arithmetic: load the model in float32"
    return None


def _quantization(module: torch.nn.Module) -> str | None:
    from transformer_lens.utilities.quantization import unreadable_weight_reason

    reasons = (unreadable_weight_reason(parameter) for parameter in module.parameters())
    reason = next((reason for reason in reasons if reason is not None), None)
    return reason and f"quantized weights ({reason})"


def refuse_training(model: Any) -> None:
    """Raise ValueError if modules are in training mode, whose dropout makes results random."""
    if model.training:
        raise ValueError("The model must be in evaluation mode (dropout off); it is training. Call model.eval().")
    roots = [(f"blocks.{layer}", block) for layer, block in enumerate(getattr(model, "blocks", []))]
    roots += [("", part) for part in (model, getattr(model, "original_model", None)) if part is not None]
    training: dict[int, str] = {}
    for prefix, root in roots:
        for name, module in root.named_modules(prefix=prefix):
            if is_random(module):
                training.setdefault(id(module), name.replace("._original_component", ""))
    names = dict.fromkeys(training.values())
    if names:
        highest = [name for name in names if name.rpartition(".")[0] not in names]
        raise ValueError(
            f"The model must be in evaluation mode (dropout off); {some(highest)} in it is training. Call model.eval()."
        )


def _option(model: Any, *names: str) -> Any:
    """The first of some configuration options that is set, in TransformerLens' or Hugging Face's configuration."""
    sources = (model.cfg, getattr(getattr(model, "original_model", None), "config", None))
    found = (getattr(source, name, None) for source in sources for name in names)
    return next((value for value in found if value), None)
