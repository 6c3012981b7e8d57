"""A teacher behind HTTP: any server that speaks OpenAI's chat completions, asked from a few threads at once."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn

from thinktwice_fast.algorithms.thinktuning.prompt import TeacherPrompt
from thinktwice_fast.algorithms.thinktuning.teacher import Answer, FeedbackRequest
from thinktwice_fast.errors import UserError, one_line
from thinktwice_fast.records import Message
from thinktwice_fast.thinktuning_options import ThinkTuningOptions

_FIRST_PAUSE = 1.0  # seconds before the first retry; each further one takes twice as long
_LONGEST_PAUSE = 30.0
_PIECE = 1 << 16  # bytes read at a time
_LARGEST = 1 << 24  # bytes of a reply


class EndpointError(Exception):
    """A request that got no usable reply, in one line."""

    def __init__(self, text: str, *, passing: bool, pause: float = 0.0):
        super().__init__(text)
        self.passing = passing  # it may go better another time
        self.pause = pause  # seconds that the server asks to wait


class EndpointTeacher:
    """Asks a server, each request with a time limit and retries, so many at once, and all within a limit of their own.

    The prompt goes there whole: only the server knows its own tokens.

    Args:
        prompt: what the model there reads.
        options: which server and model, and the limits.
        first_pause: seconds before the first retry.

    Raises:
        UserError: a key that can't be sent.
    """

    def __init__(self, prompt: TeacherPrompt, options: ThinkTuningOptions, first_pause: float = _FIRST_PAUSE):
        self._prompt = prompt
        self._options = options
        self._first_pause = first_pause
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get(options.endpoint_key_variable, "").strip():
            if not (key.isascii() and key.isprintable()):  # http.client would refuse it, and print it
                raise UserError(f"the key in ${options.endpoint_key_variable} has characters that no key has: mend it")
            self._headers["Authorization"] = f"Bearer {key}"
        self._opener = urllib.request.build_opener(_NoRedirect)

    def check(self) -> None:
        """Ask for one token.

        Raises:
            UserError: the server does not answer, or refuses.
        """
        try:
            self._reply([{"role": "user", "content": "Hello"}], 1, self._deadline())
        except EndpointError as error:
            key = self._options.endpoint_key_variable
            raise UserError(
                f"--thinktuning.endpoint_url {self._options.endpoint_url}: {error}: start the server or mend the "
                f"address, --thinktuning.endpoint_model or the key in ${key}"
            ) from error

    def ask(self, asked: Sequence[FeedbackRequest]) -> list[Answer]:
        """See ``Teacher``."""
        answer = partial(self._answer, deadline=self._deadline())
        with ThreadPoolExecutor(self._options.endpoint_concurrency) as threads:
            return list(threads.map(answer, asked))

    def _deadline(self) -> float:
        """Of all that is asked from now on, in the clock's seconds."""
        return time.monotonic() + self._options.endpoint_step_timeout

    def _answer(self, asked: FeedbackRequest, deadline: float) -> Answer:
        messages = self._prompt.messages(asked.question, asked.response, asked.behaviour)
        try:
            text, finished = self._reply(messages, self._options.teacher_answer_tokens, deadline)
            return Answer(text) if finished else Answer(refusal="unfinished")
        except EndpointError as error:
            return Answer(refusal="unanswered", detail=f"the server: {error}")

    def _reply(self, messages: Sequence[Message], max_tokens: int, deadline: float) -> tuple[str, bool]:
        """The text that comes back, and whether it ended by itself, after as many attempts as may be by then."""
        body = {
            "model": self._options.endpoint_model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        data, pause = json.dumps(body).encode(), self._first_pause
        for left in range(self._options.endpoint_retries, -1, -1):
            try:
                return self._once(data, deadline)
            except EndpointError as error:
                pausing = min(max(pause, error.pause), _LONGEST_PAUSE)
                if not error.passing or not left or time.monotonic() + pausing > deadline:
                    raise
                time.sleep(pausing)
                pause *= 2
        raise AssertionError("the last attempt returns or raises")

    def _once(self, data: bytes, deadline: float) -> tuple[str, bool]:
        seconds = min(self._options.teacher_timeout, deadline - time.monotonic())
        if seconds <= 0:
            raise EndpointError("no time left for this step's requests", passing=False)
        started = time.monotonic()
        url = f"{(self._options.endpoint_url or '').rstrip('/')}/chat/completions"
        try:
            request = urllib.request.Request(url, data, self._headers)
            with self._opener.open(request, timeout=seconds) as reply:
                content = _read(reply, started + seconds)
        except urllib.error.HTTPError as error:
            _refused(error)
        except TimeoutError as error:
            raise EndpointError("no reply in time", passing=True) from error
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", error)
            raise EndpointError(f"no connection ({one_line(reason)})", passing=True) from error
        except ValueError as error:
            raise EndpointError(f"no address of a server ({one_line(error)})", passing=False) from error
        try:
            choice = json.loads(content)["choices"][0]
            return str(choice["message"]["content"] or ""), choice.get("finish_reason") != "length"
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise EndpointError("the reply is no chat completion", passing=False) from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key is for the address that the user gave, and for no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _read(reply: Any, deadline: float) -> bytes:
    """The whole body. A socket's own time limit starts anew with each piece."""
    pieces: list[bytes] = []
    while piece := reply.read1(_PIECE):
        pieces.append(piece)
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(pieces) * _PIECE > _LARGEST and sum(map(len, pieces)) > _LARGEST:
            raise EndpointError("the reply has no end", passing=False)
    return b"".join(pieces)


def _refused(error: urllib.error.HTTPError) -> NoReturn:
    with error:
        wait = error.headers.get("Retry-After", "")
    passing = error.code == http.HTTPStatus.TOO_MANY_REQUESTS or error.code >= http.HTTPStatus.INTERNAL_SERVER_ERROR
    pause = float(wait) if wait.isdecimal() else 0.0
    raise EndpointError(f"status {error.code} {error.reason}", passing=passing, pause=pause) from error
