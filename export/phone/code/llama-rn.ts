// One chat with @NAME@ in React Native on llama.cpp: npm install llama.rn@@LLAMA_RN@
import { initLlama } from 'llama.rn';

/** `path` is where the app keeps model.gguf. */
export async function openChat(path: string) {
  const context = await initLlama({ model: `file://${path}`, n_ctx: @CONTEXT@ });
  return {
    /** Answers a conversation, piece by piece; whole, it is returned. The chat template is in the file. */
    ask: async (messages: { role: string; content: string }[], onText: (text: string) => void = () => {}) => {
      const answer = await context.completion(
        { messages, n_predict: 512, temperature: @TEMPERATURE@, top_p: @TOP_P@, penalty_repeat: @REPETITION_PENALTY@ },
        (data) => onText(data.token),
      );
      return answer.text;
    },
    /** null where this device says what the exporting machine said, else both answers; `check` is `llama.cpp` of check.json. */
    check: async (check: { prompt: string; tokens: number[]; text: string }) => {
      const answer = await context.completion({ prompt: check.prompt, n_predict: check.tokens.length, temperature: 0 });
      return answer.text === check.text ? null : `expected: ${check.text}\nanswered: ${answer.text}`;
    },
    stop: () => context.stopCompletion(),
    close: () => context.release(),
  };
}
