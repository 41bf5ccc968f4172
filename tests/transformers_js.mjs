// Greedy tokens of an ONNX folder in transformers.js: node transformers_js.mjs PACKAGE FOLDER PROMPT COUNT
import { createRequire } from "node:module";
import { existsSync } from "node:fs";
import { resolve, basename, dirname } from "node:path";
import { pathToFileURL } from "node:url";

const [packageFolder, folder, prompt, count] = process.argv.slice(2);
const entry = createRequire(resolve(packageFolder, "package.json")).resolve("@huggingface/transformers");
const { AutoModelForCausalLM, AutoTokenizer, Tensor, env } = await import(pathToFileURL(entry));
env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder));
const name = basename(resolve(folder));
const tokenizer = await AutoTokenizer.from_pretrained(name);
const isRepository = existsSync(resolve(folder, "onnx"));  // where transformers.js looks unless it is told otherwise
const model = await AutoModelForCausalLM.from_pretrained(name, isRepository ? {} : { subfolder: "" });
const integers = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const ids = JSON.parse(prompt);
const output = await model.generate({
  inputs: integers(ids),
  attention_mask: integers(Array(ids.length).fill(1)),
  max_new_tokens: Number(count),
  do_sample: false,
  eos_token_id: -1,
});
const tokens = Array.from(output.data, Number).slice(ids.length);
const question = [{ role: "user", content: "Hi" }];
const chat = tokenizer.apply_chat_template(question, { tokenize: false, add_generation_prompt: true });
console.log(JSON.stringify({ tokens, encoded: tokenizer.encode("A small model, 2026."), chat }));
