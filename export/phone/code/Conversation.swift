// A conversation with @NAME@ on llama.cpp, whose functions llama_chat.h declares (the app's bridging header).
import Foundation

struct Message: Sendable {
  let role: String
  let content: String
}

/// A function that the model calls.
struct Call {
  let name: String
  let arguments: [String: Any]
}

struct Failure: Error, CustomStringConvertible {
  let description: String
}

/// A conversation with a model and its history. `folder` holds model.gguf, generation.json and check.json.
///
/// Reads the model: create it on a background task, with as many `threads` as the phone has fast cores.
final class Conversation: @unchecked Sendable {
  private let folder: URL
  private let system: String?
  private let settings: Settings
  private let handle: Int64
  private let queue = DispatchQueue(label: "efficientllm.kit")  // one answer after the other
  private let lock = NSLock()
  private var past: [Message] = []

  init(folder: URL, system: String? = nil, threads: Int32 = 4) throws {
    let data = try Data(contentsOf: folder.appendingPathComponent("generation.json"))
    (self.folder, self.system) = (folder, system)
    settings = try JSONDecoder().decode(Settings.self, from: data)
    handle = llama_chat_open(folder.appendingPathComponent("model.gguf").path, settings.context, threads)
    if handle == 0 { throw Failure(description: String(cString: llama_chat_error())) }
  }

  deinit {
    close()
  }

  /// Questions and answers so far.
  var history: [Message] {
    lock.withLock { past }
  }

  /// Forgets the history.
  func clear() {
    lock.withLock { past = [] }
  }

  /// Answers a question piece by piece. Ending the iteration, or its task, ends the computation, and the answer so far stays
  /// in the history. A `grammar` in GBNF, with the rule root, limits the answer. A temperature of 0 is the likeliest answer.
  func ask(_ question: String, grammar: String? = nil, temperature: Float? = nil) -> AsyncThrowingStream<String, Error> {
    stream { [self] emit in
      let asked = history + [Message(role: "user", content: question)]
      var answer = ""
      let outcome = Result {
        let prompt = try settings.turns.prompt(system, asked)
        try generate(prompt, length: .max, temperature: temperature, grammar: grammar) { piece in
          answer += piece
          return emit(piece)
        }
      }
      let isAnswered = (try? outcome.get()) != nil || !answer.isEmpty
      if settings.turns.between != nil, isAnswered {
        lock.withLock { past += [asked.last!, Message(role: "assistant", content: answer)] }
      }
      try outcome.get()
    }
  }

  /// The calls by which the model answers, of the functions that the kit was exported with (--functions).
  func call(_ question: String, temperature: Float = 0) async throws -> [Call] {
    guard let format = settings.calls else { throw Failure(description: "the kit has no functions") }
    var answer = ""
    for try await piece in ask(question, grammar: format.grammar, temperature: temperature) { answer += piece }
    return try format.calls(answer)
  }

  /// nil where this phone says what the exporting machine said, else both answers.
  func check() async throws -> String? {
    let data = try Data(contentsOf: folder.appendingPathComponent("check.json"))
    let check = try JSONDecoder().decode(Checks.self, from: data).llama
    var answer = ""
    let pieces = stream { [self] emit in
      try generate([(check.prompt, true)], length: check.tokens.count, temperature: 0, grammar: nil, emit: emit)
    }
    for try await piece in pieces { answer += piece }
    return answer == check.text ? nil : "expected: \(check.text)\nanswered: \(answer)"
  }

  /// Ends an answer that is being computed, too. Every later answer fails.
  func close() {
    llama_chat_close(handle)
  }

  private typealias Emit = (String) -> Bool

  private func stream(_ work: @escaping (Emit) throws -> Void) -> AsyncThrowingStream<String, Error> {
    AsyncThrowingStream { continuation in
      let answer = Answer(handle)
      continuation.onTermination = { _ in answer.cancel() }
      queue.async {
        guard answer.begin() else { return }
        let outcome = Result { try work { piece in
          continuation.yield(piece)
          return !answer.isCancelled
        } }
        answer.end()
        if case .failure(let error) = outcome { continuation.finish(throwing: error) } else { continuation.finish() }
      }
    }
  }

  private func generate(
    _ prompt: [(text: String, isTemplate: Bool)], length: Int, temperature: Float?, grammar: String?, emit: Emit
  ) throws {
    let texts = prompt.map { strdup($0.text)! }
    let rules = grammar.map { strdup($0)! }
    defer { (texts + [rules].compactMap { $0 }).forEach { free($0) } }
    let pieces = zip(texts, prompt).map { llama_chat_piece(text: $0, is_template: $1.isTemplate ? 1 : 0) }
    let sampling = llama_chat_sampling(
      grammar: rules, temperature: temperature ?? settings.temperature, top_p: settings.top_p,
      repetition_penalty: settings.repetition_penalty)
    try require(llama_chat_begin(handle, pieces, Int32(pieces.count), sampling))
    var rest: [UInt8] = []  // a token may end amid a character
    var bytes = [CChar](repeating: 0, count: Int(LLAMA_CHAT_PIECE_BYTES))
    for _ in 0..<length {
      let size = try require(llama_chat_next(handle, &bytes))
      if size == LLAMA_CHAT_END { break }
      rest.append(contentsOf: bytes.prefix(Int(size)).map { UInt8(bitPattern: $0) })
      let text = takeCharacters(from: &rest)
      if !text.isEmpty, !emit(text) { return }
    }
    if !rest.isEmpty { _ = emit(String(decoding: rest, as: UTF8.self)) }
  }

  @discardableResult
  private func require(_ result: Int32) throws -> Int32 {
    if result == LLAMA_CHAT_FAILED { throw Failure(description: String(cString: llama_chat_error())) }
    return result
  }
}

/// Takes all bytes but those of an unfinished last character.
private func takeCharacters(from bytes: inout [UInt8]) -> String {
  var unfinished = 0
  for (index, byte) in bytes.reversed().prefix(3).enumerated() where byte & 0xC0 != 0x80 {
    let length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1
    if length > index + 1 { unfinished = index + 1 }
    break
  }
  defer { bytes = bytes.suffix(unfinished) }
  return String(decoding: bytes.dropLast(unfinished), as: UTF8.self)
}

/// Tells whether an answer is being computed: one that waits for another must not cancel that one.
private final class Answer: @unchecked Sendable {
  private let handle: Int64
  private let lock = NSLock()
  private var isComputing = false
  private var wasCancelled = false

  init(_ handle: Int64) {
    self.handle = handle
  }

  var isCancelled: Bool {
    lock.withLock { wasCancelled }
  }

  func begin() -> Bool {
    lock.withLock {
      isComputing = !wasCancelled
      return isComputing
    }
  }

  func end() {
    lock.withLock { isComputing = false }
  }

  func cancel() {
    lock.withLock {
      wasCancelled = true
      if isComputing { llama_chat_cancel(handle) }
    }
  }
}

private struct Settings: Decodable {
  let context: Int32
  let temperature: Float
  let top_p: Float
  let repetition_penalty: Float
  let turns: Turns
  let calls: Calls?
}

/// What the chat template writes around the messages.
private struct Turns: Decodable {
  let start: String
  let system: [String]?
  let answer: String?
  let between: String?  // nil for a template whose earlier turns depend on later ones: every question stands alone
  let open: String

  /// Texts, and whether each is the template's, which alone has control tokens.
  func prompt(_ system: String?, _ messages: [Message]) throws -> [(text: String, isTemplate: Bool)] {
    var pieces = [(text: start, isTemplate: true)]
    if let system {
      guard let around = self.system else { throw Failure(description: "the chat template has no system message") }
      pieces = [(around[0], true), (system, false), (around[1], true)]
    }
    for (index, message) in messages.enumerated() {
      pieces.append((message.content, false))
      let after = index == messages.count - 1 ? open : message.role == "user" ? answer : between
      pieces.append((after ?? "", true))
    }
    return pieces
  }
}

private struct Calls: Decodable {
  let begin: String
  let middle: String
  let between: String
  let has_spaced_texts: Bool
  let grammar: String

  func calls(_ answer: String) throws -> [Call] {
    var found: [Call] = []
    var rest = answer.dropFirst(answer.hasPrefix(begin) ? begin.count : 0)
    repeat {
      if !found.isEmpty { rest = rest.dropFirst(between.count) }
      guard let start = rest.range(of: middle), let end = objectEnd(rest[start.upperBound...]) else {
        throw Failure(description: "the answer ended within a call")
      }
      let read = try JSONSerialization.jsonObject(with: Data(rest[start.upperBound..<end].utf8))
      let arguments = (has_spaced_texts ? unspaced(read) : read) as? [String: Any] ?? [:]
      found.append(Call(name: String(rest[..<start.lowerBound]), arguments: arguments))
      rest = rest[end...]
    } while !between.isEmpty && rest.hasPrefix(between)
    return found
  }

  private func objectEnd(_ text: Substring) -> String.Index? {
    var (depth, isText, isEscaped) = (0, false, false)
    for index in text.unicodeScalars.indices {
      let character = text.unicodeScalars[index]
      if isEscaped {
        isEscaped = false
      } else if isText {
        isEscaped = character == "\\"
        isText = character != "\""
      } else {
        isText = character == "\""
        if character == "{" { depth += 1 }
        if character == "}" {
          depth -= 1
          if depth == 0 { return text.unicodeScalars.index(after: index) }
        }
      }
    }
    return nil
  }

  /// The value without the space before each text, with which the model was trained.
  private func unspaced(_ value: Any) -> Any {
    if let object = value as? [String: Any] { return object.mapValues(unspaced) }
    if let list = value as? [Any] { return list.map(unspaced) }
    guard let text = value as? String, text.hasPrefix(" ") else { return value }
    return String(text.dropFirst())
  }
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
