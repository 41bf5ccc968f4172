// A conversation with @NAME@ on llama.cpp @LLAMA_CPP@, which CMakeLists.txt builds.
package efficientllm.kit

import java.io.Closeable
import java.io.File
import java.nio.ByteBuffer
import java.nio.CharBuffer
import java.nio.charset.CodingErrorAction
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.channels.Channel
import kotlinx.coroutines.channels.awaitClose
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.buffer
import kotlinx.coroutines.flow.callbackFlow
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.launch
import kotlinx.coroutines.sync.Mutex
import kotlinx.coroutines.sync.withLock
import org.json.JSONArray
import org.json.JSONObject

/** The functions of llama_chat.h; libllama_chat.so is built by src/main/cpp. */
internal object Native {
    init {
        System.loadLibrary("llama_chat")
    }

    external fun loadBackends(folder: ByteArray)
    external fun open(model: ByteArray, context: Int, threads: Int): Long
    external fun begin(
        chat: Long, texts: Array<ByteArray>, areTemplate: BooleanArray, grammar: ByteArray?, temperature: Float,
        topP: Float, repetitionPenalty: Float,
    ): Int
    external fun next(chat: Long): ByteArray?
    external fun cancel(chat: Long)
    external fun close(chat: Long)
}

/** A function that the model calls. */
data class Call(val name: String, val arguments: JSONObject)

data class Message(val role: String, val content: String)

/**
 * A conversation with a model and its history. `folder` holds model.gguf, generation.json and check.json.
 *
 * `libraries` is the app's nativeLibraryDir, where llama.cpp chooses its code for this processor. Reads the model:
 * create it on a background thread, with as many `threads` as the phone has fast cores.
 */
class Conversation(
    private val folder: File, private val system: String? = null, threads: Int = 4, libraries: String? = null,
) : Closeable {
    private val settings = JSONObject(File(folder, "generation.json").readText())
    private val turns = Turns(settings.getJSONObject("turns"))
    private val answering = Mutex()
    private val handle: Long
    private val past = mutableListOf<Message>()

    init {
        libraries?.let { Native.loadBackends(it.toByteArray()) }
        handle = Native.open(File(folder, "model.gguf").path.toByteArray(), settings.getInt("context"), threads)
    }

    /** Questions and answers so far. */
    val history: List<Message> get() = synchronized(past) { past.toList() }

    /** Forgets the history. */
    fun clear() = synchronized(past) { past.clear() }

    /**
     * Answers a question piece by piece. Cancelling the collection ends the computation, and the answer so far stays in
     * the history. A `grammar` in GBNF, with the rule root, limits the answer. A temperature of 0 is the likeliest answer.
     */
    fun ask(question: String, grammar: String? = null, temperature: Float? = null): Flow<String> = stream { emit ->
        val asked = history + Message("user", question)
        val answer = StringBuilder()
        val outcome = runCatching {
            generate(turns.prompt(system, asked), Int.MAX_VALUE, temperature, grammar) { piece ->
                answer.append(piece)
                emit(piece)
            }
        }
        if (turns.hasHistory && (outcome.isSuccess || answer.isNotEmpty())) {
            synchronized(past) { past += listOf(asked.last(), Message("assistant", answer.toString())) }
        }
        outcome.getOrThrow()
    }

    /** The calls by which the model answers, of the functions that the kit was exported with (--functions). */
    suspend fun call(question: String, temperature: Float = 0.0f): List<Call> {
        val format = settings.getJSONObject("calls")
        val answer = ask(question, format.getString("grammar"), temperature).toList().joinToString("")
        return callsOf(answer, format)
    }

    /** null where this phone says what the exporting machine said, else both answers. */
    suspend fun check(): String? {
        val check = JSONObject(File(folder, "check.json").readText()).getJSONObject("llama.cpp")
        val prompt = listOf(check.getString("prompt") to true)
        val answer = stream { generate(prompt, check.getJSONArray("tokens").length(), 0.0f, null, it) }.toList().joinToString("")
        val expected = check.getString("text")
        return if (answer == expected) null else "expected: $expected\nanswered: $answer"
    }

    /** Ends an answer that is being computed, too. Every later call throws IllegalStateException. */
    override fun close() = Native.close(handle)

    private fun stream(work: (emit: (String) -> Unit) -> Unit): Flow<String> = callbackFlow {
        var isComputing = false // whoever waits for another answer must not cancel that one
        val state = Any()
        launch(Dispatchers.IO) {
            answering.withLock {
                synchronized(state) { isComputing = true }
                try {
                    work { piece ->
                        ensureActive()
                        trySend(piece)
                    }
                } finally {
                    synchronized(state) { isComputing = false }
                }
            }
            channel.close()
        }
        awaitClose { synchronized(state) { if (isComputing) Native.cancel(handle) } }
    }.buffer(Channel.UNLIMITED)

    private fun generate(
        prompt: List<Pair<String, Boolean>>, length: Int, temperature: Float?, grammar: String?, emit: (String) -> Unit,
    ) {
        val (texts, areTemplate) = prompt.unzip()
        Native.begin(
            handle, texts.map { it.toByteArray() }.toTypedArray(), areTemplate.toBooleanArray(), grammar?.toByteArray(),
            temperature ?: number("temperature"), number("top_p"), number("repetition_penalty"),
        )
        val characters = Characters()
        for (count in 1..length) {
            val text = characters.of(Native.next(handle) ?: break)
            if (text.isNotEmpty()) emit(text)
        }
    }

    private fun number(name: String) = settings.getDouble(name).toFloat()
}

/** What the chat template writes around the messages. */
private class Turns(private val json: JSONObject) {
    /** False for a template whose earlier turns depend on later ones: every question stands alone. */
    val hasHistory = !json.isNull("between")

    /** Texts, and whether each is the template's, which alone has control tokens. */
    fun prompt(system: String?, messages: List<Message>): List<Pair<String, Boolean>> {
        val pieces = mutableListOf<Pair<String, Boolean>>()
        if (system == null) {
            pieces += json.getString("start") to true
        } else {
            check(!json.isNull("system")) { "the chat template has no system message" }
            val around = json.getJSONArray("system")
            pieces += listOf(around.getString(0) to true, system to false, around.getString(1) to true)
        }
        for ((index, message) in messages.withIndex()) {
            pieces += message.content to false
            val isLast = index == messages.lastIndex
            val after = if (isLast) "open" else if (message.role == "user") "answer" else "between"
            pieces += json.getString(after) to true
        }
        return pieces
    }
}

private fun callsOf(answer: String, format: JSONObject): List<Call> {
    val found = mutableListOf<Call>()
    val (middle, between) = format.getString("middle") to format.getString("between")
    var rest = answer.removePrefix(format.getString("begin"))
    do {
        rest = rest.removePrefix(between)
        val name = rest.substringBefore(middle)
        rest = rest.drop(name.length + middle.length)
        val arguments = rest.take(objectLength(rest))
        rest = rest.drop(arguments.length)
        val read = JSONObject(arguments)
        found += Call(name, if (format.getBoolean("has_spaced_texts")) unspaced(read) as JSONObject else read)
    } while (between.isNotEmpty() && rest.startsWith(between))
    return found
}

private fun objectLength(text: String): Int {
    var depth = 0
    var isText = false
    var isEscaped = false
    for ((index, character) in text.withIndex()) {
        if (isEscaped) {
            isEscaped = false
        } else if (isText) {
            isEscaped = character == '\\'
            isText = character != '"'
        } else {
            isText = character == '"'
            if (character == '{') depth++
            if (character == '}' && --depth == 0) return index + 1
        }
    }
    error("the answer ended within a call")
}

/** The value without the space before each text, with which the model was trained. */
private fun unspaced(value: Any): Any {
    if (value is JSONObject) {
        for (key in value.keys().asSequence().toList()) value.put(key, unspaced(value.get(key)))
    } else if (value is JSONArray) {
        for (index in 0 until value.length()) value.put(index, unspaced(value.get(index)))
    }
    return if (value is String) value.removePrefix(" ") else value
}

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
