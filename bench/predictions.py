"""What the code should take on an H200, by arithmetic from shapes, counted launches and that machine's ceilings.

`bench.performance` puts the table into docs/performance.md. Nothing in it is a measurement but the ceilings, which are
of the run of 2026-11-26 (bench/results/h200-2026-11-26), and what stands under "measured". The predictions were made
before the run of 2026-11-27 and stay as they were.

Letters: T tokens, V vocabulary, H hidden size, B sequences.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bench.core.report import markdown
from bench.models import LARGE, LARGEST, SMALL, shape

COPY, READ = 4.0e12, 3.7e12  # bytes a second of a plain copy, and of kernels that read keys or weights
PASS = 3.58e12  # of the pass over a tile of logits, as profiled
FLOPS = 785e12  # bfloat16 products of torch
PRODUCT = 4.08e-3  # one of the head's three products at T 4,096, V 151,936, H 2,560: a third of 12.24 ms
LOGITS_PRODUCT = 4.36e-3  # the same with fp32 results
DECODE_PRODUCTS = 2.9e12  # bytes of weights a second, of a layer's products for 64 sequences: 201 MB in 70 us
SMALL_KERNEL = 2e-6  # a guess: of a kernel that moves next to nothing, inside a graph
MERGE = 6e-6  # of the parts of an attention, as profiled
LAYER_KERNELS = 10  # of a decoding step; tests/rollout/test_launches.py
SAMPLER, AROUND = 45e-6, 25e-6  # drawing from 64 rows of logits; embedding, norms, list of parts, `advance`
BUSY = 0.6  # a guess: what products of an update reach of the ceiling, gaps and short kernels in it

_HEAD = """\
## Predicted for one H200, and measured

Predicted by arithmetic before the run of 2026-11-27, with that machine's ceilings of the day before (copies {copy:.1f}
TB/s, kernels that read keys and the head {read:.1f}, products {flops:.0f} TFLOP/s, of few rows {few:.1f} TB/s of
weights), the launches that tests count, and two guesses: a kernel that moves next to nothing takes {small:.0f} us in a
graph, and an update's products reach {busy:.0%} of the ceiling with everything around them. `bench/predictions.py` is
the arithmetic. Updates came out as predicted. Decoding did not: its attention takes 37 us a layer where the keys allow
14 (Qwen3-4B, 8 x 8), its short kernels 20 where 14 were expected, and in what is measured is the prompts' own forward
pass, 0.9 ms a step.
"""
_COLUMNS = ("what", "floor", "measured 2026-11-26", "launches and bytes", "predicted", "measured 2026-11-27", "goal")


def layer_weights(model: str) -> int:
    """Of the products of a layer."""
    hidden, inner, _, heads, kv_heads, dim, _ = shape(model)
    return hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * inner


@dataclass(frozen=True)
class Decoding:
    """A step of decoding: B sequences in groups of eight, with so many keys shared and of their own."""

    model: str
    sequences: int
    shared: int  # keys of a group's prompt
    own: int  # on average over the response

    def layer_bytes(self) -> tuple[int, int]:
        """Of weights and of keys and values."""
        *_, kv_heads, dim, _ = shape(self.model)
        keys = self.sequences // 8 * self.shared + self.sequences * self.own
        return 2 * layer_weights(self.model), 4 * kv_heads * dim * keys

    def head_bytes(self) -> int:
        hidden, *_, vocabulary = shape(self.model)
        return 2 * hidden * vocabulary

    def floor(self) -> float:
        """Seconds that the bytes take."""
        layers = shape(self.model)[2]
        return (layers * sum(self.layer_bytes()) + self.head_bytes()) / READ

    def layer(self) -> tuple[float, float, float]:
        """Seconds of the four products, of reading keys and of the other kernels."""
        weights, keys = self.layer_bytes()
        products = max(weights / DECODE_PRODUCTS, weights * self.sequences / FLOPS / BUSY)
        return products, keys / READ, (LAYER_KERNELS - 6) * SMALL_KERNEL + MERGE

    def seconds(self) -> float:
        """Of a step."""
        sampler = SAMPLER * self.sequences / 64
        return shape(self.model)[2] * sum(self.layer()) + self.head_bytes() / READ + sampler + AROUND

    def rate(self, seconds: float) -> str:
        return f"{self.sequences / seconds / 1e3:.0f} k tokens/s"


@dataclass(frozen=True)
class Training:
    """A step of 32 x 8 sequences with prompts and responses of so many tokens."""

    prompt: int
    response: int

    def update(self) -> float:
        """Seconds; a group's prompt counts once."""
        hidden, _, layers, heads, _, dim, vocabulary = shape(LARGE)
        tokens = 32 * (self.prompt + 8 * self.response)
        pairs = 32 * (self.prompt**2 // 2 + 8 * self.response * (self.prompt + self.response // 2))
        flop = 6 * layers * layer_weights(LARGE) * tokens + 6 * hidden * vocabulary * 256 * self.response
        return (flop + 14 * layers * heads * dim * pairs) / FLOPS / BUSY

    def rollout(self) -> float:
        """Seconds of decoding; the prompts' own forward pass is a small part."""
        return self.response * Decoding(LARGE, 256, self.prompt, self.response // 2).seconds()


def rows() -> Iterator[tuple[str, ...]]:
    """Of the table."""
    tile = 4096 * 151_936
    products = 3 * PRODUCT
    pieces, over = 1.03 * LOGITS_PRODUCT, 6 * tile / PASS
    first = pieces + over + 2 * PRODUCT + 2e-4
    second = LOGITS_PRODUCT * 1.04 + 2 * PRODUCT + 2e-4
    yield (
        "`linear_grpo_loss`, T 4,096, V 151,936, H 2,560, forward and backward",
        f"three products, {1e3 * products:.2f} ms; the exponentials and dWeight, 2.0 GB",
        "17.64 ms, 5.1 GB",
        "37 + 6 launches, logits in ten pieces: written and read once in fp32, exponentials once in bfloat16 (6.2 GB)",
        f"{1e3 * first:.1f} ms = {1e3 * pieces:.2f} (logits) + {1e3 * over:.2f} (pass) + {2e3 * PRODUCT:.2f} "
        f"(gradients) + 0.2, 2.1 GB; {1e3 * second:.1f} ms with the product in Triton",
        "15.4 ms, 2.1 GB: 5.3 (exponentials, product in Triton) + 9.3 (gradients) + 0.8; 16.0 with cuBLAS's product",
        "13.0 ms, 2.1 GB",
    )
    for tokens, measured, later, goal in (
        (8192, "2.41 ms", "1.90 to 2.29 ms", "1.6 ms"),
        (1024, "1.08 ms", "0.55 to 0.59 ms", "0.5 ms"),
    ):
        moved = 3 * 2 * tokens * 151_936
        host = 0.1e-3 if tokens > 4096 else 0.3e-3
        yield (
            f"`token_logprobs` and backward, T {tokens:,}",
            f"two reads and a write, {moved / 1e9:.2f} GB: {1e3 * moved / COPY:.2f} ms",
            measured,
            "1 + 1 launches, no zero fill; half of the host's time",
            f"{1e3 * (moved / COPY + host):.2f} ms = {1e3 * moved / COPY:.2f} + {1e3 * host:.1f} of the host",
            later,
            goal if tokens < 4096 else f"{goal}, below the floor",
        )
    decoding = (
        (Decoding(LARGEST, 64, 1024, 64), "8 x 8, prompt 1,024", "6.8 k tokens/s", "10.9 k tokens/s", "12 k tokens/s"),
        (Decoding(LARGEST, 256, 512, 64), "32 x 8, prompt 512", "17.6 k tokens/s", "25.3 k tokens/s", "28 k tokens/s"),
        (Decoding(SMALL, 64, 512, 64), "8 x 8, prompt 512", "14.2 k tokens/s", "29.7 k tokens/s", "35 k tokens/s"),
    )
    for step, name, measured, later, goal in decoding:
        layers, seconds = shape(step.model)[2], step.seconds()
        products, keys, others = (1e6 * part for part in step.layer())
        yield (
            f"decoding, {step.model}, {name}, 128 new",
            f"bytes: {1e3 * step.floor():.2f} ms a step, {step.rate(step.floor())}",
            measured,
            f"{LAYER_KERNELS} kernels a layer (29 before), {sum(step.layer_bytes()) / 1e6:.0f} MB of weights and keys; "
            "the host waits once in eight steps",
            f"{1e3 * seconds:.2f} ms a step, {step.rate(seconds)}: {layers} x ({products:.0f} us products + {keys:.0f} "
            f"keys + {others:.0f} other kernels), head, sampler",
            later,
            goal,
        )
    solve, refine = Training(100, 1021), Training(1357, 1021)
    for training, name, measured, later, goal in (
        (solve, "solve", "11.0 s + 31.1 s", "15.2 s = 9.1 + 6.1, prompts of 107", "16 s"),
        (refine, "refine", "15.7 s + 20.9 s", "18.9 s = 11.4 + 7.6, prompts of 1,563", "19 s"),
    ):
        update, rollout = training.update(), training.rollout()
        yield (
            f"{name} step, {LARGE}, 32 x 8 sequences, prompts of {training.prompt:,}, responses of 1,021",
            f"products at the ceiling: {BUSY * update:.1f} s of the update",
            f"{measured} (rollout + update)",
            "47 kernels a layer of an update for eight responses (247 before), no keys copied, no graph per shape",
            f"{rollout + update:.1f} s = {rollout:.1f} (rollout) + {update:.1f} (update at {BUSY:.0%})",
            later,
            goal,
        )
    yield (
        "memory of these steps",
        "",
        "147.6 GB, out of memory in step 3; 97.8 GB later that day",
        "the cache's 37 GB are there in rollouts only",
        "67 GB (`--dry-run --dry-run-gpu 141`: 52 % to spare)",
        "61.4 GB",
        "20 % to spare",
    )


def section() -> str:
    """Heading, text and table."""
    rates = {"copy": COPY, "read": READ, "flops": FLOPS, "few": DECODE_PRODUCTS}
    terabytes = {name: rate / 1e12 for name, rate in rates.items()}
    head = _HEAD.format(**terabytes, small=1e6 * SMALL_KERNEL, busy=BUSY)
    return f"{head}\n{markdown(_COLUMNS, [*rows()])}\n"
