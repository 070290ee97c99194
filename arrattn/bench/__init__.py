"""
What two commands run.

``arrattn compare``: a real model, four families, one table.
``arrattn bench``: ours and other libraries in turn, and how their times compare.
"""
