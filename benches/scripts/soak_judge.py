"""One fault of the soak from its first call to its verdict."""

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benches.scripts.soak_damage import Damage
from benches.scripts.soak_moments import Action, Moment, dies, iteration, mount, unmount
from benches.scripts.soak_runs import Case, Command, Ended, copy_inputs, difference, lines_lost, reference, results

SAME, REFUSED, LINES, LEFT_OUT = "identical", "refused, then identical", "identical but for lost lines", "left out"


class Fault(NamedTuple):
    """A run that something happens to.

    moment, action: when and what, in the first call. rank: to which rank; None: to all.
    first: how that call must end, a key of ENDS. again: another call that is disturbed, before the last.
    damage: done between the calls. repair: what a user does whom a sentence tells to.
    wants: the verdicts that are right. disk: in a run folder on a small disk of its own.
    play: how it goes where it goes otherwise.
    """

    kind: str
    what: str
    case: Case = Case("dmd")
    moment: Moment = iteration(10)
    action: Action = dies()
    first: str = "killed"
    again: tuple[Moment, Action] | None = None
    damage: Damage | None = None
    repair: Damage | None = None
    wants: tuple[str, ...] = (SAME,)
    rank: int | None = None
    disk: bool = False
    play: "Callable[[Fault, Path, Path], tuple[bool, str]] | None" = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.what} ({self.case})"


class Wrong(Exception):
    """A call did not end as it must."""


def killed(ended: Ended) -> bool:
    return all(code is not None and code < 0 for code in ended.codes)


def saved(ended: Ended) -> bool:
    """By a signal that the run had time to answer."""
    return all(code is not None and code > 128 for code in ended.codes) and ended.said.count("saved ") == 1


def stopped(ended: Ended) -> bool:
    """By a signal, whether or not there was anything to save; or it was over before."""
    return all(code is not None and (code <= 0 or code > 128) for code in ended.codes)


def refused(ended: Ended) -> bool:
    return all(code == 2 for code in ended.codes) and len(ended.errors) == 1


def stopped_or_refused(ended: Ended) -> bool:
    return stopped(ended) or refused(ended)


def lost(ended: Ended) -> bool:
    """A rank has died, and the others say so once."""
    return all(code not in (0, None) for code in ended.codes) and len(ended.errors) == 1


def done(ended: Ended) -> bool:
    return all(code == 0 for code in ended.codes)


def refused_or_done(ended: Ended) -> bool:
    return refused(ended) or done(ended)


ENDS = {one.__name__: one for one in (killed, saved, stopped, refused, stopped_or_refused, lost, done, refused_or_done)}


def check(ended: Ended, wanted: str) -> Ended:
    """Wrong unless it ended so: nothing hung, nothing stayed behind, and no traceback in any case."""
    if None in ended.codes:
        raise Wrong(f"hung: {ended.last_line}")
    if "Traceback (most recent call last)" in ended.said:
        raise Wrong(f"traceback: {ended.last_line}")
    if not ENDS[wanted](ended):
        raise Wrong(f"wanted {wanted.replace('_', ' ')}, got exit {ended.codes}: {ended.last_line}")
    if ended.left:
        raise Wrong(f"{ended.left} processes stayed behind: {ended.last_line}")
    return ended


def judged(fault: Fault, work: Path, number: int, mounts: bool) -> dict[str, Any]:
    """What became of a fault: its row in the results."""
    place, began = work / f"faults/{number:03d}", time.monotonic()
    if fault.disk and not mounts:
        return row_of(fault, LEFT_OUT, "no disk of its own can be mounted here", 0.0)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    if fault.disk:
        mount("size=16m", place)
    copy_inputs(fault.case, work, place)
    try:
        was_refused, sentence = (fault.play or played)(fault, work, place / "run")
        verdict, detail = verdict_of(fault, work, place / "run", was_refused), sentence
    except Wrong as wrong:
        verdict, detail = "FAIL", str(wrong)
    if verdict != "FAIL" and verdict not in fault.wants and not (verdict == REFUSED and fault.first == "refused"):
        verdict, detail = "FAIL", f"{verdict}, wanted {' or '.join(fault.wants)}: {detail}"
    if fault.disk:
        unmount(place)
    if verdict != "FAIL":
        shutil.rmtree(place)
    return row_of(fault, verdict, detail.replace(f"{place}/", ""), time.monotonic() - began)


def row_of(fault: Fault, verdict: str, detail: str, seconds: float) -> dict[str, Any]:
    return {"fault": str(fault), "kind": fault.kind, "verdict": verdict, "detail": detail, "seconds": round(seconds, 1)}


def verdict_of(fault: Fault, work: Path, folder: Path, was_refused: bool) -> str:
    """Wrong where the results are not the reference's."""
    wanted, got = reference(fault.case, work)["results"], results(folder)
    if other := difference(wanted, got):
        if not lines_lost(wanted, got):
            raise Wrong(f"other results: {other}")
        return LINES
    return REFUSED if was_refused else SAME


def disturbance(fault: Fault, folder: Path, moment: Moment, action: Action) -> Callable[[int], None]:
    def disturb(rank: int) -> None:
        if fault.rank in (None, rank):
            moment(lambda: action(folder))

    return disturb


def played(fault: Fault, work: Path, folder: Path) -> tuple[bool, str]:
    """The usual way: a call that is disturbed, damage, the same call again. Was it refused, and with which sentence?"""
    ended = check(Command(fault.case, work, folder, disturbance(fault, folder, fault.moment, fault.action)).wait(), fault.first)
    was_refused, sentence = refused(ended), "".join(ended.errors)
    if was_refused and fault.repair:
        fault.repair(folder)
    if fault.again:
        check(Command(fault.case, work, folder, disturbance(fault, folder, *fault.again)).wait(), fault.first)
    if fault.damage:
        fault.damage(folder)
    ended = check(Command(fault.case, work, folder).wait(), "refused_or_done")
    if not refused(ended):
        return was_refused, sentence or told(ended)
    if fault.repair:
        fault.repair(folder)
    sentence = "".join(ended.errors)
    check(Command(fault.case, work, folder).wait(), "done")
    return True, sentence


def told(ended: Ended) -> str:
    """What a run that went on says of it."""
    return next((line for line in ended.said.splitlines() if "checkpoint" in line and "damaged" in line.lower()), "")


def at_random(signums: tuple[int, ...]) -> Callable[[Fault, Path, Path], tuple[bool, str]]:
    """One call for each signal, which comes at a random time of it; then one that is left alone."""

    def play(fault: Fault, work: Path, folder: Path) -> tuple[bool, str]:
        draw, seconds = random.Random(str(fault)), reference(fault.case, work)["seconds"]
        for signum in signums:
            command = Command(fault.case, work, folder)
            time.sleep(seconds * draw.uniform(0.05, 0.95))
            command.signal(signum, everybody=signum == signal.SIGINT)
            check(command.wait(), "stopped")
        check(Command(fault.case, work, folder).wait(), "done")
        return False, ""

    return play


def two_at_once(fault: Fault, work: Path, folder: Path) -> tuple[bool, str]:
    """While the first stands still, a second begins in the same folder; then the first goes on to its end."""
    first = Command(fault.case, work, folder, disturbance(fault, folder, fault.moment, dies(signal.SIGSTOP)))
    (rank,) = first.ranks
    deadline = time.monotonic() + 60
    while (
        rank.is_alive() and Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T" and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    second = Command(fault.case, work, folder).wait()
    first.signal(signal.SIGCONT)
    ended = first.wait()
    check(second, "refused")
    check(ended, "done")
    return True, "".join(second.errors)
