"""What all tests share: nobody's terminal, colours or network, and no waiting for a disk."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A test's output does not depend on who runs it."""
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "FAMC_LIFE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv(
        "XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "config")
    )  # a developer's calibration
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # test_store.py looks that it is called
