"""Draw what people ask of a home, and the right answers: calls, results and sentences."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unicode_rbnf import RbnfEngine

from .homes import RECORDED, STATES, TOOLS, Entity, Home, compact, script_tool
from .names import FOLDER, WORDS, Names, title

PHRASES: Mapping[str, Any] = tomllib.loads((FOLDER / "phrases.toml").read_text(encoding="utf-8"))

NUMBERS = RbnfEngine.for_language("en")
"""Writes numbers in words."""

DONE = "Done."
FAILED = "Sorry, that did not work."
PARTLY = "Only a part of that worked."
NO_DEVICE = "Sorry, I know no such device."
NO_HOME_REQUEST = "Sorry, I can only control the home."
OUT_OF_RANGE = "Sorry, that value is out of range."
UNABLE = "Sorry, this device cannot do that."
LEFT_ALONE = "Okay, I leave it as it is."

NO_COMMANDS = ("{", "i ", "it ", "we ", "let some", "what", "time")
"""Starts of phrasings that are no imperatives."""

Call = tuple[str, Mapping[str, Any]]
DONE_RESULT = next(each["content"] for each in RECORDED["results"] if "action_done" in each["content"])
ERRORS = tuple(each["content"] for each in RECORDED["results"] if '"error"' in each["content"])

SWITCHED = ("light", "switch", "fan", "lock", "cover", "valve")
"""Domains of devices that somebody may have left on, open or unlocked."""

PLAYER_TOOLS = ("HassMedia", "HassSetVolume")
"""Starts of the tools for media players, whose name a request may leave out."""

RANGED = [
    each
    for each in PHRASES["actions"]
    if {"{percent}", "{humidity}", "{degrees}"} & {*map(str, each.get("arguments", {}).values())}
]
"""Actions whose value has a largest one."""

FAILURES = 0.07
"""Share of acts whose result is an error."""


@dataclass(frozen=True)
class Turn:
    """A request with everything up to the last answer."""

    kind: str
    request: str
    answer: str
    calls: Sequence[Call] = ()
    results: Sequence[str] = ()
    is_unseen: bool = False
    """True if its phrasing is only in the test."""

    def messages(self) -> list[dict[str, Any]]:
        """Return the chat messages. Arguments are in the order of Home Assistant's schema."""
        found: list[dict[str, Any]] = [{"role": "user", "content": self.request}]
        if self.calls:
            calls = [as_tool_call(index, call) for index, call in enumerate(self.calls)]
            found.append({"role": "assistant", "content": None, "tool_calls": calls})
            found += [{"role": "tool", "content": result} for result in self.results]
        return [*found, {"role": "assistant", "content": self.answer}]


def as_tool_call(index: int, call: Call) -> dict[str, Any]:
    """Return a call in OpenAI's form. Raises ValueError for an argument that the tool does not have."""
    name, values = call
    order = [*TOOLS[name]["function"]["parameters"]["properties"]] if name in TOOLS else []  # a script has none
    if unknown := values.keys() - set(order):
        raise ValueError(f"{name} has no argument {', '.join(sorted(unknown))}")
    arguments = {key: values[key] for key in order if key in values}
    return {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": compact(arguments)}}


@dataclass(frozen=True)
class Target:
    """Object of a request: a device, or all of a kind in an area or the home."""

    said: str
    domain: str
    entity: Entity | None
    area: str = ""

    def arguments(self, tool: str) -> dict[str, Any]:
        """Return the arguments that choose it."""
        values: dict[str, Any] = {"domain": [self.domain]}
        if self.entity is not None:
            values["name"] = self.entity.name
        elif self.area:
            values["area"] = self.area
        return {name: values[name] for name in values if name in TOOLS[tool]["function"]["parameters"]["properties"]}


@dataclass
class Speaker:
    """Somebody who speaks to one home. The test has phrasing of its own."""

    chance: random.Random
    names: Names
    home: Home
    is_test: bool
    last: tuple[Mapping[str, Any], Target] | None = None
    """Action and target of the last act, which a follow-up may refer to."""
    is_command: bool = False
    """True if the text drawn last is an imperative, which can be asked for politely."""
    is_unseen: bool = False
    """True if the request has phrasing that only the test has."""

    def turn(self, kind: str | None = None) -> list[Turn]:
        """Draw a request of a kind (None: any), with the turns that belong to it."""
        while True:
            self.is_command = self.is_unseen = False
            drawn = kind or self.chance.choices([*KINDS], [*KINDS.values()])[0]
            if kind is None and self.last is not None and self.chance.random() < 0.25:
                drawn = "follow_up"
            found: list[Turn] = getattr(self, f"_{drawn}")()
            if drawn != "follow_up":
                self.last = self.last if found and drawn in ("device", "group", "two", "fails") else None
            if found or kind is not None:
                return [replace(turn, is_unseen=self.is_unseen) for turn in found]

    # Acts

    def _device(self) -> list[Turn]:
        act = self._act(is_group=False)
        return [self._acted("device", act)] if act else []

    def _group(self) -> list[Turn]:
        act = self._act(is_group=True)
        return [self._acted("group", act)] if act else []

    def _fails(self) -> list[Turn]:
        act = self._act(is_group=self.chance.random() < 0.2)
        return [self._acted("fails", act, fails=True)] if act else []

    def _two(self) -> list[Turn]:
        """Draw a request for two acts: two sentences, or one sentence about two devices."""
        first = self._act(is_group=self.chance.random() < 0.2)
        if first is None:
            return []
        text, call, action, target = first
        other = self._other(target)
        if other is not None and self.chance.random() < 0.4:
            text, values = self._fill(action, f"{target.said} and {other.said}")
            calls = [(action["tool"], {**each.arguments(action["tool"]), **values}) for each in (target, other)]
        else:
            is_same_again = self.chance.random() < 0.15
            second = self._act_on(self._again(target)) if is_same_again else self._act(self.chance.random() < 0.2)
            is_same = second is not None and replace(second[3], said=target.said) == target
            if second is None or second[1] == call or (is_same and not {**action, **second[2]}.get("arguments")):
                return []
            text = text.rstrip(".") + self._one("joins") + second[0]
            calls = [call, second[1]]
        self.last = None
        outcomes = [self.chance.random() < FAILURES for _ in calls]
        results = [self._result(is_failure) for is_failure in outcomes]
        answer = DONE if not any(outcomes) else FAILED if all(outcomes) else PARTLY
        return [Turn("two", self._polite(text), answer, calls, results)]

    def _follow_up(self) -> list[Turn]:
        """Draw a request that refers to the last one: another device, another area, or the opposite."""
        if self.last is None:
            return []
        action, target = self.last
        tool = action["tool"]
        opposite = {"HassTurnOn": "off", "HassTurnOff": "on"}.get(tool)
        if opposite and target.domain in ("light", "switch", "fan") and self.chance.random() < 0.5:
            other = {"off": "HassTurnOff", "on": "HassTurnOn"}[opposite]
            text = self.chance.choice(PHRASES["follow_ups"][opposite])
            if target.entity is None:
                text = text.replace(" it", " them")
            self.last = ({**action, "tool": other}, target)
            return [Turn("follow_up", self._polite(text), DONE, [(other, target.arguments(other))], [DONE_RESULT])]
        if "{item}" in str(action) or "{query}" in str(action):
            return []
        if self.chance.random() < 0.4:
            text, call, _, _ = self._act_on(self._again(target))
            return [Turn("follow_up", self._polite(text), DONE, [call], [DONE_RESULT])]
        _, values = self._fill(action, "")
        if any(value != action.get("arguments", {}).get(name) for name, value in values.items()):
            return []  # a drawn value, which the follow-up does not say
        new = self._other(target)
        if new is None:
            return []
        if new.entity is None:
            new = replace(new, said=self.chance.choice((f"the {new.area.lower()}", f"in the {new.area.lower()}")))
        elif self._is_alone(new.entity) and self.chance.random() < 0.3:
            new = replace(new, said=f"the one in the {new.entity.area.lower()}")
        text = self._one("follow_ups", "same").replace("{it}", new.said)
        self.last = (action, new)
        return [Turn("follow_up", self._polite(text), DONE, [(tool, {**new.arguments(tool), **values})], [DONE_RESULT])]

    def _except(self) -> list[Turn]:
        """Draw a request for all devices of a kind but one: a call for each of the others."""
        for domain in self._shuffled({"light", "cover", "fan", "switch", "lock"}):
            area = self.chance.choice(["", *self.home.areas])
            same = self.home.of(domain, area)
            if not 2 <= len(same) <= 4:
                continue
            left = self.chance.choice(same)
            group = (
                self._in_area(domain, area) if area else Target(f"all {PHRASES['kinds'][domain][0][1]}", domain, None)
            )
            action = self._action(domain, True)
            text, values = self._fill(action, group.said)
            text = text.rstrip(".") + self._one("exceptions").replace("{it}", f"the {left.name.lower()}")
            calls = [
                (action["tool"], {"name": each.name, "domain": [domain], **values}) for each in same if each != left
            ]
            return [Turn("except", self._polite(text), DONE, calls, [DONE_RESULT] * len(calls))]
        return []

    def _script(self) -> list[Turn]:
        """Draw a request for a script."""
        if not self.home.scripts:
            return []
        name = self.chance.choice(self.home.scripts)
        text = self._one("scripts").replace("{it}", name.lower())
        result = compact({"success": True, "result": {}})
        return [Turn("script", self._polite(text), DONE, [(script_tool(name), {})], [result])]

    def _calendar(self) -> list[Turn]:
        """Draw a question about the events of a calendar."""
        if not self.home.calendars:
            return []
        name, span = self.chance.choice(self.home.calendars), self.chance.choice(("today", "week"))
        events = [title(self.names.item()) for _ in range(self.chance.randint(0, 3))]
        rows = [{"start": "2026-03-01T09:00:00", "end": "2026-03-01T10:00:00", "summary": event} for event in events]
        only = len(self.home.calendars) == 1 and self.chance.random() < 0.4
        said = "the calendar" if only else f"{self.chance.choice(('the ', 'my ', ''))}{name.lower()}"
        text = self._one("calendars", span).replace("{it}", said)
        call = ("calendar_get_events", {"calendar": name, "range": span})
        answer = f"It has: {', '.join(events)}." if events else "It is empty."
        return [Turn("calendar", self._polite(text, "?"), answer, [call], [compact({"success": True, "result": rows})])]

    def _asks_back(self) -> list[Turn]:
        """Draw a request that fits two or three devices, the question back, and the user's choice."""
        number = self.chance.choice((2, 3))
        domains = self._shuffled({each.domain for each in self.home.entities} & {*PHRASES["kinds"]})
        for domain in sorted(domains, key=lambda each: len(self.home.of(each)) != number):
            same = self.home.of(domain)
            if not 2 <= len(same) <= 3:
                continue
            action = self._action(domain, False)
            kind = self.chance.choice(PHRASES["kinds"][domain])[0]
            said = f"the {kind}"
            if any(kind == each.name.lower() for each in same) or sum(kind in each.words for each in same) == 1:
                continue
            text, values = self._fill(action, said)
            listed = ", ".join(each.name for each in same[:-1]) + f" or {same[-1].name}"
            chosen = self.chance.choice(same)
            words = [chosen.name.lower(), f"the {chosen.name.lower()}", chosen.name]
            if self._is_alone(chosen):
                words += [f"the one in the {chosen.area.lower()}", f"in the {chosen.area.lower()}"]
            target = Target(self.chance.choice(words), domain, chosen)
            call = (action["tool"], {**target.arguments(action["tool"]), **values})
            question = Turn("asks_back", self._polite(text), f"Which one: {listed}?")
            return [question, Turn("asked_back", self._polite(target.said), DONE, [call], [DONE_RESULT])]
        return []

    # Questions

    def _question(self) -> list[Turn]:
        """Draw a question about the state of a device."""
        entities = [each for each in self.home.entities if each.domain in STATES and each.domain != "todo"]
        if not entities:
            return []
        entity = self.chance.choice(entities)
        said = self._mention(entity)
        if entity.domain in PHRASES["questions"]["attributes"] and self.chance.random() < 0.25:
            text = self.chance.choice(PHRASES["questions"]["attributes"][entity.domain]).replace("{it}", said)
        elif self.chance.random() < 0.6:
            asked = self.chance.choice(STATES[entity.domain])
            text = self._one("questions").replace("{it}", said).replace("{state}", asked)
        else:
            text = self._one("questions", "open").replace("{it}", said)
        return [self._asked("question", text, f"It is {_shown_state(entity)}.")]

    def _sensor(self) -> list[Turn]:
        """Draw a question about a value that a sensor or a thermostat measures."""
        entity = self._one_of(("sensor",))
        if entity is None:
            return []
        named = [kind for kind in PHRASES["questions"]["sensors"] if kind in entity.name.lower()]
        kind = named[0] if named else "other"
        says = PHRASES["questions"]["sensors"][kind]
        rivals = [each for each in self.home.of("sensor", entity.area) if kind in each.name.lower()]
        if not entity.area or len(rivals) != 1:
            says = [each for each in says if "{area}" not in each]
        text = (
            self.chance.choice(says)
            .replace("{it}", self._mention(entity))
            .replace("{area}", f"the {entity.area.lower()}")
        )
        return [self._asked("question", text, f"It is {_shown_state(entity)}.")]

    def _which(self) -> list[Turn]:
        """Draw a question about all devices of a kind: which of them are on, open or locked."""
        for domain in self._shuffled({each.domain for each in self.home.entities} & {*PHRASES["kinds"]}):
            area = self.chance.choice(["", *self.home.areas])
            same = self.home.of(domain, area)
            if not 1 <= len(same) <= 5:
                continue
            state = self.chance.choice(STATES[domain])
            one, plural = self.chance.choice(PHRASES["kinds"][domain])
            place = f" in the {area.lower()}" if area else ""
            text = self._one("which").replace("{one}", f"{one}{place}").replace("{all}", f"{plural}{place}")
            text = text.replace("{state}", state)
            found = [each.name for each in same if each.state == state]
            answer = f"{', '.join(found)}." if found else "None."
            return [self._asked("question", text, answer)]
        return []

    def _past(self) -> list[Turn]:
        """Draw a question about what somebody did. Its answer is the state; nothing is switched."""
        entity = self._one_of(SWITCHED)
        if entity is None:
            return []
        fits = {"lock": ("lock", "open", "shut"), "cover": ("clos", "open", "shut"), "valve": ("clos", "open", "shut")}
        words = fits.get(entity.domain, (" on", "off"))
        says, unseen = (
            [each for each in PHRASES["questions"][key] if any(word in each for word in words)]
            for key in ("past", "unseen_past")
        )
        text = self._chosen(says, unseen).replace("{it}", self._mention(entity))
        return [self._asked("past", text, f"It is {_shown_state(entity)}.")]

    def _exists(self) -> list[Turn]:
        """Draw a question about which devices there are. The prompt has the answer."""
        domain = self.chance.choice([*PHRASES["kinds"]])
        area = self.chance.choice(["", *self.home.areas])
        found = self.home.of(domain, area)
        if len(found) > 4:
            return []
        plural = self.chance.choice(PHRASES["kinds"][domain])[1]
        place = f" in the {area.lower()}" if area else ""
        text = self._one("which", "exists").replace("{all}", f"{plural}{place}")
        answer = f"Yes: {', '.join(each.name for each in found)}." if found else "No."
        return [Turn("exists", self._polite(text, "?"), answer)]

    def _list(self) -> list[Turn]:
        """Draw a question about what is on a list."""
        entity = self._one_of(("todo",))
        if entity is None:
            return []
        items = [self.names.item() for _ in range(self.chance.randint(0, 4))]
        rows = [{"summary": item, "uid": str(index), "status": "needs_action"} for index, item in enumerate(items)]
        text = self._one("lists").replace("{it}", self._mention(entity))
        call = ("todo_get_items", {"todo_list": entity.name, "status": "needs_action"})
        answer = f"It has: {', '.join(items)}." if items else "It is empty."
        return [Turn("list", self._polite(text, "?"), answer, [call], [compact({"success": True, "result": rows})])]

    def _time(self) -> list[Turn]:
        """Draw a question about the time or the date."""
        day, hour, minute = self.chance.randint(1, 28), self.chance.randint(0, 23), self.chance.randint(0, 59)
        date = f"2026-{self.chance.randint(1, 12):02d}-{day:02d}"
        weekday = self.chance.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"))
        result = {"date": date, "time": f"{hour:02d}:{minute:02d}:00", "timezone": "UTC", "weekday": weekday}
        text, answer = self._one("times"), f"It is {weekday}, {date}, {hour:02d}:{minute:02d}."
        results = [compact({"success": True, "result": result})]
        return [Turn("time", self._polite(text, "?"), answer, [("GetDateTime", {})], results)]

    # What must not act

    def _unrelated(self) -> list[Turn]:
        return [Turn("unrelated", self._polite(self.names.refused()), NO_HOME_REQUEST)]

    def _talk(self) -> list[Turn]:
        answers = PHRASES["unseen_talk" if self.is_test else "talk"]
        text, answer = self.chance.choice([(text, answer) for answer, says in answers.items() for text in says])
        return [Turn("talk", self._polite(text), answer)]

    def _unknown(self) -> list[Turn]:
        """Draw a request about a device or an area that the home does not have, often beside a similar one."""
        domain = self.chance.choice([each["domains"][0] for each in PHRASES["actions"]])
        present = {each.domain for each in self.home.entities} & {*PHRASES["kinds"]}
        if present and self.chance.random() < 0.85:
            domain = self.chance.choice(sorted(present))
        known = [each.name.lower() for each in self.home.entities]
        if self.chance.random() < 0.45 and domain in PHRASES["kinds"]:
            area = self.names.room()
            if self.home.of(domain, area) or any(area.lower() in name for name in known):
                return []
            kind = self.chance.choice(PHRASES["kinds"][domain])[self.chance.random() < 0.5]
            said = self.chance.choice((f"the {area.lower()} {kind}", f"the {kind} in the {area.lower()}"))
        else:
            name = self.names.device(domain, "").lower()
            first = set(name.split()[:-1]) or {name}
            if any(first & set(each.split()) for each in known) or name in [*known, *WORDS["nouns"].get(domain, ())]:
                return []
            said = self.chance.choice((f"the {name}", name))
        if domain in STATES and self.chance.random() < 0.15:
            text = self._one("questions").replace("{it}", said).replace("{state}", self.chance.choice(STATES[domain]))
        else:
            text, _ = self._fill(self._action(domain, False), said)
        return [Turn("unknown", self._polite(text), NO_DEVICE)]

    def _impossible(self) -> list[Turn]:
        """Draw a request that the device cannot fulfil, or a value out of range."""
        if self.chance.random() < 0.5:
            target = self._single_target()
            domain = target.domain if target else ""
            actions = [each for each in RANGED if domain in each["domains"]]
            if target is None or not actions:
                return []
            action = self.chance.choice(actions)
            (value,) = action["arguments"].values()
            number = str(
                self.chance.choice((101, 110, 120, 130, 150, 175, 200, 250, 300, 400, 500, 999, 1000, -5, -20))
            )
            number = number.replace("-", self.chance.choice(("-", "minus ")))
            text, _ = self._fill(action, target.said, value.strip("{}"), number)
            return [Turn("impossible", self._polite(text), OUT_OF_RANGE)]
        group = self.chance.choice(PHRASES["unable"])
        entity = self._one_of(group["domains"])
        if entity is None:
            return []
        text, _ = self._fill(
            group, f"the {entity.name.lower()}" if self.chance.random() < 0.5 else self._mention(entity)
        )
        return [Turn("impossible", self._polite(text), UNABLE)]

    def _negation(self) -> list[Turn]:
        entity = self._one_of(SWITCHED)
        if entity is None:
            return []
        said = self._mention(entity)
        act = ""
        while not self.is_command:
            act, _ = self._fill(self._action(entity.domain, False), said)
        text = self._one("negations").replace("{act}", act).replace("{it}", said)
        text = text.replace("{state}", self.chance.choice(STATES[entity.domain]))
        self.is_command = False
        return [Turn("negation", self._polite(text), LEFT_ALONE)]

    # Parts of a request

    def _act(self, is_group: bool) -> tuple[str, Call, Mapping[str, Any], Target] | None:
        """Draw an act: its text, its call, and what both follow from."""
        target = self._group_target() if is_group else self._single_target()
        return self._act_on(target) if target is not None else None

    def _act_on(self, target: Target) -> tuple[str, Call, Mapping[str, Any], Target]:
        action = self._action(target.domain, target.entity is None)
        text, values = self._fill(action, target.said)
        is_only = target.entity and len(self.home.of(target.domain)) == 1 and action["tool"].startswith(PLAYER_TOOLS)
        if is_only and self.chance.random() < 0.2:
            text = text.removesuffix(f" on {target.said}")
        self.last = (action, target)
        return text, (action["tool"], {**target.arguments(action["tool"]), **values}), action, target

    def _again(self, target: Target) -> Target:
        return replace(target, said="it" if target.entity is not None else "them")

    def _other(self, target: Target) -> Target | None:
        """Choose another device of the same domain, or the devices of another area. None: there is none."""
        if target.entity is not None:
            others = [each for each in self.home.of(target.domain) if each != target.entity]
            return self._target_of(self.chance.choice(others)) if others else None
        areas = [area for area in self.home.areas if area != target.area and self.home.of(target.domain, area)]
        return self._in_area(target.domain, self.chance.choice(areas)) if areas and target.area else None

    def _is_alone(self, entity: Entity) -> bool:
        """Tell whether a device is the only one of its domain in its area."""
        return bool(entity.area) and len(self.home.of(entity.domain, entity.area)) == 1

    def _one_of(self, domains: Collection[str]) -> Entity | None:
        """Choose a device of the domains, None if there is none."""
        able = [each for each in self.home.entities if each.domain in domains]
        return self.chance.choice(able) if able else None

    def _single_target(self) -> Target | None:
        entity = self._one_of({domain for action in PHRASES["actions"] for domain in action["domains"]})
        return self._target_of(entity) if entity is not None else None

    def _target_of(self, entity: Entity) -> Target:
        return Target(self._mention(entity), entity.domain, entity)

    def _group_target(self) -> Target | None:
        domains = {each.domain for each in self.home.entities} & {
            "light",
            "cover",
            "fan",
            "switch",
            "lock",
            "media_player",
            "vacuum",
            "valve",
        }
        if not domains:
            return None
        domain = self.chance.choice(sorted(domains))
        areas = [area for area in self.home.areas if self.home.of(domain, area)]
        singular, plural = self.chance.choice(PHRASES["kinds"][domain])
        if self.home.here in areas and self.chance.random() < 0.7:
            said = self.chance.choice((f"the {plural}", plural, f"the {plural} here", f"all the {plural}"))
            return Target(said, domain, None, self.home.here)
        if areas and self.chance.random() < 0.65:
            return self._in_area(domain, self.chance.choice(areas))
        if len(self.home.of(domain)) < 2:
            return None
        text = self.chance.choice(PHRASES["groups"]["home"])
        return Target(text.format(one=singular, all=plural), domain, None)

    def _in_area(self, domain: str, area: str) -> Target:
        """Return all devices of a domain in an area. One lamp may be all the light of a room."""
        singular, plural = self.chance.choice(PHRASES["kinds"][domain])
        says = PHRASES["groups"]["area"] + (PHRASES["groups"]["light"] if domain == "light" else [])
        text = self.chance.choice(says).format(one=singular, all=plural, area=area.lower())
        return Target(text, domain, None, area)

    def _mention(self, entity: Entity) -> str:
        """Choose words for a device that fit no other one of the home."""
        name = entity.name if self.chance.random() < 0.35 else entity.name.lower()
        if entity.aliases and self.chance.random() < 0.6:
            name = entity.aliases[0].lower()
        said = [name] * 3 + [f"the {name}"] * 5 + [f"my {name}"]
        if entity.domain == "todo":
            return self.chance.choice([*said, f"my {name}", *([] if "list" in name else [f"the {name} list"] * 4)])
        kinds = [singular for singular, _ in PHRASES["kinds"].get(entity.domain, ())]
        if len(self.home.of(entity.domain)) == 1:
            said += [f"the {kind}" for kind in kinds[:2]] * 2
        elif self._is_alone(entity):
            low = entity.area.lower()
            said += [text for kind in kinds[:1] for text in (f"the {low} {kind}", f"the {kind} in the {low}")]
        if entity.area and entity.area.lower() not in name:
            said.append(f"the {name} in the {entity.area.lower()}")
        part = " ".join(name.split()[1:] if self.chance.random() < 0.5 else name.split()[:-1])
        if part and not any(
            set(part.lower().split()) & set(each.words) for each in self.home.entities if each != entity
        ):
            said += [f"the {part}"] * 2
        return self.chance.choice(said)

    def _action(self, domain: str, is_group: bool) -> Mapping[str, Any]:
        able = [each for each in PHRASES["actions"] if domain in each["domains"]]
        if is_group:
            able = [each for each in able if each.get("groups", True) and "{degrees}" not in str(each)]
        return self.chance.choices(able, [each.get("weight", 1) for each in able])[0]

    def _fill(
        self, action: Mapping[str, Any], said: str, kind_out_of_range: str = "", number: str = ""
    ) -> tuple[str, dict[str, Any]]:
        """Return the text of an action and the values of its arguments, with `number` for a kind out of range."""
        text = self._chosen(action["says"], action.get("unseen", ()))
        self.is_command = not text.startswith(NO_COMMANDS)
        degrees = self.chance.choice((self.chance.randint(5, 30), 20, 21, 22, self.chance.randint(15, 25) + 0.5))
        percent = self.chance.choice((*range(10, 101, 5), self.chance.randint(1, 99)))
        item = self.names.item()
        drawn: dict[str, Any] = {
            "percent": percent,
            "degrees": degrees,
            "humidity": self.chance.choice(range(30, 75, 5)),
            "kelvin": self.chance.choice(range(2000, 6600, 100)),
            "colour": self.names.colour(),
            "item": item[:1].upper() + item[1:] if self.chance.random() < 0.25 else item,
            "query": self.names.query(),
        }
        if kind_out_of_range:
            drawn[kind_out_of_range] = number
        values = {name: drawn.get(str(value).strip("{}"), value) for name, value in action.get("arguments", {}).items()}
        if "{percent}" in text and not kind_out_of_range and self.chance.random() < 0.12:
            drawn["percent"] = NUMBERS.format_number(percent).text.replace("-", " ")
            text = text.replace("%", " percent")
        for kind, value in drawn.items():
            text = text.replace(f"{{{kind}}}", str(value))
        return text.replace("{it}", said), values

    def _chosen(self, says: Sequence[str], unseen: Sequence[str] = ()) -> str:
        """Choose a phrasing of training. The test chooses among all."""
        text = self.chance.choice([*says, *unseen] if self.is_test else says)
        self.is_unseen = self.is_unseen or text in unseen
        return text

    def _one(self, group: str, key: str = "says") -> str:
        return self._chosen(PHRASES[group][key], PHRASES[group].get("unseen" if key == "says" else f"unseen_{key}", ()))

    def _polite(self, text: str, end: str = "") -> str:
        """Write a request as somebody might type or say it."""
        if self.is_command and self.chance.random() < 0.25:
            text = self.chance.choice(PHRASES["frames"]["says"]).format(text)
        self.is_command = False
        if self.chance.random() < 0.65:
            text = text[:1].upper() + text[1:]
        return text + self.chance.choice(("", "", end, end or ".", end or "."))

    def _result(self, is_failure: bool) -> str:
        return self.chance.choice(ERRORS) if is_failure else DONE_RESULT

    def _acted(self, kind: str, act: tuple[str, Call, Any, Target], fails: bool = False) -> Turn:
        text, call, _, _ = act
        return Turn(kind, self._polite(text), FAILED if fails else DONE, [call], [self._result(fails)])

    def _asked(self, kind: str, text: str, answer: str) -> Turn:
        return Turn(kind, self._polite(text, "?"), answer, [("GetLiveContext", {})], [self.home.live_context()])

    def _shuffled(self, names: set[str]) -> list[str]:
        return self.chance.sample(sorted(names), len(names))


KINDS: Mapping[str, float] = {
    "device": 40, "group": 15, "two": 20, "except": 5, "follow_up": 2, "fails": 3, "asks_back": 7,
    "script": 4, "calendar": 2, "question": 9, "sensor": 4, "which": 7, "past": 4, "exists": 3, "list": 3,
    "time": 1.5, "unrelated": 7, "unknown": 14, "impossible": 14, "negation": 8, "talk": 6,
}  # fmt: skip
"""How often a request is of a kind."""

SAFETY = ("unknown", "question", "past", "negation", "impossible", "unrelated", "talk")
"""Kinds of requests after which no state may change."""


ATTRIBUTES: Mapping[str, str] = {
    "unit_of_measurement": " ", "current_temperature": ", temperature ", "temperature": ", set to ",
    "humidity": ", humidity ", "brightness": ", brightness ", "percentage": ", speed ", "media_title": ", plays ",
    "current_position": ", position ", "volume_level": ", volume ",
}  # fmt: skip
"""What the chat template writes before the attributes of a device, in its order."""


def _shown_state(entity: Entity) -> str:
    """Return the state as the chat template shows it, with the brightness, of at most 255, as a percentage."""
    shown = {**entity.attributes}
    if "brightness" in shown:
        shown["brightness"] = str((int(shown["brightness"]) * 100 + 127) // 255)
    return entity.state + "".join(f"{label}{shown[name]}" for name, label in ATTRIBUTES.items() if name in shown)
