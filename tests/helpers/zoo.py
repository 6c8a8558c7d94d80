"""Tiny random models of every family, built offline in memory, to test against.

Every parameter is random (biases and norm gains too) and large enough for softmax, activations and norms to be far from
linear, so that a formula that holds only at initialisation fails here. Sizes are pairwise distinct; windows and soft
caps are small enough to bite within seven tokens. Models come in float64, in eval mode, with frozen parameters, in one
of two worlds: ``hooked`` (HookedTransformer, TransformerLens 3 only) or ``bridge`` (TransformerBridge). The families
with a Hugging Face checkpoint have the same weights in both for the same seed.

``processing`` is ``"raw"`` (the checkpoint's own weights) or ``"processed"``: ``load_and_process_state_dict`` with what
the family allows, or ``enable_compatibility_mode()``.

Example::

    @pytest.mark.parametrize("spec", zoo.available(), ids=str)
    def test_something(spec):
        model = zoo.build(spec)  # cached: leave it as it was found, or take zoo.fresh(spec)
        logits = model(zoo.tokens(model))
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing here may touch the network

import tokenizers
import torch
import transformers
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from tl_jets.core.tokens import token_names

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens import loading_from_pretrained as loading
except ImportError:  # TransformerLens 4 removed it
    HookedTransformer = None

World = Literal["bridge", "hooked"]
Processing = Literal["raw", "processed"]

MAJOR = int(version("transformer_lens").split(".")[0])
D_VOCAB, N_CTX, N_HEADS, N_KV_HEADS, D_MLP = 61, 32, 4, 2, 52


@dataclass(frozen=True, order=True)
class ModelSpec:
    """One buildable model: a family in one world, with or without weight processing."""

    name: str
    world: World
    processing: Processing

    def __str__(self) -> str:
        return f"{self.world}-{self.name}-{self.processing}"


# --- families with a Hugging Face checkpoint ------------------------------------------------------------------------

_GPT = {
    "vocab_size": D_VOCAB,
    "n_positions": N_CTX,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": N_HEADS,
    "n_inner": D_MLP,
}
_LLAMA = {
    "vocab_size": D_VOCAB,
    "hidden_size": 24,
    "intermediate_size": D_MLP,
    "num_hidden_layers": 2,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_KV_HEADS,
    "max_position_embeddings": N_CTX,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 200.0}}
_EPS = {"rms_norm_eps": 1e-3}  # large enough that forgetting it shows
_GEMMA = _LLAMA | _EPS | {"head_dim": 6, "tie_word_embeddings": True}

HF_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        _GPT | {"n_ctx": N_CTX, "layer_norm_epsilon": 1e-3},
    ),  # TransformerLens 3 reads n_ctx
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": D_VOCAB,
            "hidden_size": 24,
            "num_layers": 2,
            "num_heads": N_HEADS,
            "intermediate_size": D_MLP,
            "max_position_embeddings": N_CTX,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
    ),
    "pythia": (  # TransformerLens 3 reads no rope_theta here: left at its default
        "GPTNeoXConfig",
        {
            "vocab_size": D_VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": N_HEADS,
            "intermediate_size": D_MLP,
            "max_position_embeddings": N_CTX,
            "layer_norm_eps": 1e-3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gptj": ("GPTJConfig", _GPT | {"n_embd": 32, "rotary_dim": 4}),
    "llama": ("LlamaConfig", _LLAMA | _ROPE | _EPS | {"num_hidden_layers": 3}),
    "mistral": ("MistralConfig", _LLAMA | _ROPE | _EPS | {"head_dim": 6, "sliding_window": 4}),
    "qwen3": ("Qwen3Config", _LLAMA | _ROPE | _EPS | {"head_dim": 8}),
    # TransformerLens 3 converts OLMo and OLMo-2 without grouped-query attention only.
    "olmo": (
        "OlmoConfig",
        _LLAMA | _ROPE | {"hidden_size": 32, "num_key_value_heads": N_HEADS, "clip_qkv": 1.5},
    ),
    "olmo2": ("Olmo2Config", _LLAMA | _ROPE | _EPS | {"num_key_value_heads": N_HEADS}),
    "gemma2": (
        "Gemma2Config",
        _GEMMA
        | _ROPE
        | {
            "query_pre_attn_scalar": 9,
            "sliding_window": 4,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma1": ("GemmaConfig", _GEMMA | _ROPE),
    "gemma3": (  # its two kinds of layer have rotary bases of their own
        "Gemma3TextConfig",
        _GEMMA
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 9,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen2": ("Qwen2Config", _LLAMA | _ROPE | _EPS),
    "phi3": ("Phi3Config", _LLAMA | _ROPE | _EPS),
    # Grouped-query attention with value biases crashes in fold_value_biases (TransformerLens 3.9 and 4.3).
    "phi": (
        "PhiConfig",
        _LLAMA
        | {
            "hidden_size": 32,
            "num_key_value_heads": N_HEADS,
            "layer_norm_eps": 1e-3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 200.0, "partial_rotary_factor": 0.5},
        },
    ),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": D_VOCAB,
            "hidden_size": 24,
            "ffn_dim": D_MLP,
            "num_hidden_layers": 2,
            "num_attention_heads": N_HEADS,
            "max_position_embeddings": N_CTX,
            "word_embed_proj_dim": 24,
        },
    ),
    "bloom": ("BloomConfig", {"vocab_size": D_VOCAB, "hidden_size": 24, "n_layer": 2, "n_head": N_HEADS}),
    "cohere": ("CohereConfig", _LLAMA | _ROPE | {"layer_norm_eps": 1e-3, "logit_scale": 0.5}),
    "granite": (
        "GraniteConfig",
        _LLAMA
        | _ROPE
        | _EPS
        | {
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.6,
            "embedding_multiplier": 1.7,
            "logits_scaling": 1.4,
        },
    ),
}

# --- more families, raw and on the bridge only: `tests/adapters/test_families.py` runs every tool once on each ----------------

_LN = {"layer_norm_eps": 1e-3}
_HEAD = {"head_dim": 8}
_HALF_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 200.0, "partial_rotary_factor": 0.5}}
_LOCAL = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
_LATENT = {
    "num_key_value_heads": N_HEADS,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 6,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_RECURRENT = {"vocab_size": D_VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "StableLM": ("StableLmConfig", _LLAMA | _HALF_ROPE | _LN | {"hidden_size": 32, "use_qkv_bias": True}),
    "Falcon": (
        "FalconConfig",
        _RECURRENT
        | {"num_attention_heads": N_HEADS, "ffn_hidden_size": D_MLP, "alibi": False, "multi_query": True, "bias": True},
    ),
    "MPT": (
        "MptConfig",
        {"vocab_size": D_VOCAB, "d_model": 24, "n_layers": 2, "n_heads": N_HEADS, "max_seq_len": N_CTX},
    ),
    "StarCoder2": ("Starcoder2Config", _LLAMA | _ROPE | {"norm_epsilon": 1e-3, "use_bias": True, "sliding_window": 4}),
    "Cohere 2": ("Cohere2Config", _LLAMA | _ROPE | _LN | _HEAD | _LOCAL | {"logit_scale": 0.5}),
    "SmolLM3": ("SmolLM3Config", _LLAMA | _ROPE | _EPS | {"no_rope_layers": [1, 0]}),
    "OLMo 3": ("Olmo3Config", _LLAMA | _EPS | _LOCAL),
    "GLM": ("GlmConfig", _LLAMA | _HALF_ROPE | _EPS | _HEAD),
    "GLM-4": ("Glm4Config", _LLAMA | _HALF_ROPE | _EPS | _HEAD),
    "Nemotron": ("NemotronConfig", _LLAMA | _HALF_ROPE | _HEAD | {"norm_eps": 1e-3}),
    "Exaone 4": ("Exaone4Config", _LLAMA | _ROPE | _EPS | _LOCAL),
    "GPT-BigCode": ("GPTBigCodeConfig", _GPT | {"multi_query": True}),
    "Arcee": ("ArceeConfig", _LLAMA | _ROPE | _EPS),
    "Ernie 4.5": ("Ernie4_5Config", _LLAMA | _ROPE | _EPS | {"use_bias": True, "head_dim": 6}),
    "HunYuan": ("HunYuanDenseV1Config", _LLAMA | _ROPE | _EPS | _HEAD),
    "Seed-OSS": (
        "SeedOssConfig",
        _LLAMA | _ROPE | _EPS | _HEAD | {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    ),
    "VaultGemma": (
        "VaultGemmaConfig",
        _GEMMA
        | _ROPE
        | _LOCAL
        | {"query_pre_attn_scalar": 9, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0},
    ),
    "NanoChat": ("NanoChatConfig", _LLAMA | _ROPE | _EPS | {"final_logit_softcapping": 5.0}),
}
# What some tools cannot do: routed experts, latent attention, linear attention, state spaces, MLPs that are no modules.
PARTLY: dict[str, tuple[str, dict[str, Any]]] = {
    "XGLM": (
        "XGLMConfig",
        {"vocab_size": D_VOCAB, "d_model": 24, "ffn_dim": D_MLP, "num_layers": 2, "attention_heads": N_HEADS}
        | {"max_position_embeddings": N_CTX, "pad_token_id": 0},
    ),
    "Mixtral": ("MixtralConfig", _LLAMA | _ROPE | _EPS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen 3 MoE": (
        "Qwen3MoeConfig",
        _LLAMA | _ROPE | _EPS | _HEAD | _EXPERTS | {"num_experts": 4, "mlp_only_layers": [0]},
    ),
    "Qwen 3 MoE without experts": (
        "Qwen3MoeConfig",
        _LLAMA | _ROPE | _EPS | _HEAD | _EXPERTS | {"num_experts": 0, "mlp_only_layers": [0, 1]},
    ),
    "GLM-4 MoE": (
        "Glm4MoeConfig",
        _LLAMA
        | _HALF_ROPE
        | _EPS
        | _HEAD
        | _EXPERTS
        | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "GPT-OSS": ("GptOssConfig", _LLAMA | _ROPE | _EPS | _HEAD | _LOCAL | {"num_local_experts": 4} | _EXPERTS),
    "DeepSeek 3": (
        "DeepseekV3Config",
        _LLAMA
        | _ROPE
        | _EPS
        | _LATENT
        | _EXPERTS
        | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "Youtu (latent attention)": ("YoutuConfig", _LLAMA | _ROPE | _EPS | _LATENT),
    "Apertus": ("ApertusConfig", _LLAMA | _EPS),
    "Qwen 3.5": ("Qwen3_5TextConfig", _LLAMA | _HALF_ROPE | _EPS | _HEAD | _DELTA),
    "Qwen 3 Next": (
        "Qwen3NextConfig",
        _LLAMA
        | _HALF_ROPE
        | _EPS
        | _HEAD
        | _DELTA
        | _EXPERTS
        | {"num_experts": 4, "shared_expert_intermediate_size": 28},
    ),
    "LFM2": ("Lfm2Config", _LLAMA | _ROPE | {"norm_eps": 1e-3, "layer_types": ["conv", "full_attention"]}),
    "Jamba": (
        "JambaConfig",
        _LLAMA
        | _EPS
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"num_experts": 4, "mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "Mamba": ("MambaConfig", _RECURRENT | {"state_size": 8}),
    "RecurrentGemma": (
        "RecurrentGemmaConfig",
        _GEMMA | {"lru_width": 24, "block_types": ["recurrent", "attention"], "attention_window_size": 4},
    ),
}

# What TransformerLens 3 cannot read from such a config by itself (it knows these families by name only).
_GATED_ROTARY = {
    "positional_embedding_type": "rotary",
    "rotary_base": 200.0,
    "gated_mlp": True,
    "act_fn": "silu",
}
_GEMMA_HOOKED = _GATED_ROTARY | {"normalization_type": "RMS", "act_fn": "gelu_pytorch_tanh"}
_GEMMA_2_3 = _GEMMA_HOOKED | {
    "use_normalization_before_and_after": True,
    "attn_scale": 3.0,
    "use_local_attn": True,
    "attn_types": ["local", "global"],
    "window_size": 4,
}
_BY_HAND: dict[str, dict[str, Any]] = {
    "olmo": _GATED_ROTARY | {"normalization_type": "LN", "clip_qkv": 1.5},
    "olmo2": _GATED_ROTARY | {"normalization_type": "RMS"},
    "gemma2": _GEMMA_2_3 | {"attn_scores_soft_cap": 4.0, "output_logits_soft_cap": 5.0},
    "gemma1": _GEMMA_HOOKED,
    "gemma3": _GEMMA_2_3 | {"use_qk_norm": True, "rotary_base": 1e6, "rotary_base_local": 1e4},
    "phi": _GATED_ROTARY
    | {
        "normalization_type": "LN",
        "gated_mlp": False,
        "act_fn": "gelu_new",
        "rotary_dim": 4,
        "parallel_attn_mlp": True,
    },
}
_POST_NORM = {"olmo2"}  # a norm after the sublayer cannot be folded into what comes after it


def hf_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A fresh Hugging Face model of the family, eager attention: the checkpoint that both worlds load."""
    class_name, options = (HF_CONFIGS | FAMILIES | PARTLY)[name]
    config = getattr(transformers, class_name)(**options)
    with torch.random.fork_rng(devices=[]), _quiet():
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.config.architectures = [type(model).__name__]  # how TransformerLens tells the family
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # the fused one knows no float64
    randomize(model, seed)
    return model.to(dtype).eval().requires_grad_(False)


def tokenizer() -> Any:
    """A whitespace tokenizer over the tiny vocabulary: ``"w5 w17"`` is ``[1, 5, 17]``; bos 1, eos (and padding) 2."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, D_VOCAB)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        name_or_path="tiny",  # TransformerLens reads these two, and would reload the tokenizer from the Hub
        add_bos_token=True,
    )


# --- variants of TransformerLens' own configuration -----------------------------------------------------------------

_OWN = {
    "d_model": 24,
    "d_head": 6,
    "n_heads": N_HEADS,
    "n_layers": 2,
    "n_ctx": N_CTX,
    "d_vocab": D_VOCAB,
    "d_mlp": D_MLP,
    "act_fn": "gelu_new",
    "eps": 1e-3,
}
OWN_CONFIGS: dict[str, dict[str, Any]] = {
    "attn_only": {"attn_only": True, "n_layers": 3},
    "no_norm": {"normalization_type": None},
    "ln_pre": {"normalization_type": "LNPre"},
    "rms_pre": {"normalization_type": "RMSPre"},
    "gated_rms": {
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "act_fn": "silu",
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "n_key_value_heads": N_KV_HEADS,
    },
    "solu_ln": {"act_fn": "solu_ln"},
    "softcap": {"attn_scores_soft_cap": 3.0, "output_logits_soft_cap": 4.0},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "parallel": {"parallel_attn_mlp": True},
    "sandwich": {"normalization_type": "RMS", "use_normalization_before_and_after": True},
}
# Switches that add hook points (and copies of the stream) to a family: name -> (family, setter).
FLAGGED: dict[str, tuple[str, str]] = {
    "gpt2_attn_result": ("gpt2", "set_use_attn_result"),
    "gpt2_attn_in": ("gpt2", "set_use_attn_in"),
    "llama_split_qkv": ("llama", "set_use_split_qkv_input"),
    "llama_mlp_in": ("llama", "set_use_hook_mlp_in"),
}
HOOKED_ONLY = {"shortformer", "parallel", "sandwich"}  # boot_native refuses them, or ignores them silently
BRIDGE_ONLY = {"cohere", "granite"}  # HookedTransformer has no such architecture

CORE = [
    "gpt2",
    "gpt_neo",
    "pythia",
    "gptj",
    "llama",
    "mistral",
    "qwen3",
    "olmo",
    "olmo2",
    "gemma2",
    "attn_only",
]
EXTRA = [name for name in (*HF_CONFIGS, *OWN_CONFIGS, *FLAGGED) if name not in CORE]

KNOWN_UNBUILDABLE: dict[tuple[int, ModelSpec], str] = {
    (3, ModelSpec("solu_ln", "bridge", "raw")): "boot_native knows gelu, gelu_new, relu, silu and swish only",
    (3, ModelSpec("solu_ln", "bridge", "processed")): "boot_native knows gelu, gelu_new, relu, silu and swish only",
}


# Left-padded batches: HF masks with finfo(float64).min, which a float32 softmax turns into NaN. Fine in float32.
_FINITE_MASK = ["gpt2", "gpt_neo", "pythia", "gptj", "phi3", *OWN_CONFIGS, "gpt2_attn_result", "gpt2_attn_in"]
NAN_UNDER_LEFT_PADDING = {
    ModelSpec(name, "bridge", "raw") for name in (*HF_CONFIGS, *FLAGGED) if name not in _FINITE_MASK
} | {ModelSpec("opt", "bridge", "processed")}

# Where TransformerLens is not the Hugging Face model it was made from. Still a model to take jets of.
NOT_THE_HF_MODEL: dict[tuple[int, ModelSpec], str] = {
    (3, ModelSpec("cohere", "bridge", processing)): "3.9 rotates halves where Cohere rotates adjacent pairs"
    for processing in ("raw", "processed")
}


def available(names: list[str] | None = None) -> list[ModelSpec]:
    """What the installed TransformerLens can build, of the named families (default: CORE, then EXTRA)."""
    worlds: list[World] = ["bridge"] if HookedTransformer is None else ["bridge", "hooked"]
    specs = [
        ModelSpec(name, world, processing)
        for name in (CORE + EXTRA if names is None else names)
        for world in worlds
        for processing in ("raw", "processed")
        if name not in (BRIDGE_ONLY if world == "hooked" else HOOKED_ONLY)
    ]
    return [spec for spec in specs if (MAJOR, spec) not in KNOWN_UNBUILDABLE]


# --- building -------------------------------------------------------------------------------------------------------


def fresh(spec: ModelSpec, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Build ``spec`` anew: for tests that change the model."""
    if spec.name in FLAGGED:
        family, setter = FLAGGED[spec.name]
        model = fresh(ModelSpec(family, spec.world, spec.processing), dtype, seed)
        getattr(model, setter)(True)
        return model
    with _quiet(), torch.random.fork_rng(devices=[]):
        if spec.world == "hooked":
            model = _hooked(spec, dtype, seed)
        else:
            model = _bridge(spec, dtype, seed)
            if spec.processing == "processed":
                model.enable_compatibility_mode(disable_warnings=True)
                # TransformerLens 3.9 adds float32 zero biases to GPT-Neo, GPT-J and Qwen-2, whose float64 forward
                # then raises.
                model.to(dtype)
    return model.eval().requires_grad_(False)


@functools.cache
def build(spec: ModelSpec, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """The model of ``spec``, shared by all tests of the process: hooks may come and go, weights stay."""
    return fresh(spec, dtype, seed)


def _bridge(spec: ModelSpec, dtype: torch.dtype, seed: int) -> Any:
    if spec.name in OWN_CONFIGS:
        options = _OWN | OWN_CONFIGS[spec.name]
        model = TransformerBridge.boot_native(options, tokenizer=tokenizer(), device="cpu", dtype=dtype)
        randomize(model.original_model, seed)
        return model
    hf = hf_model(spec.name, dtype, seed)
    return TransformerBridge.boot_transformers("tiny", hf_model=hf, tokenizer=tokenizer(), device="cpu", dtype=dtype)


def _hooked(spec: ModelSpec, dtype: torch.dtype, seed: int) -> Any:
    if spec.name in OWN_CONFIGS:
        cfg = HookedTransformerConfig(**_OWN | OWN_CONFIGS[spec.name], dtype=dtype, device="cpu")
        model = HookedTransformer(cfg, tokenizer(), move_to_device=False)
        randomize(model, seed)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    else:
        cfg, state = _convert(spec.name, hf_model(spec.name, dtype, seed), dtype)
        model = HookedTransformer(cfg, tokenizer(), move_to_device=False)
    _load(model, state, spec)
    return model


def _convert(name: str, hf: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """The TransformerLens 3 config and state dict of a Hugging Face model in memory."""
    given = hf.config
    # The loaders look the name up in the file system and guess families from the path: give them a neutral one.
    with tempfile.TemporaryDirectory(prefix="tiny_") as directory:
        if name in _BY_HAND:
            options = {
                "d_model": given.hidden_size,
                "d_head": getattr(given, "head_dim", None) or given.hidden_size // given.num_attention_heads,
                "n_heads": given.num_attention_heads,
                "n_layers": given.num_hidden_layers,
                "d_mlp": given.intermediate_size,
                "d_vocab": given.vocab_size,
                "n_ctx": given.max_position_embeddings,
                "eps": getattr(given, "rms_norm_eps", None) or getattr(given, "layer_norm_eps", 1e-5),
                "original_architecture": given.architectures[0],
                "init_weights": False,
                "device": "cpu",
                "dtype": dtype,
            }
            if given.num_key_value_heads != given.num_attention_heads:
                options["n_key_value_heads"] = given.num_key_value_heads
            cfg = HookedTransformerConfig(**options | _BY_HAND[name])
        else:
            given.save_pretrained(directory)
            cfg = loading.get_pretrained_model_config(
                directory, hf_cfg=given.to_dict(), fold_ln=False, device="cpu", dtype=dtype
            )
            cfg.tokenizer_name = None
            cfg.n_ctx = getattr(given, "max_position_embeddings", N_CTX)
            # TransformerLens 3 takes 4 d_model for granted in the GPT families.
            cfg.d_mlp = getattr(given, "n_inner", None) or getattr(given, "intermediate_size", None) or cfg.d_mlp
        return cfg, loading.get_pretrained_state_dict(directory, cfg, hf, dtype=dtype)


def _load(model: Any, state: dict[str, Tensor], spec: ModelSpec) -> None:
    """Load ``state``, processed as far as the family allows if the spec says so."""
    cfg = model.cfg
    process = spec.processing == "processed"
    shortformer = cfg.positional_embedding_type == "shortformer"  # adds positions after the norm
    model.load_and_process_state_dict(
        state,
        fold_ln=process and cfg.normalization_type in ("LN", "RMS") and not shortformer and spec.name not in _POST_NORM,
        center_writing_weights=process and cfg.normalization_type in ("LN", "LNPre") and not shortformer,
        center_unembed=process and cfg.output_logits_soft_cap <= 0,
        fold_value_biases=process,
    )


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> None:
    """Overwrite every parameter: gains 1 +- 0.3, biases +- 0.2, embeddings +- 0.6, matrices 1.3 / sqrt(fan-in)."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen:  # tied
                continue
            seen.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).clamp_(-2.0, 2.0)
            parameter.copy_(_scaled(noise, owner, name))


def _scaled(noise: Tensor, owner: nn.Module, name: str) -> Tensor:
    name = name.lstrip("_")
    if "bias" in name or name.startswith("b_") or name == "b":
        return 0.2 * noise
    if noise.ndim == 1:  # the gain of a norm; Gemma stores its difference from one
        return 0.3 * noise + (0.0 if type(owner).__name__.startswith("Gemma") else 1.0)
    if isinstance(owner, nn.Embedding) or name in ("W_E", "W_pos"):
        return 0.6 * noise
    if name == "W_O":  # [head, d_head, d_model]
        fan_in = noise.shape[0] * noise.shape[1]
    elif name.startswith("W_") or type(owner).__name__ == "Conv1D":  # [..., in, out]
        fan_in = noise.shape[-2]
    else:
        fan_in = noise.shape[-1]
    return 1.3 / math.sqrt(fan_in) * noise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the loaders say about tiny models: log records, warnings, prints and progress bars of this block."""
    loggers = [logging.getLogger(name) for name in (None, "transformers", "transformer_lens")]
    levels = [logger.level for logger in loggers]
    sink = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- inputs ---------------------------------------------------------------------------------------------------------


def tokens(model: Any, batch: int = 3, pos: int = 7, seed: int = 0) -> Tensor:
    """Random token ids, ``[batch, pos]``, of ordinary words (3 and up)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.cfg.d_vocab, (batch, pos), generator=generator).to(_device(model))


def padded(
    model: Any, lengths: tuple[int, ...] = (7, 4, 6), pad_token: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A left-padded batch of unequal lengths: ids and attention mask (1 = real), both ``[batch, pos]``."""
    ids = tokens(model, len(lengths), max(lengths), seed)
    start = max(lengths) - torch.tensor(lengths, device=ids.device)
    mask = torch.arange(max(lengths), device=ids.device)[None, :] >= start[:, None]
    return ids.masked_fill(~mask, pad_token), mask.long()


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


# --- one real model -------------------------------------------------------------------------------------------------


def _find_stories() -> Path | None:
    here = Path(__file__).resolve()
    for root in (here.parents[3] / "shared", here.parents[2] / "shared"):
        if (root / "models" / "stories260K" / "config.json").is_file():
            return root / "models" / "stories260K"
    return None


STORIES = _find_stories()


@functools.cache
def load_stories(world: World, dtype: torch.dtype = torch.float32, processing: Processing = "raw") -> Any:
    """The trained stories260K checkpoint with its tokenizer (cached). Needs ``STORIES``."""
    if STORIES is None:
        raise FileNotFoundError("stories260K is not beside this checkout (../shared/models/stories260K): skip the test")
    with _quiet():
        if world == "bridge":
            model = TransformerBridge.boot_transformers(str(STORIES), device="cpu", dtype=dtype)
            if processing == "processed":
                model.enable_compatibility_mode(disable_warnings=True)
        else:
            load = transformers.AutoModelForCausalLM.from_pretrained
            cfg, state = _convert("llama", load(STORIES, dtype=dtype, attn_implementation="eager").eval(), dtype)
            model = HookedTransformer(cfg, transformers.AutoTokenizer.from_pretrained(STORIES), move_to_device=False)
            _load(model, state, ModelSpec("llama", world, processing))
    return model.eval().requires_grad_(False)


def renamed_tokens(result: Any, tokenizer: Any) -> Any:
    """A result with the texts of another tokenizer; None for ids as texts."""
    every = torch.arange(D_VOCAB, device="cpu")
    return dataclasses.replace(result, token_names=token_names(tokenizer, [every]))


def text_of(lens: Any, token: int) -> str:
    """The text of a token in a lens."""
    return (lens.texts(torch.tensor(token)) if hasattr(lens, "texts") else lens.token_names)[token]
