package efficientllm.kit;

import java.io.ByteArrayOutputStream;
import java.nio.file.Files;
import java.nio.file.Path;

/** The class of a kit's LlamaChat.kt as far as llama_chat.cpp knows it: MODEL PROMPT_FILE TOKENS prints the greedy answer. */
public final class LlamaChat {
    private native long open(String path, int context, int threads);
    private native void begin(long handle, byte[] prompt, float temperature, float topP, float repetitionPenalty);
    private native byte[] next(long handle);
    private native void close(long handle);

    public static void main(String[] arguments) throws Exception {
        System.loadLibrary("llama_chat");
        LlamaChat chat = new LlamaChat();
        byte[] prompt = Files.readAllBytes(Path.of(arguments[1]));
        long handle;
        try {
            handle = chat.open(arguments[0], 128, 1);
        } catch (IllegalStateException refused) {
            System.out.print(refused.getMessage());
            return;
        }
        try {
            ByteArrayOutputStream answer = new ByteArrayOutputStream();
            for (int round = 0; round < 2; round++) { // the second finds what the first left
                answer.reset();
                chat.begin(handle, prompt, 0, 0.95f, 1.1f);
                for (int count = 0; count < Integer.parseInt(arguments[2]); count++) {
                    byte[] piece = chat.next(handle);
                    if (piece == null) {
                        break;
                    }
                    answer.write(piece);
                }
            }
            System.out.write(answer.toByteArray());
            System.out.flush();
        } catch (IllegalStateException refused) {
            System.out.print(refused.getMessage());
        } finally {
            chat.close(handle);
        }
    }
}
