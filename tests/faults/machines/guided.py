"""Feed one decoder with the bytes that coverage finds worth it: atheris, in a process of its own.

  python -m faults.machines.guided DECODER EXAMPLES -atheris_runs=1000 -seed=7

EXAMPLES is a folder, to which whatever is worth it is added. The other arguments are libFuzzer's.
"""

from __future__ import annotations

import sys

import atheris

# Only what is imported here is watched: first come, and everything below imports it.
with atheris.instrument_imports(include=["optserve", "optserve_server"]):
    from faults.machines.decoders import DECODERS


def main() -> None:
    """Feed the decoder until all runs are done, or one of them is at fault; never return."""
    program, name, *arguments = sys.argv
    atheris.Setup([program, *arguments], DECODERS[name].take)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
