"""Calls of functions: found out from the chat template, kept valid by a grammar, read while they are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from accepting import is_accepted

from efficientllm.runtime import copied_arguments
from efficientllm.runtime.base.errors import UnanswerableError, UsageError
from efficientllm.runtime.call_reader import ArgumentsEvent, CallEvent, CallReader, TextEvent
from efficientllm.runtime.chat_template import Message
from efficientllm.runtime.copied_arguments import CopiedArguments, ToolArguments
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.grammar import CALL_JSON, Grammar, GrammarConstraint
from efficientllm.runtime.prompt import ToolUse, chat_prompt, tool_prompt
from efficientllm.runtime.spaced_texts import ObjectScanner
from efficientllm.runtime.tool_format import GENERIC, LEARNED, ToolFormat, tool_format

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHOWS = "{% if tools %}{{ tools | tojson }}{% endif %}"
QWEN = (
    SHOWS + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{% if not loop.first or m.content %}{{ '\n' }}{% endif %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    SHOWS + "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}<|start|>assistant<|end|>\n\n"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
MISTRAL = (
    SHOWS + "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}"
    '[TOOL_CALLS][{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", '
    '"arguments": {{ c.function.arguments | tojson }}}{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}'
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
XML = SHOWS + (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}<f={{ c.function.name }}>"
    "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}</f>{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            QWEN,
            ToolFormat(
                '<tool_call>\n{"name": "',
                '", "arguments": ',
                '}\n</tool_call>\n<tool_call>\n{"name": "',
                "}\n</tool_call>",
            ),
        ),
        (LLAMA, ToolFormat('{"name": "', '", "parameters": ', "", "}")),
        (MISTRAL, ToolFormat('[TOOL_CALLS][{"name": "', '", "arguments": ', '}, {"name": "', "}]")),
        (PLAIN, GENERIC),
        (XML, GENERIC),
        (None, GENERIC),
    ],
)
def test_reader_finds_the_form_of_the_template(template: str | None, expected: ToolFormat) -> None:
    assert tool_format(template, "<s>", "</s>") == expected


TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
QUESTION = {"role": "user", "content": "How is Rome?"}


def accepts(engine: EngineScheduler, use: ToolUse, text: str, messages: Sequence[Message] = (QUESTION,)) -> bool:
    return is_accepted(tool_prompt(engine, messages, use).constraint(engine), engine, text)


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def setting(parameters: dict[str, Any], arguments: ToolArguments) -> ToolUse:
    """Return the use of one function `set`, which must be called."""
    tool = {"type": "function", "function": {"name": "set", "parameters": parameters}}
    return ToolUse([tool], must_call=True, arguments=arguments)


ROME = call("weather", '{"city": "Rome"}')

CITY = {"properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}


@pytest.mark.parametrize(
    ("parameters", "arguments", "expected"),
    [
        (CITY, '{"city": "Rome"}', True),
        (CITY, '{"city": "Rome", "city: ": 1}', False),
        (CITY | {"additionalProperties": True}, '{"city": "Rome", "days": 1}', True),
        (CITY | {"required": ["city", "days"]}, '{"city": "Rome", "days": 1}', True),
        ({"properties": {"trip": CITY}}, '{"trip": {"city": "Rome", "days": 1}}', False),
        ({"properties": {"trips": {"type": "array", "items": CITY}}}, '{"trips": [{"city": "Rome", "a": 1}]}', False),
        ({"properties": {"trip": {"anyOf": [CITY]}}}, '{"trip": {"city": "Rome", "days": 1}}', False),
        ({"properties": {"trip": {"allOf": [CITY]}}}, '{"trip": {"city": "Rome", "days": 1}}', True),
        ({}, '{"days": 1}', False),
        ({"type": "object"}, '{"days": 1}', True),
    ],
)
def test_arguments_have_the_listed_properties_alone(
    parameters: dict[str, Any], arguments: str, expected: bool, engine: EngineScheduler
) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    assert accepts(engine, ToolUse(tools, must_call=True), call("weather", arguments)) == expected


@pytest.mark.parametrize(
    ("text", "may", "must"),
    [
        (ROME, True, True),
        (f"I look.\n{ROME}", True, False),
        (f"{ROME}\n{call('now', '{}')}", True, False),
        ("No need of <tool>s.", True, False),
        (call("weather", '{"city": "Oslo"}'), False, False),
        (call("weather", '{"town": "Rome"}'), False, False),
        (call("weather", "{}"), False, False),
        (call("rain", "{}"), False, False),
        (call("now", '{"x": 1}'), False, False),
        (f"{ROME} and more", False, False),
    ],
)
def test_calls_are_valid_where_there_are_any(engine: EngineScheduler, text: str, may: bool, must: bool) -> None:
    assert accepts(engine, ToolUse(TOOLS), text) == may
    assert accepts(engine, ToolUse(TOOLS, must_call=True), text) == must


def test_answer_is_a_call_or_a_value_of_the_schema(engine: EngineScheduler) -> None:
    use = ToolUse(TOOLS, otherwise={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    assert [accepts(engine, use, text) for text in (ROME, '{"a": 1}', '{"b": 1}', "text")] == [True, True, False, False]


def test_a_grammar_of_calls_is_parsed_once(engine: EngineScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Grammar] = []
    parse = Grammar.parse_on_large_stack

    def count(grammar: Grammar, work: Callable[[], Any]) -> Any:
        parsed.append(grammar)
        return parse(grammar, work)

    monkeypatch.setattr(Grammar, "parse_on_large_stack", count)
    add, written = CopiedArguments.add, list[str]()
    monkeypatch.setattr(
        CopiedArguments, "add", lambda self, name, *more: written.append(name) or add(self, name, *more)
    )
    use = ToolUse(TOOLS, arguments="copy")
    for question in ("Once", "Twice"):  # the text of the request is in the grammar
        parsed.clear()
        written.clear()
        tool_prompt(engine, [{"role": "user", "content": question}], use).constraint(engine)
    assert [grammar.name for grammar in parsed] == ["tools"]  # the parameters were checked before
    assert not written


def test_the_search_for_the_tool_that_is_refused_ends(engine: EngineScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tool is compiled alone, which can take long where all together were given up."""
    much = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 19_997, "minimum": 1}}}
    grammar = GENERIC.grammar(
        [{"function": {"name": "much", "parameters": {**much, "required": ["a"]}}}], (), must_call=True
    )
    for seconds, name in ((60.0, "tool 'much': parameters"), (0.0, "tools")):
        monkeypatch.setattr("efficientllm.runtime.grammar.MAX_NAMING_SECONDS", seconds)
        with pytest.raises(UnanswerableError, match=f"^{name}: no output can satisfy this grammar: fuel exhausted"):
            GrammarConstraint(engine, grammar)


REMIND = {
    "name": "remind",
    "parameters": {
        "type": "object",
        "properties": {
            "room": {"type": "string", "examples": ["hall", 'the "Den"'], "default": "attic"},
            "who": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "what": {"type": "string", "description": "Free."},
            "when": {"type": ["string", "integer"]},
            "mode": {"enum": ["loud", "soft"]},
            "code": {"type": "string", "pattern": "^[0-9]{2}$"},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
            "anything": True,
        },
        "required": ["what"],
        "$defs": {"tag": {"type": "string"}},
    },
}
REQUEST = 'Tell Ann\tto call "Größe & Co" at\nnoon'


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        *(({"what": what}, True) for what in ("call", 'call "Größe & Co" at', 'call "größe & co"', "Tell Ann to", "")),
        *(({"what": what}, False) for what in ("tell Ann", "cal", "Ann ", "at noon", "noon number 7", "secret")),
        ({"what": "number 7"}, True),
        ({"who": "Ann"}, False),
        ({"who": None, "what": "call"}, True),
        ({"who": "Bob", "what": "call"}, False),
        *(({"room": room, "what": "call"}, True) for room in ("hall", 'the "Den"', "attic", "Ann")),
        ({"room": "cellar", "what": "call"}, False),
        *(({"what": "call", "when": when}, when != "dawn") for when in (12, "noon", "dawn")),
        *(({"what": "call", "mode": mode}, mode == "soft") for mode in ("soft", "noon")),
        ({"what": "call", "code": "42"}, True),
        ({"what": "call", "tags": ["any", "tag"]}, True),
        ({"what": "call", "anything": {"x": "dawn"}}, True),
        ({"what": "call", "more": 1}, False),
    ],
)
def test_arguments_are_copied_from_the_request(
    engine: EngineScheduler, arguments: dict[str, Any], expected: bool
) -> None:
    use = ToolUse([{"type": "function", "function": REMIND}], must_call=True, arguments="copy")
    contents = (("system", "secret"), ("user", REQUEST), ("assistant", "secret"), ("tool", "number 7"))
    messages = [{"role": role, "content": content} for role, content in contents]
    text = call("remind", json.dumps(arguments, ensure_ascii=False))
    assert accepts(engine, use, text, messages) == expected


def test_arguments_without_free_texts_follow_their_schema(engine: EngineScheduler) -> None:
    assert accepts(engine, ToolUse(TOOLS, must_call=True, arguments="copy"), ROME)
    assert accepts(engine, ToolUse(TOOLS, arguments="copy"), call("now", "{}"))
    nested = {"type": "object", "properties": {"a": {"type": "string"}}, "propertyNames": {"maxLength": 3}}
    function = {"name": "nested", "parameters": nested, "strict": True}
    use = ToolUse([{"type": "function", "function": function}], arguments="copy")
    with pytest.raises(UsageError, match=r"^tool 'nested': parameters: `propertyNames` cannot be enforced"):
        tool_prompt(engine, [QUESTION], use).constraint(engine)


@pytest.mark.parametrize("format", [GENERIC, LEARNED])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"name": "Lava Lamp"}, True),
        ({"name": "lava lamp"}, False),
        ({"name": "Lamp"}, False),
        ({"name": "灯"}, True),
        ({"floor": "first"}, False),
        ({"name": "Lava Lamp", "level": 3}, True),
        ({"name": "Lava Lamp", "scene": "turn on"}, True),
        ({"name": "Lava Lamp", "scene": "party"}, False),
    ],
)
def test_arguments_are_examples_that_occur_in_the_request(
    engine: EngineScheduler, format: ToolFormat, arguments: dict[str, Any], expected: bool
) -> None:
    properties = {
        "name": {"type": "string", "examples": ["Lava Lamp", "Lamp Shade", "lav", "灯"]},
        "floor": {"type": "string", "examples": ["first", "second"]},
        "level": {"type": "integer"},
        "scene": {"type": "string"},
    }
    use = setting({"properties": properties}, "examples")
    messages = [{"role": "user", "content": "turn on the LAVA  lamp 和灯光"}]
    prompt = replace(tool_prompt(engine, messages, use), format=format)
    text = format.write([{"function": {"name": "set", "arguments": arguments}}])
    assert is_accepted(prompt.constraint(engine), engine, text) == expected


def test_a_required_argument_without_an_example_in_the_request_is_copied(engine: EngineScheduler) -> None:
    name = {"type": "string", "examples": ["lava lamp"]}
    for required in (["name"], []):
        use = setting({"properties": {"name": name}, "required": required}, "examples")
        assert accepts(engine, use, call("set", '{"name": "rome"}')) == bool(required)
        assert not accepts(engine, use, call("set", '{"name": "lava lamp"}'))
        assert accepts(engine, use, call("set", "{}")) == (not required)


@pytest.mark.parametrize(
    "schema", [False, {"type": "integer", "minimum": 5, "maximum": 3}, {"enum": []}, {"anyOf": [False]}]
)
def test_call_omits_arguments_with_an_impossible_schema(engine: EngineScheduler, schema: Any) -> None:
    parameters = {"properties": {"city": {"type": "string"}, "none": schema}}
    for arguments in ("any", "copy"):
        use = setting(parameters, arguments)
        assert accepts(engine, use, call("set", '{"city": "Rome"}'))
        assert not accepts(engine, use, call("set", '{"city": "Rome", "none": 1}'))
    use = setting({**parameters, "required": ["none"]}, "copy")
    with pytest.raises(UsageError, match=r"^tool 'set': parameters: Unsatisfiable schema"):
        tool_prompt(engine, [QUESTION], use).constraint(engine)


LOFT: dict[str, Any] = {"type": "string", "examples": ["loft"]}
NULL = {"type": "null"}


@pytest.mark.parametrize(
    ("schema", "accepted", "refused"),
    [
        ({**LOFT, "type": ["string", "null"]}, [None], ["Rome", "loft"]),
        ({**LOFT, "type": ["string"]}, [], ["Rome", "loft"]),
        ({"anyOf": [LOFT, NULL]}, [None], ["Rome", "loft"]),
        ({"anyOf": [{"type": "string"}, NULL], "examples": ["loft"], "default": None}, [None], ["Rome", "loft"]),
        ({"anyOf": [{"type": "string"}, NULL], "examples": ["rome"]}, [None, "rome"], ["Rome"]),
        ({"type": "string", "default": "loft"}, ["Rome", "loft"], ["Oslo"]),
        ({"type": "string", "examples": ["", " ", 3]}, ["Rome"], [" "]),
        ({"type": "number"}, [21.5, -3, 1e-07], [0.1234567890123456, 12345678901234567, "Rome"]),
    ],
)
def test_arguments_are_examples_or_values_of_other_types(
    engine: EngineScheduler, schema: dict[str, Any], accepted: list[Any], refused: list[Any]
) -> None:
    use = setting({"properties": {"a": schema}}, "examples")
    for value in accepted + refused:
        text = call("set", json.dumps({"a": value}))
        assert accepts(engine, use, text) == (value in accepted), value
    assert accepts(engine, use, call("set", "{}"))


@pytest.mark.parametrize(
    ("example", "content", "expected"),
    [
        ("Café", "the cafe\u0301", True),
        ("cafe", "the cafe\u0301", False),
        ("İstanbul", "to istanbul", True),
        ("Isparta", "to \u0131sparta", True),
        ("Straße", "STRASSE", True),
        ("リビング", "ﾘﾋﾞﾝｸﾞ", True),
        ("कमर", "कमरा", False),
        ("कमरा", "कमरा", True),
        ('a\\"\x7f\n', 'a\\"\x7f\n', True),
    ],
)
def test_examples_are_found_in_any_form_of_their_letters(
    engine: EngineScheduler, example: str, content: str, expected: bool
) -> None:
    use = setting({"properties": {"a": {"type": "string", "examples": [example]}}}, "examples")
    text = call("set", json.dumps({"a": example}, ensure_ascii=False))
    assert accepts(engine, use, text, [{"role": "user", "content": content}]) == expected


def test_an_example_occurs_in_one_message(engine: EngineScheduler) -> None:
    use = setting({"properties": {"a": {"type": "string", "examples": ["lava lamp", "lamp"]}}}, "examples")
    contents = (("user", "a lava"), ("assistant", "What?"), ("user", "lamp"), ("tool", "long " * 20_000))
    messages = [{"role": role, "content": content} for role, content in contents]
    for example, expected in (("lava lamp", False), ("lamp", True)):
        assert accepts(engine, use, call("set", json.dumps({"a": example})), messages) == expected


@pytest.mark.parametrize("character", ["灯", "a ", "\x01"])
def test_the_end_of_a_long_request_is_copied(engine: EngineScheduler, character: str) -> None:
    """Its words, as the grammar writes them, are limited, and not only the length of its text."""
    use = setting({"properties": {"a": {"type": "string"}}, "required": ["a"]}, "copy")
    messages = [{"role": "user", "content": f"Oslo {character * 40_000} Rome"}]
    for city, expected in (("Rome", True), ("Oslo", False)):
        assert accepts(engine, use, call("set", json.dumps({"a": city})), messages) == expected


def test_functions_share_their_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same names in many functions take the space and the time of one."""
    names = [f"lamp {index}" for index in range(2000)]
    parameters = {"properties": {"name": {"type": "string", "examples": names}}, "required": ["name"]}
    read = list[str]()
    between = copied_arguments._between_separators
    monkeypatch.setattr(copied_arguments, "_between_separators", lambda text: read.append(text) or between(text))
    for only_examples in (False, True):
        copied = CopiedArguments(["lamp 7 and 8"], only_examples=only_examples)
        for index in range(40):
            copied.add(f"call_{index}", parameters, CALL_JSON)
        assert len([rule for rule in copied.rules if "lamp 7" in rule and rule.startswith("LISTED")]) == 1
    assert len(read) == 1 + len(names)


@pytest.mark.parametrize("kind", ["any", "copy"])
def test_keywords_that_cannot_be_enforced_are_ignored_unless_the_function_is_strict(
    engine: EngineScheduler, kind: ToolArguments
) -> None:
    tags = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    parameters = {"type": "object", "properties": {"tags": tags}, "additionalProperties": False}
    function = {"name": "tag", "parameters": parameters}
    use = ToolUse([{"type": "function", "function": function}], must_call=True, arguments=kind)
    assert accepts(engine, use, call("tag", '{"tags": [1, 1]}'))
    assert not accepts(engine, use, call("tag", '{"tags": ["a"]}'))
    with pytest.raises(UsageError, match=r"^tool 'tag': parameters: `uniqueItems` cannot be enforced"):
        accepts(engine, replace(use, tools=[{"type": "function", "function": {**function, "strict": True}}]), "")


@pytest.mark.parametrize("wrong", [{"properties": [1]}, {"properties": {"a": 1}}, {"required": [{}]}, {"required": 1}])
@pytest.mark.parametrize("format", [GENERIC, LEARNED])
def test_a_malformed_schema_is_refused_before_it_is_rewritten(
    engine: EngineScheduler, format: ToolFormat, wrong: Any
) -> None:
    kind: ToolArguments = "copy" if format == GENERIC else "any"
    use = ToolUse([{"type": "function", "function": {"name": "odd", "parameters": wrong}}], arguments=kind)
    prompt = replace(tool_prompt(engine, [QUESTION], use), format=format)
    with pytest.raises(UsageError, match=r"^tool 'odd': parameters: "):
        prompt.constraint(engine)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_an_answer_is_read_the_same_however_it_is_cut(size: int) -> None:
    tricky = json.dumps({"city": 'a "}]} b', "nested": {"x": ["{"]}})
    text = f"Let me <tool.\n{call('weather', tricky)}\n{call('now', '{}')}"
    reader, events = CallReader(GENERIC), []
    for start in range(0, len(text), size):
        events += reader.push(text[start : start + size])
    events += reader.finish()
    assert "".join(event.text for event in events if isinstance(event, TextEvent)) == "Let me <tool.\n"
    calls = [(event.index, event.name) for event in events if isinstance(event, CallEvent)]
    assert calls == [(0, "weather"), (1, "now")]
    parts = [event for event in events if isinstance(event, ArgumentsEvent)]
    arguments = ["".join(part.text for part in parts if part.index == index) for index in (0, 1)]
    assert arguments == [tricky, "{}"]


LAMP: dict[str, Any] = {"name": 'a "big" {lamp', " key": ["red", "", " two"], "level": 3, "more": {"on": True}}


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_texts_in_arguments_of_a_learned_format_begin_with_a_space(size: int) -> None:
    """A copied word then has the tokens that it has in the request."""
    text = LEARNED.write([{"function": {"name": "set", "arguments": LAMP}}])
    assert '{"name": " a \\"big\\" {lamp", " key": [" red", " ", "  two"], "level": 3' in text
    reader, events = CallReader(LEARNED), []
    for start in range(0, len(text), size):
        events += reader.push(text[start : start + size])
    assert json.loads("".join(each.text for each in events if isinstance(each, ArgumentsEvent))) == LAMP
    assert json.loads(LEARNED.plain(text)) == {"name": "set", "arguments": LAMP}


def test_only_texts_in_objects_lose_a_space() -> None:
    text = 'He said " no" and [" no"]: {"a": "b", "c": " d"} " e"'
    assert ObjectScanner().push(text) == 'He said " no" and [" no"]: {"a": "b", "c": "d"} " e"'


@pytest.mark.parametrize("kind", ["any", "copy"])
def test_a_grammar_of_a_learned_format_writes_the_spaces(engine: EngineScheduler, kind: ToolArguments) -> None:
    properties = {
        "mode": {"enum": ["on", "off", 1]},
        "short": {"type": "string", "maxLength": 4},
        "code": {"type": "string", "pattern": "^[0-9]+$"},
        "rooms": {"type": "array", "items": {"anyOf": [{"const": "hall"}, {"$ref": "#/$defs/room"}]}},
    }
    use = setting({"properties": properties, "$defs": {"room": {"enum": ["loft"]}}}, kind)
    prompt = tool_prompt(engine, [QUESTION], use)
    constraint = replace(prompt, format=LEARNED).constraint(engine)
    assert constraint is not None

    def accepts(arguments: str) -> bool:
        state = constraint.copy()
        try:
            for token in engine.tokenize(f'{{"name": "set", "arguments": {arguments}}}', special=False):
                state.push(token)
        except UnanswerableError:
            return False
        return state.is_accepting

    assert accepts('{"mode": " on", "short": " four", "code": "12", "rooms": [" hall", " loft"]}')
    assert accepts('{"mode": 1}')
    for wrong in ('"mode": "on"', '"short": "four"', '"short": " fifth"', '"code": " 12"', '"rooms": ["loft"]'):
        assert not accepts(f"{{{wrong}}}"), wrong


def test_text_that_only_begins_like_a_call_is_text() -> None:
    reader = CallReader(GENERIC)
    assert reader.push("a <tool_call>\n{") == [TextEvent("a ")]
    assert reader.push('"x"') == [TextEvent('<tool_call>\n{"x"')]
    assert reader.push(" <tool") == [TextEvent(" ")]
    assert reader.finish() == [TextEvent("<tool")]


def text_of(engine: EngineScheduler, tokens: list[int]) -> str:
    return b"".join(map(engine.token_bytes, tokens)).decode()


def test_template_without_functions_gets_them_as_text(engine: EngineScheduler) -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
    messages = [
        {"role": "system", "content": "Be kind."},
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        {"role": "tool", "content": "warm", "tool_call_id": "2"},
    ]
    text = text_of(engine, tool_prompt(engine, messages, ToolUse(TOOLS)).tokens)
    assert text.startswith("system\nBe kind.\n\nYou can call functions.")
    assert '{"name": "now"}\n' in text
    assert f"assistant\n{ROME}\n" in text
    assert text.count("user\n") == 2
    assert "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nwarm\n</tool_response>" in text


class Picky:
    """An engine with another template."""

    def __init__(self, engine: EngineScheduler, template: str) -> None:
        self._engine, self.chat_template = engine, template

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("m.role == 'system' and not loop.first", "system: A\n\nB|user: Q|"),
        ("m.role == 'system'", "user: A\n\nB\n\nQ|"),
    ],
)
def test_templates_that_refuse_system_messages_get_their_text(
    engine: EngineScheduler, condition: str, expected: str
) -> None:
    template = (
        "{% for m in messages %}{% if CONDITION %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}|{% endfor %}"
    ).replace("CONDITION", condition)
    messages = [{"role": role, "content": text} for role, text in (("system", "A"), ("system", "B"), ("user", "Q"))]
    picky: Any = Picky(engine, template)
    assert text_of(engine, chat_prompt(picky, messages)) == expected
