"""Take the conformance exam; print one line of JSON for each scenario."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import get_args

import optserve_client as optserve
from optserve_client.conform.player import Player, ProblemError


def main() -> int:
    """Play the scenarios of the command line; return 0 if every one passed."""
    parser = argparse.ArgumentParser(prog="python -m optserve_client.conform", description=__doc__)
    parser.add_argument("scenarios", nargs="+", type=Path, metavar="SCENARIO.json")
    parser.add_argument("--target", required=True, metavar="HOST:PORT")
    parser.add_argument("--lane", choices=get_args(optserve.Lane), default="grpc")
    arguments = parser.parse_args()
    passed = True
    config = optserve.ClientConfig(lane=arguments.lane)
    with optserve.connect(arguments.target, config=config, progress=False) as client:
        for path in arguments.scenarios:
            scenario = json.loads(path.read_text(encoding="utf-8"))
            failure = _play(scenario["acts"], client)
            passed = passed and failure is None
            line = {
                "scenario": scenario["name"],
                "acts": len(scenario["acts"]),
                "failure": failure,
            }
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
    return 0 if passed else 1


def _play(acts: list[dict[str, object]], client: optserve.Client) -> dict[str, object] | None:
    """Play a scenario to its end, or to the first act that fails; return the failure."""
    with Player(client) as player:
        for number, act in enumerate(acts, start=1):
            try:
                player.play(act)
            except ProblemError as problem:
                return {"act": number, "problem": f"{act.get('act')}: {problem}"}
            except Exception as error:  # noqa: BLE001  (The next scenario is played all the same.)
                traceback.print_exc()
                return {"act": number, "problem": f"{act.get('act')}: {error!r}"}
    return None


if __name__ == "__main__":
    sys.exit(main())
