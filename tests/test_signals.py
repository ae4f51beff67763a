"""Tests that press Ctrl-C pass in a run that was started ignoring it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.signals import HEARD, IGNORING, ctrl_c_heard


def test_ctrl_c_is_heard_where_it_was_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), ctrl_c_heard():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_child_is_born_ignoring_it_and_hears_it_where_its_script_says_so() -> None:
    script = "import signal\nsignal.raise_signal(signal.SIGINT)\nprint('ignored')"
    for first, code, out in (("", 0, "ignored\n"), (HEARD, -signal.SIGINT, "")):
        command = [*IGNORING, sys.executable, "-c", first + script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (code, out), done.stderr
