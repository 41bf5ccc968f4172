// One chat with @NAME@ on ExecuTorch. In the app's build.gradle.kts:
// dependencies { implementation("org.pytorch:executorch-android:@EXECUTORCH@") }
// Call it from a background thread: generate() returns when the answer is complete.
package efficientllm.kit

import java.io.File
import org.json.JSONObject
import org.pytorch.executorch.extension.llm.LlmCallback
import org.pytorch.executorch.extension.llm.LlmGenerationConfig
import org.pytorch.executorch.extension.llm.LlmModule

/** `folder` holds model.pte, tokenizer.json and check.json. */
class Chat(private val folder: File, private val temperature: Float = @TEMPERATURE@f) {
    private val module = LlmModule(
        File(folder, "model.pte").path, File(folder, "tokenizer.json").path, temperature)

    init {
        val status = module.load()
        check(status == 0) { "ExecuTorch cannot load ${folder.path}: error $status" }
    }

    /** Answers one question that stands alone, piece by piece; whole, it is returned. */
    fun ask(question: String, onText: (String) -> Unit = {}): String =
        generate(BEFORE + question + AFTER, CONTEXT, temperature, onText)

    fun stop() = module.stop()

    /** null where this device says what the exporting machine said, else both answers. */
    fun check(): String? {
        val check = JSONObject(File(folder, "check.json").readText()).getJSONObject("executorch")
        val length = check.getJSONArray("prompt_tokens").length() + check.getJSONArray("tokens").length()
        val answer = generate(check.getString("prompt"), length, 0.0f) {}.removeSuffix(END)
        val expected = check.getString("text")
        return if (answer == expected) null else "expected: $expected\nanswered: $answer"
    }

    private fun generate(prompt: String, length: Int, temperature: Float, onText: (String) -> Unit): String {
        val answer = StringBuilder()
        var failure: String? = null
        module.resetContext()
        // seqLen counts the prompt, too; maxNewTokens does not reach the runner in 1.5
        val config = LlmGenerationConfig.create().seqLen(length).temperature(temperature).echo(false).build()
        module.generate(prompt, config, object : LlmCallback {
            override fun onResult(result: String) {
                answer.append(result)
                if (result != END) onText(result)
            }

            override fun onError(errorCode: Int, message: String) {
                failure = "ExecuTorch error $errorCode: $message"
            }
        })
        failure?.let { throw IllegalStateException(it) }
        return answer.toString()
    }

    private companion object {
        const val CONTEXT = @CONTEXT@
        const val BEFORE = @BEFORE@
        const val AFTER = @AFTER@
        const val END = @END@
    }
}
