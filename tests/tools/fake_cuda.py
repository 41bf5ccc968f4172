"""A CUDA device without a GPU: tensors whose device is cuda:0 and whose values are computed on the CPU.

Code under `fake_cuda()` sees one GPU. An operation on tensors of several devices fails as on a GPU. Every kernel and
every wait of the host for the device is counted, with a lower bound of the device's time on an H100. With
`has_values=False`, tensors have shapes only, and a step of a large model takes seconds. Neither numerics nor the memory
of a GPU are imitated.
"""

# ruff: noqa: E402  # the guard is loaded before torch

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
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
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")

MOVES = (aten._to_copy.default, aten.copy_.default, aten._pin_memory.default, aten.is_pinned.default)
"""Operations on tensors of several devices."""
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
"""Operations that take CPU indices."""
GATHERED = (aten.embedding.default, aten.gather.default, aten.index_select.default, aten.index.Tensor)
"""Operations that read as much as they write."""

FLOPS_PER_SECOND = 0.75 * 989e12
"""bf16 matrix products of an H100, at three quarters of the peak."""
BYTES_PER_SECOND = 0.8 * 3.35e12
"""Memory of an H100, at four fifths of the peak."""
KERNEL_SECONDS = 3e-6
"""Least duration of a kernel."""


class CudaTensor(Tensor):
    """A tensor on cuda:0. `values_held` has its values on the CPU, or only its shape on the meta device."""

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
    """The device, with counts of its work."""

    current: Device | None = None

    def __init__(self, has_values: bool) -> None:
        super().__init__()
        self.has_values = has_values
        self.syncs: collections.Counter[str] = collections.Counter()
        """Waits of the host, by operation and line of the product."""
        self.kernels = 0
        self.phase = "layers"
        self.seconds: dict[str, float] = collections.defaultdict(float)
        """Lower bound of the device's time by phase."""

    def clear(self) -> None:
        """Start counting again."""
        self.syncs.clear()
        self.seconds.clear()
        self.kernels = 0

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Attribute the work in this block to `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

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
            kwargs = kwargs | {"device": CPU if self.has_values else "meta"}
        owners = {id(each.values_held): each for each in on_device}
        unwrap = functools.partial(_unwrap, has_values=self.has_values)
        inner_args, inner_kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
        found = self._compute(func, inner_args, inner_kwargs)
        self._count(func, inner_args, inner_kwargs, found)
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
        if is_from != is_to and source.device.type != "meta" and not is_async:
            self.syncs[f"copy to {'cuda' if is_to else 'cpu'}: {_caller()}"] += 1
        inner = source.values_held if is_from else source
        if is_to and not self.has_values:
            inner = inner.to("meta")
        elif not is_to and inner.device.type == "meta" and kwargs.get("device") != torch.device("meta"):
            inner = torch.ones(inner.shape, dtype=inner.dtype)
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
        if is_to:
            self._count(func, (inner,), {}, getattr(found, "values_held", found))
        return found

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation on unwrapped tensors."""
        shape = None if self.has_values else SHAPES_ONLY.get(func)
        is_masked = func in INDEXED and any(each is not None and each.dtype == torch.bool for each in args[1])
        if func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default) or is_masked:
            self.syncs[f"{func.overloadpacket.__name__}: {_caller()}"] += 1
        if is_masked and not self.has_values:  # every element counts as selected
            each_index = [torch.empty(each.numel(), dtype=torch.int64, device="meta")
                          if each is not None and each.dtype == torch.bool else each for each in args[1]]  # fmt: skip
            args = (args[0], each_index, *args[2:])
        if func is aten.addmm.dtype_out:  # only GPUs have it
            return kwargs["out"].add_(args[1].float() @ args[2].float())
        return func(*args, **kwargs) if shape is None else shape(*args, **kwargs)

    def _count(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        """Count an operation as one kernel and add its least duration."""
        if func.is_view or func in UNCOUNTED or self.phase == UNCOUNTED_PHASE:
            return
        self.kernels += 1
        read, written = _bytes((args, kwargs)), _bytes(found)
        if found is None:  # it changes all its tensors in place: the fused AdamW all but the gradient
            written = read if func is not aten._fused_adamw_.default else 3 * read // 4
        if func in GATHERED:
            read = written
        elif func is aten.scatter_add_.default:
            read = written = 2 * args[3].numel() * args[3].element_size()
        if func is aten.addmm.dtype_out:
            flops = flop_registry[aten.mm](*args[1:3], out_val=found)
            read -= _bytes(kwargs)  # it is args[0]
        else:
            formula = flop_registry.get(func.overloadpacket)
            flops = formula(*args, **kwargs, out_val=found) if formula is not None else 0
        self.add(read + written, flops)

    def add(self, num_bytes: int, flops: int = 0) -> None:
        """Add the least duration of a kernel that moves that many bytes."""
        bound = max(flops / FLOPS_PER_SECOND, num_bytes / BYTES_PER_SECOND, KERNEL_SECONDS)
        is_head = self.phase == "loss" and flops > 0
        self.seconds["head" if is_head else self.phase] += bound


UNCOUNTED_PHASE = "uncounted"

UNCOUNTED = (aten.detach.default, aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default)
UNCOUNTED += (aten._unsafe_view.default, aten.new_empty.default, aten.new_empty_strided.default, aten.alias.default)
"""Operations without a kernel that torch does not call views."""

SHAPES_ONLY: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: lambda each: 1.0 if each.is_floating_point() else 1,
    aten.equal.default: lambda *_: False,
    aten.nonzero.default: lambda each: torch.empty(each.numel(), each.dim(), dtype=torch.int64, device="meta"),
}
"""Results that depend on values: all elements are one, and none is zero."""


def _unwrap(value: Any, has_values: bool) -> Any:
    if isinstance(value, CudaTensor):
        return value.values_held
    if isinstance(value, Tensor) and not has_values and value.device.type == "cpu":
        return value.to("meta")
    return value


def _bytes(values: Any) -> int:
    return sum(each.numel() * each.element_size() for each in tree_leaves(values) if isinstance(each, Tensor))


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


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, is_causal: bool = False, **options: Any
) -> Tensor:
    """Return scaled_dot_product_attention, whose choice of a kernel would ask for a GPU."""
    assert attn_mask is None
    repeats = query.shape[1] // key.shape[1]
    key, value = (each[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for each in (key, value))
    scale = options.get("scale")
    return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)[0]


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
def fake_cuda(has_values: bool = True) -> Iterator[Device]:
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
        if not has_values:
            functional = torch.nn.functional
            stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", _flash_attention))
        yield stack.enter_context(Device(has_values))
