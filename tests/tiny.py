"""Tiny random models with unequal layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from efficientllm.export.verification import sample_text
from efficientllm.train.model.architecture import FAMILIES, Architecture, LayerShape
from efficientllm.train.model.irregular import build

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SIMILAR = ("llama", "mistral", "qwen2", "qwen3")
"""Families that differ by little: what takes long is tested with these, and test_families.py has the others."""

UNEQUAL = (LayerShape(4, 2, 96), LayerShape(2, 2, 64), LayerShape(2, 1, 128))


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Llama 3's rope scaling, with a context short enough for tiny models to notice."""

TWO_FACTORS = {"full_attention": LLAMA3_ROPE, "sliding_attention": {**LLAMA3_ROPE, "factor": 2.0}}
"""Rope parameters of a Gemma 3 whose layers with and without window differ in `factor` only."""


SETTINGS: dict[str, dict[str, Any]] = {
    "llama_bias": {"attention_bias": True, "mlp_bias": True},
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 5000.0},
    # a window that is shorter than sequences of tests, a scale that is not head_dim's
    "gemma3_text": {"sliding_window": 16, "sliding_window_pattern": 3, "query_pre_attn_scalar": 20},
    "smollm3": {"pad_token_id": 2},
}
"""Settings with which every part of a family does something."""


def tiny_architecture(
    family: str = "llama",
    layers: tuple[LayerShape, ...] = UNEQUAL,
    hidden_size: int = 64,
    tied: bool = True,
    head_dim: int = 32,
) -> Architecture:
    if not FAMILIES[family].has_groups:
        layers = tuple(replace(layer, num_key_value_heads=layer.num_attention_heads) for layer in layers)
    return Architecture(
        family=family,
        hidden_size=hidden_size,
        head_dim=head_dim,
        vocab_size=400,
        tie_word_embeddings=tied,
        layers=layers,
    )


def tiny_model(architecture: Architecture, seed: int = 0, **settings: Any) -> Any:
    """A random irregular model; norms and biases are random too, so that nothing is tested at its neutral value."""
    values = {
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "head_dim": architecture.head_dim,
        "num_hidden_layers": len(architecture.layers),
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **SETTINGS.get(architecture.family, {}),
        **settings,
    }
    torch.manual_seed(seed)
    model: Any = build(AutoConfig.for_model(architecture.model_type, **values), architecture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(".bias"):
                parameter.normal_(std=0.2)
            else:
                parameter.normal_(std=0.08)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with SmolLM's pre-tokenizer, 400 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([sample_text()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )
