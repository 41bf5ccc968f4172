"""Data parallelism under torchrun: DDP, and FSDP2 for models that do not fit. Both survive physical removal.

Every rank sees the same global sequence of windows and takes its own rows. Gradients are averaged, so every rank
computes the same saliency and removes the same groups.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ...runtime.base.errors import DataError, EfficientLLMError

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=1)
"""Longest time that ranks wait for the main one, which hashes, samples, measures or writes alone. A rank that ends
breaks its connections, and the others do not wait for it."""


def without_sync(callee: nn.Module, condition: bool) -> contextlib.AbstractContextManager[None]:
    """Return a context in which ranks do not average gradients, if `condition` holds.

    FSDP then keeps whole gradients on every rank. The next backward pass that averages adds them to its own.
    """
    if isinstance(callee, FSDPModule):
        callee.set_requires_gradient_sync(not condition)
    elif condition and isinstance(callee, DistributedDataParallel):
        return callee.no_sync()
    return contextlib.nullcontext()


FAILURE = "efficientllm/failure"
"""Key of the error of the first rank that failed, in the store of the process group."""


class Parallel:
    """Rank of this process among the others, or a single rank without torchrun."""

    def __init__(self, mode: str, device: torch.device, offload: bool = False, reduces_once: bool = False) -> None:
        """Join the process group of torchrun's environment (gloo on CPUs, nccl on GPUs).

        `offload` keeps FSDP's shards, gradients and optimizer state in host memory. `reduces_once` lets FSDP average
        the gradients of a step once, as DDP does.
        """
        started_by_torchrun = "WORLD_SIZE" in os.environ
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.mode = mode if started_by_torchrun else "none"
        self.offload, self.reduces_once = offload, reduces_once
        self.device = device
        if device.type == "cuda" and device.index is None:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if started_by_torchrun and not dist.is_initialized():
            # both on a GPU: with --offload, shards and their gradients lie in host memory
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        self.patient_group: Any = None
        """Process group of the host for objects, flags and barriers. Its calls never wait for a GPU."""
        if self.world_size > 1:
            self.patient_group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)

    @property
    def is_main(self) -> bool:
        """Return True for the rank that writes and prints."""
        return self.rank == 0

    def own_rows(self, windows: Any) -> Any:
        """Return this rank's share [B, ...] of the global batch [world_size * B, ...]."""
        size = len(windows) // self.world_size
        return windows[self.rank * size : (self.rank + 1) * size]

    def wrap(self, loss: Any) -> nn.Module:
        """Return the callable of a step: DDP around a TrainingLoss, or FSDP2 on every decoder layer and the rest.

        FSDP2 sends the weights of layers in the type of products, to which autocast would round those of matrices
        anyway. Gains of norms are rounded as well. Gradients are averaged in fp32.
        """
        if self.mode == "ddp":
            return DistributedDataParallel(loss)
        if self.mode == "fsdp":
            options: dict[str, Any] = {}
            if self.offload:
                options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            # without casts of inputs the residual stream stays fp32
            policy = MixedPrecisionPolicy(param_dtype=loss.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            # the layers first: the call for the whole then takes the parameters that no layer has
            for layer in loss.model.model.layers:
                fully_shard(layer, mp_policy=policy, **options)
            fully_shard(loss, **options)
        return loss

    def mean(self, value: float) -> float:
        """Return the mean over ranks. Collective, as every method below except `close`."""
        return self.means([value])[0]

    def means(self, values: Sequence[float]) -> list[float]:
        """Return the means of several values over ranks."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.patient_group)
        return (tensor / self.world_size).tolist()

    def mean_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Average tensors over ranks, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)  # a sum: gloo has no average
                tensor /= self.world_size

    def of_all(self, tensor: Tensor) -> Tensor:
        """Return [world_size * n, ...]: the tensors [n, ...] of all ranks."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on any rank."""
        return self.mean(float(flag)) > 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier(group=self.patient_group)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.patient_group)
        return values

    def together(self, work: Callable[[], T], only_main: bool = False) -> T:
        """Return the result of `work`, which makes no collective calls.

        An error of one rank is raised on all of them, so none waits for a rank that failed. If `only_main`, the main
        rank works and the others get a copy of its result.
        """
        if self.world_size == 1:
            return work()
        result: Any = None
        error: Exception | None = None
        # Only errors that users can correct are exchanged. Any other ends its rank, and torchrun then ends the rest.
        try:
            result = work() if self.is_main or not only_main else None
        except (EfficientLLMError, OSError) as raised:
            error = raised
        if self.any(error is not None):
            texts = self.gather(str(error) if error is not None else None)
            rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
            if isinstance(error, EfficientLLMError) and rank == self.rank:
                raise error
            raise DataError(f"rank {rank}: {text}" if rank else str(text)) from error
        return self.gather(result)[0] if only_main else result

    @property
    def storage_device(self) -> torch.device:
        """Return the device of parameters between uses."""
        return torch.device("cpu") if self.offload else self.device

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Leave the process group after the block."""
        try:
            yield
        except BaseException as error:
            # by the store of the group, because the connections between the ranks are broken by now
            if self.world_size > 1:
                self._share_failure(error)
            raise
        finally:
            self.close()

    def _share_failure(self, error: BaseException) -> None:
        """Store an error that users can correct. Raises the stored one of another rank if `error` follows from it."""
        text = ""
        with contextlib.suppress(RuntimeError):  # the rank that held the store has ended
            store = dist.distributed_c10d._get_default_store()
            if isinstance(error, EfficientLLMError | OSError):
                store.set(FAILURE, f"rank {self.rank}: {error}" if self.rank else str(error))
            elif not isinstance(error, KeyboardInterrupt | SystemExit) and store.check([FAILURE]):
                text = store.get(FAILURE).decode()
        if text:
            raise EfficientLLMError(text) from error

    def close(self) -> None:
        """Leave the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()


MeanOverRanks = Callable[[Iterable[Tensor]], None]
"""Average tensors over ranks, in place."""


def single_rank(tensors: Iterable[Tensor]) -> None:
    """Do nothing: the mean over a single rank."""


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor of a shard (a collective call). A plain tensor is returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in its own memory. A plain tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def scatter(parameter: Any, value: Tensor) -> None:
    """Fill a parameter, or this rank's shard of it, from the whole tensor."""
    if isinstance(parameter, DTensor):
        sharded: Any = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        local(parameter).copy_(local(sharded))
    else:
        parameter.copy_(value)


def first_row(tensor: DTensor) -> int:
    """Return the number of rows before this rank's part of a tensor that FSDP2 shards by rows."""
    # FSDP2 gives each rank ceil(rows / ranks) rows, and the last ones what remains
    rows_of_rank = -(-tensor.shape[0] // tensor.device_mesh.size())
    return tensor.device_mesh.get_local_rank() * rows_of_rank


def fill(parameter: Tensor, value: Tensor) -> None:
    """Fill a parameter, or this rank's shard of it, from the whole tensor, of which only these rows are read."""
    own = local(parameter.detach())
    start = first_row(parameter) if isinstance(parameter, DTensor) else 0
    own.copy_(value[start : start + len(own)])


@contextlib.contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Give these modules whole weights in this block, without those of the layers within (a collective call).

    Changes of these weights are lost. Modules that FSDP does not shard have whole weights anyway.
    """
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    try:
        for module in sharded:
            module.unshard()
        yield
    finally:
        for module in sharded:
            module.reshard()


def reshard(module: nn.Module) -> None:
    """Free the whole weights that a forward pass without a backward one leaves in FSDP's root."""
    if isinstance(module, FSDPModule):
        module.reshard()
