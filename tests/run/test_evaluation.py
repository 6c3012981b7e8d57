"""What an evaluation counts."""

from itertools import combinations

import pytest

from thinktwice_fast.run.evaluation import Outcome, average_metrics, set_metrics
from thinktwice_fast.run.figures import Response, Solved, majority, unbiased_pass_at_k


def outcome(problem: int, right: bool, refined_right: bool, tokens: int = 10) -> Outcome:
    return problem, Solved(Response(right, True, tokens), (Response(refined_right, refined_right, 2 * tokens),))


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int) -> None:
    for correct in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([True] * correct + [False] * (n - correct), k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert unbiased_pass_at_k(n, correct, k) == pytest.approx(share, abs=1e-12)


def test_fix_wrong_and_damage_correct_have_their_own_denominators() -> None:
    outcomes = [
        outcome(0, right=False, refined_right=True),
        outcome(1, right=False, refined_right=False),
        outcome(2, right=False, refined_right=False),
        outcome(3, right=True, refined_right=False, tokens=20),
    ]
    metrics = set_metrics(outcomes)
    assert metrics["solve_accuracy"] == 1 / 4
    assert metrics["refine_accuracy"] == 1 / 4
    assert metrics["fix_wrong"] == 1 / 3
    assert metrics["damage_correct"] == 1
    assert metrics["boxed_rate"] == 1
    assert metrics["refine_boxed_rate"] == 1 / 4
    assert metrics["solve_tokens"] == 12.5
    assert metrics["refine_tokens"] == 25


def test_shares_of_nothing_are_absent() -> None:
    assert "fix_wrong" not in set_metrics([outcome(0, True, True)])
    assert "damage_correct" not in set_metrics([outcome(0, False, True)])


def test_an_average_is_over_the_sets_that_have_the_metric() -> None:
    solved, unsolved = set_metrics([outcome(0, True, True)]), set_metrics([outcome(0, False, True)])
    for sets in ([solved, unsolved], [unsolved, solved]):
        average = average_metrics(sets)
        assert (average["solve_accuracy"], average["fix_wrong"], average["damage_correct"]) == (0.5, 1.0, 0.0)


def test_pass_at_k_for_powers_of_two_up_to_the_samples_drawn() -> None:
    outcomes = [outcome(problem, n < problem, n < 2) for problem in (0, 1) for n in range(5)]
    metrics = set_metrics(outcomes)
    assert {name for name in metrics if "pass" in name} == {
        f"{phase}_pass@{k}" for phase in ("solve", "refine") for k in (1, 2, 4)
    }
    assert metrics["solve_pass@1"] == pytest.approx(metrics["solve_accuracy"]) == 1 / 10
    assert metrics["solve_pass@4"] == pytest.approx((0 + unbiased_pass_at_k(5, 1, 4)) / 2)
    assert metrics["refine_pass@2"] == pytest.approx(unbiased_pass_at_k(5, 2, 2))


def test_one_sample_has_no_pass_at_k() -> None:
    assert not any("pass" in name for name in set_metrics([outcome(0, True, True)]))


def test_the_majority_is_the_most_frequent_answer() -> None:
    def said(*votes: str | None) -> float | None:
        return majority(Response(vote == "2", vote is not None, 1, vote=vote) for vote in votes)

    assert said("2", "3", "2") == 1
    assert said("2", "3", "3", None, None, None) == 0
    assert said("2", "3", "4", None) == pytest.approx(1 / 3)
    assert said(None, None) is None
