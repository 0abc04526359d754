"""The optserve server: sessions that keep parameters, optimizer state, schedules and losses, served over gRPC."""

__version__ = "0.1.0"
