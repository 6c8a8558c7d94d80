"""tinydocs: a small language model that comes with tl-jets, so that examples, tests and first steps need no download.

A Llama-style decoder of 2 million parameters (4 layers, 4 heads, `d_model` 128, 4096 byte-level tokens, 256 positions) that
was trained on the prose of the documentation of Python 3.11 and of PostgreSQL 15. `tinydocs/MODEL_CARD.md` says how, on what,
under which licences, and how good it is; `demos/tinydocs/train.py` trains it again.

Example:
    >>> import tl_jets.pretrained
    >>> model = tl_jets.pretrained.load_tinydocs()
    >>> logits = model("If the file does not exist, an error is")
    >>> model.tokenizer.decode(logits[0, -1].argmax())
    ' reported'
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from tl_jets.loading import load_model

TINYDOCS = Path(__file__).parent / "tinydocs"


def load_tinydocs(
    *, model_class: Literal["bridge", "hooked"] = "bridge", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The model that comes with tl-jets, in evaluation mode, with its tokenizer; nothing is downloaded.

    It knows the prose of Python's and PostgreSQL's documentation, and nothing else. Its weights are stored in float16.

    Args:
        model_class: `"bridge"` for a `TransformerBridge`, `"hooked"` for a `HookedTransformer` (TransformerLens 3 only).
            Both have the weights as trained, without processing, and the same logits.
        device: Where to put it.
        dtype: Its precision.

    Returns:
        A `TransformerBridge` or `HookedTransformer`.

    Raises:
        ValueError: `model_class` is neither of the two.
        ImportError: `"hooked"` was asked of a TransformerLens that has no `HookedTransformer`.

    Example:
        >>> model = load_tinydocs()
        >>> model.to_str_tokens("Return the number of bytes.")
        ['<s>', 'Return', ' the', ' number', ' of', ' bytes', '.']
    """
    if model_class not in ("bridge", "hooked"):
        raise ValueError(f'model_class must be "bridge" or "hooked"; got {model_class!r}; leave it out for a bridge')
    with _no_progress_bar():
        if model_class == "bridge":
            return load_model(str(TINYDOCS), device=device, dtype=dtype)
        return _hooked(device, dtype)


def _hooked(device: str, dtype: torch.dtype) -> Any:
    lens: Any = importlib.import_module("transformer_lens")  # what it has depends on its version
    try:
        build, configure = lens.HookedTransformer, lens.HookedTransformerConfig
    except ImportError as error:  # which is what the attribute raises in TransformerLens 4
        raise ImportError(
            'model_class="hooked" needs a TransformerLens that has HookedTransformer (3.x); installed is '
            f'{version("transformer_lens")}; use model_class="bridge", or install "transformer_lens>=3.9,<4"'
        ) from error
    import transformers

    conversions: Any = importlib.import_module("transformer_lens.pretrained.weight_conversions")
    original = transformers.LlamaForCausalLM.from_pretrained(TINYDOCS, dtype=dtype)
    given: Any = original.config
    d_head = given.hidden_size // given.num_attention_heads
    cfg = configure(  # HookedTransformer.from_pretrained loads the names that it knows, and no directory
        model_name=TINYDOCS.name,
        original_architecture="LlamaForCausalLM",
        n_layers=given.num_hidden_layers,
        d_model=given.hidden_size,
        d_head=d_head,
        n_heads=given.num_attention_heads,
        d_mlp=given.intermediate_size,
        d_vocab=given.vocab_size,
        n_ctx=given.max_position_embeddings,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=given.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_base=given.rope_parameters["rope_theta"],
        init_weights=False,
        device=device,
        dtype=dtype,
    )
    with warnings.catch_warnings():  # that TransformerLens 4 has no such class: who asks for it by name knows
        warnings.simplefilter("ignore", DeprecationWarning)
        model = build(cfg, transformers.AutoTokenizer.from_pretrained(TINYDOCS), move_to_device=False)
    model.load_and_process_state_dict(
        conversions.convert_llama_weights(original, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    model.move_model_modules_to_device()
    return model.eval()


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Two megabytes need no progress bar; the user's own setting comes back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
