"""`corank serve`: hand a model to the best engine present.

1. vLLM, if it is installed. corank's plug-in makes it read compressed directories.
2. `transformers serve`, if the packages it needs (fastapi, uvicorn, pydantic, openai) are installed.
3. corank's own endpoint (`corank.serve.endpoint`), which needs nothing but the standard library and answers one
   request after the other: right for trying a model out and for tests, not for many users.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corank import checkpoint
from corank.errors import CorankError, unknown
from corank.model import resolve

ENGINES = ("auto", "vllm", "transformers", "builtin")


def serve(
    model: str | Path, *, host: str = "127.0.0.1", port: int = 8000, engine: str = "auto", name: str | None = None
) -> int:
    """Serve a model until interrupted (SIGINT or SIGTERM).

    Args:
        model: a directory, hub id or alias; compressed or dense.
        host, port: where to listen; port 0 takes a free one (corank's own endpoint only), which is printed.
        engine: one of `ENGINES`.
        name: of the model in the protocol; None: that of its directory. `transformers serve` knows models by path.

    Returns:
        the exit code.

    Raises:
        CorankError: no such model or engine, an engine that is not installed, or an address that cannot be had.
    """
    chosen = choose_engine(engine)
    path = resolve(model).resolve()
    label = name or path.name
    if not 0 <= port <= 65535:
        raise CorankError(f"There is no port {port}; give one up to 65535, or 0 for any free one.")
    if chosen == "vllm":
        return _run(vllm_command(path, host, port, label))
    if chosen == "transformers":
        return _serve_by_transformers(path, host, port)
    return _serve_by_itself(path, host, port, label)


def choose_engine(engine: str = "auto") -> str:
    """The engine to use.

    Raises:
        CorankError: unknown, or not installed.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    present = {"vllm": vllm_is_present(), "transformers": transformers_serve_is_present(), "builtin": True}
    if engine == "auto":
        return next(name for name, here in present.items() if here)
    if not present[engine]:
        package = {"vllm": "vllm", "transformers": "'transformers[serving]'"}[engine]
        raise CorankError(f"The engine {engine!r} is not installed; pip install {package}, or use --engine builtin.")
    return engine


def vllm_is_present() -> bool:
    """Whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def transformers_serve_is_present() -> bool:
    """Whether `transformers serve` and the packages it needs are installed."""
    try:
        from transformers.utils.import_utils import is_serve_available
    except ImportError:
        return False
    return bool(is_serve_available()) and importlib.util.find_spec("transformers.cli.serve") is not None


def vllm_command(path: Path, host: str, port: int, name: str) -> list[str]:
    """The command line that serves a directory with vLLM."""
    beside = Path(sys.executable).with_name("vllm")
    program = str(beside) if beside.is_file() else shutil.which("vllm")
    start = [program] if program else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    return [*start, "serve", str(path), "--host", host, "--port", str(port), "--served-model-name", name]


def _run(command: list[str]) -> int:
    """Run another program in the foreground; Ctrl-C reaches it as well, and it is stopped with us."""
    with subprocess.Popen(command) as process, _stop_on_terminate():
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            return 0


def _serve_by_transformers(path: Path, host: str, port: int) -> int:
    from transformers.cli.serve import Serve  # corank is imported, so it knows the format

    start: Any = Serve
    start(force_model=str(path), host=host, port=port)
    return 0


def _serve_by_itself(path: Path, host: str, port: int, name: str) -> int:
    from corank.serve.endpoint import make_server

    model, tokenizer = checkpoint.load(path)
    server = make_server(model, tokenizer, host=host, port=port, name=name)
    shown = f"[{host}]" if ":" in host else host
    print(f"corank: {name} answers at http://{shown}:{server.server_port}/v1 (corank's own endpoint)", flush=True)
    try:
        with _stop_on_terminate():
            server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0


@contextlib.contextmanager
def _stop_on_terminate() -> Iterator[None]:
    """SIGTERM stops like Ctrl-C while the block runs, as service managers expect.

    Ctrl-C itself is set as well: a shell starts background programs with it ignored, and Python leaves it so.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield
        return
    before = {s: signal.signal(s, signal.default_int_handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
