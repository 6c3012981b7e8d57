"""Teachers: what they read, models sampled in one batch, and servers that fail in every way."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.rollout.drawing import make, tokens
from tests.small_models import bpe_tokenizer
from thinktwice_fast.algorithms.thinktuning.endpoint import EndpointTeacher
from thinktwice_fast.algorithms.thinktuning.function import FunctionTeacher
from thinktwice_fast.algorithms.thinktuning.prompt import load_prompt, teacher_ids
from thinktwice_fast.algorithms.thinktuning.teacher import Answer, FeedbackRequest, answer_prompts
from thinktwice_fast.errors import UserError
from thinktwice_fast.records import Request, Sampling
from thinktwice_fast.rollout.prefix_cache import Counts
from thinktwice_fast.tasks.arithmetic import build_tokenizer
from thinktwice_fast.tasks.prompts import ChatFormat
from thinktwice_fast.thinktuning_options import ThinkTuningOptions

PROMPT = load_prompt("default")
ASKED = [FeedbackRequest("1+2?", "\\boxed{4}"), FeedbackRequest("3+4?", "\\boxed{7}", behaviour=1)]


def test_a_teacher_reads_four_examples_then_question_and_response() -> None:
    assert [(shot.behaviour, shot.opinion) for shot in PROMPT.shots] == [
        ("agreement", "correct"), ("conflict", "incorrect"), ("consultancy", "incorrect"), ("critique", "correct"),
    ]  # fmt: skip
    system, *shots, last = PROMPT.messages("1+2?", "\\boxed{4}")
    assert system["role"] == "system" and [m["role"] for m in (*shots, last)] == ["user", "assistant"] * 4 + ["user"]
    assert last["content"] == f"Question:\n1+2?\n\nResponse:\n\\boxed{{4}}\n\n{PROMPT.answer_format}"
    named = PROMPT.messages("1+2?", "\\boxed{4}", 1)
    assert named[:-1] == (system, *shots)  # so that the prefix stays common
    assert named[-1]["content"] == f"{last['content']}\n\n{PROMPT.shots[1].request}"


def test_prompts_are_cut_on_the_left_and_need_no_system_role() -> None:
    chat, messages = ChatFormat(bpe_tokenizer()), PROMPT.messages("1+2?", "3")
    whole = teacher_ids(chat, messages, 10**6)
    assert teacher_ids(chat, messages, 100) == whole[-100:]
    bare = ChatFormat(build_tokenizer())  # its template refuses system messages
    assert len(teacher_ids(bare, messages, 10**6)) > len(PROMPT.system)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "can't read it"),
        ("system: [", "can't read it as YAML"),
        ("system: a\nanswer_format: b\nshots: []", "at least one shot"),
        ("system: a\nshots: []", "expected the keys answer_format, shots, system"),
        ("system: a\nanswer_format: b\nshots:\n- behaviour: c", "expected the keys behaviour, opinion"),
        ("system: 3\nanswer_format: b\nshots: []", "system is no text"),
        ("- a", "write it as"),
    ],
)
def test_a_file_of_shots_that_lacks_something_is_one_line(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "shots.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=says) as raised:
        load_prompt(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("cache_tokens", [0, 160], ids=["roomy", "tight"])
def test_a_batch_computes_what_its_prompts_share_once(monkeypatch: pytest.MonkeyPatch, cache_tokens: int) -> None:
    engine, shared = make(cache_tokens=cache_tokens), tuple(range(10, 50))
    prompts = [(*shared, n, *range(n)) for n in range(1, 6)]
    fresh = make().run([Request(n, p, (n,), Sampling(0.0, max_tokens=9)) for n, p in enumerate(prompts)], seed=0)
    sizes, extend = [], engine.cache.extend

    def spy(handles: Any, counts: list[int]) -> Any:
        sizes.append(sum(counts))
        return extend(handles, counts)

    monkeypatch.setattr(engine.cache, "extend", spy)
    rollouts = answer_prompts(engine, prompts, 9)
    assert [r.prompt for r in rollouts] == prompts and engine.cache.free_blocks == engine.cache.num_blocks
    assert tokens({r.group: r for r in rollouts}) == tokens({r.group: r for r in fresh})
    if not cache_tokens:
        assert sizes[:2] == [40, sum(map(len, prompts)) - 5 * 40] and engine.counts == Counts(extended=5)
    assert [r.response for r in answer_prompts(engine, prompts[:1], 9)] == [rollouts[0].response]


class Server(ThreadingHTTPServer):
    """Gives one after another of ``replies``: a status with a body, or seconds to hang; the last one over and over."""

    daemon_threads = True

    def __init__(self, *replies: Any):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies = list(replies)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def handle_error(self, *_: Any) -> None:
        pass  # whoever asked has given up


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        own = self.server
        with own.lock:
            own.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            own.keys.append(self.headers["Authorization"])
            own.at_once += 1
            own.most_at_once = max(own.most_at_once, own.at_once)
            reply = own.replies.pop(0) if len(own.replies) > 1 else own.replies[0]
        assert self.path == "/v1/chat/completions"
        if isinstance(reply, float):
            time.sleep(reply)
            reply = 200, completion("late")
        with own.lock:
            own.at_once -= 1
        status, body = reply
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


def completion(text: str | None, finish: str = "stop") -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]})


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server and a teacher that asks it."""
    servers = []
    monkeypatch.setenv("no_proxy", "*")

    def make(*replies: Any, **options: Any) -> tuple[Server, EndpointTeacher]:
        server = Server(*replies)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1/"
        values: dict[str, Any] = {"teacher_timeout": 2.0, "endpoint_retries": 2, "endpoint_concurrency": 2} | options
        chosen = ThinkTuningOptions("endpoint", endpoint_url=url, endpoint_model="wise", **values)
        return server, EndpointTeacher(PROMPT, chosen, first_pause=0.01)

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


OK = (200, completion("<opinion>..."))


def test_a_server_is_asked_as_openai_is(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "se\ncret\n")
    with pytest.raises(UserError, match=r"^the key in \$MY_KEY has characters that no key has: mend it$"):
        serve(OK, endpoint_key_variable="MY_KEY")
    monkeypatch.setenv("MY_KEY", "secret\n")  # as files have it
    server, teacher = serve(OK, endpoint_key_variable="MY_KEY", teacher_answer_tokens=77)
    teacher.check()
    assert teacher.ask(ASKED) == [Answer("<opinion>...")] * 2
    assert server.keys == ["Bearer secret"] * 3 and server.asked[0]["max_tokens"] == 1
    expected = [
        {"model": "wise", "messages": [*PROMPT.messages(a.question, a.response, a.behaviour)], "temperature": 0,
         "max_tokens": 77}
        for a in ASKED
    ]  # fmt: skip
    assert sorted(server.asked[1:], key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(
    ("replies", "answer", "attempts"),
    [
        ([(429, ""), (503, ""), OK], Answer("<opinion>..."), 3),
        ([(500, "")], Answer(refusal="unanswered"), 3),
        ([4.0, OK], Answer("<opinion>..."), 2),
        ([(401, "")], Answer(refusal="unanswered"), 1),
        ([(307, "")], Answer(refusal="unanswered"), 1),
        ([(200, "{")], Answer(refusal="unanswered"), 1),
        ([(200, '{"choices": [1]}')], Answer(refusal="unanswered"), 1),
        ([(200, completion("cut", "length"))], Answer(refusal="unfinished"), 1),
        ([(200, completion(None))], Answer(""), 1),
    ],
    ids=["passing", "down", "hangs once", "key", "redirect", "malformed", "no message", "length", "no text"],
)
def test_whatever_a_server_does_is_an_answer(serve: Any, replies: list[Any], answer: Answer, attempts: int) -> None:
    server, teacher = serve(*replies)
    (got,) = teacher.ask(ASKED[:1])
    assert (got.text, got.refusal) == (answer.text, answer.refusal) and len(server.asked) == attempts
    assert got.detail.startswith("the server: ") == (got.refusal == "unanswered")


def test_a_server_that_hangs_costs_its_time_limits_and_no_more(serve: Any) -> None:
    server, teacher = serve(5.0, endpoint_retries=1, teacher_timeout=0.2)
    started = time.monotonic()
    assert teacher.ask(ASKED * 2) == [Answer("", "unanswered", "the server: no reply in time")] * 4
    assert time.monotonic() - started < 5 and len(server.asked) == 8
    server, teacher = serve(5.0, endpoint_retries=50, endpoint_step_timeout=0.5, teacher_timeout=0.2)
    started = time.monotonic()
    answers = teacher.ask(ASKED * 8)
    assert {answer.refusal for answer in answers} == {"unanswered"} and time.monotonic() - started < 5
    assert answers[-1].detail == "the server: no time left for this step's requests"


def test_no_more_requests_at_once_than_allowed(serve: Any) -> None:
    server, teacher = serve(0.05, teacher_timeout=5.0)
    assert teacher.ask(ASKED * 4) == [Answer("late")] * 8 and server.most_at_once == 2


def test_a_server_that_is_down_at_start_is_one_line(serve: Any) -> None:
    server, teacher = serve(OK, endpoint_retries=0)
    server.server_close()
    with pytest.raises(UserError, match=r"no connection.*start the server or mend the address"):
        teacher.check()
    _, refusing = serve((401, ""))
    with pytest.raises(UserError, match=r"status 401 Unauthorized.*the key in \$OPENAI_API_KEY"):
        refusing.check()


def test_whatever_a_function_does_is_an_answer(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import os, time\n"
        "def teach(question, response):\n"
        "    if response == 'hang': time.sleep(60)\n"
        "    if response == 'die': os._exit(3)\n"
        "    return {'none': None, 'number': 3}.get(response, question + response) if response != 'raise' else 1 / 0\n"
        "constant = 3\n"
    )
    responses = ("say", "none", "number", "raise", "die", "hang", "say")
    with FunctionTeacher(f"{file}:teach", 0.5) as teacher:
        answers = teacher.ask([FeedbackRequest("q", response) for response in responses])
    assert [answer.text for answer in answers] == ["qsay", *[""] * 5, "qsay"]
    assert [answer.refusal for answer in answers] == [None, *["unanswered"] * 5, None]
    for answer, says in zip(answers[1:6], ("None", "an int", "ZeroDivisionError", "status 3", "0.5 s"), strict=True):
        assert says.removeprefix("an ") in answer.detail
    for name, says in ((f"{file}:absent", "no such function"), (f"{file}:constant", "it is a int"),
                       (f"{tmp_path}/no.py:f", "no file")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            FunctionTeacher(name, 0.5)
