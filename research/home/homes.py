"""Draw homes, and write them as Home Assistant describes them to a model."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from .names import FOLDER, WORDS, Names, title

RECORDED: Mapping[str, Any] = json.loads((FOLDER / "assist.json").read_text(encoding="utf-8"))
"""Prompt, tools and results of a real Home Assistant, written by `host.py record`."""

TOOLS: Mapping[str, Mapping[str, Any]] = {tool["function"]["name"]: tool for tool in RECORDED["tools"]}

LIST_MARK = "devices in this smart home:\n"
"""Text before the list of devices, in the prompt and in the result of GetLiveContext."""

NO_AREA = "When a user asks to turn on all devices of a specific type, ask user to specify an area"

STATES: Mapping[str, Sequence[str]] = WORDS["states"]
"""{domain: states of its devices}."""


@dataclass(frozen=True)
class Entity:
    """A device as Home Assistant exposes it."""

    name: str
    domain: str
    area: str
    state: str
    aliases: tuple[str, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)

    def described(self, is_live: bool) -> dict[str, Any]:
        """Return what Home Assistant lists of it, with its state if `is_live`."""
        found: dict[str, Any] = {"names": ", ".join((self.name, *self.aliases)), "domain": self.domain}
        if is_live:
            found["state"] = self.state
        if self.area:
            found["areas"] = self.area
        if is_live and self.attributes:
            found["attributes"] = dict(self.attributes)
        return found

    @property
    def words(self) -> list[str]:
        return self.name.lower().split()


@dataclass(frozen=True)
class Home:
    """A home whose devices are exposed."""

    entities: Sequence[Entity]
    here: str = ""
    """Area of the voice satellite that is spoken to."""
    scripts: Sequence[str] = ()
    """Names of scripts, which are tools of their own."""
    calendars: Sequence[str] = ()

    @property
    def areas(self) -> list[str]:
        return [*dict.fromkeys(entity.area for entity in self.entities if entity.area)]

    def of(self, domain: str, area: str = "") -> list[Entity]:
        """List the devices of a domain, in one area or in all."""
        return [each for each in self.entities if each.domain == domain and area in ("", each.area)]

    def listed(self, is_live: bool) -> str:
        """Write the devices as Home Assistant does."""
        entities = [entity.described(is_live) for entity in self.entities]
        return yaml.safe_dump(entities, default_flow_style=False, allow_unicode=True, sort_keys=False)

    def prompt(self) -> str:
        """Return Home Assistant's system message."""
        head = RECORDED["prompt"].split(LIST_MARK)[0] + LIST_MARK
        if self.here:
            start = head.index(NO_AREA)
            generic = "and all generic commands like 'turn on the lights' should target this area."
            head = head[:start] + f"You are in area {self.here} {generic}" + head[head.index("\n", start) :]
        return head + self.listed(False)

    def tools(self) -> list[dict[str, Any]]:
        """Return the tools that only this home has: scripts, and calendars by name."""
        found = [_with_names("calendar_get_events", "calendar", self.calendars)] if self.calendars else []
        return found + [_script(name) for name in self.scripts]

    def all_tools(self) -> list[dict[str, Any]]:
        """Return every tool that Home Assistant offers for this home."""
        lists = [entity.name for entity in self.of("todo")]
        own = ("calendar_get_events", "todo_get_items", "good_night")
        found: list[Any] = [tool for name, tool in TOOLS.items() if name not in own]
        return found + ([_with_names("todo_get_items", "todo_list", lists)] if lists else []) + self.tools()

    def live_context(self) -> str:
        """Return the result of GetLiveContext."""
        text = f"Live Context: An overview of the areas and the {LIST_MARK}{self.listed(True)}"
        return compact({"success": True, "result": text})


def _with_names(tool: str, argument: str, names: Sequence[str]) -> dict[str, Any]:
    """Return a recorded tool whose argument is one of `names`."""
    found = json.loads(json.dumps(TOOLS[tool]))
    found["function"]["parameters"]["properties"][argument]["enum"] = [*names]
    return found


def _script(name: str) -> dict[str, Any]:
    found = json.loads(json.dumps(TOOLS["good_night"]))
    found["function"]["name"] = script_tool(name)
    return found


def script_tool(name: str) -> str:
    """Return the name of a script's tool."""
    return "_".join(re.findall(r"[a-z0-9]+", name.lower()))


def compact(value: Any) -> str:
    """Write JSON as Home Assistant does."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def draw_home(chance: random.Random, names: Names, largest: int = 12) -> Home:
    """Draw a home of at most about `largest` devices. Homes of one kind of device are common."""
    size = min(largest, chance.choice((1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 9, 12, 20, 30, 40)))
    areas = [*dict.fromkeys(names.room() for _ in range(chance.choice((1, 1, 2, 2, 3, 4)) + size // 8))]
    domains, weights = [*WORDS["weights"]], [*WORDS["weights"].values()]
    focus = chance.choices(domains, weights)[0]
    found: dict[str, Entity] = {}
    while len(found) < size:
        domain = focus if chance.random() < 0.35 else chance.choices(domains, weights)[0]
        area = "" if domain in ("todo", "scene") or chance.random() < 0.15 else chance.choice(areas)
        for entity in _with_companions(chance, _draw_entity(chance, names, domain, area)):
            found.setdefault(entity.name.lower(), entity)
    entities = sorted(found.values(), key=lambda entity: entity.name)
    rooms = Home(entities).areas
    here = chance.choice(rooms) if rooms and chance.random() < 0.12 else ""
    scripts = [names.device("script", "") for _ in range(chance.choice((0, 0, 0, 0, 1, 2)))]
    calendars = [names.device("calendar", "") for _ in range(chance.choice((0, 0, 0, 0, 0, 1, 2)))]
    distinct = {script_tool(name): name for name in scripts}
    return Home(entities, here, [name for tool, name in distinct.items() if tool], [*dict.fromkeys(calendars)])


def _draw_entity(chance: random.Random, names: Names, domain: str, area: str) -> Entity:
    name = names.device(domain, area)
    state = chance.choice(STATES.get(domain, ("unknown",)))
    attributes: dict[str, str] = {}
    if domain == "sensor":
        state = str(chance.randint(1, 99)) if chance.random() < 0.7 else f"{chance.uniform(1, 40):.1f}"
        units = [unit for word, unit in WORDS["units"].items() if word in name.lower()]
        attributes = {"unit_of_measurement": units[0] if units else "%"}
    elif domain == "climate":
        attributes = {"current_temperature": str(chance.randint(12, 28)), "temperature": str(chance.randint(16, 25))}
    elif domain in ("cover", "valve") and chance.random() < 0.5:
        attributes = {"current_position": str(chance.randint(2, 20) * 5 if state == "open" else 0)}
    elif domain == "fan":
        attributes = {"percentage": str(chance.choice((33, 50, 66, 100)) if state == "on" else 0)}
    elif domain == "light" and state == "on":
        attributes = {"brightness": str(chance.randint(3, 255))}
    elif domain == "humidifier":
        attributes = {"humidity": str(chance.randint(30, 70))}
    elif domain == "media_player" and state in ("playing", "paused"):
        attributes = {"volume_level": f"{chance.randint(1, 20) / 20}", "media_title": title(names.query())}
    alias = (names.device(domain, ""),) if chance.random() < 0.05 and domain not in ("sensor", "todo") else ()
    return Entity(name, domain, area, state, alias, attributes)


def _with_companions(chance: random.Random, entity: Entity) -> list[Entity]:
    """Return a device, and at times a sensor with its name."""
    words = WORDS["companions"].get(entity.domain)
    if words is None or chance.random() >= 0.15:
        return [entity]
    domain = chance.choice(("sensor", "binary_sensor"))
    state, attributes = chance.choice(("on", "off")), {}
    if domain == "sensor":
        state, attributes = str(chance.randint(1, 99)), {"unit_of_measurement": "%"}
    return [entity, Entity(f"{entity.name} {chance.choice(words)}", domain, entity.area, state, (), attributes)]
