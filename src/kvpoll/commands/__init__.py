"""The verbs of the command line, one a file, and what they share.

plan: what a run is to be, and the line that repeats it. verdict: what came of it, as numbers and sentences.
screen: tables and progress. options: the options that several verbs have. Every verb's file has ``add``, which
declares it, and ``act``, which does it and returns the exit status: 0 holds, 1 violated, 2 bad input, 3 a defect
of kvpoll itself, 130 interrupted.
"""
