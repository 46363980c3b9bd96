"""Ways to move KV bytes between processes, all behind the one interface of ``interface.py``."""
