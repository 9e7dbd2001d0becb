"""Published and planned setups as rows of a CSV: what `famc estimate --batch` reads, and what the constants are fitted on.

`rows` makes a Setup of a row; `facts` what its note or its software adds; `unplaced` searches where no layout
is published; `whole_run` what a run of so many tokens took.
"""
