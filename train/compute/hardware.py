"""Hardware of a run: device, precision, threads, and the memory of its heap."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

import torch

from ...runtime.base.errors import UsageError
from ...runtime.engines.memory import memory_bytes, trim_heap


@dataclass(frozen=True)
class Hardware:
    """Device and precision of a run."""

    device: torch.device
    dtype: torch.dtype
    """Precision of matrix products."""
    reason: str
    """Reason of the precision, for the log."""

    def describe(self) -> str:
        """Return the device, its threads and the type of its products in one line."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return f"{name}{threads}, matrix products in {str(self.dtype).removeprefix('torch.')} ({self.reason})"


PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "4090": 165e12,
}
"""Dense bf16 FLOP/s of GPUs by a part of their name, from NVIDIA's data sheets."""


def peak_flops(device: torch.device) -> float | None:
    """Return the bf16 FLOP/s of a GPU, or None if it is unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def choose_hardware(device: str, dtype: str, threads: int) -> Hardware:
    """Resolve --device, --dtype and --threads. Raises UsageError for a missing device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= num_gpus:
        raise UsageError(f"--device {device}: this machine has {num_gpus} CUDA devices")
    if threads:
        torch.set_num_threads(threads)
    if chosen.type == "cpu":
        keep_freed_pages()
    if dtype != "auto":
        return Hardware(chosen, getattr(torch, dtype), "as asked")
    fast, reason = _bfloat16_support(chosen)
    return Hardware(chosen, torch.bfloat16 if fast else torch.float32, reason)


def _bfloat16_support(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return supported, "the GPU has bf16" if supported else "the GPU has no bf16"
    if torch.cpu._is_amx_tile_supported():
        return True, "the CPU has AMX"
    if not torch.cpu._is_avx512_bf16_supported():
        return False, "the CPU has neither AMX nor AVX512-BF16"
    # An Intel Xeon without AMX computes products at 142 GFLOP/s in bf16 and at 256 in fp32, because its AVX512-BF16
    # instruction is slow. On AMD's cores bf16 products are the faster ones.
    if str(torch.cpu.get_capabilities().get("cpu_name", "")).startswith("Intel"):
        return False, "Intel's AVX512-BF16 is slower than fp32"
    return True, "the CPU has AVX512-BF16"


def keep_freed_pages() -> None:
    """Tell glibc to keep freed memory instead of returning it to the kernel. Other systems do nothing.

    A training step frees and reallocates the same large tensors. Faulting their pages in again took a third of the step
    (1024 tokens of SmolLM2-135M on 2 cores: median 2.67 s with glibc's defaults, 1.89 s with this).
    """
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


class HeapWatch:
    """Trim the heap when a process with kept pages (`compute.hardware.keep_freed_pages`) grows.

    Small long-lived tensors fill holes of large tensors, which then find room only at the end of the heap: 58 MB more
    every few steps, 4.4 GB became 10 in 550 steps of SmolLM2-135M. Free memory returns to the kernel when the process
    holds GROWTH times its size after the last trim. The next step faults it in again.
    """

    GROWTH = 1.15

    def __init__(self) -> None:
        self._usual = 0
        """Resident bytes at the end of the first step after a trim. 0: unknown."""

    def reset(self) -> None:
        """Trim the heap and forget its usual size, as after a change of the model's widths."""
        trim_heap()
        self._usual = 0

    def trim_if_grown(self) -> bool:
        """Trim if needed at the end of a step, and tell whether memory was returned."""
        held = memory_bytes().get("rss_bytes", 0)  # Linux only
        self._usual = self._usual or held
        has_grown = held > self.GROWTH * self._usual
        if has_grown:
            self.reset()
        return has_grown
