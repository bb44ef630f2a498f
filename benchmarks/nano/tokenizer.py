"""The student's tokenizer: every word of the world, with its space, is one token; bytes stand in for all else."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

from benchmarks.nano import operations, wordings, world

END, PAD, UNKNOWN = "<|end|>", "<|pad|>", "<|unk|>"
INPUTS_HEADS = (
    "Inputs for this task, below the output that it must lead to. No two are alike.",
    "Inputs for this task, one after another. No two are alike.",
)
"""What selfguide's plain prompts for new inputs say (selfguide/prompts.py)."""
_SPACE = "▁"


@cache
def words() -> tuple[str, ...]:
    """All words of the world as they appear inside a line, sorted."""
    texts = [*world.FILLERS, *world.THINGS, *world.plurals().values(), *world.values_of_words(), *world.ATTRIBUTES]
    texts += [word for labels in wordings.LABEL_WORDS.values() for word in labels]
    texts += [
        t for frames in (wordings.HEADS, wordings.ITEMS, operations.PAIR_FRAMES) for f in frames.values() for t in f
    ]
    texts += [phrase for _, phrases in operations.OPERATIONS.values() for phrase in phrases]
    texts += [*INPUTS_HEADS, *operations.SINGLE_FRAMES, *(t for genre in world.TEMPLATES for t in genre)]
    found = {word for text in texts for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}|THING", " ", text))}
    return tuple(sorted(word.lower() for word in found))


@cache
def wording_words() -> frozenset[str]:
    """Words that the frames of instructions are made of."""
    frames = [t for some in (wordings.HEADS, wordings.ITEMS) for texts in some.values() for t in texts]
    return frozenset(word.lower() for t in frames for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", t)))


@cache
def openings() -> tuple[str, ...]:
    """Words that begin an instruction, which no space precedes; the only ones with a capital."""
    heads = [h for frames in wordings.HEADS.values() for h in frames]
    phrases = [p for _, variants in operations.OPERATIONS.values() for p in variants]
    frames = [f for some in operations.PAIR_FRAMES.values() for f in some if not f.startswith("{")]
    first = {text.split()[0] for text in [*heads, *phrases, *frames, *operations.SINGLE_FRAMES, *INPUTS_HEADS]}
    return tuple(sorted(word[0].upper() + word[1:] for word in first if not word.startswith("{")))


INNER_CAPITALS = ("Then", "Now", "No")


def pieces() -> list[str]:
    """The vocabulary in the order of the ids: specials, marks, words, bytes."""
    marks = ["\n", ".", ",", ";", ":", "?", "!", "'", '"', "-", "Input:", "Output:", _SPACE]
    inside = [_SPACE + word for word in (*words(), *INNER_CAPITALS)]
    opening = list(openings())
    return list(dict.fromkeys([END, PAD, UNKNOWN, *marks, *inside, *opening, *(f"<0x{b:02X}>" for b in range(256))]))


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and its configuration, for transformers and vLLM."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [(piece, -20.0 if piece.startswith("<0x") else -5.0) for piece in pieces()]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("\n"), "isolated"),
        pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never"),
    ])  # fmt: skip
    tokenizer.decoder = decoders.Sequence([
        decoders.ByteFallback(), decoders.Replace(_SPACE, " "), decoders.Fuse(),
    ])  # fmt: skip
    tokenizer.add_special_tokens([END, PAD, UNKNOWN])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(folder)


@cache
def _ids() -> dict[str, int]:
    return {piece: i for i, piece in enumerate(pieces())}


_WORD = re.compile(r"\n|Input:|Output:| ?[A-Za-z]+|[.,;:?!]")


def encode(text: str) -> list[int]:
    """What the tokenizer makes of the world's own text, several times faster (a test compares the two)."""
    ids = _ids()
    return [ids[piece.replace(" ", _SPACE)] for piece in _WORD.findall(text)]


if __name__ == "__main__":
    write_tokenizer(Path(sys.argv[1]))
