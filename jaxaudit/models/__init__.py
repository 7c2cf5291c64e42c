"""Audits of whole models: every parameter of a recording, and an overview of all.

`audits` runs them, `overview` puts one row for each parameter together, `account` says it in words.
"""
