"""Figures that the tests of faults tell, printed when all have run."""

import pytest

FIGURES: list[str] = []


@pytest.fixture
def tell(request):
    """Keeps one figure of a test for the end."""
    return lambda text: FIGURES.append(f"{request.node.name}: {text}")


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section("figures of the faults")
        for line in FIGURES:
            terminalreporter.write_line(line)
