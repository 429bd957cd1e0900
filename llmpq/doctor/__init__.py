"""Whether runs would work on this host, and what to do where they would not. No torch in this process.

What may hang or crash is asked in processes of its own, with a time limit each (probing.py asks, questions.py answers).
The other modules make findings of the answers; diagnosis.py puts them together.
"""
