"""A CUDA device without a GPU: tensors whose device is cuda:0 and whose values are computed on the CPU.

Code under `fake_cuda()` sees one GPU. An operation on tensors of several devices fails as on a GPU. Every
wait of the host for the device is counted. Neither numerics nor the memory of a GPU are imitated.
"""

# ruff: noqa: E402  # the guard is loaded before torch

from __future__ import annotations

import collections
import contextlib
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock


def _load_guard() -> None:
    """Compile and load the guard of the device, without which autograd refuses its tensors. Call it before torch."""
    assert "torch" not in sys.modules, "import fake_cuda before torch"
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "cuda_guard.so"
        options = ["-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
        options += [f"-Wl,-rpath,{root / 'lib'}", str(Path(__file__).with_name("cuda_guard.cpp")), "-o", str(library)]
        subprocess.run(["g++", *options, "-lc10", "-ltorch_cpu"], check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


_load_guard()

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")

MOVES = (aten._to_copy.default, aten.copy_.default, aten._pin_memory.default, aten.is_pinned.default)
"""Operations on tensors of several devices."""
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
"""Operations that take CPU indices."""


class CudaTensor(Tensor):
    """A tensor on cuda:0. `values_held` has its values on the CPU."""

    values_held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> CudaTensor:
        made: Any = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=CUDA,
        )  # fmt: skip
        made.values_held = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert Device.current is not None, "fake_cuda() has ended"
        return Device.current.run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: CudaTensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.values_held = value.values_held

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = CudaTensor(self.values_held.clone()).requires_grad_(self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(copied) if isinstance(self, torch.nn.Parameter) else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values_held.__reduce_ex__(protocol)

    def untyped_storage(self) -> Any:
        return self.values_held.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"cuda:{self.values_held!r}"


class Device(TorchDispatchMode):
    """The device, with counts of waits."""

    current: Device | None = None

    def __init__(self) -> None:
        super().__init__()
        self.syncs: collections.Counter[str] = collections.Counter()
        """Waits of the host, by operation and line of the product."""

    def __enter__(self) -> Any:
        Device.current = self
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(values, device="cuda") then copies from the CPU
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Device.current = None
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation on the device of its tensors, or the one it names."""
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        on_device = [each for each in tensors if isinstance(each, CudaTensor)]
        if func in MOVES:
            return self._move(func, args, kwargs)
        if on_device:
            self._check(func, args, tensors)
        wanted = torch.device(kwargs.get("device") or (CUDA if on_device else CPU))
        if wanted.type != "cuda":
            return func(*args, **kwargs)
        if "device" in kwargs:
            kwargs = kwargs | {"device": CPU}
        owners = {id(each.values_held): each for each in on_device}
        found = self._compute(func, tree_map(_unwrap, args), tree_map(_unwrap, kwargs))
        return tree_map(lambda each: _wrap(each, owners), found)

    def _check(self, func: Any, args: Any, tensors: list[Tensor]) -> None:
        """Raise RuntimeError for an operation on tensors of both devices, as on a GPU."""
        if func in INDEXED:
            tensors = [args[0], *(each for each in args[2:] if isinstance(each, Tensor))]
        others = [each for each in tensors if not isinstance(each, CudaTensor) and each.dim()]
        if others or not isinstance(tensors[0], CudaTensor):
            raise RuntimeError(f"{func}: expected all tensors on the same device, found cuda:0 and cpu")

    def _move(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Copy between devices. A copy to or from pageable memory makes the host wait."""
        if func is aten.is_pinned.default:
            return getattr(args[0], "is_on_pinned_pages", False)
        if func is aten._pin_memory.default:
            pinned = args[0].clone()
            pinned.is_on_pinned_pages = True
            return pinned
        source = args[1] if func is aten.copy_.default else args[0]
        is_from = isinstance(source, CudaTensor)
        if func is aten.copy_.default:
            is_to = isinstance(args[0], CudaTensor)
        else:
            device = kwargs.get("device")
            is_to = is_from if device is None else torch.device(device).type == "cuda"
        is_async = kwargs.get("non_blocking", False) and getattr(source, "is_on_pinned_pages", False)
        if is_from != is_to and not is_async:
            self.syncs[f"copy to {'cuda' if is_to else 'cpu'}: {_caller()}"] += 1
        inner = source.values_held if is_from else source
        if func is aten.copy_.default:
            (args[0].values_held if is_to else args[0]).copy_(inner)
            found: Any = args[0]
        else:
            if is_from != is_to:
                kwargs = kwargs | {"device": inner.device if is_to else kwargs["device"]}
                kwargs.pop("pin_memory", None)
            else:
                kwargs = {name: value for name, value in kwargs.items() if name != "device"} if is_to else kwargs
            copied = func(inner, **kwargs)
            if copied is inner:
                copied = inner.clone()
            found = CudaTensor(copied) if is_to else copied
        return found

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation on unwrapped tensors."""
        is_masked = func in INDEXED and any(each is not None and each.dtype == torch.bool for each in args[1])
        if func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default) or is_masked:
            self.syncs[f"{func.overloadpacket.__name__}: {_caller()}"] += 1
        if func is aten.addmm.dtype_out:  # only GPUs have it
            return kwargs["out"].add_(args[1].float() @ args[2].float())
        return func(*args, **kwargs)


def _unwrap(value: Any) -> Any:
    return value.values_held if isinstance(value, CudaTensor) else value


def _wrap(value: Any, owners: dict[int, CudaTensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    return owners[id(value)] if id(value) in owners else CudaTensor(value)


def _caller() -> str:
    """Return the innermost line of the product that led here."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        _, is_product, place = frame.f_code.co_filename.rpartition("/train/")
        if is_product and "site-packages" not in frame.f_code.co_filename:
            return f"{place}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"


def _load(real: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch.load with a map_location of cuda."""

    def load(file: Any, map_location: Any = None, **options: Any) -> Any:
        found = real(file, map_location=CPU, **options)
        is_moved = map_location is not None and torch.device(map_location).type == "cuda"
        return (
            tree_map(lambda each: CudaTensor(each) if isinstance(each, Tensor) else each, found) if is_moved else found
        )

    return load


@contextlib.contextmanager
def fake_cuda() -> Iterator[Device]:
    """Provide one CUDA device in this block, which is for a process of its own."""
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied parameters stay tied
    stubs: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_name": lambda *_: "a GPU that is not there",
        "mem_get_info": lambda *_: (80 << 30, 80 << 30),
        "synchronize": lambda *_: None,
        "max_memory_allocated": lambda *_: 0,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "get_rng_state_all": lambda: [],
    }
    with contextlib.ExitStack() as stack:
        for name, stub in stubs.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        amp = torch.cuda.amp.common
        stack.enter_context(mock.patch.object(amp, "amp_definitely_not_available", return_value=False))
        stack.enter_context(mock.patch.object(torch, "load", _load(torch.load)))
        serial = filesystem._SerialCpuLoader  # the other one copies on a stream of its own
        stack.enter_context(mock.patch.object(filesystem, "_OverlappingCpuLoader", lambda read, **_: serial(read)))
        yield stack.enter_context(Device())
