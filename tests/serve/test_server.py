"""`corank serve`: what it answers is what `generate` writes, whole or streamed; it refuses what it cannot do."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import corank
import corank.serve.server as serving
from corank import CorankError
from corank.cli import main
from corank.evaluate.generation import sample
from corank.serve.continuation import Wish, Writer, settled
from corank.serve.endpoint import make_server
from corank.serve.server import choose_engine, vllm_command
from tiny import tiny, tokenizer

PROMPT = "THE RANK OF"
TEMPLATE = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}A:{% endif %}"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A compressed directory whose tokenizer has a chat template."""
    model, words = tiny("llama-gqa"), tokenizer()
    words.chat_template = TEMPLATE
    model.generation_config.eos_token_id = None
    folder = tmp_path_factory.mktemp("models") / "small"
    corank.compress(model, "svd", keep=0.6, tokenizer=words, out=folder)
    return folder


@pytest.fixture(scope="module")
def loaded(small):
    return corank.load(small)


@pytest.fixture(scope="module")
def server(loaded):
    served = make_server(*loaded, host="127.0.0.1", port=0, name="small")
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


@torch.no_grad()
def generated(loaded, prompt, tokens, **choice):
    """The new token ids that `generate` gives."""
    model, words = loaded
    ids = torch.tensor([words(prompt)["input_ids"] if isinstance(prompt, str) else prompt])
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **({"do_sample": False} | choice)
    )[0, ids.shape[1] :].tolist()


def written(loaded, prompt, tokens, **choice):
    """Their text."""
    return loaded[1].decode(generated(loaded, prompt, tokens, **choice), skip_special_tokens=True)


def ask(server, path, body=None, port=None):
    """(status, answer)."""
    url = f"http://127.0.0.1:{port or server.server_port}{path}"
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=300) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def stream(server, path, body):
    """The chunks of a streamed answer."""
    url = f"http://127.0.0.1:{server.server_port}{path}"
    request = urllib.request.Request(url, json.dumps(body | {"stream": True}).encode())
    with urllib.request.urlopen(request, timeout=300) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        events = answer.read().decode().split("\n\n")
    assert events.pop() == "" and events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_completion_is_what_generate_writes(server, loaded):
    wanted = written(loaded, PROMPT, 20)
    body = {"model": "small", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    status, answer = ask(server, "/v1/completions", body)
    assert status == 200 and answer["object"] == "text_completion" and answer["model"] == "small"
    assert [(c["index"], c["text"], c["finish_reason"]) for c in answer["choices"]] == [(0, wanted, "length")]
    assert answer["usage"] == {"prompt_tokens": len(PROMPT), "completion_tokens": 20, "total_tokens": len(PROMPT) + 20}
    assert sample(*loaded, PROMPT, 20).completion == wanted


def test_prompts_may_be_several_or_token_ids(server, loaded):
    body = {"prompt": ["ALPHA", "BETA"], "max_tokens": 5, "temperature": 0}
    _, several = ask(server, "/v1/completions", body)
    assert [c["text"] for c in several["choices"]] == [written(loaded, p, 5) for p in ("ALPHA", "BETA")]
    assert several["usage"]["prompt_tokens"] == 9 and several["usage"]["completion_tokens"] == 10
    ids = loaded[1]("ALPHA")["input_ids"]
    _, from_ids = ask(server, "/v1/completions", body | {"prompt": ids})
    assert [c["text"] for c in from_ids["choices"]] == [several["choices"][0]["text"]]
    _, default = ask(server, "/v1/completions", {"prompt": "ALPHA", "temperature": 0})
    assert default["usage"]["completion_tokens"] == 16  # the protocol's default


def test_a_stream_is_the_same_text_in_pieces(server):
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    _, whole = ask(server, "/v1/completions", body)
    chunks = stream(server, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert chunks.pop()["usage"] == whole["usage"]
    texts = [c["choices"][0]["text"] for c in chunks]
    assert "".join(texts) == whole["choices"][0]["text"] and len([t for t in texts if t]) > 10
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({c["id"] for c in chunks}) == 1


def test_a_chat_goes_through_the_template(server, loaded):
    prompt = "SYSTEM: BE BRIEF USER: WHAT IS A MATRIX? A:"
    wanted = written(loaded, prompt, 8)
    messages = [
        {"role": "system", "content": "BE BRIEF"},
        {"role": "user", "content": [{"type": "text", "text": "WHAT IS "}, {"type": "text", "text": "A MATRIX?"}]},
    ]
    body = {"messages": messages, "max_completion_tokens": 8, "temperature": 0}
    _, answer = ask(server, "/v1/chat/completions", body)
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion" and choice["finish_reason"] == "length"
    assert choice["message"] == {"role": "assistant", "content": wanted}
    deltas = [c["choices"][0] for c in stream(server, "/v1/chat/completions", body)]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""} and deltas[-1]["finish_reason"] == "length"
    assert "".join(d["delta"].get("content", "") for d in deltas) == wanted
    _, free = ask(server, "/v1/chat/completions", {"messages": messages, "temperature": 0})
    assert free["usage"]["total_tokens"] == 64  # as far as the context reaches


def test_sampling_is_generate_s_and_repeatable(server, loaded):
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0.9, "top_p": 0.8, "seed": 5}
    texts = [ask(server, "/v1/completions", body)[1]["choices"][0]["text"] for _ in range(2)]
    torch.manual_seed(5)
    wanted = written(loaded, PROMPT, 20, do_sample=True, temperature=0.9, top_p=0.8, top_k=0)
    assert texts == [wanted] * 2
    assert ask(server, "/v1/completions", body | {"seed": 6})[1]["choices"][0]["text"] != texts[0]


def test_it_ends_before_a_stop_string_streamed_or_not(server, loaded):
    text = written(loaded, PROMPT, 30)
    stop = text[9:12]
    cut = text[: text.index(stop)]
    body = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0, "stop": ["~never~", stop]}
    _, whole = ask(server, "/v1/completions", body)
    assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == (cut, "stop")
    assert whole["usage"]["completion_tokens"] < 30
    chunks = stream(server, "/v1/completions", body)
    assert "".join(c["choices"][0]["text"] for c in chunks) == cut


def test_it_ends_at_the_end_of_text_token(loaded):
    model, words = loaded
    ids = generated(loaded, PROMPT, 10)
    model.generation_config.eos_token_id = [ids[4], 63]
    try:
        pieces = list(Writer(model, words).write(Wish(tuple(words(PROMPT)["input_ids"]), 10)))
    finally:
        model.generation_config.eos_token_id = None
    assert pieces[-1].reason == "stop" and pieces[-1].tokens == ids.index(ids[4]) + 1


def test_half_a_character_and_half_a_stop_string_are_held_back(loaded):
    class Bytes:
        """Two tokens make one character."""

        pad_token_id = eos_token_id = None

        def decode(self, ids, **_):
            return bytes(195 if i % 2 == 0 else 169 for i in range(len(ids))).decode(errors="replace")

    pieces = [p.text for p in Writer(loaded[0], Bytes()).write(Wish((3, 4), 6))]
    assert [p for p in pieces if p] == ["é", "é", "é"]
    assert settled("A MAT", ("MATRIX", "ATE")) == "A "  # the longest beginning of any of them
    assert settled("A MATS", ("MATRIX",)) == "A MATS" and settled("MA\ufffd", ("X",)) == "MA"


def test_a_generation_that_nobody_reads_is_stopped(loaded):
    model, words = loaded
    steps = []

    def slow(*_):
        steps.append(1)
        time.sleep(0.02)

    hook = model.register_forward_hook(slow)
    try:
        pieces = Writer(model, words).write(Wish(tuple(words("A")["input_ids"]), 60))
        next(pieces)
        pieces.close()  # waits for the generation to end
    finally:
        hook.remove()
    assert len(steps) < 30


def test_a_client_that_leaves_does_not_stop_the_server(server):
    body = json.dumps({"prompt": "A", "max_tokens": 60, "temperature": 0, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", server.server_port)) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert raw.recv(100).startswith(b"HTTP/1.1 200")
    assert ask(server, "/health") == (200, {"status": "ok"})
    assert ask(server, "/v1/completions", {"prompt": "A", "max_tokens": 2})[0] == 200


def test_requests_at_the_same_time_do_not_disturb_each_other(server, loaded):
    prompts = ["ALPHA", "BETA", "GAMMA", "DELTA"]
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(
                lambda p: ask(server, "/v1/completions", {"prompt": p, "max_tokens": 12, "temperature": 0})[1], prompts
            )
        )
    wanted = [written(loaded, p, 12) for p in prompts]
    assert [f["choices"][0]["text"] for f in found] == wanted


def test_one_connection_serves_several_requests(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=300)
    for path, body in (("/v1/nothing", b"{}"), ("/v1/completions", b'{"prompt": "A", "max_tokens": 1}')) * 2:
        connection.request("POST", path, body)
        answer = connection.getresponse()
        assert answer.status == (404 if "nothing" in path else 200)
        json.loads(answer.read())
    connection.close()


def test_the_models_are_listed(server):
    status, listed = ask(server, "/v1/models")
    assert status == 200 and [m["id"] for m in listed["data"]] == ["small"] and listed["object"] == "list"
    assert ask(server, "/v1/models/small")[1] == listed["data"][0]
    assert ask(server, "/v1/models/large")[0] == 404


COMPLETION = {"prompt": "A", "max_tokens": 2}


@pytest.mark.parametrize(
    "path,body,status,mention",
    [
        ("/v1/completions", COMPLETION | {"model": "large"}, 404, "large"),
        ("/v1/completions", {}, 400, "prompt"),
        ("/v1/completions", COMPLETION | {"prompt": ""}, 400, "no tokens"),
        ("/v1/completions", COMPLETION | {"prompt": [1, 99]}, 400, "vocabulary"),
        ("/v1/completions", COMPLETION | {"prompt": "A" * 60, "max_tokens": 5}, 400, "context is 64"),
        ("/v1/completions", COMPLETION | {"max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", COMPLETION | {"max_tokens": "many"}, 400, "max_tokens"),
        ("/v1/completions", COMPLETION | {"temperature": -1}, 400, "temperature"),
        ("/v1/completions", COMPLETION | {"top_p": 2}, 400, "top_p"),
        ("/v1/completions", COMPLETION | {"seed": 1.5}, 400, "seed"),
        ("/v1/completions", COMPLETION | {"stop": [1]}, 400, "stop"),
        ("/v1/completions", COMPLETION | {"n": 2}, 400, "n=2"),
        ("/v1/completions", COMPLETION | {"logprobs": 5}, 400, "logprobs"),
        ("/v1/completions", COMPLETION | {"echo": True}, 400, "echo"),
        ("/v1/completions", b"not json", 400, "not JSON"),
        ("/v1/completions", b"[1]", 400, "object"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "A"}], "tools": [{}]}, 400, "tools"),
        ("/v1/embeddings", {"input": "A"}, 404, "nothing"),
        ("/nothing", None, 404, "nothing"),
    ],
)
def test_what_it_cannot_do_is_refused_in_the_protocol_s_form(path, body, status, mention, server):
    found, answer = ask(server, path, body)
    assert found == status and mention in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_what_changes_nothing_is_accepted(server):
    neutral = {"n": 1, "logprobs": None, "echo": False, "presence_penalty": 0, "stop": None, "user": "me"}
    assert ask(server, "/v1/completions", COMPLETION | neutral)[0] == 200


def test_a_request_that_is_too_large_or_has_no_length_is_not_read(server):
    for header, status in (("Content-Length: 99999999999", b" 413 "), ("X: y", b" 411 ")):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=300) as raw:
            raw.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode())
            assert status in raw.recv(1000)


def test_an_error_while_generating_is_answered_and_the_server_goes_on(server, loaded, monkeypatch):
    monkeypatch.setattr(loaded[0], "generate", lambda *_, **__: 1 / 0)
    status, answer = ask(server, "/v1/completions", COMPLETION)
    assert status == 500 and "ZeroDivisionError" in answer["error"]["message"]
    chunks = stream_raw(server, COMPLETION)
    assert "ZeroDivisionError" in chunks
    monkeypatch.undo()
    assert ask(server, "/v1/completions", COMPLETION)[0] == 200


def stream_raw(server, body):
    url = f"http://127.0.0.1:{server.server_port}/v1/completions"
    request = urllib.request.Request(url, json.dumps(body | {"stream": True}).encode())
    with urllib.request.urlopen(request, timeout=300) as answer:
        return answer.read().decode()


def test_without_a_template_there_is_no_chat(loaded):
    served = make_server(loaded[0], tokenizer(), host="127.0.0.1", port=0, name="mute")
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    status, answer = ask(served, "/v1/chat/completions", {"messages": [{"role": "user", "content": "A"}]})
    served.shutdown()
    thread.join()
    served.server_close()
    assert status == 400 and "no chat template" in answer["error"]["message"]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_the_command_starts_answers_and_stops(end, small, loaded):
    command = [sys.executable, "-m", "corank", "serve", str(small), "--port", "0", "--engine", "builtin"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = process.stdout.readline()
        assert said.startswith("corank: small answers at http://127.0.0.1:"), process.stderr.read()
        port = int(said.split(":")[3].split("/")[0])
        body = {"model": "small", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        _, answer = ask(None, "/v1/completions", body, port=port)
        process.send_signal(end)
        rest, errors = process.communicate(timeout=300)
    assert answer["choices"][0]["text"] == written(loaded, PROMPT, 12)
    assert process.returncode == 0 and rest == "" and "Traceback" not in errors


def test_bad_input_is_one_sentence(small, server, tmp_path, capsys):
    busy = str(server.server_port)
    for arguments, mention in (
        ([str(small), "--engine", "builtin", "--port", busy], "another --port"),
        ([str(small), "--port", "70000"], "65535"),
        ([str(tmp_path / "nothing")], "no such directory"),
        ([str(small), "--engine", "vllm"], "pip install vllm"),
    ):
        assert main(["serve", *arguments]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("corank: ") and said.err.count("\n") == 1 and mention in said.err
        assert said.out == ""
    with pytest.raises(CorankError, match="does not continue text"):
        make_server(tiny("bert"), tokenizer(), host="127.0.0.1", port=0, name="bert")


def test_the_best_engine_present_is_taken(monkeypatch):
    here = {"vllm": True, "transformers": True}
    monkeypatch.setattr(serving, "vllm_is_present", lambda: here["vllm"])
    monkeypatch.setattr(serving, "transformers_serve_is_present", lambda: here["transformers"])
    assert [choose_engine(e) for e in ("auto", "transformers", "builtin")] == ["vllm", "transformers", "builtin"]
    here["vllm"] = False
    assert choose_engine() == "transformers"
    here["transformers"] = False
    assert choose_engine() == "builtin"
    with pytest.raises(CorankError, match="serving"):
        choose_engine("transformers")
    with pytest.raises(CorankError, match="nearest: vllm"):
        choose_engine("vlm")


def test_whether_an_engine_is_present_is_asked_of_the_installation():
    from importlib.util import find_spec

    needed = ("fastapi", "uvicorn", "pydantic", "openai")
    assert serving.vllm_is_present() == (find_spec("vllm") is not None)
    assert serving.transformers_serve_is_present() == all(find_spec(name) is not None for name in needed)


def test_vllm_is_started_with_the_directory_and_stopped_with_us(small, tmp_path, monkeypatch):
    program = tmp_path / "vllm"
    program.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(serving, "vllm_is_present", lambda: True)
    wanted = ["serve", str(small), "--host", "127.0.0.1", "--port", "8001", "--served-model-name", "mine"]
    assert vllm_command(small, "127.0.0.1", 8001, "mine") == [str(program), *wanted]
    assert serving.serve(small, port=8001, name="mine") == 7


def test_transformers_serve_is_given_the_directory(small, monkeypatch):
    import types

    calls = []
    stand_in = types.ModuleType("transformers.cli.serve")
    stand_in.Serve = lambda **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "transformers.cli.serve", stand_in)
    monkeypatch.setattr(serving, "vllm_is_present", lambda: False)
    monkeypatch.setattr(serving, "transformers_serve_is_present", lambda: True)
    assert main(["serve", str(small), "--port", "8002"]) == 0
    assert calls == [{"force_model": str(small), "host": "127.0.0.1", "port": 8002}]


def test_what_transformers_serve_loads_is_the_compressed_model(small, loaded):
    """Its model manager is the part that loads; unlike the rest it needs no further packages."""
    from transformers.cli.serving.model_manager import ModelManager

    manager = ModelManager(force_model=str(small), device="cpu")
    try:
        (found,) = manager.loaded_models.values()
        assert type(found.model.model.layers[0].mlp.up_proj).__name__ == "LowRankLinear"
        ids = torch.tensor([[3, 4, 5]])
        with torch.no_grad():
            assert torch.equal(found.model(input_ids=ids).logits, loaded[0](input_ids=ids).logits)
    finally:
        manager.shutdown()
