// Greedy tokens of an ONNX folder in onnxruntime-web's WebAssembly: node ort_web.mjs PACKAGE FOLDER PROMPT COUNT
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { greedyTokens } from "./ort_tokens.mjs";

const [packageFolder, folder, prompt, count] = process.argv.slice(2);
const ort = createRequire(resolve(packageFolder, "package.json"))("onnxruntime-web");
ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(readFileSync(join(folder, "model.onnx")), {
  executionProviders: ["wasm"],
  externalData: [{ path: "model.onnx_data", data: readFileSync(join(folder, "model.onnx_data")) }],
});
const { architecture } = JSON.parse(readFileSync(join(folder, "manifest.json"), "utf8"));
const { tokens, seconds } = await greedyTokens(ort, session, architecture, JSON.parse(prompt), Number(count));
const version = JSON.parse(readFileSync(join(packageFolder, "node_modules/onnxruntime-web/package.json"), "utf8")).version;
console.log(JSON.stringify({ tokens, version, decode_tokens_per_second: (tokens.length - 1) / seconds }));
