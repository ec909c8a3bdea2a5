"""`tutelage labels`: tools for existing label sets.

``arguments``   the command line of each action; standard library only
``commands``    runs an action and prints its result
``facts``       collects the facts on a label set that `show` and `report` print
``show``        prints a label set on a terminal
``report``      writes an HTML file with plots
``export``      writes labels in the file layouts of other trainers
"""
