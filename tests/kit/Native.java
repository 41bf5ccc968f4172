package efficientllm.kit;

import java.io.ByteArrayOutputStream;
import java.nio.file.Files;
import java.nio.file.Path;

/** Kotlin's object of a kit's Conversation.kt as far as JNI knows it: MODEL PROMPT_FILE TOKENS prints the greedy answer. */
public final class Native {
    private native long open(byte[] model, int context, int threads);
    private native int begin(
        long chat, byte[][] texts, boolean[] areTemplate, byte[] grammar, float temperature, float topP,
        float repetitionPenalty);
    private native byte[] next(long chat);
    private native void cancel(long chat);
    private native void close(long chat);

    public static void main(String[] arguments) throws Exception {
        System.loadLibrary("llama_chat");
        Native library = new Native();
        byte[][] prompt = {Files.readAllBytes(Path.of(arguments[1]))};
        try {
            long chat = library.open(arguments[0].getBytes(), 128, 1);
            ByteArrayOutputStream answer = new ByteArrayOutputStream();
            for (int round = 0; round < 2; round++) { // the second finds what the first left
                answer.reset();
                library.begin(chat, prompt, new boolean[] {true}, null, 0, 0.95f, 1.1f);
                for (int count = 0; count < Integer.parseInt(arguments[2]); count++) {
                    byte[] piece = library.next(chat);
                    if (piece == null) {
                        break;
                    }
                    answer.write(piece);
                }
            }
            System.out.write(answer.toByteArray());
            library.cancel(chat);
            library.close(chat);
            library.close(chat);
            library.next(chat);
        } catch (IllegalStateException refused) {
            System.out.print("|" + refused.getMessage());
        }
        System.out.flush();
    }
}
