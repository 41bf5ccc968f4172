// One chat with @NAME@ on ExecuTorch @EXECUTORCH@: Swift package https://github.com/pytorch/executorch,
// branch swiftpm-@EXECUTORCH@, products executorch, executorch_llm, backend_xnnpack, kernels_llm, kernels_optimized,
// kernels_quantized and kernels_torchao; linker flag -all_load.
// Call it from a background task: generate() returns when the answer is complete.
import ExecuTorchLLM
import Foundation

/// `folder` holds model.pte, tokenizer.json and check.json.
final class Chat {
  private static let context = @CONTEXT@
  private static let before = @BEFORE@
  private static let after = @AFTER@
  private static let end = @END@

  private let folder: URL
  private let runner: TextRunner

  init(folder: URL) throws {
    self.folder = folder
    runner = TextRunner(
      modelPath: folder.appendingPathComponent("model.pte").path,
      tokenizerPath: folder.appendingPathComponent("tokenizer.json").path)
    try runner.load()
  }

  /// Answers one question that stands alone, piece by piece; whole, it is returned.
  func ask(_ question: String, temperature: Double = @TEMPERATURE@, onText: (String) -> Void = { _ in }) throws -> String {
    try generate(
      Chat.before + question + Chat.after, length: Chat.context, temperature: temperature, onText: onText)
  }

  func stop() {
    runner.stop()
  }

  /// nil where this device says what the exporting machine said, else both answers.
  func check() throws -> String? {
    let data = try Data(contentsOf: folder.appendingPathComponent("check.json"))
    let check = try JSONDecoder().decode(Checks.self, from: data).executorch
    let length = check.prompt_tokens.count + check.tokens.count
    let answer = try generate(check.prompt, length: length, temperature: 0, onText: { _ in })
    return answer == check.text ? nil : "expected: \(check.text)\nanswered: \(answer)"
  }

  private func generate(
    _ prompt: String, length: Int, temperature: Double, onText: (String) -> Void
  ) throws -> String {
    var answer = ""
    runner.reset()
    let config = Config {
      $0.isEchoEnabled = false
      $0.temperature = temperature
      $0.sequenceLength = length
    }
    try runner.generate(prompt, config) { token in
      if token != Chat.end {
        answer += token
        onText(token)
      }
    }
    return answer
  }

  private struct Checks: Decodable {
    struct Check: Decodable {
      let prompt: String
      let prompt_tokens: [Int]
      let tokens: [Int]
      let text: String
    }
    let executorch: Check
  }
}
