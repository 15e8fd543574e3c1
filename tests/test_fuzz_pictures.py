"""Images in folders, zips, arrays and shards: read right or refused in a sentence, whatever is in them.

The seed is fixed, so that a change is tested with the inputs of the day before; `make fuzz` makes new ones.
"""

import sys

import pytest
from fuzz.pictures import READERS
from fuzz.suite import assert_clean

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are forked, with Linux's limits")


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_every_input_is_read_right_or_refused(reader):
    assert_clean(reader)
