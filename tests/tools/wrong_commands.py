"""Commands with one mistake each, and part of the line that each must print.

`python tests/tools/wrong_commands.py` runs them one by one and prints the CPU seconds until each line. MODEL is a tiny
checkpoint. tests/test_export_options.py runs them without torch and the libraries of the engines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}

EXPORT_FIRST = "MODEL is a checkpoint; export it first: efficientllm export MODEL --target gguf --output MODEL-gguf"

COMMANDS: dict[str, str] = {
    "train --source MODEL --data x": "--output is missing; name a folder for the run",
    "train --source MODEL --data x --output run --saliency taylor9 --target-ratio 0.8": "--saliency taylor9: unknown",
    "train --source MODEL --data x --output run --saliency fisher": "prunes nothing without a target",
    "train --preset recover --data good.jsonl --output run": "prunes nothing without a target; give --target-ratio",
    "train --source no-such-folder --data x --output run": "--source no-such-folder: no such folder",
    "train --source MODEL --data no.txt --output run --prune none": "--data no.txt: no such file or folder",
    "train --source MODEL --data empty --output run --prune none": "--data empty: the folder holds no ",
    "train --source MODEL --data nothing.jsonl --output run --prune none": "--data nothing.jsonl: it has no documents",
    "train --source no.gguf --output run --prune none": "--source no.gguf: not a GGUF file; copy or download it again",
    "train --source MODEL --data text.txt --output run --target-architecture no.json": "no.json: no such file",
    "train --output run --device gpu": "--device gpu: not a device; use auto, cpu, cuda or cuda:N",
    "train --data text.txt --output run --target-ratio 0.8 --task nothing.jsonl": "has no examples",
    "train --data text.txt --output run --target-ratio 0.8 --task chats.jsonl --metric cal": "known are",
    "train --output run --sorce demo": "unrecognized arguments: --sorce demo; did you mean --source?",
    "train --output run --data good.jsonl --tokens many": "argument --tokens: 'many' is not a number like 30000, 30k,",
    "train --output run --data good.jsonl --learning-rate 0": "--learning-rate 0.0: must be above 0 and finite",
    "train --output run --data good.jsonl --target-ratio 1.5": "--target-ratio 1.5: must be above 0 and at most 1",
    "train --output run --data good.jsonl --target-ratio 0.8 --target-bytes 60MB": "--target-ratio and --target-bytes",
    "train --output run --data good.jsonl --target-ratio 0.8 --prune none": "--prune none conflicts with",
    "train --output run --data good.jsonl --target-ratio 0.8 --prune heads": "--prune heads: choose from attention,",
    "train --preset jobs --data good.jsonl --output run": "--preset jobs: unknown; known: cpu-quickstart, recover,",
    "train --preset job --data broken.jsonl --output run": "--data broken.jsonl: line 31 is not a JSON object that",
    "train --preset job --data good.jsonl --output /proc/nope": "--output /proc/nope: /proc cannot be written; name",
    "train --preset job --data good.jsonl --output text.txt": "--output text.txt is not a folder; name one",
    "train --preset job --data good.jsonl --output text.txt/run": "text.txt is not a folder; name another one",
    "train --preset job --data good.jsonl --output .": "--output . is or holds the current folder; name another",
    "train --preset job --data good.jsonl --output full": "--output full is not empty; give --overwrite to replace it",
    "train --preset job --data good.jsonl --output full --overwrite": "--output full holds mine.txt, not written by",
    "train --preset job --data good.jsonl --output held --overwrite": "--output held is being written by ",
    "train --preset job --output run": "--data is missing; give your examples, such as train.jsonl",
    "train --preset job --data good.jsonl --output run --tokens 2048": "--removals 3: more than the steps between ",
    "train --preset job --data good.jsonl --output run --target-bytes 1MB": "1.0 MB is too small: one group per",
    "train --preset job --data good.jsonl --output run --target-params 900G": "is larger than the source's ",
    "train --output run --data good.jsonl --sequence-length 9k --prune none": "9000: the source's context is 8192",
    "train --preset job --data good.jsonl --output run --chat-template text.txt": "does not write an answer behind the",
    "train --resume": "--output is missing; name a folder for the run",
    "train --output empty --resume": "--resume: empty holds no run (no config.toml)",
    "train --preset job --data :0.5 --output run": "--data ':0.5' has no path; name a file, a folder or a hub dataset",
    "train --preset job --data good.jsonl --output run --data picture.png": "--data picture.png: unknown file type;",
    "train --preset job --data utf16.jsonl --output run": "--data utf16.jsonl: line 1 is not UTF-8 but UTF-16;",
    "train --preset job --data odd.csv --output run": '--data odd.csv: no column "text"; it has id;text (--text-field',
    "train --preset job --data quote.csv --output run": "--data quote.csv: malformed CSV in the row that begins at",
    "train --preset job --data good.jsonl --output run --config text.txt": "--config text.txt: not valid TOML:",
    "train --preset job --data good.jsonl --output run --config typo.toml": "--config typo.toml: unknown setting",
    "train --preset job --data good.jsonl --output run --sizes 50MB,40MB --lr-schedule cosine": "every size decays",
    "train --preset job --data good.jsonl --output run --task chats.jsonl --metric call": "no example of --task",
    "train --preset job --data good.jsonl --output run --adapter empty": "--adapter empty: no adapter_config.json",
    "train --preset job --data good.jsonl --output run --teacher no-such-folder": "--teacher no-such-folder: needs",
    "train --preset job --data good.jsonl --output run --device-profile no.json --target-latency 0.5x": "needs",
    "train --preset job --data good.jsonl --output run --qat q3": "argument --qat: 'q3' is not one of none, q8_0,",
    "train --preset job --data good.jsonl --output run --threads -1": "--threads -1: must be between 0 and 1024",
    "train --preset job --data good.jsonl --output run --for pdf": "--for pdf: choose from gguf, web, onnx,",
    "train --preset job --data one.jsonl --output run": "--data one.jsonl: holds back no text; give more documents or",
    "train --source good.jsonl --data good.jsonl --output run": "--source good.jsonl: a file, but no .gguf; give that",
    "data check no.txt": "FILE no.txt: no such file or folder",
    "data check text.txt:-1": "FILE text.txt:-1: the weight must be positive",
    "data check text.txt --test no.txt": "--test no.txt: no such file or folder",
    "data check text.txt --source no-such-folder": "--source no-such-folder: no such folder",
    "data chek good.jsonl": "argument action: invalid choice: 'chek' (choose from 'check')",
    "data check nothing.jsonl": "nothing.jsonl has no documents; give other text",
    "data check good.jsonl --functions known": "argument --functions: 'known' is not one of described, learned",
    "data check good.jsonl --sequence-length 1": "--sequence-length 1: must be at least 8",
    "export MODEL --target gguf --quantize q4": "--quantize q4: unknown for gguf; known: f32, ",
    "export MODEL --target onnx --quantize q4": "--quantize q4: unknown for onnx; known: f32, ",
    "export MODEL --target executorch --quantize q4": "--quantize q4: unknown for executorch; known: 8da4w, ",
    "fit no-such-folder --max-bytes 60MB": "no-such-folder is no run with --sizes; give the --output of ",
    "export no-such-folder --target gguf": "no-such-folder: no such folder, and not a hub id",
    "export MODEL --target gguf --output out --calibrate no.txt": "--calibrate no.txt: no such file or folder",
    "export MODEL --target onnx --output out --quantize int4 --calibrate no.txt": "--calibrate no.txt: no such file",
    "export MODEL --target gguf --output out --max-kl -1": "--max-kl -1.0: must not be negative",
    "export MODEL --target ggfu --output out": "--target ggfu: unknown; known: gguf, onnx, executorch, hf-uniform, web",
    "export MODEL --target gguf --output out --quantise q4_0": "--quantise q4_0; did you mean --quantize?",
    "export good.jsonl --target gguf --output out": "good.jsonl: a file, but no .gguf; give that, a folder, or a",
    "export empty --target gguf --output out": "empty: the folder has no config.json; give a run or a Hugging Face",
    "export begun --target gguf --output out": "begun: the run is not finished; efficientllm-train --resume --output ",
    "export exported --target gguf --output out": "exported: an exported folder; give its run, or the rounded exported",
    "export MODEL --target gguf --output out --adapter empty": "--adapter empty: no adapter_config.json there; give a",
    "export MODEL --target gguf --output out --size 60MB": "unrecognized arguments: --size 60MB",
    "chat MODEL Hi": EXPORT_FIRST,
    "chat no-such-folder": "no-such-folder does not exist; give a folder written by efficientllm-export, or a .gguf",
    "chat no.gguf": "no.gguf is not a GGUF file; give another file",
    "chat demo Hi --temperature -1": "--temperature -1.0: must be between 0 and 1e+30",
    "chat demo Hi --max-tokens 0": "--max-tokens 0: must be positive",
    "chat empty Hi": "empty holds no manifest.json; give a folder written by efficientllm-export",
    "serve no.gguf": "no.gguf is not a GGUF file; give another file",
    "serve demo --allow-host http://x/": "--allow-host http://x/: must be a name without http:// and path",
    "serve demo --pin no.txt": "--pin no.txt: no such file; give a text or a .json file with messages",
    "serve demo --api-key-file no.txt": "--api-key-file no.txt: cannot be read: [Errno 2] ",
    "serve MODEL": EXPORT_FIRST,
    "serve demo --port 99999": "--port 99999: must be between 1 and 65535",
    "serve demo --model demo": "--model demo: must be NAME=PATH",
    "serve demo --max-memory lots": "argument --max-memory: 'lots' is not a number like 60MB, 1.5GB or 64MiB",
    "serve-web empty": "empty has no index.html; write a page with efficientllm-export --target web",
    "eval MODEL --device mps": "--device mps: not a device; use auto, cpu, cuda or cuda:N",
    "eval MODEL --context -1": "--context -1: must not be negative",
    "eval demo --compare empty": "empty holds no manifest.json; give a folder",
    "eval MODEL --compare MODEL": "MODEL is given twice; name each model once",
    "eval MODEL --output text.txt": "--output text.txt: ",
    "eval owner/name": "download it first: hf download owner/name --local-dir name",
    "eval no-such-folder": "no-such-folder: no such folder or file, and not demo, the built-in model",
    "eval MODEL --task no.jsonl --metric call": "--task no.jsonl: no such file",
    "eval MODEL --task broken.jsonl --metric exact": "--task broken.jsonl: line 31 is not JSON: Expecting value: line",
    "eval MODEL --task chats.jsonl --metric cal": "--metric cal: known are exact, contains, json, call, label, chrf,",
    "eval MODEL --task chats.jsonl --metric call": "--metric call: no example of --task has tools or expects a",
    "eval MODEL --task chats.jsonl --constrain schema --metric exact": "--constrain schema has no effect: no",
    "eval MODEL --task chats.jsonl --metric python:no_module:score": "--metric python:no_module:score: cannot be",
    "eval MODEL --write": "--write stores the score of a job; give --task",
    "eval MODEL --output /proc/nope": "--output /proc/nope: /proc cannot be written; name another folder",
    "eval MODEL --tasks no_such_task": "--tasks no_such_task: unknown; known: arc_challenge, arc_easy, boolq,",
    "bench demo --device ssh://pi@board:port": "--device 'ssh://pi@board:port': give ssh://USER@HOST or ",
    "bench demo --device ssh://[board": "--device 'ssh://[board': give ssh://USER@HOST or ",
    "bench owner/name": "owner/name does not exist; export it first: efficientllm export owner/name --target gguf",
    "bench demo --device phone": "--device 'phone' is unknown; use local, ssh://USER@HOST[:PORT] or adb[:SERIAL]",
    "bench demo --json /proc/out.json": "--json /proc/out.json: /proc cannot be written; name a file elsewhere",
    "bench demo --json no-such-folder/out.json": "--json no-such-folder/out.json: its folder does not exist",
    "bench demo --profile text.txt": "--profile text.txt was not written by this command; name another file",
    "doctor --jsno": "unrecognized arguments: --jsno; did you mean --json?",
}
"""{command: part of its error}."""

BAR_SECONDS = 1.0
"""CPU seconds within which 95 % of the lines must come."""


def write_inputs(folder: Path) -> None:
    """Write the files that COMMANDS name into `folder`."""
    chats = [
        {"messages": [{**message, "content": f"{message['content']} {index}"} for message in CHAT["messages"]]}
        for index in range(300)
    ]
    lines = [json.dumps(chat) for chat in chats]
    files = {
        "text.txt": "Some text.",
        "chats.jsonl": json.dumps(CHAT),
        "nothing.jsonl": "",
        "good.jsonl": "\n".join(lines),
        "broken.jsonl": "\n".join([*lines[:30], '{"messages": [', *lines[30:60]]),
        "one.jsonl": json.dumps({"text": "a long line " * 5000}),
        "odd.csv": "id;text\n1;a\n",
        "quote.csv": 'text\n"a\nb\n',
        "typo.toml": "learning_rat = 1e-4\n",
        "no.gguf": "not a model",
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "utf16.jsonl").write_text(lines[0], encoding="utf-16")
    (folder / "picture.png").write_bytes(bytes(range(256)))
    for name in ("empty", "full", "held", "begun", "exported"):
        (folder / name).mkdir()
    (folder / "full" / "mine.txt").write_text("mine")
    (folder / "begun" / "config.toml").write_text("")
    (folder / "exported" / "model.gguf").write_text("")


def cpu_seconds(command: list[str], folder: Path) -> tuple[int, float, str]:
    """Run `command` in `folder` and return its exit code, CPU seconds, and standard error."""
    with tempfile.TemporaryFile("w+") as errors:
        started = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        return started.returncode, usage.ru_utime + usage.ru_stime, errors.read()


def main() -> int:
    """Print each command that is slow or unclear, and return 1 if a bar is missed."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tiny import tiny_architecture, tiny_model, tiny_tokenizer

    from efficientllm.runtime.base.output import locked_output
    from efficientllm.train.model.irregular import save_checkpoint

    num_slow = num_unclear = 0
    with tempfile.TemporaryDirectory() as name, locked_output(Path(name, "held")):
        folder = Path(name)
        write_inputs(folder)
        save_checkpoint(tiny_model(tiny_architecture()), tiny_tokenizer(), folder / "MODEL")
        for command, expected in COMMANDS.items():
            script = [sys.executable, "-m", "efficientllm.runtime.start", *command.split()]
            code, seconds, errors = cpu_seconds(script, folder)
            is_clear = code == 2 and errors.count("\n") == 1 and expected in errors
            num_slow, num_unclear = num_slow + (seconds > BAR_SECONDS), num_unclear + (not is_clear)
            if seconds > BAR_SECONDS or not is_clear:
                print(f"{seconds:.2f} s, exit code {code}: {command}\n    {errors.strip()}")
    print(f"{len(COMMANDS)} commands, {num_unclear} unclear, {num_slow} over {BAR_SECONDS} s of CPU time")
    return int(num_unclear > 0 or num_slow > 0.05 * len(COMMANDS))


if __name__ == "__main__":
    sys.exit(main())
