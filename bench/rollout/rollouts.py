"""Rollouts: the engine against transformers and vLLM, and against itself without what makes it fast."""

from typing import Any

from bench.core.contender import OURS, Contender, only_on
from bench.core.op import Op
from bench.core.targets import Target, fastest_peer, own, times_slower
from bench.models import DEFAULT, SMALL
from bench.rollout.cases import ROLLOUTS, SWITCHES, TWO_TURNS, rollout_batch
from bench.rollout.ceiling import DECODE
from bench.rollout.contenders import hf_generate, hf_generate_batch, lacks_generate_batch, ours, two_turns
from bench.rollout.truth import judge, limits
from bench.rollout.vllm import VLLM, vllm

WITHOUT_GROUPS, WITHOUT_GRAPHS = "without group attention", "without CUDA graphs"
_HF, _VLLM = "transformers generate", ("vllm eager", "vllm compiled")


def _op(name: str, **rest: Any) -> Op:
    return Op(
        name=name,
        inputs=rollout_batch,
        judge=judge,
        limits=limits,
        work=lambda case: case.shape.tokens,
        unit="tokens/s",
        **rest,
    )


ROLLOUT = _op(
    "rollout",
    cases=ROLLOUTS,
    contenders={
        OURS: Contender(ours()),
        _HF: Contender(hf_generate),
        "transformers generate_batch": Contender(hf_generate_batch, lacks_generate_batch),
        **{name: Contender(vllm(name == _VLLM[0]), VLLM.unable, in_targets=True) for name in _VLLM},
    },
    ceiling=DECODE,
    targets={
        "cpu": [
            Target("times as fast as transformers generate, default model", times_slower(_HF), 3, only=DEFAULT),
            Target("times as fast as transformers generate, Qwen3-0.6B", times_slower(_HF), 2.2, only=SMALL),
            Target("times as fast as vLLM, Qwen3-0.6B", fastest_peer(_VLLM), 1, only=SMALL),
        ],
        "cuda": [Target("share of the ceiling", own("of_ceiling"), 0.7)],
    },
)
SWITCHED = _op(
    "rollout switches",
    cases=SWITCHES,
    contenders={
        OURS: Contender(ours()),
        WITHOUT_GROUPS: Contender(ours(group_attention=False)),
        "transformers' modules": Contender(ours(decoder="modules"), only_on("cpu")),
        WITHOUT_GRAPHS: Contender(ours(decoder="modules"), only_on("cuda")),
    },
    targets={"cuda": [Target("times as fast as without group attention", times_slower(WITHOUT_GROUPS), 1.5)]},
)
EXTENDED = _op(
    "rollout two turns",
    cases=TWO_TURNS,
    contenders={OURS: Contender(two_turns(extend=True)), "prefilled anew": Contender(two_turns(extend=False))},
)
OPS = [ROLLOUT, SWITCHED, EXTENDED]
