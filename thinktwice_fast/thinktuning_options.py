"""The options of ThinkTuning, a section of ``config.py``."""

from dataclasses import dataclass
from typing import Literal

from thinktwice_fast.bounds import MOST_SECONDS, bounded


@dataclass
class ThinkTuningOptions:
    """ThinkTuning: a teacher's feedback in some of each group's rollouts; names of the loss as in
    `thinktwice_kernels.grpo_loss`."""

    teacher: str | None = None
    """Who gives feedback: "frozen" (the initial policy), "live" (the policy as it is), "checkpoint:PATH" (another
    model, by folder or hub name), "endpoint" (a server, see `endpoint_url`) or my_file.py:function (called with a
    question and a response, gives an answer in the teacher's format or None)."""
    shots: str = "default"
    """YAML file with what models and servers read before question and response: system message, examples, answer format
    (as the shipped thinktwice_fast/assets/teacher.yaml, "default")."""
    one_behaviour: bool = False
    """Ask for one behaviour per request, drawn at random, so that they can be counted; off, the teacher chooses."""
    fraction: float = bounded(0.1, above=0, most=1)
    """Share of a group's properly ended rollouts that the teacher is asked about in the first step; at least one."""
    min_fraction: float = bounded(0.01, least=0, most=1)
    """What that share falls to, linearly."""
    decay_steps: int = bounded(0, least=0)
    """Steps that it takes to fall; 0 = the first third of the run."""
    cutoff: float = bounded(0.06, least=0, most=1)
    """The teacher is not asked any more once that share has fallen to this (by default after a seventh of the run, as
    in the released code); 0 = asked to the end."""
    guidance_tokens: int = bounded(512, least=1)
    """Longest reason and phrase together; a rollout whose guidance is longer stays as it is."""
    teacher_prompt_tokens: int = bounded(3072, least=1)
    """Longest prompt of a teacher that is a model here; longer ones are cut on the left."""
    teacher_answer_tokens: int = bounded(1024, least=1)
    """Longest answer of a model or server; answers are greedy."""
    teacher_timeout: float = bounded(60.0, above=0, most=MOST_SECONDS)
    """Seconds that a server or function may take for one answer."""
    endpoint_url: str | None = None
    """Base address of a server with OpenAI's chat completions, such as http://localhost:8000/v1."""
    endpoint_model: str | None = None
    """Name of the model there."""
    endpoint_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key, where it wants one."""
    endpoint_retries: int = bounded(3, least=0)
    """Further attempts, with growing pauses, after a connection that failed, a time-out, or status 429 or 5xx."""
    endpoint_concurrency: int = bounded(8, least=1)
    """Most requests at once, per process."""
    endpoint_step_timeout: float = bounded(600.0, above=0, most=MOST_SECONDS)
    """Seconds that all of a step's requests may take together; rollouts whose answer has not come by then stay as they
    are. Less than `run.distributed_timeout`."""
    shaping_coefficient: float = bounded(2.5e-4, least=0, most=1)
    """A guided token of probability p weighs p / (p + gamma), with gamma = this times the advantage."""
    shaping_clamp: float = bounded(1e-3, least=0, most=1)
    """Largest absolute value of gamma."""
    shaping_min_probability: float = bounded(0.01, least=0, most=1)
    """A guided token with a negative advantage is not shaped where it is less likely than this."""
    guide_fallback: Literal["mask", "clip"] = "mask"
    """What such a token gets instead: nothing, or the term of an ordinary one (the released code's)."""
    released_code_compat: bool = False
    """Do as the released code: gamma always minus `shaping_clamp`, weights 1.0001 and 0.9999 where p + gamma is below 0
    and above 1, all tokens of a guided rollout guided, and no dual clip where no rollout is."""
