"""Loading a TransformerLens model by name or from a local Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


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
