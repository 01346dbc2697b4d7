"""What crosses the border of the sandbox: plain Python values as JSON, and lines of JSON over descriptors.

In: values of the built-in types, nested. Out: JSON terms that keep those types, and back. Decoding makes nothing but
plain data, whatever the other side has sent. Used on both sides, so the standard library only.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

MAX_DEPTH, MAX_ITEMS = 100, 1_000_000
_CHUNK = 1 << 16


def encode(value: Any, depth: int = 0) -> Any:
    """`value` in terms of JSON, types kept. TypeError for what is not plain data, ValueError when nested too deep."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value) if -(2**53) < value < 2**53 else {"int": format(value, "x")}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in value.items()]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, depth + 1) for item in value]}
    if hasattr(value, "__iter__"):  # deque, range, generators: what a test would look at is their items
        items = []
        for item in value:
            items.append(encode(item, depth + 1))
            if len(items) > MAX_ITEMS:
                raise ValueError(f"an iterator of more than {MAX_ITEMS} items")
        return {"iterator": items}
    raise TypeError(f"a {type(value).__name__} is not plain data")


def decode(coded: Any) -> Any:
    """The inverse of `encode`; an iterator comes back as a list iterator. ValueError for anything that `encode` does
    not make."""
    if coded is None or isinstance(coded, bool | str | int | float):
        return coded
    if not isinstance(coded, dict) or len(coded) != 1:
        raise ValueError("not an encoded value")
    ((kind, body),) = coded.items()
    if kind in _SEQUENCES and isinstance(body, list):
        try:
            return _SEQUENCES[kind](decode(item) for item in body)
        except TypeError as error:  # an unhashable member of a set
            raise ValueError(str(error)) from error
    if kind == "dict" and isinstance(body, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in body):
        try:
            return {decode(key): decode(item) for key, item in body}
        except TypeError as error:
            raise ValueError(str(error)) from error
    if kind == "int" and isinstance(body, str):
        return int(body, 16)
    if kind == "float" and isinstance(body, str):
        return float(body)
    if kind == "bytes" and isinstance(body, str):
        return bytes.fromhex(body)
    if kind == "complex" and isinstance(body, list) and len(body) == 2 and all(isinstance(part, str) for part in body):
        return complex(float(body[0]), float(body[1]))
    raise ValueError(f"not an encoded value: {kind!r}")


_SEQUENCES: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "iterator": lambda items: iter(list(items)),
}


class LineChannel:
    """JSON objects, one a line, over two descriptors."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        self._buffer = bytearray()

    def send(self, message: dict[str, Any]) -> None:
        self.send_line(json.dumps(message).encode())

    def send_line(self, line: bytes) -> None:
        view = memoryview(line + b"\n")
        while view:
            view = view[os.write(self._write_fd, view) :]

    def receive(self) -> dict[str, Any]:
        while (end := self._buffer.find(b"\n")) < 0:
            piece = os.read(self._read_fd, _CHUNK)
            if not piece:
                raise EOFError
            self._buffer += piece
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return json.loads(line)
