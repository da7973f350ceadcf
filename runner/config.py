"""What a run.yaml may say. Checks, never derives: what follows from it is `plan/`'s.

Torch-free, so that `trimpot plan` and an editor's schema answer at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from trimpot.runner.config_faults import describe, keys_of
from trimpot.runner.errors import ConfigError
from trimpot.runner.redact import find_secret

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Auto = Literal["auto"]


def _one_line(text: str) -> str:
    if "\n" in text or "\0" in text:
        raise ValueError("a path or name on one line is wanted")
    longest = max(len(part.encode()) for part in text.split("/"))
    if longest > 255:
        raise ValueError(f"a name of {longest} bytes is in it; file systems take 255")
    if len(text) > 4096:
        raise ValueError(f"it has {len(text)} characters; paths have 4096 at most")
    return text


Name = Annotated[str, Field(min_length=1), AfterValidator(_one_line)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=False,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class ModelSection(Section):
    path: Name
    """Folder with config.json and safetensors, or a Hugging Face id such as `org/name`."""
    revision: Name | None = None
    """Branch, tag or commit of a Hugging Face id."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """transformers' attention implementation."""
    activation_checkpointing: bool | Literal["selective", "auto"] = False
    """true: recompute each layer in backward, about a third more time for far less memory.
    selective: of each layer only gate and up, a tenth more time for half the memory. auto: the
    least of these that the plan finds to fit, selective in as few layers as do."""
    selective_layers: Positive | None = None
    """Under selective: in so many layers, from the first; without it in all."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4 holds the frozen linear layers in 4 bits (QLoRA: Dettmers et al. 2023); method lora."""
    double_quant: bool = True
    """Under nf4, quantise the scales of the blocks too: 0.516 bytes a weight, 0.5625 without."""

    @model_validator(mode="after")
    def _details_of_something(self) -> ModelSection:
        if "double_quant" in self.model_fields_set and self.quantization != "nf4":
            raise ValueError(
                "double_quant is set, but quantization is none; set quantization: nf4 or remove it"
            )
        if self.selective_layers is not None and self.activation_checkpointing != "selective":
            raise ValueError(
                "selective_layers is set, but activation_checkpointing is not selective; set "
                "activation_checkpointing: selective or remove it"
            )
        return self


class AdapterSection(Section):
    lora_rank: Annotated[int, Field(ge=1, le=256)] = 16
    """Rank r of the update B·A (Hu et al. 2021)."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by lora_alpha / lora_rank."""
    lora_dropout: Fraction = 0.0
    """Dropout on the input of A while training."""
    target_modules: Literal["all-linear"] | list[Name] = "all-linear"
    """Names of the linear layers to adapt (last part of the name); all-linear spares the head."""
    lora_init: Literal["random", "quantization_error"] = "random"
    """random: B is zero, as PEFT has it. quantization_error, under nf4: the update starts as what
    4 bits took from the outputs, as far as it goes (Zhang et al. 2024, "QERA"); such an adapter
    is for the base in NF4, or for a merged export."""


class FreezeSection(Section):
    trainable: Annotated[list[Name], Field(min_length=1)]
    """Shell patterns over parameter names, such as `model.layers.29.*`. The rest is frozen."""


class DataSection(Section):
    train: Name
    """JSONL, JSON, Parquet or CSV file, or a folder saved by `datasets`."""
    eval: Name | None = None
    """Held-out data of the same form. Without it, `eval_fraction` of train is held out."""
    eval_fraction: Annotated[float, Field(ge=0, lt=0.9)] = 0.05
    """Share of train that is held out, chosen by content: duplicates stay on one side."""
    format: Literal["auto", "chat", "prompt_completion", "text"] = "auto"
    """auto goes by the columns: messages | prompt + completion | text."""
    messages_column: Name = "messages"
    """Column of chat rows: a list of {role, content}."""
    prompt_column: Name = "prompt"
    """Column with what the model is asked; not trained."""
    completion_column: Name = "completion"
    """Column with what it learns to answer."""
    text_column: Name = "text"
    """Column of plain text, all of it trained."""
    system_prompt: str | None = None
    """Put before each conversation that has no system message of its own."""
    chat_template: str | None = None
    """Jinja text that replaces the tokenizer's own template."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens per sample."""
    overlong: Literal["drop", "truncate", "error"] = "truncate"
    """What happens to a sample over max_length. Truncation keeps the beginning."""
    packing: bool = False
    """Fill rows of max_length with several samples, each with its own positions and attention."""

    @model_validator(mode="after")
    def _eval_once(self) -> DataSection:
        if self.eval is not None and "eval_fraction" in self.model_fields_set:
            raise ValueError("eval and eval_fraction are both set; keep one of them")
        return self


class OptimSection(Section):
    batch_size: Annotated[int, Field(gt=0, le=2**20)] = 16
    """Samples per optimizer step, over all workers and accumulation steps."""
    micro_batch_size: Positive | Auto = "auto"
    """Samples that one worker runs through the model at a time."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Times through the training data; parts of one are allowed."""
    max_steps: Annotated[int, Field(gt=0, le=10**9)] | None = None
    """Optimizer steps. Without this and epochs: one epoch."""
    learning_rate: Annotated[float, Field(gt=0, lt=10)] = 2e-4
    """The highest; `schedule` leads away from it."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up; cosine and linear end at `final_fraction`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises from 0."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of learning_rate that the schedule ends at."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled, and on matrices only."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's averages of gradient and squared gradient."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's guard against division by zero."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm; null leaves them."""

    @model_validator(mode="after")
    def _one_length(self) -> OptimSection:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps are both set; keep one of them")
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} leaves nothing of max_steps {self.max_steps}; "
                "set fewer warm-up steps"
            )
        if self.micro_batch_size != "auto" and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of micro_batch_size "
                f"{self.micro_batch_size}; the next that is: "
                f"{-(-self.batch_size // self.micro_batch_size) * self.micro_batch_size}"
            )
        return self


class WorkersSection(Section):
    min: Positive = 1
    """Fewer than these do not start."""
    max: Positive
    """More than these are not used."""

    @model_validator(mode="after")
    def _min_below_max(self) -> WorkersSection:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is over max {self.max}")
        return self


def _form_of_workers(value: Any) -> str:
    return "range" if isinstance(value, (dict, WorkersSection)) else "count"


Workers = Annotated[
    Annotated[Positive | Auto, Tag("count")] | Annotated[WorkersSection, Tag("range")],
    Discriminator(_form_of_workers),
]


class FleetSection(Section):
    workers: Workers = "auto"
    """Ray Train workers; auto: one per GPU of the cluster, or one on a machine without.
    {min, max}: as many as there is room for, anew whenever nodes come or go."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Failures in a row, without a new checkpoint between them, that a run survives. Nodes that
    were taken back with notice do not count; on `preemptible` fleets no lost node does."""
    nodes: Positive = 1
    """Machines, for `trimpot plan` and the price; Ray places the workers where it has room."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] | Auto = "auto"
    """0 trains on the CPU; auto: 1 where the cluster has enough."""
    cpus_per_worker: Positive = 1
    """CPU cores that Ray keeps for each worker."""
    gpu: Name | None = None
    """Name of the GPU, such as H100-80GB. Its memory then need not be given."""
    memory_per_worker: Annotated[int, Field(gt=0)] | None = None
    """Bytes that one worker may use; measured where it is not given."""
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    """US$ for the whole fleet."""
    preemptible: bool = False
    """The machines may be taken away at any time."""
    zero_stage: Literal[0, 1, 2, 3] | Auto = "auto"
    """DeepSpeed ZeRO; auto takes the lowest stage whose predicted memory fits."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory."""
    sequence_parallel_size: Positive = 1
    """Workers that share each row of tokens, for rows too long for one (Jacobs et al. 2023,
    "DeepSpeed Ulysses"). Divides workers and the model's attention heads."""
    grow_after_s: Annotated[float, Field(ge=0)] = 30
    """How long new room must have stood before a run of {min, max} workers grows into it, where
    that saves more time than a restart costs."""
    start_timeout_s: Annotated[float, Field(ge=0)] = 120
    """How long a cluster may take to have room for the workers: nodes join, or are started."""
    network_interface: Name | None = None
    """Interface the workers talk over (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)."""

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """(min, max) where the number of workers may change, else None."""
        said = self.workers
        return (said.min, said.max) if isinstance(said, WorkersSection) else None

    @property
    def most_workers(self) -> int | None:
        """The most that are asked for; None under auto."""
        if isinstance(self.workers, WorkersSection):
            return self.workers.max
        return None if self.workers == "auto" else self.workers


def _off(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


KernelBackend = Annotated[
    Literal["auto", "torch", "cpp", "triton", "vendor", "off"], BeforeValidator(_off)
]


class KernelsSection(Section):
    default: KernelBackend = "auto"
    """For every op without a word of its own. auto: triton on GPUs, C++ on CPUs, else torch; off
    leaves the model's own code in place. One that is asked for and can't run is an error."""
    lora_linear: KernelBackend | None = None
    """Adapted layers: base product, update and dropout; q, k, v and gate, up as one."""
    linear_cross_entropy: KernelBackend | None = None
    """Head and loss, a chunk of tokens at a time: the logits are never whole."""
    add_rms_norm: KernelBackend | None = None
    """Residual add and RMS norm."""
    rope: KernelBackend | None = None
    """Rotary embedding of q and k, with their norms where the model has them."""
    varlen_attention: KernelBackend | None = None
    """Attention that keeps packed documents apart without a mask, windows and soft caps in it. auto
    takes vendor first on GPUs in bf16: FlashAttention, 3 or 4 where installed, else torch's 2."""
    swiglu: KernelBackend | None = None
    """silu(gate) · up."""
    geglu: KernelBackend | None = None
    """gelu(gate) · up."""
    nf4: KernelBackend | None = None
    """4-bit weights to the type of the activations, layer by layer."""
    adamw_step: KernelBackend | None = None
    """The optimizer's update, in one pass over memory."""
    cpu_gemm: Literal["auto", "fp32", "int16", "bf16x3", "int8"] = "auto"
    """Arithmetic of products with frozen weights on CPUs: fp32; int16 in block fixed point (error
    1.5e-4 of the result, where bf16 has 2.9e-3); bf16x3 on AMX tiles (4e-6); int8 (1e-2). auto:
    fp32 under precision fp32, else the fastest that is at least as close as bf16: never int8."""


def _store_url(text: str) -> str:
    """A URL that names a place in a store, and no secret; no part of it is said in the errors."""
    url = urlsplit(text)
    # Not urlsplit's own password: a secret may hold slashes.
    user, at, _ = text.partition("://")[2].partition("@")
    if (at and ":" in user) or url.query or url.fragment:
        raise ValueError(
            "passwords and queries do not belong in a URL; name the place alone, such as "
            "s3://bucket/run, and give credentials by environment (AWS_ACCESS_KEY_ID, …)"
        )
    if not url.scheme or "://" not in text or "::" in text:
        raise ValueError("it is no URL of a store; s3://bucket/run, gs://…, file:///… is wanted")
    if url.scheme == "memory":
        raise ValueError("memory:// ends with its process; s3://bucket/run, gs://… is wanted")
    if url.scheme == "file" and url.netloc:
        raise ValueError("a path from the root is wanted, with three slashes: file:///mnt/store")
    if not (url.netloc + url.path).strip("/"):
        raise ValueError("it names no place in the store; s3://bucket/run is wanted")
    return text.rstrip("/")


StoreUrl = Annotated[Name, AfterValidator(_store_url)]


class CheckpointSection(Section):
    every_steps: Positive | Auto = "auto"
    """Optimizer steps between checkpoints; the last step always has one. auto: every √(2 · C · M)
    seconds, C what a save was measured to cost and M `hours_between_failures`."""
    hours_between_failures: Annotated[float, Field(gt=0)] = 24
    """Mean time between failures of the whole run, for `every_steps: auto`, as expected before any
    was met. Where `fleet.preemptible` is set and this is not, 4 are expected."""
    keep: Positive = 2
    """Checkpoints kept, the newest ones: on disk, and as many in `copy_to`."""
    copy_to: StoreUrl | None = None
    """Object store that every checkpoint is copied to, a place of this run's own: s3://bucket/run
    (pip install s3fs), gs://… (gcsfs), az://… (adlfs), file:///…. A run whose disk is gone goes on
    from there. Credentials by environment alone."""
    copy_verify: bool = False
    """Read each copy back and compare its SHA-256, besides its size."""
    copy_wait_s: Annotated[float, Field(ge=0)] = 300
    """How long a copy that fails is tried again at the run's end, which then ends with exit code 1.
    Before that, a failed copy is a warning, and the next checkpoint's turn."""

    @model_validator(mode="after")
    def _copies_have_a_place(self) -> CheckpointSection:
        extra = sorted({"copy_verify", "copy_wait_s"} & self.model_fields_set)
        if self.copy_to is None and extra:
            raise ValueError(f"{extra[0]} is set, but copy_to is not; set it, or remove {extra[0]}")
        return self

    @property
    def hours_said(self) -> float | None:
        """hours_between_failures; None where it is only the default."""
        said = "hours_between_failures" in self.model_fields_set
        return self.hours_between_failures if said else None


class HealthSection(Section):
    on_bad_step: Literal["skip", "stop"] = "skip"
    """A step is bad whose loss or gradient norm is not finite, or a spike. skip leaves weights and
    moments as they are and goes on with the next samples; stop ends the run before the update."""
    spike_threshold: Annotated[float, Field(ge=3)] | None = 10
    """How many times the usual deviation of its logarithm a loss or gradient norm may lie over the
    median of the last steps; null lets pass what is finite."""
    window: Annotated[int, Field(ge=32, le=4096)] = 128
    """Steps that the median and the deviation are of; nothing is a spike before 32."""
    rewind_after: Positive = 3
    """Bad steps in a row after which the run goes back to the newest checkpoint from before them,
    and on with the samples after them."""
    max_rewinds: Annotated[int, Field(ge=0)] = 2
    """Rewinds, without `window` good steps between them, that a run survives."""
    check_every: Positive | None = 100
    """Steps between two comparisons of the weights that workers must hold alike, and of frozen
    ones with what they were at the start; each checkpoint is preceded by one. null: never."""


class EvaluationSection(Section):
    every_steps: Positive | None = None
    """Held-out loss every so many steps; always before the first and after the last."""
    max_samples: Positive = 256
    """Held-out samples that are scored, the first of the split."""


class SamplesSection(Section):
    prompts: Annotated[int, Field(ge=0, le=16)] = 2
    """Held-out prompts answered before and after, for the report."""
    max_new_tokens: Annotated[int, Field(ge=1, le=1024)] = 48
    """Length of those answers, at most."""


class TrackingSection(Section):
    sinks: list[Literal["tensorboard", "mlflow", "wandb", "trackio"]] = []
    """Where metrics go besides the journal. A sink that fails is dropped with a warning."""
    project: Name = "trimpot"
    """Project or experiment that the sinks file the run under."""
    run_name: Name | None = None
    """Name in the sinks; without it, that of the run's folder."""


class Config(Section):
    """A run, as run.yaml states it."""

    model: ModelSection
    """What is trained."""
    task: Literal["causal_lm"] = "causal_lm"
    """What it is trained to do."""
    method: Literal["lora", "freeze", "full"] = "lora"
    """lora trains adapters, freeze the parameters that `freeze.trainable` names, full all."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of weights and activations; optimizer state is fp32 in both."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides the held-out split, the order of samples, the start of adapters, dropout."""
    deterministic: bool = False
    """Bit-equal results however often the number of workers changes: each micro-batch's gradient is
    computed apart, and they are added in fp32 in the order of their numbers. ZeRO stage 0; wants
    optim.micro_batch_size, and costs an exchange of gradients per micro-batch of a worker."""
    output_dir: Name
    """The run's folder: journal, checkpoints, adapter, report. On a cluster: on shared storage."""
    adapter: AdapterSection = AdapterSection()
    """What method lora adds."""
    freeze: FreezeSection | None = None
    """What method freeze trains."""
    data: DataSection
    """What it is trained on."""
    optim: OptimSection = OptimSection()
    """How it is trained."""
    fleet: FleetSection = FleetSection()
    """Where it is trained."""
    kernels: KernelsSection = KernelsSection()
    """What its operations run on."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When it is saved."""
    health: HealthSection = HealthSection()
    """What becomes of steps and weights that can't be right."""
    evaluation: EvaluationSection = EvaluationSection()
    """When the held-out loss is measured."""
    samples: SamplesSection = SamplesSection()
    """What is answered for the report."""
    tracking: TrackingSection = TrackingSection()
    """Where else metrics go."""

    @model_validator(mode="after")
    def _method_has_its_section(self) -> Config:
        if self.method == "freeze" and self.freeze is None:
            raise ValueError("method freeze wants freeze.trainable: the names that are trained")
        if self.method != "freeze" and self.freeze is not None:
            raise ValueError(f"freeze is set, but method is {self.method}; set method: freeze")
        if self.method != "lora" and "adapter" in self.model_fields_set:
            raise ValueError(
                f"adapter is set, but method is {self.method}; set method: lora or remove adapter"
            )
        return self

    @model_validator(mode="after")
    def _quantised_base_is_frozen(self) -> Config:
        if self.model.quantization == "none":
            return self
        if self.method != "lora":
            raise ValueError(
                f"model.quantization is nf4, which freezes the linear layers, but method is "
                f"{self.method}; set method: lora, or quantization: none"
            )
        if self.fleet.zero_stage == 3:
            raise ValueError(
                "model.quantization is nf4, whose weights ZeRO-3 can't partition: every worker "
                "holds them whole; set fleet.zero_stage 0, 1, 2 or auto"
            )
        return self

    @model_validator(mode="after")
    def _error_is_there_to_start_from(self) -> Config:
        if self.adapter.lora_init == "random":
            return self
        if self.model.quantization == "none":
            raise ValueError(
                "adapter.lora_init is quantization_error, but model.quantization is none; set "
                "quantization: nf4, or lora_init: random"
            )
        if self.fleet.sequence_parallel_size > 1:
            raise ValueError(
                "adapter.lora_init is quantization_error, for which each worker measures whole "
                f"rows, but fleet.sequence_parallel_size is {self.fleet.sequence_parallel_size}; "
                "set lora_init: random, or sequence_parallel_size: 1"
            )
        return self

    @model_validator(mode="after")
    def _determinism_has_its_shards(self) -> Config:
        if not self.deterministic:
            return self
        if self.fleet.zero_stage not in (0, "auto"):
            raise ValueError(
                "deterministic is true, whose order of sums ZeRO does not keep: set "
                f"fleet.zero_stage 0 or auto; {self.fleet.zero_stage} is set"
            )
        if self.fleet.offload_optimizer:
            raise ValueError(
                "deterministic is true, which runs at ZeRO stage 0, and fleet.offload_optimizer "
                "needs 1, 2 or 3; set offload_optimizer: false"
            )
        if self.optim.micro_batch_size == "auto":
            raise ValueError(
                "deterministic is true, whose sums are over micro-batches, and auto would make "
                "others on another fleet; set optim.micro_batch_size to a number"
            )
        return self

    @model_validator(mode="after")
    def _offload_has_a_stage(self) -> Config:
        if self.fleet.offload_optimizer and self.fleet.zero_stage == 0:
            raise ValueError("fleet.offload_optimizer needs zero_stage 1, 2 or 3; 0 is set")
        return self


MOST_FAULTS = 50
"""That are described; a file can have 100,000 unknown keys."""
COMMITS = ("model.revision",)
"""Keys whose 40 hex digits are no secret."""


def check_config(raw: dict[str, Any], source: str) -> Config:
    if found := find_secret(raw, spare=COMMITS):
        where, kind = found
        raise ConfigError(
            f"{source}: {where} looks like {kind}, and a run's settings are written into its "
            "folder; take it out and set it in the environment, where trackers and the hub look"
        )
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[:MOST_FAULTS]
        faults = [describe(fault, Config) for fault in first]
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise ConfigError(f"{source}: " + "; ".join([*dict.fromkeys(faults)][:3]) + more) from None


def all_keys() -> list[str]:
    """Every key of the config, dotted."""
    return keys_of(Config)


def json_schema() -> dict[str, Any]:
    """JSON schema of run.yaml, for editors."""
    return Config.model_json_schema()
