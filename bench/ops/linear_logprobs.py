"""`linear_logprobs`, forward and backward: log-probabilities from the last hidden state."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from bench.core.contender import OURS, Contender, Outputs, compiled
from bench.core.op import Op
from bench.ops.head import PEERS, PRODUCTS, flop, gradients, torch_logps, true_gradients, true_logps
from bench.ops.inputs import LinearBatch, head_case, linear_batch
from thinktwice_kernels import linear_logprobs


def outputs(logps: Callable[[LinearBatch], Tensor]) -> Callable[[LinearBatch], Outputs]:
    def run(batch: LinearBatch) -> Outputs:
        values = logps(batch)
        return {"logps": values.detach(), **gradients(values, batch, batch.d_logps.to(values.dtype))}

    return run


def ours(batch: LinearBatch) -> Tensor:
    return linear_logprobs(batch.hidden, batch.weight, batch.targets)


def truth(batch: LinearBatch) -> Outputs:
    return {"logps": true_logps(batch), **true_gradients(batch, batch.d_logps.double())}


OPS = [
    Op(
        name="linear_logprobs",
        cases={
            "toy": [head_case("toy", 64, only_targets=True, memory=False)],
            "cpu": [head_case("small vocabulary", 1024, memory=False)],
            "gpu": [head_case("Qwen3-4B", 8192), head_case("OLMo-3-7B", 8192)],
        },
        inputs=linear_batch,
        truth=truth,
        contenders={
            OURS: Contender(outputs(ours)),
            **{name: replace(peer, run=outputs(peer.run)) for name, peer in PEERS.items()},
            "torch.compile": Contender(outputs(lambda batch: compiled(torch_logps)(batch)), compiled=True),
        },
        work=flop,  # the floor of forward and backward; all of these compute the logits a second time
        unit="TFLOP/s",
        ceiling=PRODUCTS,
    )
]
