"""A student of a 7B-class architecture with random weights, for speed alone: python -m benchmarks.dummy_model FOLDER

Bfloat16 safetensors, 15 GB, and the byte-level tokenizer of the random student. As there, one direction of all
embeddings is constant, and the output head reads frequencies of letters from it, so that answers are lines of letters
that come to an end; tokens beyond the bytes, which only make the output head as wide as a real one, are never sampled.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.random_model import character_logprobs, write_tokenizer

CONSTANT = 64.0
"""Of the constant direction; what the layers add stays small beside it."""
NEVER = -40.0


@dataclass(frozen=True)
class Shape:
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    vocab_size: int = 152064
    max_position_embeddings: int = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    make_dummy_model(parser.parse_args().folder, Shape())


def make_dummy_model(folder: Path, shape: Shape, *, seed: int = 0) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True)
    alphabet = write_tokenizer(folder, chat=False)
    torch.manual_seed(seed)
    config = LlamaConfig(
        **vars(shape), tie_word_embeddings=False, initializer_range=0.02, bos_token_id=None,
        eos_token_id=len(alphabet), dtype="bfloat16",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        _quieten(model)
        known = torch.tensor([*character_logprobs(alphabet), -9.0, NEVER, NEVER])
        logprobs = torch.full((shape.vocab_size,), NEVER)
        logprobs[: len(known)] = known
        model.model.embed_tokens.weight[:, 0] = CONSTANT
        model.lm_head.weight[:, 0] = logprobs / math.sqrt(shape.hidden_size)
    model.save_pretrained(folder, safe_serialization=True)


def _quieten(model: Any) -> None:
    """What each layer writes into the residual stream must not drown the constant direction."""
    model.lm_head.weight.mul_(0.1)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.01)
        layer.mlp.down_proj.weight.mul_(0.01)


if __name__ == "__main__":
    main()
