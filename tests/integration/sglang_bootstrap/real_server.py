"""As many of SGLang's own bootstrap servers as are asked for, until standard input ends. Prints their ports as JSON."""

from __future__ import annotations

import json
import os
import sys

from engine_on_cpu import free_port, start_bootstrap


def main() -> None:
    ports = [free_port() for _ in range(int(sys.argv[1]))]
    for port in ports:
        start_bootstrap(port)
    print(json.dumps(ports), flush=True)
    sys.stdin.read()
    os._exit(0)  # SGLang leaves threads that never end


if __name__ == "__main__":
    main()
