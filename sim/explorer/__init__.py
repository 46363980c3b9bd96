"""The exhaustive explorer: every state that a small cluster can reach, and what holds in all of them."""
