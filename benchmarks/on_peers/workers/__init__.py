"""What runs in the environments of the programs that are compared, each in a process of its own."""
