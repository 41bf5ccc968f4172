// The npm openai client against a server: node openai.mjs FOLDER ADDRESS; it lies in FOLDER/node_modules.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [folder, address] = process.argv.slice(2);
const OpenAI = createRequire(`${folder}/`)("openai");
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "secret", maxRetries: 0 });
const schema = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] }, is_warm: { type: "boolean" } },
  required: ["city", "is_warm"],
  additionalProperties: false,
};
const common = { model: "tiny", messages: [{ role: "user", content: "How is the weather in Rome?" }], max_tokens: 200 };
const tools = [{ type: "function", function: { name: "weather", parameters: schema } }];

const check = (text) => {
  const found = JSON.parse(text);
  assert.ok(["Paris", "Rome"].includes(found.city) && typeof found.is_warm === "boolean", text);
};

const parsed = await client.chat.completions.parse({
  ...common, response_format: { type: "json_schema", json_schema: { name: "weather", schema } },
});
check(parsed.choices[0].message.content);

let text = "";
for await (const chunk of await client.chat.completions.create({ ...common, max_tokens: 8, stream: true })) {
  text += chunk.choices[0]?.delta.content ?? "";
}
assert.ok(text);

const called = await client.chat.completions.create({ ...common, tools, tool_choice: "required" });
const [call] = called.choices[0].message.tool_calls;
check(call.function.arguments);
const result = { role: "tool", tool_call_id: call.id, content: "sunny" };
const messages = [...common.messages, called.choices[0].message, result];
assert.ok((await client.chat.completions.create({ ...common, messages, max_tokens: 8 })).choices[0].message.content);

const runner = client.chat.completions.stream({ ...common, tools, tool_choice: "required" });
const [streamed] = (await runner.finalChatCompletion()).choices[0].message.tool_calls;
check(streamed.function.arguments);
