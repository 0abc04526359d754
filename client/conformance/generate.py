"""Make the scenarios: what is asked is written in author*.py, what must come is computed by torch.

python generate.py            writes scenarios/*.json
python generate.py --check    exits with 1 if they are not what it would write
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from author import Scenario
from author_catalogue import CATALOGUE
from author_checkpoints import CHECKPOINTS
from author_cuts import CUTS
from author_refusals import REFUSALS
from author_sessions import SESSIONS
from author_tensors import TENSORS
from author_wire import WIRE
from reference_sessions import Reference
from tensors import Json

SCENARIOS = (*CATALOGUE, *SESSIONS, *CHECKPOINTS, *TENSORS, *WIRE, *CUTS, *REFUSALS)
FOLDER = Path(__file__).parent / "scenarios"
_LINE_CHARS_MAX = 110


def main() -> int:
    """Write the scenarios, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check: bool = parser.parse_args().check
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":  # Read once, before torch is imported.
        environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode
    texts = {f"{s.name}.json": written(completed(s)) + "\n" for s in SCENARIOS}
    present = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    differing = sorted(n for n in texts.keys() | present.keys() if texts.get(n) != present.get(n))
    if check:
        print("\n".join(f"differs: {name}" for name in differing) or "all scenarios are up to date")
        return 1 if differing else 0
    FOLDER.mkdir(exist_ok=True)
    for name in differing:
        if name in texts:
            (FOLDER / name).write_text(texts[name])
        else:
            (FOLDER / name).unlink()
    print(f"{len(texts)} scenarios; {len(differing)} have changed")
    return 0


def completed(scenario: Scenario) -> Json:
    """Add to every act what must come, unless its author says it."""
    reference = Reference(effective=scenario.effective)
    acts = []
    for act in scenario.acts:
        if "expect" not in act and "refused" not in act:
            answer = copy.deepcopy(reference.answer(act))
            if scenario.cuts:
                answer.pop("replayed", None)
            act = act | {"expect": answer}  # noqa: PLW2901 - the same act, completed.
        acts.append(act)
    cuts = {"cuts": scenario.cuts} if scenario.cuts else {}
    return {"name": scenario.name, "about": scenario.about, **cuts, "acts": acts}


def written(value: object, indent: int = 0) -> str:
    """Write JSON that is short where it is simple, and one line for each member where it is not."""
    line = json.dumps(value)
    if indent > 0 and indent + len(line) <= _LINE_CHARS_MAX:
        return line
    pad = " " * (indent + 2)
    if isinstance(value, dict) and value:
        members = (f"{pad}{json.dumps(k)}: {written(v, indent + 2)}" for k, v in value.items())
        return "{\n" + ",\n".join(members) + "\n" + " " * indent + "}"
    if isinstance(value, list) and value:
        elements = (pad + written(element, indent + 2) for element in value)
        return "[\n" + ",\n".join(elements) + "\n" + " " * indent + "]"
    return line


if __name__ == "__main__":
    sys.exit(main())
