"""The recipe: one frozen tree of all that a run may vary, with a doc string under every field.

Lengths are tokens unless a field says otherwise. Recipes are YAML; `extends` names another recipe to start from.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from cluster.placement import ClusterSpec
from engines.types import Faults, Simulation
from selfguide.filters import AnyInputFilter, AnyRowFilter, AnySetFilter, Duplicate, Margin, Vote
from selfguide.filters.copies import EvaluationCopy, GoldCopy
from selfguide.filters.empty import Empty
from selfguide.filters.finish import Finished
from selfguide.filters.noise import Noise


class Section(BaseModel):
    """A part of the recipe: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Model(Section):
    """The student."""

    path: str = ""
    """A model folder, a hub name (org/model), "nano": the embedded student, or "random": a small Llama with random
    weights, made on the spot."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the engine; "auto" is the model's own on GPUs and float32 on CPUs."""
    prompts: Literal["auto", "plain", "chat"] = "auto"
    """Plain text for base models, the tokenizer's template for chat models; "auto": chat where there is a template."""


class Engine(Section):
    """How each engine runs."""

    kind: Literal["vllm", "simulated"] = "vllm"
    """"simulated" answers without a model, for trying out a cluster."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs of one engine."""
    max_model_len: int | None = Field(default=None, ge=128)
    """The longest prompt plus answer; empty: the model's context length, at most 8192."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences that an engine decodes together."""
    max_num_batched_tokens: int = Field(default=4096, ge=256, le=65536)
    """Tokens of one step. Scoring holds logits for all of them: above 4096 a large vocabulary can exhaust memory."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, lt=1)
    """Share of a GPU's memory that an engine takes."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Key-value cache of the CPU build, GiB."""
    block_size: int | None = None
    """Tokens in a block of the prefix cache; empty takes vLLM's own."""
    max_loras: int = Field(default=4, ge=1)
    """Adapters in one step; not used with full weights."""
    adapter_cache_gib: float = Field(default=50.0, gt=0)
    """Run folders by URL: what fetched adapters may take on a node's disk, GiB; the oldest go first, those in use
    stay."""
    per_actor: int = Field(default=1, ge=1)
    """Simulated engines: how many share a process, hundreds on one machine."""
    tokens_per_s: float = Field(default=0.0, ge=0)
    """Simulated engines: output tokens per second and sequence; 0 answers at once."""
    simulation: Simulation = Simulation()
    """Simulated engines: lengths of answers, prefill and its cache, time to start and to load (docs/simulation.md)."""
    faults: Faults = Faults()
    """Simulated engines: what goes wrong (docs/simulation.md)."""

    @property
    def num_per_actor(self) -> int:
        """Engines that share an actor, and what it reserves; a real one has its own."""
        return self.per_actor if self.kind == "simulated" else 1


class Sampling(Section):
    """Sampling parameters."""

    temperature: float = Field(default=1.0, ge=0, le=5)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus; 1 is off."""
    top_k: int = Field(default=0, ge=0)
    """Most likely tokens that are drawn from; 0 is all."""
    max_tokens: int = Field(default=500, ge=1)
    """An answer longer than this is cut, and a cut answer is rejected."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, beside those of the prompt's own format."""


class Synthesis(Section):
    """Stage 1a: the student writes inputs (SELF-GUIDE, section 2)."""

    num_candidates: int = Field(default=400, ge=1)
    """At most this many inputs are tried (M)."""
    target_rows: int | None = Field(default=None, ge=1)
    """Stop when this many pairs pass all row filters (N); empty: try all candidates. Calibrated annotation of
    classification tasks tries all: its labels depend on the whole set."""
    pool: Literal["lag", "rounds"] = "lag"
    """Accepted inputs that row i may be shown: "rounds", all before its round (published); "lag", all but the last."""
    lag: int = Field(default=128, ge=1)
    """Row i waits for all rows up to i - lag. Large keeps an engine full with one task, small learns sooner."""
    round_size: int = Field(default=10, ge=1)
    """Rows of a round."""
    max_demonstrations: int = Field(default=10, ge=0)
    """Synthetic inputs in a prompt: a number drawn from 1 to this, once there are any."""
    gold_orders: int = Field(default=4, ge=1)
    """In how many fixed orders the gold examples are shown; each order is a prefix that the cache serves."""
    conditional: Literal["auto", "always", "never"] = "auto"
    """Write inputs for a label drawn uniformly; "auto": for classification."""
    sampling: Sampling = Sampling(temperature=1.0, top_k=40, max_tokens=500)
    """One completion for each prompt."""
    max_failed_share: float = Field(default=0.1, ge=0, le=1)
    """The task ends when more than this share of rows (and more than 10) failed."""


class Annotation(Section):
    """Stage 1b: the student answers its inputs by in-context learning (SELF-GUIDE, section 2)."""

    mode: Literal["sample", "calibrated"] = "sample"
    """Classification: "sample" takes a vote over sampled answers. "calibrated" reads the labels' log-probabilities off
    one pass, standardises each label over all accepted inputs, and elects the label that stands out: no sample filter,
    no vote, and all candidates are tried. Generation tasks are sampled in either mode."""
    orders: int = Field(default=1, ge=1, le=24)
    """Over how many fixed orders of the gold examples the samples of an input are spread."""
    label_orders: int = Field(default=1, ge=1, le=24)
    """Over how many of them the labels' log-probabilities are averaged, a pass each."""
    num_samples: int = Field(default=10, ge=1, le=256)
    """Answers sampled for each input."""
    stop_when_decided: bool = False
    """Classification: sample one more than half of `num_samples` first, and the others only where those do not all
    name the same label, finished: no vote can turn against them any more. Needs `orders: 1`, no `keep_best`, and a vote
    for the most frequent answer by at most half of the samples."""
    keep_best: int | None = Field(default=None, ge=1)
    """Keep this many of highest cumulative log-probability (what best_of did); empty: all."""
    constrain_labels: bool = False
    """Classification: let the engine write nothing but labels."""
    sampling: Sampling = Sampling(temperature=0.2, top_k=10, max_tokens=500)
    """The same prompt as in training and evaluation."""


class Filters(Section):
    """Stage 2. Chains in order; the first filter that turns a row away is its reason."""

    inputs: tuple[AnyInputFilter, ...] = (
        Empty(), Finished(), Noise(), GoldCopy(), EvaluationCopy(), Duplicate(),
    )  # fmt: skip
    """Each input as it is committed, before it is annotated."""
    samples: tuple[AnyRowFilter, ...] = (Empty(), Finished(), Noise())
    """Each sampled output. For classification add valid_label, which also reads the label off the answer."""
    vote: Vote = Vote()
    """Self-consistency over the outputs that are left."""
    pairs: tuple[AnyRowFilter, ...] = ()
    """Each input with its elected output."""
    sets: tuple[AnySetFilter, ...] = ()
    """What needs all rows: near-duplicates, balance."""
    classification: ClassificationFilters = Field(default_factory=lambda: ClassificationFilters())
    """What is added to these chains for classification tasks."""


class ClassificationFilters(Section):
    """Additions to the chains for classification tasks."""

    samples: tuple[AnyRowFilter, ...] = ()
    """Appended to `filters.samples`."""
    pairs: tuple[AnyRowFilter, ...] = ()
    """Appended to `filters.pairs`."""
    sets: tuple[AnySetFilter, ...] = ()
    """Appended to `filters.sets`."""


class Finetuning(Section):
    """Stage 3: supervised finetuning on the kept pairs (SELF-GUIDE, section 2)."""

    method: Literal["lora", "full"] = "lora"
    """LoRA, or all weights."""
    epochs: int = Field(default=3, ge=1)
    """Passes over the rows."""
    min_steps: int = Field(default=0, ge=0)
    """Tiny sets train for more epochs until this many optimizer steps are done."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """AdamW's peak rate."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps over which the rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient clipping."""
    batch_size: int = Field(default=8, ge=1)
    """Rows of one step on one device."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Steps that are added up before the weights move."""
    max_length: int = Field(default=2048, ge=16)
    """Longer rows are left out and counted."""
    min_rows: int = Field(default=1, ge=1)
    """The task ends here when fewer rows were kept."""
    lora_rank: int = Field(default=16, ge=1, le=512)
    """Rank of the adapter."""
    lora_alpha: int = Field(default=32, ge=1)
    """Scale of the adapter, over the rank."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Which matrices get an adapter."""
    gradient_checkpointing: bool = False
    """Trades time for memory."""
    canary_rows: int = Field(default=8, ge=1)
    """Training rows whose log-probabilities prove the adapter in the engine."""
    keep_epochs: bool = False
    """Keep the weights that every epoch left, not the last one's alone. A search over epochs sets this."""
    simulated_tokens_per_s: float = Field(default=0.0, ge=0)
    """Simulated engines: train nothing, but take as long as this many training tokens a second would; 0 trains."""


Control = Literal["few_shot_icl", "filtered_decoding", "constrained_labels", "calibrated_labels", "few_shot_sft"]


class Evaluation(Section):
    """Stage 4: base, tuned student and controls on the same held-out rows."""

    protocol: Literal["official", "authors"] = "official"
    """Which instances are test rows: "official", the first `num_instances`; "authors", 90% (docs/tasks.md)."""
    num_instances: int = Field(default=100, ge=1)
    """Protocol "official": how many instances, from the first on, are test rows (published: 100)."""
    num_validation: int = Field(default=100, ge=1)
    """Protocol "official": at most so many of the instances behind the test rows are validation rows, for a search."""
    demonstrations: int | Literal["all"] = "all"
    """Gold examples in the prompt of base and tuned student, and in the training rows (official: 2)."""
    controls: tuple[Control, ...] = ("few_shot_icl", "filtered_decoding")
    """Measured beside the base. few_shot_icl: all demonstrations that fit. filtered_decoding: sampling with the
    annotation filters at inference. constrained_labels: the likeliest label, of one pass on the base's prompts.
    calibrated_labels: the same, standardised per label over the evaluation inputs, as calibrated annotation does
    (transductive: it sees all inputs at once). few_shot_sft: a student finetuned on the gold examples alone, each with
    the others in its prompt. The two of labels are left out of generation tasks."""
    sampling: Sampling = Sampling(temperature=0.0, max_tokens=500)
    """Greedy, as published."""
    constrain_labels: bool = False
    """Classification: let the engine write nothing but labels, base and tuned alike."""
    gpt2: str = ""
    """GPT-2's tokenizer, by which the official ROUGE-L of other languages than English is computed: a folder, or a hub
    name (openai-community/gpt2). Empty: it is reported as unavailable."""
    bootstrap_samples: int = Field(default=10_000, ge=100)
    """Resamples of the paired bootstrap."""


class Recipe(Section):
    """All that a run may vary."""

    name: str = "default"
    """What reports call it."""
    seed: int = 0
    """The run's seed; every row's own is derived from it."""
    model: Model = Model()
    """The student."""
    engine: Engine = Engine()
    """How each engine runs."""
    synthesis: Synthesis = Synthesis()
    """Inputs."""
    annotation: Annotation = Annotation()
    """Outputs."""
    filters: Filters = Filters()
    """Which rows are kept."""
    finetuning: Finetuning = Finetuning()
    """The adapter."""
    evaluation: Evaluation = Evaluation()
    """The comparison."""
    cluster: ClusterSpec = ClusterSpec()
    """Engines and trainers, and where."""

    @field_validator("filters")
    @classmethod
    def _check_margin(cls, filters: Filters, info: ValidationInfo) -> Filters:
        """The fields above are there already, those that were in order."""
        annotation = info.data.get("annotation")
        wanted = any(isinstance(one, Margin) for one in (*filters.sets, *filters.classification.sets))
        if wanted and annotation is not None and annotation.mode == "sample":
            raise ValueError("the margin filter needs annotation.mode: calibrated; set it, or take the filter out")
        return filters

    @field_validator("filters")
    @classmethod
    def _check_vote(cls, filters: Filters, info: ValidationInfo) -> Filters:
        """Samples that were never drawn must not be able to change what is kept."""
        annotation = info.data.get("annotation")
        if annotation is None or not annotation.stop_when_decided:
            return filters
        if annotation.orders > 1 or annotation.keep_best is not None:
            raise ValueError("annotation.stop_when_decided needs annotation.orders: 1 and no annotation.keep_best")
        if filters.vote.choose != "frequent" or filters.vote.min_share > 0.5:
            raise ValueError(
                "annotation.stop_when_decided needs a vote with choose: frequent and a min_share up to 0.5"
            )
        return filters

    @field_validator("finetuning")
    @classmethod
    def _check_simulated(cls, finetuning: Finetuning, info: ValidationInfo) -> Finetuning:
        engine = info.data.get("engine")
        if finetuning.simulated_tokens_per_s and engine is not None and engine.kind != "simulated":
            raise ValueError(
                "simulated_tokens_per_s makes no adapter for real engines; set engine.kind: simulated, or 0"
            )
        return finetuning

    @field_validator("cluster")
    @classmethod
    def _check_shards(cls, cluster: ClusterSpec, info: ValidationInfo) -> ClusterSpec:
        finetuning, gpus = info.data.get("finetuning"), cluster.gpus_per_trainer
        if finetuning is not None and gpus > 1 and gpus % 1 == 0 and finetuning.batch_size % gpus:
            raise ValueError(f"{gpus:g} gpus_per_trainer cannot share finetuning.batch_size {finetuning.batch_size}")
        return cluster


Filters.model_rebuild()
