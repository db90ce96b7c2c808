"""The one configuration of a run: pydantic sections, a docstring under each field (meaning, unit, source).

Unknown keys are errors, values are frozen, what can be derived is a property. Rules that span sections live in `checks.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveFloat, PositiveInt, Tag

from dapo_megatron.config.slurm_text import Environment, Line, SlurmTime
from dapo_megatron.types import LossAggregation


class Section(BaseModel):
    """Base of all sections: closed, frozen, documented by attribute docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class RunConfig(Section):
    """Identity of the run."""

    dir: Path = Path("runs/default")
    """Run folder: metrics.jsonl, config.json, checkpoints/, logs/, tensorboard/."""
    seed: int = Field(0, ge=0)
    """Seeds data order, sampling and dropout. Same seed and layout: same metrics."""
    prepare: str | None = None
    """Import path `module:function`, called with the config before the checks; makes model.path and data.path when missing."""
    max_restarts: int = Field(0, ge=0)
    """How often `train` starts again from the newest checkpoint after a dead rank or engine."""


class ModelConfig(Section):
    """The policy: an HF directory. Its config.json is the only source of architecture."""

    path: Path
    """HF directory with config.json, safetensors weights and tokenizer files."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Parameter and compute dtype of the actor; the optimizer keeps fp32 master weights."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation. auto: transformer_engine where CUDA and the package exist, else local."""


class DataConfig(Section):
    """Training prompts."""

    path: str
    """JSONL or parquet file, or the name of a data set on a hub."""
    split: str = "train"
    """Split, for a hub data set."""
    prompt_field: str | None = None
    """Column with the problem (text or chat messages). None: `prompt`, `problem` or `question`, whichever exists."""
    answer_field: str | None = None
    """Column with the ground truth, dots descend (`reward_model.ground_truth`). None: that one or `answer`."""
    answer_pattern: str | None = None
    """Regular expression whose first group, searched in the answer column, is the ground truth; rows without a match are malformed."""
    prompt_template: str = "{problem}"
    """Text put around a plain-text problem. `{problem}` is replaced."""
    chat_template: bool = True
    """Apply the tokenizer's chat template. False: the text is tokenised as it is."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are left out (and counted)."""
    max_malformed_fraction: float = Field(0.01, ge=0, le=1)
    """Share of unreadable rows above which the run refuses to start."""
    shuffle: bool = True
    """New order each epoch, derived from run.seed."""


class RewardConfig(Section):
    """Rule-based reward. `dapo` is the released rule (Answer: N); `math` adds math-verify on what that rule extracted."""

    type: Literal["dapo", "math", "exact", "custom"] = "math"
    """dapo: released string rule. math: that rule, then math-verify. exact: stripped response equals the answer. custom: `function`."""
    function: str | None = None
    """Import path `module:function` for type custom: (response: str, answer: str) -> Score | float (> 0 means correct).

    The module is imported once, in a process that scorers are then forked from; it must start no threads while it is imported."""
    correct_reward: float = 1.0
    """Reward of a correct response (paper eq. 7)."""
    wrong_reward: float = -1.0
    """Reward of a wrong response (paper eq. 7)."""
    num_workers: PositiveInt = 2
    """Scorers: verifier processes that work side by side."""
    timeout_seconds: float = Field(5.0, gt=0)
    """Wall-clock limit of one verdict; a worker over it is killed, the sample counts as wrong."""
    max_response_chars: PositiveInt = 100_000
    """Only this many trailing characters of a response are scored."""
    memory_limit_mib: PositiveInt = 2048
    """Address-space growth a worker may use above its size at start, in MiB."""


class AlgoConfig(Section):
    """DAPO (arXiv 2503.14476)."""

    clip_ratio_low: float = Field(0.2, ge=0, lt=1)
    """Lower clip: ratio >= 1 - clip_ratio_low. Paper: 0.2."""
    clip_ratio_high: float = Field(0.28, ge=0)
    """Clip-higher: ratio <= 1 + clip_ratio_high. Paper: 0.28."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound c of dual clip: for negative advantages the objective is not below c * A (arXiv 1912.09729). None: off, as in the paper."""
    loss_aggregation: LossAggregation = "token_mean"
    """token_mean: all trained tokens of the optimizer step (the release). prompt_mean: eq. 8 read literally. sample_mean: GRPO."""
    normalize_advantage_by_std: bool = True
    """Divide by the group's standard deviation (eq. 9). False: mean-centred only."""
    advantage_std: Literal["population", "sample"] = "sample"
    """Divisor G (population) or G - 1 (sample, what the release computes)."""
    dynamic_sampling: bool = True
    """Drop groups whose accuracy is 0 or 1 and sample on until num_prompts_per_step are left."""
    accuracy_min: float = Field(0.0, ge=0, lt=1)
    """Dynamic sampling also drops groups whose accuracy is below this (too hard)."""
    accuracy_max: float = Field(1.0, gt=0, le=1)
    """Dynamic sampling also drops groups whose accuracy is above this (too easy)."""
    overlong_cache_tokens: int = Field(0, ge=0)
    """L_cache of soft overlong punishment (eq. 13): the penalty grows over the last so many tokens before max_response_tokens. 0: off."""
    overlong_filtering: bool = False
    """Leave truncated samples out of the loss."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of an entropy bonus per trained token. Paper: 0."""
    old_log_probs: Literal["actor", "engine"] = "actor"
    """actor: a forward pass with the weights that sampled. engine: the log-probs the engine reported."""
    tis_clip: float | None = Field(None, gt=0)
    """Truncated importance sampling: each token weighs min(pi_old / pi_rollout, tis_clip), pi_old being the actor at the start of the
    rollout step; 2 is usual. None: off; tokens of older weights take the engine's log-probs as old ones."""


class TrainConfig(Section):
    """Sizes of a step."""

    num_rollout_steps: PositiveInt = 100
    """Rollout steps of the run."""
    num_prompts_per_step: PositiveInt = 512
    """Groups trained on per rollout step. Paper: 512."""
    num_samples_per_prompt: int = Field(16, ge=2)
    """G, samples per prompt. Paper: 16."""
    num_updates_per_rollout: PositiveInt = 16
    """Optimizer steps per rollout step. Paper: 16."""
    rollout_lag: Literal[0, 1] = 0
    """0: sample with the weights about to be trained. 1: the engines sample for the next step while this one trains, with weights one
    version older; algo.tis_clip corrects for it."""
    stop_at_accuracy: float | None = Field(None, gt=0, le=1)
    """End the run when the mean rollout/accuracy of the last 10 steps reaches this."""
    record_batch_of_step: PositiveInt | None = None
    """Rollout step (from 1, as in metrics.jsonl) whose batch is kept in RUN/batches, for `compare-layouts --batch`. None: none."""


class OptimizerConfig(Section):
    """AdamW with linear warm-up, then a constant learning rate."""

    lr: float = Field(1e-6, gt=0)
    """Learning rate after warm-up. Paper: 1e-6."""
    num_warmup_rollout_steps: int = Field(20, ge=0)
    """Rollout steps over which lr grows linearly from 0. Paper: 20."""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW weight decay (matrices only). Release: 0.1."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW beta1."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW beta2."""
    eps: float = Field(1e-8, gt=0)
    """AdamW epsilon."""
    clip_grad: float = Field(1.0, ge=0)
    """Global gradient norm bound; 0: no clipping. Release: 1.0."""


class ActorConfig(Section):
    """The megatron-core ranks that train."""

    num_ranks: PositiveInt | None = None
    """Processes (one GPU each on GPUs). None: tensor x pipeline x context, so data_parallel_size 1."""
    tensor_parallel_size: PositiveInt = 1
    """TP."""
    pipeline_parallel_size: PositiveInt = 1
    """PP."""
    virtual_pipeline_size: PositiveInt | None = None
    """VPP: model chunks per pipeline rank. None: no interleaving."""
    num_layers_in_first_pipeline_stage: PositiveInt | None = None
    """Layers of the first stage, which also holds the embedding. None: as many as a middle stage."""
    num_layers_in_last_pipeline_stage: PositiveInt | None = None
    """Layers of the last stage, which also holds the LM head. None: as many as a middle stage."""
    context_parallel_size: PositiveInt = 1
    """CP: ranks that share out the tokens of each sequence. Samples of one prompt compute it each for itself then."""
    expert_parallel_size: PositiveInt = 1
    """EP: ranks that share out the experts of a layer. Divides tensor x context x data-parallel ranks."""
    expert_tensor_parallel_size: PositiveInt = 1
    """ETP: ranks that an expert is cut over; tensor_parallel_size is for the layers outside the experts."""
    sequence_parallel: bool = False
    """Shard activations outside attention and MLP over the tensor-parallel ranks. Needs tensor_parallel_size > 1."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel and context-parallel ranks."""
    pad_query_groups: bool = False
    """Let tensor_parallel_size not divide the model's query groups: all-zero groups are added, at the cost of their attention FLOPs."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recompute: selective recomputes core attention, full every layer."""
    max_tokens_per_micro_batch: PositiveInt = 16384
    """Packed tokens of one micro-batch, over all context-parallel ranks; a longer single sequence gets a micro-batch of its own."""
    log_prob_chunk_tokens: PositiveInt = 1024
    """Tokens whose logits exist at the same time in the LM head."""
    offload: bool = False
    """Keep parameters and optimizer state in pinned host memory, and no gradient buffers, while engines generate on the same devices;
    for cluster.placement colocated. Each rank needs as much host memory."""
    num_threads: PositiveInt = 1
    """CPU threads of a rank."""
    optimizer: OptimizerConfig = OptimizerConfig()
    megatron_extra: dict[str, Any] = {}
    """Further fields of megatron-core's TransformerConfig, passed through; names are checked."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that train on a batch share together: tensor x pipeline x context."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def world_size(self) -> int:
        """Actor ranks of the run."""
        return self.num_ranks or self.model_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Shares of a batch that are trained on at the same time; `checks.py` proves that it divides."""
        return self.world_size // self.model_parallel_size

    @property
    def num_weight_copies(self) -> int:
        """Copies of the weights: context-parallel ranks have one each."""
        return self.data_parallel_size * self.context_parallel_size


HF_PREFILL_TOKENS = 16384
"""Padded prompt tokens of one forward pass of an embedded engine, where more than one prompt enters."""


class HfEngineConfig(Section):
    """Embedded engine: a transformers model with continuous batching. For one machine, CPU or GPU."""

    type: Literal["hf"] = "hf"
    max_batch_size: PositiveInt = 256
    """Sequences decoded together."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Compute dtype of the engine."""
    num_threads: PositiveInt | None = None
    """CPU threads. None: the cores of the machine divided by num_engines; with cluster.backend local those of the actor."""


class SglangEngineConfig(Section):
    """SGLang servers, one process tree per engine: started by the run, or running already (`engine_urls`)."""

    type: Literal["sglang"] = "sglang"
    tensor_parallel_size: PositiveInt = 1
    """Ranks (GPUs) of one engine."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Compute dtype of the engine."""
    num_threads: PositiveInt | None = None
    """CPU threads of a rank, where there is no GPU. None: the cores of the machine divided by the ranks of all engines."""
    mem_fraction_static: float | None = Field(None, gt=0, lt=1)
    """Share of the device's memory for weights and KV cache. None: SGLang's own choice."""
    max_running_requests: PositiveInt | None = None
    """Sequences decoded together. None: what the KV cache holds."""
    max_total_tokens: PositiveInt | None = None
    """Size of the KV cache, in tokens. None: what mem_fraction_static leaves; 65536 where there is no GPU."""
    stream_interval_tokens: PositiveInt = 32
    """The controller hears of new tokens in pieces of this size; what it has heard of survives the engine."""
    pause_mode: Literal["retract", "in_place"] = "retract"
    """How engines that keep their memory wait for new weights with the samples of rollout.partial_rollout. retract: the KV cache is
    computed again under them; log-probs are those of the version they name. in_place: it stays, of the older weights; nothing is
    computed again, and log-probs are those of the new weights over the old cache."""
    return_routed_experts: bool = False
    """Keep with each sample the experts that its tokens went to, layers x top_k bytes a token (twice that beyond 256 experts). Needs a
    model with experts. Nothing is done with them yet."""
    engine_urls: tuple[str, ...] = ()
    """Servers that run already, e.g. `http://10.0.0.7:30000`; the run neither starts nor stops nor restarts them. Empty: it does."""
    api_key_env: str | None = None
    """Environment variable with the API key of `engine_urls`. None: they want none."""
    weight_transport: Literal["auto", "tensor", "distributed", "disk"] = "auto"
    """How weights reach the engine. tensor: memory shared on one node. distributed: broadcast. disk: files in weight_sync_dir.
    auto: tensor for an engine on the node of actor rank 0, else distributed."""
    weight_sync_dir: Path | None = None
    """For weight_transport disk: a folder that actor and engines see under the same path."""
    health_interval_seconds: float = Field(5.0, gt=0)
    """Time between two looks at the health of an engine."""
    health_deadline_seconds: float = Field(60.0, gt=0)
    """An engine that gives no sign of health for so long is replaced, and its requests go to others."""
    restart_deadline_seconds: float = Field(900.0, gt=0)
    """The run ends when no engine at all has served for so long."""


def _engine_type(value: Any) -> Any:
    return value.get("type", "hf") if isinstance(value, dict) else getattr(value, "type", None)


EngineConfig = Annotated[
    Annotated[HfEngineConfig, Tag("hf")] | Annotated[SglangEngineConfig, Tag("sglang")], Discriminator(_engine_type)
]
"""By `type`; hf where none is given."""


class RolloutConfig(Section):
    """Generation of responses."""

    engine: EngineConfig = HfEngineConfig()
    """hf: the embedded engine. sglang: SGLang servers."""
    sglang_extra: dict[str, Any] = {}
    """Further arguments of SGLang's ServerArgs for `engine.type: sglang`, passed through; names are checked."""
    num_engines: PositiveInt = 1
    """Engines; requests are spread over them."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the actor's log-probs use the same. Paper: 1.0."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus. Paper: 1.0."""
    top_k: PositiveInt | None = None
    """Keep the k most likely tokens. None: all."""
    max_response_tokens: PositiveInt = 20480
    """Generation stops here (truncated). Paper: 20480."""
    sampler: Literal["waves", "streaming"] = "waves"
    """waves: as many prompts as the missing groups need, judged together; the same seed gives the same run. streaming: prompts all the
    time, and the step ends with the group that fills it; faster, but which groups come first decides."""
    in_flight_margin: float = Field(0.0, ge=0)
    """streaming: share of groups in flight beyond what the running acceptance rate calls for."""
    partial_rollout: bool = False
    """streaming: groups that are unfinished when a step is full go on in the next, under the new weights. False: they start again. Engines
    are paused meanwhile (engine.pause_mode); those that share GPUs with the actor, and the embedded one, compute their prefixes again."""
    max_over_sampling: float = Field(8.0, ge=1)
    """Groups generated for one step, in multiples of num_prompts_per_step."""
    on_limit: Literal["smaller_step", "error"] = "smaller_step"
    """At that limit the step is smaller, with a warning, or the run ends with an error."""
    max_staleness: int = Field(1, ge=0)
    """A group may be trained on when its oldest token is at most so many weight versions old: surplus and partial groups, and all
    with train.rollout_lag."""
    weight_bucket_mib: PositiveInt = 512
    """Size of one piece of the weight sync, in MiB."""
    compare_weight_copies: bool = True
    """End the run at the weight sync when ranks that hold the same weights (data-parallel ones, norms of tensor-parallel ones) differ in a
    bit. False where kernels are known to let them drift: then what the first of them holds is sent."""


class EvalConfig(Section):
    """Accuracy on held-out problems: during a run, and by `dapo-megatron evaluate`."""

    path: str | None = None
    """Held-out problems: JSONL or parquet file, or the name of a data set on a hub. None: no evaluation."""
    interval: int = Field(0, ge=0)
    """Rollout steps between evaluations; the last step is always evaluated. 0: only then."""
    num_samples: PositiveInt = 1
    """Responses per problem; eval/accuracy is their mean (avg@num_samples). Paper: 32."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 is greedy. Paper: 1.0."""
    top_p: float = Field(0.7, gt=0, le=1)
    """Nucleus. Paper: 0.7."""
    max_response_tokens: PositiveInt | None = None
    """Generation stops here (truncated). None: rollout.max_response_tokens."""
    sampling_seed: int = Field(1, ge=0)
    """Seeds the draws; the same at every step and in every run, and no part of the run's own."""
    prompt_field: str | None = None
    """Column with the problem. None: as in `data`."""
    answer_field: str | None = None
    """Column with the ground truth. None: as in `data`."""
    answer_pattern: str | None = None
    """Regular expression whose first group is the ground truth. None: as in `data`."""
    prompt_template: str | None = None
    """Text put around a plain-text problem. None: as in `data`."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: int = Field(50, ge=0)
    """Rollout steps between checkpoints; the last step is saved too. 0: none but that of a run told to stop by SIGUSR1 or SIGTERM."""
    keep_last: PositiveInt = 2
    """Complete checkpoints kept."""
    keep_every: PositiveInt | None = None
    """Of checkpoints at multiples of this many rollout steps the weights are kept for good, without the optimizer. None: of none."""
    resume: bool = True
    """Go on from the newest complete checkpoint in the run folder. False: the folder must hold none."""
    load: Path | None = None
    """Start from this checkpoint of another run (weights, optimizer and position). An unusable path is an error."""
    allow_changed: tuple[str, ...] = ()
    """What may differ from the run that saved: config paths or sections, `data`, `code`, `versions`, `canary`."""


class LogProbDiffAlarm(Section):
    """When actor and engine disagree about the log-probabilities of the same tokens, `actor/log_prob_diff_*`."""

    mean: Literal["auto"] | PositiveFloat | None = "auto"
    """Alarm above this actor/log_prob_diff_mean, in nats. auto: 1e-3 with actor and engine in fp32, else 0.05. None: off."""
    max: Literal["auto"] | PositiveFloat | None = "auto"
    """Alarm above this actor/log_prob_diff_max, in nats. auto: 0.05 with both in fp32, else off: bf16 has rare tokens off by 1."""
    action: Literal["warn", "stop"] = "warn"
    """warn: a line on the console in each such step. stop: end the run with an error."""


class MetricsConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard events to the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project. None: off."""
    log_prob_diff_alarm: LogProbDiffAlarm = LogProbDiffAlarm()


class ClusterConfig(Section):
    """Processes and placement."""

    backend: Literal["ray", "local"] = "ray"
    """ray: a process for each rank and engine. local: one rank and one embedded engine in the controller's own process, for small
    models and debuggers."""
    ray_address: str | None = None
    """Address of a running Ray cluster. None: a local Ray for this run."""
    placement: Literal["colocated", "split"] = "colocated"
    """colocated: engines share the actor's devices and take turns. split: their own."""
    tensor_parallel_across_nodes: bool = False
    """Let a tensor-parallel group span nodes, for nodes that NVLink joins (GB200 NVL72): over a network every layer would wait for it."""
    gpu: str | None = None
    """Kind of GPU the run gets, as `dapo-megatron plan --gpu` names it (h100-80): what will not fit on it is said before anything
    starts. None: not checked."""
    gpu_file: Path | None = None
    """YAML file with GPUs of your own, in the form of dapo_megatron/layout/gpus.yaml; its names may stand in gpu, and with one entry need not."""
    startup_deadline_seconds: float = Field(600.0, gt=0)
    """Longest time for ranks and engines to come up."""
    phase_deadline_seconds: float | None = Field(None, gt=0)
    """A phase (rollout, train, sync, save, eval) that takes longer has stalled: its processes' stacks go to RUN/stalls, and the run ends
    with exit code 86. None: learnt, 10 times the longest so far but at least 10 minutes; an hour until a phase has ended three times."""

    @property
    def unlearnt_deadline_seconds(self) -> float:
        """Of a phase without a history."""
        return self.phase_deadline_seconds or 3600.0

    @property
    def collective_timeout_seconds(self) -> float:
        """Of a collective call among ranks: later than the phase's own deadline, which explains itself."""
        return 4 * self.unlearnt_deadline_seconds


class SlurmConfig(Section):
    """The job of a run: `dapo-megatron submit` writes it into one batch script. `train` alone looks at none of it."""

    nodes: PositiveInt = 1
    """Nodes of the actor ranks, and of the engines unless rollout_nodes is given."""
    gpus_per_node: int = Field(8, ge=0)
    """GPUs of a node. 0: none are asked for, ranks and engines run on CPUs."""
    gpu_type: Line | None = None
    """Type of those GPUs, as the cluster names it (`h100`). None: any."""
    cpus_per_node: PositiveInt | None = None
    """CPUs of a node. None: all with `exclusive`, else Slurm's default."""
    memory: Line | None = None
    """Memory of a node, as Slurm writes it (`500G`). None: all with `exclusive`, else Slurm's default."""
    exclusive: bool = True
    """Share the nodes with no other job."""
    time: SlurmTime = "24:00:00"
    """Time limit of one attempt: minutes, or Slurm's forms (24:00:00, 2-12:00:00)."""
    partition: Line | None = None
    """Partition. None: the cluster's default."""
    account: Line | None = None
    """Account. None: the user's default."""
    qos: Line | None = None
    """Quality of service. None: the default."""
    job_name: Line | None = None
    """Name in the queue. None: that of the run folder."""
    sbatch: tuple[Line, ...] = ()
    """Further options of sbatch, e.g. `--constraint=ib`; one #SBATCH line each."""
    rollout_nodes: int = Field(0, ge=0)
    """Nodes of another kind that hold the engines (a heterogeneous job); needs cluster.placement split. 0: none."""
    rollout_gpus_per_node: int | None = Field(None, ge=0)
    """GPUs of such a node. None: as gpus_per_node."""
    rollout_partition: Line | None = None
    """Their partition. None: as `partition`."""
    rollout_sbatch: tuple[Line, ...] = ()
    """Further options of sbatch for them."""
    max_restarts: int = Field(10, ge=0)
    """How often the job puts itself back into the queue: after the time limit, a lost node, a stall or a failure that may not repeat."""
    signal_lead_seconds: int | None = Field(None, ge=1, le=65535)
    """How long before the time limit the run is asked to save. None: from the times that the run has measured, at first 600."""
    modules: tuple[Line, ...] = ()
    """Environment modules to load."""
    environment: Environment = {}
    """Environment variables of the job, by name."""
    setup: tuple[str, ...] = ()
    """Lines of shell that run in the batch script before the run, as they are."""
    python: str | None = None
    """Interpreter that has this package. None: the one `submit` runs in, or python3 in a container."""
    container: str | None = None
    """Image: for pyxis a name or a .sqsh file, for Apptainer a .sif file or a URI. None: no container."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What starts the container."""
    container_mounts: tuple[str, ...] = ()
    """Further folders to see in the container, SOURCE or SOURCE:TARGET; the run folder and the working directory are seen anyway."""
    preflight: bool = True
    """Check the nodes of the job before the run starts."""
    exclude_bad_nodes: bool = False
    """Go back into the queue without a node that does not pass. False: the job ends and names it."""
    network: str | None = None
    """Network in which addresses of the nodes must lie, e.g. `10.0.0.0/8`. None: any private one."""
    first_port: int = Field(20000, ge=1024, le=65535)
    """Smallest port that the job may use on a node."""
    last_port: int = Field(32767, ge=1024, le=65535)
    """Largest one."""


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    algo: AlgoConfig = AlgoConfig()
    train: TrainConfig = TrainConfig()
    actor: ActorConfig = ActorConfig()
    rollout: RolloutConfig = RolloutConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    cluster: ClusterConfig = ClusterConfig()
    slurm: SlurmConfig = SlurmConfig()

    @property
    def max_eval_response_tokens(self) -> int:
        """Where the responses of an evaluation are truncated."""
        return self.eval.max_response_tokens or self.rollout.max_response_tokens

    @property
    def eval_data(self) -> DataConfig | None:
        """How the held-out problems are read: `data` with what `eval` says; None without `eval.path`."""
        own = ("path", "prompt_field", "answer_field", "answer_pattern", "prompt_template")
        given = {name: value for name in own if (value := getattr(self.eval, name)) is not None}
        return self.data.model_copy(update=given) if self.eval.path is not None else None
