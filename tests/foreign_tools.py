"""Tiny checkpoints in the formats of other pruning tools, each beside the model that the tool has in memory.

Every maker repeats how the named commit of a tool changes and saves a model. It writes the folder and returns the
logits that the changed model of the stock class computes. The formats of LLM-Pruner, Adapt-Pruner, Torch-Pruning, FLAP,
Wanda-SP, ShortGPT, mergekit, Puzzletron and SliceGPT were compared with files of the tools (research/foreign_tool.py).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = torch.randint(3, 400, (1, 40), generator=torch.Generator().manual_seed(2))
HEAD_DIM = 16
PLAIN = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}


def stock_model(kind: str = "llama", **settings: Any) -> Any:
    """A random stock model of 4 layers, 8 heads of 16 channels and hidden size 128."""
    values = {**PLAIN, "hidden_size": 128, "vocab_size": 400, "max_position_embeddings": 512, "pad_token_id": 0}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "head_dim": HEAD_DIM, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**values, **settings}))
    for name, parameter in model.named_parameters():
        parameter.data.uniform_(0.5, 1.5) if name.endswith("norm.weight") else parameter.data.normal_(std=0.08)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS, use_cache=False).logits[0]


def keep(linear: Any, rows: list[int] | None = None, columns: list[int] | None = None) -> None:
    """Keep these rows or columns of a linear layer."""
    if rows is not None:
        linear.weight = nn.Parameter(linear.weight.data[rows])
        linear.bias = None if linear.bias is None else nn.Parameter(linear.bias.data[rows])
    if columns is not None:
        linear.weight = nn.Parameter(linear.weight.data[:, columns])


def channels(heads: list[int]) -> list[int]:
    return [head * HEAD_DIM + each for head in heads for each in range(HEAD_DIM)]


def keep_groups(layer: Any, groups: list[int]) -> None:
    """Keep key/value heads of a layer with their query heads."""
    attention = layer.self_attn
    per_group = attention.num_key_value_groups
    queries = channels([group * per_group + each for group in groups for each in range(per_group)])
    keep(attention.q_proj, queries)
    keep(attention.o_proj, columns=queries)
    keep(attention.k_proj, channels(groups))
    keep(attention.v_proj, channels(groups))


def keep_ffn(layer: Any, width: int) -> None:
    rows = list(range(width))
    keep(layer.mlp.gate_proj, rows)
    keep(layer.mlp.up_proj, rows)
    keep(layer.mlp.down_proj, columns=rows)


class NoBlock(nn.Module):
    """An attention or FFN that adds nothing."""

    def __init__(self, is_attention: bool) -> None:
        super().__init__()
        self.is_attention = is_attention

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        return (torch.zeros_like(hidden_states), None) if self.is_attention else torch.zeros_like(hidden_states)


def save(model: Any, folder: Path, **settings: Any) -> torch.Tensor:
    """Save the model with other settings in config.json, and return its logits. None removes a setting."""
    model.save_pretrained(folder)
    change_config(folder, **settings)
    return logits(model)


def change_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def rename(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def llm_pruner(folder: Path) -> torch.Tensor:
    """horseee/LLM-Pruner 128a07d, llama3.py --block_wise: inner layers lose groups and channels, config.json stays.

    It saves a pickle of the model, which save_pretrained has made readable here.
    """
    model = stock_model()
    for layer in model.model.layers[1:3]:
        keep_groups(layer, [0, 2, 3])
        keep_ffn(layer, 70)
    return save(model, folder)


def torch_pruning(folder: Path) -> torch.Tensor:
    """VainF/Torch-Pruning e80127d, examples/LLMs/prune_llm.py: heads, FFN and stem, config.json without head_dim."""
    model = stock_model()
    stem = list(range(0, 128, 2))
    for layer in model.model.layers:
        keep_groups(layer, [0, 2, 3])
        keep_ffn(layer, 48)
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                is_output = name.endswith(("o_proj", "down_proj"))
                keep(module, stem if is_output else None, None if is_output else stem)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight = nn.Parameter(norm.weight.data[stem])
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.data[stem])
    keep(model.lm_head, columns=stem)
    model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight.data[:, stem])
    widths = {"hidden_size": 64, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 48}
    return save(model, folder, head_dim=None, **widths)


def flap(folder: Path) -> torch.Tensor:
    """CASIA-IVA-Lab/FLAP 3bb57db, main.py: every layer its own heads and channels, biases on o_proj and down_proj."""
    model = stock_model(num_key_value_heads=8)
    for index, layer in enumerate(model.model.layers):
        keep_groups(layer, list(range(index, 8)))
        keep_ffn(layer, 96 - 11 * index)
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.bias = nn.Parameter(0.2 * torch.randn(128))
    return save_as_flap(model, folder, head_dim=None)


def save_as_flap(model: Any, folder: Path, **settings: Any) -> torch.Tensor:
    """Save a model of FLAP's own class, whose attention stores its rotary table."""
    expected = save(model, folder, **settings)
    table = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    tables = {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": table.clone() for index in range(4)}
    rename(folder, lambda tensors: tensors | tables)
    return expected


def flap_qwen2(folder: Path) -> torch.Tensor:
    """FLAP's biases on a family with biases of its own."""
    model = stock_model("qwen2")
    for index, layer in enumerate(model.model.layers):
        keep_groups(layer, [0, 1, 2, 3][: 4 - index])
        layer.self_attn.o_proj.bias = nn.Parameter(0.2 * torch.randn(128))
    return save(model, folder)


def wanda_sp(folder: Path) -> torch.Tensor:
    """FLAP 3bb57db, --prune_method wanda_sp: one ratio for every layer, biases of zeros, config.json stays."""
    model = stock_model(num_key_value_heads=8)
    for layer in model.model.layers:
        keep_groups(layer, [0, 3, 4, 6, 7])
        keep_ffn(layer, 61)
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.bias = nn.Parameter(torch.zeros(128))
    return save_as_flap(model, folder)


def adapt_pruner(folder: Path) -> torch.Tensor:
    """research4pan/AdaptPruner 5665876, hf_prune.py: every layer its own widths, as lists in config.json."""
    model = stock_model()
    for index, layer in enumerate(model.model.layers):
        keep_groups(layer, [0, 1, 3][: 3 - index % 2])
        keep_ffn(layer, 90 - 7 * index)
    lists = {"num_attention_heads": [6, 4, 6, 4], "num_key_value_heads": [3, 2, 3, 2]}
    return save(model, folder, **lists, intermediate_size=[90, 83, 76, 69])


def slicegpt(folder: Path) -> None:
    """microsoft/TransformerCompression 6b12cde, run_slicegpt.py: a state dict with rotations beside the old config."""
    model = stock_model()
    shortcuts = {f"model.layers.{index}.mlp_shortcut_Q": torch.eye(128)[:, :96] for index in range(4)}
    model.config.save_pretrained(folder)
    torch.save({**model.state_dict(), **shortcuts}, folder / "Llama-2-7b-hf_0.25.pt")


def shortgpt(folder: Path) -> torch.Tensor:
    """sramshetty/ShortGPT 78d9615: whole layers deleted, num_hidden_layers of config.json stays."""
    model = stock_model()
    del model.model.layers[2]
    return save(model, folder, num_hidden_layers=4)


def gaps(folder: Path) -> torch.Tensor:
    """A state dict with layers left out by name, in a pickle of a DataParallel and compiled model."""
    model = stock_model()
    whole = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.layers.2.")}
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({f"module._orig_mod.{name}": tensor for name, tensor in whole.items()}, folder / "pytorch_model.bin")
    del model.model.layers[2]
    return logits(model)


def mergekit(folder: Path) -> torch.Tensor:
    """arcee-ai/mergekit a6e4028, merge_method passthrough: slices of layers, renumbered, config.json right."""
    model = stock_model()
    del model.model.layers[1]
    return save(model, folder, num_hidden_layers=3)


def darwinlm(folder: Path) -> torch.Tensor:
    """IST-DASLab/DarwinLM 3596da3, shrink(kv_ignore=True): query heads without their key heads, blocks removed."""
    model = stock_model()
    layers, removed = model.model.layers, {0: [1, 4, 5], 2: [0]}
    for index, heads in removed.items():
        layers[index].self_attn.o_proj.weight.data[:, channels(heads)] = 0
    layers[1].self_attn, layers[3].mlp = NoBlock(True), NoBlock(False)
    expected = logits(model)
    for index, heads in removed.items():
        left = channels([head for head in range(8) if head not in heads])
        keep(layers[index].self_attn.q_proj, left)
        keep(layers[index].self_attn.o_proj, columns=left)
    save_without_run(model, folder)
    change_config(folder, pruned_heads={str(index): heads for index, heads in removed.items()})
    return expected


def save_without_run(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")


def puzzletron(folder: Path) -> torch.Tensor:
    """NVIDIA/Model-Optimizer a2fbac7 (modelopt 0.47.0), puzzletron: block_configs, a file for each block.

    The no_op blocks have no tensors, not even a norm.
    """
    model = stock_model()
    layers = model.model.layers
    layers[1].self_attn, layers[2].mlp = NoBlock(True), NoBlock(False)
    keep_ffn(layers[0], 64)
    for part in ("k_proj", "v_proj"):  # key/value heads, with all query heads
        keep(getattr(layers[3].self_attn, part), channels([0, 2]))
    layers[3].self_attn.num_key_value_groups = 4
    blocks = []
    for index in range(4):
        attention = {"no_op": index == 1, "num_key_value_heads": None if index == 1 else 2 if index == 3 else 4}
        ffn = {"no_op": index == 2, "intermediate_size": None if index == 2 else 64 if index == 0 else 96}
        common = {"replace_with_linear": False, "sparsify": None, "weights_precision": "bf16"}
        attention |= {**common, "llama4": None, "mamba": None}
        blocks.append({"attention": attention, "ffn": {**common, **ffn, "moe": None}, "parallel_blocks": None})
    expected = save(model, folder, block_configs=blocks)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "subblocks_safetensors").mkdir()
    weight_map = {}
    for name, tensor in tensors.items():
        if name in ("model.layers.1.input_layernorm.weight", "model.layers.2.post_attention_layernorm.weight"):
            continue
        block = "embeddings" if "embed_tokens" in name else "lm_head"
        if "layers" in name:
            is_attention = "self_attn" in name or "input_layernorm" in name
            block = f"block_{name.split('.')[2]}_{'attention' if is_attention else 'ffn'}"
        weight_map[name] = f"subblocks_safetensors/{block}.safetensors"
        path = folder / weight_map[name]
        save_file({**(load_file(path) if path.is_file() else {}), name: tensor}, path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return expected


def nemotron_nas(folder: Path) -> torch.Tensor:
    """A configuration of Llama-Nemotron (model type nemotron-nas): n_heads_in_group, ffn_mult, remote code."""
    model = stock_model(intermediate_size=512)
    layers = model.model.layers
    layers[1].self_attn = NoBlock(True)
    keep_ffn(layers[2], 256)
    groups, multiples = [2, None, 2, 2], [6.0, 6.0, 3.0, 6.0]
    blocks = [
        {"attention": {"n_heads_in_group": group, "no_op": group is None}, "ffn": {"ffn_mult": multiple}}
        for group, multiple in zip(groups, multiples, strict=True)
    ]
    names = {"model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"], "intermediate_size": None}
    names |= {"head_dim": None, "num_key_value_heads": None}
    auto_map = {"AutoConfig": "remote.Config", "AutoModelForCausalLM": "remote.Model"}
    (folder / "remote.py").parent.mkdir(parents=True, exist_ok=True)
    (folder / "remote.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    return save(model, folder, block_configs=blocks, auto_map=auto_map, **names)


def per_layer_config(folder: Path) -> torch.Tensor:
    """transformers' per_layer_config, whose `skip` names absent blocks, on a stock model type."""
    model = stock_model("qwen3", tie_word_embeddings=True)
    layers = model.model.layers
    layers[1].self_attn, layers[2].mlp = NoBlock(True), NoBlock(False)
    keep_ffn(layers[3], 33)
    keep_groups(layers[3], [1, 2])
    widths = {"intermediate_size": 33, "num_attention_heads": 4, "num_key_value_heads": 2}
    return save(model, folder, per_layer_config={"1": {"skip": ["attention"]}, "2": {"skip": ["mlp"]}, "3": widths})


def layer_lists(folder: Path) -> torch.Tensor:
    """layer_head_num and layer_inter_size of rtp-llm and of transformers' pull request 40759."""
    model = stock_model("qwen3", num_key_value_heads=8)
    for index, layer in enumerate(model.model.layers):
        keep_groups(layer, list(range(8 - index)))
        keep_ffn(layer, 96 - 3 * index)
    return save(model, folder, layer_head_num=[8, 7, 6, 5], layer_inter_size=[96, 93, 90, 87], layer_num=4)


def openelm(folder: Path) -> torch.Tensor:
    """Apple's OpenELM: heads and multipliers for each layer, q, k and v fused, gate and up fused."""
    model = stock_model("qwen3", tie_word_embeddings=True, rms_norm_eps=1e-6)
    for index, layer in enumerate(model.model.layers):
        keep_groups(layer, list(range(1 + index)))
        keep_ffn(layer, 32 * (index // 2 + 1))
    expected = save(model, folder)
    names = {"self_attn.o_proj": "attn.out_proj", "self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
    names |= {"mlp.down_proj": "ffn.proj_2", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"model.layers": "transformer.layers", "model.norm": "transformer.norm"}
    names |= {"model.embed_tokens": "transformer.token_embeddings"}

    def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for index in range(4):
            layer = f"model.layers.{index}"
            parts = [tensors.pop(f"{layer}.self_attn.{part}_proj.weight") for part in "qkv"]
            tensors[f"{layer}.attn.qkv_proj.weight"] = torch.cat(parts)
            halves = [tensors.pop(f"{layer}.mlp.{part}_proj.weight") for part in ("gate", "up")]
            tensors[f"{layer}.ffn.proj_1.weight"] = torch.cat(halves)
        for ours, theirs in names.items():
            tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
        return tensors

    rename(folder, fuse)
    config = {"model_type": "openelm", "model_dim": 128, "head_dim": 16, "vocab_size": 400, "ffn_dim_divisor": 32}
    config |= {"num_transformer_layers": 4, "num_query_heads": [2, 4, 6, 8], "num_kv_heads": [1, 2, 3, 4]}
    config |= {"ffn_multipliers": [0.25, 0.25, 0.5, 0.5], "max_context_length": 512, "rope_freq_constant": 10000}
    config |= {"share_input_output_layers": True, "activation_fn_name": "swish", "num_gqa_groups": 4}
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": 1, "eos_token_id": 2}))
    return expected


def fused(folder: Path) -> torch.Tensor:
    """Torch-Pruning e80127d on Phi-3: fused q, k, v and gate, up."""
    model = stock_model("phi3", num_key_value_heads=8)
    for index, layer in enumerate(model.model.layers[:3]):
        attention, heads = layer.self_attn, list(range(index + 1, 8))
        keep(attention.qkv_proj, channels([part * 8 + head for part in range(3) for head in heads]))
        keep(attention.o_proj, columns=channels(heads))
        attention.config = copy.copy(attention.config)
        attention.config.num_attention_heads = len(heads)
        attention.num_key_value_heads = len(heads)
    return save(model, folder)


def gpt_neox(folder: Path) -> torch.Tensor:
    """Torch-Pruning e80127d on Pythia: heads of the fused matrix, in rows of [heads, 3, head_dim]."""
    model = stock_model("gpt_neox", num_key_value_heads=None, head_dim=None, rotary_pct=0.5)
    for index, layer in enumerate(model.gpt_neox.layers):
        heads = list(range(index, 8))
        keep(layer.attention.query_key_value, [head * 48 + each for head in heads for each in range(48)])
        keep(layer.attention.dense, columns=channels(heads))
        rows = list(range(96 - 5 * index))
        keep(layer.mlp.dense_h_to_4h, rows)
        keep(layer.mlp.dense_4h_to_h, columns=rows)
    return save(model, folder, head_dim=None)


TOOLS: dict[str, Callable[[Path], torch.Tensor]] = {
    maker.__name__: maker
    for maker in (
        *(llm_pruner, adapt_pruner, torch_pruning, flap, flap_qwen2, wanda_sp, shortgpt, gaps, mergekit),
        *(darwinlm, puzzletron),
        *(nemotron_nas, per_layer_config, layer_lists, openelm, fused, gpt_neox),
    )
}
