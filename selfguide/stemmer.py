"""The Porter stemmer of rouge-score: equal to NLTK's in its default mode, and about four times faster.

Porter, "An algorithm for suffix stripping", Program 14.3 (1980), with the departures that NLTK made by 2004: some
irregular words, "ies" and "ied", "y" after a consonant, "alli", "fulli" and "logi". The measure m of a stem is its
number of vowel-consonant changes. Tests hold it to NLTK's, word for word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_IRREGULAR = {
    "sky": "sky", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news",
    "innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing",
    "cannings": "canning", "canning": "canning", "howe": "howe",
    "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip

Rules = Mapping[str, Sequence[tuple[str, str]]]


def _by_ending(*rules: tuple[str, str]) -> Rules:
    """Suffix and replacement under the suffix's last two letters, in order: most words have no rule to try."""
    table: dict[str, list[tuple[str, str]]] = {}
    for suffix, replacement in rules:
        table.setdefault(suffix[-2:], []).append((suffix, replacement))
    return table


# Of two suffixes that end alike, the longer stands first.
_STEP_2 = _by_ending(
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"),
    ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
    ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"),
    ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful"), ("logi", "log"),
)  # fmt: skip
_STEP_3 = _by_ending(
    ("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""),
)  # fmt: skip
_STEP_4 = _by_ending(*(
    (suffix, "")
    for suffix in "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize".split()
))  # fmt: skip
_C, _V = b"cv"
_CLASSES = bytes(_V if chr(byte) in "aeiou" else _C for byte in range(256))


def stem(word: str) -> str:
    """The stem of a word of lower-case ASCII letters and digits."""
    if len(word) <= 2:
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    word = _verb_ending(_plural(word))
    if word[-1:] == "y" and len(word) > 2 and _classes(word)[-2] == _C:
        word = word[:-1] + "i"
    return _final(_suffix_4(_suffix_3(_suffix_2(word))))


def _classes(word: str) -> bytes:
    """Each letter as c or v; y is a consonant at the start and after a vowel. Digits are consonants."""
    classes = word.encode().translate(_CLASSES)
    if "y" not in word:
        return classes
    mended = bytearray(classes)
    for place, char in enumerate(word):
        if char == "y" and place and mended[place - 1] == _C:
            mended[place] = _V
    return bytes(mended)


def _plural(word: str) -> str:
    if word[-1] != "s" or word.endswith("ss"):
        return word
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    return word[:-2] if word.endswith("sses") else word[:-1]


def _verb_ending(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if b"vc" in _classes(word[:-3]) else word
    rest = word[:-2] if word.endswith("ed") else word[:-3] if word.endswith("ing") else ""
    classes = _classes(rest)
    if b"v" not in classes:
        return word
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if rest[-2:-1] == rest[-1] and classes[-1] == _C:
        return rest if rest[-1] in "lsz" else rest[:-1]
    return rest + "e" if classes.count(b"vc") == 1 and _is_short(rest, classes) else rest


def _is_short(word: str, classes: bytes) -> bool:
    """Ends in consonant, vowel, consonant, the last not w, x or y; or is a vowel and a consonant."""
    return classes == b"vc" or (classes.endswith(b"cvc") and word[-1] not in "wxy")


def _suffix_2(word: str) -> str:
    for suffix, replacement in _STEP_2.get(word[-2:], ()):
        if word.endswith(suffix):
            rest = word[: -len(suffix)]
            # The l of logi counts to the stem, so that "geologi" is cut like "archaeologi".
            if b"vc" not in _classes(rest + "l" if suffix == "logi" else rest):
                return word
            return _suffix_2(rest + "al") if suffix == "alli" else rest + replacement
    return word


def _suffix_3(word: str) -> str:
    for suffix, replacement in _STEP_3.get(word[-2:], ()):
        if word.endswith(suffix):
            rest = word[: -len(suffix)]
            return rest + replacement if b"vc" in _classes(rest) else word
    return word


def _suffix_4(word: str) -> str:
    for suffix, _ in _STEP_4.get(word[-2:], ()):
        if word.endswith(suffix):
            rest = word[: -len(suffix)]
            cut = _classes(rest).count(b"vc") > 1 and (suffix != "ion" or rest[-1] in "st")
            return rest if cut else word
    return word


def _final(word: str) -> str:
    """A last e, and one of two l."""
    if word.endswith("e"):
        classes = _classes(word[:-1])
        m = classes.count(b"vc")
        if m > 1 or (m == 1 and not _is_short(word[:-1], classes)):
            word = word[:-1]
    return word[:-1] if word.endswith("ll") and _classes(word[:-1]).count(b"vc") > 1 else word
