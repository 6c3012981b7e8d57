"""Every op against its definition in plain torch, on small inputs; then rollouts of the shipped model, which use most.

Letters: T tokens, S sequences, V vocabulary, H hidden size, D head size.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import thinktwice_kernels
from thinktwice_fast.cli.inference import Inference
from thinktwice_fast.cli.options import ModelChoice
from thinktwice_fast.errors import one_line
from thinktwice_fast.model import csrc, products
from thinktwice_fast.model import reference as in_torch
from thinktwice_fast.model.attention import PrefixAttention
from thinktwice_fast.model.flash import flash_for
from thinktwice_fast.model.policy import Policy, linear_head
from thinktwice_fast.model.shared_prefix import in_torch as prefix_in_torch
from thinktwice_fast.records import Request, Sampling
from thinktwice_kernels import reference

LENGTHS = (37, 1, 64, 26)  # of S sequences
T, V, H = sum(LENGTHS), 515, 64
QUERY_HEADS, KV_HEADS, D = 4, 2, 64
_BLOCK = 16  # tokens of a block of the cache
_TABLE = (3 * 256 + 5) // _BLOCK + 1  # blocks of its longest sequence

# Relative; of results that are rounded to a shorter type a few units of its rounding.
_ERROR, _UNITS = 1e-5, 4
# Nats between a token's log-probability in rollouts and in training, on average.
_MISMATCH = {torch.float32: 1e-3, torch.bfloat16: 0.1}

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Op:
    """An op, and what it is compared with.

    Inputs are on the CPU. Those in float64 are brought to the type under test, the others keep theirs; those that
    want a gradient have theirs compared too.
    """

    name: str
    run: Callable[..., Any]
    definition: Callable[..., Any]  # in float64 where the inputs are
    inputs: Callable[[], Inputs]
    types: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    cpu_only: bool = False


class Result(NamedTuple):
    """How an op did."""

    name: str
    error: float  # the worst, relative to what it may be: above 1 it is wrong; NaN where it raised
    seconds: float  # with what compiling it takes where it has not run here before
    failure: str = ""  # what it raised

    @property
    def right(self) -> bool:
        """Whether it may be used."""
        return self.error <= 1


def self_test(device: torch.device, dtype: torch.dtype) -> Iterator[Result]:
    """One result after the other.

    Args:
        device: to test on.
        dtype: that a run computes in there; float32 or bfloat16.
    """
    for op in OPS:
        if dtype in op.types and (device.type == "cpu" or not op.cpu_only):
            yield _timed(op.name, partial(_compare, op, device, dtype))
    yield _timed("rollouts against training", partial(_rollouts, device, dtype))


def _timed(name: str, test: Callable[[], float]) -> Result:
    started, failure, error = time.perf_counter(), "", float("nan")
    try:
        error = test()
    except Exception as raised:  # whatever a broken build, driver or GPU does
        failure = one_line(raised)
    return Result(name, error, time.perf_counter() - started, failure)


def _compare(op: Op, device: torch.device, dtype: torch.dtype) -> float:
    inputs = op.inputs()
    exact = _results(op.definition, _moved(inputs, torch.device("cpu"), dtype, torch.float64))
    plain = _results(op.definition, _moved(inputs, device, dtype, dtype))
    found = _results(op.run, _moved(inputs, device, dtype, dtype))
    least = max(_ERROR, _UNITS * torch.finfo(dtype).eps if dtype != torch.float32 else 0.0)
    return max(
        _error(got, want) / max(least, 2 * _error(near, want))
        for got, near, want in zip(found, plain, exact, strict=True)
    )


def _moved(inputs: Inputs, device: torch.device, rounded: torch.dtype, dtype: torch.dtype) -> Inputs:
    """What is in float64 rounded to one type and held in another, everything on the device."""

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        value = x.detach().to(rounded).to(dtype) if x.dtype == torch.float64 else x.detach()
        return value.to(device, copy=True).requires_grad_(x.requires_grad)

    return {name: move(x) for name, x in inputs.items()}


def _results(function: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """All that it gives, then the gradients of the inputs that want one, each in float64 on the CPU."""
    outputs = list(_tensors(function(**inputs)))
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    gradients: Iterable[Tensor] = ()
    if leaves:
        flowing = [x.double() for x in outputs if x.requires_grad]
        gradients = torch.autograd.grad([(x * _spread(x)).sum() for x in flowing], leaves)
    return [x.detach().cpu().double() for x in (*outputs, *gradients)]


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (tuple, list)):
        for part in given:
            yield from _tensors(part)


def _spread(like: Tensor) -> Tensor:
    """Weights that no two neighbours share, so that a gradient in the wrong place shows."""
    return torch.arange(1, like.numel() + 1, device=like.device, dtype=torch.float64).cos().view(like.shape)


def _error(got: Tensor, want: Tensor) -> float:
    """Relative; infinite where that is not a number."""
    off = float((got - want).norm() / want.norm().clamp(min=1e-2))
    return off if off == off else float("inf")


def _normal(*shape: int, seed: int, scale: float = 1.0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_(grad)


def _ids(*shape: int, below: int) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(below))


def _borders(lengths: Iterable[int]) -> Tensor:  # int32 [S + 1]
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _loss_inputs() -> Inputs:
    return {
        "advantages": _normal(len(LENGTHS), seed=1).float(),
        "cu_seqlens": _borders(LENGTHS),
        "old_logps": -3 + _normal(T, seed=2).float(),
        "epsilon_high": 0.28,
        "dual_clip": 3.0,
    }


def _head_inputs() -> Inputs:
    return {
        "hidden": _normal(T, H, seed=3, grad=True),
        "weight": _normal(V, H, seed=4, scale=0.2, grad=True),
        "targets": _ids(T, below=V),
    }


def _angles() -> Inputs:
    turned = torch.arange(T)[:, None] * 10_000.0 ** -(torch.arange(D) % (D // 2) / (D // 2))
    return {"cos": turned.cos().float(), "sin": turned.sin().float()}


def _cache(seed: int) -> Tensor:
    """float64 [B, Hkv, bs, D]."""
    return _normal(2 * _TABLE, KV_HEADS, _BLOCK, D, seed=seed)


def _written(op: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """The op, which writes into its arguments, as a function that gives them back."""

    def run(**inputs: Any) -> tuple[Tensor, ...]:
        op(**inputs)
        return tuple(inputs[name] for name in ("q", "k_cache", "v_cache", "out", "lse") if name in inputs)

    return run


def _new_keys() -> Inputs:
    return {
        "k": _normal(T, KV_HEADS, D, seed=6),
        "v": _normal(T, KV_HEADS, D, seed=7),
        "k_cache": _cache(8),
        "v_cache": _cache(9),
        "slots": torch.randperm(2 * _TABLE * _BLOCK, generator=torch.Generator().manual_seed(10))[:T],
    }


def _decoding() -> Inputs:
    """Two sequences, one token each, that share their first 256 keys: whole chunks on every device."""
    own = torch.arange(2 * _TABLE, dtype=torch.int32).view(2, -1)
    own[1, : 256 // _BLOCK] = own[0, : 256 // _BLOCK]
    return {
        "q": _normal(2, QUERY_HEADS, D, seed=11),
        "k_cache": _cache(8),
        "v_cache": _cache(9),
        "block_tables": own,
        "context_lens": torch.tensor([3 * 256 + 5, 300], dtype=torch.int32),
        "scale": D**-0.5,
        "window": 0,
    }


def _prefilling() -> Inputs:
    """New tokens of two sequences, those of the first behind some that are there, with a window."""
    return _decoding() | {
        "q": _normal(40, QUERY_HEADS, D, seed=12),
        "cu_seqlens_q": torch.tensor([0, 39, 40], dtype=torch.int32),
        "window": 100,
    }


def _grouped() -> Inputs:
    return _decoding() | {
        "group_offsets": torch.tensor([0, 2], dtype=torch.int32),
        "shared_blocks": torch.tensor([256 // _BLOCK], dtype=torch.int32),
    }


def _grouped_by_definition(group_offsets: Tensor, shared_blocks: Tensor, **inputs: Any) -> Tensor:
    starts = torch.arange(3, dtype=torch.int32, device=group_offsets.device)
    return in_torch.paged_attention(**inputs, cu_seqlens_q=starts)


def _segments() -> Inputs:
    """A prompt, and three responses that continue it."""
    return {
        "q": _normal(T, QUERY_HEADS, D, seed=13, grad=True),
        "k": _normal(T, KV_HEADS, D, seed=14, grad=True),
        "v": _normal(T, KV_HEADS, D, seed=15, grad=True),
    }


def _two_parts() -> Inputs:
    """The first query sees no key of the other."""
    lse = _normal(2, QUERY_HEADS, T, seed=31).float()
    lse[1, :, 0] = torch.inf
    out, other_out = _normal(2, T, QUERY_HEADS, D, seed=30)
    return {"out": out, "lse": lse[0], "other_out": other_out, "other_lse": lse[1]}


def _prefix_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flash = flash_for(q.device, q.dtype, QUERY_HEADS, KV_HEADS, D)
    attention = PrefixAttention.from_segments(list(LENGTHS), [-1, 0, 0, 0], q.device, flash)
    return attention.attend(0, q, k, v, D**-0.5, 0)


def _draws() -> Inputs:
    rows = 16
    return {
        "logits": _normal(rows, V, seed=16, scale=2.0),
        "temperature": torch.tensor([0.0, 0.7, 1.0, 1.3]).repeat(rows // 4),
        "top_k": torch.tensor([0, 50], dtype=torch.int32).repeat(rows // 2),
        "top_p": torch.tensor([1.0, 0.9, 0.8, 1.0]).repeat_interleave(rows // 4),
        "min_p": torch.tensor([0.0, 0.02]).repeat_interleave(rows // 2),
        "seed": 17,
        "sample_ids": torch.arange(rows) + 2**40,
        "positions": torch.arange(rows) * 3,
    }


def _advanced(op: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """``csrc.advance`` as a function that gives back what it writes into."""

    def run(drawn: Tensor, logps: Tensor, entropies: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        op(csrc.Sampled(drawn, logps, logps, entropies), **inputs)
        return tuple(
            x for name, x in inputs.items() if name not in ("stop_ids", "block_tables") and isinstance(x, Tensor)
        )

    return run


def _rows() -> Inputs:
    rows, steps = 200, 2
    state = torch.stack([_ids(rows, below=below) for below in (V, 3 * _BLOCK, 9, 4, 5, 2)])
    return {
        "drawn": _ids(rows, below=V // 2) - 1, "logps": _normal(rows, seed=31).float(),
        "entropies": _normal(rows, seed=32).float(), "stop_ids": torch.arange(9),
        "block_tables": _ids(rows, 2, below=70).int(), "block_size": _BLOCK, "spare_slot": 9999, "state": state,
        "context_lens": torch.zeros(rows, dtype=torch.int32),
        "new_tokens": torch.zeros(steps, rows, dtype=torch.int64), "new_logps": torch.zeros(steps, rows),
        "new_entropies": torch.zeros(steps, rows),
    }  # fmt: skip


OPS = (
    Op("token_logprobs", thinktwice_kernels.token_logprobs, reference.token_logprobs, lambda: {
        "logits": _normal(T, V, seed=5, grad=True), "targets": _ids(T, below=V), "return_entropy": True}),
    Op("linear_logits", thinktwice_kernels.linear_logits, reference.linear_logits, lambda: {
        "hidden": _normal(T, H, seed=3), "weight": _normal(V, H, seed=4)}),
    Op("linear_logprobs", thinktwice_kernels.linear_logprobs, reference.linear_logprobs,
       lambda: _head_inputs() | {"return_entropy": True}),
    Op("grpo_loss", thinktwice_kernels.grpo_loss, reference.grpo_loss,
       lambda: _loss_inputs() | {"logps": (-3 + _normal(T, seed=18)).detach().requires_grad_()}),
    Op("linear_grpo_loss", thinktwice_kernels.linear_grpo_loss, reference.linear_grpo_loss,
       lambda: _loss_inputs() | _head_inputs()),
    Op("group_advantages", thinktwice_kernels.group_advantages, reference.group_advantages, lambda: {
        "rewards": _ids(T, below=5).float(), "group_ids": _ids(T, below=9), "scale_rewards": "group"}),
    Op("rms_norm", thinktwice_kernels.rms_norm, reference.rms_norm, lambda: {
        "x": _normal(T, H, seed=19, grad=True), "weight": _normal(H, seed=20, grad=True),
        "residual": _normal(T, H, seed=21, grad=True), "eps": 1e-6}),
    Op("swiglu", thinktwice_kernels.swiglu, reference.swiglu, lambda: {
        "gate_up": _normal(T, 2 * H, seed=22, grad=True)}),
    Op("rotary", thinktwice_kernels.rotary, reference.rotary, lambda: _angles() | {
        "qkv": _normal(T, (QUERY_HEADS + 2 * KV_HEADS) * D, seed=23, grad=True), "query_heads": QUERY_HEADS,
        "kv_heads": KV_HEADS, "q_norm": _normal(D, seed=24, grad=True), "k_norm": _normal(D, seed=25, grad=True)}),
    Op("merge_attention", _written(thinktwice_kernels.merge_attention), _written(reference.merge_attention),
       _two_parts),
    Op("prefix attention", _prefix_attention,
       lambda **inputs: prefix_in_torch(**inputs, lengths=LENGTHS, prefix=(-1, 0, 0, 0), scale=D**-0.5), _segments),
    Op("write_kv", _written(csrc.write_kv), _written(in_torch.write_kv), _new_keys),
    Op("rotary_write_kv", _written(csrc.rotary_write_kv), _written(in_torch.rotary_write_kv),
       lambda: _new_keys() | _angles() | {
           "q": _normal(T, QUERY_HEADS, D, seed=26), "q_norm": _normal(D, seed=24), "k_norm": _normal(D, seed=25),
           "eps": 1e-6, "positions": torch.arange(T)}),
    Op("copy_blocks", _written(csrc.copy_blocks), _written(in_torch.copy_blocks), lambda: {
        "k_cache": _cache(8)[None], "v_cache": _cache(9)[None], "pairs": torch.tensor([[0, 5], [1, 7]])}),
    Op("paged_attention", csrc.paged_attention, in_torch.paged_attention, _prefilling),
    Op("grouped_decode_attention", csrc.grouped_decode_attention, _grouped_by_definition, _grouped),
    Op("sample", csrc.sample, lambda **inputs: in_torch.sample(**inputs)[:-1], _draws),
    Op("draw", csrc.draw, lambda **inputs: in_torch.sample(**inputs)[:-1], lambda: _draws() | {
        "seed": torch.tensor([17])}),
    Op("advance", _advanced(csrc.advance), _advanced(in_torch.advance), _rows),
    Op("exact products", products.exact_product, torch.nn.functional.linear, lambda: {
        "x": _normal(T, H, seed=27), "weight": _normal(V, H, seed=28), "bias": _normal(V, seed=29)},
       types=(torch.float32,), cpu_only=True),
)  # fmt: skip
"""All of both packages, but for those that the last test uses as a whole."""


def _rollouts(device: torch.device, dtype: torch.dtype) -> float:
    """Engine, cache, decoder or graphs, sampler: the log-probabilities that they note, and those of training."""
    kind: Any = str(dtype).removeprefix("torch.")
    where: Any = device.type
    inference = Inference(ModelChoice(device=where, dtype=kind))
    prompt = tuple(inference.chat.prompt_ids([{"role": "user", "content": "8-8+5+6-9"}]))
    most = 40
    engine = inference.engine(8, len(prompt) + most)
    ended = engine.run([Request(0, prompt, tuple(range(8)), Sampling(max_tokens=most))], seed=30)
    policy, off, count = Policy(inference.model), 0.0, 0
    for rollout in ended:
        ids = torch.tensor([*prompt, *rollout.response], device=inference.model.device)
        rows = torch.arange(len(ids), device=ids.device)
        attention = PrefixAttention.from_segments([len(ids)], [-1], ids.device)
        with torch.no_grad():
            logits = policy(ids, rows, attention, rows[len(prompt) - 1 : -1], linear_head)
            logps = thinktwice_kernels.token_logprobs(logits, ids[len(prompt) :])
        off += float((logps.cpu() - torch.tensor(rollout.logps)).abs().sum())
        count += len(rollout.response)
    mean = off / count
    return mean / _MISMATCH[dtype] if mean == mean else float("inf")
