"""GPT-2's tokenizer, by whose tokens the official evaluation computes ROUGE-L of languages other than English."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from engines.tokenizer import load_bpe
from selfguide import metrics
from selfguide.errors import UserError


@dataclass(frozen=True)
class GPT2Tokenizer:
    """Text to GPT-2's tokens without the marker of the space before them, as in the official evaluation.

    A token that is nothing but markers becomes an empty one, which is kept, as it is there.
    """

    bpe: Any

    def __call__(self, text: str) -> list[str]:
        return [token.lstrip("Ġ") for token in self.bpe.encode(text, add_special_tokens=False).tokens]

    def rouge_l(self, prediction: str, references: Sequence[str]) -> float:
        """Official cross-lingual ROUGE-L F1, the best over the references, 0 to 1."""
        return metrics.rouge_l_ids(self(prediction), [self(reference) for reference in references])

    @property
    def num_tokens(self) -> int:
        return int(self.bpe.get_vocab_size())

    @property
    def digest(self) -> str:
        """Of all that decides its tokens."""
        return hashlib.sha256(self.bpe.to_str().encode()).hexdigest()


@cache
def load_gpt2(source: str) -> GPT2Tokenizer:
    """Of a folder with tokenizer.json, or with vocab.json and merges.txt; or of a hub name (openai-community/gpt2)."""
    try:
        return GPT2Tokenizer(load_bpe(source))
    except ValueError as error:
        remedy = "name a folder with GPT-2's tokenizer.json, or its vocab.json and merges.txt"
        raise UserError(f"{source}: {error}: {remedy}") from None
