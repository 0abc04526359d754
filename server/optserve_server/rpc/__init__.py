"""The gRPC adapter: decodes requests into the core's values, calls the core, encodes what it answers."""
