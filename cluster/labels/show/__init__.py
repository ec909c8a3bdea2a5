"""Labels as text on a terminal: `tutelage labels show`."""
