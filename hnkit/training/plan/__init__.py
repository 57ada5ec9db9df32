"""Before anything is spent: what a training run needs on a card, how long it takes there, and what makes it fit.

A step is counted on tensors that have shapes and no memory (`skeleton`, `ledger`, `count`), put together to a peak and
a time (`plan`), and shown (`view`). No card, no weights and no network are needed.
"""
