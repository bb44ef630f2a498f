"""Is a task classification or generation, and which are its labels: from its definition and examples.

Neither rule looks at the instances, whose outputs are the test answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

MAX_LABEL_WORDS = 5

_PAIRS = (frozenset({"yes", "no"}), frozenset({"true", "false"}))
_OPTION = re.compile(r"(.*?)([A-Za-z]|\d{1,2})([).\]]*)", re.DOTALL)
_LAST_OPTION_LETTER = "H"

_QUOTED = re.compile(r"""["“”`«]([^"“”`«»]{1,60})["“”`»]|(?<!\w)['‘’]([^'‘’\n]{1,60}?)['’‘](?!\w)""")
_SENTENCE_END = re.compile(r"""(?<=[.?!])\s+(?=[A-Z"'`“‘])|\n""")
_GLOSS = re.compile(r"\([^()]{3,}\)")
# What ends an item: a separator of a list (the group), or a full stop, a colon, a small word, a dash.
_ITEM_END = re.compile(
    r"\s*(?:([,;/|]+(?:\s*(?:or|and)\b)?|\b(?:or|and|vs)\b)|[:.?!\n]+"
    r"|\b(?:into either|into|either|as|are|is|to|in|of|using|with|from|if|for|when|otherwise)\b|-\s)\s*",
    re.IGNORECASE,
)
_NEVER_LABELS = frozenset({"not", "and", "or", "so", "a", "i", "the"})


def is_classification(definition: str, outputs: Iterable[str]) -> bool:
    """Whether the outputs of the positive examples are labels rather than free text.

    They are when none is longer than MAX_LABEL_WORDS words and all of them are yes/no or true/false; or
    options, the same words before one letter or number ("B", "Option A", "Speaker 2", but no bare numbers,
    which are counts as often as labels); or when the definition names more than half of them.
    """
    labels = _distinct(outputs)
    if not labels or max(len(label.split()) for label in labels) > MAX_LABEL_WORDS:
        return False
    folded = {fold(label) for label in labels}
    if any(folded <= pair for pair in _PAIRS) or _are_options(labels):
        return True
    return 2 * sum(_names(definition, label) for label in labels) > len(labels)


def find_labels(definition: str, positive: Iterable[str], negative: Iterable[str]) -> list[str]:
    """The labels that the examples and the definition give away, sorted; fewer than two if too little.

    The outputs of positive examples are labels. To these come the other word of yes/no or true/false; the
    rest of a series of options; or what the definition quotes or lists together with a known label. Negative
    examples show what not to answer, and often no label at all: their outputs count only in a series.
    """
    seeds = _distinct(positive)
    if not seeds:
        return []
    definition = "\n".join(" ".join(line.split()) for line in definition.splitlines())
    return sorted(
        _complete_pair(seeds)
        or _complete_options(seeds, definition, _distinct(negative))
        or _add_named(seeds, definition)
    )


def fold(text: str) -> str:
    """The form in which two spellings of a label are one: lower case, no quotes or punctuation around."""
    return _trim(text).strip("()").lower()


def _trim(text: str) -> str:
    return text.strip(" \t\n.,;:\"'“”‘’`")


def _distinct(outputs: Iterable[str]) -> list[str]:
    """Stripped, without the empty, and the first spelling of each."""
    first: dict[str, str] = {}
    for output in outputs:
        if output.strip():
            first.setdefault(fold(output) or output.strip(), output.strip())
    return list(first.values())


def _merge(seeds: list[str], candidates: Iterable[str]) -> list[str]:
    return _distinct([*seeds, *(_spell_like(candidate, seeds) for candidate in candidates)])


def _names(definition: str, label: str) -> bool:
    """Whether the definition has the label as a whole word, or inflected: "supports" names "support"."""
    word = re.escape(label.rstrip("."))
    return re.search(rf"(?<!\w){word}(?:e?[sd]|ing)?(?!\w)", definition, re.IGNORECASE) is not None


def _complete_pair(seeds: list[str]) -> list[str]:
    folded = {fold(seed) for seed in seeds}
    return next((_merge(seeds, sorted(pair)) for pair in _PAIRS if folded <= pair), [])


def _options(outputs: list[str]) -> list[tuple[str, str, str]]:
    """(words before, letter or number, punctuation after) of each output; empty where one is no option."""
    matches = [_OPTION.fullmatch(output) for output in outputs]
    parts = [(m[1], m[2], m[3]) for m in matches if m and not m[1][-1:].isalnum()]
    return parts if len(parts) == len(outputs) else []


def _are_options(outputs: list[str]) -> bool:
    options = _options(outputs)
    if not options or len({before for before, _, _ in options}) > 1:
        return False
    return any(char.isalpha() for char in options[0][0]) or all(code.isalpha() for _, code, _ in options)


def _complete_options(seeds: list[str], definition: str, negative: list[str]) -> list[str]:
    """The series of options, as far as the seeds, the definition and the negative examples reach."""
    options = _options(seeds)
    if len({(before, after, _style(code)) for before, code, after in options}) != 1:
        return []
    before, code, after = options[0]
    style, numbers = _style(code), [_number(code) for _, code, _ in options]
    if style != "digit" and max(numbers) > _number(_LAST_OPTION_LETTER):
        return []
    texts = [definition, *(output for output in negative if output.startswith(before))]
    known = {_number(code) for text in texts for code in _standalone_codes(text) if _style(code) == style}
    low, high = min(numbers), max(numbers)
    low = low if style == "digit" else 1
    while low - 1 in known:
        low -= 1
    while high + 1 in known:
        high += 1
    return [before + _code(number, style) + after for number in range(low, high + 1)]


def _standalone_codes(text: str) -> list[str]:
    return re.findall(r"(?<![\w.])(?:[B-Zb-z]|A|\d)(?!\w)", text)


def _style(code: str) -> str:
    return "digit" if code.isdigit() else "upper" if code.isupper() else "lower"


def _number(code: str) -> int:
    return int(code) if code.isdigit() else ord(code.upper()) - ord("A") + 1


def _code(number: int, style: str) -> str:
    letter = chr(ord("A") + number - 1)
    return str(number) if style == "digit" else letter if style == "upper" else letter.lower()


def _add_named(seeds: list[str], definition: str) -> list[str]:
    candidates = [*_quoted_with(seeds, definition), *_listed_with(seeds, definition)]
    return _merge(seeds, (candidate for candidate in candidates if _is_like(candidate, seeds)))


def _quoted_with(seeds: list[str], definition: str) -> Iterator[str]:
    """What is quoted in a sentence that also quotes a known label."""
    known = {fold(seed) for seed in seeds}
    for sentence in _SENTENCE_END.split(definition):
        quoted = [_trim(double or single) for double, single in _QUOTED.findall(sentence)]
        if known & {fold(text) for text in quoted}:
            yield from quoted


def _listed_with(seeds: list[str], definition: str) -> Iterator[str]:
    """The items of each list that holds two known labels, or the only one."""
    known = {fold(seed) for seed in seeds}
    for items in _lists(definition):
        if len(items) > 1 and len(known & {fold(item) for item in items}) >= min(2, len(known)):
            yield from items


def _lists(definition: str) -> Iterator[list[str]]:
    text, start, items = _GLOSS.sub(" ", definition), 0, []
    for end in _ITEM_END.finditer(text):
        items.append(_trim(text[start : end.start()]))
        start = end.end()
        if end[1] is None:
            yield [item for item in items if item]
            items = []
    yield [item for item in [*items, _trim(text[start:])] if item]


def _is_like(candidate: str, seeds: list[str]) -> bool:
    """Short enough to be a label beside the seeds, with a letter in it, and not a function word."""
    return (
        len(candidate.split()) <= max(len(seed.split()) for seed in seeds)
        and len(candidate) <= 2 * max(len(seed) for seed in seeds)
        and any(char.isalpha() for char in candidate)
        and fold(candidate) not in _NEVER_LABELS
    )


def _spell_like(candidate: str, seeds: list[str]) -> str:
    """The candidate in the case of the seeds, with their full stop if all have one."""
    text = candidate.strip().rstrip(".")
    if all(seed.islower() for seed in seeds):
        text = text.lower()
    elif all(seed.isupper() for seed in seeds):
        text = text.upper()
    elif all(seed[:1].isupper() for seed in seeds):
        text = text[:1].upper() + text[1:]
    return text + "." if all(seed.endswith(".") for seed in seeds) else text
