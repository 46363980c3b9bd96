"""The verbs of the command line, one a file, and what they share.

verbs: all of them, and what becomes of an error. plan: what a run is to be, and the line that repeats it.
verdict: what came of it, as numbers and sentences. screen: tables and progress. options: those that several
verbs have. status: what the exit status means. Every verb's file has ``add``, which declares it, and ``act``,
which does it and returns the exit status.
"""
