"""What stands in for what has not been measured, and for a student that is not on this machine. All of it is printed.

The rates are round figures for 7 billion parameters on one 80 GB A100 that is kept busy; a larger student is slower by
its size, a smaller one faster, by ten times at most. No machine of this project has measured them.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, cast

from engines.tokenizer import Tokenizer
from selfguide.config import Recipe
from selfguide.errors import UserError
from selfguide.sizes import ModelSize
from selfguide.taskrun import Student

_RATES_PARAMS, _MOST_SPEEDUP = 7e9, 10.0
_RATES = {"prompt_tokens_per_s": 10_000.0, "output_tokens_per_s": 2_000.0, "train_tokens_per_s": 3_000.0}
_SIZE = re.compile(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)
_LAYER_WIDTH = 128
"""Width over number of layers, as in most students of 1 to 70 billion parameters."""


@dataclass(frozen=True)
class Assumptions:
    """Set with `--assume NAME=VALUE`. Rates are of one GPU; empty ones follow from `params`."""

    params: float | None = None
    """Parameters of a student that is not here; empty: read off its name."""
    chars_per_token: float = 4.0
    """Of a student that is not here, whose tokenizer is not either."""
    context: int = 4096
    """Of a student that is not here, tokens, where engine.max_model_len does not say it."""
    kept_share: float = 0.5
    """Candidates that become training rows."""
    answer_length: float = 1.0
    """How long inputs and answers are that the student writes, over the gold examples'."""
    prompt_tokens_per_s: float | None = None
    """Prompts are counted whole, though the prefix cache serves a part."""
    output_tokens_per_s: float | None = None
    """All sequences that an engine decodes together."""
    train_tokens_per_s: float | None = None
    """Prompts included."""

    def for_size(self, num_params: float) -> Assumptions:
        """With the rates of a student of that size where none was given."""
        scale = min(_MOST_SPEEDUP, _RATES_PARAMS / num_params)
        rates: dict[str, Any] = {name: rate * scale for name, rate in _RATES.items() if getattr(self, name) is None}
        return replace(self, params=num_params, **rates)

    def seconds(self, *, prompt: float = 0, output: float = 0, train: float = 0) -> float:
        """Of one GPU, for so many tokens; of `for_size` alone."""
        counts = {"prompt_tokens_per_s": prompt, "output_tokens_per_s": output, "train_tokens_per_s": train}
        return float(sum(count / getattr(self, name) for name, count in counts.items()))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_assumptions(texts: Sequence[str]) -> Assumptions | None:
    """Of `NAME=VALUE` each, or "defaults", which changes none; None for no text. Raises `UserError`."""
    given: dict[str, Any] = {}
    names = [field.name for field in fields(Assumptions)]
    for text in texts:
        if text == "defaults":
            continue
        name, _, value = text.partition("=")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(names)}, or defaults"
            raise UserError(f"--assume {text}: no such name; {hint}")
        given[name] = _positive(text, value)
    return Assumptions(**given) if texts else None


def _positive(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"--assume {text}: give a number above 0, for example params=7e9")
    return int(number) if text.startswith("context=") else number


def size_by_name(model: str) -> float | None:
    """Parameters, as names of models say them: Qwen2.5-7B, smollm-135m, Mixtral-8x7B (all experts)."""
    found = _SIZE.findall(model.rpartition("/")[2])
    if not found:
        return None
    experts, number, unit = found[-1]
    return float(number) * int(experts or 1) * (1e9 if unit in "bB" else 1e6)


def stand_in(recipe: Recipe, assumed: Assumptions) -> tuple[Student, ModelSize]:
    """A student that is not here, as far as its size tells; `assumed` is of `for_size`."""
    assert assumed.params is not None
    tokenizer = cast(Tokenizer, CountedCharacters(assumed.chars_per_token))
    longest = recipe.engine.max_model_len or assumed.context
    return Student(recipe.model.path, "", tokenizer, False, longest), size_of(assumed.params)


def size_of(num_params: float) -> ModelSize:
    """Shapes of a Llama of about so many parameters: 12 x layers x width squared of them are in its layers."""
    layers = max(1, round((num_params / (12 * _LAYER_WIDTH**2)) ** (1 / 3)))
    width = max(1, round(math.sqrt(num_params / (12 * layers))))
    mlp, heads = round(8 / 3 * width), max(1, width // 128)
    kinds = {"q_proj": (width, width), "k_proj": (width, width), "v_proj": (width, width), "o_proj": (width, width)}
    kinds |= {"gate_proj": (mlp, width), "up_proj": (mlp, width), "down_proj": (width, mlp)}
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in kinds.items()
    }
    return ModelSize(round(num_params), layers, heads, heads, 128, shapes)


class CountedCharacters:
    """Counts tokens as `engines.tokenizer.Tokenizer` does, by the characters of a text alone. Plain prompts only."""

    eos_id, eos_text, bos_id = 0, "</s>", 0
    special_texts: tuple[str, ...] = ()

    def __init__(self, chars_per_token: float) -> None:
        self._chars_per_token = chars_per_token

    def encode(self, text: str) -> list[int]:
        return [0] * math.ceil(len(text) / self._chars_per_token)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]
