// Greedy decoding of an ONNX folder in onnxruntime-web, for node and for a page.

// Returns the most likely tokens and the seconds after the first pass. `given` is the prompt of `count` tokens. With a
// count of 0 it is read token by token, and the tokens are the most likely ones after each of its own.
export async function greedyTokens(ort, session, architecture, given, count) {
  const past = {};
  for (const name of session.inputNames.filter((name) => name.startsWith("past_key_values."))) {
    const heads = architecture.num_key_value_heads[Number(name.split(".")[1])];
    past[name] = new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, architecture.head_dim]);
  }
  const integers = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

  const isRead = count === 0, tokens = [];
  let next = isRead ? given.slice(0, 1) : given, length = 0, began = 0;
  for (let step = 0; step < (isRead ? given.length : count); step++) {
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
  return { tokens, seconds: (performance.now() - began) / 1000 };
}
