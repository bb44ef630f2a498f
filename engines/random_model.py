"""A small Llama with random weights and a byte-level tokenizer: a real architecture for runs that need no skill.

Its only art is a prior over characters, so that lines look like letters and come to an end: every token's embedding
shares one constant direction, which survives the residual stream, and the output head reads a log-probability from it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path

HIDDEN, LAYERS, HEADS, CONTEXT_TOKENS = 64, 2, 2, 8192
# Rough relative frequencies; the newline's share makes a line about 20 characters long.
_LETTERS = "etaoinshrdlucmfwygpbvk"
_NEWLINE_SHARE, _SPACE_SHARE, _LETTER_SHARE = 0.06, 0.15, 0.785


def make_random_model(folder: Path, *, seed: int = 0, chat: bool = False) -> Path:
    """Writes the model into `folder` unless a whole one is there; returns the folder.

    Deterministic in `seed`. With `chat` the tokenizer has a ChatML template.
    """
    if not (folder / "config.json").is_file():
        beside = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        beside.mkdir(parents=True)
        token_bytes = write_tokenizer(beside, chat)
        _write_weights(beside, token_bytes, seed)
        try:
            beside.rename(folder)
        except OSError:  # another process finished the same model first
            shutil.rmtree(beside)
    return folder


def write_tokenizer(folder: Path, chat: bool) -> list[str]:
    """256 byte tokens, then the specials; returns the byte tokens' alphabet in the order of their ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>" if chat else "<|end|>", pad_token="<|end|>"
    )
    if chat:
        fast.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    fast.save_pretrained(folder)
    return alphabet


def character_logprobs(alphabet: list[str]) -> list[float]:
    """Log-probability of each byte token under the prior; what is no letter, space or newline shares the rest."""
    weights = {"Ċ": _NEWLINE_SHARE, "Ġ": _SPACE_SHARE}
    norm = sum(1 / (i + 3) for i in range(len(_LETTERS)))
    weights |= {letter: _LETTER_SHARE / (i + 3) / norm for i, letter in enumerate(_LETTERS)}
    rest = (1 - sum(weights.values())) / (len(alphabet) - len(weights))
    return [math.log(weights.get(token, rest)) for token in alphabet]


def _write_weights(folder: Path, alphabet: list[str], seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(alphabet) + 3, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False, initializer_range=0.1, bos_token_id=None, eos_token_id=len(alphabet),
        dtype="float32",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    logprobs = torch.tensor([*character_logprobs(alphabet), -9.0, -12.0, -12.0])
    with torch.no_grad():
        embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
        embeddings[:, 0] = 8.0  # the constant direction; the final norm leaves most of its length there
        head.mul_(0.3)
        head[:, 0] = (logprobs - logprobs.mean()) / math.sqrt(HIDDEN)
    model.save_pretrained(folder, safe_serialization=True)
    config_path = folder / "config.json"
    config_path.write_text(json.dumps(json.loads(config_path.read_text()), indent=1, sort_keys=True))


if __name__ == "__main__":
    make_random_model(Path(sys.argv[1]), chat="--chat" in sys.argv[2:])
