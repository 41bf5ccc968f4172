"""Arguments that are values of records in the conversation, as a comment of the chat template describes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from accepting import is_accepted
from test_tools import PLAIN, Picky

from efficientllm.runtime.base.errors import UsageError
from efficientllm.runtime.engines.scheduler import EngineScheduler
from efficientllm.runtime.listed_context import listed_records
from efficientllm.runtime.prompt import ToolUse, tool_prompt
from efficientllm.runtime.tool_format import JOB_MARK

LISTS = """{#- efficientllm lists
- names: {name}
  domain: {domain}
  areas: {area}
-#}
"""
HOME = """Be brief.
Devices:
- names: Work Lamp, Desk
  domain: light
  areas: Attic
- names: 'Bob''s Lamp'
  domain: light
- names: Dusty
  state: 'on'
  domain: vacuum
  areas: Attic
- names: Hatch
  domain: cover
  areas: "Loft"
- names: Ofen
  areas: Küche

  areas: Garden
"""
TEXT, TEXTS = {"type": "string"}, {"type": "array", "items": {"type": "string"}}
AREA = {"$ref": "#/$defs/Area"}
ORDERS = {
    "switch": {"name": TEXT, "area": TEXT, "floor": TEXT, "domain": TEXTS, "level": {"type": "integer"}},
    "heat": {"level": {"type": "integer"}, "area": TEXT, "name": TEXT},
    "old": {"domain": TEXT, "area": TEXT, "name": TEXT},
    "clean": {"name": TEXT, "area": TEXT, "domain": {"type": "array", "items": {"enum": ["vacuum"]}}},
    "call": {"text": TEXT, "area": TEXT},
    "find": {"name": {"anyOf": [TEXT, {"type": "null"}]}, "domain": {"type": ["string", "null"]}, "area": AREA},
    "list": {"area": {"anyOf": [TEXT, TEXTS]}, "name": {"type": "string", "minLength": 6}},
    "move": {"area": {"minLength": 5}, "text": AREA},
    "warm": {"name": TEXT, "area": {"enum": ["Küche", "Loft"]}},
    "dim": {"name": TEXT, "area": {"anyOf": [{"enum": ["Attic"]}, {"enum": ["Loft"]}]}},
    "say": {"name": TEXT, "area": {"type": ["string", "null"], "enum": ["Attic", "Garden", None]}, "domain": {}},
}
REQUIRED = {"heat": ["level"], "call": ["area"]}


def test_records_are_read_as_the_template_describes_them() -> None:
    assert listed_records(LISTS + PLAIN, [HOME, "- names: none\nother"]) == (
        {"name": ("Work Lamp, Desk", "Work Lamp", "Desk"), "domain": ("light",), "area": ("Attic",)},
        {"name": ("Bob's Lamp",), "domain": ("light",)},
        {"name": ("Dusty",), "domain": ("vacuum",), "area": ("Attic",)},
        {"name": ("Hatch",), "domain": ("cover",), "area": ("Loft",)},
        {"name": ("Ofen",), "area": ("Küche",)},
        {"name": ("none",)},
    )
    line = "{#- efficientllm lists\n* {item} ({size}) on shelf {shelf}.\n-#}"
    boxes = {"item": ("Blue",), "size": ("big) box (2 l",), "shelf": ("4",)}
    assert listed_records(line, ["* Blue (big) box (2 l) on shelf 4.\n* Red on shelf"]) == (boxes,)
    assert listed_records(PLAIN, [HOME]) is None is listed_records("{#- efficientllm lists\n\n-#}", [HOME])
    with pytest.raises(UsageError, match=r"'{a} {a}': redefinition of group name 'a'.*; correct its comment"):
        listed_records("{#- efficientllm lists\n{a} {a}\n-#}", [HOME])


def accepts(engine: EngineScheduler, name: str, arguments: dict[str, Any], home: str = HOME, **beside: Any) -> bool:
    parameters = {"type": "object", "properties": ORDERS[name], "required": REQUIRED.get(name, []), **beside}
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}}]
    messages = [{"role": "system", "content": home}, {"role": "user", "content": "the Top floor, now"}]
    other: Any = Picky(engine, JOB_MARK + LISTS + PLAIN)
    prompt = tool_prompt(other, messages, ToolUse(tools, must_call=True, arguments="listed"))
    text = prompt.format.write([{"function": {"name": name, "arguments": arguments}}])
    constraint = prompt.constraint(engine)
    assert constraint is not None
    return is_accepted(constraint, engine, text)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("switch", {"name": "Work Lamp"}, True),
        ("switch", {"name": "Desk", "area": "Attic", "domain": ["light"]}, True),
        ("switch", {"name": "Desk", "floor": "Top", "domain": ["light"], "level": 3}, True),
        ("switch", {"name": "Desk", "domain": ["vacuum"]}, False),
        ("switch", {"name": "Desk", "area": "Loft"}, False),
        ("switch", {"name": "Bob's Lamp", "domain": ["light"]}, True),
        ("switch", {"name": "Bob's Lamp", "area": "Attic"}, False),
        ("switch", {"name": "desk"}, False),
        ("switch", {"name": "Lamp"}, False),
        ("switch", {"area": "Attic", "domain": ["light"]}, True),
        ("switch", {"area": "Attic", "domain": ["light", "vacuum"]}, True),
        ("switch", {"area": "Attic", "domain": ["light", "cover"]}, False),
        ("switch", {"area": "Loft", "domain": ["light"]}, False),
        ("switch", {"area": "Garden"}, False),
        ("switch", {"floor": "Top", "domain": ["cover"]}, True),
        ("switch", {"floor": "Attic"}, False),
        ("switch", {"level": 3}, True),
        ("switch", {}, True),
        ("heat", {"level": 3}, True),
        ("heat", {"level": 3, "area": "Loft", "name": "Hatch"}, True),
        ("heat", {"level": 3, "area": "Attic", "name": "Hatch"}, False),
        ("heat", {"name": "Hatch"}, False),
        ("old", {"domain": "light", "name": "Desk"}, True),
        ("old", {"domain": "vacuum", "area": "Attic", "name": "Desk"}, False),
        ("clean", {"name": "Dusty"}, True),
        ("clean", {"name": "Desk"}, False),
        ("clean", {"area": "Attic", "domain": ["vacuum"]}, True),
        ("clean", {"area": "Loft"}, False),
        ("call", {"text": "now", "area": "Loft"}, True),
        ("call", {"text": "now"}, False),
        ("find", {"name": "Hatch", "domain": "cover", "area": "Loft"}, True),
        ("find", {"name": "Hatch", "domain": "light"}, False),
        ("find", {"name": None, "domain": None, "area": "Loft"}, True),
        ("list", {"area": "Attic"}, True),
        ("list", {"area": ["Attic", "Loft"]}, True),
        ("list", {"name": "Work Lamp"}, True),
        ("list", {"name": "Dusty"}, False),
        ("move", {"area": "Attic", "text": "now"}, True),
        ("move", {"area": "Loft"}, False),
        ("warm", {"name": "Ofen", "area": "Küche"}, True),
        ("warm", {"name": "Desk"}, False),
        ("dim", {"name": "Desk", "area": "Attic"}, True),
        ("dim", {"name": "Hatch", "area": "Attic"}, False),
        ("dim", {"name": "Ofen"}, False),
        ("say", {"name": "Ofen", "area": None}, True),
        ("say", {"name": "Hatch", "area": "Attic"}, False),
        ("say", {"name": "Desk", "area": "Attic", "domain": 3}, True),
        ("say", {"area": "Garden"}, False),
    ],
)
def test_arguments_agree_with_one_record(
    engine: EngineScheduler, name: str, arguments: dict[str, Any], expected: bool
) -> None:
    beside = {"$comment": "any", "$defs": {"Area": TEXT}}
    assert accepts(engine, name, arguments, **beside) == expected


def test_keywords_beside_properties_are_enforced(engine: EngineScheduler) -> None:
    assert not accepts(engine, "switch", {}, minProperties=1)
    assert accepts(engine, "switch", {"name": "Desk", "area": "Loft"}, minProperties=1)


def test_without_records_texts_are_copied(engine: EngineScheduler) -> None:
    assert accepts(engine, "switch", {"name": "Top", "area": "floor"}, "Nothing.")
    assert not accepts(engine, "switch", {"name": "Desk"}, "Nothing.")


def test_a_required_argument_without_a_value_is_copied(engine: EngineScheduler) -> None:
    home = "- names: Desk\n  domain: light\n"
    assert accepts(engine, "call", {"area": "floor"}, home)
    assert not accepts(engine, "call", {"area": "Attic"}, home)


def test_a_function_without_a_record_names_none(engine: EngineScheduler) -> None:
    home = "- names: Desk\n  domain: light\n  areas: Attic\n"
    assert accepts(engine, "clean", {}, home)
    for arguments in ({"name": "Desk"}, {"name": "Top"}, {"area": "Attic"}):
        assert not accepts(engine, "clean", arguments, home)


def test_listed_arguments_need_a_template_with_names(engine: EngineScheduler) -> None:
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    prompt = tool_prompt(engine, [{"role": "user", "content": "Hi"}], ToolUse(tools, arguments="listed"))
    with pytest.raises(UsageError, match="does not say how its context lists values"):
        prompt.constraint(engine)


def test_a_large_home_stays_within_the_limits_of_a_grammar(engine: EngineScheduler) -> None:
    """Two hundred devices and twenty functions."""
    domains = ("light", "cover", "vacuum", "switch", "fan", "lock", "climate", "valve")
    records = [
        f"- names: Some long device number {index}\n  domain: {domains[index % 8]}\n  areas: Area {index % 23}\n"
        for index in range(200)
    ]
    functions = [
        {"name": f"f{index}", "parameters": {"type": "object", "properties": {**ORDERS["switch"], f"x{index}": TEXT}}}
        for index in range(20)
    ]
    tools = [{"type": "function", "function": each} for each in functions]
    messages = [{"role": "system", "content": "".join(records)}, {"role": "user", "content": "Top"}]
    other: Any = Picky(engine, JOB_MARK + LISTS + PLAIN)
    prompt = tool_prompt(other, messages, ToolUse(tools, must_call=True, arguments="listed"))
    constraint = prompt.constraint(engine)
    assert constraint is not None
    right = {"name": "Some long device number 9", "area": "Area 9", "domain": ["cover"], "x7": "Top"}
    for arguments, expected in ((right, True), ({**right, "area": "Area 10"}, False)):
        text = prompt.format.write([{"function": {"name": "f7", "arguments": arguments}}])
        assert is_accepted(constraint.copy(), engine, text) == expected, json.dumps(arguments)
