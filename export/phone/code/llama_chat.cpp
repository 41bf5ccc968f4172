#include "llama_chat.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#if __has_include(<llama/llama.h>)  // the XCFramework
#include <llama/llama.h>
#else
#include "llama.h"
#endif

namespace {

constexpr int LAST_TOKENS = 64;  // that the repetition penalty looks at
constexpr int CONTROL = LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN;

thread_local std::string error;

struct Cancelled {};

struct Chat {
    std::mutex lock;  // held by the call that computes
    std::atomic<bool> is_cancelled{false};
    llama_model * model = nullptr;
    llama_context * context = nullptr;
    std::unique_ptr<llama_sampler, decltype(&llama_sampler_free)> sampler{nullptr, llama_sampler_free};
    llama_token last = LLAMA_TOKEN_NULL;           // sampled, not evaluated yet
    std::vector<llama_token> evaluated;            // in the cache
    std::map<char, std::vector<std::string>> controls;  // texts of control tokens by their first byte, the longest first

    Chat(const char * file, int size, int threads) {
        model = llama_model_load_from_file(file, llama_model_default_params());
        if (!model) throw std::runtime_error("llama.cpp cannot load model.gguf");
        llama_context_params params = llama_context_default_params();
        params.n_ctx = size;
        params.n_threads = params.n_threads_batch = threads;
        params.abort_callback = [](void * chat) { return static_cast<Chat *>(chat)->is_cancelled.load(); };
        params.abort_callback_data = this;
        context = llama_init_from_model(model, params);
        if (!context) {
            llama_model_free(model);
            throw std::runtime_error("llama.cpp cannot allocate a conversation of " + std::to_string(size) + " tokens");
        }
        for (llama_token token = 0; token < llama_vocab_n_tokens(vocab()); token++) {
            if (!(llama_vocab_get_attr(vocab(), token) & CONTROL)) continue;
            const std::string text = piece(token, true);
            if (!text.empty()) controls[text[0]].push_back(text);
        }
        for (auto & each : controls) {
            std::sort(each.second.begin(), each.second.end(),
                      [](const std::string & a, const std::string & b) { return a.size() > b.size(); });
        }
    }

    ~Chat() {
        llama_free(context);
        llama_model_free(model);
    }

    const llama_vocab * vocab() const { return llama_model_get_vocab(model); }

    std::string piece(llama_token token, bool special) const {
        std::string text(64, '\0');
        int length = llama_token_to_piece(vocab(), token, &text[0], 64, 0, special);
        if (length < 0) {
            text.resize(-length);
            length = llama_token_to_piece(vocab(), token, &text[0], -length, 0, special);
        }
        text.resize(std::max(length, 0));
        return text;
    }

    void add_tokens(std::vector<llama_token> & tokens, const std::string & text, bool special) const {
        std::vector<llama_token> found(text.size() + 2);  // no token is shorter than a byte; the rest is added at the ends
        const int count = llama_tokenize(vocab(), text.data(), static_cast<int>(text.size()), found.data(),
                                         static_cast<int>(found.size()), tokens.empty(), special);
        if (count < 0) throw std::runtime_error("llama.cpp cannot tokenize the prompt");
        tokens.insert(tokens.end(), found.begin(), found.begin() + count);
    }

    // Tokenizes the joined text, but for what a message wrote like a control token.
    std::vector<llama_token> tokens_of(const llama_chat_piece * pieces, int count) const {
        std::string text, pending;
        std::vector<bool> is_template;
        for (int index = 0; index < count; index++) {
            text += pieces[index].text;
            is_template.resize(text.size(), pieces[index].is_template != 0);
        }
        std::vector<llama_token> tokens;
        for (size_t start = 0, length; start < text.size(); start += length) {
            length = 1;
            const auto candidates = controls.find(text[start]);
            if (candidates != controls.end()) {
                for (const std::string & control : candidates->second) {
                    if (text.compare(start, control.size(), control)) continue;
                    length = control.size();
                    break;
                }
            }
            const auto from = is_template.begin() + start;
            if (length == 1 || std::all_of(from, from + length, [](bool is) { return is; })) {
                pending += text.substr(start, length);
                continue;
            }
            if (!pending.empty()) add_tokens(tokens, pending, true);
            add_tokens(tokens, text.substr(start, length), false);
            pending.clear();
        }
        if (!pending.empty()) add_tokens(tokens, pending, true);
        return tokens;
    }

    // Evaluates tokens after those in the cache.
    void evaluate(std::vector<llama_token> tokens) {
        const int count = static_cast<int>(tokens.size()), batch = static_cast<int>(llama_n_batch(context));
        for (int done = 0; done < count; done += batch) {
            const int result = llama_decode(context, llama_batch_get_one(&tokens[done], std::min(batch, count - done)));
            if (!result) continue;
            cut(evaluated.size());
            if (is_cancelled) throw Cancelled();
            throw std::runtime_error("llama.cpp cannot evaluate the prompt");
        }
        evaluated.insert(evaluated.end(), tokens.begin(), tokens.end());
    }

    // Leaves in the cache what a prompt shares with it, without its last token, whose logits are needed.
    void keep_shared(const std::vector<llama_token> & tokens) {
        size_t shared = 0;
        while (shared < evaluated.size() && shared + 1 < tokens.size() && evaluated[shared] == tokens[shared]) shared++;
        cut(shared);
    }

    // Removes all tokens from the cache but the first ones, or those as well from a state that cannot be cut.
    void cut(size_t length) {
        if (!llama_memory_seq_rm(llama_get_memory(context), 0, static_cast<llama_pos>(length), -1)) {
            llama_memory_clear(llama_get_memory(context), true);
            length = 0;
        }
        evaluated.resize(length);
    }

    decltype(sampler) new_sampler(const llama_chat_sampling & sampling) const {
        llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
        decltype(sampler) owner(chain, llama_sampler_free);
        if (sampling.grammar) {
            llama_sampler * grammar = llama_sampler_init_grammar(vocab(), sampling.grammar, "root");
            if (!grammar) throw std::runtime_error("llama.cpp cannot read the grammar");
            llama_sampler_chain_add(chain, grammar);
        }
        if (sampling.temperature <= 0) {
            llama_sampler_chain_add(chain, llama_sampler_init_greedy());
            return owner;
        }
        const int rows = llama_vocab_n_tokens(vocab());
        llama_sampler_chain_add(chain, llama_sampler_init_penalties(rows, LAST_TOKENS, sampling.repetition_penalty, 0, 0));
        llama_sampler_chain_add(chain, llama_sampler_init_top_p(sampling.top_p, 1));
        llama_sampler_chain_add(chain, llama_sampler_init_temp(sampling.temperature));
        llama_sampler_chain_add(chain, llama_sampler_init_dist(LLAMA_DEFAULT_SEED));
        return owner;
    }

    int begin(const llama_chat_piece * pieces, int count, const llama_chat_sampling & sampling) {
        const std::vector<llama_token> tokens = tokens_of(pieces, count);
        const size_t room = llama_n_ctx(context);
        if (tokens.empty() || tokens.size() >= room) {
            throw std::runtime_error("the prompt has " + std::to_string(tokens.size()) +
                                     " tokens, the conversation room for " + std::to_string(room));
        }
        last = LLAMA_TOKEN_NULL;
        sampler.reset();
        auto chosen = new_sampler(sampling);
        keep_shared(tokens);
        evaluate(std::vector<llama_token>(tokens.begin() + evaluated.size(), tokens.end()));
        sampler = std::move(chosen);
        return static_cast<int>(tokens.size());
    }

    int next(char * bytes) {
        if (!sampler) return LLAMA_CHAT_END;
        if (last != LLAMA_TOKEN_NULL) {
            if (evaluated.size() >= llama_n_ctx(context)) return LLAMA_CHAT_END;
            evaluate({last});
        }
        if (is_cancelled) return LLAMA_CHAT_END;
        last = llama_sampler_sample(sampler.get(), context, -1);
        if (llama_vocab_is_eog(vocab(), last)) return LLAMA_CHAT_END;
        const std::string text = piece(last, false);
        if (text.size() > LLAMA_CHAT_PIECE_BYTES) throw std::runtime_error("a token is longer than any text");
        std::memcpy(bytes, text.data(), text.size());
        return static_cast<int>(text.size());
    }
};

std::mutex table_lock;
std::map<long long, std::shared_ptr<Chat>> table;
long long last_identifier = 0;

// The pointer keeps a conversation in memory that another thread closes meanwhile.
std::shared_ptr<Chat> find(long long identifier) {
    const std::lock_guard<std::mutex> held(table_lock);
    const auto found = table.find(identifier);
    return found == table.end() ? nullptr : found->second;
}

template <typename Work>
int locked(long long identifier, Work work) {
    const std::shared_ptr<Chat> chat = find(identifier);
    if (!chat) {
        error = "the conversation is closed";
        return LLAMA_CHAT_FAILED;
    }
    const std::lock_guard<std::mutex> held(chat->lock);
    try {
        return work(*chat);
    } catch (const Cancelled &) {
        return LLAMA_CHAT_END;
    } catch (const std::exception & failure) {
        error = failure.what();
        return LLAMA_CHAT_FAILED;
    }
}

}  // namespace

long long llama_chat_open(const char * model, int context, int threads) {
    static std::once_flag started;
    std::call_once(started, llama_backend_init);
    try {
        auto chat = std::make_shared<Chat>(model, context, threads);
        const std::lock_guard<std::mutex> held(table_lock);
        table[++last_identifier] = std::move(chat);
        return last_identifier;
    } catch (const std::exception & failure) {
        error = failure.what();
        return 0;
    }
}

int llama_chat_begin(long long chat, const llama_chat_piece * pieces, int count, llama_chat_sampling sampling) {
    return locked(chat, [&](Chat & found) {
        found.is_cancelled = false;
        return found.begin(pieces, count, sampling);
    });
}

int llama_chat_next(long long chat, char * bytes) {
    return locked(chat, [&](Chat & found) { return found.next(bytes); });
}

void llama_chat_cancel(long long chat) {
    if (const std::shared_ptr<Chat> found = find(chat)) found->is_cancelled = true;
}

void llama_chat_close(long long chat) {
    llama_chat_cancel(chat);
    std::shared_ptr<Chat> closed;  // freed here, or by the call that still computes
    const std::lock_guard<std::mutex> held(table_lock);
    const auto found = table.find(chat);
    if (found == table.end()) return;
    closed = std::move(found->second);
    table.erase(found);
}

const char * llama_chat_error(void) { return error.c_str(); }
