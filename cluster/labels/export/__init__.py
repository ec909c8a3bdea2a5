"""Labels in the layouts of other trainers: `tutelage labels export`."""
