"""One HTML file about a label set, with plots: `tutelage labels report`."""
