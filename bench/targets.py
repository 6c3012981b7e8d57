"""The speeds that the ops are meant to reach, held against the figures of one run.

Only the main comparison counts: no case with rows that could be skipped, none that is there to be compared with.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.measure import CEILING, OURS, PLAIN
from bench.shapes import DEFAULT, LARGE, MEDIUM, SMALL

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """`figure` of each case has to be at least (or at most) `bound` in all of them; the worst is shown."""

    name: str
    op: str
    figure: Callable[[Mapping[str, Row]], float | None]  # from the records of one case by contender
    bound: float
    at_most: bool = False
    only: Callable[[Row], bool] = lambda row: True  # which cases

    def verdict(self, figure: float) -> bool:
        return figure <= self.bound if self.at_most else figure >= self.bound


@dataclass(frozen=True)
class Outcome:
    name: str
    figure: str
    bound: str
    met: bool | None  # None: not measured

    @property
    def words(self) -> str:
        return {True: "met", False: "NOT MET", None: "not measured"}[self.met]


def times_slower(contender: str) -> Callable[[Mapping[str, Row]], float | None]:
    return lambda rows: rows[contender]["to_ours"] if contender in rows else None


def _fastest_peer(rows: Mapping[str, Row]) -> float | None:
    ratios = [row["to_ours"] for name, row in rows.items() if name not in (OURS, CEILING) and row["to_ours"]]
    return min(ratios, default=None)


def _fastest_vllm(rows: Mapping[str, Row]) -> float | None:
    return _fastest_peer({name: row for name, row in rows.items() if name in (VLLM_EAGER, VLLM_COMPILED)})


def _of(model: str) -> Callable[[Row], bool]:
    return lambda row: row["case"].startswith(model)


def _rows_of(tokens: int) -> Callable[[Row], bool]:
    return lambda row: (row["tokens"], row["vocabulary"]) == (tokens, _QWEN3_4B)


def _milliseconds(rows: Mapping[str, Row]) -> float | None:
    return 1000 * rows[OURS]["median"]


def _gigabytes(rows: Mapping[str, Row]) -> float | None:
    memory = rows[OURS]["memory"]
    return None if memory is None else memory / 1e9


def _rate(rows: Mapping[str, Row]) -> float | None:
    return rows[OURS]["rate"]


def _of_ceiling(rows: Mapping[str, Row]) -> float | None:
    return rows[OURS]["of_ceiling"]


def _memory_share(of: str) -> Callable[[Mapping[str, Row]], float | None]:
    def share(rows: Mapping[str, Row]) -> float | None:
        ours, other = rows[OURS]["memory"], rows[of]["memory"] if of in rows else None
        return ours / other if ours is not None and other else None

    return share


def _time_share(of: str) -> Callable[[Mapping[str, Row]], float | None]:
    return lambda rows: 1 / rows[of]["to_ours"] if of in rows and rows[of]["to_ours"] else None


def _update_mfu(rows: Mapping[str, Row]) -> float | None:
    ours = rows[OURS]
    if not ours["details"] or not ours["of_ceiling"]:
        return None
    return ours["details"][UPDATE_RATE] * ours["of_ceiling"] / ours["rate"]


def _most_tokens(records: Iterable[Row], op: str) -> int:
    return max((row["tokens"] for row in records if row["op"] == op and row["memory"] is not None), default=0)


LINEAR, LOGPROBS = "linear_grpo_loss", "token_logprobs"
ROLLOUT, SWITCHES, EXTEND = "rollout", "rollout switches", "rollout two turns"
HF, VLLM_EAGER, VLLM_COMPILED = "transformers generate", "vllm eager", "vllm compiled"
WITHOUT_GROUPS, WITHOUT_GRAPHS = "without group attention", "without CUDA graphs"
UPDATE_RATE = "update TFLOP/s"  # among a step's details
STEP, DEFAULT_JOB, TRL = "step", "step of the default job", "TRL"
SHARED_PREFIX, WITHOUT_PREFIX = "update, shared prefix", "without shared prefix"
GPU_TARGETS = [
    Target("share of the rate of the bare products", LINEAR, _of_ceiling, 0.9),
    Target("times as fast as Liger's scaled CE + loss", LINEAR, times_slower("liger scaled CE + loss"), 1.4),
    Target("times as fast as Liger's chunked loss", LINEAR, times_slower("liger chunked"), 5),
    Target("times as fast as verl's kernel + loss", LINEAR, times_slower("verl + loss"), 2.5),
    Target("times as fast as the fastest peer", LINEAR, _fastest_peer, 1),
    Target("share of the copy bandwidth, forward", "token_logprobs forward", _of_ceiling, 0.85),
    Target("share of the copy bandwidth, with backward", LOGPROBS, _of_ceiling, 0.85),
    Target("share of the ceiling", ROLLOUT, _of_ceiling, 0.7),
    Target("times as fast as without group attention", SWITCHES, times_slower(WITHOUT_GROUPS), 1.5),
    Target("times as fast as TRL", STEP, times_slower(TRL), 4, only=_of(LARGE)),
    Target("MFU of the update", STEP, _update_mfu, 0.4),
]
ROLLOUT_CPU_TARGETS = [
    Target("times as fast as transformers generate, default model", ROLLOUT, times_slower(HF), 3, only=_of(DEFAULT)),
    Target("times as fast as transformers generate, Qwen3-0.6B", ROLLOUT, times_slower(HF), 2.2, only=_of(SMALL)),
    Target("times as fast as vLLM, Qwen3-0.6B", ROLLOUT, _fastest_vllm, 1, only=_of(SMALL)),
]

STEP_CPU_TARGETS = [
    Target("share of TRL's time, default model", STEP, _time_share(TRL), 0.4, at_most=True, only=_of(DEFAULT)),
    Target("share of TRL's time, graded as they are", DEFAULT_JOB, _time_share(TRL), 0.4, at_most=True),
    Target("share of TRL's time, 100 M", STEP, _time_share(TRL), 1 / 3, at_most=True, only=_of(MEDIUM)),
    Target("share of TRL's memory, 100 M", STEP, _memory_share(TRL), 1, at_most=True, only=_of(MEDIUM)),
    # 0.48 of the operations are left there. The default model's case of 96 + 64 tokens has no target: 0.496 of its
    # operations are left. At the 100 M shape response tokens alone see the head, a quarter of the weights.
    Target(
        "share of the time without, the default job's refinements",
        SHARED_PREFIX,
        _time_share(WITHOUT_PREFIX),
        0.5,
        at_most=True,
        only=_of(f"{DEFAULT}, 32 x 8"),
    ),
]


_QWEN3_4B = 151_936  # tokens of its vocabulary
# Of the stages of gpu_check.sh, on an H200.
OPS_GOALS = [
    Target("ms, 4096 rows", LINEAR, _milliseconds, 13.0, at_most=True, only=_rows_of(4096)),
    Target("GB beyond the inputs, 4096 rows", LINEAR, _gigabytes, 2.1, at_most=True, only=_rows_of(4096)),
    Target("times as fast as the fastest peer", LINEAR, _fastest_peer, 1),
    Target("ms, 8192 rows", LOGPROBS, _milliseconds, 1.6, at_most=True, only=_rows_of(8192)),
    Target("ms, 1024 rows", LOGPROBS, _milliseconds, 0.5, at_most=True, only=_rows_of(1024)),
]
DECODE_GOALS = [
    Target("tokens/s, 4 B, 8 x 8", ROLLOUT, _rate, 12_000, only=_of("Qwen3-4B shape, 8 x 8 ")),
    Target("tokens/s, 4 B, 32 x 8", ROLLOUT, _rate, 28_000, only=_of("Qwen3-4B shape, 32 x 8 ")),
    Target("tokens/s, 0.6 B, 8 x 8", ROLLOUT, _rate, 35_000, only=_of(SMALL)),
]


def cpu_targets(records: Iterable[Row]) -> list[Target]:
    """The memory target is for the most tokens: gradient and tile, which do not grow with them, are a floor."""
    most = _most_tokens(records, LINEAR)
    return [
        Target("times as fast as plain torch", LINEAR, times_slower(PLAIN), 1),
        Target("times as fast as Liger's chunked loss", LINEAR, times_slower("liger chunked"), 2),
        Target(
            f"share of plain torch's peak memory, T={most}",
            LINEAR,
            _memory_share(PLAIN),
            0.1,
            at_most=True,
            only=lambda row: row["tokens"] == most and row["memory"] is not None,
        ),
        *ROLLOUT_CPU_TARGETS,
        *STEP_CPU_TARGETS,
    ]


def outcomes(document: Mapping[str, Any]) -> list[Outcome]:
    """Each target for the device of a run."""
    records = document["results"]
    targets = GPU_TARGETS if document["device"] == "cuda" else cpu_targets(records)
    return [outcome(target, records) for target in targets]


def outcome(target: Target, records: Iterable[Row]) -> Outcome:
    """Whether the records meet it."""
    cases: dict[str, dict[str, Row]] = {}
    for row in records:
        if row["op"] == target.op and row["main"]:
            cases.setdefault(row["case"], {})[row["contender"]] = row
    figures = {
        case: figure
        for case, rows in cases.items()
        if OURS in rows and target.only(rows[OURS]) and (figure := target.figure(rows)) is not None
    }
    bound = f"{'<=' if target.at_most else '>='} {target.bound:g}"
    name = f"{target.op}: {target.name}"
    if not figures:
        return Outcome(name, "-", bound, None)
    worst = (max if target.at_most else min)(figures, key=lambda case: figures[case])
    others = f" (worst of {len(figures)}: {worst})" if len(figures) > 1 else f" ({worst})"
    return Outcome(name, f"{figures[worst]:.3g}{others}", bound, target.verdict(figures[worst]))
