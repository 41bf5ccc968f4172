"""Chat templates in Ollama's language, rendered by Go itself where there is one."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from efficientllm.export.gguf.modelfile import derive_turns
from efficientllm.runtime.chat_template import Message, render_chat

BOS, EOS = "<s>", "</s>"

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n\"Help\" with {{ braces }}<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for message in messages %}"
    "{% set content = '[' + message['role'] + ']\n\n' + message['content'] + '[end]' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'system' %}[SYS]{{ message.content }}[/SYS]{% else %} {{ message.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
OLMO_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role != 'assistant' %}<|{{ m.role }}|>\n{{ m.content }}\n"
    "{% elif loop.last %}<|assistant|>\n{{ m.content + eos_token }}"
    "{% else %}<|assistant|>\n{{ m.content + eos_token }}\n{% endif %}"
    "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
TURNS = {"chatml": CHATML, "llama 3": LLAMA_3, "mistral": MISTRAL, "olmo 2": OLMO_2, "phi 3": PHI_3}

OTHERS = {
    "no system message": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>",
    "the system message within the question": "{% for m in messages if m.role != 'system' %}<{{ m.role }}>"
    "{% if loop.first and messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}{{ m.content }}"
    "{% endfor %}<assistant>",
    "only the last question": "<user>{{ messages[-1].content }}<assistant>",
    "turns that are counted": "{% for m in messages %}<{{ m.role }} {{ loop.index }}>{{ m.content }}{% endfor %}"
    "<assistant>",
    "malformed": "{% for m in messages %}",
    "contents that are trimmed": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}<assistant>",
    "thoughts that are left out": "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}"
    "{% endfor %}<assistant>",
    "a list within the system message": "{% for m in messages %}<{{ m.role }}>{% if m.role == 'system' and "
    "'Stock:' in m.content %}{{ m.content.split('Stock:')[0] }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "<assistant>",
    "results within a user's message": "{% for m in messages %}<{{ m.role }}>{{ m.content if not "
    "m.content.startswith('<result>') else 'done' }}{% endfor %}<assistant>",
    "two conditions": "{% for m in messages %}<{{ m.role }}>{{ 'both' if 'one of' in m.content and 'two of' in "
    "m.content else m.content }}{% endfor %}<assistant>",
    "contents that are cut": "{% for m in messages %}<{{ m.role }}>{{ m.content[:900] }}{% endfor %}<assistant>",
    "the day": "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "<assistant>",
}

CONVERSATIONS: list[list[Message]] = [
    [{"role": "user", "content": 'What\'s "this"?'}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{{ .Content }}\n`a`"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Två ✓"},
        {"role": "user", "content": "Three"},
    ],
]

GO = """package main

import ("encoding/json"; "os"; "text/template")

type Message struct { Role, Content string }

func main() {
    var task struct { Template string; Messages []Message }
    if err := json.NewDecoder(os.Stdin).Decode(&task); err != nil { panic(err) }
    parsed := template.Must(template.New("").Parse(task.Template))
    if err := parsed.Execute(os.Stdout, map[string]any{"Messages": task.Messages}); err != nil { panic(err) }
}
"""


@pytest.mark.parametrize("name", TURNS)
def test_a_template_of_turns_is_derived(name: str) -> None:
    turns = derive_turns(TURNS[name], BOS, EOS, adds_bos=False)
    without = derive_turns(TURNS[name], BOS, EOS, adds_bos=True)
    assert turns is not None
    assert without is not None
    for messages in CONVERSATIONS:
        expected = render_chat(TURNS[name], messages, BOS, EOS)
        assert turns.render(messages) == expected
        assert without.render(messages) == expected.removeprefix(BOS)


@pytest.mark.parametrize("name", OTHERS)
def test_export_names_only_known_templates(name: str) -> None:
    assert derive_turns(OTHERS[name], BOS, EOS, adds_bos=False) is None


@pytest.mark.skipif(shutil.which("go") is None, reason="no Go (apt install golang-go)")
def test_go_template_renders_as_the_template_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(GO)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "GOFLAGS": "-mod=mod"}
    program = tmp_path / "render"
    subprocess.run([str(shutil.which("go")), "build", "-o", program, tmp_path / "main.go"], env=environment, check=True)

    def written(template: str, messages: Sequence[Message]) -> str:
        task = json.dumps({"Template": template, "Messages": messages})
        return subprocess.run([program], input=task, capture_output=True, text=True, check=True).stdout

    for template in TURNS.values():
        turns = derive_turns(template, BOS, EOS, adds_bos=False)
        assert turns is not None
        for messages in CONVERSATIONS:
            assert written(turns.go(), messages) == turns.render(messages)
        begun: list[Message] = [*CONVERSATIONS[0], {"role": "assistant", "content": "It is"}]
        assert written(turns.go(), begun).endswith("It is")  # an answer to go on with
