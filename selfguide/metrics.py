"""How good an answer is: the official NI-V2 metrics, and the SELF-GUIDE authors' under their own names.

The two families are not comparable. The official ones (natural-instructions, eval/automatic/evaluation.py)
normalise the whole answer and take the best of all references; the authors' (self-guide, utils/evaluate.py)
know the first reference only, search the answer for a label, and take the longest common subsequence over
characters. All scores are in 0..1.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache

from rapidfuzz.distance import LCSseq

from selfguide.errors import UserError
from selfguide.stemmer import stem

Tokenize = Callable[[str], Sequence[Hashable]]

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORDS = re.compile(r"[a-z0-9]+")


def normalize(text: str) -> str:
    """The official form: lower case, ASCII punctuation deleted, white space collapsed; articles stay."""
    return " ".join(text.lower().translate(_DELETE_PUNCTUATION).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 where the whole normalised prediction equals any normalised reference, else 0.0 (official EM)."""
    answer = normalize(prediction)
    return float(any(answer == normalize(reference) for reference in references))


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Official ROUGE-L F1 of English text, the best over the references.

    Equal to rouge-score's `rougeL` with `use_stemmer=True`. A side without a token (symbols only) scores 0,
    even where the two are the same. For other languages see `rouge_tokenizer`.
    """
    return rouge_l_ids(english_tokens(prediction), [english_tokens(reference) for reference in references])


def rouge_l_ids(prediction: Sequence[Hashable], references: Sequence[Sequence[Hashable]]) -> float:
    """ROUGE-L F1 of tokens (token strings, or ids >= 0), the best over the references."""
    return max(_lcs_f1(prediction, reference) for reference in references)


def english_tokens(text: str) -> list[str]:
    """rouge-score's tokens: runs of [a-z0-9] in the lower-cased text, those of over 3 characters stemmed."""
    return list(map(_stem, _WORDS.findall(text.lower())))


def rouge_tokenizer(language: str, gpt2: Tokenize | None = None) -> Tokenize:
    """The tokenizer of the official ROUGE-L in `language`: the English one, or GPT-2's for all others.

    `gpt2` maps a text to GPT-2's BPE tokens, their leading-space marker stripped. The English tokenizer sees
    nothing of most scripts, so without `gpt2` another language raises UserError; exact match needs neither.
    """
    if language == "English":
        return english_tokens
    if gpt2 is None:
        raise UserError(f"ROUGE-L of {language} needs GPT-2's tokenizer: provide it, or report EM alone")
    return gpt2


def score_rows(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: Tokenize = english_tokens
) -> tuple[list[float], list[float]]:
    """(exact match, ROUGE-L) of each row; `references` holds one non-empty sequence per prediction.

    The default tokenizer is for English text alone: pass `rouge_tokenizer(task.output_language)`.
    """
    rows = list(zip(predictions, references, strict=True))
    em = [exact_match(prediction, texts) for prediction, texts in rows]
    rouge = [rouge_l_ids(tokenize(answer), [tokenize(text) for text in texts]) for answer, texts in rows]
    return em, rouge


def authors_em(prediction: str, references: Sequence[str], labels: Sequence[str]) -> float:
    """SELF-GUIDE's EM: the last label in the prediction (in its case, even inside a word), first reference.

    Where two labels start at the same character, the earlier in `labels` wins; the authors list them as first
    seen in the split. A prediction without any label scores 0.0.
    """
    found = _any_of(tuple(labels)).findall(prediction)
    return float(bool(found) and normalize(found[-1]) == normalize(references[0]))


def authors_rouge_char(prediction: str, references: Sequence[str]) -> float:
    """SELF-GUIDE's "ROUGE-L": F1 of the longest common subsequence of raw characters, first reference."""
    return _lcs_f1(prediction, references[0])


def _lcs_f1(prediction: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    if not prediction or not reference:
        return 0.0
    length = LCSseq.similarity(prediction, reference)
    if not length:
        return 0.0
    # The order of operations is rouge-score's, so that the floats are the same to the last bit.
    precision, recall = length / len(prediction), length / len(reference)
    return 2 * precision * recall / (precision + recall)


@lru_cache(maxsize=1024)
def _any_of(labels: tuple[str, ...]) -> re.Pattern[str]:
    # An empty label would match everywhere; (?!) matches nowhere.
    return re.compile("|".join(re.escape(label) for label in labels if label) or "(?!)")


@lru_cache(maxsize=2**17)
def _stem(word: str) -> str:
    return stem(word) if len(word) > 3 else word
