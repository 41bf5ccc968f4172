// One chat with @NAME@ on llama.cpp's C interface: the XCFramework of its releases (llama-bNNNN-xcframework.zip), or
// build-xcframework.sh of commit @LLAMA_CPP@, whose header this was written against.
// Call it from a background task: ask() returns when the answer is complete.
import Foundation
import llama

/// `folder` holds model.gguf and check.json.
final class LlamaChat {
  private static let context: Int32 = @CONTEXT@
  private static let before = @BEFORE@
  private static let after = @AFTER@
  private static let lastTokens: Int32 = 64  // that the repetition penalty looks at

  struct Failure: Error {
    let message: String
  }

  private let folder: URL
  private let model: OpaquePointer
  private let cache: OpaquePointer
  private let vocabulary: OpaquePointer
  private var stopped = false

  init(folder: URL, threads: Int32 = 4) throws {
    llama_backend_init()
    guard
      let model = llama_model_load_from_file(
        folder.appendingPathComponent("model.gguf").path, llama_model_default_params())
    else { throw Failure(message: "llama.cpp cannot load model.gguf") }
    var settings = llama_context_default_params()
    settings.n_ctx = UInt32(LlamaChat.context)
    settings.n_threads = threads
    settings.n_threads_batch = threads
    guard let cache = llama_init_from_model(model, settings), let vocabulary = llama_model_get_vocab(model) else {
      llama_model_free(model)
      throw Failure(message: "llama.cpp cannot allocate a conversation of \(LlamaChat.context) tokens")
    }
    (self.folder, self.model, self.cache, self.vocabulary) = (folder, model, cache, vocabulary)
  }

  deinit {
    llama_free(cache)
    llama_model_free(model)
  }

  /// Answers one question that stands alone, piece by piece; whole, it is returned.
  func ask(_ question: String, temperature: Float = @TEMPERATURE@, onText: (String) -> Void = { _ in }) throws -> String {
    try generate(
      LlamaChat.before + question + LlamaChat.after, length: Int(LlamaChat.context), temperature: temperature,
      onText: onText)
  }

  /// From any thread.
  func stop() {
    stopped = true
  }

  /// nil where this device says what the exporting machine said, else both answers.
  func check() throws -> String? {
    let data = try Data(contentsOf: folder.appendingPathComponent("check.json"))
    let check = try JSONDecoder().decode(Checks.self, from: data).llama
    let answer = try generate(check.prompt, length: check.tokens.count, temperature: 0, onText: { _ in })
    return answer == check.text ? nil : "expected: \(check.text)\nanswered: \(answer)"
  }

  private func generate(
    _ prompt: String, length: Int, temperature: Float, onText: (String) -> Void
  ) throws -> String {
    stopped = false
    let sampler = newSampler(temperature)
    defer { llama_sampler_free(sampler) }
    var tokens = try evaluated(prompt)
    var answer = Data()  // a token may end amid a character
    var said = 0
    for _ in 0..<length where !stopped {
      var token = llama_sampler_sample(sampler, cache, -1)
      if llama_vocab_is_eog(vocabulary, token) { break }
      answer.append(contentsOf: bytes(of: token))
      if let text = String(data: answer.dropFirst(said), encoding: .utf8) {
        said = answer.count
        onText(text)
      }
      tokens += 1
      if tokens >= Int(LlamaChat.context) { break }
      guard llama_decode(cache, llama_batch_get_one(&token, 1)) == 0 else {
        throw Failure(message: "llama.cpp cannot evaluate a token")
      }
    }
    return String(decoding: answer, as: UTF8.self)
  }

  /// The number of tokens of a prompt that was evaluated from an empty cache.
  private func evaluated(_ prompt: String) throws -> Int {
    let length = prompt.utf8.count
    var tokens = [llama_token](repeating: 0, count: length + 2)  // no token is shorter than a byte
    let count = Int(
      llama_tokenize(vocabulary, prompt, Int32(length), &tokens, Int32(tokens.count), true, true))
    guard count > 0, count < Int(LlamaChat.context) else {
      throw Failure(message: "the prompt has \(count) tokens, the conversation room for \(LlamaChat.context)")
    }
    llama_memory_clear(llama_get_memory(cache), false)
    let batch = Int(llama_n_batch(cache))
    for done in stride(from: 0, to: count, by: batch) {
      var part = Array(tokens[done..<min(done + batch, count)])
      guard llama_decode(cache, llama_batch_get_one(&part, Int32(part.count))) == 0 else {
        throw Failure(message: "llama.cpp cannot evaluate the prompt")
      }
    }
    return count
  }

  private func newSampler(_ temperature: Float) -> UnsafeMutablePointer<llama_sampler> {
    let chain = llama_sampler_chain_init(llama_sampler_chain_default_params())!
    guard temperature > 0 else {
      llama_sampler_chain_add(chain, llama_sampler_init_greedy())
      return chain
    }
    let rows = llama_vocab_n_tokens(vocabulary)
    llama_sampler_chain_add(
      chain, llama_sampler_init_penalties(rows, LlamaChat.lastTokens, @REPETITION_PENALTY@, 0, 0))
    llama_sampler_chain_add(chain, llama_sampler_init_top_p(@TOP_P@, 1))
    llama_sampler_chain_add(chain, llama_sampler_init_temp(temperature))
    llama_sampler_chain_add(chain, llama_sampler_init_dist(UInt32.random(in: 0..<UInt32.max)))
    return chain
  }

  private func bytes(of token: llama_token) -> [UInt8] {
    var piece = [CChar](repeating: 0, count: 64)
    var length = llama_token_to_piece(vocabulary, token, &piece, Int32(piece.count), 0, false)
    if length < 0 {
      piece = [CChar](repeating: 0, count: Int(-length))
      length = llama_token_to_piece(vocabulary, token, &piece, Int32(piece.count), 0, false)
    }
    return piece.prefix(Int(length)).map { UInt8(bitPattern: $0) }
  }

  private struct Checks: Decodable {
    struct Check: Decodable {
      let prompt: String
      let tokens: [Int]
      let text: String
    }
    let llama: Check

    enum CodingKeys: String, CodingKey {
      case llama = "llama.cpp"
    }
  }
}
