"""What all tests share: nobody's terminal, colours or network."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's output does not depend on who runs it."""
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "FAMC_LIFE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "100")
