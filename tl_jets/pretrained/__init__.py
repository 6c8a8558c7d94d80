"""tinydocs and tinycode: small language models that come with tl-jets, for examples without a download.

Llama-style decoders of 2 million parameters (4 layers, 4 heads, `d_model` 128, 4096 byte-level tokens, 256 positions).
tinydocs was trained on the documentation of Python 3.11 and PostgreSQL 15; tinycode is tinydocs fine-tuned on Python
source, with the same vocabulary. `tinydocs/MODEL_CARD.md` and `tinycode/MODEL_CARD.md` give training, data, licenses
and quality; `demos/tinydocs/train.py` reproduces the models.

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

TINYDOCS, TINYCODE = (Path(__file__).parent / name for name in ("tinydocs", "tinycode"))

ModelClass = Literal["bridge", "hooked"]


def load_tinydocs(
    *, model_class: ModelClass = "bridge", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The model tinydocs in evaluation mode, with its tokenizer; its weights are stored in float16.

    Args:
        model_class: `"bridge"` for a `TransformerBridge`, `"hooked"` for a `HookedTransformer` (TransformerLens
            3 only). Both have unprocessed weights and the same logits.
        device: Device of the model.
        dtype: Precision of the model.

    Raises:
        ValueError: `model_class` is neither of the two.
        ImportError: `"hooked"` with a TransformerLens that has no `HookedTransformer`.

    Example:
        >>> model = load_tinydocs()
        >>> model.to_str_tokens("Return the number of bytes.")
        ['<s>', 'Return', ' the', ' number', ' of', ' bytes', '.']
    """
    return _load(TINYDOCS, model_class, device, dtype)


def load_tinycode(
    *, model_class: ModelClass = "bridge", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The model tinycode, tinydocs fine-tuned on Python's standard library. Options as in `load_tinydocs`.

    Example:
        >>> model = load_tinycode()
        >>> model.tokenizer.decode(model("    def __init__(")[0, -1].argmax())
        'self'
    """
    return _load(TINYCODE, model_class, device, dtype)


def load_model(name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A `TransformerBridge` in evaluation mode.

    Args:
        name: A local Hugging Face directory (works offline) or a model's name on the hub.
        device: Device of the model.
        dtype: Precision of the model.

    Raises:
        OSError: There is no such directory or model.
        ValueError: TransformerLens does not support the architecture.
    """
    from transformer_lens.model_bridge import TransformerBridge

    # A name on the hub is `model` or `owner/model`.
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).expanduser().exists()
    if looks_local and not (Path(name).expanduser() / "config.json").is_file():
        raise FileNotFoundError(f"a local model must be a directory with a config.json; got {name!r}, which is not")
    source = str(Path(name).expanduser()) if looks_local else name
    model = TransformerBridge.boot_transformers(source, device=device, dtype=dtype)
    model.eval()
    return model


def _load(folder: Path, model_class: str, device: str, dtype: torch.dtype) -> Any:
    if model_class not in ("bridge", "hooked"):
        raise ValueError(f'model_class must be "bridge" or "hooked"; got {model_class!r}; leave it out for a bridge')
    with _no_progress_bar():
        if model_class == "bridge":
            return load_model(str(folder), device=device, dtype=dtype)
        return _hooked(folder, device, dtype)


def _hooked(folder: Path, device: str, dtype: torch.dtype) -> Any:
    lens: Any = importlib.import_module("transformer_lens")  # its contents depend on the version
    try:
        build, configure = lens.HookedTransformer, lens.HookedTransformerConfig
    except ImportError as error:  # raised by the attribute in TransformerLens 4
        raise ImportError(
            'model_class="hooked" needs a TransformerLens that has HookedTransformer (3.x); installed is '
            f'{version("transformer_lens")}; use model_class="bridge", or install "transformer_lens>=3.9,<4"'
        ) from error
    import transformers

    conversions: Any = importlib.import_module("transformer_lens.pretrained.weight_conversions")
    original = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    given: Any = original.config
    d_head = given.hidden_size // given.num_attention_heads
    cfg = configure(  # HookedTransformer.from_pretrained loads known names only, not directories
        model_name=folder.name,
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
    with warnings.catch_warnings():  # the user asked for the deprecated class by name
        warnings.simplefilter("ignore", DeprecationWarning)
        model = build(cfg, transformers.AutoTokenizer.from_pretrained(folder), move_to_device=False)
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
    """Hide the progress bar of two megabytes, and restore the user's setting."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
