"""The runner of the conformance exam: plays scenarios through this client's public API.

``python -m optserve_client.conform SCENARIO.json... --target HOST:PORT``
"""
