"""The other routes of docs/web.md: `PYTHONPATH=tests python tests/tools/web_routes.py [--threads N] FOLDER...` measures
ONNX folders in headless Chromium by onnxruntime-web itself and by transformers.js, both of build/node
(`npm install --ignore-scripts --prefix build/node @huggingface/transformers`).

Folders and routes take turns. Prefill is of a prompt of 128 tokens, decode of 24 after it, by the page's clock; beside
it by CPU time of the browser's processes, which other programs do not add to."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chromium import chromium
from web_speed import cpu_seconds, print_speeds

from efficientllm.server.web import WebServerOptions, web_server

NODE = Path(__file__).parents[2] / "build/node/node_modules"
ROUNDS = 3
PROMPT, NEW_TOKENS = 128, 24

PAGES = {
    "onnxruntime-web": """
import * as ort from "/ort/ort.wasm.min.mjs";
ort.env.wasm.wasmPaths = "/ort/";
ort.env.wasm.numThreads = THREADS;
const bytes = async (name) => new Uint8Array(await (await fetch(name)).arrayBuffer());
const session = await ort.InferenceSession.create(await bytes("/model/model.onnx"), {
  executionProviders: ["wasm"],
  externalData: [{ path: "model.onnx_data", data: await bytes("/model/model.onnx_data") }],
});
const { architecture } = await (await fetch("/model/manifest.json")).json();
const integers = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
window.generate = async (prompt, count) => {
  const past = {};
  for (const name of session.inputNames.filter((name) => name.startsWith("past_key_values."))) {
    const heads = architecture.num_key_value_heads[Number(name.split(".")[1])];
    past[name] = new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, architecture.head_dim]);
  }
  const tokens = [];
  for (let next = prompt, length = 0; tokens.length < count; next = tokens.slice(-1)) {
    length += next.length;
    const feeds = { input_ids: integers(next), attention_mask: integers(Array(length).fill(1)), ...past };
    const results = await session.run(feeds);
    for (const name of Object.keys(past)) past[name] = results[name.replace("past_key_values", "present")];
    const logits = results.logits.data.slice(-architecture.vocab_size);
    tokens.push(logits.reduce((best, value, index) => (value > logits[best] ? index : best), 0));
  }
  return tokens;
};
""",
    "transformers.js": """
import { AutoModelForCausalLM, Tensor, env } from "/transformers/transformers.min.js";
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "/";
env.useBrowserCache = false;
env.backends.onnx.wasm.wasmPaths = "/ort/";
env.backends.onnx.wasm.numThreads = THREADS;
const model = await AutoModelForCausalLM.from_pretrained("model", { subfolder: "", device: "wasm" });
const integers = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
window.generate = async (prompt, count) => {
  const attention_mask = integers(Array(prompt.length).fill(1));
  const settings = { max_new_tokens: count, do_sample: false, eos_token_id: -1 };
  const output = await model.generate({ inputs: integers(prompt), attention_mask, ...settings });
  return Array.from(output.data, Number).slice(prompt.length);
};
""",
}
"""Route -> a module that loads /model and defines generate(prompt, count): greedy tokens."""

PAGE = """<!doctype html><script>addEventListener("error", (event) => { window.failed = event.message; });</script>"""

TIMED = """async ([prompt, count]) => {
  const began = performance.now();
  const tokens = await window.generate(prompt, count);
  return { tokens, seconds: (performance.now() - began) / 1000 };
}"""


@contextlib.contextmanager
def site(folder: Path, route: str, threads: int) -> Iterator[str]:
    """The address of a page that runs the model in `folder`."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for path, target in (
            ("model", folder.resolve()),
            ("ort", NODE / "onnxruntime-web/dist"),
            ("transformers", NODE / "@huggingface/transformers/dist"),
        ):
            (root / path).symlink_to(target)
        code = PAGES[route].replace("THREADS", str(threads))
        (root / "index.html").write_text(f"{PAGE}<script type=module>{code}window.ready = true;</script>")
        with web_server(root, WebServerOptions(port=0)) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}/"
            server.shutdown()


def speeds(browser: Any, folder: Path, route: str, threads: int) -> tuple[dict[str, float], list[int]]:
    """({what: tokens per second}, the greedy tokens)"""
    prompt = [token % 1000 + 100 for token in range(7, 7 * (PROMPT + 1), 7)]
    with site(folder, route, threads) as address, contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        page.goto(address)
        page.wait_for_function("window.ready || window.failed", timeout=300_000)
        if failed := page.evaluate("window.failed"):
            raise SystemExit(f"{route}: {failed}")
        page.evaluate(TIMED, [prompt, 2])  # memory grows to what the prompt takes
        began = cpu_seconds()
        first = page.evaluate(TIMED, [prompt, 1])
        middle = cpu_seconds()
        whole = page.evaluate(TIMED, [prompt, NEW_TOKENS + 1])
        cpu, cpu_of_prompt = cpu_seconds() - middle, middle - began
    found = {
        "prefill": PROMPT / first["seconds"],
        "decode": NEW_TOKENS / (whole["seconds"] - first["seconds"]),
        "prefill, by CPU time": PROMPT / cpu_of_prompt,
        "decode, by CPU time": NEW_TOKENS / (cpu - cpu_of_prompt),
    }
    return found, whole["tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("folders", nargs="+", type=Path)
    arguments = parser.parse_args()
    cases = [(folder, route) for folder in arguments.folders for route in PAGES]
    measured: dict[tuple[Path, str], list[tuple[dict[str, float], list[int]]]] = {case: [] for case in cases}
    with chromium() as browser:
        for _ in range(ROUNDS):
            for case in cases:
                measured[case].append(speeds(browser, *case, arguments.threads))
    tokens = {json.dumps(said) for found in measured.values() for _, said in found}
    print(f"the same tokens everywhere: {len(tokens) == 1}")
    for (folder, route), found in measured.items():
        print(f"{folder.name} in {route}")
        print_speeds([each for each, _ in found])


if __name__ == "__main__":
    main()
