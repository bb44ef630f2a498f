"""How long prompts are, in tokens: rendered by the code that sends them, a few of each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from selfguide.evaluation import Protocol
from selfguide.prompts import TooLong
from selfguide.taskrun import TaskRun

_SAMPLE = 16
"""Prompts of a kind that are rendered; their mean stands for all."""


def candidate_tokens(run: TaskRun) -> float:
    """Prompt tokens of a candidate: of the prompt for its input, and of those for its outputs."""
    return fmean(_input_lengths(run)) + num_orders(run) * fmean(_annotation_lengths(run) or [0])


def num_orders(run: TaskRun) -> int:
    """In how many orders of the gold examples an input is annotated, each with a prompt of its own."""
    config = run.recipe.annotation
    wanted = config.label_orders if run.is_calibrated else min(config.orders, config.num_samples)
    return len(run.prompts.answer_orders(wanted))


def _input_lengths(run: TaskRun) -> list[int]:
    """With half as many demonstrations as there may be, gold inputs in the place of synthetic ones."""
    config, task = run.recipe.synthesis, run.task
    conditional = config.conditional == "always" or (config.conditional == "auto" and run.is_classification)
    lengths = []
    for order in range(min(config.gold_orders, _SAMPLE)):
        label = task.labels[order % len(task.labels)] if conditional and task.labels else None
        inputs = [task.examples[i % len(task.examples)].input for i in range((1 + config.max_demonstrations) // 2)]
        prompt = run.prompts.new_input(order, [(one, label) for one in inputs], label, config.sampling.max_tokens)
        lengths.append(len(prompt.ids))
    return lengths


def _annotation_lengths(run: TaskRun) -> list[int]:
    max_tokens = run.recipe.annotation.sampling.max_tokens
    texts = [example.input for example in run.task.examples[:_SAMPLE]]
    return _measure(texts, lambda text: run.prompts.answer(text, max_tokens).ids)


def training_tokens(run: TaskRun) -> tuple[float, list[str]]:
    """Tokens of a training row, as the gold examples make them, and what is odd about that."""
    longest, examples = run.recipe.finetuning.max_length, run.task.examples[:_SAMPLE]
    outputs = {example.input: example.output for example in examples}
    count = run.num_demonstrations
    lengths = _measure(outputs, lambda text: run.prompts.training(text, outputs[text], longest, count)[0])
    missed = len(outputs) - len(lengths)
    note = f"{missed} of {len(outputs)} gold examples do not fit finetuning.max_length {longest:,}"
    return fmean(lengths or [longest]), [note] if missed else []


def evaluation_tokens(run: TaskRun, protocol: Protocol) -> tuple[float, list[str]]:
    """Prompt tokens of an evaluation row, and what is odd about that."""
    instances, max_tokens = run.evaluation_instances, protocol.sampling.max_tokens
    texts = [one.input for one in instances[:: max(1, len(instances) // _SAMPLE)]]
    lengths = _measure(texts, lambda text: run.prompts.answer(text, max_tokens, protocol.num_gold).ids)
    missed = len(texts) - len(lengths)
    note = f"{missed} of {len(texts)} rows that were tried do not fit the context: misses"
    return fmean(lengths or [0]), [note] if missed else []


def gold_tokens(run: TaskRun) -> tuple[float, float]:
    """Tokens of an input and of an output, as the gold examples have them, their ends counted."""
    encode, examples = run.student.tokenizer.encode_many, run.task.examples
    sides = ([example.input for example in examples], [example.output for example in examples])
    inputs, outputs = (1 + fmean(map(len, encode(texts))) for texts in sides)
    return inputs, outputs


def bytes_per_token(run: TaskRun) -> float:
    """UTF-8 bytes of a token of the task's own text."""
    texts = [text for example in run.task.examples for text in (example.input, example.output)]
    num_tokens = sum(map(len, run.student.tokenizer.encode_many(texts)))
    return sum(len(text.encode()) for text in texts) / max(1, num_tokens)


def pair_bytes(run: TaskRun) -> float:
    """UTF-8 bytes of an input with its output, as the gold examples have them."""
    return fmean(len(example.input.encode()) + len(example.output.encode()) for example in run.task.examples)


def _measure(texts: Iterable[str], render: Callable[[str], Sequence[int]]) -> list[int]:
    """Lengths of what fits."""
    lengths = []
    for text in texts:
        try:
            lengths.append(len(render(text)))
        except TooLong:
            continue
    return lengths
