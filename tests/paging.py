"""Lists that come in pages, walked from the first page to the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from drivers import Driver

from optserve.v1.optimizer_service_pb2 import ListLossPointsRequest, ListLossPointsResponse


class Page(Protocol):
    """Some of a list."""

    next_page_token: str
    """What to ask for the next page with; empty: this was the last."""


_Page = TypeVar("_Page", bound=Page)


def pages(ask: Callable[[str], _Page]) -> Iterator[_Page]:
    """Yield all pages of a list, one at least; ``ask`` gets one by its token."""
    token = ""
    while True:
        page = ask(token)
        yield page
        token = page.next_page_token
        if not token:
            return


def point_pages(driver: Driver, request: ListLossPointsRequest) -> Iterator[ListLossPointsResponse]:
    """Yield the pages of a loss history; the request gets each page's token."""

    def ask(token: str) -> ListLossPointsResponse:
        request.page_token = token
        return driver.loss_points(request)

    return pages(ask)
