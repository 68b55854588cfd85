"""A second device where there is none: tensors that count as lying on a GPU.

`Pretended` is a mode in which "cuda" is a device. Its tensors lie on the CPU and carry a mark. Every function
of PyTorch passes the mode: what is made of marked tensors is marked, and a function that is given marked and
unmarked ones fails as it would on a machine with a GPU. Numbers are those of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda")
CPU = torch.device("cpu")

MOVES = ("to", "cpu", "cuda")
TAKEN_ANYWHERE = ("copy_", "__getitem__")  # another device's numbers; an index that lies on the CPU
ON_CPU_ONLY = ("numpy", "__array__", "data_ptr", "untyped_storage")


class Mixed(RuntimeError):
    """Tensors of two devices met in one function."""


class Pretended(TorchFunctionMode):
    """While it is entered, "cuda" is a device. `there` and `here`: what was called on it, and on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.there: set[str] = set()
        self.here: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        if name == "__get__" and getattr(func, "__self__", None) is torch.Tensor.device:
            return GPU if _marked(args[0]) else CPU
        if name in MOVES and isinstance(args[0], Tensor):
            return _moved(func, name, args, given)
        away = self._device(name, args, given)
        if torch.device(given.get("device") or CPU) == GPU:
            away, given["device"] = True, CPU
        (self.there if away else self.here).add(name)
        made = func(*args, **given)
        if not away:
            return made
        return _mark(iter(args[0].unbind(0)) if name == "__iter__" else made)

    def _device(self, name: str, args: tuple[Any, ...], given: Mapping[str, Any]) -> bool:
        """Whether the function works on the pretended device. Raises `Mixed`."""
        held = list(_tensors((args, given)))
        away = any(_marked(x) for x in held)
        if not away:
            return False
        if name in ON_CPU_ONLY:
            raise Mixed(f"{name} of a tensor on the GPU")
        if any(isinstance(x, torch.Generator) for x in (*args, *given.values())):
            raise Mixed(f"{name} on the GPU draws from a generator of the CPU")
        if name in TAKEN_ANYWHERE and (name == "copy_" or _marked(held[0])):
            return _marked(held[0])
        here = [list(x.shape) for x in held if not _marked(x) and x.dim()]
        if here:
            raise Mixed(f"{name} is given tensors on the GPU and {here} on the CPU")
        return True


def _moved(func: Callable[..., Any], name: str, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """What was asked for, as a copy where the device is another."""
    source = args[0]
    asked = [given.pop("device", None), *(x for x in args[1:] if isinstance(x, str | torch.device))]
    wanted = next((torch.device(x) for x in asked if x is not None), None)
    others = [x for x in args[1:] if not isinstance(x, str | torch.device)]
    if name != "to":
        wanted = torch.device(name)
    like = next((x for x in others if isinstance(x, Tensor)), None)
    away = _marked(source) if wanted is None else wanted == GPU
    if like is not None:
        away = _marked(like)
    made: Tensor = source.to(*others, **given) if others or given else source
    if away != _marked(source) and made is source:
        made = source.clone()
    return _mark(made) if away else made


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, list | tuple):
        for each in held:
            yield from _tensors(each)
    elif isinstance(held, dict):
        yield from _tensors(list(held.values()))


def _marked(tensor: Tensor) -> bool:
    return getattr(tensor, "on_gpu", False)


def _mark(made: Any) -> Any:
    """All tensors in it."""
    if isinstance(made, Iterator):
        return iter([_mark(each) for each in made])
    for tensor in _tensors(made):
        tensor.on_gpu = True  # type: ignore[attr-defined]
    return made
