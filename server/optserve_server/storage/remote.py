"""Object stores, through fsspec: S3, Google Cloud Storage, Azure, SFTP, a mounted directory.

It takes the extra ``optserve-server[remote]``, and the library of the store in question: s3fs,
gcsfs, adlfs. Credentials are theirs to find, as their documentation says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fsspec.core import url_to_fs

from optserve_server.storage.archive import PIECE_BYTES


class RemoteStore:
    """See ObjectStore. An object is there once it is closed; a killed server leaves none, or all.

    But on a plain directory (``file://``), where a part may be left: its size tells.
    """

    def __init__(self, url: str) -> None:
        """Use what is below ``url``: ``s3://bucket/prefix``."""
        self._files, self._root = url_to_fs(url, use_listings_cache=False)

    def sizes(self) -> Mapping[str, int]:
        """See ObjectStore."""
        try:
            found = self._files.find(self._root, detail=True)
        except FileNotFoundError:
            return {}
        begin = len(self._root.rstrip("/")) + 1
        return {path[begin:]: int(info["size"]) for path, info in found.items()}

    def read(self, name: str) -> Iterator[bytes]:
        """See ObjectStore."""
        with self._files.open(self._path(name), "rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece

    def write(self, name: str, pieces: Iterator[bytes]) -> None:
        """See ObjectStore."""
        path = self._path(name)
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        with self._files.open(path, "wb") as file:
            for piece in pieces:
                file.write(piece)

    def remove(self, name: str) -> None:
        """See ObjectStore."""
        self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"
