"""What the engines say of how they were built: commits and instruction sets, for whoever compares figures."""

from __future__ import annotations

import ctypes


def _llama_cpp() -> str:
    import llama_cpp

    said = [llama_cpp.llama_print_system_info().decode().strip(" |")]
    for what in ("version", "commit"):
        # ggml says both itself, the Python package neither; builds of before 2025 do not
        ask = getattr(llama_cpp.llama_cpp._lib, f"ggml_{what}", None)
        if ask is not None:
            ask.restype = ctypes.c_char_p
            said.append(f"ggml {what} {ask().decode()}")
    return " | ".join(said)


def _onnxruntime() -> str:
    import onnxruntime

    return onnxruntime.get_build_info()


def _executorch() -> str:
    from executorch import version

    return f"commit {version.git_version}"


BUILDS = {"llama.cpp": _llama_cpp, "onnxruntime": _onnxruntime, "executorch": _executorch}


def engine_build(name: str) -> str:
    """Of an installed engine; "" of one that tells nothing (onnxruntime-genai, a plug-in's)."""
    return BUILDS[name]() if name in BUILDS else ""
