"""Two devices that are not there: tensors carry the name of one, and operations that mix them fail, as they would on CUDA."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

DEVICES = torch.device("cuda", 0), torch.device("cuda", 1)
CPU = torch.device("cpu")
_MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}
_INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


class TwoDevices(TorchFunctionMode):
    """Inside, tensors are on the device that they were put on or made on, in name; without a name, on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names = WeakTensorKeyDictionary()
        self.operations = {device: 0 for device in DEVICES}

    def put(self, module: torch.nn.Module, device: torch.device) -> None:
        """Parameters and buffers of a module on a device."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.names[tensor] = device

    def device(self, tensor: torch.Tensor) -> torch.device:
        return self.names.get(tensor, CPU)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:  # made anew at every access
            return self.device(args[0])
        if func is torch.Tensor.numpy and self.device(args[0]) != CPU:
            raise RuntimeError(f"{self.device(args[0])} tensor to numpy")
        if func in _MOVES:
            return self._move(func, args, kwargs)
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        wanted = kwargs.pop("device", None)
        if func is torch.Tensor.copy_:
            found = self.device(args[0])
        else:
            indexed = func in _INDEXING
            placed = {self.device(x) for x in tensors if not (self.device(x) == CPU and (x.dim() == 0 or indexed))}
            if len(placed) > 1:
                shapes = [(str(self.device(x)), tuple(x.shape)) for x in tensors]
                raise RuntimeError(f"{getattr(func, '__name__', func)} mixes devices: {shapes}")
            found = placed.pop() if placed else CPU
        if wanted is not None:
            found = torch.device(wanted)
        if found in self.operations:
            self.operations[found] += 1
        out = func(*args, **kwargs)
        return tree_map(lambda x: self._named(x, found, tensors), out)

    def _named(self, value: Any, device: torch.device, inputs: list[torch.Tensor]) -> Any:
        if isinstance(value, torch.Tensor) and device != CPU and not any(value is x for x in inputs):
            self.names[value] = device
        return value

    def _move(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        source = args[0]
        device = CPU if func is torch.Tensor.cpu else kwargs.pop("device", None)
        rest = []
        for argument in args[1:]:
            if isinstance(argument, torch.Tensor):
                device = self.device(argument)
                rest.append(argument.dtype)
            elif isinstance(argument, (torch.device, str)):
                device = torch.device(argument)
            elif argument is not None:
                rest.append(argument)
        device = self.device(source) if device is None else torch.device(device)
        out = torch.Tensor.to(source, *rest, **kwargs) if rest or kwargs else source
        if device != self.device(source) and out is source:
            out = source.clone()
        if out is not source:
            self.names[out] = device
        return out


class DefaultDevice(TwoDevices):
    """Two devices, of which the second is `torch.set_default_device` of what the library makes without saying where."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _device_constructors() and kwargs.get("device") is None and _is_called_by_the_library():
            kwargs["device"] = DEVICES[1]
        if kwargs.get("generator") is not None and torch.device(kwargs.get("device") or CPU) != CPU:
            raise RuntimeError("a generator of another device")
        if func is torch.as_tensor and isinstance(args[0], torch.Tensor) and kwargs.get("device") is not None:
            return self._move(torch.Tensor.to, (args[0], kwargs.get("dtype")), {"device": kwargs["device"]})
        return super().__torch_function__(func, types, args, kwargs)


def _is_called_by_the_library() -> bool:
    frame = sys._getframe(2)
    while frame.f_back is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    return "/tl_jets/" in frame.f_code.co_filename


def spread(mode: TwoDevices, model: Any) -> None:
    """Embeddings and the first half of the blocks on one device, the other half and the decoder on the other.

    A `TransformerBridge` is spread as accelerate does it, whose hooks take inputs to the device of the module of
    transformers that is called; a `HookedTransformer` moves its stream itself.
    """
    blocks = list(model.blocks)
    mode.put(model, DEVICES[1])
    for part in (model.embed, *(getattr(model, name) for name in ("pos_embed",) if hasattr(model, name))):
        mode.put(part, DEVICES[0])
    tied = mode.device(next(model.unembed.parameters()))
    mode.put(model.unembed, tied)
    for index, block in enumerate(blocks):
        mode.put(block, DEVICES[2 * index // len(blocks)])
    model.cfg.n_devices = 2
    if not hasattr(model, "original_model"):
        model.cfg.device = "cuda"
        return
    for module in model.modules():
        parameter = next(module.parameters(), None)
        if parameter is not None and type(module).__module__.startswith(("transformers.", "torch.")):
            device = mode.device(parameter)
            module.register_forward_pre_hook(_taker(device), with_kwargs=True, prepend=True)


def _taker(device: torch.device) -> Any:
    def take(module: Any, args: Any, kwargs: Any) -> Any:
        return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, (args, kwargs))

    return take
