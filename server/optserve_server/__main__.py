"""The command line: settings in, exit code out."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from pydantic import ValidationError

from optserve_server import config
from optserve_server.app import END_GRACE_S, SIGNALS, serve
from optserve_server.core import failpoints
from optserve_server.core.device import DeviceUnavailableError
from optserve_server.core.storage import StorageError
from optserve_server.last_resort import LastResort
from optserve_server.rpc.listening import AddressInUseError
from optserve_server.rpc.watched import UnusableFileError
from optserve_server.telemetry import logs

EXIT_SETTINGS = 2  # As argparse has it: the command line, the environment or the file is wrong.
EXIT_UNAVAILABLE = 3  # A device, an address or a directory of the settings is not to be had.

_LOGGER = logging.getLogger(__name__)


def main() -> int:
    """Run the server until it is told to stop; return the exit code."""
    try:
        settings = config.load(sys.argv[1:], os.environ)
    except (ValidationError, config.SettingsError) as error:
        sys.stderr.write(f"optserve-server: {_told(error)}\n")
        return EXIT_SETTINGS
    logs.configure(settings.log_format, settings.log_level)
    try:
        failpoints.arm(os.environ.get("OPTSERVE_FAILPOINTS", ""))
    except failpoints.FailpointError as error:
        sys.stderr.write(f"optserve-server: {error}\n")
        return EXIT_SETTINGS
    for number in SIGNALS:  # Until serve() listens to them itself.
        signal.signal(number, _leave)
    try:
        asyncio.run(serve(settings))
    except UnusableFileError as error:
        sys.stderr.write(f"optserve-server: {error}\n")
        return EXIT_SETTINGS
    except (DeviceUnavailableError, AddressInUseError, StorageError, OSError) as error:
        sys.stderr.write(f"optserve-server: {error}\n")
        return EXIT_UNAVAILABLE
    return 0


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    """End a server that does not serve yet, and may be in the middle of restoring from an archive.

    By default the first process of a container is not told of SIGTERM.
    """
    _LOGGER.info("stopped before it served", extra={"signal": signal.Signals(number).name})
    LastResort().end_within(END_GRACE_S)
    sys.exit(0)


def _told(error: Exception) -> str:
    """Say what is wrong with the settings, one line for each."""
    if not isinstance(error, ValidationError):
        return str(error)
    lines = [
        ": ".join([*map(str, each["loc"]), each["msg"].removeprefix("Value error, ")])
        for each in error.errors()
    ]
    return "\n".join([*lines, "see --help"])


if __name__ == "__main__":
    sys.exit(main())
