// A chat on one screen with the model in the app's bundle.
import SwiftUI

@main
struct ChatApp: App {
  var body: some Scene {
    WindowGroup { ChatView() }
  }
}

struct ChatView: View {
  @State private var conversation: Conversation?
  @State private var text = ""
  @State private var question = ""
  @State private var answer: Task<Void, Never>?

  var body: some View {
    VStack {
      ScrollView { Text(text).frame(maxWidth: .infinity, alignment: .leading) }
      HStack {
        TextField("Question", text: $question)
        Button(answer == nil ? "Send" : "Stop", action: press).disabled(conversation == nil)
      }
    }
    .padding()
    .task { await open() }
  }

  private func open() async {
    do {
      let folder = Bundle.main.resourceURL!
      let opened = try await Task.detached { try Conversation(folder: folder) }.value
      text = try await opened.check() ?? "This phone answers as the exporting machine did."
      conversation = opened
    } catch {
      text = "\(error)"
    }
  }

  private func press() {
    if let answer {
      answer.cancel()
      return
    }
    guard let conversation else { return }
    let asked = question
    text += "\n\n> \(asked)\n"
    answer = Task {
      do {
        for try await piece in conversation.ask(asked) { text += piece }
      } catch {
        text += "\(error)"
      }
      answer = nil
    }
  }
}
