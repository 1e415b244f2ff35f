"""What holds for every test."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keeps what the command line encodes away from the person's own cache."""
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
