// What LlamaChat.kt calls: a model of llama.cpp (its C interface, llama.h) behind a handle, answering token by token.
// Text crosses as UTF-8 bytes: a token may end amid a character, which JNI's own strings cannot hold.
#include <jni.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "llama.h"

namespace {

constexpr int LAST_TOKENS = 64;  // that the repetition penalty looks at

struct Chat {
    llama_model * model = nullptr;
    llama_context * context = nullptr;
    llama_sampler * sampler = nullptr;
    llama_token last = LLAMA_TOKEN_NULL;  // sampled, not evaluated yet

    const llama_vocab * vocab() const { return llama_model_get_vocab(model); }

    void drop_sampler() {
        if (sampler) llama_sampler_free(sampler);
        sampler = nullptr;
    }

    ~Chat() {
        drop_sampler();
        if (context) llama_free(context);
        if (model) llama_model_free(model);
    }
};

Chat * chat_of(jlong handle) { return reinterpret_cast<Chat *>(handle); }

void fail(JNIEnv * env, const std::string & message) {
    env->ThrowNew(env->FindClass("java/lang/IllegalStateException"), message.c_str());
}

std::string text_of(JNIEnv * env, jbyteArray bytes) {
    std::string text(env->GetArrayLength(bytes), '\0');
    env->GetByteArrayRegion(bytes, 0, static_cast<jsize>(text.size()), reinterpret_cast<jbyte *>(&text[0]));
    return text;
}

llama_sampler * new_sampler(const llama_vocab * vocab, float temperature, float top_p, float repetition_penalty) {
    llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    if (temperature <= 0) {
        llama_sampler_chain_add(chain, llama_sampler_init_greedy());
        return chain;
    }
    const int rows = llama_vocab_n_tokens(vocab);
    llama_sampler_chain_add(chain, llama_sampler_init_penalties(rows, LAST_TOKENS, repetition_penalty, 0.0f, 0.0f));
    llama_sampler_chain_add(chain, llama_sampler_init_top_p(top_p, 1));
    llama_sampler_chain_add(chain, llama_sampler_init_temp(temperature));
    llama_sampler_chain_add(chain, llama_sampler_init_dist(LLAMA_DEFAULT_SEED));
    return chain;
}

}  // namespace

extern "C" {

JNIEXPORT jlong JNICALL Java_efficientllm_kit_LlamaChat_open(
    JNIEnv * env, jobject, jstring path, jint context, jint threads) {
    llama_backend_init();
    auto chat = std::make_unique<Chat>();
    const char * file = env->GetStringUTFChars(path, nullptr);
    chat->model = llama_model_load_from_file(file, llama_model_default_params());
    env->ReleaseStringUTFChars(path, file);
    if (!chat->model) {
        fail(env, "llama.cpp cannot load model.gguf");
        return 0;
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx = context;
    params.n_threads = params.n_threads_batch = threads;
    chat->context = llama_init_from_model(chat->model, params);
    if (!chat->context) {
        fail(env, "llama.cpp cannot allocate a conversation of " + std::to_string(context) + " tokens");
        return 0;
    }
    return reinterpret_cast<jlong>(chat.release());
}

// Evaluates a prompt from an empty cache; next() then answers it.
JNIEXPORT void JNICALL Java_efficientllm_kit_LlamaChat_begin(
    JNIEnv * env, jobject, jlong handle, jbyteArray prompt, jfloat temperature, jfloat topP, jfloat repetitionPenalty) {
    Chat * chat = chat_of(handle);
    const std::string text = text_of(env, prompt);
    const int length = static_cast<int>(text.size());
    std::vector<llama_token> tokens(length + 2);  // no token is shorter than a byte; the rest is added at the ends
    const int count = llama_tokenize(
        chat->vocab(), text.data(), length, tokens.data(), static_cast<int>(tokens.size()), true, true);
    const int room = static_cast<int>(llama_n_ctx(chat->context));
    if (count <= 0 || count >= room) {
        fail(env, "the prompt has " + std::to_string(count) + " tokens, the conversation room for " + std::to_string(room));
        return;
    }
    llama_memory_clear(llama_get_memory(chat->context), false);
    chat->drop_sampler();
    chat->sampler = new_sampler(chat->vocab(), temperature, topP, repetitionPenalty);
    const int batch = static_cast<int>(llama_n_batch(chat->context));
    for (int done = 0; done < count; done += batch) {
        if (llama_decode(chat->context, llama_batch_get_one(&tokens[done], std::min(batch, count - done)))) {
            fail(env, "llama.cpp cannot evaluate the prompt");
            return;
        }
    }
    chat->last = LLAMA_TOKEN_NULL;
}

// The next token's text; null where the answer ends or the conversation is full.
JNIEXPORT jbyteArray JNICALL Java_efficientllm_kit_LlamaChat_next(JNIEnv * env, jobject, jlong handle) {
    Chat * chat = chat_of(handle);
    if (chat->last != LLAMA_TOKEN_NULL) {
        const llama_pos position = llama_memory_seq_pos_max(llama_get_memory(chat->context), 0) + 1;
        if (position >= static_cast<llama_pos>(llama_n_ctx(chat->context))) return nullptr;
        if (llama_decode(chat->context, llama_batch_get_one(&chat->last, 1))) {
            fail(env, "llama.cpp cannot evaluate a token");
            return nullptr;
        }
    }
    chat->last = llama_sampler_sample(chat->sampler, chat->context, -1);
    if (llama_vocab_is_eog(chat->vocab(), chat->last)) return nullptr;
    std::string piece(64, '\0');
    int length = llama_token_to_piece(chat->vocab(), chat->last, &piece[0], 64, 0, false);
    if (length < 0) {
        piece.resize(-length);
        length = llama_token_to_piece(chat->vocab(), chat->last, &piece[0], -length, 0, false);
    }
    jbyteArray bytes = env->NewByteArray(length);
    env->SetByteArrayRegion(bytes, 0, length, reinterpret_cast<const jbyte *>(piece.data()));
    return bytes;
}

JNIEXPORT void JNICALL Java_efficientllm_kit_LlamaChat_close(JNIEnv *, jobject, jlong handle) { delete chat_of(handle); }

}  // extern "C"
