// The functions of llama_chat.h for Kotlin. Text crosses as UTF-8 bytes: a token may end amid a character, which JNI's own
// strings cannot hold.
#include <jni.h>

#include <mutex>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "llama_chat.h"

namespace {

void fail(JNIEnv * env) { env->ThrowNew(env->FindClass("java/lang/IllegalStateException"), llama_chat_error()); }

std::string text_of(JNIEnv * env, jbyteArray bytes) {
    std::string text(env->GetArrayLength(bytes), '\0');
    env->GetByteArrayRegion(bytes, 0, static_cast<jsize>(text.size()), reinterpret_cast<jbyte *>(&text[0]));
    return text;
}

}  // namespace

extern "C" {

// Loads the backend of llama.cpp for this processor from the app's folder of libraries, once: ggml would list it again.
JNIEXPORT void JNICALL Java_efficientllm_kit_Native_loadBackends(JNIEnv * env, jobject, jbyteArray folder) {
    static std::once_flag loaded;
    std::call_once(loaded, [&] { ggml_backend_load_all_from_path(text_of(env, folder).c_str()); });
}

JNIEXPORT jlong JNICALL
Java_efficientllm_kit_Native_open(JNIEnv * env, jobject, jbyteArray model, jint context, jint threads) {
    const long long chat = llama_chat_open(text_of(env, model).c_str(), context, threads);
    if (!chat) fail(env);
    return chat;
}

JNIEXPORT jint JNICALL Java_efficientllm_kit_Native_begin(
    JNIEnv * env, jobject, jlong chat, jobjectArray texts, jbooleanArray areTemplate, jbyteArray grammar,
    jfloat temperature, jfloat topP, jfloat repetitionPenalty) {
    const jsize count = env->GetArrayLength(texts);
    std::vector<jboolean> are_template(count);
    env->GetBooleanArrayRegion(areTemplate, 0, count, are_template.data());
    std::vector<std::string> copies;
    for (jsize index = 0; index < count; index++) {
        const auto bytes = static_cast<jbyteArray>(env->GetObjectArrayElement(texts, index));
        copies.push_back(text_of(env, bytes));
        env->DeleteLocalRef(bytes);
    }
    std::vector<llama_chat_piece> pieces;
    for (jsize index = 0; index < count; index++) pieces.push_back({copies[index].c_str(), are_template[index]});
    const std::string rules = grammar ? text_of(env, grammar) : "";
    const llama_chat_sampling sampling = {grammar ? rules.c_str() : nullptr, temperature, topP, repetitionPenalty};
    const int tokens = llama_chat_begin(chat, pieces.data(), count, sampling);
    if (tokens == LLAMA_CHAT_FAILED) fail(env);
    return tokens;
}

// null where the answer ends.
JNIEXPORT jbyteArray JNICALL Java_efficientllm_kit_Native_next(JNIEnv * env, jobject, jlong chat) {
    char piece[LLAMA_CHAT_PIECE_BYTES];
    const int length = llama_chat_next(chat, piece);
    if (length == LLAMA_CHAT_FAILED) fail(env);
    if (length < 0) return nullptr;
    jbyteArray bytes = env->NewByteArray(length);
    env->SetByteArrayRegion(bytes, 0, length, reinterpret_cast<const jbyte *>(piece));
    return bytes;
}

JNIEXPORT void JNICALL Java_efficientllm_kit_Native_cancel(JNIEnv *, jobject, jlong chat) { llama_chat_cancel(chat); }

JNIEXPORT void JNICALL Java_efficientllm_kit_Native_close(JNIEnv *, jobject, jlong chat) { llama_chat_close(chat); }

}  // extern "C"
