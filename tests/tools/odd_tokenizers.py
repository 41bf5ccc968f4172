"""Export models with unusual tokenizers to GGUF, and compare token ids in two builds of llama.cpp with tokenizers:

    python -m tests.tools.odd_tokenizers [--only NAME] [--texts 400] [--seed 1]

The texts are drawn at random from the tokenizer's tokens, unusual characters and the documents in docs/. No code of the
exporter draws, reads or compares them. A file is equal, named (it differs, and the manifest's limits say so), refused,
or wrong. Prints a line for each case and a summary as JSON. The exit code is 1 if a file is wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import logging
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

sys.path += [str(Path(__file__).parents[1])]
from tiny import UNEQUAL, tiny_architecture, tiny_model, tiny_tokenizer

from efficientllm.export.cli import export
from efficientllm.export.verification import sample_text
from efficientllm.runtime.base.errors import EfficientLLMError
from efficientllm.runtime.engines.manifest import Manifest
from efficientllm.train.model.irregular import save_checkpoint

Data = dict[str, Any]
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ("<unk>", "<s>", "</s>")


def byte_level(*before: Any, use_regex: bool = False, ignore_merges: bool = False) -> Tokenizer:
    """Return byte-level BPE with 397 tokens of the sample text after the special ones."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps = [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if before else steps[0]
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=397, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([sample_text()], trainer)
    return backend


def split(digits: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(CONTRACTIONS + digits + PUNCTUATION), "isolated")


def sentencepiece() -> Tokenizer:
    """Return Llama 2's layout: BPE with byte fallback over '▁' words, scores by id."""
    special = [*SPECIAL, *[f"<0x{byte:02X}>" for byte in range(256)]]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=397, special_tokens=special, limit_alphabet=60, show_progress=False)
    backend.train_from_iterator([sample_text().replace("\n", " ")] * 3, trainer)
    data = json.loads(backend.to_str())
    # the trainer numbers letters before merges; in SentencePiece models merges come first, letters last
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    vocabulary = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    letters = [token for token in vocabulary if len(token) == 1]
    merged = [token for token in vocabulary if token not in special and len(token) > 1]
    data["model"]["vocab"] = {token: index for index, token in enumerate([*special, *merged, *letters])}
    backend = Tokenizer.from_str(json.dumps(data))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


BACKENDS: Mapping[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: byte_level(use_regex=True),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "llama-bpe": lambda: byte_level(split(r"\p{N}{1,3}"), ignore_merges=True),
    "dbrx": lambda: byte_level(split(r"\p{N}{1,3}")),
    "qwen2": lambda: byte_level(split(r"\p{N}")),
    "default": sentencepiece,
}
"""llama.cpp's name of a pre-tokenizer -> a tokenizer that has it."""

Edit = Callable[[Data], None]


def added(*contents: str, **flags: bool) -> Edit:
    """Return the addition of tokens with `flags`. A content that is a token keeps its id."""

    def edit(data: Data) -> None:
        vocabulary, tokens = data["model"]["vocab"], data["added_tokens"]
        off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        for content in contents:
            index = vocabulary.get(content, 1 + max(*vocabulary.values(), *(token["id"] for token in tokens)))
            tokens[:] = [token for token in tokens if token["content"] != content]
            tokens.append({"id": index, "content": content, **off, **flags})
        tokens.sort(key=lambda token: token["id"])

    return edit


def normalizer(*steps: Data) -> Edit:
    """Return the addition of normalizers before those of the tokenizer."""

    def edit(data: Data) -> None:
        own = data["normalizer"]
        data["normalizer"] = {"type": "Sequence", "normalizers": [*steps, *(own["normalizers"] if own else [])]}

    return edit


def model(**settings: Any) -> Edit:
    return lambda data: data["model"].update(settings)


def section(**values: Any) -> Edit:
    return lambda data: data.update(values)


def unmerged(*words: str) -> Edit:
    """Return the addition of words that no merge makes, as pruning a vocabulary leaves them."""

    def edit(data: Data) -> None:
        vocabulary = data["model"]["vocab"]
        vocabulary.update({word: len(vocabulary) + index for index, word in enumerate(words)})

    return edit


def without(*tokens: str) -> Edit:
    """Return the removal of tokens of the vocabulary with their merges. Their ids become unused."""

    def edit(data: Data) -> None:
        data["model"]["vocab"] = {token: i for token, i in data["model"]["vocab"].items() if token not in tokens}
        gone = {*tokens}
        data["model"]["merges"] = [pair for pair in data["model"]["merges"] if not gone & {*pair, "".join(pair)}]

    return edit


def reversed_merges(data: Data) -> None:
    data["model"]["merges"].reverse()


def replaced(pattern: Data, content: str) -> Data:
    return {"type": "Replace", "pattern": pattern, "content": content}


def metaspace(scheme: str, split: bool) -> Edit:
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    return section(normalizer=None, pre_tokenizer=step)


def both(*edits: Edit) -> Edit:
    def edit(data: Data) -> None:
        for each in edits:
            each(data)

    return edit


PHI3 = both(
    added("<|user|>", "<|assistant|>", "<|end|>", "</s>", special=True, rstrip=True),
    added("<|endoftext|>", special=True),
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
EDITS: dict[str, Edit] = {
    "nothing": lambda data: None,
    "rstrip special": added("<|user|>", special=True, rstrip=True),
    "rstrip": added("<tool>", rstrip=True),
    "lstrip special": added("<mask>", special=True, lstrip=True),
    "lstrip": added("<tool>", lstrip=True),
    "lstrip and rstrip": added("<x>", "<y>", lstrip=True, rstrip=True),
    "single word": added("cat", single_word=True),
    "normalized": added("<tool>", "Cat", normalized=True),
    "Phi-3": PHI3,
    "Phi-3 without its end of text": added("<|user|>", "</s>", special=True, rstrip=True),
    "NFC": normalizer({"type": "NFC"}),
    "NFKC": normalizer({"type": "NFKC"}),
    "NFD": normalizer({"type": "NFD"}),
    "lower case": normalizer({"type": "Lowercase"}),
    "accents": normalizer({"type": "NFD"}, {"type": "StripAccents"}),
    "strip": normalizer({"type": "Strip", "strip_left": True, "strip_right": True}),
    "line ends": normalizer(replaced({"String": "\r\n"}, "\n")),
    "quotes": normalizer(replaced({"String": "\u201c"}, '"'), replaced({"String": "\u201d"}, '"')),
    "spaces": normalizer(replaced({"Regex": " {2,}"}, " ")),
    "a rare word": normalizer(replaced({"Regex": "colou?r"}, "tint")),
    "overlapping": added("<a>", ">b", "<ab", "b>>>"),
    "nested": added("aa", "aaa", "a<b", "<b>"),
    "spaces in tokens": added(" cat", "\n\n", "  ", "\t\t"),
    "an ordinary token": added("the", special=False),
    "a pad": both(added("[PAD601]"), unmerged("[PAD602]")),
    "dropout": model(dropout=0.3),
    "truncation": section(
        truncation={"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
        | {"pad_type_id": 0, "pad_token": "<unk>"},
    ),
    "a suffix of words": model(end_of_word_suffix="</w>"),
}
"""Edits that are tried on byte-level BPE and on SentencePiece."""

OWN: dict[str, tuple[str, Edit]] = {
    "smollm": ("smollm", EDITS["nothing"]),
    "gpt-2": ("gpt-2", EDITS["nothing"]),
    "llama-bpe": ("llama-bpe", EDITS["nothing"]),
    "dbrx": ("dbrx", EDITS["nothing"]),
    "llama-bpe unmerged": ("llama-bpe", unmerged("zzqx", "Ġzzqx")),
    "dbrx unmerged": ("dbrx", unmerged("zzqx", "Ġzzqx")),
    **{
        f"{base} {word} ignore_merges": (base, both(model(ignore_merges=True), unmerged(*words)))
        for base in ("qwen2", "smollm", "gpt-2")
        for word, words in {"unmerged": ("zzqx", "Ġzzqx"), "plain": ()}.items()
    },
    "bytes": ("qwen2", without("A", "B", "C", "z", "Ń", "Ł", "ð")),
    "no byte tokens": ("default", without("<0xE2>", "<0xF0>", "<0x0A>")),
    "unknown": ("qwen2", both(without("A", "B", "ð"), model(unk_token="<unk>"))),
    "prefix space": ("gpt-2", section(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True})),
    "no regex": ("gpt-2", section(pre_tokenizer=BYTE_LEVEL | {"use_regex": False})),
    "merges reversed": ("default", reversed_merges),
    "merges missing": ("default", lambda data: data["model"]["merges"].pop(20)),
    "no prefix": ("default", section(normalizer=replaced({"String": " "}, "▁"))),
    "no fusion": ("default", model(fuse_unk=False)),
    "SentencePiece unmerged": ("default", unmerged("▁zzqx", "zq")),
    "SentencePiece's space": ("default", added("▁", "▁▁x")),
    **{
        f"Metaspace {scheme} {split}": ("default", metaspace(scheme, split))
        for scheme in ("always", "first", "never")
        for split in (True, False)
    },
    "other digits": ("qwen2", section(pre_tokenizer=None)),
    "removed": ("qwen2", lambda data: data["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed")),
    "a pattern with more": (
        "qwen2",
        lambda data: data["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(
            Regex=CONTRACTIONS + r"\p{N}" + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
        ),
    ),
}
CASES: dict[str, tuple[str, Edit]] = {
    **{f"{name}, BPE": ("qwen2", edit) for name, edit in EDITS.items()},
    **{f"{name}, SentencePiece": ("default", edit) for name, edit in EDITS.items()},
    **OWN,
}
"""Name -> (base, edit of its tokenizer.json)."""
ENDS = {"nothing, BPE": [2, 20, 30], "nothing, SentencePiece": [270, 2, 280, 290, 300]}
"""Name -> end tokens, if these are not </s> alone."""


def tokenizer_data(name: str) -> Data:
    """Return the tokenizer.json of a case."""
    base, edit = CASES[name]
    data = json.loads(_base(base))
    edit(data)
    return data


@cache
def _base(name: str) -> str:
    return BACKENDS[name]().to_str()


def write_checkpoint(name: str, folder: Path) -> None:
    """Write a tiny model with the tokenizer of a case."""
    data = tokenizer_data(name)
    ids = [*data["model"]["vocab"].values(), *(token["id"] for token in data["added_tokens"])]
    size = 620 if "pad" in name else max(ids) + 1
    architecture = replace(tiny_architecture(layers=UNEQUAL[:1]), vocab_size=size)
    save_checkpoint(tiny_model(architecture, eos_token_id=ENDS.get(name, 2)), tiny_tokenizer(), folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


CHARACTERS = (
    *("\n", "\r\n", "\t", " ", "  ", "\u00a0", "e\u0301", "é", "ﬁ", "²", "Å", "“", "”", "\u2019", "½", "한", "ᄒ"),
    *("🙂", "\u200d", "A", "B", "zzqx", " zzqx", "cat", "Cat", "concatenate", "colour", "0", "123456", "don't", ">>>"),
    *("[PAD601]", "[PAD602]"),
)  # fmt: skip


def texts_of(data: Data, count: int, seed: int) -> list[str]:
    """Return paragraphs of docs/, and random texts of added tokens, of other tokens and of unusual characters."""
    draw = random.Random(seed)
    contents = [token["content"] for token in data["added_tokens"]]
    words = [token.replace("Ġ", " ").replace("▁", " ") for token in data["model"]["vocab"]]
    atoms = (contents, words, CHARACTERS)
    texts = ["".join(draw.choice(draw.choice(atoms)) for _ in range(draw.randrange(1, 9))) for _ in range(count)]
    pages = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    paragraphs = [text for page in pages for text in page.read_text(encoding="utf-8").split("\n\n")]
    return [*texts, *draw.sample(paragraphs, min(count // 4, len(paragraphs)))]


READ = """
import json, sys

sys.modules |= dict.fromkeys(json.loads(sys.argv[1]))  # None: as if it were not installed
from efficientllm.runtime.engines.llama_library import load_llama

llama = load_llama()
for line in sys.stdin:
    path, texts = json.loads(line)
    parameters = llama.llama_model_default_params()
    parameters.vocab_only = True
    model = llama.llama_model_load_from_file(path.encode(), parameters)
    vocab = llama.llama_model_get_vocab(model)
    found = []
    for text in (each.encode() for each in texts):
        room = (llama.llama_token * (len(text) + 2))()
        count = llama.llama_tokenize(vocab, text, len(text), room, len(room), False, True)
        found.append(room[:count])
    ends = [token for token in range(llama.llama_vocab_n_tokens(vocab)) if llama.llama_vocab_is_eog(vocab, token)]
    print(json.dumps([found, ends]))
    llama.llama_model_free(model)
"""
BUILDS = {"llama-cpp-python": [], "xllamacpp": ["llama_cpp"]}
"""Build of llama.cpp -> modules that are hidden to select it."""


def read_ids(files: Mapping[Path, list[str]]) -> Iterator[tuple[str, Path, list[list[int]], set[int]]]:
    """Yield (build, file, ids of its texts, end tokens)."""
    request = "".join(json.dumps([str(path), texts]) + "\n" for path, texts in files.items())
    for build, hidden in BUILDS.items():
        command = [sys.executable, "-c", READ, json.dumps(hidden)]
        done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        for path, line in zip(files, done.stdout.splitlines(), strict=True):
            ids, ends = json.loads(line)
            yield build, path, ids, set(ends)


def run_cases(names: Iterable[str], folder: Path, count: int = 400, seed: int = 1) -> dict[str, tuple[str, str]]:
    """Return {case: (outcome, reason)}. The outcome is equal, named, refused or wrong."""
    outcomes: dict[str, tuple[str, str]] = {}
    files: dict[Path, list[str]] = {}
    cases: dict[Path, str] = {}
    for index, name in enumerate(names):
        checkpoint, output = folder / f"checkpoint-{index}", folder / f"gguf-{index}"
        write_checkpoint(name, checkpoint)
        try:
            export(checkpoint, "gguf", output, quantize="f32")
        except EfficientLLMError as error:
            outcomes[name] = ("refused", str(error))
            continue
        outcomes[name] = ("equal", "")
        cases[output / "model.gguf"] = name
        files[output / "model.gguf"] = texts_of(tokenizer_data(name), count, seed)
    for build, path, found, ends in read_ids(files):
        name = cases[path]
        tokenizer = Tokenizer.from_str(json.dumps(tokenizer_data(name) | {"truncation": None, "padding": None}))
        expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in files[path]]
        differing = [text for text, ids, own in zip(files[path], found, expected, strict=True) if ids != own]
        lost = {*ENDS.get(name, [2])} - ends
        limits = Manifest.read(path.parent).limits
        if differing or lost:
            example = f"{build}: {min(differing, key=len)!r}" if differing else f"{build}: ends {lost}"
            outcomes[name] = ("named", "; ".join(limits)) if limits else ("wrong", example)
        elif limits and outcomes[name][0] == "equal":
            outcomes[name] = ("equal", f"also named: {'; '.join(limits)}")
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description="Export unusual tokenizers and compare them in llama.cpp.")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.getLogger("efficientllm").setLevel(logging.ERROR)
    names = [name for name in CASES if arguments.only in name]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        outcomes = run_cases(names, Path(folder), arguments.texts, arguments.seed)
    for name, (outcome, reason) in outcomes.items():
        print(f"{outcome:8} {name}: {reason[:200]}")
    counts = collections.Counter(outcome for outcome, _ in outcomes.values())
    print(json.dumps({"cases": len(outcomes), **counts}))
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
