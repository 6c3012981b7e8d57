"""Whether what a contender drew is what the model says, by transformers' own forward pass over whole sequences.

Letters: N sequences, n new tokens, V vocabulary.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bench.core.contender import Contender, Outputs
from bench.rollout.cases import RolloutBatch

_JUDGED_FLOP = 3e11  # of the forward pass: so few of a large model's sequences are looked at
_STANDARD_ERRORS = 5.0
# Shares and nats. fp32 rounds logits to about 1e-5 of their spread; a wrong key or position moves them by a tenth.
_LIMITS = {
    torch.float32: {"tokens": 0.0, "greedy": 1e-4, "logps": 1e-3, "draws": 0.0},
    torch.bfloat16: {"tokens": 0.0, "logps": 0.1, "draws": 0.0},
}


def limits(dtype: torch.dtype) -> Mapping[str, float]:
    return _LIMITS[dtype]


def judge(batch: RolloutBatch, contender: Contender) -> dict[str, float]:
    """How far off the contender is, by what ``limits`` names.

    tokens: share of the tokens that are missing, or that nobody asked for.
    draws: 0 while the mean log-probability of the drawn tokens lies within 5 standard errors of minus the mean
        entropy, as it does for tokens drawn from the model's own distribution; otherwise how many.
    logps: root mean square error of the log-probabilities that it gives, over their spread.
    greedy: nats by which the tokens of a greedy run fall short of transformers' at most: 0, but for ties.
    """
    drawn = contender.run(batch)
    errors = {"tokens": _missing(batch, drawn["tokens"])}
    if errors["tokens"]:
        return errors
    rows = _judged(batch)
    logps, entropies, _ = _forward(batch, drawn, rows)
    off = logps + entropies
    errors["draws"] = _beyond(float(off.mean().abs() / (off.std() / math.sqrt(off.numel()))))
    if "logps" in drawn:
        errors["logps"] = float((drawn["logps"][rows].flatten() - logps).square().mean().sqrt() / logps.std())
    if batch.theirs.dtype == torch.float32:
        greedy = contender.run(replace(batch, temperature=0.0))
        missing = _missing(batch, greedy["tokens"])
        errors["greedy"] = math.inf if missing else float(_forward(batch, greedy, rows)[2].max())
    return errors


def _missing(batch: RolloutBatch, tokens: Tensor) -> float:
    wanted = batch.workload.tokens
    if len(tokens) != batch.workload.sequences:
        return math.inf
    return abs(int((tokens >= 0).sum()) - wanted) / wanted


def _beyond(standard_errors: float) -> float:
    return 0.0 if standard_errors <= _STANDARD_ERRORS else standard_errors


def _judged(batch: RolloutBatch) -> Tensor:  # int64, some of the N sequences, from first to last
    sequences = batch.workload.sequences
    weights = sum(parameter.numel() for parameter in batch.theirs.parameters())
    count = max(2, min(sequences, int(_JUDGED_FLOP / (2 * weights * batch.longest))))
    return torch.linspace(0, sequences - 1, count).round().long().unique()


@torch.inference_mode()
def _forward(
    batch: RolloutBatch,
    drawn: Outputs,
    rows: Tensor,  # int64, which of the N sequences
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy, and how much likelier the likeliest token is; nats, each of all new tokens in a row.

    In float32, whatever the model's type.
    """
    model = batch.theirs
    if model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    parts = []
    for row in rows.tolist():
        tokens = drawn["tokens"][row].to(batch.device)
        prompt = batch.prompts[row // batch.workload.samples]
        context = drawn["contexts"][row].tolist() if "contexts" in drawn else list(prompt)
        ids = torch.cat([tokens.new_tensor(context), tokens[:-1]])
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=len(tokens)).logits[0]  # [n, V]
        logps = logits.float().log_softmax(1)
        chosen = logps.gather(1, tokens[:, None]).squeeze(1)
        parts.append(torch.stack([chosen, -(logps.exp() * logps).sum(1), logps.amax(1) - chosen]).cpu())
    logp, entropy, short = torch.cat(parts, 1)
    return logp, entropy, short
