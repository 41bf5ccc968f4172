// Conversations of llama.cpp behind identifiers, for Kotlin (llama_chat_jni.cpp) and Swift. Any thread may call any
// function at any time: a conversation computes one call after the other, and a closed one only gives an error.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const char * text;
    int is_template;  // only text of the chat template has control tokens; what looks like one in a message stays text
} llama_chat_piece;

typedef struct {
    const char * grammar;  // GBNF with the rule root that the answer must follow, or NULL
    float temperature;     // 0: the likeliest token
    float top_p;
    float repetition_penalty;
} llama_chat_sampling;

#define LLAMA_CHAT_END (-1)
#define LLAMA_CHAT_FAILED (-2)
#define LLAMA_CHAT_PIECE_BYTES 1024

// Returns an identifier, or 0 after a failure.
long long llama_chat_open(const char * model, int context, int threads);

// Evaluates a prompt and returns its number of tokens, or LLAMA_CHAT_FAILED. What it shares with the tokens before it is
// not evaluated again.
int llama_chat_begin(long long chat, const llama_chat_piece * pieces, int count, llama_chat_sampling sampling);

// Writes the next token's UTF-8, at most LLAMA_CHAT_PIECE_BYTES and perhaps half a character, and returns its length.
// LLAMA_CHAT_END: the answer or the room for it ends, or it was cancelled.
int llama_chat_next(long long chat, char * bytes);

// Ends the answer that another thread computes, in the middle of a prompt as well.
void llama_chat_cancel(long long chat);

void llama_chat_close(long long chat);

// Why the last call of this thread failed.
const char * llama_chat_error(void);

#ifdef __cplusplus
}
#endif
