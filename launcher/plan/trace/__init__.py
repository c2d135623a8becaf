"""What a job would allocate, found by running it on tensors without data; for a process of its own."""
