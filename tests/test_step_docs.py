"""docs/step.md against a step as it runs."""

import json
import re
import subprocess
import sys

from tests.command import ROOT, environment

_MOST_FILES = 12
_LINE = re.compile(r"^( *)- `(\S+)` `(\S+)`: ", re.M)


def documented() -> list[tuple[str | None, str]]:
    """Caller and function of each line, in order."""
    above: list[tuple[int, str]] = []
    calls: list[tuple[str | None, str]] = []
    for indent, path, name in _LINE.findall((ROOT / "docs" / "step.md").read_text()):
        while above and above[-1][0] >= len(indent):
            above.pop()
        calls.append((above[-1][1] if above else None, f"{path}:{name}"))
        above.append((len(indent), calls[-1][1]))
    return calls


def test_a_step_is_what_the_document_says() -> None:
    """Each function is called, under the one it stands under, in this order."""
    calls = documented()
    functions = [name for _, name in calls]
    assert len({name.split(":")[0] for name in functions}) <= _MOST_FILES
    command = [sys.executable, str(ROOT / "tests" / "profiled_step.py"), *functions]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Older versions of torch say there what gloo does.
    made = [tuple(json.loads(line)) for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert [call for call in made if call in calls] == calls
    assert {name for _, name in made} == {*functions}
