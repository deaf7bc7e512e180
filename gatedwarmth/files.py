"""Files that a kill cannot leave half written: atomic replacement, durable appends, checked JSON lines."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gatedwarmth.errors import DataError


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` beside `path`, then rename: a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: JSON has neither."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text_atomic(path, text)


def write_folder_atomic(folder: str | Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write into a hidden sibling of `folder`, then put that in the folder's place."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        fill(temporary)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old-{uuid.uuid4().hex[:8]}")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def append_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Append whole lines and wait until they are on disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a JSON-lines file; blank lines are skipped.

    Raises
    ------
    DataError: with file and line, for a missing file, broken JSON, or a line that is no object.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(path, 0, "no such file; give the path of a JSON-lines file")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse(path, number, line)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise DataError(
            path, number, f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(path, number, f"not JSON ({error.msg} at column {error.colno}); mend or delete it") from None
    if not isinstance(value, dict):
        raise DataError(path, number, f"a JSON object is needed, found {type(value).__name__}")
    return value
