"""The only home of tokenizers and chat templates."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from engines.models import ModelError, fetch, is_hub_name

_spares_pytorch = False


def spare_pytorch() -> None:
    """For a process that runs no model: PyTorch, which transformers loads beside every tokenizer, stays out of it.

    Of three seconds for the first tokenizer one is left, and 270 MB are spared; transformers has no models here then.
    """
    global _spares_pytorch
    _spares_pytorch = True


def _auto_tokenizer() -> Any:
    if _spares_pytorch and not sys.modules.keys() & {"torch", "transformers"}:
        modules, log = cast(dict[str, Any], sys.modules), logging.getLogger("transformers")
        modules["torch"], log.disabled = None, True  # as if it were not installed, and without advice to install it
        try:
            from transformers import AutoTokenizer
        finally:
            del modules["torch"]
            log.disabled = False
    from transformers import AutoTokenizer

    return AutoTokenizer


class Tokenizer:
    """A model's fast tokenizer, without special tokens added behind the caller's back.

    Loaded by `transformers.AutoTokenizer`; remote code is never run. Raises `ModelError` for files that are none.
    """

    def __init__(self, model: str, revision: str | None = None) -> None:
        try:
            self._tokenizer: Any = _auto_tokenizer().from_pretrained(model, revision=revision, trust_remote_code=False)
        except Exception as error:  # broken files end in whatever the library's parsers raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ModelError(f"{model}: the tokenizer cannot be loaded ({reason}); fetch the model again") from error
        if self._tokenizer.eos_token_id is None:
            raise ModelError(f"{model}: the tokenizer names no end-of-sequence token; take another model")
        # What transformers wraps around it costs four times as much as encoding a short text does.
        self._backend: Any = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_id: int = self._tokenizer.eos_token_id
        self.eos_text: str = self._tokenizer.eos_token
        # Not `all_special_tokens`, which knows only those that have a role: a chat template's own may have none.
        added = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        self.special_texts: tuple[str, ...] = tuple(dict.fromkeys([*self._tokenizer.all_special_tokens, *added]))
        self.bos_id: int | None = self._tokenizer.bos_token_id if _adds_bos(self._tokenizer) else None

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone: no beginning-of-sequence token, no end."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        # The fast kind leaves out where in the text each token stands.
        return [list(one.ids) for one in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, token_ids: Sequence[int], *, specials: bool = False) -> str:
        """Text of the tokens; with `specials` also of those that are no text, such as the end of a turn."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=not specials))

    def check_chat_template(self) -> None:
        """Raises `ModelError` where the template fails, or leaves out what user or assistant say."""
        said = ["⟪asked⟫", "⟪answered⟫", "⟪asked again⟫"]
        roles = ("user", "assistant", "user")
        try:
            text = self.render_chat(
                [{"role": role, "content": one} for role, one in zip(roles, said, strict=True)], answer=True
            )
        except Exception as error:  # a template is a program: it raises what it likes
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ModelError(f"the chat template fails ({reason}); set model.prompts: plain") from error
        places = [text.find(one) for one in said]
        if -1 in places or places != sorted(places):
            raise ModelError("the chat template leaves messages out; set model.prompts: plain")

    def render_chat(self, messages: Sequence[dict[str, str]], *, answer: bool) -> str:
        """The conversation by the tokenizer's own template; `answer` opens the assistant's next turn."""
        return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer))


def _adds_bos(tokenizer: Any) -> bool:
    """Whether this model expects a beginning-of-sequence token: asked of the tokenizer, not of its config."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


@cache
def load_tokenizer(model: str, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a model folder or hub name, once per process."""
    return Tokenizer(str(Path(model)) if Path(model).is_dir() else model, revision)


def load_bpe(source: str) -> Any:
    """GPT-2's kind of byte-level BPE (a `tokenizers.Tokenizer`) of a folder or hub name.

    From tokenizer.json, or vocab.json and merges.txt; no config is needed beside them. Raises `ValueError` where the
    files are not there or cannot be read.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = Path(source).expanduser()
    if not folder.is_dir() and is_hub_name(source):
        folder = fetch(source, None, ("tokenizer.json", "vocab.json", "merges.txt"))
    whole, parts = folder / "tokenizer.json", [folder / "vocab.json", folder / "merges.txt"]
    if not whole.is_file() and not all(part.is_file() for part in parts):
        raise ValueError("no tokenizer is there")
    try:
        if whole.is_file():
            return Tokenizer.from_file(str(whole))
        bpe = Tokenizer(models.BPE.from_file(*map(str, parts)))
    except Exception as error:  # the library has no type of its own for a file that it cannot read
        raise ValueError(f"the tokenizer cannot be read ({error})") from error
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return bpe
