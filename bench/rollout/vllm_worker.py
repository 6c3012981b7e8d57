"""vLLM in an environment of its own, asked by ``vllm.py`` over stdin and stdout, a line of JSON each.

First line in: model, dtype, prompts, samples, new_tokens, longest, eager. Out: ``{"loaded": model}``.
Then, as often as wanted, ``{"temperature": ...}`` in and ``{"tokens": [[...], ...]}`` out, one list per
sample. It needs nothing but vLLM, and ends when its stdin does.
"""

import json
import os
import sys
from typing import Any


def load(vllm: Any, ask: dict[str, Any]) -> Any:
    return vllm.LLM(
        model=ask["model"],
        dtype=ask["dtype"],
        enforce_eager=ask["eager"],
        max_model_len=ask["longest"],
        max_num_seqs=len(ask["prompts"]) * ask["samples"],
        skip_tokenizer_init=True,
    )


def draw(vllm: Any, llm: Any, ask: dict[str, Any], temperature: float) -> list[list[int]]:
    """The samples of a prompt share its cache; nothing is left of the last call's."""
    llm.reset_prefix_cache()
    sampling = vllm.SamplingParams(
        n=ask["samples"] if temperature else 1,  # it refuses several greedy samples
        temperature=temperature,
        max_tokens=ask["new_tokens"],
        ignore_eos=True,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in ask["prompts"] for _ in range(ask["samples"] // sampling.n)]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [list(sample.token_ids) for output in outputs for sample in output.outputs]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    import vllm  # type: ignore[import-not-found]

    ask = json.loads(sys.stdin.readline())
    llm = load(vllm, ask)
    print(json.dumps({"loaded": ask["model"]}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"tokens": draw(vllm, llm, ask, **json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
