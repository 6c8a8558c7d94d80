"""`Result`: base of what analyses return, tensors with labels that move, save and load together; `load`.

A result is a frozen dataclass whose fields hold tensors, text, numbers, DataFrames, other results, and lists, tuples and
dicts of these. So it can be copied, pickled, moved to a device, and saved to one safetensors file. What belongs to a running
model is a `handle`, which is neither pickled nor saved.

Example:
    >>> import tempfile
    >>> import tl_jets as tj
    >>> measures = tj.iterative_jet_lens(tj.load_tinydocs(), "This function is available on Unix and").measures
    >>> moved = measures.to("meta")
    >>> moved.kl.device, measures.kl.device
    (device(type='meta'), device(type='cpu'))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     loaded = tj.load(measures.save(f"{folder}/measures.safetensors"))
    >>> torch.equal(loaded.kl.nan_to_num(), measures.kl.nan_to_num())
    True
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import field, fields, is_dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from tl_jets.core.atomic_files import write_atomically
from tl_jets.core.notebook import Shown

Kind = TypeVar("Kind", bound="Result")

FORMAT = 1
# Files of other kinds, by their first bytes: the module and the class that load them.
OTHER_FILES = {b"PAR1": ("tl_jets.ngrams.tables", "NgramTable")}


class _UnknownError(Exception):
    """An intact file holds something that this version does not know."""


def handle() -> Any:
    """A field for what belongs to the running model (a decoder, say): neither saved nor moved; None in a loaded result."""
    return field(default=None, repr=False, compare=False, metadata={"handle": True})


class Result(Shown):
    """Base of frozen dataclasses of tensors, labels, options, or other results."""

    def to(self: Kind, device: torch.device | str | int) -> Kind:
        """A copy on another device; raises TypeError for a dtype."""
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"`to` takes a device; got the dtype {device}. Convert the tensor that you need: result.kl.double()."
            )
        return self._mapped(lambda values: values.to(device))

    def save(self, file: str | Path) -> Path:
        """Save to one safetensors file, which `tl_jets.load` reads. Returns the path.

        The file is written completely or not at all; an existing one is replaced.

        Raises:
            OSError: The file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        about = {"format": FORMAT, "tl_jets": version("tl-jets"), "result": _encoded(self, "result", tensors)}
        header = {"tl_jets": json.dumps(about)}
        header["digest"] = _digest(header["tl_jets"], tensors)
        data = to_bytes(tensors or {"": torch.zeros(0, device="cpu")}, metadata=header)
        return write_atomically(file, lambda stream: stream.write(data))

    def __getstate__(self) -> dict[str, Any]:
        """What `pickle` takes: everything but handles."""
        dropped = {f.name: None for f in fields(self) if f.metadata.get("handle")}  # type: ignore[arg-type]
        return {**self.__dict__, **dropped}

    def __copy__(self: Kind) -> Kind:
        return replace(self)  # type: ignore[type-var]

    def __deepcopy__(self: Kind, memo: dict[int, Any]) -> Kind:
        """A copy of the data; handles are shared."""
        return replace(self, **{f.name: deepcopy(getattr(self, f.name), memo) for f in _saved_fields(self)})  # type: ignore[type-var]

    def _mapped(self: Kind, change: Callable[[Tensor], Tensor], names: Iterable[str] | None = None) -> Kind:
        """A copy with `change` applied to every tensor, or to those of the named fields."""
        wanted = [f.name for f in _saved_fields(self)] if names is None else names
        return replace(self, **{name: _changed(getattr(self, name), change) for name in wanted})  # type: ignore[type-var]


def load(file: str | Path) -> Any:
    """The result, or the `NgramTable`, that was saved to a file.

    Args:
        file: What `Result.save` or `NgramTable.save` wrote.

    Raises:
        ValueError: The file is damaged, of another program, or holds what this version does not know.
        OSError: The file cannot be read.

    Example: in the docstring of `tl_jets.core.results`.
    """
    data = Path(file).read_bytes()
    if data[:4] in OTHER_FILES:
        module, name = OTHER_FILES[data[:4]]
        return getattr(import_module(module), name).load(file)
    about: dict[str, Any] = {}
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        tensors = from_bytes(data)
        tensors.pop("", None)
        if "tl_jets" not in header:
            raise ValueError("a safetensors file of another program, without tl-jets metadata")
        if header["digest"] != _digest(header["tl_jets"], tensors):
            raise ValueError("its digest is not that of what it holds")
        about = json.loads(header["tl_jets"])
        if about["format"] != FORMAT:
            raise _UnknownError(f"its format {about['format']}")
        return _decoded(about["result"], tensors)
    except _UnknownError as error:
        raise ValueError(
            f"{str(file)!r} was written by tl-jets {about['tl_jets']}; this is {version('tl-jets')}, which does not know "
            f"{error}. Update tl-jets."
        ) from error
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, ImportError, RecursionError) as error:
        raise ValueError(
            f"`load` reads what `save` of a result wrote; {str(file)!r} is something else, or damaged ({error})."
        ) from error


def _saved_fields(result: Any) -> list[Any]:
    return [f for f in fields(result) if not f.metadata.get("handle")]


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A field's value with `change` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Result):
        return value._mapped(change)
    if isinstance(value, Mapping):
        return {key: _changed(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_changed(item, change) for item in value)
    return value


def _encoded(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; tensors and tables are put into `tensors` under their names."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | pd.DataFrame):
        kind = "tensor" if isinstance(value, Tensor) else "table"
        tensors[name] = value.detach().cpu().clone().contiguous() if isinstance(value, Tensor) else _table_bytes(value)
        return {kind: name}
    if isinstance(value, Result) and is_dataclass(value):  # before mappings: some results are both
        own = {f.name: _encoded(getattr(value, f.name), f"{name}.{f.name}", tensors) for f in _saved_fields(value)}
        return {"result": [type(value).__module__, type(value).__qualname__], "fields": own}
    if isinstance(value, Mapping):
        return {
            "dict": [
                [_encoded(key, name, tensors), _encoded(item, f"{name}[{key}]", tensors)] for key, item in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        items = [_encoded(item, f"{name}[{i}]", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(
        f"A result is saved if it holds tensors, text, numbers and tables; {name} is a {type(value).__name__}."
    )


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `_encoded` wrote."""
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "table" in value:
        return pd.read_parquet(io.BytesIO(tensors[value["table"]].numpy().tobytes()))
    if "dict" in value:
        return {_decoded(key, tensors): _decoded(item, tensors) for key, item in value["dict"]}
    if "tuple" in value:
        return tuple(_decoded(item, tensors) for item in value["tuple"])
    module, name = value["result"]
    kind = _kind(module, name)
    given = value["fields"]
    unknown = sorted(given.keys() - {f.name for f in _saved_fields(kind)})
    if unknown:
        raise _UnknownError(f"the fields {unknown} of its {name}")
    return kind(**{key: _decoded(item, tensors) for key, item in given.items()})


def _kind(module: str, name: str) -> Any:
    """The class of a result; raises ValueError for one that is not of tl_jets."""
    kind = None
    if module.startswith("tl_jets."):
        try:
            kind = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise _UnknownError(f"its kind of result, {module}.{name}") from error
    if not (isinstance(kind, type) and issubclass(kind, Result)):
        raise ValueError(f"{module}.{name} is no result of tl-jets")
    return kind


def _table_bytes(table: pd.DataFrame) -> Tensor:
    """A DataFrame as the bytes of a Parquet file."""
    stream = io.BytesIO()
    table.to_parquet(stream)
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)


def _digest(about: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the JSON and of every tensor, in the order of names."""
    total = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        values = tensors[name]
        total.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        total.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
