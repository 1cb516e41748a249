"""Print the worst error of the suite in the summary of a test run."""

import pytest

from tests.conformance.measuring import WORST


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    errors = config.stash.get(WORST, {})
    if errors:
        name = max(errors, key=errors.__getitem__)
        terminalreporter.write_line(
            f"conformance: {len(errors)} models, worst error of a probability "
            f"{errors[name]:.1e} ({name})"
        )
