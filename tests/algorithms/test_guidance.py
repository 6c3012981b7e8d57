"""Which rollouts are guided, and what an answer must be to be spliced into one."""

import pytest

from tests.small_models import bpe_tokenizer
from thinktwice_fast.algorithms.thinktuning.feedback import Feedback, parse, splice, tagged
from thinktwice_fast.algorithms.thinktuning.guided import choose_guided, guided_count, guided_fraction
from thinktwice_fast.config import Config
from thinktwice_fast.records import Group, Problem, Rollout
from thinktwice_fast.tasks.arithmetic import build_tokenizer
from thinktwice_fast.tasks.prompts import ChatFormat
from thinktwice_fast.thinktuning_options import ThinkTuningOptions

GOOD = Feedback("incorrect", "8 + 5 is 13,\nnot 14", "So: \\boxed{13}")


def test_the_fraction_falls_over_a_third_of_the_run_and_the_cutoff_ends_it() -> None:
    never = ThinkTuningOptions(cutoff=0)
    assert guided_fraction(never, 50, 1) == 0.1 and guided_fraction(never, 30, 6) == pytest.approx(0.055)
    assert guided_fraction(never, 50, 18) == guided_fraction(never, 50, 50) == pytest.approx(0.01)
    assert guided_fraction(ThinkTuningOptions(decay_steps=2, cutoff=0), 50, 2) == pytest.approx(0.055)
    assert (
        guided_fraction(ThinkTuningOptions(cutoff=0.055), 30, 6)
        == 0
        < guided_fraction(ThinkTuningOptions(cutoff=0.055), 30, 5)
    )
    assert [guided_count(n, 0.1) for n in (0, 1, 5, 20, 29)] == [0, 1, 1, 2, 2] and guided_count(5, 0.0) == 0


def test_rollouts_that_ended_are_chosen_by_seed_step_and_slot_alone() -> None:
    ends = [True, False, True, True, False, True]
    rollouts = [Rollout(0, n, (1,), [5, 9 if end else 6], finished=end or n == 4) for n, end in enumerate(ends)]

    def chosen(seed: int, step: int, slot: int, reward: float = 0.0) -> list[int]:
        group = Group(slot, Problem(0, (), ""), (), (1,), rollouts=rollouts)
        for rollout in rollouts:
            rollout.reward = reward
        return [place for place, _ in choose_guided(group, 0.5, {9}, seed, step)]

    assert chosen(0, 1, 0) == chosen(0, 1, 0, reward=1.0)
    drawn = [chosen(*key) for key in ((0, 1, 0), *((0, 1, n) for n in range(1, 9)), (0, 2, 0), (1, 1, 0))]
    assert all(len(places) == 2 and set(places) <= {0, 2, 3, 5} for places in drawn)
    assert len({tuple(places) for places in drawn}) > 3


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        (tagged(GOOD), GOOD),
        ("Well.\n" + tagged(GOOD).replace("incorrect", " incorrect\n") + "\n", GOOD),
        (tagged(GOOD) + " And so on.", None),
        (tagged(GOOD).replace("incorrect", "wrong"), None),
        (tagged(GOOD).replace("</reason>", ""), None),
        (tagged(GOOD).replace("So:", "<reason>So:"), None),
        ("<reason>a</reason><opinion>correct</opinion><phrase>b</phrase>", None),
        ("<opinion>correct</opinion><reason> </reason><phrase>b</phrase>", None),
        ("", None),
    ],
)
def test_an_answer_is_three_filled_parts_in_order(text: str, parsed: Feedback | None) -> None:
    assert parse(text) == parsed


def spliced(feedback: Feedback, config: Config, chat: ChatFormat, end: int) -> tuple[Rollout, str | None]:
    own = chat.encode("8+5=14")
    rollout = Rollout(0, 3, (1, 2), [*own, end], [-1.0] * (len(own) + 1), [0.5] * (len(own) + 1), True, text="8+5=14")
    return rollout, splice(rollout, feedback, chat, {end}, config)


def test_a_splice_keeps_the_students_tokens_and_marks_the_teachers() -> None:
    chat, end = ChatFormat(bpe_tokenizer()), bpe_tokenizer().eos_token_id
    config = Config()
    config.rollout.max_response_tokens = 200
    rollout, refusal = spliced(GOOD, config, chat, end)
    own = chat.encode("8+5=14")
    added = chat.encode("\n\n8 + 5 is 13,\nnot 14\n\nSo: \\boxed{13}")
    assert refusal is None and rollout.response == [*own, *added, end]
    assert rollout.text == "8+5=14\n\n8 + 5 is 13,\nnot 14\n\nSo: \\boxed{13}"
    assert rollout.guide == [False] * len(own) + [True] * (len(added) + 1)
    assert rollout.logps == [-1.0] * len(own) + [0.0] * (len(added) + 1) and len(rollout.entropies) == len(own)

    config.thinktuning.guidance_tokens = len(added)
    config.rollout.max_response_tokens = len(own) + len(added) + 1
    assert spliced(GOOD, config, chat, end)[1] is None
    config.rollout.max_response_tokens -= 1
    untouched, refusal = spliced(GOOD, config, chat, end)
    assert refusal == "no_room" and untouched.response == [*own, end] and not untouched.guide
    config.thinktuning.guidance_tokens -= 1
    assert spliced(GOOD, config, chat, end)[1] == "guidance_too_long"
    assert spliced(Feedback("correct", "I <|im_end|> stop", "b"), config, chat, end)[1] == "foreign_tokens"


def test_text_that_the_vocabulary_lacks_is_refused() -> None:
    chat, end = ChatFormat(build_tokenizer()), build_tokenizer().eos_token_id
    assert spliced(Feedback("incorrect", "8+5=13", "\\boxed{13}"), Config(), chat, end)[1] is None
    assert spliced(Feedback("incorrect", "8 + 5=13", "\\boxed{13}"), Config(), chat, end)[1] == "foreign_tokens"
