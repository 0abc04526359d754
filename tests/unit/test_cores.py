"""On how many cores a thread of the server calculates."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from optserve_server.app import _use_cores


def test_a_thread_keeps_the_cores_it_was_given_whatever_others_set_before_it_calculates() -> None:
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as other:
        thread.submit(_use_cores, 1).result()
        other.submit(_use_cores, 2).result()  # As the pool's threads do after the event loop.
        assert thread.submit(torch.get_num_threads).result() == 1
        assert other.submit(torch.get_num_threads).result() == 2
    torch.set_num_threads(before)
