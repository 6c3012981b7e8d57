"""Rollouts: the engine against transformers and vLLM, and against itself without what makes it fast."""

from typing import Any

import pytest

from bench.measure import OURS, Contender, Op
from bench.replay import CLOCK, Measured
from bench.rollout_cases import extend_cases, rollout_batch, rollout_cases, switch_cases, workload_of
from bench.rollout_ceiling import DECODE
from bench.rollout_peers import hf_generate, hf_generate_batch, only_on, ours, two_turns, vllm
from bench.rollout_truth import judge, limits
from bench.targets import EXTEND, HF, ROLLOUT, SWITCHES, VLLM_COMPILED, VLLM_EAGER, WITHOUT_GRAPHS, WITHOUT_GROUPS
from bench.vllm_process import VLLM

# The first test of a case measures all of its rounds, and a peer may compile for minutes first.
pytestmark = pytest.mark.timeout(1800)


def _op(name: str, **rest: Any) -> Op:
    return Op(
        name=name,
        module=__name__,
        inputs=rollout_batch,
        judge=judge,
        limits=limits,
        work=lambda case: workload_of(case).tokens,
        unit="tokens/s",
        **rest,
    )


OPS = [
    _op(
        ROLLOUT,
        cases=rollout_cases,
        contenders={
            OURS: Contender(ours()),
            HF: Contender(hf_generate),
            "transformers generate_batch": Contender(hf_generate_batch),
            VLLM_EAGER: Contender(vllm(eager=True), VLLM.unable, in_targets=True),
            VLLM_COMPILED: Contender(vllm(eager=False), VLLM.unable, in_targets=True),
        },
        ceiling=DECODE,
    ),
    _op(
        SWITCHES,
        cases=switch_cases,
        contenders={
            OURS: Contender(ours()),
            WITHOUT_GROUPS: Contender(ours(group_attention=False)),
            "transformers' modules": Contender(ours(decoder="modules"), only_on("cpu")),
            WITHOUT_GRAPHS: Contender(ours(decoder="modules"), only_on("cuda")),
        },
    ),
    _op(
        EXTEND,
        cases=extend_cases,
        contenders={OURS: Contender(two_turns(extend=True)), "prefilled anew": Contender(two_turns(extend=False))},
    ),
]


@pytest.mark.benchmark(timer=CLOCK.now)
def test_rollout(measured: Measured, benchmark: Any) -> None:
    measured.replay(benchmark)
