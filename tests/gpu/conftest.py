"""How many random cases passed, at the end of a run."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, int] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name.startswith("cases: "):
                counts[name] = counts.get(name, 0) + value
    for name, count in counts.items():
        terminalreporter.write_line(f"{name.removeprefix('cases: ')}: {count:,} random cases passed")
