"""The commands as people type them: each module describes one command line, and calls what does the work.

`python -m jaxaudit NAME`, the command `jaxaudit NAME` and the script of a checkout are one implementation each.
Nothing here imports JAX before a command line was understood: help and refusals are immediate.
"""
