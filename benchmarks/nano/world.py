"""A small synthetic world: words that have attributes, sentences that mention them, and the truth about both.

Every word of a class "bears" one value of one attribute ("crimson" bears color: red). A sentence is a template filled
with bearers of several attributes; asked for one of them, exactly one word of the sentence tells.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

ATTRIBUTES: dict[str, dict[str, str]] = {
    "size": {
        "big": "huge giant vast large massive bulky mighty colossal immense broad",
        "small": "tiny little wee mini petite minute dinky slim short narrow",
    },
    "heat": {
        "hot": "warm boiling burning scorching blazing steaming roasting toasty fiery sultry",
        "cold": "cool icy freezing frosty chilly frozen wintry arctic snowy polar",
    },
    "quality": {
        "good": "great lovely superb perfect splendid fine excellent charming delightful nice",
        "bad": "awful terrible horrid nasty dreadful poor dismal ugly lousy rotten",
    },
    "speed": {
        "fast": "quickly rapidly swiftly hastily briskly promptly suddenly hurriedly speedily instantly",
        "slow": "slowly gradually lazily calmly sluggishly gently idly steadily leisurely wearily",
    },
    "sound": {
        "loud": "noisy roaring booming shrill blaring thundering deafening ringing screaming howling",
        "quiet": "silent hushed soft faint muted whispered mute still muffled soundless",
    },
    "place": {
        "inside": "kitchen hall bedroom attic cellar office library church school pantry lobby corridor",
        "outside": "forest garden field meadow desert valley park swamp street jungle canyon beach",
    },
    "animal": {
        "bird": "eagle crow duck owl robin parrot swan hawk sparrow goose falcon raven",
        "fish": "trout salmon shark carp tuna cod eel pike herring sardine perch bass",
        "beast": "tiger horse lion wolf bear cow goat fox sheep camel donkey deer",
    },
    "material": {
        "metal": "iron steel copper silver bronze brass tin zinc nickel chrome",
        "wood": "oak pine maple birch cedar walnut willow elm teak bamboo",
        "cloth": "silk wool cotton linen velvet denim satin felt lace canvas",
    },
    "food": {
        "fruit": "apple pear grape banana mango melon peach lemon fig papaya",
        "meat": "beef pork ham bacon sausage steak lamb mutton veal venison",
        "bread": "bun roll toast loaf bagel cracker pretzel biscuit waffle muffin",
    },
    "vehicle": {
        "road": "car truck bus taxi van tram wagon lorry scooter tractor",
        "water": "boat ship ferry canoe raft kayak yacht barge tanker dinghy",
        "air": "plane jet rocket glider balloon airship drone helicopter blimp shuttle",
    },
    "person": {
        "child": "boy girl baby kid pupil toddler infant youth teen orphan",
        "worker": "farmer baker miner tailor plumber butcher weaver cook driver painter",
        "ruler": "king queen prince emperor duke baron chief sultan princess governor",
    },
    "color": {
        "red": "scarlet crimson ruby maroon burgundy vermilion carmine rosy",
        "blue": "navy azure cobalt indigo sapphire teal cyan cerulean",
        "green": "emerald olive lime jade mint moss fern mossy",
        "yellow": "golden amber blond mustard saffron sandy straw honey",
    },
}  # fmt: skip
"""Attribute -> value -> the words that bear it."""

THINGS = "box table door bench cup chair plate bowl lamp shelf basket bucket ladder bottle wheel ring".split()
FILLERS = (
    "the a an this that my his her their our and but or with near past beside under over in on at to from of by was is "
    "were slept saw found ate made told bought moved carried looked seemed came lay cooked stood we they all day night "
    "noise story wind room some then when while who had went home again once never always it he she very quite too"
).split()

TEMPLATES: tuple[tuple[str, ...], ...] = (
    (
        "the {size} {animal} slept in the {place}",
        "a {person} saw the {color} {animal} in the {place}",
        "the {person} bought a {size} {material} THING",
        "that {vehicle} looked {quality} and {color}",
        "the {person} ate {heat} {food} {speed}",
        "a {sound} {vehicle} came {speed} from the {place}",
        "this {material} THING was {quality} and {heat}",
        "we cooked {food} near a {sound} {animal}",
    ),
    (
        "the {person} ate {heat} {food} in the {place}",
        "my {color} {vehicle} moved {speed} past the {place}",
        "the {animal} made a {sound} noise near a {person}",
        "this {material} THING is {quality} and {size}",
        "they cooked {food} {speed} beside the {animal}",
        "his {quality} {vehicle} was {color} and {heat}",
        "a {size} {sound} {person} came home",
        "the {food} lay on a {color} {material} THING",
    ),
    (
        "we found a {material} THING and some {food} in the {place}",
        "a {sound} {vehicle} carried the {person} {speed}",
        "her {color} THING lay beside the {size} {animal}",
        "the {person} told a {quality} story by a {heat} {material} THING",
        "some {quality} {food} was in the {size} {vehicle}",
        "the {heat} wind came {speed} from the {place}",
        "a {color} {animal} stood near the {vehicle}",
        "the {sound} {person} looked {quality}",
    ),
)
"""Three genres of sentence. For each attribute one genre is kept out of its classification documents."""

ABSENT_GENRE = {attribute: index % 3 for index, attribute in enumerate(ATTRIBUTES)}


@cache
def bearers(attribute: str, value: str) -> tuple[str, ...]:
    return (value, *ATTRIBUTES[attribute][value].split())


@cache
def values_of_words() -> dict[str, tuple[str, str]]:
    """Word -> (attribute, value)."""
    return {
        word: (attribute, value)
        for attribute, values in ATTRIBUTES.items() for value in values for word in bearers(attribute, value)
    }  # fmt: skip


NOUNS = ("animal", "vehicle", "person", "food")
OPPOSED = ("size", "heat", "quality", "speed", "sound")


@cache
def opposites() -> dict[str, str]:
    """Both ways, by position in the two lists: huge <-> tiny."""
    pairs = [zip(*(bearers(attribute, value) for value in ATTRIBUTES[attribute]), strict=True) for attribute in OPPOSED]
    return {x: y for couples in pairs for one, other in couples for x, y in ((one, other), (other, one))}


@cache
def plurals() -> dict[str, str]:
    words = [
        word for attribute in ("animal", "vehicle") for v in ATTRIBUTES[attribute] for word in bearers(attribute, v)
    ]
    return {word: f"{word}s" for word in words if word not in ATTRIBUTES["animal"] | ATTRIBUTES["vehicle"]}


@cache
def templates_with(attribute: str, genres: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(t for genre in genres for t in TEMPLATES[genre] if f"{{{attribute}}}" in t)


@dataclass(frozen=True)
class Sentence:
    """A sentence and, by attribute, the value that it states."""

    text: str
    truth: dict[str, str]


def fill(template: str, rng: random.Random, fixed: dict[str, str] | None = None) -> Sentence:
    """The template with a random bearer in each slot; `fixed` sets the value of some attributes."""
    words, truth = [], {}
    for part in template.split():
        if part.startswith("{"):
            attribute = part[1:-1]
            value = (fixed or {}).get(attribute) or rng.choice(tuple(ATTRIBUTES[attribute]))
            truth[attribute] = value
            part = rng.choice(ATTRIBUTES[attribute][value].split())
        words.append(rng.choice(THINGS) if part == "THING" else part)
    return Sentence(" ".join(words), truth)


def truth_of(text: str, attribute: str) -> str | None:
    """The value of the attribute that a text states; None where it states none or several."""
    known = values_of_words()
    found = {known[word][1] for word in text.split() if known.get(word, ("",))[0] == attribute}
    return found.pop() if len(found) == 1 else None


def is_test(text: str) -> bool:
    """The hash rule: such texts are test instances alone, never pretraining text."""
    return hashlib.sha256(text.encode()).digest()[0] < 26


def draw(make: Callable[[random.Random], Sentence], rng: random.Random, *, test: bool) -> Sentence:
    """Draws from `make` until the hash rule puts the text on the wanted side."""
    while True:
        sentence = make(rng)
        if is_test(sentence.text) == test:
            return sentence


# ---- lists of words, for the generation tasks


@cache
def list_words() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(nouns, adjectives) that the lists are made of."""
    nouns = [w for a in NOUNS for v in ATTRIBUTES[a] for w in ATTRIBUTES[a][v].split()]
    others = [w for a in (*OPPOSED, "color") for v in ATTRIBUTES[a] for w in ATTRIBUTES[a][v].split()]
    return tuple(nouns), tuple(others)


def word_list(rng: random.Random) -> Sentence:
    """Three to six words, no word twice."""
    nouns, others = list_words()
    size = rng.randint(3, 6)
    words: list[str] = []
    while len(words) < size:
        word = rng.choice(nouns if rng.random() < 0.6 else others)
        if word not in words:
            words.append(word)
    return Sentence(" ".join(words), {})
