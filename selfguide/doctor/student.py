"""The student's files, how it is spoken to, and whether it fits the memory that is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines.models import ModelError, check_whole, context_length, is_hub_name, read_config
from selfguide.doctor.case import Case, Finding
from selfguide.doctor.machine import GPU, memory
from selfguide.sizes import ModelSize, longest_context, read_size, readable_bytes, training_bytes

_LIBRARIES_BYTES = 1 << 30
"""What an engine or a trainer takes before it has loaded anything."""
_WAIT_S = 60.0
_NO_TEMPLATE = Finding("prompts", "error", "the tokenizer has no chat template", "--set model.prompts=plain")
_BFLOAT16_CAPABILITY = 8.0


def check_student(case: Case) -> Iterator[Finding]:
    """Files, prompt format, context, memory."""
    path = case.recipe.model.path
    if not path:
        yield Finding("model", "warning", "no student is named, so nothing about it was checked", "add --model FOLDER")
    elif path == "random" and not case.folder:
        yield Finding("model", "ok", "random weights: a tiny Llama, made here when it is first used")
        if case.recipe.model.prompts == "chat":
            yield _NO_TEMPLATE
    elif not case.folder:
        yield _absent(path)
    else:
        yield from _check_folder(case, case.folder)


def _absent(path: str) -> Finding:
    if is_hub_name(path):
        remedy = "run fetches it, which may take long"
        return Finding("model", "warning", f"{path} is not on this machine, so nothing about it was checked", remedy)
    return Finding(
        "model", "error", f"{path}: no such folder", "give a folder with config.json, or a hub name: org/model"
    )


def _check_folder(case: Case, folder: Path) -> Iterator[Finding]:
    try:
        config, size = read_config(folder), read_size(folder)
        check_whole(folder)
        longest, most = longest_context(case.recipe.engine, folder), context_length(folder)
    except (ModelError, OSError, ValueError) as error:
        yield Finding("model", "error", " ".join(str(error).split()))
        return
    params = f"{size.num_params / 1e9:.2f} billion" if size.num_params >= 5e6 else f"{size.num_params:,}"
    dtype = config.get("dtype") or config.get("torch_dtype") or "unknown precision"
    yield Finding("model", "ok", f"{folder.name}, {params} parameters, {dtype}, context {most:,} tokens")
    yield _check_tokenizer(case)
    yield _check_context(case, longest, most)
    yield from _check_shapes(case, size)
    yield from _check_gpu_fit(case, size, longest, dtype) if case.on_gpu else _check_cpu_fit(case, size, longest)


def _check_tokenizer(case: Case) -> Finding:
    assert case.tokenizer is not None
    try:
        said: dict[str, Any] = case.tokenizer.answer(_WAIT_S)
    except RuntimeError as error:
        said = {"error": str(error)}
    if "error" in said:
        return Finding("tokenizer", "error", f"cannot be loaded: {said['error']}", "fetch the model again, whole")
    wanted = case.recipe.model.prompts
    if wanted == "chat" and not said["chat"]:
        return _NO_TEMPLATE
    if said["chat"] and wanted != "plain" and said["template"]:
        found, _, remedy = said["template"].partition("; ")
        return Finding("prompts", "error", found, remedy)
    if said["chat"] and wanted != "plain":
        return Finding("prompts", "ok", "by the tokenizer's chat template")
    return Finding("prompts", "ok", "plain text" + (", though there is a chat template" if said["chat"] else ""))


def _check_context(case: Case, longest: int, most: int) -> Finding:
    recipe = case.recipe
    answer = max(part.sampling.max_tokens for part in (recipe.synthesis, recipe.annotation, recipe.evaluation))
    found = f"prompt plus answer take at most {longest:,} tokens, of which {answer:,} are the answer's"
    if longest > most:
        found = f"engine.max_model_len is {longest:,}, the model's context {most:,}"
        return Finding("context", "error", found, f"--set engine.max_model_len={most}")
    if answer >= longest:
        return Finding("context", "error", found, "lower max_tokens in synthesis, annotation and evaluation")
    return Finding("context", "ok", found)


def _check_shapes(case: Case, size: ModelSize) -> Iterator[Finding]:
    parallel = case.recipe.engine.tensor_parallel
    if size.num_heads % parallel:
        found = f"{size.num_heads} attention heads cannot be split over {parallel} GPUs"
        yield Finding("tensor_parallel", "error", found, "choose engine.tensor_parallel that divides them")


def _check_cpu_fit(case: Case, size: ModelSize, longest: int) -> Iterator[Finding]:
    """Each engine: libraries, weights, cache. The trainer comes on top, while the engines stay."""
    recipe = case.recipe
    cache, weights = int(recipe.engine.kv_cache_gib * 2**30), size.weights_bytes(recipe.model.dtype, on_gpu=False)
    one_row = size.cache_bytes(longest, recipe.model.dtype, on_gpu=False)
    if one_row > cache:
        found = f"one row of {longest:,} tokens takes {readable_bytes(one_row)}, the cache has {readable_bytes(cache)}"
        remedy = f"--set engine.kv_cache_gib={-(-one_row // 2**30)}, or lower engine.max_model_len"
        yield Finding("key-value cache", "error", found, remedy)
    trainer = training_bytes(size, recipe.finetuning, on_gpu=False) + _LIBRARIES_BYTES
    wanted = recipe.cluster.num_engines * (_LIBRARIES_BYTES + weights + cache) + recipe.cluster.num_trainers * trainer
    total, available = memory()
    found = f"engines and trainers want {readable_bytes(wanted)} and more, {readable_bytes(available)} are available"
    if case.address or wanted <= available:
        yield Finding("fit", "ok", found)
    else:
        remedy = "take a smaller student, LoRA, fewer engines, or lower engine.kv_cache_gib"
        yield Finding("fit", "error" if wanted > total else "warning", found, remedy)


def _check_gpu_fit(case: Case, size: ModelSize, longest: int, dtype: str) -> Iterator[Finding]:
    recipe, gpu = case.recipe, min(case.gpus, key=lambda one: one.memory_bytes)
    yield from _check_bfloat16(recipe.model.dtype, dtype, gpu)
    parallel = recipe.engine.tensor_parallel
    weights = size.weights_bytes(recipe.model.dtype, on_gpu=True) // parallel
    one_row = size.cache_bytes(longest, recipe.model.dtype, on_gpu=True) // parallel
    room = int(gpu.memory_bytes * recipe.engine.gpu_memory_utilization) - weights
    found = f"an engine's weights take {readable_bytes(weights)} of a GPU's {readable_bytes(gpu.memory_bytes)}"
    if room < one_row:
        remedy = "raise engine.tensor_parallel or lower engine.max_model_len"
        yield Finding("fit", "error", f"{found}, which leaves no room for a row of {longest:,} tokens", remedy)
    else:
        yield Finding("fit", "ok", f"{found}, the cache holds some {room // one_row:,} rows of {longest:,} tokens")
    yield _check_trainer_fit(case, size, gpu)


def _check_bfloat16(wanted: str, dtype: str, gpu: GPU) -> Iterator[Finding]:
    if gpu.capability < _BFLOAT16_CAPABILITY and "bfloat16" in (wanted if wanted != "auto" else dtype):
        found = f"{gpu.name} cannot compute in bfloat16 (capability {gpu.capability:g})"
        yield Finding("dtype", "error", found, "--set model.dtype=float16")


def _check_trainer_fit(case: Case, size: ModelSize, gpu: GPU) -> Finding:
    finetuning, gpus = case.recipe.finetuning, max(1, int(case.recipe.cluster.gpus_per_trainer))
    wanted = training_bytes(size, finetuning, on_gpu=True)
    where = "one GPU" if gpus == 1 else f"{gpus} GPUs"
    found = f"finetuning ({finetuning.method}) wants {readable_bytes(wanted)} and its activations, on {where}"
    if wanted > gpus * gpu.memory_bytes:
        remedy = "raise cluster.gpus_per_trainer, take a smaller student"
        remedy += ", or finetuning.method=lora" if finetuning.method == "full" else ""
        return Finding("trainer", "error", f"{found} of {readable_bytes(gpu.memory_bytes)}", remedy)
    return Finding("trainer", "ok", found)
