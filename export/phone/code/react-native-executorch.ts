// One chat with @NAME@ in React Native on ExecuTorch: npm install react-native-executorch@@REACT_NATIVE_EXECUTORCH@
import { createLLMChatSession } from 'react-native-executorch';

/** `folder` holds model.pte, tokenizer.json and tokenizer_config.json: a path of the app's, or where they are served. */
export async function openChat(folder: string) {
  const session = await createLLMChatSession(
    {
      modelPath: `${folder}/model.pte`,
      tokenizerPath: `${folder}/tokenizer.json`,
      tokenizerConfigPath: `${folder}/tokenizer_config.json`,
    },
    { generationConfig: { temperature: @TEMPERATURE@, maxNewTokens: 512 } },
  );
  return {
    /** Sends the next message of the conversation; the answer comes piece by piece. */
    ask: (message: string, onText: (text: string) => void = () => {}) => session.sendMessage(message, onText),
    stop: () => session.stop(),
    close: () => session.dispose(),
  };
}
