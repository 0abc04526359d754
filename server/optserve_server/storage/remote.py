"""Object stores, through fsspec: S3, Google Cloud Storage, Azure, SFTP, a mounted directory.

It takes the extra ``optserve-server[remote]``, and the library of the store in question: s3fs,
gcsfs, adlfs. Credentials are theirs to find, as their documentation says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from optserve_server.core.storage import StorageError
from optserve_server.storage.archive import PIECE_BYTES, ArchiveError


class RemoteStore:
    """See ObjectStore. An object is there once it is closed; a killed server leaves none, or all.

    But on a plain directory (``file://``), where a part may be left: its size tells.
    """

    def __init__(self, url: str) -> None:
        """Use what is below ``url``: ``s3://bucket/prefix``.

        Raises:
            ArchiveError: Its library is not installed, or finds nothing to open it with.
        """
        with _answering(url):
            self._files, self._root = url_to_fs(url, use_listings_cache=False)

    def sizes(self) -> Mapping[str, int]:
        """See ObjectStore."""
        with _answering(self._root):
            try:
                found = self._files.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        begin = len(self._root.rstrip("/")) + 1
        return {path[begin:]: int(info["size"]) for path, info in found.items()}

    def read(self, name: str) -> Iterator[bytes]:
        """See ObjectStore."""
        path = self._path(name)
        with _answering(path), self._files.open(path, "rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece

    def write(self, name: str, pieces: Iterator[bytes]) -> None:
        """See ObjectStore."""
        path = self._path(name)
        with _answering(path):
            if isinstance(self._files, LocalFileSystem):  # For the server's user alone.
                Path(self._root).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self._files.open(path, "wb") as file:
                for piece in pieces:
                    file.write(piece)

    def remove(self, name: str) -> None:
        """See ObjectStore."""
        path = self._path(name)
        with _answering(path):
            self._files.rm_file(path)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


@contextmanager
def _answering(what: str) -> Iterator[None]:
    """Say what an error of a store's library means: each has classes of its own.

    Raises:
        ArchiveError: Anything but a StorageError was raised.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        raise ArchiveError(f"{what}: {type(error).__name__}: {error}") from error
