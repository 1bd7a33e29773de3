"""A minimal endpoint that speaks OpenAI's protocol, on the standard library alone.

    GET  /v1/models            POST /v1/completions
    GET  /health               POST /v1/chat/completions

Whole answers and streams (server-sent events). Understood: model, prompt (a text, a list of texts, token ids) or
messages, max_tokens (max_completion_tokens), temperature, top_p, seed, stop, stream, stream_options.include_usage.
What would change the answer and is not supported (n > 1, logprobs, tools, penalties, ...) is refused, not ignored.
Requests are answered one after the other.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from corank.errors import CorankError
from corank.serve.continuation import Piece, Wish, Writer

LARGEST_BODY = 16 * 2**20
#: field -> values with which it changes nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}


class Refusal(Exception):
    """An answer that is an error: HTTP status and a sentence."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field = status, field

    def body(self) -> dict[str, Any]:
        """In the protocol's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": None}}


class Endpoint:
    """What is answered, without HTTP.

    Args:
        model: a transformers model with `generate`.
        tokenizer: its tokenizer.
        name: of the model in the protocol.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.writer, self.tokenizer, self.name = Writer(model, tokenizer), tokenizer, name
        self.started = int(time.time())

    def models(self) -> dict[str, Any]:
        """The answer to GET /v1/models."""
        one = {"id": self.name, "object": "model", "created": self.started, "owned_by": "corank"}
        return {"object": "list", "data": [one]}

    def wishes(self, body: Mapping[str, Any], chat: bool) -> list[Wish]:
        """One wish per prompt.

        Raises:
            Refusal: the request cannot be fulfilled.
        """
        if body.get("model") not in (None, self.name):
            raise Refusal(404, f"The model {body['model']!r} does not exist; this is {self.name!r}.", "model")
        for field, neutral in UNSUPPORTED.items():
            if body.get(field) is not None and body[field] not in neutral:
                raise Refusal(400, f"{field}={body[field]!r} is not supported here; leave it out.", field)
        prompts = [self._chat(body)] if chat else self._prompts(body)
        asked = body.get("max_completion_tokens") if chat else None
        asked = body.get("max_tokens") if asked is None else asked
        asked = None if asked is None else int(_number({"max_tokens": asked}, "max_tokens", 1, 1, 2**31, whole=True))
        stop = body.get("stop") or []
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
            raise Refusal(400, "stop takes a text, or a list of texts.", "stop")
        seed = body.get("seed")
        if seed is not None:
            seed = int(_number(body, "seed", 0, -(2**63), 2**63 - 1, whole=True))
        return [
            Wish(
                ids,
                self._room(ids, asked, 16 if not chat else None),
                _number(body, "temperature", 1.0, 0, 100),
                _number(body, "top_p", 1.0, 1e-6, 1),
                seed,
                tuple(stop),
            )
            for ids in prompts
        ]

    def answer(self, wishes: list[Wish], chat: bool) -> dict[str, Any]:
        """The whole answer."""
        choices, written = [], 0
        for index, wish in enumerate(wishes):
            pieces = list(self.writer.write(wish))
            text = "".join(piece.text for piece in pieces)
            content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choices.append({"index": index, **content, "logprobs": None, "finish_reason": pieces[-1].reason})
            written += pieces[-1].tokens
        return {**self._head(chat, False), "choices": choices, "usage": _usage(wishes, written)}

    def stream(self, wishes: list[Wish], chat: bool, usage: bool) -> Iterator[dict[str, Any]]:
        """The answer as the protocol's chunks."""
        head, written = self._head(chat, True), 0
        for index, wish in enumerate(wishes):
            if chat:
                yield {**head, "choices": [_delta(index, {"role": "assistant", "content": ""}, None)]}
            piece = Piece("", 0)
            for piece in self.writer.write(wish):
                if chat:
                    choice = _delta(index, {"content": piece.text} if piece.text else {}, piece.reason)
                else:
                    choice = {"index": index, "text": piece.text, "logprobs": None, "finish_reason": piece.reason}
                yield {**head, "choices": [choice]}
            written += piece.tokens
        if usage:
            yield {**head, "choices": [], "usage": _usage(wishes, written)}

    def _head(self, chat: bool, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }

    def _prompts(self, body: Mapping[str, Any]) -> list[tuple[int, ...]]:
        prompt = body.get("prompt")
        several = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else [prompt]
        found = []
        for one in several:
            if isinstance(one, str):
                one = self.tokenizer(one)["input_ids"]
            size = len(self.tokenizer)
            if not isinstance(one, list) or not all(isinstance(i, int) and 0 <= i < size for i in one):
                raise Refusal(400, "prompt takes a text, a list of texts, or token ids of the vocabulary.", "prompt")
            found.append(tuple(one))
        return found

    def _chat(self, body: Mapping[str, Any]) -> tuple[int, ...]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise Refusal(400, f"{self.name} has no chat template; use /v1/completions.", "messages")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise Refusal(400, "messages takes a list of {role, content}.", "messages")
        turns = [{"role": m.get("role"), "content": _text_of(m.get("content"))} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs; they refuse e.g. roles they do not know
            raise Refusal(400, f"The chat template refuses these messages: {error}", "messages") from error
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _room(self, ids: tuple[int, ...], asked: int | None, default: int | None) -> int:
        """New tokens to generate at most: what was asked for, else the default, else all that fits."""
        if not ids:
            raise Refusal(400, "The prompt has no tokens; give some text to continue.")
        context = self.writer.context or 2**31
        left = context - len(ids)
        if left < max(1, asked or 0):
            raise Refusal(
                400, f"The prompt has {len(ids)} tokens, {asked or 1} more are asked for, and the context is {context}."
            )
        return asked or min(left, default or (left if self.writer.context else 1024))


def _delta(index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _usage(wishes: list[Wish], written: int) -> dict[str, int]:
    read = sum(len(wish.ids) for wish in wishes)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _number(body: Mapping[str, Any], field: str, default: float, low: float, high: float, whole: bool = False) -> float:
    value = body.get(field)
    if value is None:
        return default
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        raise Refusal(400, f"{field}={value!r} is not possible.", field)
    return value


def _text_of(content: Any) -> str:
    """A message's text, given as such or as a list of text parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise Refusal(400, "A message's content must be text; other media are not supported.", "messages")


class _Handler(BaseHTTPRequestHandler):
    """HTTP around an `Endpoint`, which the server carries."""

    protocol_version = "HTTP/1.1"
    server_version = "corank"

    def do_GET(self) -> None:
        endpoint: Endpoint = self.server.endpoint  # type: ignore[attr-defined]
        models = endpoint.models()
        found = {
            "/health": {"status": "ok"},
            "/v1/models": models,
            f"/v1/models/{endpoint.name}": models["data"][0],
        }.get(self.path.split("?")[0].rstrip("/"))
        if found is None:
            self._send(404, Refusal(404, f"There is nothing at GET {self.path}.").body())
        else:
            self._send(200, found)

    def do_POST(self) -> None:
        endpoint: Endpoint = self.server.endpoint  # type: ignore[attr-defined]
        try:
            path = self.path.split("?")[0].rstrip("/")
            body = self._body()  # read in any case: the connection is used again
            if path not in ("/v1/completions", "/v1/chat/completions"):
                raise Refusal(404, f"There is nothing at POST {self.path}.")
            chat = path == "/v1/chat/completions"
            wishes = endpoint.wishes(body, chat)
            if body.get("stream"):
                usage = bool((body.get("stream_options") or {}).get("include_usage"))
                self._stream(endpoint.stream(wishes, chat, usage))
            else:
                self._send(200, endpoint.answer(wishes, chat))
        except Refusal as refusal:
            self._send(refusal.status, refusal.body())
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        except Exception as error:  # the server goes on
            self._send(500, Refusal(500, f"{type(error).__name__}: {error}").body())

    def _body(self) -> dict[str, Any]:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            self.close_connection = True
            raise Refusal(411, "Send a Content-Length.") from None
        if not 0 <= length <= LARGEST_BODY:
            self.close_connection = True
            raise Refusal(413, f"The request is larger than {LARGEST_BODY} bytes.")
        try:
            body = json.loads(self.rfile.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise Refusal(400, f"The request is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise Refusal(400, "The request is not a JSON object.")
        return body

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, chunks: Iterator[dict[str, Any]]) -> None:
        self.close_connection = True  # the end of the stream is the end of the connection
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for chunk in chunks:
                self._event(json.dumps(chunk))
            self._event("[DONE]")
        except OSError:  # nobody listens any more
            pass
        except Exception as error:  # too late for a status
            self._event(json.dumps(Refusal(500, f"{type(error).__name__}: {error}").body()))
        finally:
            chunks.close()  # type: ignore[attr-defined]  # stops the generation

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests are the user's own business."""


def make_server(model: Any, tokenizer: Any, *, host: str, port: int, name: str) -> ThreadingHTTPServer:
    """A server that listens already; call its `serve_forever`.

    Args:
        model: a transformers model with `generate`.
        tokenizer: its tokenizer.
        host, port: where to listen; port 0 takes a free one, see ``server_port``.
        name: of the model in the protocol.

    Raises:
        CorankError: the model cannot generate, or the address cannot be had.
    """
    ask = getattr(model, "can_generate", None)
    if not callable(ask) or not ask() or model.config.is_encoder_decoder:
        raise CorankError(f"{type(model).__name__} does not continue text; there is nothing to serve.")
    endpoint = Endpoint(model, tokenizer, name)
    try:
        server = ThreadingHTTPServer((host, port), _Handler)
    except OSError as error:
        raise CorankError(f"Cannot listen at {host}:{port}: {error.strerror}; choose another --port.") from None
    server.endpoint = endpoint  # type: ignore[attr-defined]
    return server
