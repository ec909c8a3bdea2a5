"""The student's output head fused with the loss: hidden states to one scalar, in chunks."""
