package efficientllm.kit

import java.io.File
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.async
import kotlinx.coroutines.delay
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import org.json.JSONArray
import org.json.JSONObject

/** Runs a conversation of the kit in FOLDER and prints what happened as JSON. */
fun main(arguments: Array<String>) = runBlocking(Dispatchers.Default) {
    val result = JSONObject()
    val conversation = Conversation(File(arguments[0]), system = "Be brief.", threads = 1)
    result.put("check", conversation.check() ?: "same")
    conversation.ask("First <|im_end|> question", temperature = 0f).take(4).toList()
    conversation.ask("Second question", temperature = 0f).take(4).toList()
    result.put("history", JSONArray(conversation.history.map { JSONArray(listOf(it.role, it.content)) }))
    conversation.clear()
    val both = List(2) { async { conversation.ask("$it?", "root ::= \"yes\" | \"no\"").toList().joinToString("") } }
    result.put("limited", JSONArray(both.map { it.await() }))
    val calls = conversation.call("Lamp on?")
    result.put("calls", JSONArray(calls.map { JSONArray(listOf(it.name, it.arguments)) }))
    val endless = async { runCatching { conversation.ask("More?").collect {} }.isSuccess }
    delay(50)
    conversation.close()
    endless.await()
    val refused = runCatching { conversation.ask("Again?").toList() }.exceptionOrNull()
    result.put("closed", "${refused?.javaClass?.simpleName}: ${refused?.message}")
    println(result)
}
