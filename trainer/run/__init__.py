"""The training job: pre-launch checks, Ray Train, and each worker's training loop."""
