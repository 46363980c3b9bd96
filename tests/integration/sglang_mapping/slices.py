"""SGLang's own head slices: reads questions from standard input, prints its answers.

A question: [prefill TP, decode TP, prefill rank, decode rank, KV heads of the model]. An answer: the first head of the
slice at the source, how many heads, and the first at the target, each counted among the heads that the rank keeps.
"""

from __future__ import annotations

import json
import os
import sys

import engine_on_cpu  # noqa: F401  (lets sglang import where torchvision is absent)
from sglang.srt.disaggregation.common.staging_buffer import compute_head_slice_params

print(json.dumps([compute_head_slice_params(*question)[:3] for question in json.load(sys.stdin)]), flush=True)
os._exit(0)
