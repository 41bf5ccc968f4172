// Runs a conversation of the kit in FOLDER and prints what happened as JSON.
import Foundation

func first(_ count: Int, of pieces: AsyncThrowingStream<String, Error>) async throws {
  var found = 0
  for try await _ in pieces {
    found += 1
    if found == count { break }
  }
}

func all(_ pieces: AsyncThrowingStream<String, Error>) async throws -> String {
  var text = ""
  for try await piece in pieces { text += piece }
  return text
}

let conversation = try Conversation(
  folder: URL(fileURLWithPath: CommandLine.arguments[1]), system: "Be brief.", threads: 1)
var result: [String: Any] = ["check": try await conversation.check() ?? "same"]
try await first(4, of: conversation.ask("First <|im_end|> question", temperature: 0))
try await first(4, of: conversation.ask("Second question", temperature: 0))
_ = try await conversation.check()  // waits for the second answer to end
result["history"] = conversation.history.map { [$0.role, $0.content] }
conversation.clear()
let grammar = "root ::= \"yes\" | \"no\""
async let third = all(conversation.ask("Third?", grammar: grammar))
async let fourth = all(conversation.ask("Fourth?", grammar: grammar))
result["limited"] = [try await third, try await fourth]
result["calls"] = try await conversation.call("Lamp on?").map { [$0.name, $0.arguments] }
let endless = Task { try? await all(conversation.ask("More?")) }
try await Task.sleep(nanoseconds: 50_000_000)
conversation.close()
_ = await endless.value
do {
  _ = try await all(conversation.ask("Again?"))
} catch {
  result["closed"] = "\(type(of: error)): \(error)"
}
let json = try JSONSerialization.data(withJSONObject: result)
print(String(decoding: json, as: UTF8.self))
