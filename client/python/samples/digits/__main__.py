"""The command line: start a server, train everything at once, show and write the results."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Event
from types import FrameType

from rich.console import Console

import optserve_client as optserve

from . import data, display
from .curves import draw
from .recipes import EPOCHS, RECIPES
from .server import ServerError, running_server
from .training import Plan, Run, train

# Its sessions live in the server's memory: a connection may come back, a server not with them.
_CONFIG = optserve.ClientConfig(retry=optserve.Retry(give_up_after_s=5))
_EXIT_INTERRUPTED = 130  # As a shell has it: 128 and the number of SIGINT.


def main() -> int:
    """Run the demo; return the exit code, 0 only if every run has come to its end."""
    arguments = _arguments()
    console = Console()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with ExitStack() as stack:
            target = arguments.target
            if target is None:
                console.print("Starting a server ...")
                server = stack.enter_context(running_server())
                target = server.address
                console.print(f"Its metrics: http://{server.metrics_address}/metrics\n")
            client = stack.enter_context(optserve.connect(target, config=_CONFIG))
            runs = _train_all(client, arguments.epochs, arguments.seed, console)
    except KeyboardInterrupt:
        console.print("\nInterrupted: every session is deleted, nothing is left running.")
        return _EXIT_INTERRUPTED
    except (optserve.OptserveError, ServerError) as error:
        console.print(f"\n{error}", style="red", markup=False, highlight=False)
        return 1
    console.print()
    console.print(display.results(runs))
    _write(runs, arguments.output, console)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m samples.digits", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder to write")
    parser.add_argument("--target", help="server to use, as HOST:PORT; without it, one is started")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def _train_all(client: optserve.Client, epochs: int, seed: int, console: Console) -> Sequence[Run]:
    """Train all recipes at the same time; return the runs in the recipes' order.

    Raises:
        OptserveError: A run has failed; the others were stopped.
        KeyboardInterrupt: All were stopped.
    """
    training, validation = data.load(seed)
    plan = Plan(train=training, validation=validation, epochs=epochs, seed=seed)
    stop = Event()
    with display.Board(console, epochs) as board, ThreadPoolExecutor(len(RECIPES)) as executor:
        futures = [
            executor.submit(train, client, recipe, plan, partial(board.report, recipe.name), stop)
            for recipe in RECIPES
        ]
        try:
            for future in as_completed(futures):
                future.result()  # A run that fails ends the wait for the others.
        finally:
            stop.set()
    return [future.result() for future in futures]


def _write(runs: Sequence[Run], folder: Path, console: Console) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture, summary = folder / "curves.png", folder / "summary.json"
    draw(runs, picture)
    rows = [
        {
            "optimizer": run.recipe.name,
            "schedule": run.recipe.schedule,
            "train_loss": run.train_loss,
            "validation_loss": run.validation_loss,
            "validation_accuracy": run.validation_accuracy,
            "steps_per_second": run.steps_per_second,
        }
        for run in runs
    ]
    summary.write_text(json.dumps({"runs": rows}, indent=2) + "\n")
    console.print(f"\nWritten: {picture.resolve()}\n         {summary.resolve()}", soft_wrap=True)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # Another one, while the first was being obeyed.
        sys.exit(_EXIT_INTERRUPTED)
