"""Write a tokenizer into a GGUF, and compare llama.cpp's reading of it with tokenizer.json.

A GGUF has tokens, merges, and the name of one of llama.cpp's pre-tokenizers. It has no normalizer and no flags of added
tokens. `stored_tokenizer` returns the tokenizer that the file means. llama.cpp must agree with it on a sample that is
drawn from the tokenizer. What it lacks is named where it changes the sample. Imports no torch.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from ...runtime.base.errors import ArtefactError, ModelError
from ...runtime.chat_template import render_chat
from ...runtime.engines.hf_tokenizer import byte_alphabet, is_byte, read_settings, special_token, text_bytes
from ...train.model.file_types import pre_tokenizer_name, steps_of
from ..checkpoint import Checkpoint
from ..request import ExportRequest
from ..verification import sample_text

Data = dict[str, Any]
"""Contents of a tokenizer.json."""

SPACE = "▁"
"""A space in the tokens of SentencePiece."""
UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")
"""Special tokens of Phi-3 without rstrip. In a file whose name has PHI3, llama.cpp strips ASCII spaces after all others
(llama-vocab.cpp of llama-cpp-python 0.3.36). Without these tokens it does not load such a file."""
PHI3 = re.compile(r"phi-?3", re.IGNORECASE)

FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
"""Flags of added tokens, which a GGUF does not store."""
FRAMES = ("{0}", "{0}{0}", "a{0}b", "x {0} x", "x  {0}\n\nx", "x\n{0}\tx", " {0}", "{0} ")
"""Texts with an added token."""
MAX_ADDED = 200
"""Added tokens in the sample, those with a flag first. Many models have hundreds of equal reserved ones."""
ODD_TEXTS = (
    *("", " ", "  x", "x  \n", "a\r\nb\r\n\r\nc", "a\tb\t\tc", "\n\n\n x\n \ny", "don't I'M we'Ll", "12345 12,3.45"),
    *("Cafe\u0301 n\u0303 \u1100\u1161", "\ufb01 \u00bd \uff58\uff11 H\u207b\u00b9 |x|\u00b2", "\u201cso\u201d"),
    *("\u0130 \u0131 \u1e9e \u0149", "a\u00a0b\u3000c\u2028d", "a\u200bb\u00ad\ufeff", "\x00\x01\x7f\x85", "a▁b ▁"),
    *("👩\u200d👧 🇩🇪 👍🏽", "שלום עולם", "नमस्ते", "我们 日本語、テスト。", "<0x0A>", "====>>>>----"),
)  # fmt: skip
"""Decomposed and compatibility characters, line ends, spaces, quotes and scripts."""
CODES = (
    *(*range(0x100), *range(0x100, 0x800, 0x40), 0x905, *range(0x1005, 0xFFFF, 0x1000)),
    *(0x10000, 0x40000, 0xF0000, 0x100000),
)
"""Characters that have every byte of UTF-8 between them."""
WORDS = 256
"""Tokens of the vocabulary in a text of the sample."""


def add_tokenizer(writer: Any, checkpoint: Checkpoint) -> None:
    """Write the checkpoint's tokenizer under tokenizer.ggml. Raises ModelError if llama.cpp has no equivalent."""
    data = checkpoint.tokenizer_data
    model = data["model"]
    if model["type"] != "BPE":
        raise ModelError(f"tokenizer type {model['type']} is not supported for gguf; BPE and SentencePiece are")
    tokens, types = _tokens(data, checkpoint.architecture.vocab_size)
    is_sentencepiece = _is_sentencepiece(data)
    writer.add_tokenizer_model("llama" if is_sentencepiece else "gpt2")  # gpt2 is byte-level BPE
    writer.add_tokenizer_pre("default" if is_sentencepiece else pre_tokenizer_name(data))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if is_sentencepiece:
        # BPE of SentencePiece models: merge order is id order, which is what scores of -id say
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
    elif model["merges"]:
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    ids = _special_ids(checkpoint, tokens)
    for name, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(_adds_bos(data, tokens, ids["bos"]))
    writer.add_add_space_prefix(is_sentencepiece and _adds_space(data))
    if checkpoint.chat_template:
        writer.add_chat_template(checkpoint.chat_template)


def file_name(name: str, data: Data) -> str:
    """Return general.name of a model. It contains "phi-3" only if llama.cpp must strip spaces as for Phi-3."""
    if _strips_as_phi3(data):
        return name if PHI3.search(name) else f"{name} phi-3"
    return PHI3.sub("phi 3", name)


def _is_sentencepiece(data: Data) -> bool:
    return bool(data["model"].get("byte_fallback"))


def _tokens(data: Data, vocab_size: int) -> tuple[list[str], list[int]]:
    """Return (texts, gguf.TokenType) by id, `vocab_size` each. A model may have more rows than tokens."""
    from gguf import TokenType

    known = {*data["model"]["vocab"], *(added["content"] for added in data["added_tokens"])}
    # as llama.cpp's converter fills up rows without a token
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    tokens = [f"[PAD {index}]" if token in known else token for index, token in enumerate(tokens)]
    types: list[int] = [TokenType.UNUSED] * vocab_size
    for token, index in data["model"]["vocab"].items():
        tokens[index], types[index] = token, TokenType.NORMAL
    if _is_sentencepiece(data):
        for index, token in enumerate(tokens):
            if is_byte(token):
                types[index] = TokenType.BYTE
    for added in data["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    unknown = data["model"].get("unk_token")
    if unknown in tokens and _is_sentencepiece(data):
        types[tokens.index(unknown)] = TokenType.UNKNOWN
    return tokens, types


def _special_ids(checkpoint: Checkpoint, tokens: list[str]) -> dict[str, int | None]:
    """Return the ids of bos, eos, unk and pad, and those of eot and eom, which end an answer as eos does."""
    settings = read_settings(checkpoint.folder)
    index = {token: i for i, token in enumerate(tokens)}
    ends = checkpoint.end_of_generation_ids
    configured = {"bos": checkpoint.bos_id, "eos": next(iter(ends), None)}
    names = ("bos", "eos", "unk", "pad")
    ids = {name: index.get(special_token(settings, name), configured.get(name)) for name in names}
    others = (end for end in ends if end != ids["eos"])
    return {**ids, "eot": next(others, None), "eom": next(others, None)}


def _adds_bos(data: Data, tokens: list[str], bos_id: int | None) -> bool:
    """Tell whether the post-processor adds BOS at the beginning."""
    processors = data.get("post_processor") or {}
    for processor in processors.get("processors", [processors]):
        if processor.get("type") == "TemplateProcessing":
            first = next(iter(processor["single"]), {})
            if "SpecialToken" in first:
                return bos_id is not None and tokens[bos_id] == first["SpecialToken"]["id"]
    return False


def _adds_space(data: Data) -> bool:
    """Tell whether a space is added before the text (SentencePiece's dummy prefix)."""
    for step in steps_of(data.get("normalizer"), "normalizers"):
        if step.get("type") == "Prepend":
            return True
    return any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme") in ("first", "always")
        for step in steps_of(data.get("pre_tokenizer"), "pretokenizers")
    )


def _strips_as_phi3(data: Data) -> bool:
    """Tell whether exactly the added tokens that llama.cpp strips after in files of Phi-3 have rstrip."""
    strips = {token["content"]: token["rstrip"] for token in data["added_tokens"]}
    return all(strips[token] == (token not in UNSTRIPPED) for token in strips) and {*UNSTRIPPED, "</s>"} <= {*strips}


def lost_fields(data: Data) -> dict[str, Callable[[Data], Data]]:
    """Return {field of tokenizer.json in words: function that returns the data without it} of what a GGUF drops."""
    lost: dict[str, Callable[[Data], Data]] = {}
    kept: list[Data] = []
    if _is_sentencepiece(data):
        kept = [{"type": "Prepend", "prepend": SPACE}] if _adds_space(data) else []
        kept.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    dropped = [step for step in steps_of(data["normalizer"], "normalizers") if step not in kept]
    normalizer = {"type": "Sequence", "normalizers": kept} if kept else None
    steps = [*dropped, *steps_of(data["pre_tokenizer"], "pretokenizers")] if kept else dropped
    if steps:
        change = {"normalizer": normalizer, **({"pre_tokenizer": None} if kept else {})}
        lost[", ".join(_title(step) for step in steps)] = lambda data: data | change
    merges = pre_tokenizer_name(data) == "llama-bpe" if not kept else False
    if bool(data["model"].get("ignore_merges")) != merges:
        lost["ignore_merges"] = lambda data: data | {"model": data["model"] | {"ignore_merges": merges}}
    if data["model"].get("dropout"):
        lost["dropout"] = lambda data: data | {"model": data["model"] | {"dropout": None}}
    for flag in FLAGS:
        tokens = [token["content"] for token in data["added_tokens"] if token[flag]]
        if tokens and not (flag == "rstrip" and _strips_as_phi3(data)):
            more = f" and {len(tokens) - 3} others" if len(tokens) > 3 else ""
            lost[f"{flag} of {', '.join(tokens[:3])}{more}"] = functools.partial(_without, flag)
    return lost


def _title(step: Data) -> str:
    pattern = step.get("pattern")
    return f"{step['type']} of {next(iter(pattern.values()))!a}" if pattern else step["type"]


def _without(flag: str, data: Data) -> Data:
    """Return the data with `flag` off in every added token."""
    return data | {"added_tokens": [token | {flag: False} for token in data["added_tokens"]]}


def stored_tokenizer(data: Data) -> Tokenizer:
    """Return the tokenizer that the GGUF of a tokenizer.json means."""
    return _tokenizer(functools.reduce(lambda each, drop: drop(each), lost_fields(data).values(), data))


def _tokenizer(data: Data) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(data | {"truncation": None, "padding": None}))


def drawn_texts(data: Data) -> list[str]:
    """Return texts that try a tokenizer: its added tokens, its vocabulary, its patterns, and unusual characters."""
    added = sorted(data["added_tokens"], key=lambda token: not any(token[flag] for flag in FLAGS))[:MAX_ADDED]
    contents = [token["content"] for token in added]
    steps = steps_of(data["normalizer"], "normalizers")
    contents += [step["pattern"].get("String", "") for step in steps if step["type"] == "Replace"]
    texts = [frame.format(content) for content in contents for frame in FRAMES]
    texts += [text for pair in itertools.permutations(contents, 2) for text in _overlapped(*pair)]
    return [*ODD_TEXTS, *(f"the{chr(code)}in the" for code in CODES), *texts, *_words(data)]


def _overlapped(first: str, second: str) -> Iterator[str]:
    """Yield a text for each end of `first` that is a beginning of `second`."""
    for size in range(1, min(len(first), len(second))):
        if first.endswith(second[:size]):
            yield first + second[size:]


def _words(data: Data) -> Iterator[str]:
    """Yield the vocabulary as texts of WORDS lines. A token that is a part of a character is left out."""
    alphabet = None if _is_sentencepiece(data) else byte_alphabet()
    spelled = (text_bytes(token, alphabet) for token in data["model"]["vocab"])
    lines = [text.decode() for text in spelled if text.decode("utf-8", "ignore").encode() == text]
    for start in range(0, len(lines), WORDS):
        yield "\n".join(lines[start : start + WORDS])


def _prose() -> list[str]:
    return [sample_text(), *sample_text().splitlines()]


def name_losses(checkpoint: Checkpoint, request: ExportRequest[Any]) -> None:
    """Add the fields of the tokenizer that the GGUF drops to the limits, each with a text on which it acts.

    Raises ArtefactError if a field acts on plain prose.
    """
    data = checkpoint.tokenizer_data
    prose = _prose()
    texts = [*prose, *drawn_texts(data)]
    before = _ids(_tokenizer(data), texts)
    for field, drop in lost_fields(data).items():
        data = drop(data)
        after = _ids(_tokenizer(data), texts)
        acts = [was != now for was, now in zip(before, after, strict=True)]
        if any(acts[: len(prose)]):
            raise ArtefactError(
                f"gguf: llama.cpp has no {field}, without which this tokenizer splits plain text differently; choose "
                "onnx or executorch"
            )
        if any(acts):
            example = min(itertools.compress(texts, acts), key=len)
            request.limits.append(f"llama.cpp has no {field}: it splits {example!a} differently")
        elif "Replace of" in field:  # no text is drawn from a regular expression
            request.limits.append(f"llama.cpp has no {field}")
        before = after
    if _strips_as_phi3(checkpoint.tokenizer_data):
        request.limits.append("llama.cpp strips ASCII spaces after Phi-3's special tokens, and no others")


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def sample_texts(checkpoint: Checkpoint) -> list[str]:
    """Return the texts on which llama.cpp's tokens are compared: prose, a chat, and texts drawn from the tokenizer."""
    return [*_prose(), *_rendered_chat(checkpoint), *drawn_texts(checkpoint.tokenizer_data)]


def _rendered_chat(checkpoint: Checkpoint) -> list[str]:
    """Return a chat under the checkpoint's template with its control tokens; nothing without a template."""
    if checkpoint.chat_template is None:
        return []
    messages = [{"role": "user", "content": sample_text()[:300]}, {"role": "assistant", "content": "Ça va 🙂"}]
    settings = read_settings(checkpoint.folder)
    bos, eos = (special_token(settings, name) for name in ("bos", "eos"))
    return [render_chat(checkpoint.chat_template, [*messages, messages[0]], bos, eos)]


def check_tokens(
    checkpoint: Checkpoint, request: ExportRequest[Any], token_ids: list[list[int]], ends: set[int]
) -> None:
    """Compare llama.cpp's ids of `sample_texts` with the stored tokenizer's, and its end tokens with the checkpoint's.

    Adds the end tokens that the GGUF drops to the limits. Raises ArtefactError if ids differ.
    """
    texts = sample_texts(checkpoint)
    for text, ids, expected in zip(
        texts, token_ids, _ids(stored_tokenizer(checkpoint.tokenizer_data), texts), strict=True
    ):
        if ids != expected:
            pairs = enumerate(zip(ids, expected, strict=False))
            position = next((index for index, (token, wanted) in pairs if token != wanted), len(expected))
            raise ArtefactError(
                f"gguf: llama.cpp tokenises the sample differently from tokenizer.json (token {position} of "
                f"{text[:40]!r}); this tokenizer has no equivalent in llama.cpp"
            )
    lost = [checkpoint.tokenizer.id_to_token(end) for end in checkpoint.end_of_generation_ids if end not in ends]
    if lost:
        request.limits.append(
            f"llama.cpp has three end tokens: it does not end an answer at {', '.join(map(str, lost))}"
        )
