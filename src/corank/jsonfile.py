"""JSON that survives infinities: results are written whole or not at all, and a NaN stays a NaN.

JSON has no infinity and no NaN, and a collapsed model has both. :func:`encode` writes ``null`` in their place
and keeps what they were in a ``"nonfinite"`` map beside them (JSON pointer -> ``"inf" | "-inf" | "nan"``), so
that the file is valid for every reader and :func:`decode` loses nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corank.errors import CorankError

NOTE = "nonfinite"


def encode(document: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a mapping into plain JSON values with no non-finite number in it.

    Args:
        document: nested mappings, sequences, numbers (NumPy and torch scalars too), strings, paths, booleans,
            None, and dataclasses of these.

    Returns:
        A new dict. If a number was not finite it is ``None`` and ``result["nonfinite"]`` maps its JSON
        pointer (RFC 6901, e.g. ``"/evaluation/compressed/wikitext2"``) to ``"inf"``, ``"-inf"`` or ``"nan"``.

    Raises:
        CorankError: a value has no JSON form; the sentence names its place.
    """
    notes: dict[str, str] = {}
    encoded = _encode(decode(document), "", notes)
    if notes:
        encoded[NOTE] = notes
    return encoded


def decode(document: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`encode`: put the non-finite numbers back, at any depth a ``"nonfinite"`` map is found."""
    return _decode(document)


def dumps(document: Mapping[str, Any]) -> str:
    """The text of :func:`encode` (document), indented, ending in a newline."""
    return json.dumps(encode(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` to ``path`` atomically: a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a report is as readable as any file the user creates.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(partial, 0o666 & ~mask)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | Path, document: Mapping[str, Any]) -> Path:
    """Write a mapping as JSON, atomically, non-finite numbers noted as in :func:`encode`."""
    return write_text(path, dumps(document))


def read_json(path: str | Path) -> dict[str, Any]:
    """Read what :func:`write_json` wrote.

    Raises:
        CorankError: the file is missing, is not JSON, or holds something else than an object.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorankError(f"There is no file {path}; check the path.") from None
    except IsADirectoryError:
        raise CorankError(f"{path} is a directory; give the path of a JSON file.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorankError(f"{path} is not JSON ({error}); write it again or give another file.") from None
    if not isinstance(document, dict):
        raise CorankError(f"{path} holds a JSON {type(document).__name__}, not an object; give another file.")
    return decode(document)


def _encode(value: Any, pointer: str, notes: dict[str, str]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _encode(item, f"{pointer}/{_escape(str(k))}", notes) for k, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _encode({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, pointer, notes)
    if hasattr(value, "tolist"):  # a NumPy or torch scalar or array
        return _encode(value.tolist(), pointer, notes)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        notes[pointer] = "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
        return None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (bytes, bytearray)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [_encode(item, f"{pointer}/{index}", notes) for index, item in enumerate(items)]
    raise CorankError(
        f"The value at {pointer or '/'} is a {type(value).__name__}, which has no JSON form; "
        "give numbers, strings, lists and dicts."
    )


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping):
        decoded = {key: _decode(item) for key, item in value.items() if key != NOTE}
        notes = value.get(NOTE)
        if isinstance(notes, Mapping):
            for pointer, text in notes.items():
                # A note about a place that somebody has since edited away is void.
                with contextlib.suppress(KeyError, IndexError, ValueError, TypeError):
                    _put(decoded, pointer, float(text))
        elif NOTE in value:
            decoded[NOTE] = notes
        return decoded
    if isinstance(value, (list, tuple)):
        return [_decode(item) for item in value]
    return value


def _put(container: Any, pointer: str, number: float) -> None:
    *parents, last = [_unescape(part) for part in pointer.split("/")[1:]]
    for part in parents:
        container = container[int(part)] if isinstance(container, list) else container[part]
    container[int(last) if isinstance(container, list) else last] = number


def _escape(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")


def _unescape(part: str) -> str:
    return part.replace("~1", "/").replace("~0", "~")
