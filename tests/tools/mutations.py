"""Damage an exported model in many ways and count what loading it does:

    python tests/tools/mutations.py FOLDER [--bare] [--first 0] [--count 1000] [--seed 0]

Each mutation changes one file of a copy of FOLDER: bytes, its length, or a single value of its metadata. A forked
process then loads the copy and decodes three tokens. With --bare there is no manifest beside it, so the runtime tries
the file in a child first; that child is forked, too, from a process that has the engine's libraries, where users' is a
new one. Prints one line of JSON: {outcome: count}, and each unexpected mutation on stderr.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from efficientllm.runtime.base.child import ProcessResult
from efficientllm.runtime.base.command import run_command
from efficientllm.runtime.base.errors import EfficientLLMError
from efficientllm.runtime.engines import probe, probe_child
from efficientllm.runtime.engines.artefact import Artefact
from efficientllm.runtime.engines.engine import EngineOptions, load_engine
from efficientllm.runtime.engines.manifest import MANIFEST_NAME, OLLAMA_FILE
from efficientllm.runtime.generation import AnswerOptions, Generation
from efficientllm.runtime.prompt import chat_prompt

LIBRARIES = {
    "llama.cpp": ("llama_cpp",),
    "onnxruntime": ("onnxruntime",),
    "executorch": ("torch", "executorch.runtime"),
}
"""Engine -> what is imported once, before the processes that load the files are forked."""

LONGEST_SECONDS = 60
LARGEST_BYTES = 12 * 2**30
OUTCOMES = {0: "loaded", 10: "refused", 11: "traceback"}
VALUES: tuple[Any, ...] = (0, -1, 1, 7, 2**31 - 1, 2**32 - 1, 1e30, float("nan"), "x", "", None, True, [], {})

Mutate = Callable[[random.Random, Path], None]


def change_bytes(dice: random.Random, path: Path) -> None:
    """One to eight bytes anywhere, or in the first kilobytes, where formats keep what matters."""
    data = bytearray(path.read_bytes())
    end = dice.choice([len(data), min(len(data), 4096), min(len(data), 256)])
    for _ in range(dice.randint(1, 8)):
        place = dice.randrange(end)
        data[place] = (data[place] + dice.randint(1, 255)) % 256
    path.write_bytes(data)


def change_length(dice: random.Random, path: Path) -> None:
    """Cut off, or with something behind it."""
    data = path.read_bytes()
    longer = data + dice.randbytes(dice.randint(1, 4096))
    path.write_bytes(
        dice.choice([data[: dice.randrange(len(data))], data[: dice.randrange(min(len(data), 512))], longer])
    )


def change_run(dice: random.Random, path: Path) -> None:
    """Zeros or noise over a piece, as a bad block of a disk leaves it."""
    data = bytearray(path.read_bytes())
    size = min(len(data), dice.choice([16, 512, 4096]))
    start = dice.randrange(len(data) - size + 1)
    data[start : start + size] = dice.choice([bytes(size), dice.randbytes(size)])
    path.write_bytes(data)


def change_gguf_value(dice: random.Random, path: Path) -> None:
    """A number of the metadata, or of a tensor's shape, type or offset."""
    from gguf import GGUFReader

    reader = GGUFReader(path, "r+")
    fields = [field for field in reader.fields.values() if field.name.split(".")[0] != "GGUF"]
    parts = [part for field in [*fields, *(tensor.field for tensor in reader.tensors)] for part in field.parts]
    part = dice.choice([part for part in parts if part.dtype.kind in "iuf" and part.size <= 4])
    before = part[0]
    while part[0].tobytes() == before.tobytes():
        number = dice.choice([0, 1, 2, 3, 7, 255, 2**31 - 1, 2**32 - 1, float("nan"), -1.0, 1e30, before + 1])
        kinds = {"f": float, "i": int, "u": int}
        number = 5 if number != number and part.dtype.kind != "f" else number
        part[0] = kinds[part.dtype.kind](abs(number) if part.dtype.kind == "u" else number) % limit(part.dtype)
    reader.data.flush()


def limit(dtype: Any) -> float:
    """Numbers at or above this do not fit."""
    return float("inf") if dtype.kind == "f" else 2 ** (8 * dtype.itemsize - (dtype.kind == "i"))


def change_json_value(dice: random.Random, path: Path) -> None:
    """Any leaf, or a whole object, becomes something else."""
    root = {"": json.loads(path.read_text(encoding="utf-8"))}
    holder: Any = root
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = dice.choice(keys)
        if not isinstance(holder[key], (dict, list)) or not holder[key] or (holder is not root and dice.random() < 0.1):
            break
        holder = holder[key]
    holder[key] = dice.choice([value for value in VALUES if repr(value) != repr(holder[key])])
    path.write_text(json.dumps(root[""]), encoding="utf-8")


def mutations_of(path: Path) -> list[Mutate]:
    """Ways to damage a file of its kind."""
    special = {".gguf": change_gguf_value, ".json": change_json_value}.get(path.suffix)
    return [change_bytes, change_length, change_run, *([special] if special else [])]


def mutate(folder: Path, seed: str) -> str:
    """Damage one file of `folder`; what was done."""
    dice = random.Random(seed)
    files = sorted(file for file in folder.iterdir() if file.stat().st_size and file.name != OLLAMA_FILE)
    # half of them to the model itself
    models = [file for file in files if file.suffix in (".gguf", ".pte", ".onnx")]
    file = dice.choice(models if dice.random() < 0.5 else files)
    before, change = file.read_bytes(), change_bytes
    while file.read_bytes() == before:
        change = dice.choice(mutations_of(file))
        change(dice, file)
    return f"{change.__name__} {file.name}"


def in_child(body: Callable[[], int], errors: Path) -> int:
    """Exit code of `body` in a forked process, -N for signal N; what it writes to stderr goes to `errors`."""
    child = os.fork()
    if not child:
        code = 99
        try:
            signal.alarm(LONGEST_SECONDS)
            resource.setrlimit(resource.RLIMIT_AS, (LARGEST_BYTES, LARGEST_BYTES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = body()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def use(path: Path) -> int:
    """Load and answer, as the caller does."""
    try:
        engine = load_engine(path, EngineOptions(threads=1, context=64, huge_pages=False, kv_cache="q8_0"))
        try:
            prompt = chat_prompt(engine, [{"role": "user", "content": "Hi"}])
        except EfficientLLMError:  # only the template is damaged
            prompt = engine.tokenize("Hi", special=True)
        for _ in Generation(engine, prompt or [1], AnswerOptions(3)):
            pass
        engine.close()
    except EfficientLLMError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 10
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 11
    return 0


def forked_probe(arguments: Sequence[str]) -> ProcessResult:
    """probe.run_probe without the start of another Python."""
    with tempfile.TemporaryDirectory() as scratch:
        errors = Path(scratch) / "errors"
        code = in_child(lambda: run_command(probe_child.body, list(arguments)), errors)
        return ProcessResult(code, "", errors.read_text(encoding="utf-8", errors="replace"))


def run(folder: Path, bare: bool, numbers: range, seed: int) -> collections.Counter[str]:
    """Outcomes of the mutations with these numbers."""
    outcomes = collections.Counter[str]()
    artefact = Artefact.open(folder)
    for library in LIBRARIES[artefact.engine]:
        importlib.import_module(library)
    probe.run_probe = forked_probe
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        os.environ["EFFICIENTLLM_CACHE"] = str(Path(scratch) / "cache")
        for number in numbers:
            copy = Path(shutil.copytree(folder, Path(scratch) / f"copy-{number}"))
            if bare:
                (copy / MANIFEST_NAME).unlink()
            what = mutate(copy, f"{seed} {number}")
            is_folder = not bare or artefact.engine == "onnxruntime"
            path, errors = copy if is_folder else copy / artefact.model_file.name, Path(scratch) / "errors"
            code = in_child(lambda path=path: use(path), errors)
            hung = code == -signal.SIGALRM
            outcome = OUTCOMES.get(code, "hung" if hung else "dead")
            outcomes[outcome] += 1
            if outcome != "refused" and not (bare and outcome == "loaded"):
                last = errors.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
                print(f"{number}: {outcome} ({code}) after {what}: {last}", file=sys.stderr)
            errors.unlink(missing_ok=True)
            shutil.rmtree(copy)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bare", action="store_true", help="without the manifest")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    numbers = range(arguments.first, arguments.first + arguments.count)
    print(json.dumps(run(arguments.folder, arguments.bare, numbers, arguments.seed)))


if __name__ == "__main__":
    main()
