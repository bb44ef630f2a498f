"""Each template beside its render and its parse: input generation, and one format for annotation, training, evaluation.

The fixed part of a prompt (instruction, gold examples in one of a few fixed orders) comes first and is tokenized once,
so that the prefix cache serves token-identical prefixes; what varies comes last. Lengths are checked in tokens before
anything is sent. Where a prompt does not fit, demonstrations are dropped: synthetic ones first, newest first; then gold
examples from the last to the first. A prompt that does not fit without any is `TooLong`.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engines.tokenizer import Tokenizer
from selfguide.tasks import Example, Task

VERSION = 1
"""Part of every fingerprint: raise it when a template or a parser changes."""

_SLOT = "⟪slot⟫"  # where a chat template's text is cut in two; no template writes it
_MOST_TAILS = 512
"""Varying parts whose tokens are remembered, oldest forgotten first: some hundred kilobytes for each task."""
PLAIN_STOPS = ("\n\nInput:", "\nInput:", "\nOutput:")


class TooLong(ValueError):
    """The prompt does not fit the context even without demonstrations."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids ready to send, the text that they stand for, and how many demonstrations it shows.

    The ids are an array of C ints, which is put together and sent as bytes: prompts have thousands of them.
    """

    ids: array[int]
    text: str
    num_gold: int
    num_synthetic: int = 0


@dataclass(frozen=True)
class _Parts:
    """A prompt cut where it begins to vary; `close` follows the varying text."""

    head: str
    close: str


class Prompts:
    """The prompts of one task for one student. `max_model_len` bounds prompt plus answer."""

    def __init__(self, task: Task, tokenizer: Tokenizer, max_model_len: int, *, chat: bool) -> None:
        self._task = task
        self._tokenizer = tokenizer
        self._chat = chat
        self._limit = max_model_len
        self._parts: dict[tuple[Any, ...], _Parts] = {}
        self._head_ids: dict[str, array[int]] = {}
        self._tails: dict[str, array[int]] = {}

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer in this format; a chat model ends its own turn."""
        return () if self._chat else PLAIN_STOPS

    # ---- one format for annotation, training and evaluation

    def answer(
        self, text: str, max_tokens: int, num_gold: int | None = None, order: Sequence[int] | None = None
    ) -> Prompt:
        """The prompt that asks for the output of input `text`, with up to `num_gold` examples (all: None).

        `order` numbers the examples to show, first to last; None is all of them, in the task's own order.
        """
        gold = self._task.examples if order is None else [self._task.examples[number] for number in order]
        wanted = len(gold) if num_gold is None else min(num_gold, len(gold))
        for shown in range(wanted, -1, -1):
            parts = self._fixed(("answer", order and tuple(order), shown), self._answer_parts, gold[:shown])
            ids = self._join(parts, self._tail_ids(self._varying(text) + parts.close))
            if len(ids) + max_tokens <= self._limit:
                return Prompt(ids, parts.head + self._varying(text) + parts.close, shown)
        raise TooLong(self._too_long(len(ids), max_tokens))

    def answer_orders(self, most: int) -> list[tuple[int, ...]]:
        """Up to `most` different fixed orders of all examples, for `answer`; the first is the task's own."""
        count = len(self._task.examples)
        orders = [tuple(range(count))]
        draw = random.Random(f"{self._task.name} answers")
        while len(orders) < min(most, math.factorial(count)):
            order = tuple(draw.sample(range(count), count))
            orders += [order] if order not in orders else []
        return orders

    @cached_property
    def label_ids(self) -> tuple[list[int], ...]:
        """Each label's tokens as a training row has them behind `answer`'s prompt; with the answer's end only where a
        label begins another one, which would otherwise never be the likelier of the two."""
        whole = [self._tokenizer.encode(self._completion(label)) for label in self._task.labels]
        bare = [self._tokenizer.encode(self._begun(label)) for label in self._task.labels]
        cut = [_common_start(*pair) or pair[0] for pair in zip(whole, bare, strict=True)]
        nested = any(i != j and one[: len(other)] == other for i, one in enumerate(cut) for j, other in enumerate(cut))
        return tuple(whole if nested else cut)

    @property
    def choices(self) -> tuple[str, ...]:
        """Each label as it stands behind `answer`'s prompt in training rows, with the space before it in plain text."""
        return tuple(map(self._begun, self._task.labels))

    @property
    def label_room(self) -> int:
        """Tokens to keep free behind a prompt whose labels are weighed: an engine decodes one more."""
        return 1 + max(map(len, self.label_ids))

    def training(
        self, text: str, output: str, max_length: int, num_gold: int | None, order: Sequence[int] | None = None
    ) -> tuple[array[int], int]:
        """Token ids of what `answer` sends, then of the output; and how many of them are the prompt's."""
        completion = self._tokenizer.encode(self._completion(output))
        room = min(max_length, self._limit)
        prompt = self.answer(text, len(completion) + self._limit - room, num_gold, order)
        return prompt.ids + array("i", completion), len(prompt.ids)

    def parse_output(self, text: str) -> str:
        """The output in what came back."""
        return _cut(text, self.stops).strip()

    def _answer_parts(self, gold: Sequence[Example]) -> _Parts:
        examples = [Example(self._clean(e.input), self._clean(e.output)) for e in gold]
        if not self._chat:
            shots = "".join(f"\n\nInput: {e.input}\nOutput: {e.output}" for e in examples)
            return _Parts(f"{self._clean(self._task.instruction)}{shots}\n\nInput:", "\nOutput:")
        instruction = f"{self._clean(self._task.instruction)}\n\nReply with the output alone.\n\n"
        messages = []
        for example in examples:
            messages += [_user(f"{instruction}Input: {example.input}"), _assistant(example.output)]
            instruction = ""
        return self._cut_chat([*messages, _user(f"{instruction}Input: {_SLOT}")])

    def _completion(self, output: str) -> str:
        return self._begun(output) + (self._turn_end if self._chat else self._end)

    def _begun(self, output: str) -> str:
        return self._clean(output) if self._chat else f" {self._clean(output)}"

    # ---- input generation

    def new_input(
        self, order: int, synthetic: Sequence[tuple[str, str | None]], label: str | None, max_tokens: int
    ) -> Prompt:
        """The prompt that asks for a new input, for `label` where one is given.

        `order` picks one of the fixed orders of the gold examples; `synthetic` are (input, label) that were accepted
        before, oldest first.
        """
        gold = self.gold_order(order)
        drop_order = [(len(gold), count) for count in range(len(synthetic), -1, -1)]
        drop_order += [(count, 0) for count in range(len(gold) - 1, -1, -1)]
        for num_gold, num_synthetic in drop_order:
            key = ("input", order, num_gold, label is not None)
            parts = self._fixed(key, self._input_parts, gold[:num_gold], label is not None)
            varying = self._varying_inputs(synthetic[:num_synthetic], label)
            ids = self._join(parts, self._encode(varying + parts.close))  # hardly ever the same twice
            if len(ids) + max_tokens <= self._limit:
                return Prompt(ids, parts.head + varying + parts.close, num_gold, num_synthetic)
        raise TooLong(self._too_long(len(ids), max_tokens))

    def gold_order(self, order: int) -> list[Example]:
        """The gold examples in fixed order number `order`; number 0 is the task's own."""
        gold = list(self._task.examples)
        if order:
            random.Random(f"{self._task.name} {order}").shuffle(gold)
        return gold

    def parse_input(self, text: str) -> str:
        """The input in what came back."""
        return _cut(text, self.stops).strip().removeprefix("Input:").strip()

    def _input_parts(self, gold: Sequence[Example], conditional: bool) -> _Parts:
        instruction = self._clean(self._task.instruction)
        blocks = [self._input_block(e.input, e.output if conditional else None) for e in gold]
        if not self._chat:
            rule = "below the output that it must lead to" if conditional else "one after another"
            head = f"{instruction}\n\nInputs for this task, {rule}. No two are alike."
            return _Parts("\n\n".join([head, *blocks]) + "\n\n", "")
        condition = " and lead to the output that is asked for" if conditional else ""
        text = (
            f"This is the instruction of a task:\n\n{instruction}\n\nWrite one new input for it. It must be precise, "
            f"complete, unlike the inputs below{condition}. Reply with the input alone.\n\n"
            "Inputs that show the form to keep to:\n\n" + "\n\n".join(blocks) + f"\n\n{_SLOT}"
        )
        return self._cut_chat([_user(text)])

    def _varying_inputs(self, synthetic: Sequence[tuple[str, str | None]], label: str | None) -> str:
        blocks = "".join(self._input_block(text, shown) + "\n\n" for text, shown in synthetic)
        if not self._chat:
            return blocks + (f"Output: {self._clean(label)}\nInput:" if label is not None else "Input:")
        flawed = f"Further inputs, written by a model and possibly flawed:\n\n{blocks}" if blocks else ""
        wanted = f" whose output is: {self._clean(label)}" if label is not None else ""
        return f"{flawed}Write a new input{wanted}"

    def _input_block(self, text: str, label: str | None) -> str:
        condition = f"Output: {self._clean(label)}\n" if label is not None else ""
        return f"{condition}Input: {self._clean(text)}"

    # ---- tokens

    def _fixed(self, key: tuple[Any, ...], render: Callable[..., _Parts], *args: Any) -> _Parts:
        """A prompt's fixed part is rendered once; there are few."""
        if key not in self._parts:
            self._parts[key] = render(*args)
        return self._parts[key]

    def _join(self, parts: _Parts, tail: array[int]) -> array[int]:
        if parts.head not in self._head_ids:
            bos = [self._tokenizer.bos_id] if self._tokenizer.bos_id is not None and not self._chat else []
            self._head_ids[parts.head] = array("i", bos) + self._encode(parts.head)
        return self._head_ids[parts.head] + tail

    def _encode(self, text: str) -> array[int]:
        return array("i", self._tokenizer.encode(text))

    def _tail_ids(self, text: str) -> array[int]:
        """Base, controls and tuned student ask with the same texts, and training rows repeat what annotation asked."""
        if text not in self._tails:
            if len(self._tails) == _MOST_TAILS:
                del self._tails[next(iter(self._tails))]
            self._tails[text] = self._encode(text)
        return self._tails[text]

    def num_fixed(self, ids: Sequence[int]) -> int:
        """How many of a prompt's first tokens are its fixed part, of those that were rendered here."""
        heads = (len(head) for head in self._head_ids.values() if array("i", ids[: len(head)]) == head)
        return max(heads, default=0)

    def _varying(self, text: str) -> str:
        return self._clean(text) if self._chat else f" {self._clean(text)}"

    def _cut_chat(self, messages: Sequence[dict[str, str]]) -> _Parts:
        head, _, close = self._tokenizer.render_chat(messages, answer=True).rpartition(_SLOT)
        return _Parts(head, close)

    @cached_property
    def _end(self) -> str:
        return self._tokenizer.eos_text

    @cached_property
    def _turn_end(self) -> str:
        """What the template puts behind an assistant's answer, up to the token that ends it."""
        text = self._tokenizer.render_chat([_user("x"), _assistant(_SLOT)], answer=False)
        behind = text.rpartition(_SLOT)[2]
        return behind[: behind.index(self._end)] + self._end if self._end in behind else self._end

    def _clean(self, text: str) -> str:
        """Task text must not be able to write control tokens: a special token's name is broken by a space."""
        for special in self._tokenizer.special_texts:
            if special in text:
                text = text.replace(special, f"{special[0]} {special[1:]}")
        return text

    def _too_long(self, prompt_tokens: int, max_tokens: int) -> str:
        return f"{prompt_tokens} prompt tokens + {max_tokens} to answer, context {self._limit}, without a demonstration"


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def _common_start(one: list[int], other: list[int]) -> list[int]:
    differs = (number for number, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return one[: next(differs, min(len(one), len(other)))]


def _cut(text: str, stops: Sequence[str]) -> str:
    ends = [position for stop in stops if (position := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
