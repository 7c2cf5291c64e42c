"""Where the updates go: lost updates, the second moment's ratchet, frozen tokens, and what would help.

`ledger.Ledger` takes the windows of an audit and gives a dataset for each group of its file; `verdict` puts these
into sentences, `figures` draws them, `report` makes one page of everything.
"""
