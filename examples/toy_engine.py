"""A toy serving engine with prefill and decode in two processes: what it takes to embed kvpoll's runtime.

    python examples/toy_engine.py

Its "model" has KV that follows from the tokens, so decode can check every byte that arrives, and generates the first
token plus 1, plus 2, and so on. One request is given up by decode, to show what becomes of it.
"""

import multiprocessing
from typing import Any

import numpy as np

from kvpoll import load
from kvpoll.runtime import BootstrapServer, DecodeEndpoint, KVPoll, KVPool, Layout, PrefillEndpoint, Settings

LAYOUT = Layout(layers=(0, 1), pages=32, page_tokens=4, heads=2, head_dim=16, dtype="float16", rows=8)
PROMPTS = {101: [3, 1, 4, 1, 5, 9, 2, 6], 102: [2, 7, 1, 8], 103: [1] * 12, 104: [9, 9, 9, 9]}
GIVEN_UP = 104


def kv(tokens: list[int], layer: int, part: str) -> np.ndarray[Any, Any]:
    return np.random.default_rng([*tokens, layer, ord(part[0])]).integers(0, 256, LAYOUT.page_bytes, np.uint8)


def pages_of(prompt: list[int]) -> list[list[int]]:
    return [prompt[start : start + LAYOUT.page_tokens] for start in range(0, len(prompt), LAYOUT.page_tokens)]


def is_right(pool: KVPool, page: int, tokens: list[int]) -> bool:
    return all((pool.get(*plane, page) == kv(tokens, *plane)).all() for plane in LAYOUT.planes)


def prefill(address: str, told: Any) -> None:
    """Compute each prompt's KV page by page, and send each page as soon as it is there."""
    with PrefillEndpoint(Settings(LAYOUT, bootstrap=address)) as endpoint:
        endpoint.wait_registered(timeout_s=30)
        for room, prompt in PROMPTS.items():
            transfer = endpoint.admit(room)
            transfer.wait(KVPoll.WaitingForInput, timeout_s=30)
            for page, tokens in enumerate(pages_of(prompt)):
                for plane in LAYOUT.planes:
                    endpoint.pool.put(*plane, page, kv(tokens, *plane))
                transfer.send([page])
            transfer.send([], last=True, first_token=sum(prompt), prompt_tokens=len(prompt))
            told.put(f"prefill {room}: {transfer.wait(timeout_s=30).name} ({transfer.failure or 'all sent'})")
            transfer.release()
            transfer.wait_pages_free(timeout_s=30)


def decode(address: str, told: Any) -> None:
    """Give each request memory, and decode from it when all of it has arrived."""
    with DecodeEndpoint(Settings(LAYOUT)) as endpoint:
        for row, (room, prompt) in enumerate(PROMPTS.items()):
            transfer, parts = endpoint.admit(room, address), pages_of(prompt)
            transfer.wait(KVPoll.WaitingForInput, timeout_s=30)
            pages = [8 * row + number for number in range(len(parts))]
            transfer.abort("the client left") if room == GIVEN_UP else transfer.publish(pages, row)
            if transfer.wait(timeout_s=30) == KVPoll.Success and (said := transfer.aux()):
                transfer.commit()
                right = all(is_right(endpoint.pool, page, part) for page, part in zip(pages, parts, strict=True))
                tokens = [said.first_token + step for step in range(4)]
                told.put(f"decode {room}: {len(pages)} pages {'right' if right else 'WRONG'}, tokens {tokens}")
            else:
                told.put(f"decode {room}: {transfer.poll().name} ({transfer.failure})")
            transfer.release()
        endpoint.drain(timeout_s=30)


if __name__ == "__main__":
    with BootstrapServer(load(), load().profile("reference"), port=0) as server:
        context = multiprocessing.get_context("spawn")
        told = context.Queue()
        sides = [context.Process(target=side, args=(server.address, told)) for side in (prefill, decode)]
        for process in sides:
            process.start()
        print("\n".join(sorted(told.get(timeout=60) for _ in range(2 * len(PROMPTS)))))
        for process in sides:
            process.join(60)
