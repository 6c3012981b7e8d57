"""An engine, a grader and an updater that write down what they are asked, around the real algorithm."""

import random
from collections.abc import Iterable, Sequence
from typing import Any, cast

from tests.small_models import bpe_tokenizer
from thinktwice_fast import parallel
from thinktwice_fast.algorithms.parts import Parts
from thinktwice_fast.algorithms.registry import METHODS
from thinktwice_fast.algorithms.sampler import Sampler
from thinktwice_fast.algorithms.thinktuning.feedback import Feedback, tagged
from thinktwice_fast.algorithms.thinktuning.teacher import Answer, FeedbackRequest
from thinktwice_fast.config import Config, DapoOptions, RolloutOptions, StarOptions
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Message, Problem, Request, Rollout
from thinktwice_fast.rollout.engine import OnEnd
from thinktwice_fast.rollout.prefix_cache import Counts
from thinktwice_fast.tasks.prompts import ChatFormat
from thinktwice_fast.update.batches import Example

END = bpe_tokenizer().eos_token_id
INSTRUCTION = "Recheck it."
WORDS = "The answer is \\boxed{72}. Natalia sold 12 + 7 clips in May"


def problem(number: int) -> Problem:
    return Problem(number, ({"role": "user", "content": f"What is {number} + 12?"},), str(number + 12))


class Problems:
    """Problem number n at position n."""

    def __getitem__(self, position: int) -> Problem:
        return problem(position)


class Engine:
    """Responses made of the sample's id and the weights' version; two of three end properly."""

    def __init__(self) -> None:
        self.asked: list[tuple[Request, int]] = []  # with the weights' version
        self.counts = Counts(preemptions=5)

    def run(
        self, requests: Iterable[Request], on_end: OnEnd, *, seed: int, version: int = 0, meanwhile: Any = None
    ) -> list[Rollout]:
        made = []
        for request in requests:
            self.asked.append((request, version))
            for sample in request.sample_ids:
                text = f"{WORDS} {seed} {version} {sample}"
                ids = bpe_tokenizer()(text, add_special_tokens=False)["input_ids"]
                finished = sample % 3 != 2
                ids += [END] if finished else []
                count = len(ids)
                made.append(
                    Rollout(request.group, sample, request.prompt, ids, [-1.0] * count, [0.5] * count, finished)
                )
        random.Random(seed).shuffle(made)
        for rollout in made:
            assert not on_end(rollout)
        self.counts.preemptions += len(made)
        return made

    def release_prefixes(self) -> None:
        pass


class Grading:
    def __init__(self, rewards: list[float | None], error: UserError | None):
        self._rewards, self._error = rewards, error

    def done(self) -> bool:
        return True

    def result(self) -> list[float | None]:
        if self._error is not None:
            raise self._error
        return self._rewards


class Grader:
    """Rewards drawn from the text of the response; None for one in ``missing_one_in``."""

    def __init__(self, missing_one_in: int = 0) -> None:
        self.timeouts = 0
        self.error: UserError | None = None
        self.submitted: list[tuple[Problem, Sequence[Message], list[str]]] = []
        self._missing = missing_one_in

    def submit(self, asked: Problem, prompt: Sequence[Message], completions: Sequence[str]) -> Grading:
        self.submitted.append((asked, prompt, list(completions)))
        self.timeouts += 1  # as if one answer of each group took too long
        return Grading([self._reward(text) for text in completions], self.error)

    def look(self) -> None:
        pass

    def _reward(self, text: str) -> float | None:
        numbers = random.Random(text)
        if self._missing and numbers.randrange(self._missing) == 0:
            return None
        return float(numbers.random() < 0.5)


class Updater:
    """Counts an optimizer step per mini-batch, and for a new start."""

    def __init__(self) -> None:
        self.version = 0
        self.updates: list[list[list[Rollout]]] = []
        self.learned: list[list[Example] | str] = []  # supervised batches, and "restart"

    def policy_update(self, minibatches: list[list[Rollout]]) -> dict[str, float]:
        self.version += len(minibatches)
        self.updates.append(minibatches)
        return {"loss": 0.0}

    def supervised_update(self, examples: list[Example]) -> dict[str, float]:
        self.version += 1
        self.learned.append(examples)
        return {"loss": 0.0}

    def trained_weights(self) -> list[Any]:
        return []

    def restart(self, weights: object) -> None:
        self.version += 1
        self.learned.append("restart")


class Teacher:
    """Of three answers, by the response, one can be used, one can't be read, and one does not come."""

    def __init__(self) -> None:
        self.asked: list[FeedbackRequest] = []

    def ask(self, asked: Sequence[FeedbackRequest]) -> list[Answer]:
        self.asked += asked
        return [self._answer(one.response) for one in asked]

    def _answer(self, response: str) -> Answer:
        usable = tagged(Feedback("incorrect", f"Hm, {len(response)}", "\\boxed{7}"))
        answers = (Answer(usable), Answer("Well done."), Answer(refusal="unanswered", detail="no reply"))
        return random.Random(response).choice(answers)


class World:
    """A run over the stubs."""

    def __init__(
        self, grader: Grader | None = None, selection: Any = "uniform", algorithm: Any = "thinktwice", **options: Any
    ) -> None:
        self.config = Config(algorithm=algorithm, problems_per_step=4, samples_per_problem=6)
        self.config.thinktwice.base_selection = selection
        for name, value in options.items():
            setattr(self.config, name, value)
        self.engine = cast(Any, Engine())
        self.grader = cast(Any, grader or Grader())
        self.updater = cast(Any, Updater())
        chat = ChatFormat(bpe_tokenizer())
        self.sampler = Sampler(self.engine, chat, self.grader, INSTRUCTION, frozenset({END}))
        problems = cast(Any, Problems())
        self.teacher = Teacher()
        parts = Parts(self.config, problems, self.sampler, self.updater, cast(Any, None), END, self.teacher)
        self.algorithm = METHODS[algorithm].build(parts)


def first_steps() -> dict[str, Any]:
    """What a first step of each algorithm that samples comes to. Collective."""
    dapo = DapoOptions(overlong_buffer_tokens=20)
    star = StarOptions(problems_per_iteration=4, finetune_steps=2, rationalize=True)
    return {
        "thinktwice": one_step(World()),
        "grpo": one_step(World(algorithm="grpo")),
        "dapo": one_step(World(algorithm="dapo", samples_per_problem=2, dapo=dapo)),
        "thinktuning": one_step(World(algorithm="thinktuning", rollout=RolloutOptions(max_response_tokens=100))),
        "star": one_step(World(algorithm="star", samples_per_problem=2, star=star), then=1),
    }


def one_step(world: World, then: int = 0) -> dict[str, Any]:
    """State, metrics and every process's advantages by sample id after a step, and what the next ones learn."""
    world.config.loss.scale_rewards = "batch"
    step = world.algorithm.step(1)
    state = world.algorithm.state()
    for number in range(then):
        world.algorithm.step(2 + number)
    own = {rollout.sample_id: rollout.advantage for group in step.groups for rollout in group.rollouts}
    return {
        "states": parallel.gather(state),
        "advantages": {sample: value for part in parallel.gather(own) for sample, value in part.items()},
        "generations": step.generations,
        "minibatches": [
            sorted(rollout.sample_id for part in parts for rollout in part)
            for update in world.updater.updates
            for parts in zip(*parallel.gather(update), strict=True)
        ],
        "learned": [
            batch if isinstance(batch, str) else [e for part in parallel.gather(batch) for e in part]
            for batch in world.updater.learned
        ],
        "metrics": {name: value for name, value in step.metrics.items() if "second" not in name},
    }
