"""What a rank does around its machines: tables, timers, queues, agreement. Sans-I/O, for simulator and runtime alike.

A rank is handed facts and carries out orders. Whatever it needs of the outside (the time, a timer, a message, an
HTTP call, a write) it asks of its *host*, which is virtual in the simulator and real in the runtime. So the code
that reproduces a race is the code that serves.
"""
