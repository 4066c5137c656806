"""The commands at the other end of a pipe."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", [["data", "list"], ["results"]])
def test_a_reader_who_has_seen_enough_is_no_error(command):
    reader, writer = os.pipe()
    os.close(reader)  # nobody listens from the first word on
    module, *arguments = command
    left = subprocess.run(
        [sys.executable, "-m", f"longseq_tutorial.{module}", *arguments],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (left.returncode, left.stderr) == (0, "")
