"""The student's architecture, as torch code that trains fast on a CPU, and its export as a plain Hugging Face Llama.

The first two blocks start with attention circuits in them: heads that find the token s places back, and heads that
find where the same token stood before (Olsson et al., 2209.11895, call the pair an induction circuit). Training then
goes on from there; without them a student of this size learns a bag of words in the same number of tokens.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 32


@dataclass(frozen=True)
class Shape:
    """Sizes of the student. `hidden` is a multiple of HEAD, the size of a head."""

    vocab: int
    hidden: int = 192
    mlp: int = 512
    layers: int = 5
    rope_base: float = 1e5
    context: int = 1024

    @property
    def heads(self) -> int:
        return self.hidden // HEAD


class Block(nn.Module):  # type: ignore[misc]  # torch has no types here
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        h = shape.hidden
        self.norm1, self.norm2 = nn.RMSNorm(h, eps=1e-5), nn.RMSNorm(h, eps=1e-5)
        self.qkv, self.out = nn.Linear(h, 3 * h, bias=False), nn.Linear(h, h, bias=False)
        self.up, self.down = nn.Linear(h, 2 * shape.mlp, bias=False), nn.Linear(shape.mlp, h, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, hidden // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        attention = (q @ k.transpose(-1, -2) * HEAD**-0.5 + mask).softmax(-1)
        x = x + self.out((attention.to(v.dtype) @ v).transpose(1, 2).reshape(batch, length, hidden))
        gate, up = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Student(nn.Module):  # type: ignore[misc]  # likewise
    """A Llama with tied embeddings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        angles = torch.outer(torch.arange(shape.context).float(), rope_frequencies(shape))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        mask = torch.full((shape.context, shape.context), -1e4).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch, length, vocab) of ids (batch, length)."""
        length = ids.shape[1]
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length], self.mask[:length, :length])
        return F.linear(self.norm(x), self.embed.weight)


def rope_frequencies(shape: Shape) -> Tensor:
    return shape.rope_base ** (-torch.arange(HEAD // 2).float() / (HEAD // 2))


# ---- the initialisation

OFFSETS = (1, 1, 2, 3, 4, 2)
"""How far back head h of block 0 looks."""
PROJECTIONS = (0, 1, 1, 1, 1, 0)
"""Heads with the same number see tokens by the same projection, so that their sketches can be compared."""
MATCHES: tuple[tuple[int | None, int | None, tuple[int, ...]], ...] = (
    (None, 0, ()), (2, 1, ()), (2, 2, ()), (2, 3, ()), (2, None, (1, 2)), (2, None, (2, 3)),
)  # fmt: skip
"""Block 1, head h: (what asks, what is asked, what is copied). A number is the sketch of that head of block 0, None the
token itself, () copies the token itself.

At "Output:" the input's last word is two back: its partner stands one to three places behind where it stood before. At
"Input:" the label is two back: what it stands for is one to three places before it.
"""


def initialise(student: Student, seed: int) -> None:
    """Small random weights, then the circuits of blocks 0 and 1."""
    shape, generator = student.shape, torch.Generator().manual_seed(seed)

    def normal(weight: Tensor, std: float) -> None:
        weight.data.normal_(0.0, std, generator=generator)

    for block in student.blocks:
        for layer in (block.qkv, block.up):
            normal(layer.weight, shape.hidden**-0.5)
        for layer in (block.out, block.down):
            layer.weight.data.zero_()  # what is written starts from nothing, so that the circuits are not drowned
    normal(student.embed.weight, 1.0 / math.sqrt(shape.hidden))
    with torch.no_grad():
        student.embed.weight[:, 0] = 1.0  # a direction that all positions share, as long as all the rest
        _previous_token_heads(student, generator)
        _matching_heads(student, generator)


def _head(matrix: Tensor, which: int, head: int, shape: Shape) -> Tensor:
    """Rows of one head in the stacked query (0), key (1), value (2) matrix."""
    start = which * shape.hidden + head * HEAD
    return matrix[start : start + HEAD]


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0].T


def _previous_token_heads(student: Student, generator: torch.Generator) -> None:
    """Query and key read the shared direction alone; a turn by `offset` positions makes the score peak there."""
    shape, block = student.shape, student.blocks[0]
    constant, bands, scale = math.sqrt(shape.hidden / 2), 4, math.sqrt(5 * math.sqrt(HEAD))
    frequencies = rope_frequencies(shape)[:bands]
    seen = [_orthonormal(HEAD, shape.hidden - 1, generator) for _ in range(max(PROJECTIONS) + 1)]
    for head in range(shape.heads):
        turn = OFFSETS[head] * frequencies
        for which, (first, second) in enumerate(((turn.cos(), -turn.sin()), (torch.ones(bands), torch.zeros(bands)))):
            rows = _head(block.qkv.weight, which, head, shape).zero_()
            rows[:bands, 0], rows[HEAD // 2 : HEAD // 2 + bands, 0] = (
                first * scale / constant,
                second * scale / constant,
            )
        _head(block.qkv.weight, 2, head, shape).zero_()[:, 1:] = seen[PROJECTIONS[head]]
        out = _out(block, head).zero_()
        out[1:] = 0.5 * _orthonormal(HEAD, shape.hidden - 1, generator).T / _value_length(shape)


def _value_length(shape: Shape) -> float:
    """Of what a random projection to HEAD dimensions leaves of a normalised embedding."""
    return math.sqrt(shape.hidden / 2) * math.sqrt(HEAD / shape.hidden)


def _out(block: Block, head: int) -> Tensor:
    """Columns of the output matrix that belong to one head: (hidden, HEAD)."""
    return block.out.weight[:, head * HEAD : (head + 1) * HEAD]


def _matching_heads(student: Student, generator: torch.Generator) -> None:
    """Token against sketch, or sketch against sketch, on the slow RoPE frequencies; what is found is copied."""
    shape, first, block = student.shape, student.blocks[0], student.blocks[1]
    slow = [i + half for half in (0, HEAD // 2) for i in range(6, HEAD // 2)]
    for head in range(shape.heads):
        asks, asked, copied = MATCHES[head]
        query, key = (_head(block.qkv.weight, which, head, shape).zero_() for which in (0, 1))
        tokens = _head(first.qkv.weight, 2, 1 if asked is None else asked, shape)
        own, read = (tokens if one is None else _out(first, one).T for one in (asks, asked))
        query[slow], key[slow] = own[slow], read[slow]
        back = [0 if one is None else OFFSETS[one] for one in (asks, asked)]
        gain = math.sqrt(3.0 / _typical_score(student, query, key, *back))
        query *= gain
        key *= gain
        value = _head(block.qkv.weight, 2, head, shape).zero_()
        value[:, 1:] = _orthonormal(HEAD, shape.hidden - 1, generator)
        write = value.clone()
        if copied:  # what the sketches hold, brought back to tokens
            write = _head(first.qkv.weight, 2, copied[0], shape)
            value.copy_(1.3 * _value_length(shape) * torch.stack([_out(first, one).T for one in copied]).sum(0))
        _out(block, head).copy_(0.5 * write.T / _value_length(shape))


def _typical_score(student: Student, query: Tensor, key: Tensor, asks_back: int, asked_back: int) -> float:
    """Mean attention logit, RoPE aside, between positions whose sketches (0 back: tokens) hold the same token."""
    shape, block = student.shape, student.blocks[0]
    ids = torch.randperm(shape.vocab, generator=torch.Generator().manual_seed(0))[:64].repeat(2)[None]
    x = block(student.embed(ids), student.cos[:128], student.sin[:128], student.mask[:128, :128])
    x = student.blocks[1].norm1(x)[0]
    asking, asked = x[64 + 8 + asks_back : 120 + asks_back], x[8 + asked_back : 56 + asked_back]
    scores = ((asking[:48] @ query.T) * (asked[:48] @ key.T)).sum(-1) / math.sqrt(HEAD)
    return float(scores.mean())


# ---- export


def export(student: Student, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """config.json and model.safetensors of a LlamaForCausalLM; the caller adds the tokenizer."""
    from safetensors.torch import save_file

    shape = student.shape
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads, "head_dim": HEAD, "vocab_size": shape.vocab, "rms_norm_eps": 1e-5,
        "rope_theta": shape.rope_base, "max_position_embeddings": shape.context, "tie_word_embeddings": True,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "bos_token_id": None, "eos_token_id": 0,
        "pad_token_id": 1, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    weights = {"model.embed_tokens.weight": student.embed.weight, "model.norm.weight": student.norm.weight}
    for index, block in enumerate(student.blocks):
        name = f"model.layers.{index}"
        weights |= {f"{name}.input_layernorm.weight": block.norm1.weight}
        weights |= {f"{name}.post_attention_layernorm.weight": block.norm2.weight}
        for part, rows in zip("qkv", block.qkv.weight.chunk(3), strict=True):
            weights[f"{name}.self_attn.{part}_proj.weight"] = rows
        weights[f"{name}.self_attn.o_proj.weight"] = block.out.weight
        for part, rows in zip(("gate", "up"), block.up.weight.chunk(2), strict=True):
            weights[f"{name}.mlp.{part}_proj.weight"] = rows
        weights[f"{name}.mlp.down_proj.weight"] = block.down.weight
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    save_file(
        {k: v.detach().to(dtype).contiguous() for k, v in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
