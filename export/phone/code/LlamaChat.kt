// One chat with @NAME@ on llama.cpp @LLAMA_CPP@: CMakeLists.txt builds it with llama_chat.cpp into the app.
// Call it from a background thread: ask() returns when the answer is complete.
package efficientllm.kit

import java.io.Closeable
import java.io.File
import java.nio.ByteBuffer
import java.nio.CharBuffer
import java.nio.charset.CodingErrorAction
import org.json.JSONObject

/** `folder` holds model.gguf and check.json; as many `threads` as the phone has fast cores. */
class LlamaChat(private val folder: File, threads: Int = 4) : Closeable {
    private val handle = open(File(folder, "model.gguf").path, CONTEXT, threads)

    @Volatile
    private var stopped = false

    /** Answers one question that stands alone, piece by piece; whole, it is returned. */
    fun ask(question: String, temperature: Float = @TEMPERATURE@f, onText: (String) -> Unit = {}): String =
        generate(BEFORE + question + AFTER, CONTEXT, temperature, onText)

    /** From any thread. */
    fun stop() {
        stopped = true
    }

    /** null where this device says what the exporting machine said, else both answers. */
    fun check(): String? {
        val check = JSONObject(File(folder, "check.json").readText()).getJSONObject("llama.cpp")
        val answer = generate(check.getString("prompt"), check.getJSONArray("tokens").length(), 0.0f) {}
        val expected = check.getString("text")
        return if (answer == expected) null else "expected: $expected\nanswered: $answer"
    }

    override fun close() = close(handle)

    private fun generate(prompt: String, length: Int, temperature: Float, onText: (String) -> Unit): String {
        stopped = false
        begin(handle, prompt.toByteArray(), temperature, TOP_P, REPETITION_PENALTY)
        val answer = StringBuilder()
        val characters = Characters()
        for (count in 1..length) {
            val piece = (if (stopped) null else next(handle)) ?: break
            val text = characters.of(piece)
            answer.append(text)
            if (text.isNotEmpty()) onText(text)
        }
        return answer.toString()
    }

    private external fun open(path: String, context: Int, threads: Int): Long
    private external fun begin(
        handle: Long, prompt: ByteArray, temperature: Float, topP: Float, repetitionPenalty: Float)
    private external fun next(handle: Long): ByteArray?
    private external fun close(handle: Long)

    /** Whole characters of pieces that may end amid one. */
    private class Characters {
        private val decoder = Charsets.UTF_8.newDecoder()
            .onMalformedInput(CodingErrorAction.REPLACE).onUnmappableCharacter(CodingErrorAction.REPLACE)
        private var rest = ByteArray(0)

        fun of(piece: ByteArray): String {
            val bytes = ByteBuffer.wrap(rest + piece)
            val characters = CharBuffer.allocate(bytes.remaining())
            decoder.decode(bytes, characters, false)
            rest = ByteArray(bytes.remaining()).also { bytes.get(it) }
            characters.flip()
            return characters.toString()
        }
    }

    private companion object {
        const val CONTEXT = @CONTEXT@
        const val TOP_P = @TOP_P@f
        const val REPETITION_PENALTY = @REPETITION_PENALTY@f
        const val BEFORE = @BEFORE@
        const val AFTER = @AFTER@

        init {
            System.loadLibrary("llama_chat")
        }
    }
}
