"""The rounding certificate: PyTorch against XLA against IEEE 754, operation by operation.

`checks` lists the operations, `operands` draws what they are tried on, `modes` runs them, `exact` is the oracle,
`tally` counts, `causes` explains what differs, and `certificate` puts it together.
"""
