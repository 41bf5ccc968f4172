"""A smaller vocabulary: which tokens may go, the tokenizer without them, and a model and a run that lose their rows."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import export
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pruning import past, random_scores
from tiny import tiny_architecture, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from training import command, expect_same_run, metrics, run, run_until, without
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from efficientllm.export.gguf.probe import probe
from efficientllm.export.verification import sample_text
from efficientllm.runtime.base.errors import ModelError, OptionError
from efficientllm.runtime.engines.hf_tokenizer import HfTokenizer
from efficientllm.train.compute.distributed import Parallel
from efficientllm.train.compute.loss import LossWeights, TrainingLoss, frozen_copy
from efficientllm.train.config.pruning import PruneConfig
from efficientllm.train.data.documents import DataSpec
from efficientllm.train.data.packing import PackedStream
from efficientllm.train.model.architecture import FAMILIES, Architecture
from efficientllm.train.pruning.rows import RowProbe
from efficientllm.train.pruning.rules import SelectionRules
from efficientllm.train.pruning.selection import select_removal
from efficientllm.train.pruning.surgery import remove_groups
from efficientllm.train.vocabulary.frequency import expected_splits, with_parts
from efficientllm.train.vocabulary.pieces import pieces_of, read_pieces, tokenizer_data
from efficientllm.train.vocabulary.retokenization import ByteTokenizer, Retokenizer, TokenAligner
from efficientllm.train.vocabulary.tokenizer_pruning import prune_tokenizer

CPU = torch.device("cpu")
ODD = [
    *(
        "",
        " ",
        "  \n\n\t x ",
        "Ça va? naïve coöperation",
        "東京タワー 서울 עברית",
        "🙂👩‍👩‍👧 \u200d",
        "\u0000\u0001\x7f",
    ),
    *("def f(x):\n\treturn x**2  # 1234567\n", "<|im_start|>user\nHi<|im_end|>\n", "don't WON'T we'll 3.14159e-10"),
]


def byte_level() -> PreTrainedTokenizerFast:
    """SmolLM's, 600 tokens."""
    backend = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([sample_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=special[1], eos_token=special[2])


def _with_space(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """SentencePiece's way around a model: a space before every text, BOS before that."""
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_prefix_space=None
    )


def _pieces() -> list[str]:
    """Bytes, then pieces of the sample and its characters, as SentencePiece orders them."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator([sample_text()], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    vocab = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    ordered = [*(t for t in vocab if len(t) > 1), *(t for t in vocab if len(t) == 1), "é", "東", "🙂"]
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(ordered)]


def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama's: every split of a piece into two others is a merge, in the order of the pieces."""
    vocab = {piece: index for index, piece in enumerate(_pieces())}
    merges = [
        (piece[:at], piece[at:])
        for piece in vocab
        for at in range(1, len(piece))
        if {piece[:at], piece[at:]} <= vocab.keys() and not piece.startswith("<")
    ]
    return _with_space(Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)))


TOKENIZERS = {"byte-level": byte_level, "SentencePiece": sentencepiece}


@cache
def tokenizer_named(name: str) -> PreTrainedTokenizerFast:
    return TOKENIZERS[name]()


@cache
def smaller(name: str, seed: int, share: float) -> tuple[PreTrainedTokenizerFast, tuple[int, ...]]:
    """(tokenizer, kept) once a share of what may go is gone, by counts drawn at random."""
    tokenizer = tokenizer_named(name)
    pieces = read_pieces(tokenizer_data(tokenizer), len(tokenizer))
    counts = np.random.default_rng(seed).exponential(size=len(tokenizer))
    splits = expected_splits(pieces, counts)
    order = np.argsort(splits)
    gone = order[: int(share * np.isfinite(splits).sum())]
    kept = tuple(np.setdiff1d(np.arange(len(tokenizer)), gone).tolist())
    return prune_tokenizer(tokenizer, kept), kept  # type: ignore[return-value]


TEXTS = st.one_of(st.text(), st.sampled_from(sample_text().splitlines()), st.sampled_from(ODD))
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NAMES = st.sampled_from(sorted(TOKENIZERS))


# -- the tokenizer


@PROPERTY
@given(NAMES, st.integers(0, 2), st.sampled_from([0.3, 0.8, 1.0]), TEXTS)
def test_any_text_comes_back(name: str, seed: int, share: float, text: str) -> None:
    before, (after, kept) = tokenizer_named(name), smaller(name, seed, share)
    ids = after.encode(text, add_special_tokens=False)
    assert max(ids, default=0) < len(kept) == len(after)
    expected = before.decode(before.encode(text, add_special_tokens=False))
    assert after.decode(ids) == expected
    if name == "byte-level":
        assert expected == text


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_kept_tokens_keep_their_text(name: str, share: float) -> None:
    before, (after, kept) = tokenizer_named(name), smaller(name, 0, share)
    assert after.convert_ids_to_tokens(list(range(len(kept)))) == before.convert_ids_to_tokens(list(kept))
    made = read_pieces(tokenizer_data(before), len(before)).parts
    backend: Any = after.backend_tokenizer
    for new, old in enumerate(kept):
        if old in made and len(token := before.convert_ids_to_tokens(old)) > 1:
            assert [each.id for each in backend.model.tokenize(token)] == [new]
    assert after.bos_token_id == kept.index(before.bos_token_id)
    if name != "byte-level":  # the post-processor knows BOS by its id
        assert after.encode("a")[0] == after.bos_token_id


@pytest.mark.parametrize("name", TOKENIZERS)
def test_required_tokens_stay(name: str) -> None:
    tokenizer, (_, kept) = tokenizer_named(name), smaller(name, 0, 1.0)
    pieces = read_pieces(tokenizer_data(tokenizer), len(tokenizer))
    assert set(kept) == with_parts(pieces, pieces.fixed)
    texts = set(tokenizer.convert_ids_to_tokens(list(kept)))
    assert texts >= (set(pre_tokenizers.ByteLevel.alphabet()) if name == "byte-level" else {"<0x00>", "<0xFF>", "▁"})
    assert len(kept) < 0.8 * len(tokenizer)


def test_the_chat_template_and_the_settings_keep_their_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(tiny_architecture(), eos_token_id=[2, 390])
    pieces = pieces_of(model, tokenizer)
    assert 390 in pieces.fixed
    messages = [{"role": "user", "content": "?"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert set(tokenizer.encode(str(rendered), add_special_tokens=False)) <= pieces.fixed


@PROPERTY
@given(NAMES, st.sampled_from([0.3, 1.0]), TEXTS, st.integers(0, 3), st.integers(0, 3))
def test_retokenizing_gives_the_same_bytes(name: str, share: float, text: str, left: int, right: int) -> None:
    """Also of a piece of a text that begins and ends within a character; and a whole text as it would be encoded."""
    before, (after, _) = tokenizer_named(name), smaller(name, 0, share)
    ours, theirs = ByteTokenizer(before), ByteTokenizer(after)
    whole = before.encode(text, add_special_tokens=False)
    assert Retokenizer(ours, theirs).retokenize(whole) == after.encode(text, add_special_tokens=False)
    ids = whole[left : len(whole) - right]
    found = Retokenizer(ours, theirs).retokenize(ids)
    assert [
        theirs.bytes.get(each, after.convert_ids_to_tokens(each)) for each in found if each not in theirs.bytes
    ] == [before.convert_ids_to_tokens(each) for each in ids if each not in ours.bytes]
    assert b"".join(theirs.bytes.get(each, b"") for each in found) == b"".join(
        ours.bytes.get(each, b"") for each in ids
    )


def test_splits_predict_the_longer_text() -> None:
    """Exactly so for one token; what goes with others is written in parts that may join differently."""
    tokenizer = tokenizer_named("byte-level")
    pieces = read_pieces(tokenizer_data(tokenizer), len(tokenizer))
    ids = tokenizer.encode(sample_text())
    splits = expected_splits(pieces, np.bincount(ids, minlength=len(tokenizer)).astype(float), 1e-9)
    order = np.argsort(splits)
    for count, tolerance in ((1, 1e-3), (100, 0.1)):
        kept = sorted(order[count:].tolist())
        longer = len(prune_tokenizer(tokenizer, kept).encode(sample_text())) / len(ids) - 1
        assert longer == pytest.approx(splits[order[:count]].sum(), rel=tolerance, abs=1e-6)


def test_rows_without_a_token_go_first() -> None:
    tokenizer = tokenizer_named("byte-level")
    pieces = read_pieces(tokenizer_data(tokenizer), 640)
    splits = expected_splits(pieces, np.zeros(640))
    order = np.argsort(splits, kind="stable")
    assert not splits[600:].any()
    assert set(order[:40].tolist()) == set(range(600, 640))
    kept = sorted(order[32:].tolist())  # some of them stay where a multiple asks for it
    after = prune_tokenizer(tokenizer, kept)
    assert after.encode(sample_text()) == tokenizer.encode(sample_text())


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    data = json.loads(Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1})).to_str())
    with pytest.raises(ModelError, match="a tokenizer of type WordPiece is not supported; only BPE is"):
        read_pieces(data, 2)


# -- the model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_the_rows_that_stay(family: str, tied: bool) -> None:
    architecture = tiny_architecture(family, tied=tied)
    model, original = tiny_model(architecture, pad_token_id=2), tiny_model(architecture, pad_token_id=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    model(torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()
    optimizer.step()
    scores = {"vocabulary": random_scores(architecture)["vocabulary"]}
    scores["vocabulary"][0][:3] = torch.inf
    removal = select_removal(
        architecture, scores, SelectionRules(("vocabulary",), fixed_rows=3), 0, stop_before=past(9)
    )
    remove_groups(model, removal, optimizer)
    kept = removal.kept["vocabulary"][0]
    assert len(kept) == model.config.vocab_size == 400 - 9 * 32 + 16  # the first brings 400 to a multiple of 32
    tokens = torch.randint(0, len(kept), (2, 9))
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, original(kept[tokens]).logits[..., kept], atol=1e-5, rtol=1e-4)
    assert model.model.embed_tokens.padding_idx == kept.tolist().index(2)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


def test_rows_that_must_stay_are_the_floor() -> None:
    architecture = tiny_architecture()
    rules = SelectionRules(("vocabulary",), fixed_rows=70)
    removal = select_removal(architecture, {"vocabulary": [torch.rand(400)]}, rules, 0)
    assert removal.after.vocab_size == 96


# -- distillation


def test_source_gives_the_first_tokens_of_answers() -> None:
    """By hand: the source's tokens, each rewritten on its own, their probabilities added up."""
    tokenizer, (after, kept) = tokenizer_named("byte-level"), smaller("byte-level", 0, 0.8)
    text = TokenAligner(after, tokenizer, kept, 600)(torch.tensor([after.encode("The heat of the sun")]))
    assert text.tokens[0].tolist() == tokenizer.encode("The heat of the sun")
    for old, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(600)))):
        backend: Any = after.backend_tokenizer
        assert int(text.first[old]) == (kept.index(old) if old in kept else backend.model.tokenize(token)[0].id)


def test_both_stand_at_the_same_byte_where_they_are_compared() -> None:
    tokenizer, (after, kept) = tokenizer_named("byte-level"), smaller("byte-level", 0, 0.8)
    rows = [after.encode(line)[:30] for line in sample_text().splitlines() if len(after.encode(line)) >= 30][:3]
    text = TokenAligner(after, tokenizer, kept, 600)(torch.tensor(rows))
    ours, theirs = ByteTokenizer(after), ByteTokenizer(tokenizer)
    places = text.places.view(len(rows), -1)
    for row, tokens in enumerate(rows):
        for at in range(len(tokens)):
            place = int(places[row, at])
            if place >= 0:
                before = text.tokens[row, : place - row * text.tokens.shape[1] + 1].tolist()
                mine = b"".join(ours.bytes[each] for each in tokens[: at + 1])
                assert mine == b"".join(theirs.bytes[each] for each in before)
    assert 0.3 < float((places >= 0).float().mean()) < 1.0


def test_the_loss_equals_that_of_its_definition() -> None:
    tokenizer, (after, kept) = tokenizer_named("byte-level"), smaller("byte-level", 0, 0.8)
    shape = tiny_architecture()
    source = tiny_model(Architecture.from_dict({**shape.to_dict(), "vocab_size": 600}))
    model = tiny_model(Architecture.from_dict({**shape.to_dict(), "vocab_size": len(kept)}), seed=1)
    windows = torch.tensor([after.encode(sample_text())[:25], after.encode(sample_text())[40:65]])
    loss = TrainingLoss(model, torch.float32, LossWeights(0.0, 1.0), frozen_copy(source, torch.float32, CPU))
    aligner = TokenAligner(after, tokenizer, kept, 600)
    loss.source_text = aligner
    text = aligner(windows[:, :-1])
    with torch.no_grad():
        theirs = torch.softmax(source(text.tokens).logits, -1).flatten(0, 1)
        ours = torch.log_softmax(model(windows[:, :-1]).logits, -1).flatten(0, 1)
        total = 0.0
        for at, place in enumerate(text.places.tolist()):
            if place >= 0:
                wanted = torch.zeros(len(kept)).index_add_(0, text.first, theirs[place])
                assert float(wanted.sum()) == pytest.approx(1.0, abs=1e-5)
                total += float((wanted * (wanted.clamp(min=1e-30).log() - ours[at])).sum())
        assert float(loss(windows)[0]) == pytest.approx(total / windows[:, 1:].numel(), rel=1e-4)


def test_distillation_with_all_tokens_equals_plain_distillation() -> None:
    tokenizer, model = tokenizer_named("byte-level"), None
    shape = Architecture.from_dict({**tiny_architecture().to_dict(), "vocab_size": 600})
    model, source = tiny_model(shape), tiny_model(shape, seed=1)
    windows = torch.tensor([tokenizer.encode(sample_text())[:25]])
    loss = TrainingLoss(model, torch.float32, LossWeights(1.0, 1.0), frozen_copy(source, torch.float32, CPU))
    plain = loss(windows)[0]
    plain.backward()
    gradient, model.model.norm.weight.grad = model.model.norm.weight.grad.clone(), None
    loss.source_text = TokenAligner(tokenizer, tokenizer, range(600), 600)
    other = loss(windows)[0]
    other.backward()
    torch.testing.assert_close(other, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.model.norm.weight.grad, gradient, atol=1e-6, rtol=1e-4)


# -- the ranking


def test_price_of_rows_is_the_loss_of_text_without_them() -> None:
    tokenizer, (after, kept) = tokenizer_named("byte-level"), smaller("byte-level", 0, 0.8)
    model = tiny_model(Architecture.from_dict({**tiny_architecture().to_dict(), "vocab_size": 600}))
    windows = np.asarray([tokenizer.encode(sample_text())[at : at + 40] for at in (0, 40)])
    probe_ = RowProbe(TrainingLoss(model, torch.float32), tokenizer, np.ones(600), windows, Parallel("ddp", CPU))
    retokenizer = Retokenizer(ByteTokenizer(tokenizer), ByteTokenizer(after))
    start = tokenizer.convert_tokens_to_ids("<|endoftext|>")

    def nats(ids: list[int], rows: list[int]) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([[start, *ids[:-1]]])).logits[0][:, rows]
        targets = torch.tensor([rows.index(each) for each in ids])
        return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))

    whole = sum(nats(row, list(range(600))) for row in windows.tolist())
    assert probe_.price == pytest.approx(whole / 80, rel=1e-4)
    written = [[kept[each] for each in retokenizer.retokenize(row)] for row in windows.tolist()]
    probe_.measure(kept)
    expected = (sum(nats(row, list(kept)) for row in written) - whole) / (sum(map(len, written)) - 80)
    assert probe_.price == pytest.approx(expected, rel=1e-3)
    assert torch.equal(probe_.scores, torch.full((600,), probe_.price, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_scale": "saliency"}, "vocabulary rows need scores in one unit"),
        ({"target_ratio": None, "target_architecture": "x.json"}, "use another target"),
        ({"prune": ("ffn",), "vocabulary_rows": 512}, "needs --prune with vocabulary"),
        ({"prune": ("ffn",), "stem_channels": 512}, "needs --prune with stem"),
        ({"prune": ("stem",), "stem_channels": 500}, "give a multiple of --width-multiple 32"),
        (
            {"target_ratio": None, "target_architecture": "x.json", "prune": ("stem",), "stem_channels": 512},
            "--target-architecture determines the stem",
        ),
    ],
)
def test_settings_that_do_not_go_with_rows_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PruneConfig(**{"prune": ("ffn", "vocabulary"), "target_ratio": 0.5, **changes})


# -- a run


SPACE = [*("--prune", "vocabulary", "--target-ratio", "0.97", "--vocabulary-tokens", "20000"), "--distill", "1"]


def rows_command(source: Path, corpus: Path, output: Path, *more: str) -> list[str]:
    arguments = command(source, corpus, output, "--block-tokens", "256", "--prune-start", "0.3")
    for name in ("--target-ratio", "--prune"):
        arguments = without(arguments, name)
    return [*arguments, *SPACE, *more]


@pytest.fixture(scope="module")
def pruned(source_folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("vocabulary") / "run"
    assert run(rows_command(source_folder, corpus, output, "--checkpoint-every", "0")) == 0
    return output


def test_run_removes_rows_once_and_logs_the_price_of_a_byte(pruned: Path, source_folder: Path) -> None:
    records = metrics(pruned)
    events = [record for record in records if record.get("removed")]
    assert len(events) == 1
    assert {kind for kind, *_ in events[0]["removed"]} == {"vocabulary"}
    final = Architecture.from_folder(pruned / "model")
    assert final.vocab_size == next(record["rows"] for record in records if "rows" in record)
    assert final.num_parameters <= 0.97 * Architecture.from_folder(source_folder).num_parameters
    training = json.loads((pruned / "model" / "training.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(pruned / "model")
    assert len(tokenizer) == final.vocab_size
    assert set(training["bits_per_byte"]) == {"source", "after_pruning", "final"}
    settings_ = json.loads((pruned / "model" / "config.json").read_text())
    assert settings_["eos_token_id"] == tokenizer.eos_token_id
    survivors = json.loads((pruned / "architecture.json").read_text())["survivors"]
    assert len(survivors["vocabulary"][0]) == final.vocab_size


@pytest.mark.parametrize("step", [5, 15])
def test_run_resumed_before_or_after_a_removal_is_the_same(
    step: int, pruned: Path, source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    arguments = rows_command(source_folder, corpus, tmp_path / "run", "--checkpoint-every", "0")
    run_until(step, arguments)
    assert run([*arguments, "--resume"]) == 0
    expect_same_run(tmp_path / "run", pruned)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (tmp_path / "run" / "model" / name).read_text() == (pruned / "model" / name).read_text()


def test_a_number_of_rows_stays_and_nothing_competes_with_them(
    source_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    source = Architecture.from_folder(source_folder)
    rows = source.vocab_size - 40
    arguments = command(source_folder, corpus, tmp_path / "run", "--vocabulary-tokens", "20000", "--removals", "2")
    arguments = [*without(arguments, "--prune"), "--prune", "ffn,vocabulary", "--vocabulary-rows", str(rows)]
    assert run(arguments) == 0
    records = metrics(tmp_path / "run")
    first, *others = [record for record in records if record.get("removed")]
    assert first["step"] == 1
    assert {kind for kind, *_ in first["removed"]} == {"vocabulary"}
    assert {kind for event in others for kind, *_ in event["removed"]} == {"ffn"}
    final = Architecture.from_folder(tmp_path / "run" / "model")
    assert final.vocab_size == rows
    assert final.num_parameters <= 0.6 * source.num_parameters
    assert not any("nats_per_token_more" in record for record in records)  # no price was measured


def test_stream_continues_with_the_next_documents(corpus: Path) -> None:
    tokenizer, (after, _) = tokenizer_named("byte-level"), smaller("byte-level", 0, 0.8)
    streams = [PackedStream((DataSpec(str(corpus)),), tokenizer, 16, 0.2, seed=0) for _ in range(2)]
    for stream in streams:
        stream.next_windows(40)
    before = streams[0].state()[0]
    streams[0].switch_tokenizer(after)
    state = streams[0].state()
    assert len(state[0]["lanes"]["buffers"]) == len(before["lanes"]["buffers"])
    assert state[0]["documents"]["offset"] == before["documents"]["offset"] - len(before["queue"]) > 0
    streams[1].switch_tokenizer(after)
    streams[1].load_state(state)
    windows = [stream.next_windows(30) for stream in streams]
    assert np.array_equal(windows[0], windows[1])
    documents = "".join(json.loads(line)["text"] for line in corpus.read_text().splitlines())
    assert all(str(after.decode(window[:8])).split("<|endoftext|>")[0] in documents for window in windows[0])


@pytest.fixture(scope="module")
def exported(pruned: Path) -> Path:
    for target in ("gguf", "onnx"):
        assert export(pruned, target, pruned.parent / target, "--quantize", "f32") == 0  # verified against torch
    return pruned.parent


def test_every_runtime_has_the_same_tokens(exported: Path) -> None:
    """tokenizer.json, llama.cpp's vocabulary, genai's tokenizer and the one of ExecuTorch's runner."""
    genai = pytest.importorskip("onnxruntime_genai")
    runner = pytest.importorskip("pytorch_tokenizers")
    folder = exported / "run" / "model"
    ours = HfTokenizer(folder)
    texts = [text for text in [*ODD, *sample_text().splitlines()] if text and "\0" not in text]
    expected = [ours.tokenize(text, special=True) for text in texts]
    assert probe(exported / "gguf" / "model.gguf", [3, 4], texts).token_ids == expected
    theirs = genai.Tokenizer(genai.Model(str(exported / "onnx")))
    assert [theirs.encode(text).tolist() for text in texts] == expected
    cpp = runner.CppHFTokenizer()
    cpp.load(str(folder / "tokenizer.json"))
    assert [cpp.encode(text, 0, 0) for text in texts] == expected
    for text, ids in zip(texts, expected, strict=True):
        assert b"".join(ours.token_bytes(each) for each in ids if ours.token_bytes(each)).decode() or text
        assert AutoTokenizer.from_pretrained(folder).decode(ids) == text
