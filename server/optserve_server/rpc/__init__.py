"""The gRPC adapter.

Decodes requests into the core's values, calls the core, encodes what it answers.
"""
