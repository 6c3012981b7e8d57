"""TRL's GRPOTrainer, its own training loop, which waits for an order after each step.

One generation makes one optimizer step. What the two trainers share is set alike; the rest is as fast as TRL offers it:
no checkpoints, no logs, no end tokens to look for, the whole batch at a time where memory allows it.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.step import truth
from bench.step.desk import BETAS, CLIP, LEARNING_RATE, Ask, Desk
from thinktwice_fast.records import Problem
from thinktwice_fast.tasks import graders
from thinktwice_fast.tasks.prompts import ChatFormat

_MANY = 1_000_000  # steps; it ends with the orders
_NEVER = -1  # a token id; with None the model's own end token would end a response


def train(ask: Ask, desk: Desk) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ask.folder)
    rewards = Rewards(ask)
    rows = [json.loads(line) for line in Path(ask.problems).read_text().splitlines()]
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in rows]
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = _Timed(
            model=ask.folder,
            processing_class=tokenizer,
            reward_funcs=rewards.grade,
            train_dataset=data,
            args=_arguments(ask, folder),
        )
        trainer.eos_token_ids = [_NEVER]  # it would cut completions off at the tokenizer's
        trainer.add_callback(_Orders(ask, desk, trainer, rewards, ChatFormat(tokenizer)))
        trainer.train()


def _arguments(ask: Ask, folder: str) -> Any:
    workload = ask.workload
    batch = workload.batch or workload.sequences
    return GRPOConfig(
        output_dir=folder,
        max_steps=_MANY,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=workload.sequences // batch,
        num_generations=workload.samples,
        max_completion_length=workload.new_tokens,
        generation_kwargs={"eos_token_id": _NEVER},
        temperature=1.0,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="dapo",
        scale_rewards="none",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        gradient_checkpointing=workload.checkpointing,
        bf16=ask.cuda,
        use_cpu=not ask.cuda,
        shuffle_dataset=False,
        dataloader_pin_memory=ask.cuda,
        logging_strategy="no",
        logging_first_step=True,  # with the gradient norm that is checked
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **ask.options,
    )


class Rewards:
    """The reward function, with the same grader as ours; keeps what it was asked of the latest step."""

    def __init__(self, ask: Ask):
        self._ask = ask
        self.questions: list[Any] = []
        self.responses: list[list[int]] = []
        self.given: list[float] = []

    def grade(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        rewards = [_grade(text, gold) for text, gold in zip(texts, answer, strict=True)]
        if self._ask.workload.reward == "mixed":
            rewards = [float(number % 2) for number, _ in enumerate(rewards)]
        self.questions, self.responses, self.given = prompts, completion_ids, rewards
        return rewards


def _grade(text: str, gold: str) -> float:
    grade = graders.grade_math(text, Problem(0, (), gold))
    return float(graders.verify_math(*grade)) if isinstance(grade, graders.Doubt) else grade


class _Timed(GRPOTrainer):
    """Notes the seconds of the step's parts."""

    def __init__(self, **arguments: Any):
        self.rollout = self.grading = self.preparing = 0.0
        super().__init__(**arguments)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        started = time.perf_counter()
        inputs = super()._prepare_inputs(generation_batch)
        self.preparing += time.perf_counter() - started
        return inputs

    def _generate_single_turn(self, *arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        drawn = super()._generate_single_turn(*arguments, **named)
        self.rollout += time.perf_counter() - started
        return drawn

    def _calculate_rewards(self, *arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        rewards = super()._calculate_rewards(*arguments, **named)
        self.grading += time.perf_counter() - started
        return rewards

    def parts(self, seconds: float) -> dict[str, float]:
        """Of a step that took so long; the next one starts at 0."""
        found = {
            "rollout": self.rollout,
            "grading": self.grading,
            "update": seconds - self.preparing,
            "rest": self.preparing - self.rollout - self.grading,
        }
        self.rollout = self.grading = self.preparing = 0.0
        return found


class _Orders(TrainerCallback):
    def __init__(self, ask: Ask, desk: Desk, trainer: _Timed, rewards: Rewards, chat: ChatFormat):
        self._ask = ask
        self._desk = desk
        self._trainer = trainer
        self._rewards = rewards
        self._chat = chat
        self._started = 0.0
        self._before: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._before = self._weights()
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._desk.checking:  # its gradient norm comes with the logs
            return
        parts = self._trainer.parts(time.perf_counter() - self._started)
        responses = self._rewards.responses
        self._desk.report(parts, len(responses), sum(map(len, responses)))
        self._wait(control)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        logs = given["logs"]
        if "grad_norm" not in logs:  # the last one, of the whole training
            return
        done = truth.Done(self._samples(), logs["loss"], logs["grad_norm"], self._before, self._weights())
        self._desk.answer(truth.errors(self._ask, done))
        self._before = {}
        self._trainer.parts(0.0)
        self._wait(control)

    def _wait(self, control: Any) -> None:
        control.should_training_stop = not self._desk.wait()
        self._started = time.perf_counter()

    def _samples(self) -> list[truth.Sample]:
        rewards, samples = self._rewards, self._ask.workload.samples
        return [
            truth.Sample(number // samples, tuple(self._chat.prompt_ids(question)), tuple(ids), reward)
            for number, (question, ids, reward) in enumerate(
                zip(rewards.questions, rewards.responses, rewards.given, strict=True)
            )
        ]

    def _weights(self) -> dict[str, Any]:
        model: Any = self._trainer.model
        return {name: value.detach().clone() for name, value in model.named_parameters()}
