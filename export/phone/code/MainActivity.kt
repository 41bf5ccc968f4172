package efficientllm.kit

import android.app.Activity
import android.os.Bundle
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import java.io.File
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.Job
import kotlinx.coroutines.MainScope
import kotlinx.coroutines.cancel
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext

/** A chat on one screen. The model is in the app's assets and is copied once, because llama.cpp maps a file. */
class MainActivity : Activity(), CoroutineScope by MainScope() {
    private var conversation: Conversation? = null
    private var answer: Job? = null

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        val text = TextView(this)
        val question = EditText(this)
        val send = Button(this).apply { this.text = "Send" }
        val scroll = ScrollView(this).apply { addView(text) }
        setContentView(LinearLayout(this).apply {
            orientation = LinearLayout.VERTICAL
            fitsSystemWindows = true
            addView(scroll, LinearLayout.LayoutParams(LinearLayout.LayoutParams.MATCH_PARENT, 0, 1f))
            addView(question)
            addView(send)
        })
        launch {
            val opened = withContext(Dispatchers.IO) {
                Conversation(copied(), libraries = applicationInfo.nativeLibraryDir)
            }
            conversation = opened
            text.text = opened.check() ?: "This phone answers as the exporting machine did."
        }
        send.setOnClickListener {
            val opened = conversation ?: return@setOnClickListener
            if (answer?.isActive == true) {
                answer?.cancel()
                return@setOnClickListener
            }
            text.append("\n\n> ${question.text}\n")
            answer = launch {
                send.text = "Stop"
                try {
                    opened.ask(question.text.toString()).collect { text.append(it) }
                } catch (failure: IllegalStateException) {
                    text.append(failure.message)
                } finally {
                    send.text = "Send"
                }
            }
        }
    }

    override fun onDestroy() {
        cancel()
        conversation?.close()
        super.onDestroy()
    }

    private fun copied(): File {
        val installed = packageManager.getPackageInfo(packageName, 0).lastUpdateTime
        for (name in listOf("model.gguf", "generation.json", "check.json")) {
            val file = File(filesDir, name)
            val length = assets.openFd(name).use { it.length } // none of them is compressed
            if (file.length() == length && file.lastModified() >= installed) continue
            assets.open(name).use { input -> file.outputStream().use { input.copyTo(it) } }
        }
        return filesDir
    }
}
