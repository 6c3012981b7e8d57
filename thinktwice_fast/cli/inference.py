"""A model made ready to sample, without any training: what ``solve`` and whoever samples a saved model stand on."""

from functools import partial

from thinktwice_fast import launch
from thinktwice_fast.cli.options import ModelChoice
from thinktwice_fast.config import ModelOptions, RolloutOptions
from thinktwice_fast.model.loading import load_model, pick_device, pick_dtype
from thinktwice_fast.model.sharding import cast_parameters
from thinktwice_fast.rollout.engine import Engine
from thinktwice_fast.run.memory import sampling_reserve
from thinktwice_fast.tasks.arithmetic import RECHECK, build_tokenizer
from thinktwice_fast.tasks.prompts import ChatFormat, instruction_text


class Inference:
    """A model in its compute type on this process's device, its chat format, and rollout engines over it.

    Args:
        choice: of the model.

    Raises:
        UserError: no such model, or none that works here.
    """

    def __init__(self, choice: ModelChoice):
        options = ModelOptions(
            choice.model, chat_template=choice.chat_template, device=choice.device, compute_dtype=choice.dtype
        )
        device = pick_device(options, launch.env_local_rank())
        loaded = load_model(options, 0, device)
        self.model = cast_parameters(loaded.model, pick_dtype(options, device))
        self.tokenizer = loaded.tokenizer
        self.stop_ids = loaded.stop_ids
        self.chat = ChatFormat(loaded.tokenizer, choice.chat_template_args, choice.strip_default_system)
        self.arithmetic = loaded.tokenizer.get_vocab() == build_tokenizer().get_vocab()
        """Whether it knows nothing but the arithmetic task, as the shipped model."""

    def refine_instruction(self, given: str) -> str:
        """An instruction to refine, read where ``given`` is a file; the arithmetic task has its own default.

        Raises:
            UserError: a file that can't be read, or is empty.
        """
        return RECHECK if self.arithmetic and given == "default" else instruction_text(given)

    def engine(self, sequences: int, max_tokens: int, needed: int | None = None) -> Engine:
        """An engine with a KV cache for so many sequences at once, as far as the GPU has room.

        Args:
            sequences: that decode at once.
            max_tokens: longest prompt + response that will be asked for.
            needed: cache blocks that all sequences take which are there together (``rollout.engine.shared_blocks``),
                where prompts are shared or caches kept; None = what ``sequences`` take that have nothing in common.

        Raises:
            UserError: the GPU has no room for a cache of one longest sequence.
        """
        options = RolloutOptions(max_sequences=sequences)
        reserve = sampling_reserve(self.model, options, max_tokens)
        decode = partial(self.chat.response_text, stop_ids=self.stop_ids)
        return Engine(self.model, self.stop_ids, options, max_tokens, needed, reserve, decode)
