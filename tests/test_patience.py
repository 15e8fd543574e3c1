"""Patience with processes: work and waiting are told apart, in one process and in what it started."""

import subprocess
import sys

import pytest
from patience import Patience, outlasted, until

BUSY = "import time; end = time.process_time() + {}\nwhile time.process_time() < end: pass"
STARTS = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"


@pytest.mark.parametrize("code", [BUSY.format(2), STARTS.format(BUSY.format(2))], ids=["itself", "child"])
def test_process_that_works_is_waited_for(code):
    process = subprocess.Popen([sys.executable, "-c", code])
    assert outlasted(process.wait, Patience([process.pid], quiet=1.0)) == 0


@pytest.mark.parametrize(
    ("code", "quiet", "most", "why"),
    [("import time; time.sleep(60)", 0.5, 900, "stood still for 0 s"), (BUSY.format(60), 60, 0.5, "not done after 0 s of processor time")],
    ids=["still", "endless"],
)
def test_process_that_hangs_is_given_up(code, quiet, most, why):
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        with pytest.raises(AssertionError, match=f"{why}: words"):
            until(lambda: False, Patience([process.pid], quiet=quiet, most=most), lambda: "words")
    finally:
        process.kill()
        process.wait()


def test_process_that_is_gone_is_no_error():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert Patience([process.pid]).lost() == ""
