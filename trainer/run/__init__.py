"""The training job: checks before launch, Ray Train, and the loop of each worker."""
