"""How other engines are told a plan: their flags and files, and what is lost on the way.

Each engine has a file, whose docstring names where its flags are documented. None of them is imported here.
"""
