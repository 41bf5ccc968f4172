"""ExecuTorch's own `export_llm`: `python -m research.peers.export_llm CHECKPOINT FOLDER`.

Writes FOLDER/model.pte and the tokenizer, which `efficientllm-bench FOLDER/model.pte` measures: 8da4w with groups of
32, int8 embedding, XNNPACK, custom SDPA. The checkpoint must be a uniform Llama. export_llm reads Meta's names and
interleaved rotary layout, so the weights are renamed and the rows of q and k permuted first.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from efficientllm.export.checkpoint import Checkpoint, open_checkpoint
from efficientllm.export.manifest import copy_tokenizer, foreign_files
from efficientllm.runtime.base import flags
from efficientllm.runtime.base.child import run_python
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import ArtefactError, UsageError
from efficientllm.runtime.base.output import check_output
from efficientllm.train.model.rotary import permute_rope

META_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def meta_parameters(checkpoint: Checkpoint) -> dict[str, Any]:
    """params.json of Meta's format; UsageError for a model that it cannot describe."""
    architecture = checkpoint.architecture
    if architecture.family != "llama" or not architecture.is_uniform:
        raise UsageError("export_llm knows one head count and one FFN width: give a uniform Llama")
    layer = architecture.layers[0]
    return {
        "dim": architecture.hidden_size,
        "n_layers": len(architecture.layers),
        "n_heads": layer.num_attention_heads,
        "n_kv_heads": layer.num_key_value_heads,
        "hidden_dim": layer.intermediate_size,
        "vocab_size": architecture.vocab_size,
        "norm_eps": checkpoint.rms_norm_eps,
        "rope_theta": checkpoint.rope["rope_theta"],
        "use_scaled_rope": False,
    }


def meta_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All weights under Meta's names."""
    architecture = checkpoint.architecture
    embedding = torch.from_numpy(checkpoint.tensor("model.embed_tokens.weight"))
    head = "model.embed_tokens.weight" if architecture.tie_word_embeddings else "lm_head.weight"
    state = {
        "tok_embeddings.weight": embedding,
        "norm.weight": torch.from_numpy(checkpoint.tensor("model.norm.weight")),
        "output.weight": torch.from_numpy(checkpoint.tensor(head).copy()),
    }
    for index in range(len(architecture.layers)):
        for ours, theirs in META_NAMES.items():
            weight = checkpoint.tensor(f"model.layers.{index}.{ours}.weight")
            if ours.endswith(("q_proj", "k_proj")):
                weight = permute_rope(weight, len(weight) // architecture.head_dim)
            state[f"layers.{index}.{theirs}.weight"] = torch.from_numpy(weight)
    return state


def body(argv: Sequence[str]) -> int:
    parser = flags.Parser(prog="python -m research.peers.export_llm", description=__doc__)
    parser.add_argument("checkpoint", help="as for efficientllm-export; a uniform Llama")
    parser.add_argument("folder", help="folder to write")
    parser.add_argument("--context", type=int, default=512, help="cache slots [512]")
    arguments = parser.parse(argv)
    folder = Path(arguments["folder"])
    check_output(folder, False, foreign_files, [arguments["checkpoint"]], "give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    context = arguments["context"]
    with open_checkpoint(arguments["checkpoint"]) as checkpoint, tempfile.TemporaryDirectory() as temporary:
        parameters, state = Path(temporary) / "params.json", Path(temporary) / "consolidated.pth"
        parameters.write_text(json.dumps(meta_parameters(checkpoint)), encoding="utf-8")
        torch.save(meta_state(checkpoint), state)
        ends = checkpoint.end_of_generation_ids
        metadata = json.dumps({"get_bos_id": checkpoint.bos_id or 0, "get_eos_ids": ends})
        command = [
            *("-m", "executorch.extension.llm.export.export_llm"),
            *("base.model_class=smollm2", f"base.params={parameters}", f"base.checkpoint={state}"),
            f"base.metadata={json.dumps(metadata)}",
            *("model.use_kv_cache=True", "model.use_sdpa_with_kv_cache=True", "model.dtype_override=fp32"),
            *("backend.xnnpack.enabled=True", "backend.xnnpack.extended_ops=True"),
            *("quantization.qmode=8da4w", "quantization.group_size=32", "quantization.embedding_quantize='8,0'"),
            *(f"export.max_seq_length={context}", f"export.max_context_length={context}"),
            f"export.output_name={folder.absolute() / 'model.pte'}",
        ]
        done = run_python(*command, cwd=temporary)
        if done.code or not (folder / "model.pte").is_file():
            (folder / "export_llm.log").write_text(done.output + done.errors, encoding="utf-8")
            raise ArtefactError(f"export_llm failed with exit code {done.code}; see {folder / 'export_llm.log'}")
        copy_tokenizer(checkpoint, folder)
    print(f"peer: {folder / 'model.pte'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(body))
