"""A pickle read without running anything: a stack machine that builds plain data and nothing else.

Python's `pickle` imports whatever a file names and calls it with what the file says. Here a name is looked up in a table
of our own functions, one that is not in the table ends the reading, and every opcode, length and index is checked first:
memory and time stay in proportion to the file. Python's module `pickle` is not used.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_OPCODES = 2_000_000  # a snapshot of EDM's largest net has 87,438
LONGEST_NAME = 200
PROTOCOLS = range(2, 6)


class Unreadable(ValueError):
    """What is wrong with a file, as the end of a sentence that begins with its name."""


@dataclass(frozen=True)
class Name:
    """What stands for an importable name: what the file may do with it, if anything."""

    title: str
    call: Callable[..., Any] | None = None  # from its arguments
    new: Callable[[], Any] | None = None  # an empty object of that class


class Buildable:
    """An object to which a file may give a state."""

    def build(self, state: Any) -> None:
        raise NotImplementedError


@dataclass(eq=False)
class Inert(Buildable):
    """An object of a class that is not loaded: its name and the attributes it had."""

    title: str
    state: dict[str, Any] = field(default_factory=dict)

    def build(self, state: Any) -> None:
        self.state = checked(state, dict, f"the state of a {self.title}")


class Budget:
    """What may still be read and copied; shared by a pickle and those inside it, which may be named again and again."""

    def __init__(self, file_size: int):
        self.opcodes, self.bytes = MOST_OPCODES, 4 * file_size + 2**20

    def count(self) -> None:
        self.opcodes -= 1
        if self.opcodes < 0:
            raise Unreadable(f"has more than {MOST_OPCODES:,} opcodes, far more than any network needs")

    def copy(self, values: Any) -> None:
        """What a call may copy of its arguments."""
        for value in values if type(values) is tuple else ():
            if type(value) in (str, tuple, list, memoryview):
                self.bytes -= len(value)
        if self.bytes < 0:
            raise Unreadable("would unfold to many times its size: refused")


def checked(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    """The value, if it is exactly of one of these types (a bool is no int here)."""
    if type(value) not in (kind if isinstance(kind, tuple) else (kind,)):
        raise Unreadable(f"has a {type(value).__name__} as {what}")
    return value


def read_pickle(
    data: memoryview,
    at: int,
    names: Callable[[str], Name],
    budget: Budget,
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """The object in the pickle that starts at byte `at`, and where it ends.

    names: the meaning of "module.name"; raises Unreadable for those that are refused. persistent: the object that a
    persistent id stands for (files of torch.save). Byte strings come as views of `data`. Raises Unreadable.
    """
    if data[at : at + 1] != b"\x80":
        raise Unreadable(f"is no pickle of protocol 2 to 5: it starts with {bytes(data[at : at + 16])!r}")
    machine = _Machine(data, at, names, budget, persistent)
    try:
        return machine.run(), machine.at
    except Unreadable:
        raise
    except (IndexError, KeyError, TypeError, ValueError, ArithmeticError, struct.error) as error:
        raise Unreadable(f"is damaged at byte {machine.at:,} ({type(error).__name__})") from error


class _Machine:
    def __init__(self, data: memoryview, at: int, names: Callable[[str], Name], budget: Budget, persistent: Any):
        self.data, self.at, self.names, self.budget, self.persistent = data, at, names, budget, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            self.budget.count()
            code = self.take(1)[0]
            if code == STOP:
                return self.stack.pop()
            operation = OPERATIONS.get(code)
            if operation is None:
                raise Unreadable(f"uses the pickle opcode {code:#04x} at byte {self.at - 1:,}, which no network needs")
            operation(self)

    def take(self, n: int) -> memoryview:
        """The next n bytes, not copied."""
        if n > len(self.data) - self.at:
            raise Unreadable(f"is cut off: {n:,} bytes are wanted at byte {self.at:,} of {len(self.data):,}: copy or download it again")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, format: str) -> Any:
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def text(self, format: str) -> str:
        return str(self.take(self.number(format)), "utf-8")

    def line(self) -> str:
        end = bytes(self.data[self.at : self.at + LONGEST_NAME]).index(b"\n")
        return str(self.take(end + 1)[:end], "ascii")

    def pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def tuple_of(self, n: int) -> None:
        if len(self.stack) < n:
            raise Unreadable(f"is damaged at byte {self.at:,} (its stack is empty)")
        self.stack[len(self.stack) - n :] = [tuple(self.stack[len(self.stack) - n :])]

    def set_items(self, items: list[Any]) -> None:
        target = checked(self.stack[-1], dict, "a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[hashable(key)] = value

    def add(self, values: list[Any]) -> None:
        checked(self.stack[-1], set, "a set").update(map(hashable, values))

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def name(self, module: str, name: str) -> None:
        if len(module) + len(name) > LONGEST_NAME or not (module + name).isprintable():
            raise Unreadable("names something that cannot be a name")
        self.stack.append(self.names(f"{module}.{name}"))

    def stack_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(checked(module, str, "the name of a module"), checked(name, str, "a name"))

    def reduce(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or name.call is None:
            raise Unreadable(f"wants to call {titled(name)}: refused")
        self.budget.copy(checked(arguments, tuple, "arguments"))
        self.stack.append(name.call(*arguments))

    def new(self, keywords: Any) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or name.new is None or arguments != () or keywords != {}:
            raise Unreadable(f"wants to create {titled(name)}: refused")
        self.stack.append(name.new())

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Buildable):
            self.budget.copy(state)
            target.build(state)
        else:  # the attributes of a dictionary (torch's `_metadata` of a state_dict) are of no use to us
            checked(target, dict, "an object with a state")

    def load_persistent(self) -> None:
        if self.persistent is None:
            raise Unreadable("refers to data outside of itself, which only files of torch.save may")
        self.stack.append(self.persistent(self.stack.pop()))


def titled(value: Any) -> str:
    return value.title if type(value) is Name else f"a {type(value).__name__}"


def shown(value: Any) -> str:
    """A value in an error message; never the inside of a container, which may be endless."""
    return repr(value)[:60] if type(value) in (str, int, float, bool, type(None)) else f"a {type(value).__name__}"


def hashable(key: Any) -> Any:
    """A key of a dictionary or set. No tuples: hashing nested ones can take for ever or overflow the stack."""
    if isinstance(key, Buildable):  # equal to itself alone
        return key
    return checked(key, (str, int, float, bool, type(None)), "a key")


def _push(read: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(read(m))


def _long(m: _Machine) -> int:
    n = m.number("<B")
    if n > 16:
        raise Unreadable(f"holds an integer of {n} bytes")
    return int.from_bytes(m.take(n), "little", signed=True)


def _protocol(m: _Machine) -> None:
    if (version := m.number("<B")) not in PROTOCOLS:
        raise Unreadable(f"is a pickle of protocol {version}, wanted {PROTOCOLS[0]} to {PROTOCOLS[-1]}")


def _frame(m: _Machine) -> None:
    length = m.number("<Q")  # a frame only says how much to read at once
    if length > len(m.data) - m.at:
        raise Unreadable(f"is cut off: {length:,} bytes are wanted at byte {m.at:,} of {len(m.data):,}: copy or download it again")


STOP = ord(".")
OPERATIONS: Mapping[int, Callable[[_Machine], object]] = {
    0x80: _protocol,
    0x95: _frame,
    ord("("): lambda m: m.marks.append(len(m.stack)),
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): lambda m: m.pop_mark(),
    ord("2"): lambda m: m.stack.append(m.stack[-1]),
    # numbers and text
    ord("N"): _push(lambda m: None),
    0x88: _push(lambda m: True),
    0x89: _push(lambda m: False),
    ord("J"): _push(lambda m: m.number("<i")),
    ord("K"): _push(lambda m: m.number("<B")),
    ord("M"): _push(lambda m: m.number("<H")),
    0x8A: _push(_long),
    ord("G"): _push(lambda m: m.number(">d")),
    ord("X"): _push(lambda m: m.text("<I")),
    0x8C: _push(lambda m: m.text("<B")),
    0x8D: _push(lambda m: m.text("<Q")),
    ord("B"): _push(lambda m: m.take(m.number("<I"))),
    ord("C"): _push(lambda m: m.take(m.number("<B"))),
    0x8E: _push(lambda m: m.take(m.number("<Q"))),
    0x96: _push(lambda m: m.take(m.number("<Q"))),
    # lists, tuples, dictionaries, sets
    ord("]"): _push(lambda m: []),
    ord("a"): lambda m: checked(m.stack[-2], list, "a list").append(m.stack.pop()),
    ord("e"): lambda m: _extend(m, m.pop_mark()),
    ord(")"): _push(lambda m: ()),
    ord("t"): lambda m: m.stack.append(tuple(m.pop_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("}"): _push(lambda m: {}),
    ord("s"): lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    ord("u"): lambda m: m.set_items(m.pop_mark()),
    0x8F: _push(lambda m: set()),
    0x90: lambda m: m.add(m.pop_mark()),
    0x91: _push(lambda m: frozenset(map(hashable, m.pop_mark()))),
    # the memo
    ord("q"): lambda m: m.remember(m.number("<B")),
    ord("r"): lambda m: m.remember(m.number("<I")),
    0x94: lambda m: m.remember(len(m.memo)),
    ord("h"): _push(lambda m: m.memo[m.number("<B")]),
    ord("j"): _push(lambda m: m.memo[m.number("<I")]),
    # names and objects
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: _Machine.stack_name,
    ord("R"): _Machine.reduce,
    0x81: lambda m: m.new({}),
    0x92: lambda m: m.new(m.stack.pop()),
    ord("b"): _Machine.build,
    ord("Q"): _Machine.load_persistent,
}  # fmt: skip


def _extend(m: _Machine, items: list[Any]) -> None:
    checked(m.stack[-1], list, "a list").extend(items)
