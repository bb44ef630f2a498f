"""Training tokens a second: the trainer against a bare TRL script with the same rows and settings.

    python -m benchmarks.bench_sft [--quick] [--rows 400] [--epochs 3] [--packing] [--model FOLDER] > sft.json

Both in this process, in turn, on one CPU thread or one GPU, from rows in a file to weights in a folder. Ours keeps the
base model from job to job, as a trainer does, scores canaries before and after, writes each step down, and keeps the
last checkpoint; the script loads the model, trains and saves once. Their losses must be equal: exits with an error
where they are not. The ratio is ours over the script's.

Prompts are between a quarter of `--prompt-tokens` and all of it. `--packing`: a third time, the script with rows packed
to the longest row's length, best fit first, and attention of FlashAttention's kernels where there are any. Its ratio,
over the script without, says what packing would bring; its steps are fewer, and its losses others.
"""

from __future__ import annotations

import argparse
import io
import random
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench_trainers import write_rows
from benchmarks.ratio import emit, ratio, spread
from engines.sft import Finetuner
from engines.types import TrainSpec
from selfguide.api import load_student
from selfguide.progress import stderr_line
from selfguide.recipefile import load_recipe


@dataclass(frozen=True)
class Job:
    """Its seconds from rows to weights, and the loss of each step."""

    seconds: float
    losses: list[float]


def main() -> None:
    args = parse_args()
    import torch

    torch.set_num_threads(1)
    student = load_student(load_recipe("smoke", {"model.path": args.model}))
    spec = TrainSpec(
        student.folder, student.digest, epochs=args.epochs, batch_size=args.batch_size,
        max_length=args.prompt_tokens + args.completion_tokens,
    )  # fmt: skip
    finetuner, laps = Finetuner(), list[dict[str, Job]]()
    quiet = redirect_stdout(io.StringIO())  # TRL prints each step's loss
    with tempfile.TemporaryDirectory(prefix="selfguide-sft-") as folder, quiet:
        work, draw = Path(folder), random.Random(0)
        lengths = [draw.randint(args.prompt_tokens // 4, args.prompt_tokens) for _ in range(args.rows)]
        path = write_rows(work / "rows.parquet", student, lengths, args.completion_tokens)
        for number in range(-1, args.repeats):  # the first lap loads what all need
            lap = {"ours": ours(finetuner, spec, path, work / f"ours-{number}")}
            lap["bare"] = bare(spec, path, work / "bare")
            if args.packing:
                lap["packed"] = bare(spec, path, work / "packed", packing=True)
            stderr_line(", ".join(f"{name} {job.seconds:.2f} s" for name, job in lap.items()))
            laps += [lap] if number >= 0 else []
    tokens = args.epochs * (sum(lengths) + args.rows * args.completion_tokens)
    ratios = {"tokens_per_s": ratio([lap["bare"].seconds / lap["ours"].seconds for lap in laps])}
    if args.packing:
        ratios["packed_over_not"] = ratio([lap["bare"].seconds / lap["packed"].seconds for lap in laps])
    speeds = {name: spread([tokens / lap[name].seconds for lap in laps]) for name in laps[0]}
    emit("sft", vars(args), ratios, tokens=tokens, tokens_per_s=speeds)
    if any(lap["ours"].losses != lap["bare"].losses for lap in laps):
        raise SystemExit("the losses differ")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=80)
    parser.add_argument("--completion-tokens", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="random")
    parser.add_argument("--packing", action="store_true", help="the script a third time, with packed rows")
    parser.add_argument("--quick", action="store_true", help="100 rows, two repeats")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.repeats = 100, 2
    return args


def ours(finetuner: Finetuner, spec: TrainSpec, rows: Path, work: Path) -> Job:
    work.mkdir()
    began = time.monotonic()
    result = finetuner.train(spec, rows, work)
    return Job(time.monotonic() - began, [one["loss"] for one in result.loss_curve])


def bare(spec: TrainSpec, rows: Path, out: Path, *, packing: bool = False) -> Job:
    """As one writes it with TRL: the defaults, and what the job asks for."""
    import pyarrow.parquet as pq
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import is_flash_attn_2_available
    from trl import SFTConfig, SFTTrainer

    began, on_cpu = time.monotonic(), not torch.cuda.is_available()
    data = [
        {"input_ids": ids, "labels": [-100] * cut + ids[cut:]}
        for ids, cut in (row.values() for row in pq.read_table(rows).select(["input_ids", "prompt_tokens"]).to_pylist())
    ]
    # Packed rows are kept apart by positions alone, which PyTorch's own attention heeds without a cache.
    kernels = {"attn_implementation": "flash_attention_2"} if packing and is_flash_attn_2_available() else {}
    model = AutoModelForCausalLM.from_pretrained(
        spec.model, dtype=torch.float32 if on_cpu else torch.bfloat16, use_cache=not packing, **kernels
    )
    config = SFTConfig(
        output_dir=str(out), num_train_epochs=spec.epochs, per_device_train_batch_size=spec.batch_size,
        learning_rate=spec.learning_rate, lr_scheduler_type=spec.scheduler, seed=spec.seed, data_seed=spec.seed,
        logging_steps=1, save_strategy="no", report_to="none", bf16=not on_cpu, use_cpu=on_cpu, disable_tqdm=True,
        gradient_checkpointing=False, dataloader_pin_memory=not on_cpu, packing=packing,
        max_length=spec.max_length if packing else None, dataset_kwargs={"skip_prepare_dataset": not packing},
        remove_unused_columns=False,
    )  # fmt: skip
    lora = LoraConfig(r=spec.lora_rank, lora_alpha=spec.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer: Any = AutoTokenizer.from_pretrained(spec.model)
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(data), peft_config=lora, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(str(out))
    losses = [float(one["loss"]) for one in trainer.state.log_history if "loss" in one]
    return Job(time.monotonic() - began, losses)


if __name__ == "__main__":
    main()
