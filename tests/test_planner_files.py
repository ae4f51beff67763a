"""Files appear whole or not at all, whatever stops their writing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from planner.files import write_whole


def test_text_and_bytes_are_there_and_nothing_else(tmp_path: Path) -> None:
    write_whole(tmp_path / "text", "größer\n")
    write_whole(str(tmp_path / "bytes"), b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == "größer\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bytes", "text"]


def test_it_may_be_read_by_whom_any_new_file_may(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_whole(tmp_path / "whole", "x")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("stop", [OSError("disk full"), KeyboardInterrupt()])
def test_what_was_there_stays_if_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    path = tmp_path / "plan.json"
    path.write_text("before")

    def full(*_: object) -> None:
        raise stop

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(type(stop)):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_no_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "nowhere" / "plan.json", "x")
    assert not list(tmp_path.iterdir())
