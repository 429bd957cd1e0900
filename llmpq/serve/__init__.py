"""The OpenAI-compatible server on a session of an engine, and how bodies in OpenAI's form are read.

The forms are those of https://platform.openai.com/docs/api-reference, as its client reads them.
"""
