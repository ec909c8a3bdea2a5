"""`tutelage labels`: what looks after label sets.

``arguments``   the words of each action; the standard library only
``actions``     from words to work
``report``      one HTML file with plots
"""
