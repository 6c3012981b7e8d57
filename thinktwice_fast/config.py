"""Every option: its name, type, default, bounds and help text, in this one place.

A dataclass per owner; the string under each field is its ``--help`` text. The defaults are the
``tiny`` recipe, so that ``torchrun thinktwice_fast/train.py`` alone trains something. ``run/checks.py`` says
what combinations are refused.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from thinktwice_fast.bounds import MOST_SECONDS, bounded
from thinktwice_fast.thinktuning_options import ThinkTuningOptions

_PUBLISHED_MINIBATCH = 8  # problems


@dataclass
class ModelOptions:
    """Which language model, and how it is computed."""

    path: str = "tiny"
    """Model folder in transformers format, a hub name, or "tiny" for the warm-started model shipped here."""
    random_init: bool = False
    """Keep the config and tokenizer of `path` but start from random weights drawn from `seed`."""
    chat_template: str | None = None
    """File with a Jinja chat template, for a tokenizer that has none (or to replace its own)."""
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template (Qwen3: {enable_thinking: false})."""
    strip_default_system: bool = False
    """Leave out the system block that the chat template writes where a chat has none of its own (OLMo-3)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; "auto" takes a GPU when there is one."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and activations in forward and backward; master weights stay float32. "auto": bfloat16 on
    CUDA, float32 on the CPU."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    lora_rank: int = bounded(0, least=0)
    """Rank of LoRA adapters (through peft), which are then trained in place of the model's weights; 0 = no LoRA."""
    lora_alpha: float = bounded(32.0, above=0)
    """What they add to a layer is multiplied by this over their rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that get adapters (q_proj, v_proj, ...); none = all but the head."""


@dataclass
class DataOptions:
    """Where training problems come from."""

    source: str = "arithmetic:tm5"
    """A jsonl, parquet or csv file, a hub dataset name, or "arithmetic:tm5" / "arithmetic:te5" made by the program."""
    subset: tuple[str, ...] | str | None = None
    """Configuration name of a hub dataset (GSM8K: "main"), or several, whose problems follow each other."""
    split: str = "train"
    """Split of a hub dataset."""
    question_column: str | None = None
    """Column with the question text, or a field `column.field` in one. Default: the verl schema's `prompt`, else
    `question`, else `problem`."""
    context_column: str | None = None
    """Column with text that is put before the question where there is any."""
    answer_column: str | None = None
    """Column with the gold answer, a field `column.field` or a place in a list `column.0`. Default: the verl schema's
    `reward_model.ground_truth`, else `answer`, else `solution`. Of an answer in GSM8K's form the part after the last
    "####" is taken, of a worked one the content of the last \\boxed{}; true and false are yes and no."""
    choices_column: str | None = None
    """Column with the options of a multiple-choice question, a list of texts or {label: [...], text: [...]}: they are
    shown as A, B, C, ..., and the answer column names the right one."""
    wrong_columns: tuple[str, ...] = ()
    """Columns with a wrong option each, where the answer column holds the right option's text; shown in an order drawn
    from `choices_seed`."""
    choices_seed: int = bounded(0, least=0)
    """Seed of the order of options from `wrong_columns`; the run's `seed` does not touch it."""
    target_column: str | None = None
    """Column with a full worked response, for `algorithm: sft`; or with a whole chat, a list of {role, content} such as
    TRL's `messages`, whose last turn, an assistant's, is the response: a question, a draft and a request to recheck may
    come before it. Then no other column is read."""
    instruction: str = ""
    """Text appended to every question, after a space, or a blank line after options (how to reason, how to give the
    answer); not to one that holds it already, or asks for a \\boxed{} as it does, such as most verl-schema prompts."""
    limit: int = bounded(0, least=0)
    """Use only the first so many problems; 0 = all."""
    shuffle: bool = True
    """Visit the problems in a new random order each epoch, drawn from `seed`."""


@dataclass
class ThinkTwiceOptions:
    """The solve/refine pair of ThinkTwice."""

    pairing: Literal["sequential", "joint"] = "sequential"
    """"sequential" = a solve step, its update, a refine step by the updated policy, its update; "joint" = solve and
    refine under one policy, then one update on both, all in one step."""
    base_selection: Literal["uniform", "wrong_first"] = "uniform"
    """Which of a problem's solutions becomes the base of its refine group: any one at random, or a wrong one
    where there is one."""
    refine_every: int = bounded(1, least=1)
    """Solve steps to each refine step, which refines solutions of the last of them; 1 = as published. With "joint"
    pairs every solve step has its refinements."""
    refine_instruction: str = "default"
    """The user message after the base solution, or a .txt or .md file with it; "default" = the paper-style
    task-agnostic instruction, or the word "recheck" for the shipped model and arithmetic."""


@dataclass
class DapoOptions:
    """Dynamic sampling and overlong shaping (`algorithm: dapo`)."""

    max_draws: int | Literal["off"] = bounded(10, least=1)
    """Draws, each of up to `problems_per_step` problems, in which a step has to find as many whose samples are not all
    rewarded alike, before the run stops with an error; "off" = no bound. (In a YAML file write 'off' with quotes.)"""
    overlong_buffer_tokens: int | None = bounded(None, least=0)
    """Rewards fall over so many tokens before `rollout.max_response_tokens`, linearly; null = a fifth of these, as
    published (4096 of 20480); 0 = off."""
    overlong_penalty: float = bounded(1.0, least=0)
    """How far they have fallen at the end."""


@dataclass
class StarOptions:
    """Iterations of sampling, then of fine-tuning the start model on right answers (`algorithm: star`)."""

    problems_per_iteration: int = bounded(512, least=1)
    """Problems sampled in an iteration, `problems_per_step` of them in a step."""
    finetune_steps: int = bounded(40, least=1)
    """Fine-tuning steps that follow in the first iteration, each on `problems_per_step` kept answers."""
    finetune_growth: float = bounded(1.2, least=1)
    """Each iteration has so many times the fine-tuning steps of the one before."""
    dedupe: bool = True
    """Keep answers of a problem that are the same token for token once."""
    rationalize: bool = False
    """Sample a problem again where no answer was right, with its gold answer as a hint; what is right then is learned
    as an answer to the question without the hint."""
    hint: str = "(The answer is {answer}; explain how to get there.)"
    """Text appended to the question then, after a space, with "{answer}" where the gold answer goes."""


@dataclass
class SftOptions:
    """Supervised fine-tuning on the source's own worked responses (`algorithm: sft`)."""

    refine_fraction: float = bounded(0.45, least=0, most=1)
    """Share of examples that are refine examples (arithmetic sources only; 0 for files)."""
    draft_error_rates: tuple[float, ...] = bounded((0.0, 0.3, 0.6), least=0, most=1)
    """Error rates per line (0 to 1) of the drafts in refine examples, one drawn per example."""


@dataclass
class RolloutOptions:
    """Sampling during training."""

    temperature: float = bounded(1.0, above=0)
    """Softmax temperature of training samples, which have to differ."""
    top_p: float = bounded(1.0, above=0, most=1)
    """Nucleus: sample among the smallest set of tokens with this much probability; 1 = off."""
    top_k: int = bounded(0, least=0)
    """Sample among the k likeliest tokens; 0 = off."""
    min_p: float = bounded(0.0, least=0, most=1)
    """Drop tokens less likely than this times the likeliest; 0 = off."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response, beside the model's own stop tokens; in evaluation too. Graders see what comes before.
    """
    max_prompt_tokens: int = bounded(192, least=1)
    """Longest prompt, in tokens; longer problems are dropped and counted."""
    max_response_tokens: int = bounded(64, least=1)
    """Longest response, in tokens; longer ones are cut off."""
    max_sequences: int = bounded(256, least=1)
    """Most sequences decoding at once, per process."""
    max_batch_tokens: int = bounded(8192, least=1)
    """Most tokens in one forward pass (decoding and prefill together), per process."""
    decoder: Literal["auto", "fused", "modules"] = "auto"
    """What runs the model: "fused" = the C++ decoder (Llama, Mistral, Qwen2, Qwen3, OLMo-2 and OLMo-3) on a CPU, and
    decoding steps as CUDA graphs on a GPU; "modules" = the model as updates run it; "auto" = the first where it can,
    but for bfloat16 on a CPU with AMX tiles."""
    exact: bool = False
    """Make the log-probabilities of rollouts those of training, bit for bit (float32 on the CPU only): slower
    rollouts, and no pass for old log-probabilities."""
    cache_tokens: int = bounded(0, least=0)
    """Size of the KV cache in tokens, per process; 0 = as many as all sequences take that are there together, prompts
    shared, or as the rest of the run leaves room for on the GPU if that is less."""


@dataclass
class LossOptions:
    """The policy-gradient loss; names and meanings as in `thinktwice_kernels.grpo_loss`."""

    scale_rewards: Literal["none", "group", "batch", "mean"] = "none"
    """Divide the advantage (reward minus group mean) by nothing, the group's or the batch's standard deviation, or the
    group's mean (MaxRL; rewards must not be negative)."""
    policy_loss: Literal["clip", "cispo", "sapo"] = "clip"
    """Objective: clipped PPO surrogate, CISPO, or SAPO's soft gate."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio per token, or per sequence (GSPO)."""
    epsilon_low: float = 0.2
    """Clip the ratio below 1 - this ("clip" only)."""
    epsilon_high: float = 0.28
    """Clip the ratio above 1 + this ("clip" and "cispo")."""
    dual_clip: float | None = 3.0
    """Where the advantage is negative, a token's loss is at most this times its absolute value; null = off ("clip"
    only)."""
    rollout_is: Literal["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"] = "none"
    """Importance correction of rollouts whose log-probabilities differ from training's: weigh the objective by the
    training policy's over the rollout's probability, of a token or of the whole response, held to the bounds or dropped
    outside them."""
    rollout_is_cap: float = 2.0
    """Upper bound of that weight."""
    rollout_is_floor: float | None = None
    """Lower bound of that weight; null = none."""
    rollout_is_denominator: Literal["all", "kept"] = "all"
    """Whether what "token-mask" or "sequence-mask" drops still counts where the loss is divided ("all"), or is out of
    the loss altogether ("kept"; takes a pass over all samples first, to know)."""
    beta: float = bounded(0.0, least=0)
    """Weight of the KL term to the initial policy; 0 = no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL term."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """How token losses become one number, over the whole mini-batch across processes."""


@dataclass
class UpdateOptions:
    """Optimizer and batches."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW with moments in float32 (8 bytes a parameter), or in 8 bits (2 bytes; by bitsandbytes, for weights that are
    not sharded)."""
    learning_rate: float = bounded(5e-5, least=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = bounded(5, least=0)
    """Optimizer steps of linear warm-up."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up; "linear" and "cosine" reach 0 after `lr_decay_steps`."""
    lr_decay_steps: int = bounded(0, least=0)
    """Optimizer steps, counted from the first, until "linear" or "cosine" reach 0; 0 = the run's length."""
    adam_betas: tuple[float, float] = bounded((0.9, 0.99), least=0, below=1)
    """AdamW's decay rates of the first and second moment."""
    weight_decay: float = bounded(0.0, least=0)
    """AdamW's decoupled weight decay."""
    grad_clip: float = bounded(1.0, least=0)
    """Largest gradient norm; 0 = no clipping."""
    minibatch_sequences: int | None = bounded(None, least=0)
    """Sequences (over all processes) per optimizer step; 0 = the whole phase in one. Whole groups; with
    `thinktwice.pairing: joint` whole pairs. null = of 8 problems, as published, if they divide the step's; else 0."""
    microbatch_tokens: int = bounded(0, least=0)
    """Most tokens in one forward and backward pass, per process; changes memory and speed, not the result. 0 = a fifth
    more than a group of the longest sequences, at least 10240, at most 16384."""
    shard_processes: int = bounded(0, least=0)
    """Shard weights, gradients and optimizer over each so many neighbouring processes (those of a node, say) and keep
    equal copies between the groups; 0 = over all processes."""
    shared_prefix: bool = True
    """Compute a prompt once for all responses to it; off, every response brings its own copy."""
    old_logps: Literal["recompute", "rollout"] = "recompute"
    """Old log-probabilities of a phase of several mini-batches: one more forward pass, or the rollout engine's own."""


@dataclass
class EvalOptions:
    """Held-out evaluation: solve, then refine each solution once."""

    sets: dict[str, str | dict[str, Any]] | tuple[str, ...] | None = None
    """Name of each evaluation set with a ready set's name, a source (as `data.source`; of arithmetic ones the held-out
    part) or {source: ..., options as of `data`, reward: ...}; or a list of ready sets. Default: the held-out part of an
    arithmetic `data.source`, none for others; {} = none."""
    ready_sets: str | None = None
    """YAML file with more ready sets, written as in `thinktwice_fast/assets/ready_sets.yaml`; its names go first."""
    data_root: str | None = None
    """Folder to read ready sets from instead of the hub: aime.parquet or .jsonl, .json, .csv for `aime`, ..., with the
    hub's columns or in the verl schema."""
    subset: tuple[str, ...] | str | None = None
    """Configuration name of hub datasets among the sets; this and the next four are for sets that are not ready and do
    not say it themselves."""
    split: str = "test"
    """Split of hub datasets among the sets."""
    question_column: str | None = None
    """Column with the question text in the sets; default as for `data.question_column`."""
    answer_column: str | None = None
    """Column with the gold answer in the sets; default as for `data.answer_column`."""
    instruction: str | None = None
    """Text appended to every evaluation question; default: `data.instruction`."""
    limit: int = bounded(400, least=0)
    """Use only the first so many problems of each set; 0 = all."""
    every: int = bounded(20, least=0)
    """Evaluate every so many steps; 0 = only before and after training."""
    samples: int = bounded(1, least=1)
    """Solutions per problem; from 2 on pass@k is reported for k = 1, 2, 4, ..."""
    temperature: float = bounded(0.0, least=0)
    """Temperature of the solutions; 0 = greedy. Refinements are always greedy."""
    top_p: float = bounded(1.0, above=0, most=1)
    """Nucleus of the solutions."""
    top_k: int = bounded(0, least=0)
    """Top-k of the solutions; 0 = off."""


@dataclass
class RunOptions:
    """Length of the run and what it writes."""

    steps: int = bounded(200, least=1)
    """Global steps; a solve step and a refine step count as one each (with `thinktwice.pairing: joint` both as one), a
    batch of supervised examples as one."""
    checkpoint_every: int = bounded(20, least=0)
    """Write a checkpoint every so many steps (and at the end); 0 = only at the end."""
    keep_checkpoints: int = bounded(2, least=1)
    """Newest checkpoints kept."""
    keep_best: str | None = None
    """Metric of the evaluations, such as eval/average/solve_accuracy: the checkpoint of the evaluated step of its
    highest value (of equals the first) is kept besides; `checkpoints/best.json` names it."""
    save: bool = True
    """Write checkpoints and the trained model. Off, as where only speed is of interest, the run can't be continued."""
    transcripts_every: int = bounded(20, least=0)
    """Write a sample of transcripts of the first pair of steps, then every so many; 0 = none."""
    transcript_tokens: int = bounded(8192, least=1)
    """Most tokens, of prompts and responses, in the transcripts of a phase of a step; one response there is always."""
    distributed_timeout: float = bounded(1800.0, least=1, most=MOST_SECONDS)
    """Seconds a process waits for the others before it gives up."""


@dataclass
class Config:
    """All options of a run."""

    output: str = "runs/tiny"
    """Folder for everything the run writes."""
    resume: str | None = None
    """"auto" = continue from the newest checkpoint in `output` (start anew where there is none), or a checkpoint's
    folder."""
    seed: int = bounded(0, least=0)
    """Seed of problem order, sampling, base selection and random weights; 0 to 2147483647."""
    algorithm: Literal["thinktwice", "grpo", "dr_grpo", "dapo", "star", "thinktuning", "sft"] = "thinktwice"
    """What to train by. Its published loss stands in for the defaults of the `loss` options."""
    problems_per_step: int = bounded(32, least=1)
    """Problems per step (P), over all processes; where a step fine-tunes (SFT, STaR): examples."""
    samples_per_problem: int = bounded(8, least=1)
    """Samples per problem (G): the group that an advantage is taken over."""
    reward: str = "math"
    """"math" (last \\boxed{}, math-verify), "math_strict" (the same by the rules of ThinkTwice's released code),
    "choice" (multiple-choice letter), "yes_no", "exact" (stripped text), or my_file.py:function with TRL's reward
    signature. Evaluation sets may have one of their own."""
    reward_timeout: float = bounded(10.0, above=0, most=MOST_SECONDS)
    """Seconds a grader may take for one answer before it is stopped (math: graded 0; own function: an error)."""
    reward_workers: int | None = bounded(None, least=1)
    """Grader processes, per training process. Default: for math one per two CPU cores, at most 8; for an own function
    1, which keeps its module's state from call to call: give more where it needs none."""
    track: str = "tensorboard"
    """Trackers that get every metric, separated by commas: tensorboard, wandb, trackio (the last two also get the
    transcripts); "none" = none. One that fails is left out, and the run goes on."""
    profile: str | None = None
    """Steps to profile, as FIRST:LAST or one step, at most 10; in a file in quotation marks. Traces and a table of the
    slowest kernels go to `profile/` in `output`."""
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    thinktwice: ThinkTwiceOptions = field(default_factory=ThinkTwiceOptions)
    dapo: DapoOptions = field(default_factory=DapoOptions)
    star: StarOptions = field(default_factory=StarOptions)
    sft: SftOptions = field(default_factory=SftOptions)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    thinktuning: ThinkTuningOptions = field(default_factory=ThinkTuningOptions)
    update: UpdateOptions = field(default_factory=UpdateOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    run: RunOptions = field(default_factory=RunOptions)


ARITHMETIC = "arithmetic:"
"""What the sources begin with that the program makes itself."""

LOSS_BOUNDS: dict[str, tuple[str, ...]] = {
    "clip": ("epsilon_low", "epsilon_high", "dual_clip"),
    "cispo": ("epsilon_high",),
    "sapo": (),
}
"""Which bounds of `LossOptions` each `policy_loss` has; the default of one it lacks counts as not set."""


def samples_per_step(config: Config) -> int:
    """Samples (over all processes) that a step of reinforcement learning draws and trains on."""
    groups = 2 if config.thinktwice.pairing == "joint" else 1
    return groups * config.problems_per_step * config.samples_per_problem


def samples_per_optimizer_step(config: Config) -> int:
    """``update.minibatch_sequences``, its default and 0 resolved."""
    phase, given = samples_per_step(config), config.update.minibatch_sequences
    if given is None and config.problems_per_step % _PUBLISHED_MINIBATCH == 0:
        return phase // config.problems_per_step * _PUBLISHED_MINIBATCH
    return given or phase


def optimizer_steps_per_step(config: Config) -> int:
    """Of a step of reinforcement learning: its mini-batches."""
    return samples_per_step(config) // samples_per_optimizer_step(config)


def overlong_buffer(config: Config) -> int:
    """``dapo.overlong_buffer_tokens``, its default resolved."""
    tokens = config.dapo.overlong_buffer_tokens
    return config.rollout.max_response_tokens // 5 if tokens is None else tokens
