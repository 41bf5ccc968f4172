"""A recurrent model, whose state cannot be cut: a tiny Mamba with random weights answers like a fresh one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from answering import answer_of, answer_together

from efficientllm.runtime.engines import tuning
from efficientllm.runtime.engines.batch import Batch
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.llama_context import LlamaContext
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.sampling import SamplingOptions

HIDDEN, INNER, STATE, CONV, RANK, LAYERS = 64, 128, 16, 4, 8, 2
FIRST = list(range(5, 45))
PROMPTS = [FIRST, FIRST[:20] + list(range(60, 80)), FIRST[:5], [*FIRST, 7, 8, 9]]


def write_mamba(path: Path, tokenizer_of: Path) -> None:
    """Write a Mamba of random weights with the tokenizer of another file."""
    writer = gguf.GGUFWriter(str(path), "mamba")
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(CONV)
    writer.add_ssm_inner_size(INNER)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_time_step_rank(RANK)
    layer = {
        **{"attn_norm.weight": (HIDDEN,), "ssm_in.weight": (2 * INNER, HIDDEN), "ssm_conv1d.weight": (INNER, CONV)},
        **{"ssm_conv1d.bias": (INNER,), "ssm_x.weight": (RANK + 2 * STATE, INNER), "ssm_dt.weight": (INNER, RANK)},
        **{"ssm_dt.bias": (INNER,), "ssm_a": (INNER, STATE), "ssm_d": (INNER,), "ssm_out.weight": (HIDDEN, INNER)},
    }
    _write_random(writer, tokenizer_of, "output_norm.weight", [layer] * LAYERS)


def write_hybrid(path: Path, tokenizer_of: Path) -> None:
    """Write an LFM2 of random weights, a convolution before a layer of attention, with the tokenizer of a file."""
    writer = gguf.GGUFWriter(str(path), "lfm2")
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv([0, 1])
    writer.add_rope_freq_base(1e4)
    writer.add_shortconv_l_cache(3)
    norms_and_ffn = {
        **{"attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,), "ffn_down.weight": (HIDDEN, INNER)},
        **{"ffn_gate.weight": (INNER, HIDDEN), "ffn_up.weight": (INNER, HIDDEN)},
    }
    convolution = {
        **{"shortconv.conv.weight": (HIDDEN, 3), "shortconv.in_proj.weight": (3 * HIDDEN, HIDDEN)},
        "shortconv.out_proj.weight": (HIDDEN, HIDDEN),
    }
    attention = {
        **{"attn_q.weight": (HIDDEN, HIDDEN), "attn_k.weight": (32, HIDDEN), "attn_v.weight": (32, HIDDEN)},
        **{"attn_output.weight": (HIDDEN, HIDDEN), "attn_q_norm.weight": (32,), "attn_k_norm.weight": (32,)},
    }
    layers = [norms_and_ffn | convolution, norms_and_ffn | attention]
    _write_random(writer, tokenizer_of, "token_embd_norm.weight", layers)


def _write_random(
    writer: gguf.GGUFWriter, tokenizer_of: Path, norm: str, layers: Sequence[Mapping[str, tuple[int, ...]]]
) -> None:
    chance, fields = np.random.default_rng(0), gguf.GGUFReader(tokenizer_of).fields
    vocabulary = len(fields["tokenizer.ggml.tokens"].data)
    writer.add_vocab_size(vocabulary)
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(len(layers))
    writer.add_layer_norm_rms_eps(1e-5)
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            is_list = field.types[0] is gguf.GGUFValueType.ARRAY
            kind = field.types[0]
            writer.add_array(name, field.contents()) if is_list else writer.add_key_value(name, field.contents(), kind)
    shapes = {"token_embd.weight": (vocabulary, HIDDEN), norm: (HIDDEN,)}
    for number, layer in enumerate(layers):
        shapes |= {f"blk.{number}.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        values = (0.3 * chance.standard_normal(shape)).astype(np.float32)
        writer.add_tensor(name, -np.abs(values) - 0.1 if name.endswith("ssm_a") else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def mamba(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mamba") / "mamba.gguf"
    write_mamba(path, artefact / "model.gguf")
    return path


@pytest.fixture(params=[1, 4])
def engine(mamba: Path, request: pytest.FixtureRequest) -> Iterator[EngineScheduler]:
    engine = load_engine(mamba, EngineOptions(threads=1, context=256, parallel=request.param))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def fresh(mamba: Path) -> list[np.ndarray]:
    """Return the logits of each prompt from a model of its own."""
    rows = []
    for prompt in PROMPTS:
        engine = load_engine(mamba, EngineOptions(threads=1, context=256))
        rows.append(engine.prefill(prompt))
        engine.close()
    return rows


def answers(engine: EngineScheduler) -> list[Generation]:
    options = AnswerOptions(12, SamplingOptions(temperature=0))
    return [Generation(engine, prompt, options) for prompt in PROMPTS]


def test_prompts_with_shared_beginnings_equal_those_of_fresh_models(
    engine: EngineScheduler, fresh: list[np.ndarray]
) -> None:
    for _ in range(2):
        for prompt, expected in zip(PROMPTS, fresh, strict=True):
            np.testing.assert_allclose(engine.prefill(prompt), expected, atol=1e-5)


def test_a_continued_prompt_is_not_evaluated_again(engine: EngineScheduler) -> None:
    options = AnswerOptions(1, SamplingOptions(temperature=0))
    "".join(Generation(engine, FIRST, options))
    second = Generation(engine, [*FIRST, 7, 8], options)
    "".join(second)
    assert second.stats.cached_tokens == len(FIRST)


def test_answers_of_a_batch_equal_those_of_one_after_the_other(engine: EngineScheduler) -> None:
    alone = ["".join(generation) for generation in answers(engine)]
    assert answer_together(engine, answers(engine)) == alone


def test_a_cancelled_answer_leaves_the_others_right(engine: EngineScheduler, fresh: list[np.ndarray]) -> None:
    for generation in answers(engine):
        next(iter(generation))
        generation.cancel()
    np.testing.assert_allclose(engine.prefill(PROMPTS[1]), fresh[1], atol=1e-5)


def test_prompts_wait_for_no_foreign_prefix(mamba: Path) -> None:
    """A state cannot be cut to a shared prefix, so nothing could be copied afterwards."""
    engine = load_engine(mamba, EngineOptions(threads=1, context=256, parallel=4))
    batch = Batch(engine)
    for _ in range(2):
        batch.add(answer_of(Generation(engine, FIRST, AnswerOptions(12))))
    batch.step()
    assert not batch._waiting
    engine.close()


def test_many_chats_of_a_hybrid_model_are_timed(
    unseen: Path, passes_of_all: Callable[[LlamaContext, int, int], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caches cannot be cut after a pass, so the tokens of all passes would fill them."""
    write_hybrid(path := unseen / "hybrid.gguf", unseen / "model.gguf")
    os.utime(path, (1, 1))
    monkeypatch.setattr(tuning, "_pass_ms", passes_of_all)
    with contextlib.closing(load_engine(path, EngineOptions(threads=1, context=256, parallel=32))) as engine:
        assert not engine.traits.cuts_sequences
        assert "a pass" in engine.settings
        assert len(answer_together(engine, answers(engine))) == len(PROMPTS)
