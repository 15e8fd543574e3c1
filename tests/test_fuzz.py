"""The judge of `make fuzz` sees what a reader may not do. The readers themselves: test_fuzz_nets, test_fuzz_runs, test_fuzz_pictures."""

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
from fuzz import jail
from fuzz.jail import FAILED, READ, REFUSED, WRONG, Reader, drawn, fuzz
from fuzz.mutations import MARKER, damaged, json_of

from potstill.engine.common.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are forked, with Linux's limits")


def make(folder: Path) -> None:
    (folder / "x.json").write_text('{"a": [1, 2.5, "three"], "b": {"c": null}}')


def judged(read, wrong=lambda found, right, damaged: None, n=6):
    """The tally of a reader that is well behaved as long as its file is the valid one."""

    def careful(folder):
        text = (folder / "x.json").read_bytes()
        return text if text == VALID else read(folder)

    return fuzz(Reader("x", make, careful, {"x.json": json_of}, wrong), n, 0)


VALID = b'{"a": [1, 2.5, "three"], "b": {"c": null}}'


def refuse(folder):
    raise UserError("no")


def break_lines(folder):
    raise UserError("no\nand no")


def stumble(folder):
    return json.loads("{}")["x"]


def spin(folder):
    while True:
        pass


def grow(folder):
    return bytes(2**31)


def grow_in_silence(folder):
    try:
        return bytearray(2**31)
    except MemoryError as error:
        raise UserError("damaged") from error


def execute(folder):
    (folder.parent / MARKER).touch()


def run(folder):
    os.system("true")


def write_beside(folder):
    (folder.parent / "y").write_text("")


def die(folder):
    os.kill(os.getpid(), signal.SIGSEGV)


def read(folder):
    return b""


@pytest.mark.parametrize(
    ("reader", "verdict", "place"),
    [
        (read, READ, None), (refuse, REFUSED, None), (break_lines, FAILED, "a sentence of several lines"), (stumble, FAILED, "KeyError at"),
        (spin, FAILED, "more than 0.1 s of work"), (grow, FAILED, "asks for more than 1 GiB"),
        (grow_in_silence, FAILED, "asks for more than 1 GiB"), (execute, FAILED, "a program in the file was executed"),
        (run, FAILED, "ran os.system"), (write_beside, FAILED, "wrote ../y"), (die, FAILED, "the process ended (SIGSEGV)"),
    ],
)  # fmt: skip
def test_every_input_gets_its_verdict_whatever_became_of_the_one_before(reader, verdict, place, monkeypatch):
    monkeypatch.setattr(jail, "MOST_CPU", 0.1)
    tally = judged(reader)
    assert tally.counts[verdict] >= 5 and tally.counts.total() == 6  # a change may leave the file as it was
    assert set(tally.counts) <= {verdict, READ}
    assert all(place and found.startswith(f"{verdict}: {place}") for found in tally.faults)


def test_what_was_accepted_is_compared():
    tally = judged(lambda folder: b"other", wrong=lambda found, right, damaged: "another" if found != right else None)
    assert tally.counts[WRONG] >= 5 and list(tally.faults) == ["wrong: another"]


def test_the_same_seed_makes_the_same_inputs():
    assert drawn(json_of(VALID), 20, 1) == drawn(json_of(VALID), 20, 1) != drawn(json_of(VALID), 20, 2)
    assert damaged(VALID, VALID[::-1], random.Random(3)) == damaged(VALID, VALID[::-1], random.Random(3))
