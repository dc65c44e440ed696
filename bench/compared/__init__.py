"""The work that bench/compare_hf.py compares: a file for each kind, with one function for each side.

A function runs in a process of its own and returns `seconds`, `memory` (peak, in bytes) and, of trained models, `accuracy` or
`loss` on rows that were not trained on. `quick` makes the work small; such figures say nothing.
"""
