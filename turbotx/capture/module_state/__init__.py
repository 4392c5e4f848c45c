"""The Python state that a trace read: attributes, hooks, globals, closures; guarded in every call.

In: a model while its forward runs under a trace. Out: a `StateRecord`, which can check at any time
whether everything that was read is unchanged, and otherwise report the difference::

    record.differing(range(len(record.places)))  ->  Difference("encoder.scale", "1.0", "5.0")
"""
