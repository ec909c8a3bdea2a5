"""The student's output head fused with the loss: from hidden states to a scalar, in chunks."""
