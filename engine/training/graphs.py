"""CUDA graphs: a piece of an iteration runs eagerly a few times, is captured once, and is replayed from then on.

A piece is what `begin` does, or one turn: forward, loss, backward, clip, optimiser step. Launching its thousands of kernels
one by one costs the host more time than a small batch costs the GPU; a replay is one launch. What a replay sees:

    what the pieces share    is copied into buffers of the graph before, and results are copied out of it after
    noise, dropout           from the generators of the run, seeded before every iteration: the numbers of an eager run
    learning rate            a device tensor that is filled before
    host decisions           SFD-v's number of steps, None where an iteration has no use for a turn: part of the key

There is one graph for every key. Its first `warmup` runs are eager and train as any, on the stream of the later capture.
Each graph pins memory, so there are at most `limit`; what comes later stays eager. Whatever stays eager says why.

All graphs share one pool of memory, and a capture may use what an earlier graph has freed. So a replay may overwrite what any
earlier replay left in the pool. Therefore results are copied out at once, inputs lie outside the pool, gradients live within one
graph, and an eager run makes what is made only once (moments, tables, caches).
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from potstill.engine.common.errors import UserError
from potstill.engine.methods.base import Draws, Logs
from potstill.engine.training.capture import CUDA
from potstill.kernels.tables import owned_by_graph

MODES = ("auto", "on", "off")
Work = Callable[[Any], tuple[Any, Logs]]  # what the pieces share -> the same afterwards, and what to log


@dataclasses.dataclass
class Captured:
    """One graph with the tensors it reads and writes."""

    replay: Callable[[], None]
    inputs: list[Tensor]
    shape: Hashable = None  # of what the pieces share afterwards
    sources: Sequence[int | Tensor] = ()  # its leaves: number of an incoming leaf, or a tensor in the graph's memory
    names: Sequence[str] = ()
    logs: Tensor | None = None  # [len(names)] float64
    owned: Sequence[Tensor] = ()  # what else a replay reads, of the optimisers' own


class Host(NamedTuple):
    """The host's generator of one micro-batch. It gives the answers that were drawn in advance first."""

    number: int
    generator: Any
    answers: list[Any]
    asked: list[tuple[int, tuple, Any]]  # (number, options, answer) of all micro-batches, in the order of asking

    def choice(self, options: Sequence[Any]) -> Any:
        answer = self.answers.pop(0) if self.answers else self.generator.choice(options)
        self.asked.append((self.number, tuple(options), answer))
        return answer


class Unfit(Exception):
    """Something that a graph cannot hold."""


class Graphs:
    """Runs pieces: eagerly at first, then as graphs. `strict`: a piece that cannot be captured is an error.

    reset: called when a capture has failed, to throw away half-made gradients. say: told what stays eager, and why.
    """

    def __init__(
        self, backend: CUDA, *, warmup: int = 3, limit: int = 32, strict: bool = False,
        reset: Callable[[], None] = lambda: None, say: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        self.backend, self.warmup, self.limit, self.strict, self.reset, self.say = backend, warmup, limit, strict, reset, say
        self.captured: dict[Hashable, Captured] = {}
        self.reasons: dict[Hashable, str] = {}  # why a key stays eager
        self.seen: Counter[Hashable] = Counter()
        self.counts: dict[str, Counter[str]] = {}
        self._asks: dict[Hashable, tuple[int, tuple]] = {}  # what a piece asks the host next, having had the answers in the key

    def forget(self) -> None:
        """Capture all pieces again: the host has decided something that changes them and is in no key."""
        for known in (self.captured, self.reasons, self.seen, self._asks):
            known.clear()

    def run(self, name: str, work: Work, state: Any) -> tuple[Any, Logs]:
        """work(state), or a replay of it. `name` is the same for the same work."""
        count = self.counts.setdefault(name, Counter())
        leaves: list[Any] = []
        try:
            first = (name, split(state, leaves))
        except Unfit as reason:
            self._refuse(name, name, str(reason))
            count["eager"] += 1
            return work(state)
        draws = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Draws)}.values())
        key, answers = self._answers_in_advance(first, draws)
        if key not in self.captured and key not in self.reasons and self.seen[key] >= self.warmup:
            self._capture(name, key, work, first[1], leaves, draws, answers)
        if key in self.captured:
            count["replayed"] += 1
            return replayed(self.captured[key], leaves)
        count["eager"] += 1
        with answering(draws, answers) as asked:
            result = work(state)
        self.seen[self._key_with_answers(first, asked)] += 1
        return result

    def _answers_in_advance(self, key: Hashable, draws: Sequence[Draws]) -> tuple[Hashable, list[list[Any]]]:
        """The host's decisions, as far as it is known which the piece asks for, and the key with them."""
        answers: list[list[Any]] = [[] for _ in draws]
        while key in self._asks:
            number, options = self._asks[key]
            answers[number].append(draws[number].host.choice(options))
            key = (key, answers[number][-1])
        return key, answers

    def _key_with_answers(self, key: Hashable, asked: Sequence[tuple[int, tuple, Any]]) -> Hashable:
        """The key with all decisions; what was asked is known the next time."""
        for number, options, answer in asked:
            self._asks[key] = (number, options)
            key = (key, answer)
        return key

    def _capture(
        self, name: str, key: Hashable, work: Work, shape: Hashable, leaves: list[Any], draws: Sequence[Draws],
        answers: list[list[Any]],
    ) -> None:  # fmt: skip
        if len(self.captured) >= self.limit:
            return self._refuse(name, key, f"the limit of {self.limit} graphs is reached")
        statics = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        graph = Captured(lambda: None, [t for t in statics if isinstance(t, Tensor)])
        versions = [t._version if isinstance(t, Tensor) else 0 for t in statics]

        def body() -> None:
            with answering(draws, answers):
                after, logs = work(joined(shape, iter(statics)))
            results: list[Any] = []
            graph.shape = split(after, results)
            same = {id(t): i for i, t in enumerate(statics) if not isinstance(t, Tensor) or t._version == versions[i]}
            graph.sources = [same[id(leaf)] if id(leaf) in same else leaf for leaf in results]
            graph.names = list(logs)
            if logs:
                graph.logs = torch.stack([value.detach().double().reshape(()) for value in logs.values()])

        generators = [one.generator for one in draws]
        try:
            with owned_by_graph() as graph.owned:
                graph.replay = self.backend.capture(body, generators)
        except (RuntimeError, Unfit) as error:
            self.reset()
            if not self.backend.recover(generators):
                if self.captured:
                    broke = f"broke the generators of those from before ({len(self.captured)}), which are captured again"
                    self.say(f"CUDA graphs: the failed capture of {name} {broke}")
                self.captured.clear()
                self.seen.clear()  # they may be captured again, after eager runs as before
            return self._refuse(name, key, first_line(error))
        self.captured[key] = graph
        self.counts[name]["captured"] += 1

    def _refuse(self, name: str, key: Hashable, why: str) -> None:
        if self.strict:
            raise UserError(f"train.graphs=on, but {name} cannot be a CUDA graph ({why}): use auto, which leaves it eager, or off")
        if key not in self.reasons:
            self.say(f"CUDA graphs: {name} stays eager ({why})")
        self.reasons[key] = why

    def __str__(self) -> str:
        counts = self.report()
        why = f"; stays eager: {', '.join(counts['stay_eager'])}" if counts["stay_eager"] else ""
        return f"CUDA graphs: {counts['captured']} captured, {counts['replayed']} replayed, {counts['eager']} pieces run eagerly{why}"

    def report(self) -> dict[str, Any]:
        """How often each piece was captured, replayed and run eagerly, and why any stays eager."""
        kinds = ("captured", "replayed", "eager")
        total = {kind: sum(count[kind] for count in self.counts.values()) for kind in kinds}
        pieces = {name: {kind: count[kind] for kind in kinds} for name, count in self.counts.items()}
        return {"mode": "on", **total, "pieces": pieces, "stay_eager": sorted(set(self.reasons.values()))}


def replayed(one: Captured, leaves: Sequence[Any]) -> tuple[Any, Logs]:
    """Fill the graph's inputs, replay, and take copies of its results: the next replay of any graph may overwrite them."""
    incoming = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if incoming:
        torch._foreach_copy_(one.inputs, incoming)  # pyright: ignore[reportPrivateImportUsage]
    one.replay()
    after = [leaves[s] if isinstance(s, int) else s.clone() if isinstance(s, Tensor) else s for s in one.sources]
    logs = {} if one.logs is None else dict(zip(one.names, one.logs.clone().unbind(), strict=True))
    return joined(one.shape, iter(after)), logs


@contextmanager
def answering(draws: Sequence[Draws], answers: list[list[Any]]) -> Iterator[list[tuple[int, tuple, Any]]]:
    """Lets `draws` give these answers first; yields the list of what is asked."""
    asked: list[tuple[int, tuple, Any]] = []
    generators = [one.host for one in draws]
    for number, one in enumerate(draws):
        one.host = Host(number, generators[number], list(answers[number]), asked)
    try:
        yield asked
    finally:
        for one, generator in zip(draws, generators, strict=True):
            one.host = generator


def split(value: Any, leaves: list[Any]) -> Hashable:
    """The shape of nested data, hashable, with all its numbers; tensors and draws are appended to `leaves`.

    Raises Unfit for what it does not know, and for a tensor with a gradient's history, which would cross pieces.
    """
    match value:
        case Tensor():
            if value.requires_grad:
                raise Unfit("it shares a tensor that carries a gradient")
            leaves.append(value)
            return Tensor, value.dtype, value.device, tuple(value.shape), value.stride()
        case Draws():
            leaves.append(value)
            return Draws, value.total, (value.window.start, value.window.stop, value.window.step), id(value.generator), id(value.classes)
        case None | bool() | int() | float() | str() | torch.dtype():
            return type(value), value
        case list() | tuple():
            return type(value), None, *(split(item, leaves) for item in value)
        case dict():
            return dict, tuple(value), *(split(item, leaves) for item in value.values())
    if dataclasses.is_dataclass(value):
        names = tuple(f.name for f in dataclasses.fields(value))
        return type(value), names, *(split(getattr(value, name), leaves) for name in names)
    raise Unfit(f"it shares a {type(value).__name__}")


def joined(shape: Any, leaves: Iterator[Any]) -> Any:
    """The data of that shape from its leaves."""
    kind, about, *parts = shape
    if kind is Tensor or kind is Draws:
        return next(leaves)
    if not parts and not (issubclass(kind, list | tuple | dict) or hasattr(kind, "__dataclass_fields__")):
        return about
    items = [joined(part, leaves) for part in parts]
    if kind is list or kind is tuple:
        return kind(items)
    return dict(zip(about, items, strict=True)) if kind is dict else kind(*items)


def first_line(error: BaseException) -> str:
    """What went wrong first: the failure to end a capture hides the error that broke it."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_graphs(mode: str, device: torch.device, where: str, ranks: int = 1, waits: str = "") -> None:
    """UserError for `on` where there is no CUDA, where there are several ranks, or for a net that waits for the device and why."""
    if mode == "on" and device.type != "cuda":
        raise UserError(f"{where}.graphs=on wants a CUDA device, and this run is on {device.type}: use auto or off")
    if mode == "on" and ranks > 1:
        raise UserError(f"{where}.graphs=on wants one process, got {ranks}: what ranks tell one another is not captured; use auto or off")
    if mode == "on" and waits:
        raise UserError(f"{where}.graphs=on wants nets that do not wait for the device, got {waits}: use auto or off")


def build_graphs(mode: str, device: torch.device, waits: str = "") -> Graphs | None:
    """As train.graphs says; None: everything is eager. `auto` is on where there are CUDA graphs. waits: the net that does, and why."""
    check_graphs(mode, device, "train", waits=waits)
    if mode == "off" or device.type != "cuda" or waits:
        return None
    return Graphs(CUDA(device), strict=mode == "on")
