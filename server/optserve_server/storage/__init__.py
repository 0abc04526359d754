"""Where sessions survive: snapshots, journals and the catalogue, on a disk.

It speaks the words of ``core/storage.py``, and knows nothing else of the server.
"""
