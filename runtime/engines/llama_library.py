"""llama.cpp's C functions: those of llama-cpp-python, or else of the binary wheel xllamacpp."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import platform
import sys
from ctypes import POINTER
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..base.errors import MissingExtraError, UsageError, install_command

PACKAGES = {"llama_cpp": "llama-cpp-python", "xllamacpp": "xllamacpp"}
"""Module -> its distribution. The first installed one is used."""

BINARY_VERSION = "2026.10.11549"
"""Release of xllamacpp, with llama.cpp b11549, whose structures and functions follow."""

BATCH = """
int n_tokens
ints token
floats embd
ints pos n_seq_id
ints* seq_id
chars logits
"""
"""struct llama_batch: in each line a type and the names of fields."""

MODEL_PARAMETERS = """
address devices tensor_buft_overrides
int n_gpu_layers split_mode load_mode lazy_mode main_gpu
address tensor_split progress_callback progress_callback_user_data kv_overrides
bool vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp
"""
"""struct llama_model_params"""

CONTEXT_PARAMETERS = """
uint n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq
int n_threads n_threads_batch ctx_type rope_scaling_type pooling_type attention_type flash_attn_type
float rope_freq_base rope_freq_scale yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow
uint yarn_orig_ctx
float defrag_thold
address cb_eval cb_eval_user_data
int type_k type_v
size moe_cache_size
address abort_callback abort_callback_data
bool embeddings offload_kqv no_perf op_offload swa_full kv_unified
address samplers
size n_samplers
address ctx_other
"""
"""struct llama_context_params"""

FUNCTIONS = """
text() ggml_version llama_print_system_info
model_params() llama_model_default_params
context_params() llama_context_default_params
address(text,model_params) llama_model_load_from_file
address(address,context_params) llama_init_from_model
void(address,address) llama_log_set
void(address) llama_free llama_model_free
void(address,int,int) llama_set_n_threads
void(address,abort_callback,address) llama_set_abort_callback
address(address) llama_get_memory llama_model_get_vocab
bool(address) llama_model_is_hybrid llama_model_is_recurrent llama_vocab_get_add_bos
int(address) llama_model_n_ctx_train llama_model_n_embd llama_model_n_layer
int(address) llama_vocab_bos llama_vocab_eos llama_vocab_n_tokens
uint(address) llama_n_ctx
text(address,text) llama_model_chat_template
int(address,text,text,size) llama_model_meta_val_str
int(address,text,int,address,int,bool,bool) llama_tokenize
int(address,int,text,int,int,bool) llama_token_to_piece
int(address,int) llama_vocab_get_attr llama_memory_seq_pos_max
bool(address,int) llama_vocab_is_eog
bool(address,int,int,int) llama_memory_seq_rm
void(address,int,int,int,int) llama_memory_seq_cp
size(address) llama_model_n_params llama_state_get_size
size(address,address,size) llama_state_get_data llama_state_set_data
size(address,int) llama_state_seq_get_size
size(address,address,size,int) llama_state_seq_get_data llama_state_seq_set_data
batch(int,int,int) llama_batch_init
void(batch) llama_batch_free
int(address,batch) llama_decode
floats(address,int) llama_get_embeddings_ith llama_get_logits_ith
"""
"""In each line the types of result and arguments, and the functions that have them."""


def c_types() -> dict[str, Any]:
    """Return {name in the tables above: ctypes type}."""
    ints = POINTER(ctypes.c_int32)
    types: dict[str, Any] = {
        "void": None,
        "address": ctypes.c_void_p,
        "abort_callback": ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p),
        "bool": ctypes.c_bool,
        "chars": POINTER(ctypes.c_int8),
        "float": ctypes.c_float,
        "floats": POINTER(ctypes.c_float),
        "int": ctypes.c_int32,
        "ints": ints,
        "ints*": POINTER(ints),
        "size": ctypes.c_size_t,
        "text": ctypes.c_char_p,
        "uint": ctypes.c_uint32,
    }
    structures = {"batch": BATCH, "model_params": MODEL_PARAMETERS, "context_params": CONTEXT_PARAMETERS}
    for name, text in structures.items():
        rows = (line.split() for line in text.strip().splitlines())
        fields = [(field, types[kind]) for kind, *names in rows for field in names]
        types[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return types


def llama_package() -> str:
    """Return the distribution whose llama.cpp is used, llama-cpp-python if none is installed."""
    return next((PACKAGES[name] for name in PACKAGES if importlib.util.find_spec(name)), PACKAGES["llama_cpp"])


CPUINFO = Path("/proc/cpuinfo")


def lacks_avx2(machine: str, cpuinfo: Path) -> bool:
    """Return True on an x86 CPU on Linux without AVX2, which the wheel of xllamacpp is compiled for."""
    return machine == "x86_64" and cpuinfo.is_file() and "avx2" not in cpuinfo.read_text(errors="replace").split()


@functools.cache
def load_llama() -> Any:
    """Return an object with llama.cpp's functions as attributes. Raise MissingExtraError if it is not installed."""
    if importlib.util.find_spec("llama_cpp"):
        import llama_cpp

        return llama_cpp
    package = importlib.util.find_spec("xllamacpp")
    if package is None or sys.platform == "win32":  # the wheel for Windows exports no function of llama.cpp
        raise MissingExtraError("llama.cpp", "gguf" if sys.platform == "win32" else "gguf-binary")
    installed = importlib.metadata.version("xllamacpp")
    if installed != BINARY_VERSION:  # another llama.cpp has other structures, which ctypes does not notice
        command = install_command("gguf-binary")
        raise UsageError(f"xllamacpp {installed} is installed, not {BINARY_VERSION}; run: {command}")
    if lacks_avx2(platform.machine(), CPUINFO):
        raise UsageError(f"xllamacpp needs AVX2, which this CPU lacks; run: {install_command('gguf')}")
    path = next(Path(str(package.origin)).parent.glob("xllamacpp*.so"), None)
    if path is None:
        command = install_command("gguf-binary").replace("install", "install --force-reinstall", 1)
        raise UsageError(f"xllamacpp is installed without its library; run: {command}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        system = "install libgomp, such as by apt install libgomp1, or " if "libgomp" in str(error) else ""
        raise UsageError(f"xllamacpp cannot be loaded: {error}; {system}run: {install_command('gguf')}") from error
    types = c_types()
    functions = {}
    for signature, *names in (line.split() for line in FUNCTIONS.strip().splitlines()):
        result, _, arguments = signature.rstrip(")").partition("(")
        for name in names:
            functions[name] = getattr(library, name)
            functions[name].restype = types[result]
            functions[name].argtypes = [types[each] for each in arguments.split(",") if each]
    return SimpleNamespace(**functions, llama_token=types["int"], ggml_abort_callback=types["abort_callback"])
