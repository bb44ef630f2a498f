"""The student: circuits are there from the start, training resumes, and transformers computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.nano import model, tokenizer, train


@pytest.fixture(scope="module")
def student() -> model.Student:
    made = model.Student(model.Shape(vocab=len(tokenizer.pieces())))
    model.initialise(made, 0)
    made.eval()
    return made


def test_heads_of_the_first_block_look_back_as_far_as_they_should(student: model.Student) -> None:
    ids = torch.randint(20, 600, (2, 40), generator=torch.Generator().manual_seed(0))
    block, x = student.blocks[0], student.embed(ids)
    q, k, _ = block.qkv(block.norm1(x)).view(2, 40, 3, -1, model.HEAD).permute(2, 0, 3, 1, 4)
    q, k = (model._rotate(one, student.cos[:40], student.sin[:40]) for one in (q, k))
    attention = (q @ k.transpose(-1, -2) * model.HEAD**-0.5 + student.mask[:40, :40]).softmax(-1)
    for head, offset in enumerate(model.OFFSETS):
        assert float(attention[:, head].diagonal(-offset, 1, 2).mean()) > 0.8


def test_a_repeated_run_of_words_is_likelier_the_second_time(student: model.Student) -> None:
    ids = torch.randint(20, 600, (8, 24), generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    with torch.no_grad():
        logprobs = student(ids).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert float(logprobs[:, 25:].mean()) > float(logprobs[:, :23].mean()) + 0.3


def test_transformers_computes_what_the_training_code_computes(student: model.Student, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model.export(student, tmp_path, torch.float32)
    tokenizer.write_tokenizer(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 900, (2, 50), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, student(ids), atol=2e-4)


def test_newton_schulz_makes_matrices_nearly_orthogonal() -> None:
    matrices = torch.randn(3, 48, 96, generator=torch.Generator().manual_seed(3))
    singular = torch.linalg.svdvals(train.orthogonalise(matrices))
    assert 0.5 < float(singular.min()) < float(singular.max()) < 1.4


def test_training_writes_gates_and_resumes(tmp_path: Path) -> None:
    def run(tokens: int) -> list[dict[str, float]]:
        settings = {"tokens": tokens, "processes": 2, "gate-every": 8000, "gate-documents": 2}
        options = [f"--{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "benchmarks.nano.train", str(tmp_path), *options]
        subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
        return [json.loads(line) for line in (tmp_path / "gates.jsonl").read_text().splitlines()]

    first = run(16000)
    assert first[-1]["tokens"] >= 16000
    both = run(32000)
    assert both[: len(first)] == first
    assert both[-1]["tokens"] >= 32000
    assert {"mapped_sentences", "pair", "inputs_sentences"} <= both[-1].keys()
    assert (tmp_path / "0M" / "model.safetensors").is_file()
