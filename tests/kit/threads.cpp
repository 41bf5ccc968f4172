// Prints the tokens of a prompt, whose pieces are arguments after T (template) or M (message). Then answers on four
// threads at once, until the conversation is cancelled and closed.
#include <chrono>
#include <cstdio>
#include <thread>

#include "llama_chat.cpp"

int main(int count, char ** arguments) {
    const long long chat = llama_chat_open(arguments[1], 512, 1);
    std::vector<llama_chat_piece> pieces;
    for (int index = 2; index < count; index++) pieces.push_back({arguments[index] + 1, arguments[index][0] == 'T'});
    const int size = static_cast<int>(pieces.size());
    for (llama_token token : find(chat)->tokens_of(pieces.data(), size)) std::printf("%d ", token);
    const llama_chat_sampling greedy = {nullptr, 0, 1, 1}, grammar = {"root ::= \"no\" | \"yes\"", 0, 1, 1};
    char piece[LLAMA_CHAT_PIECE_BYTES];
    std::printf("\n%d ", llama_chat_begin(chat, pieces.data(), size, grammar) > 0);
    for (int length; (length = llama_chat_next(chat, piece)) >= 0;) std::printf("%.*s", length, piece);
    llama_chat_begin(chat, pieces.data(), size, greedy);
    pieces.push_back({"of a later turn", 1});
    find(chat)->keep_shared(find(chat)->tokens_of(pieces.data(), size + 1));
    std::printf("\n%zu", find(chat)->evaluated.size());  // not to be evaluated again
    pieces.pop_back();
    const llama_chat_sampling malformed = {"root ::= (", 0, 1, 1};
    llama_chat_begin(chat, pieces.data(), size, malformed);
    std::printf("\n%s\n", llama_chat_error());
    std::vector<std::thread> threads;
    for (int index = 0; index < 4; index++) {
        threads.emplace_back([=, &pieces] {
            char bytes[LLAMA_CHAT_PIECE_BYTES];
            while (llama_chat_begin(chat, pieces.data(), size, greedy) != LLAMA_CHAT_FAILED) {
                for (int tokens = 0; tokens < 50 && llama_chat_next(chat, bytes) >= 0; tokens++) {}
            }
        });
    }
    for (int round = 0; round < 20; round++) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        llama_chat_cancel(chat);
    }
    llama_chat_close(chat);
    for (std::thread & each : threads) each.join();
    std::printf("%d %s\n", llama_chat_next(chat, piece), llama_chat_error());
}
