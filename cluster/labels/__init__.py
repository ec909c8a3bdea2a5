"""`tutelage labels`: tools for label sets that exist.

``arguments``   the command line of each action; standard library only
``commands``    runs an action and prints its result
``facts``       the table that describes a label set, for `show` and `report`
``show``        a label set on a terminal
``report``      one HTML file with plots
``export``      labels in the file layouts of other trainers
"""
