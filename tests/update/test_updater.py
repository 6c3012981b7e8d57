"""The update against the formula on transformers' own padded forward pass, and its bookkeeping."""

import copy
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.small_models import FAMILIES, VOCABULARY, foreign_model, random_model
from tests.update.cases import (
    TEMPERATURE,
    assert_same_step,
    change,
    config,
    descend,
    formula,
    gradients,
    padded_logps,
    rollouts,
    updater,
    weights,
)
from thinktwice_fast.model.attention import NAME
from thinktwice_fast.records import Rollout
from thinktwice_fast.update import updater as updater_module
from thinktwice_fast.update.batches import Example
from thinktwice_fast.update.optimizer import build_optimizer
from thinktwice_fast.update.updater import NonFiniteLoss
from thinktwice_kernels import rows as rows_of_logits

pytestmark = pytest.mark.usefixtures("one_process")


def plain_change(
    model: Any,
    minibatches: list[list[Rollout]],
    learning_rate: float,
    old: torch.Tensor | None = None,
    reference: Any = None,
    beta: float = 0.0,
) -> torch.Tensor:
    """The same by gradient descent on `formula`. ``old`` [all tokens]: default, the first weights' own."""
    everything = [rollout for minibatch in minibatches for rollout in minibatch]
    with torch.no_grad():
        old = padded_logps(model, everything) if old is None else old
        ref = padded_logps(reference, everything) if reference is not None else None
    sizes = [sum(len(rollout.response) for rollout in minibatch) for minibatch in minibatches]
    olds, refs = old.split(sizes), ref.split(sizes) if ref is not None else [None] * len(sizes)

    def loss_of(logps: torch.Tensor, number: int) -> torch.Tensor:
        return formula(logps, olds[number], minibatches[number], refs[number], beta)

    return descend(model, minibatches, learning_rate, loss_of)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_that_of_the_formula_on_a_padded_batch(family: str) -> None:
    batch = rollouts(11)
    got, metrics = change(updater(config(), family), [batch])
    assert_same_step(got, plain_change(random_model(family), [batch], 1.0))
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1.0
    assert metrics["grad_norm"] == pytest.approx(float(got.norm()), rel=1e-4)
    assert metrics["tokens"] == sum(len(rollout.response) for rollout in batch)


def test_gradient_of_a_model_of_transformers() -> None:
    batch = rollouts(11)
    made = updater(config(update__microbatch_tokens=60), model=foreign_model(NAME))
    got, _ = change(made, [batch])
    assert_same_step(got, plain_change(foreign_model(), [batch], 1.0))


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_micro_batches_change_nothing(mode: str, level: str) -> None:
    options = {
        "loss__loss_agg_mode": mode,
        "loss__importance_sampling_level": level,
        "loss__dual_clip": None if level == "sequence" else 3.0,
        "loss__beta": 0.1,
        "loss__entropy_coef": 0.01,
    }
    batch = rollouts(11)
    whole, first = change(updater(config(**options)), [batch])
    small, second = change(updater(config(**options, update__microbatch_tokens=50)), [batch])
    single, third = change(updater(config(**options, update__microbatch_tokens=1)), [batch])
    assert_same_step(small, whole)
    assert_same_step(single, whole)
    for name in first.keys() - {"seconds_update"}:
        assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name
        assert third[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name


def test_kl_term_to_the_reference() -> None:
    batch = rollouts(8)
    got, metrics = change(updater(config(loss__beta=0.3)), [batch])
    reference = random_model("qwen3", seed=5)
    assert_same_step(got, plain_change(random_model("qwen3"), [batch], 1.0, reference=reference, beta=0.3))
    assert metrics["kl_ref"] > 0


def test_later_mini_batches_keep_the_first_weights_as_their_old_policy() -> None:
    minibatches = [rollouts(6, seed) for seed in range(3)]
    got, metrics = change(updater(config(update__microbatch_tokens=60), learning_rate=3.0), minibatches)
    assert_same_step(got, plain_change(random_model("qwen3"), minibatches, 3.0))
    assert metrics["ratio_max"] > 1.28 and metrics["clip_fraction_high"] > 0


def with_own_logps(minibatches: list[list[Rollout]], off: float = 0.0) -> list[list[Rollout]]:
    """Log-probabilities as an engine with the first weights notes them, off by ``off`` times a cosine."""
    with torch.no_grad():
        for rollout in (r for minibatch in minibatches for r in minibatch):
            own = padded_logps(random_model("qwen3"), [rollout])
            rollout.logps = (own + off * torch.arange(len(own)).cos()).tolist()
    return minibatches


def test_old_log_probabilities_of_the_rollouts() -> None:
    """They are near the policy's own, as an engine's are, and off by what tells the two modes apart."""
    minibatches = with_own_logps([rollouts(6, seed) for seed in range(2)], off=0.05)
    noted = torch.tensor([logp for minibatch in minibatches for rollout in minibatch for logp in rollout.logps])
    got, metrics = change(updater(config(update__old_logps="rollout"), learning_rate=2.0), minibatches)
    expected = plain_change(random_model("qwen3"), minibatches, 2.0, old=noted)
    assert_same_step(got, expected)
    assert metrics["ratio_mean"] != 1.0
    recomputed, _ = change(updater(config(), learning_rate=2.0), minibatches)
    assert (recomputed - expected).norm() > 1e-3 * expected.norm()


def test_mismatch_is_that_of_the_weights_that_sampled() -> None:
    minibatches = with_own_logps([rollouts(6, seed) for seed in range(3)])
    _, metrics = change(updater(config(), learning_rate=3.0), minibatches)
    assert metrics["ratio_max"] > 1.28, "the policy has to move for this test"
    assert metrics["mismatch"] < 1e-5


def test_mismatch_with_the_rollouts_own_as_old_ones_is_that_of_the_first_mini_batch() -> None:
    minibatches = with_own_logps([rollouts(6, seed) for seed in range(2)], off=0.05)
    made = updater(config(update__old_logps="rollout", update__microbatch_tokens=60), learning_rate=2.0)
    _, metrics = change(made, [[], *minibatches])
    lengths = [len(rollout.response) for rollout in minibatches[0] if rollout.advantage]
    differences = torch.cat([0.05 * torch.arange(length).cos().abs() for length in lengths])
    assert metrics["mismatch"] == pytest.approx(float(differences.mean()), rel=1e-4)
    for rollout in minibatches[0]:
        rollout.advantage = 0.0
    assert "mismatch" not in change(updater(config(update__old_logps="rollout")), minibatches)[1]


def test_the_first_mini_batch_has_no_log_probabilities_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    minibatches = [rollouts(6, seed) for seed in range(3)]
    made = updater(config(update__microbatch_tokens=60), learning_rate=3.0)
    recomputed: list[int] = []

    def count(module: torch.nn.Module, inputs: Any) -> None:
        if not torch.is_grad_enabled():
            recomputed.append(inputs[0].numel())

    made.models.policy.model.embed_tokens.register_forward_pre_hook(count)
    got, metrics = change(made, [[], *minibatches])
    later = [r for minibatch in minibatches[1:] for r in minibatch if r.advantage]
    assert sum(recomputed) == sum(len(r.prompt) + len(r.response) - 1 for r in later)

    whole = updater(config(update__microbatch_tokens=60), learning_rate=3.0)
    everything = [rollout for minibatch in minibatches for rollout in minibatch]
    old = whole._logps(whole.models.policy, [everything])
    monkeypatch.setattr(whole, "_old_logps", lambda _: old)
    expected, before = change(whole, minibatches)
    assert_same_step(got, expected)
    for name in metrics.keys() - {"seconds_update"}:
        assert metrics[name] == pytest.approx(before[name], rel=1e-4, abs=1e-6), name


def test_gradient_falls_on_what_predicts_a_sampled_token_alone() -> None:
    batch = rollouts(4)
    made = updater(config())
    states: list[torch.Tensor] = []
    ids: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        states.append(output)

    made.models.policy.model.register_forward_hook(keep)
    made.models.policy.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: ids.append(inputs[0]))
    made.policy_update([batch])
    (state,), (row,) = states, ids
    assert state.grad is not None
    # A row holds the sequences one after another; what precedes a response token has a gradient, the rest has none.
    expected = {
        (*rollout.prompt, *rollout.response[:-1]): [False] * (len(rollout.prompt) - 1) + [True] * len(rollout.response)
        for rollout in batch
        if rollout.advantage
    }
    with_gradient = (state.grad != 0).any(-1).tolist()
    start, tokens = 0, row.tolist()
    while start < len(tokens):
        sequence = next(s for s in expected if tuple(tokens[start : start + len(s)]) == s)
        assert with_gradient[start : start + len(sequence)] == expected.pop(sequence)
        start += len(sequence)
    assert not expected


def test_temperature_is_the_sampling_one() -> None:
    """At the rollouts' own log-probabilities the engine's and the trainer's agree: mismatch is 0 to rounding."""
    batch = rollouts(5)
    with torch.no_grad():
        for rollout in batch:
            rollout.logps = padded_logps(random_model("qwen3"), [rollout]).tolist()
    _, metrics = change(updater(config()), [batch])
    assert metrics["mismatch"] < 1e-5
    _, metrics = change(updater(config(rollout__temperature=2 * TEMPERATURE)), [batch])
    assert metrics["mismatch"] > 0.01


def test_room_is_made_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoRoom(Exception):
        pass

    made, batch = updater(config()), rollouts(2)

    def refuse() -> None:
        raise NoRoom

    monkeypatch.setattr(made, "_begin", refuse)
    monkeypatch.setattr(made.models.policy, "forward", None)
    for call in (lambda: made.policy_update([batch]), lambda: made.supervised_update([]), lambda: made.logps(batch)):
        with pytest.raises(NoRoom):
            call()


def test_a_phase_without_signal_moves_nothing() -> None:
    batch = rollouts(4)
    for rollout in batch:
        rollout.advantage = 0.0
    got, metrics = change(updater(config()), [batch])
    assert not got.any()
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    assert metrics["tokens_skipped"] == metrics["tokens"] > 0


def test_a_mini_batch_that_nothing_was_graded_in_is_passed_over() -> None:
    made = updater(config())
    minibatches: list[list[Rollout]] = [[], rollouts(4)]
    got, _ = change(made, minibatches)
    assert made.version == 1
    assert_same_step(got, change(updater(config()), minibatches[1:])[0])
    got, metrics = change(made, [[], []])
    assert made.version == 1 and not got.any() and metrics["loss"] == 0


def test_the_norm_of_the_gradient_is_bounded() -> None:
    free, metrics = change(updater(config()), [rollouts(6)])
    bound = metrics["grad_norm"] / 4
    clipped, again = change(updater(config(update__grad_clip=bound)), [rollouts(6)])
    assert again["grad_norm"] == pytest.approx(metrics["grad_norm"])
    assert_same_step(clipped, free / 4)
    assert torch.equal(change(updater(config(update__grad_clip=bound * 4.1)), [rollouts(6)])[0], free)


@pytest.mark.parametrize("spoiled", ["loss", "gradient"])
def test_a_loss_that_is_no_number_is_an_error_and_leaves_the_weights(spoiled: str) -> None:
    made = updater(config(update__microbatch_tokens=60))
    fine, bad = rollouts(6, 1), rollouts(6, 2)
    expected, _ = change(updater(config(update__microbatch_tokens=60)), [fine])
    if spoiled == "loss":
        bad[0].advantage = math.inf
    else:
        # The second mini-batch's gradients, of losses that are finite.
        model = made.models.policy.model

        def spoil(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if output.requires_grad and made.version == 1:
                output.register_hook(lambda gradient: gradient * math.nan)

        model.register_forward_hook(spoil)
    before = weights(made.models.policy)
    with pytest.raises(NonFiniteLoss, match=r"not finite \(loss .*\): lower --update\.learning_rate") as caught:
        made.policy_update([fine, bad])
    assert_same_step(weights(made.models.policy) - before, expected)
    assert made.version == 1
    by_response = sorted(caught.value.evidence["sequences"], key=lambda rollout: rollout.response)
    assert by_response == sorted((r for r in bad if r.advantage), key=lambda rollout: rollout.response)
    assert math.isfinite(caught.value.evidence["loss"]) == (spoiled == "gradient")
    assert all(parameter.grad is None for parameter in made.models.policy.parameters())


def test_versions_count_optimizer_steps_and_the_schedule_moves_with_them() -> None:
    made = updater(config())
    made.schedule = torch.optim.lr_scheduler.LambdaLR(made.optimizer, lambda step: 0.5**step)
    metrics = made.policy_update([rollouts(3, 1), rollouts(3, 2)])
    assert made.version == 2
    assert metrics["learning_rate"] == 0.5
    assert made.policy_update([rollouts(3, 3)])["learning_rate"] == 0.25
    assert made.version == 3


def examples() -> list[Example]:
    return [Example(rollout.prompt, rollout.response) for rollout in rollouts(7)]


@pytest.mark.parametrize("microbatch_tokens", [16384, 50])
def test_supervised_loss_is_transformers_own(microbatch_tokens: int) -> None:
    batch = examples()
    made = updater(config(update__microbatch_tokens=microbatch_tokens))
    before = weights(made.models.policy)
    metrics = made.supervised_update(batch)
    got = weights(made.models.policy) - before

    model = random_model("qwen3")
    longest = max(len(e.prompt) + len(e.response) for e in batch)
    ids, labels = torch.zeros(7, longest, dtype=torch.long), torch.full((7, longest), -100)
    for row, e in enumerate(batch):
        end = len(e.prompt) + len(e.response)
        ids[row, :end] = torch.tensor([*e.prompt, *e.response])
        labels[row, len(e.prompt) : end] = torch.tensor(e.response)
    output = model(input_ids=ids, labels=labels, use_cache=False)
    output.loss.backward()
    expected = gradients(model)
    assert metrics["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert_same_step(got, -expected)
    hits = (output.logits[:, :-1].argmax(-1) == labels[:, 1:]).sum()
    assert metrics["token_accuracy"] == pytest.approx(int(hits) / int((labels != -100).sum()))
    assert made.version == 1


def test_supervised_update_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 8
    monkeypatch.setattr(updater_module, "_HIT_ROWS", rows)
    monkeypatch.setitem(rows_of_logits.DEFAULT_BUDGET, "cpu", rows * VOCABULARY * 4)
    made = updater(config())
    shapes: set[tuple[int, ...]] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                shapes.add(tuple(result.shape))
            return result

    with Watch():
        metrics = made.supervised_update(examples())
    count = sum(len(example.response) for example in examples())
    assert count > rows and (rows, VOCABULARY) in shapes
    assert not {shape for shape in shapes if shape[-2:] == (count, VOCABULARY)}
    monkeypatch.undo()
    assert metrics["token_accuracy"] == updater(config()).supervised_update(examples())["token_accuracy"]


def test_supervised_training_learns() -> None:
    made = updater(config(), learning_rate=0.3)
    losses = [made.supervised_update(examples())["loss"] for _ in range(25)]
    assert losses[-1] < losses[0] / 2


def test_a_restart_trains_as_from_the_start() -> None:
    options = config(update__warmup_steps=3)
    made = updater(options)
    made.optimizer, made.schedule = build_optimizer(made.models.masters, options.update, 10)
    start = made.trained_weights()

    def trained() -> tuple[list[float], list[float], torch.Tensor]:
        metrics = [made.supervised_update(examples()) for _ in range(3)]
        losses, rates = ([step[name] for step in metrics] for name in ("loss", "learning_rate"))
        return losses, rates, weights(made.models.rollout)

    losses, rates, moved = trained()
    made.restart(start)
    assert made.version == 4 and torch.equal(weights(made.models.rollout), weights(updater(options).models.rollout))
    again = trained()
    assert again[:2] == (losses, rates) and torch.equal(again[2], moved)
    assert rates == sorted(set(rates)), "it warms up anew"


@pytest.mark.filterwarnings("ignore:FSDP")
def test_bfloat16_compute_trains_float32_weights_and_refreshes_the_read_ones() -> None:
    made = updater(config(), dtype=torch.bfloat16)
    addresses = [parameter.data_ptr() for parameter in made.models.rollout.parameters()]
    exact = plain_change(random_model("qwen3"), [rollouts(8)], 1.0)
    got, metrics = change(made, [rollouts(8)])
    # bfloat16 rounds each activation to 8 bits.
    assert (got - exact).norm() < 0.05 * exact.norm()
    assert math.isfinite(metrics["loss"])
    trained = weights(made.models.masters)
    assert torch.equal(weights(made.models.rollout), trained.bfloat16().float())
    assert [parameter.data_ptr() for parameter in made.models.rollout.parameters()] == addresses


def test_in_one_float32_process_rollouts_read_the_trained_weights() -> None:
    made = updater(config())
    assert made.models.rollout is made.models.policy.model is made.models.masters.model
    before = copy.deepcopy(weights(made.models.rollout))
    made.policy_update([rollouts(4)])
    assert not torch.equal(weights(made.models.rollout), before)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("token-truncate", {}),
        ("token-mask", {}),
        ("sequence-truncate", {}),
        ("sequence-mask", {}),
        ("token-mask", {"loss__rollout_is_denominator": "kept"}),
        ("sequence-mask", {"loss__rollout_is_denominator": "kept", "update__microbatch_tokens": 60}),
    ],
)
def test_importance_correction_weighs_by_training_over_rollout(kind: str, options: dict[str, Any]) -> None:
    """Ratio 1 and no clipping: the gradient is that of plain policy gradient with each advantage times its weight.

    With "kept" the tokens that are dropped do not count, those of samples without an advantage included.
    """
    batch = rollouts(8)
    model = random_model("qwen3")
    with torch.no_grad():
        own = padded_logps(model, batch).split([len(rollout.response) for rollout in batch])
    weighed = []
    for rollout, logps in zip(batch, own, strict=True):
        rollout.logps = (logps + torch.linspace(-0.5, 0.58, len(logps)) * (1 + len(logps) % 3)).tolist()
        log_weights = logps - torch.tensor(rollout.logps)
        if kind.startswith("sequence"):
            log_weights = log_weights.sum().expand_as(log_weights)
        weights_of = log_weights.exp()
        inside = (weights_of >= 0.7) & (weights_of <= 1.5)
        weighed.append(weights_of.clamp(0.7, 1.5) if kind.endswith("truncate") else weights_of * inside)
    bounds = {"loss__rollout_is": kind, "loss__rollout_is_cap": 1.5, "loss__rollout_is_floor": 0.7}
    got, metrics = change(updater(config(**bounds, **options)), [batch])
    count = sum(len(rollout.response) for rollout in batch)
    if options:
        kept = sum(int((weight != 0).sum()) for weight in weighed)
        assert 0 < metrics["tokens_dropped"] == count - kept and metrics["tokens"] == kept
        count = kept
    before = weights(model)
    tokens = torch.cat([r.advantage * w for r, w in zip(batch, weighed, strict=True)])
    loss = -(padded_logps(model, batch) * tokens).sum() / count
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad
    assert_same_step(got, weights(model) - before)
