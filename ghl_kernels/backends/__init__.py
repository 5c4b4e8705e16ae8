"""One module per implementation, all with the same functions; see eager.py for what each computes.

Besides the operations a backend has ``status() -> (available, reason)`` and
``refusal(device, dtype) -> reason or ""``, which is asked before every operation and must be cheap.
"""
