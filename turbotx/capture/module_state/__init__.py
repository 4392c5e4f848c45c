"""What a trace read of Python's state: attributes, hooks, globals, closures; a guard of every call.

In: a model while its forward runs under a trace. Out: a `StateRecord`, which tells at any time
whether all that was read is still as it was, and if not, what differs::

    record.differing(range(len(record.places)))  ->  Difference("encoder.scale", "1.0", "5.0")
"""
