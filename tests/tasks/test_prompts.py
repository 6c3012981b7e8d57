import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from thinktwice_fast.errors import UserError
from thinktwice_fast.tasks.arithmetic import build_tokenizer, terse_solution
from thinktwice_fast.tasks.prompts import DEFAULT_REFINE_INSTRUCTION, ChatFormat, instruction_text, refine_messages

QUESTION = ({"role": "user", "content": "What is one and one?"},)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: 26 Jul 2024\\n\\n<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# As Qwen3's thinking models do: a thought is opened for the model, and thoughts are dropped from earlier turns.
QWEN3_THINKING = (
    "{% for m in messages %}{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|pad|>",
]


@pytest.fixture(scope="module")
def make():
    """Makes a byte-level BPE tokenizer with a chat template; like Llama's, it adds a beginning-of-text token."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["What is one and one? One and one are two. assistant user system recheck it"] * 4, trainer
    )
    backend.add_tokens([tokenizers.AddedToken(tag, special=False) for tag in ("<think>", "</think>")])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", SPECIAL.index("<|begin_of_text|>"))]
    )

    def with_template(template: str | None, end: str = "<|im_end|>") -> PreTrainedTokenizerFast:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token=end, pad_token="<|pad|>"
        )
        tokenizer.chat_template = template
        return tokenizer

    return with_template


def other_segmentation(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids that decode to the text but are not its usual ones, as sampling may produce."""
    ids = [token for character in text for token in tokenizer.encode(character, add_special_tokens=False)]
    assert tokenizer.decode(ids) == text
    assert ids != tokenizer.encode(text, add_special_tokens=False)
    return ids


def refine(chat: ChatFormat, base_ids: list[int], base_text: str, stop: list[int], question=QUESTION) -> list[int]:
    return list(chat.refine(question, chat.prompt_ids(question), base_ids, base_text, "recheck", stop).ids)


def test_three_messages_without_a_system_message() -> None:
    question = [{"role": "system", "content": "Be brief."}, *QUESTION]
    prompt = refine_messages(question, " two\n", "recheck")
    assert prompt.messages == (
        QUESTION[0],
        {"role": "assistant", "content": " two\n"},
        {"role": "user", "content": "recheck"},
    )
    assert prompt.verbatim


def test_default_instruction_makes_its_four_demands() -> None:
    assert refine_messages(QUESTION, "two", "default").messages[-1]["content"] == DEFAULT_REFINE_INSTRUCTION
    for demand in ("Recheck every step", "correct it", "explain the solution more clearly", "final answer"):
        assert demand in DEFAULT_REFINE_INSTRUCTION


@pytest.mark.parametrize(
    ("base", "opened", "solution", "thought"),
    [
        ("<think>\nhm 1\n</think>\n\nIt is two.", False, "It is two.", "hm 1"),
        ("hm 1\n</think>\n\nIt is two.", True, "It is two.", "hm 1"),
        ("hm 1\n</think>\n\nIt is two.", False, "It is two.", "hm 1"),
        ("<think>hm 1 and on\n", False, "", "hm 1 and on"),
        ("hm 1 and on\n", True, "", "hm 1 and on"),
        ("<think>a</think>x<think>b</think>y", False, "xy", "a\n\nb"),
        ("<think>\n\n</think>\n\nIt is two.", False, "It is two.", ""),
    ],
)
def test_thinking_moves_in_front_of_the_instruction(base: str, opened: bool, solution: str, thought: str) -> None:
    prompt = refine_messages(QUESTION, base, "recheck", opened)
    assert not prompt.verbatim
    assert prompt.messages[1]["content"] == solution
    quoted = {"Your previous reasoning was:": thought, "Your previous answer was:": solution}
    parts = [f"{title}\n{text}\n\n" for title, text in quoted.items() if text]
    assert prompt.messages[2]["content"] == "".join(parts) + "recheck"


def test_arithmetic_chat() -> None:
    tokenizer = build_tokenizer()
    chat = ChatFormat(tokenizer)
    question = ({"role": "user", "content": "8-8+5+6-9"},)
    draft = terse_solution("8-8+5+6-9", "tm5")
    for ids in (chat.encode(draft), [*chat.encode(draft), tokenizer.eos_token_id]):
        refined = refine(chat, ids, draft, [tokenizer.eos_token_id], question)
        expected = f"<|user|>8-8+5+6-9<|assistant|>{draft}<|end|><|user|>recheck<|assistant|>"
        assert tokenizer.decode(refined) == expected
        assert refined == tokenizer.encode(expected, add_special_tokens=False)


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>")])
@pytest.mark.parametrize("cut_off", [False, True])
def test_sampled_tokens_stay_and_the_turn_ends_once(make, template: str, end: str, cut_off: bool) -> None:
    tokenizer = make(template, end)
    chat = ChatFormat(tokenizer)
    stop = tokenizer.convert_tokens_to_ids(end)
    text = "One and one are two.\n "  # Llama's template would trim it
    base = other_segmentation(tokenizer, text)
    prompt = chat.prompt_ids(QUESTION)
    ids = refine(chat, base if cut_off else [*base, stop], text, [stop])
    assert ids[: len(prompt) + len(base) + 1] == [*prompt, *base, stop]
    rest = tokenizer.decode(ids[len(prompt) + len(base) :])
    assert rest.count("recheck") == 1
    assert rest.startswith(end)
    assert rest.endswith("assistant\n" if template is CHATML else "assistant<|end_header_id|>\n\n")
    turns_ended = ids.count(stop)
    assert turns_ended == (3 if template is CHATML else 4)  # question, base, instruction; Llama's system message


def test_one_beginning_of_text(make) -> None:
    tokenizer = make(LLAMA3, "<|eot_id|>")
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    chat = ChatFormat(tokenizer)
    for ids in (chat.prompt_ids(QUESTION), refine(chat, [], "", []), refine(chat, [], "<think>x", [])):
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


def test_a_system_message_is_left_out_of_the_refine_prompt(make) -> None:
    tokenizer = make(CHATML)
    chat = ChatFormat(tokenizer)
    question = [{"role": "system", "content": "Be brief."}, *QUESTION]
    base = other_segmentation(tokenizer, "two")
    ids = refine(chat, base, "two", [tokenizer.eos_token_id], question)
    head = chat.prompt_ids(QUESTION)
    assert ids[: len(head) + len(base)] == head + base


def test_an_opened_thought_does_not_stay_open(make) -> None:
    tokenizer = make(QWEN3_THINKING)
    chat = ChatFormat(tokenizer)
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert chat.prompt_ids(QUESTION).count(think) == 1
    base = chat.encode("One and one.\n</think>\n\nTwo.")
    expected = (
        "<|im_start|>user\nWhat is one and one?<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
        "<|im_start|>user\nYour previous reasoning was:\nOne and one.\n\n{}recheck<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    stop = tokenizer.eos_token_id
    ids = refine(chat, [*base, stop], chat.response_text([*base, stop], [stop]), [stop])
    assert tokenizer.decode(ids) == expected.format("Two.", "Your previous answer was:\nTwo.\n\n")
    cut_off = chat.encode("One and one.")
    assert tokenizer.decode(refine(chat, cut_off, "One and one.", [stop])) == expected.format("", "")


def test_what_is_quoted_fits_the_longest_prompt(make) -> None:
    tokenizer = make(QWEN3_THINKING)
    base = "one and " * 40 + "two.</think>Two."
    whole = len(refine(ChatFormat(tokenizer), [], base, []))
    bare = len(refine(ChatFormat(tokenizer), [], "</think>Two.", [])) - len(
        tokenizer.encode("Your previous answer was:\nTwo.\n\n", add_special_tokens=False)
    )
    for longest in range(bare, whole, 3):
        ids = refine(ChatFormat(tokenizer, longest_prompt=longest), [], base, [])
        text = tokenizer.decode(ids)
        assert len(ids) <= longest and "<|im_start|>assistant\nTwo.<|im_end|>" in text and "recheck" in text
        assert "previous answer" not in text
        assert (".\n\nrecheck" in text) == ("previous reasoning" in text)  # its end is kept
    assert "one and" in text  # only the answer had to go


DEFAULT_SYSTEM = (  # as OLMo-3's template does
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
)


@pytest.mark.parametrize("begin", ["", "{{ bos_token }}"])
def test_a_default_system_block_is_left_out(make, begin: str) -> None:
    chat = ChatFormat(make(begin + DEFAULT_SYSTEM + CHATML), strip_default_system=True)
    plain = ChatFormat(make(begin + CHATML))
    assert chat.prompt_ids(QUESTION) == plain.prompt_ids(QUESTION)
    base = chat.encode("two")
    assert refine(chat, base, "two", []) == refine(plain, base, "two", [])
    own = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert chat.prompt_ids(own) == plain.prompt_ids(own)
    with pytest.raises(UserError, match=r"strip_default_system: .* by itself: leave it out"):
        ChatFormat(make(begin + CHATML), strip_default_system=True)


def test_template_arguments(make) -> None:
    template = CHATML + "{% if add_generation_prompt and enable_thinking is false %}{{ '<think></think>' }}{% endif %}"
    tokenizer = make(template)
    assert tokenizer.decode(ChatFormat(tokenizer, {"enable_thinking": False}).prompt_ids(QUESTION)).endswith("</think>")
    assert not ChatFormat(tokenizer, {"enable_thinking": False}).notes
    assert "no use for thinking_budget" in ChatFormat(tokenizer, {"thinking_budget": 5}).notes[0]
    with pytest.raises(UserError, match="tokenize is not for you to set"):
        ChatFormat(tokenizer, {"tokenize": True})


def test_an_instruction_from_a_file(tmp_path) -> None:
    (tmp_path / "again.txt").write_text("Once more,\nplease.\n")
    assert instruction_text(str(tmp_path / "again.txt")) == "Once more,\nplease."
    assert instruction_text("Look at notes.txt") == "Look at notes.txt"
    (tmp_path / "empty.md").touch()
    for name, what in (("empty.md", "is empty"), ("gone.txt", "can't read it")):
        with pytest.raises(UserError, match=what):
            instruction_text(str(tmp_path / name))


def test_a_question_shown_in_another_way_once_answered(make) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '<|im_start|>' + ('now ' if loop.last else 'then ') + m['content'] }}"
        "{% else %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}{{ '<|im_start|>' }}"
    )
    tokenizer = make(template)
    chat = ChatFormat(tokenizer)
    base = other_segmentation(tokenizer, "two")
    ids = refine(chat, base, "two", [])
    text = "<|im_start|>then What is one and one?<|im_start|>two<|im_end|><|im_start|>now recheck<|im_start|>"
    assert tokenizer.decode(ids) == text
    head = chat.encode(text.partition("two")[0])
    assert ids[: len(head) + len(base)] == head + base


@given(text=st.text(max_size=30), spare=st.booleans())
def test_any_text_is_kept_token_by_token(make, text: str, spare: bool) -> None:
    tokenizer = make(CHATML)
    chat = ChatFormat(tokenizer)
    base = [token for character in text for token in chat.encode(character)]
    if spare:
        base.append(tokenizer.eos_token_id)
    ids = refine(chat, base, text, [tokenizer.eos_token_id])
    head = chat.prompt_ids(QUESTION)
    kept = base[:-1] if spare else base
    assert ids[: len(head) + len(kept)] == head + kept


def test_response_text(make) -> None:
    tokenizer = make(CHATML)
    chat = ChatFormat(tokenizer)
    ids = chat.encode(" <think>two</think> it is\n")
    assert chat.response_text([*ids, tokenizer.eos_token_id], [tokenizer.eos_token_id]) == " <think>two</think> it is\n"
    assert chat.response_text(ids, [tokenizer.eos_token_id]) == " <think>two</think> it is\n"
    assert chat.response_text([], [tokenizer.eos_token_id]) == ""


def test_tokenizer_without_a_chat_template(make) -> None:
    with pytest.raises(UserError, match=r"no chat template: give a Jinja file with --model\.chat_template"):
        ChatFormat(make(None))


@pytest.mark.parametrize(
    ("template", "times"),
    [("{{ messages[0]['content'] }}", 0), ("{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}", 2)],
)
def test_templates_that_drop_or_repeat_an_answer(make, template: str, times: int) -> None:
    chat = ChatFormat(make(template))
    with pytest.raises(UserError, match=rf"{times} times instead of once.*--model\.chat_template"):
        refine(chat, [], "two", [])


def test_templates_that_refuse(make) -> None:
    chat = ChatFormat(make("{{ raise_exception('roles must\nalternate') }}"))
    with pytest.raises(UserError, match=r"refuses messages of roles user \(roles must alternate\)"):
        chat.prompt_ids(QUESTION)


def test_templates_with_a_syntax_error(make) -> None:
    chat = ChatFormat(make("{% for m in %}"))
    with pytest.raises(UserError, match=r"--model\.chat_template"):
        chat.prompt_ids(QUESTION)
