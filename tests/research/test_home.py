"""The home-control job: reproducible, in Home Assistant's form, and without overlap between training and test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("unicode_rbnf")

from research.home.chats import MAX_CHARACTERS, held_out_conversations, held_out_rows, rendered, training_chats
from research.home.client import served
from research.home.homes import LIST_MARK, RECORDED, TOOLS, Entity, Home
from research.home.requests import DONE, KINDS, NO_DEVICE, PHRASES, SAFETY, Turn
from research.home.score import Outcome, converse, effects_of

pytestmark = pytest.mark.xdist_group("home job")  # one worker reads the words of the demo text

HOME = Home(
    [
        Entity("Work Lamp", "light", "Attic", "off"),
        Entity("Star Projector", "light", "Nursery", "on"),
        Entity("Attic Fan", "fan", "Attic", "off"),
        Entity("Roof Hatch", "cover", "Attic", "closed", ("Skylight",)),
        Entity("Outside Temperature", "sensor", "", "15.6", (), {"unit_of_measurement": "°C"}),
    ]
)


def shown(request: str, home: Home = HOME, *more: Mapping[str, Any]) -> list[str]:
    """Return the lines of the last turn that the model reads."""
    messages = [{"role": "system", "content": home.prompt()}, {"role": "user", "content": request}, *more]
    return rendered(messages).split("<|im_start|>user\n")[-1].removesuffix("<|im_end|>\n").splitlines()


def calls(chat: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [call["function"] for message in chat["messages"] for call in message.get("tool_calls") or ()]


@pytest.fixture(scope="module")
def chats() -> list[dict[str, Any]]:
    return [*training_chats(300, seed=1)]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [*held_out_rows(150, seed=1)]


def test_chats_follow_from_the_seed(chats: list[dict[str, Any]]) -> None:
    assert [*training_chats(20, seed=1)] == chats[:20]
    assert [*training_chats(20, seed=2)] != chats[:20]


def test_calls_keep_the_schema_of_home_assistant(chats: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    for call in (call for chat in [*chats, *rows] for call in calls(chat)):
        arguments = json.loads(call["arguments"])
        if call["name"] not in TOOLS:  # a script
            assert arguments == {}
            continue
        schema = TOOLS[call["name"]]["function"]["parameters"]
        names = [*schema["properties"]]
        assert [*arguments] == sorted(arguments, key=names.index)
        if call["name"] not in ("todo_get_items", "calendar_get_events"):  # whose enumerations are of the recorded home
            jsonschema_rs.validate(schema, arguments)


def test_chats_fit_into_a_window(chats: list[dict[str, Any]]) -> None:
    assert max(len(rendered(chat["messages"], chat.get("tools", ()))) for chat in chats) <= MAX_CHARACTERS


def test_test_has_other_requests_than_training(chats: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    asked = [
        {message["content"] for chat in part for message in chat["messages"] if message["role"] == "user"}
        for part in (chats, rows)
    ]
    assert len(asked[0] & asked[1]) <= 2  # "Hello."


def test_homes_are_listed_as_home_assistant_lists_them() -> None:
    recorded = RECORDED["prompt"].split(LIST_MARK)[1]
    assert yaml.safe_dump(yaml.safe_load(recorded), allow_unicode=True, sort_keys=False) == recorded.rstrip() + "\n"
    assert HOME.prompt().startswith(RECORDED["prompt"].split(LIST_MARK)[0])
    assert "- names: Roof Hatch, Skylight\n  domain: cover\n  areas: Attic\n" in HOME.listed(False)


@pytest.mark.parametrize(
    ("request_text", "first"),
    [
        ("turn on the work lamp", "= light: Work Lamp @ Attic"),
        ("open the skylight", "= cover: Roof Hatch @ Attic"),
        ("turn on the fan", "~ fan: Attic Fan @ Attic"),
        ("is the projector on?", "- light: Star Projector @ Nursery"),
        ("sing a song", "? light: Work Lamp @ Attic"),
        ("lock the fan", "! fan: Attic Fan @ Attic"),
        ("set the work lamp to 300%", "> light: Work Lamp @ Attic"),
        ("set the fan to -5%", "> fan: Attic Fan @ Attic"),
        ("turn on the cellar fan", "? fan: Attic Fan @ Attic"),
        ("turn on the fan in the cellar", "? fan: Attic Fan @ Attic"),
        ("turn on the light", "+ light: Work Lamp @ Attic"),
        ("go ahead and lock the fan", "! fan: Attic Fan @ Attic"),
    ],
)
def test_template_puts_the_fitting_device_first(request_text: str, first: str) -> None:
    lines = shown(request_text)
    assert lines[0] == first
    assert lines[-1] == request_text


@pytest.mark.parametrize("space", ["", " "])  # releases differ in it
def test_template_shows_states_and_outcomes_of_results(space: str) -> None:
    words = {"action_done": "done", '"error"': "failed", "weekday": "Tuesday, 2026-12-01, 05:47"}
    asked = {"role": "assistant", "content": ""}
    live = {"role": "tool", "content": HOME.live_context()}
    assert shown("how warm is it outside", HOME, asked, live)[0] == "- sensor: Outside Temperature is 15.6 °C"
    assert shown("is the hatch closed", HOME, asked, live) == ["- cover: Roof Hatch @ Attic is closed"]
    assert shown("which lights are on", HOME, asked, live)[-1] == "so: Star Projector"
    assert shown("is any light in the attic on", HOME, asked, live)[-1] == "so: None"
    for word, expected in words.items():
        text = next(each["content"] for each in RECORDED["results"] if word in each["content"])
        result = {"role": "tool", "content": text.replace('":', f'":{space}')}
        assert shown("turn on the fan", HOME, asked, result) == [expected]


def test_prompt_does_not_grow_with_the_home() -> None:
    many = Home([Entity(f"Lamp {number}", "light", f"Room {number % 20}", "on") for number in range(200)])
    assert shown("turn on lamp 17", many) == ["= light: Lamp 17 @ Room 17", "turn on lamp 17"]
    assert len(shown("turn on the lamps", many)) == 6


def test_template_shows_only_devices_that_the_request_means() -> None:
    home = Home([*HOME.entities, Entity("Lamp", "light", "Cellar", "off")])
    lines = ["= light: Work Lamp @ Attic", "~ fan: Attic Fan @ Attic"]
    assert shown("turn on the work lamp and the fan", home)[:2] == lines
    assert len(shown("turn on the work lamp and the fan", home)) == 3
    assert shown("turn on the lamp", home)[0] == "= light: Lamp @ Cellar"


def test_template_does_not_take_a_room_for_a_part_of_a_name() -> None:
    room = [Entity("Room Alarm", "siren", "Tea Room", "off"), Entity("Tea Room Clock", "sensor", "Tea Room", "9")]
    home = Home([*room, Entity("Shostakovich", "light", "Tea Room", "off")])
    assert shown("turn on the tea room lamp", home) == ["- light: Shostakovich @ Tea Room", "turn on the tea room lamp"]


@pytest.mark.parametrize("request_text", ["turn off the attic lamp", "turn off the lamp in the attic"])
def test_template_takes_a_name_before_another_kind_for_a_place(request_text: str) -> None:
    home = Home([*HOME.entities, Entity("Attic", "media_player", "Attic", "on")])
    assert shown(request_text, home)[0] == "- light: Work Lamp @ Attic"
    assert shown("turn off the attic", home)[0] == "= media_player: Attic @ Attic"


@pytest.mark.parametrize(
    ("request_text", "line"),
    [
        ("did i close the roof hatch", "question"),
        ("have you closed the roof hatch", "question"),
        ("can you tell me if the roof hatch is open", "question"),
        ("have the roof hatch closed", ""),
        ("what about the roof hatch", ""),
        ("don't close the roof hatch", "leave"),
        ("keep the roof hatch open", "leave"),
        ("don't forget to close the roof hatch", ""),
        ("keep the roof hatch at 20 percent", ""),
        ("close every cover but the roof hatch", ""),
        ("set the roof hatch to seventy five percent", "number: 75"),
    ],
)
def test_template_tells_the_kind_of_a_request(request_text: str, line: str) -> None:
    lines = [each for each in shown(request_text)[:-1] if ": " not in each or each.startswith("number")]
    assert lines == [line] * bool(line)


def test_template_shows_attributes_beside_a_state() -> None:
    lamp = Entity("Lamp", "light", "Den", "on", (), {"brightness": "180"})
    player = Entity("Radio", "media_player", "Den", "playing", (), {"volume_level": "0.5", "media_title": "Song"})
    for entity, text in ((lamp, "on, brightness 71"), (player, "playing, plays Song, volume 0.5")):
        live = {"role": "assistant", "content": ""}, {"role": "tool", "content": Home([entity]).live_context()}
        lines = shown(f"how is the {entity.name.lower()}", Home([entity]), *live)
        assert lines == [f"= {entity.domain}: {entity.name} @ Den is {text}"]


def test_devices_named_in_full_are_in_the_order_of_the_request() -> None:
    for request_text in (
        "turn on the attic fan and the star projector",
        "turn on the star projector and the attic fan",
    ):
        names = [line.split(": ")[1].split(" @ ")[0].lower() for line in shown(request_text)[:2]]
        assert names == request_text.removeprefix("turn on the ").split(" and the ")


def test_template_lists_only_devices_of_the_kind_that_a_question_means() -> None:
    asked, live = {"role": "assistant", "content": ""}, {"role": "tool", "content": HOME.live_context()}
    assert shown("are the star projector and the work lamp on", HOME, asked, live)[-1].startswith("= light: ")
    home = Home([Entity("Fan", "fan", "Den", "on"), Entity("Other", "fan", "Attic", "off")])
    live = {"role": "tool", "content": home.live_context()}
    assert shown("which fans are running", home, asked, live)[-1] == "so: Fan"
    before = ({"role": "assistant", "content": "Done."}, {"role": "user", "content": "how warm is it outside"})
    assert shown("close the roof hatch", HOME, *before)[-2] == "question"
    assert not any("Roof Hatch" in line for line in shown("close the roof hatch", HOME, *before)[-3:])
    thermostat = Entity("Nest", "climate", "Den", "heat", (), {"current_temperature": "23"})
    home = Home([thermostat, Entity("Den", "media_player", "", "playing")])
    live = {"role": "tool", "content": home.live_context()}
    assert shown("how warm is it in the den", home, asked, live)[0] == "- climate: Nest @ Den is heat, temperature 23"


def test_template_shows_the_last_four_requests() -> None:
    messages = [{"role": "system", "content": HOME.prompt()}]
    for number in range(6):
        messages += [{"role": "user", "content": f"play song {number}"}, {"role": "assistant", "content": "Done."}]
    assert [f"song {number}" in rendered(messages[:-1]) for number in range(6)] == [False] * 2 + [True] * 4
    assert rendered(messages[:-1]).count("Done.") == 3


def test_template_shows_the_area_of_the_speaker() -> None:
    lines = shown("turn on the lights", Home(HOME.entities, "Attic"))
    assert lines[:2] == ["here: Attic", "+ light: Work Lamp @ Attic"]


def test_every_kind_of_request_is_drawn() -> None:
    found = {turn.kind for _, turns in held_out_conversations(600, 2) for turn in turns}
    assert found == {*KINDS, "asked_back"} - {"sensor", "which"}  # both are questions


@pytest.mark.parametrize("kind", [*SAFETY, "two", "asks_back"])
def test_kind_of_request_is_chosen(kind: str) -> None:
    found = [turn for _, turns in held_out_conversations(10, 3, [kind]) for turn in turns]
    assert found
    if kind in SAFETY:
        assert all(name == "GetLiveContext" for turn in found for name, _ in turn.calls)


def test_tools_list_the_lists_of_the_home() -> None:
    home = Home([Entity("Packing", "todo", "", "0")])
    tool = next(each for each in home.all_tools() if each["function"]["name"] == "todo_get_items")
    assert tool["function"]["parameters"]["properties"]["todo_list"]["enum"] == ["Packing"]
    assert "todo_get_items" not in [each["function"]["name"] for each in HOME.all_tools()]


def test_scripts_and_calendars_are_tools_of_the_home() -> None:
    home = Home(HOME.entities, scripts=["Good Morning"], calendars=["Family", "Work"])
    messages = [{"role": "system", "content": home.prompt()}, {"role": "user", "content": "start good morning"}]
    assert "= script: good_morning\n" in rendered(messages, home.all_tools())
    messages[-1]["content"] = "what is on the family calendar today"
    assert "= calendar: Family\n- calendar: Work\n" in rendered(messages, home.all_tools())


def test_phrases_name_tools_that_home_assistant_has() -> None:
    assert {action["tool"] for action in PHRASES["actions"]} <= {*TOOLS}


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ({"name": "work lamp", "domain": ["light"]}, {"Work Lamp"}),
        ({"name": "Skylight"}, {"Roof Hatch"}),
        ({"area": "Attic", "domain": ["light"]}, {"Work Lamp"}),
        ({"domain": ["light"]}, {"Work Lamp", "Star Projector"}),
        ({"name": "Work Lamp", "domain": ["fan"]}, None),
        ({"name": "Desk Lamp"}, None),
        ({}, None),
    ],
)
def test_call_changes_the_devices_that_fit(arguments: Mapping[str, Any], changed: set[str] | None) -> None:
    found = effects_of(("HassTurnOn", arguments), HOME)
    assert changed == (found and {name for _, name, _ in found})


class Scripted:
    """A model that answers as it is told, and refuses the next request."""

    def __init__(self, *answers: Mapping[str, Any]) -> None:
        self.answers = [*answers]

    def answer(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> tuple[Mapping[str, Any], float]:
        if not self.answers:
            raise RuntimeError("the prompt leaves no room")
        return self.answers.pop(0), 0.01


def outcome_of(turn: Turn, *answers: Mapping[str, Any]) -> Outcome:
    client: Any = Scripted(*answers)
    return next(converse(client, HOME, [turn]))


def turn_on(device: str) -> dict[str, Any]:
    return {"content": "", "tool_calls": [{"function": {"name": "HassTurnOn", "arguments": {"name": device}}}]}


def test_request_is_right_if_its_effects_are() -> None:
    result = next(each["content"] for each in RECORDED["results"] if "action_done" in each["content"])
    turn = Turn("device", "lamp on", DONE, [("HassTurnOn", {"name": "Work Lamp", "domain": ["light"]})], [result])
    assert outcome_of(turn, turn_on("Work Lamp"), {"content": "Done."}).is_right
    other = outcome_of(turn, turn_on("Star Projector"), {"content": "Done."})
    assert (other.is_right, other.is_wrong_act) == (False, True)
    repeated = outcome_of(turn, *[turn_on("Nothing")] * 2, {"content": "Done."})
    assert (repeated.is_right, repeated.is_wrong_act, repeated.repeats) == (False, False, 1)


def test_request_that_changes_nothing_needs_the_right_answer() -> None:
    turn = Turn("unknown", "desk lamp on", NO_DEVICE)
    assert outcome_of(turn, {"content": NO_DEVICE}).is_right
    assert not outcome_of(turn, {"content": DONE}).is_right
    assert outcome_of(turn, turn_on("Work Lamp"), {"content": NO_DEVICE}).is_wrong_act


def test_refusal_of_the_server_is_a_wrong_answer() -> None:
    unknown = outcome_of(Turn("unknown", "desk lamp on", NO_DEVICE))
    assert (unknown.is_right, unknown.answer) == (False, unknown.refusal)
    assert "no room" in unknown.refusal
    lamp = Turn("device", "lamp on", DONE, [("HassTurnOn", {"name": "Work Lamp"})], [RECORDED["results"][0]["content"]])
    late = outcome_of(lamp, turn_on("Work Lamp"))
    assert late.refusal
    assert not late.is_answered


def test_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"did not start: error: .*nothing"), served(tmp_path / "nothing"):
        pass
