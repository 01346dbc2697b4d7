"""What a forked child of the sandbox does: compile a program, run it, serve calls of its functions, or run a test.

In: source text or marshalled code, and pipes as standard descriptors. Out: what it prints or the lines that it answers.
Running text from a model is what this process is for; it is the one place that does so, and it knows nothing worth
stealing.
"""

from __future__ import annotations

import marshal
import os
import sys
import typing
from collections.abc import Callable
from typing import Any, NoReturn

from rewards.sandbox_values import LineChannel, decode, encode


def run_and_leave(body: Callable[[], None]) -> NoReturn:
    """Do `body`, then leave as an interpreter would: exit code 0, the code of SystemExit, or 1 with the error in one
    line."""
    code = 1
    try:
        body()
        code = 0
    except SystemExit as leaving:
        code = _exit_code(leaving)
    except BaseException as error:  # the program's own failure, whatever it is
        _say_error(error)
    try:
        _finish_like_an_interpreter()
    except BaseException as error:
        _say_error(error)
        code = 1
    os._exit(code)


def compile_source(source: str) -> None:
    payload = memoryview(marshal.dumps(compile(source, "program.py", "exec", dont_inherit=True)))
    while payload:
        payload = payload[os.write(1, payload) :]


def _namespace(name: str = "__main__") -> dict[str, Any]:
    """That of a fresh module, which the standard library finds by its name; with exit and quit, which `python -S`
    leaves out."""
    module = type(sys)(name)
    sys.modules["__main__"] = sys.modules[name] = module
    module.__file__ = "/tmp/program.py"
    vars(sys.modules["builtins"]).update(exit=sys.exit, quit=sys.exit)
    return vars(module)


def run_main(code: bytes) -> None:
    exec(marshal.loads(code), _namespace())


def serve_calls(code: bytes) -> None:
    """Run the program with its prints discarded, then answer calls of its functions. Its problem may have given it
    their signatures without the import of typing that these need, as LeetCode does."""
    channel = _private_channel()
    namespace = _namespace("program")  # an `if __name__ == "__main__"` part is for the other style
    vars(sys.modules["builtins"]).update({name: getattr(typing, name) for name in typing.__all__})
    exec(marshal.loads(code), namespace)
    channel.send({"loaded": True})
    while True:
        try:
            request = channel.receive()
        except EOFError:
            return
        channel.send(_answer_call(namespace, request))


def _answer_call(namespace: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    function = namespace.get(request["call"])
    if function is None and "Solution" in namespace:
        function = getattr(namespace["Solution"](), request["call"], None)
    if not callable(function):
        return {"raised": "NameError", "message": f"the program has no function {request['call']!r}"}
    arguments = [decode(item) for item in request["args"]]
    keywords = {key: decode(item) for key, item in request["kwargs"].items()}
    try:
        value = function(*arguments, **keywords)
        return {"value": encode(value), "args": [_encode_if_plain(item) for item in arguments]}
    except Exception as error:
        builtin = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
        return {"raised": builtin, "message": str(error)[:500]}


def _encode_if_plain(argument: Any) -> Any:
    """What the function made of an argument, or None when that is no longer plain data."""
    try:
        return encode(argument)
    except (TypeError, ValueError):
        return None


def _private_channel() -> LineChannel:
    """Move the pipes out of the way of print and input."""
    read_fd, write_fd = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    return LineChannel(read_fd, write_fd)


def run_test(*, code: str, names: list[str]) -> None:
    """Run test code in which every function of the program is a stand-in that calls it in its own sandbox. Tells
    whether the test passed."""
    channel = _private_channel()
    namespace = _namespace()
    stand_ins = {name: _stand_in(name, channel) for name in names}
    try:
        namespace.update(stand_ins, candidate=stand_ins[names[0]])
        exec(compile(code, "test.py", "exec", dont_inherit=True), namespace)
        if callable(namespace.get("check")) and "check" not in names:
            namespace["check"](stand_ins[names[0]])
    except Exception as error:
        channel.send({"passed": False, "error": f"{type(error).__name__}: {error}"[:500]})
    else:
        channel.send({"passed": True, "error": ""})


def _stand_in(name: str, channel: LineChannel) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        coded = {key: encode(item) for key, item in kwargs.items()}
        channel.send({"call": name, "args": [encode(item) for item in args], "kwargs": coded})
        reply = channel.receive()
        if "raised" in reply:
            raise _builtin_exception(str(reply["raised"]), str(reply.get("message", "")))
        for ours, theirs in zip(args, reply.get("args", ()), strict=True):
            _copy_changes(ours, decode(theirs))
        return decode(reply["value"])

    return call


def _builtin_exception(name: str, message: str) -> Exception:
    found = vars(sys.modules["builtins"]).get(name)
    if not isinstance(found, type) or not issubclass(found, Exception):
        found = RuntimeError
    if issubclass(found, StopIteration | StopAsyncIteration):  # would end a loop of the test, and its asserts with it
        found = RuntimeError
    try:
        return found(message)
    except TypeError:  # UnicodeError's kinds, which want more arguments
        return ValueError(message)


def _copy_changes(ours: Any, theirs: Any) -> None:
    """What the program did to a list, dict or set that it was given, done to the test's own."""
    if isinstance(ours, list) and isinstance(theirs, list):
        ours[:] = theirs
    elif isinstance(ours, dict | set) and isinstance(theirs, type(ours)):
        ours.clear()
        ours.update(theirs)


def _exit_code(leaving: SystemExit) -> int:
    if leaving.code is None:
        return 0
    return leaving.code & 255 if isinstance(leaving.code, int) else 1


def _say_error(error: BaseException) -> None:
    os.write(2, f"{type(error).__name__}: {error}"[:1000].encode("utf-8", "replace"))


def _finish_like_an_interpreter() -> None:
    """Wait for threads, run exit handlers, flush: what leaving by os._exit would skip."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    if "atexit" in sys.modules:
        sys.modules["atexit"]._run_exitfuncs()
    for stream in (sys.stdout, sys.__stdout__):  # the program may have put another in the place of the first
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()
