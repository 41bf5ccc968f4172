"""Write Ollama's Modelfile: chat template, context, sampling and stop tokens.

Ollama does not run the template in a GGUF. It compares its text with known templates and otherwise sends the bare
question. The template in Ollama's language, Go's text/template, is therefore derived from rendered conversations of the
model's own template. It is then compared with that template on other conversations, and omitted if one differs.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...runtime.base.errors import EfficientLLMError
from ...runtime.chat_template import Message, names_in, render_chat, texts_around
from ...runtime.engines.hf_tokenizer import HfTokenizer
from ..checkpoint import Checkpoint
from ..manifest import generation_defaults

Rendered = Callable[[Sequence[Message], bool], str]
"""(messages, whether an answer follows) -> rendered text."""
ROLES: tuple[str, ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turns:
    """A conversation written turn by turn."""

    head: str
    """Text before conversations without a system message."""
    before: dict[str, str]
    """Role -> text before its message."""
    after: dict[str, str]
    answer: str
    """Text before an answer."""

    def render(self, messages: Sequence[Message]) -> str:
        """Render the prompt for the next answer."""
        turns = (self.before[each["role"]] + each["content"] + self.after[each["role"]] for each in messages)
        head = "" if messages[0]["role"] == "system" else self.head
        return head + "".join(turns) + self.answer

    def go(self) -> str:
        """Return a Go template over Ollama's .Messages that continues a started answer."""
        system, user, assistant = (
            (_literal(self.before[role]), "{{ .Content }}", _literal(self.after[role])) for role in ROLES
        )
        opening = '{{- if ne (index .Messages 0).Role "system" }}' + _literal(self.head) + "{{ end }}"
        return "".join([
            opening if self.head else "",
            "{{- range $i, $_ := .Messages }}",
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
            '{{- if eq .Role "system" }}', *system,
            '{{- else if eq .Role "user" }}', *user,
            '{{- else if eq .Role "assistant" }}', *assistant[:2], "{{ if not $last }}", assistant[2], "{{ end }}",
            "{{- end }}",
            '{{- if and $last (ne .Role "assistant") }}', _literal(self.answer), "{{ end }}",
            "{{- end }}",
        ])  # fmt: skip


def _literal(text: str) -> str:
    """Return a Go string as an action, so that nothing in it is parsed and no space around it is trimmed."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def derive_turns(template: str, bos: str, eos: str, *, adds_bos: bool) -> Turns | None:
    """Derive the turns that `template` (Jinja) writes; None for other kinds of template.

    `adds_bos` means that the runtime begins every prompt with that token.
    """
    if "strftime_now" in template:  # the day of the export would be every day's
        return None

    def rendered(messages: Sequence[Message], answer: bool) -> str:
        text = render_chat(template, messages, bos, eos, add_generation_prompt=answer)
        return text.removeprefix(bos) if adds_bos else text

    for read in (_read_conversations, _read_prompts):
        with contextlib.suppress(EfficientLLMError):  # it refuses a system message, say
            turns = read(rendered)
            probes = [*PROBES, *probes_of(template)]
            if turns is not None and all(turns.render(each) == rendered(each, True) for each in probes):
                return turns
    return None


def probes_of(template: str) -> list[list[Message]]:
    """Return conversations in which each role writes the texts that a template may look for, and a long one.

    One message has all of the texts, because a condition may need two of them.
    """
    texts = sorted(each for each in names_in(template) if each.strip())
    contents = [*(f"One {each} two {each}\nthree" for each in texts), *texts, "\n".join(texts), "Four Five " * 500]
    roles = (*ROLES, "user")
    return [[{"role": role, "content": each} for role in roles] for each in contents]


def _read_prompts(rendered: Rendered) -> Turns | None:
    """Derive turns from four prompts, for a template that writes closed conversations in another way.

    Returns None if the turns are not written alike. A common beginning of all turns may be read as the end of the turns
    before.
    """
    system, user, reply, second = ASKED

    def around(*messages: Message) -> list[str]:
        return texts_around(rendered(messages, True), messages)

    begin, tail = around(user)
    _, between_users, _ = around(user, second)
    # after a user's turn comes its end in both, and then another turn in one and the prompt of a reply in the other
    after_user = os.path.commonprefix([between_users, tail])  # noqa: RUF071  any common characters are meant
    before_user = between_users.removeprefix(after_user)
    _, to_reply, to_user, _ = around(user, reply, second)
    before_system, after_system, _ = around(system, user)
    are_alike = all(text.endswith(before_user) for text in (begin, to_user, after_system))
    if not (to_reply.startswith(after_user) and are_alike):
        return None
    before = (before_system, before_user, to_reply.removeprefix(after_user))
    after = (after_system.removesuffix(before_user), after_user, to_user.removesuffix(before_user))
    roles = dict(zip(ROLES, before, strict=True)), dict(zip(ROLES, after, strict=True))
    return Turns(begin.removesuffix(before_user), *roles, tail.removeprefix(after_user))


def _read_conversations(rendered: Rendered) -> Turns | None:
    """Derive turns from four conversations; None if they are not written alike."""
    system, user, reply, second = ASKED

    def around(*messages: Message) -> list[str]:
        return texts_around(rendered(messages, False), messages)

    asked, prompt = rendered([user], False), rendered([user], True)
    begin, after_user = around(user)
    _, to_reply, to_user, _ = around(user, reply, second)
    *_, after_reply = around(user, reply)
    before_user = to_user.removeprefix(after_reply)
    before_system, after_system, _ = around(system, user)
    if not (prompt.startswith(asked) and begin.endswith(before_user)):
        return None
    before = (before_system, before_user, to_reply.removeprefix(after_user))
    after = (after_system.removesuffix(before_user), after_user, after_reply)
    roles = dict(zip(ROLES, before, strict=True)), dict(zip(ROLES, after, strict=True))
    return Turns(begin.removesuffix(before_user), *roles, prompt.removeprefix(asked))


def _conversation(*turns: str) -> list[Message]:
    """Return messages of turns such as "u text", with the roles "s", "u" and "a"."""
    roles = {role[0]: role for role in ROLES}
    return [{"role": roles[turn[0]], "content": turn} for turn in turns]


ASKED = _conversation("s EFFICIENTLLM-1", "u EFFICIENTLLM-2", "a EFFICIENTLLM-3", "u EFFICIENTLLM-4")
PROBES = [
    _conversation(*turns)
    for turns in (
        ["u one"],
        ["system two", "u three"],
        ["u four", "a five", "u six\nand {{ seven }}"],
        ["s 8", "u nine", "a ten", "user eleven", "a 12", "u 13"],
        ["s \n 14 \n", "u  15\n\n16 ", "a <think>\n17\n</think>\n\n18", "u\n19\n"],
        ["s 20", *("u 21", "a 22") * 8, "u 23"],
    )
]
"""Conversations that a derived template must render as the model's own template does."""


MAX_CONTEXT = 4096
"""Tokens of context. Ollama and llama-server allocate the caches of all of them."""

NAMES = {"temperature": "temperature", "top_p": "top_p", "repetition_penalty": "repeat_penalty"}
"""Our options -> Ollama's."""


def modelfile(checkpoint: Checkpoint, model_file: str, template: Sequence[str]) -> str:
    """Return the text of a Modelfile for `model_file` in the same folder, with the lines of `ollama_template`."""
    lines = [f"FROM ./{model_file}", f"PARAMETER num_ctx {min(checkpoint.context_length, MAX_CONTEXT)}"]
    lines += [f"PARAMETER {NAMES[name]} {value:g}" for name, value in generation_defaults(checkpoint).items()]
    ends = [checkpoint.tokenizer.id_to_token(token) for token in checkpoint.end_of_generation_ids]
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends if end]
    return "\n".join([*lines, *template]) + "\n"


NO_TEMPLATE = (
    "the Modelfile has no TEMPLATE: the chat template does more than write turns, and Ollama does not run it; use "
    "efficientllm serve, which has Ollama's API"
)


def ollama_template(checkpoint: Checkpoint) -> list[str]:
    """Return the template lines, or NO_TEMPLATE as a remark. A model without a template has none."""
    tokenizer = HfTokenizer(checkpoint.folder)
    if tokenizer.chat_template is None:
        return []
    turns = derive_turns(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, adds_bos=tokenizer.adds_bos)
    if turns is None:
        return [f"# {NO_TEMPLATE}"]
    return [f'TEMPLATE """{turns.go()}"""']
