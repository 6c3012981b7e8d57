"""Every metric, declared once with its definition; ``metrics_file.py`` writes them.

Solve and refine metrics never share a key: their averages would mix two different prompts.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from thinktwice_fast.algorithms.thinktuning.feedback import REFUSALS

Record = dict[str, Any]  # one line of metrics.jsonl: "step" (int), "phase" (str), then name: number or None

SAMPLED = ("solve", "refine")
POLICY = (*SAMPLED, "pair")  # with what is drawn and trained on together: one record, with the keys of all three
TRAINED = (*POLICY, "sft")
PHASES = (*TRAINED, "eval", "checkpoint")


@dataclass(frozen=True)
class Metric:
    """One metric.

    In ``name``, ``{phase}`` is one of ``phases``, ``{set}`` an evaluation set, ``{k}`` a count, ``{behaviour}`` a
    teacher's.
    """

    name: str
    unit: str
    definition: str
    phases: tuple[str, ...] = ()
    timing: bool = False  # differs between two runs of one seed

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the keys that this metric may have in a record."""
        phase = f"(?:{'|'.join(self.phases)})"
        fields = {"phase": phase, "set": "[^/]+", "k": "[1-9][0-9]*", "sign": "(?:pos|neg)", "behaviour": "[A-Za-z_]+"}
        return re.compile(re.sub(r"\{(\w+)\}", lambda found: fields[found[1]], self.name))


METRICS: tuple[Metric, ...] = (
    # Denominators of token means are the tokens of the whole phase over all processes: a mean of per-process or
    # per-micro-batch means would weigh tokens by how they happened to be packed.
    Metric("{phase}/reward", "reward", "Mean reward of the phase's samples that have one.", SAMPLED),
    Metric(
        "{phase}/reward_std",
        "reward",
        "Standard deviation of the rewards inside a group (unbiased), mean over the groups that have a reward.",
        SAMPLED,
    ),
    Metric(
        "{phase}/group_signal_rate",
        "share",
        "Groups whose rewards are not all equal, of the groups that have a reward; the others teach nothing.",
        SAMPLED,
    ),
    Metric(
        "{phase}/rewards_missing",
        "samples",
        "Samples that the reward function left out (None); they enter neither the reward nor the loss.",
        SAMPLED,
    ),
    Metric("{phase}/grading_timeouts", "samples", "Samples whose grader was stopped at `reward_timeout`.", POLICY),
    Metric("{phase}/preemptions", "sequences", "Times a sequence had to leave a full KV cache and start over.", POLICY),
    Metric(
        "solve/draws",
        "draws",
        "DAPO: times that problems were sampled until the batch was full. Rewards, lengths and the like are those of "
        "every sample drawn, figures of the loss those of the samples trained on.",
    ),
    Metric("solve/samples_discarded", "samples", "DAPO: samples drawn that were not trained on."),
    Metric(
        "solve/overlong_penalty",
        "reward",
        "DAPO: what `dapo.overlong_buffer_tokens` took off the rewards that advantages are made of, mean over the "
        "samples trained on; `solve/reward` is what it was.",
    ),
    Metric("solve/kept", "samples", "STaR: answers of the step that are kept to be learned."),
    Metric("solve/rationalized", "samples", "STaR: those of them that had the gold answer as a hint."),
    Metric("{phase}/iteration", "", "STaR: which iteration the step belongs to, from 1.", ("solve", "sft")),
    Metric("{phase}/prompt_tokens", "tokens", "Mean prompt length, every sample counted.", SAMPLED),
    Metric("{phase}/response_tokens", "tokens", "Mean response length, stop token included.", SAMPLED),
    Metric("{phase}/response_tokens_max", "tokens", "Longest response, stop token included.", SAMPLED),
    Metric(
        "{phase}/truncation_rate",
        "share",
        "Responses cut off at `rollout.max_response_tokens` without a stop token, of all responses.",
        SAMPLED,
    ),
    Metric("{phase}/boxed_rate", "share", "Responses with a closed `\\boxed{}`, of all responses.", SAMPLED),
    Metric(
        "{phase}/entropy",
        "nats",
        "Entropy of the distribution that a response token was drawn from, mean over all sampled tokens.",
        SAMPLED,
    ),
    Metric(
        "{phase}/loss",
        "",
        "The policy loss as `loss.loss_agg_mode` normalises it, mean over the phase's mini-batches.",
        POLICY,
    ),
    Metric(
        "sft/loss", "nats", "Negative log-probability of the target tokens, mean over the target tokens of the batch."
    ),
    Metric(
        "sft/token_accuracy",
        "share",
        "Target tokens that are the model's likeliest token there, of all target tokens of the batch.",
    ),
    Metric(
        "{phase}/tokens",
        "tokens",
        "Response tokens whose sample has a reward: what token means of the loss divide by.",
        POLICY,
    ),
    Metric(
        "{phase}/tokens_skipped",
        "tokens",
        "Those whose loss was not computed, because their advantage is 0 and there is no KL and no entropy term.",
        POLICY,
    ),
    Metric("{phase}/tokens_guided", "tokens", "Those that a teacher wrote, of the computed ones.", POLICY),
    Metric("{phase}/guided_share", "share", "Guided tokens, of the computed ones; only where there are any.", POLICY),
    Metric("{phase}/masked_share", "share", "Too unlikely to be shaped, advantage negative; of the guided.", POLICY),
    Metric("{phase}/shaping_weight_{sign}", "ratio", "Mean weight of shaped tokens, by the advantage's sign.", POLICY),
    Metric("{phase}/tokens_dropped", "tokens", "What `loss.rollout_is` drops; with `all` among `tokens`.", POLICY),
    Metric("{phase}/rollout_is_mean", "ratio", "Mean weight of `loss.rollout_is`; with `all` 0 if dropped.", POLICY),
    Metric("{phase}/tokens_with_gradient", "tokens", "Those that the gradient comes from; clipped ones not.", POLICY),
    Metric(
        "{phase}/clip_fraction_low",
        "share",
        "Tokens held back by the lower bound (ratio below 1 - `loss.epsilon_low`, negative advantage), of the tokens "
        "the loss was computed on: skipped and guided ones left out.",
        POLICY,
    ),
    Metric(
        "{phase}/clip_fraction_high",
        "share",
        "Tokens held back by the upper bound (ratio above 1 + `loss.epsilon_high`, positive advantage), of the tokens "
        "the loss was computed on.",
        POLICY,
    ),
    Metric(
        "{phase}/ratio_mean",
        "ratio",
        "New over old probability of a token, mean over the tokens the loss was computed on.",
        POLICY,
    ),
    Metric("{phase}/ratio_max", "ratio", "Largest such ratio of the phase.", POLICY),
    Metric(
        "{phase}/approx_kl",
        "nats",
        "k3 estimate of the divergence between the policy that the phase began with and the current one, mean over the "
        "tokens the loss was computed on.",
        POLICY,
    ),
    Metric(
        "{phase}/kl_ref",
        "nats",
        "Estimate (`loss.kl_estimator`) of the divergence from the initial policy, mean over the tokens the loss was "
        "computed on; absent where `loss.beta` is 0.",
        POLICY,
    ),
    Metric(
        "{phase}/mismatch",
        "nats",
        "Absolute difference between a token's log-probability in rollout and in training with the weights that "
        "sampled it, mean over the tokens the loss was computed on; with several mini-batches and `update.old_logps: "
        "rollout` over those of the first.",
        POLICY,
    ),
    Metric(
        "{phase}/grad_norm",
        "",
        "Norm of the whole gradient before clipping, mean over the phase's optimizer steps.",
        TRAINED,
    ),
    Metric("{phase}/learning_rate", "", "Learning rate of the phase's last optimizer step.", TRAINED),
    Metric(
        "{phase}/tokens_per_second",
        "tokens/s",
        "Sampled tokens of all processes, divided by `seconds_rollout`.",
        POLICY,
        timing=True,
    ),
    Metric(
        "{phase}/seconds_rollout",
        "s",
        "From the first prompt handed to the rollout engine to the last sample, on the slowest process.",
        POLICY,
        timing=True,
    ),
    Metric(
        "{phase}/seconds_grading",
        "s",
        "Wait for graders after the last sample, on the slowest process; what they do earlier costs nothing.",
        POLICY,
        timing=True,
    ),
    Metric("{phase}/seconds_update", "s", "Forward, backward and optimizer.", TRAINED, timing=True),
    Metric("{phase}/seconds_step", "s", "The whole step, without evaluation and checkpoint.", TRAINED, timing=True),
    Metric(
        "pair/refine_extended",
        "share",
        "Refine groups that went on from their base's KV cache, of all refine groups; the prompts of the others were "
        "computed anew, because they do not continue the base token for token or the cache had no room.",
    ),
    Metric(
        "solve/guided_fraction",
        "share",
        "Share of each group's properly ended rollouts that the teacher was to be asked about (at least one of them); "
        "0 once `thinktuning.cutoff` has ended the guiding.",
    ),
    Metric("solve/guided_rate", "share", "Rollouts with feedback spliced in, of all rollouts."),
    Metric(
        "solve/teacher_answers",
        "answers",
        "Answers that the teacher was asked for since the start, unusable ones too; they are no `generations`.",
    ),
    Metric("solve/teacher_acceptance", "share", "Answers that were spliced in, of those asked for in the step."),
    *(Metric(f"solve/refused/{reason}", "answers", text) for reason, text in REFUSALS.items()),
    Metric(
        "solve/behaviour/{behaviour}",
        "answers",
        "Answers spliced in whose request named this behaviour; absent where it is none, and without "
        "`thinktuning.one_behaviour`, since an answer does not tell.",
    ),
    Metric("solve/reward_guided", "reward", "Mean reward of the guided rollouts, as graded with the feedback in them."),
    Metric("solve/reward_unguided", "reward", "Mean reward of the other members of their groups."),
    Metric(
        "solve/seconds_teacher",
        "s",
        "Asking the teacher, splicing and grading anew, on the slowest process.",
        timing=True,
    ),
    Metric("seconds_evaluation", "s", "One evaluation, all sets.", timing=True),
    Metric("seconds_checkpoint", "s", "Training stood still for a checkpoint.", timing=True),
    Metric("elapsed_seconds", "s", "Since the start of training, over all sessions of a resumed run.", timing=True),
    Metric(
        "peak_memory_bytes",
        "bytes",
        "Most memory that a process has held: allocated on the GPU, or resident on the CPU.",
        timing=True,
    ),
    Metric(
        "generations",
        "samples",
        "Training samples drawn since the start, refinements and discarded ones among them: what methods are compared "
        "at, since half of ThinkTwice's steps refine and DAPO's draw until a batch is full.",
    ),
    Metric("eval/{set}/solve_accuracy", "share", "Solutions that are right, of all solutions."),
    Metric("eval/{set}/refine_accuracy", "share", "The same after one greedy refinement of each solution."),
    Metric(
        "eval/{set}/fix_wrong",
        "share",
        "Wrong solutions whose refinement is right, of the wrong solutions; absent where none is wrong. The rest stays "
        "wrong, so the complement has no metric of its own.",
    ),
    Metric(
        "eval/{set}/damage_correct",
        "share",
        "Right solutions whose refinement is wrong, of the right solutions; absent where none is right. The rest stays "
        "right.",
    ),
    Metric("eval/{set}/boxed_rate", "share", "Solutions with a closed `\\boxed{}`, of all solutions."),
    Metric("eval/{set}/refine_boxed_rate", "share", "Refinements with a closed `\\boxed{}`, of all refinements."),
    Metric("eval/{set}/truncation_rate", "share", "Solutions cut off at the longest length, of all solutions."),
    Metric("eval/{set}/refine_truncation_rate", "share", "The same for the refinements."),
    Metric("eval/{set}/solve_tokens", "tokens", "Mean length of the solutions, stop token included."),
    Metric("eval/{set}/refine_tokens", "tokens", "Mean length of the refinements, stop token included."),
    Metric(
        "eval/{set}/refine_extended",
        "share",
        "Refinements that went on from their solution's KV cache, of all refinements; the prompts of the others were "
        "computed anew, because they do not continue the solution token for token or the cache had no room.",
    ),
    Metric(
        "eval/{set}/solve_pass@{k}",
        "share",
        "Chance that one of k solutions of a problem is right, by the unbiased estimator 1 - C(n-c,k)/C(n,k), mean "
        "over problems.",
    ),
    Metric("eval/{set}/refine_pass@{k}", "share", "The same for the refinements."),
    Metric("eval/{set}/solve_majority", "share", "Problems whose most frequent boxed answer is right, ties in part."),
    Metric("eval/{set}/refine_majority", "share", "The same for the refinements."),
)

AVERAGE = "average"  # as {set}: the plain mean over the sets that have the metric


@cache
def find_metric(name: str) -> Metric:
    """The declaration of the key ``name``. Raises KeyError for an undeclared one, which only a bug can log."""
    for metric in METRICS:
        if metric.pattern.fullmatch(name):
            return metric
    raise KeyError(f"metric {name!r} is not declared in thinktwice_fast/run/metrics.py")


def reproducible(records: Iterable[Record]) -> list[Record]:
    """What two runs of one seed must agree on: the records without timing metrics, and without empty ones.

    A resumed run on one CPU process equals an uninterrupted one in this view, bit for bit.
    """
    kept = []
    for record in records:
        values = {name: value for name, value in metrics_of(record).items() if not find_metric(name).timing}
        if values:
            kept.append({"step": record["step"], "phase": record["phase"], **values})
    return kept


def metrics_of(record: Record) -> Record:
    """The metrics of a record, by name."""
    return {name: value for name, value in record.items() if name not in ("step", "phase")}
