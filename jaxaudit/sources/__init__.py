"""Where a recording's tensors come from: files of several formats behind one interface, `source.Source`.

Nothing here runs code from a file: no pickle but through `torch.load(weights_only=True)`, behind a list of what
its pickle may name; HDF5 and torch files are looked into by processes of their own, with limits.
"""
