// Greedy tokens of an ONNX folder in onnxruntime-web's WebAssembly: node ort_web.mjs PACKAGE FOLDER PROMPT COUNT
// With COUNT 0 the prompt is read token by token, and the tokens are the likeliest after each of its own.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";

const [packageFolder, folder, prompt, count] = process.argv.slice(2);
const ort = createRequire(resolve(packageFolder, "package.json"))("onnxruntime-web");
ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(readFileSync(join(folder, "model.onnx")), {
  executionProviders: ["wasm"],
  externalData: [{ path: "model.onnx_data", data: readFileSync(join(folder, "model.onnx_data")) }],
});

const manifest = JSON.parse(readFileSync(join(folder, "manifest.json"), "utf8"));
const past = {};
for (const name of session.inputNames.filter((name) => name.startsWith("past_key_values."))) {
  const heads = manifest.architecture.num_key_value_heads[Number(name.split(".")[1])];
  past[name] = new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, manifest.architecture.head_dim]);
}
const integers = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

const given = JSON.parse(prompt), isRead = Number(count) === 0;
let next = isRead ? given.slice(0, 1) : given, length = 0, began = 0;
const tokens = [];
for (let step = 0; step < (isRead ? given.length : Number(count)); step++) {
  if (step === 1) began = performance.now();
  length += next.length;
  const feeds = { input_ids: integers(next), attention_mask: integers(Array(length).fill(1)), ...past };
  const results = await session.run(feeds);
  for (const name of Object.keys(past)) past[name] = results[name.replace("past_key_values", "present")];
  const logits = results.logits.data;
  let best = 0;
  for (let index = 1; index < logits.length; index++) if (logits[index] > logits[best]) best = index;
  tokens.push(best);
  next = isRead ? [given[step + 1]] : [best];
}
const seconds = (performance.now() - began) / 1000;
const version = JSON.parse(readFileSync(join(packageFolder, "node_modules/onnxruntime-web/package.json"), "utf8")).version;
console.log(JSON.stringify({ tokens, version, decode_tokens_per_second: (tokens.length - 1) / seconds }));
